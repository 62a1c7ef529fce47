"""Tests of balent_seg: each is a second, slower implementation of a claim, or what may
not change.

python -m pytest -q test_balent_seg.py    all of them, two minutes on two cores
python test_balent_seg.py                 those of sections 1 to 7, in ten seconds
"""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mpmath  # comes with torch, by way of sympy
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import balent_seg as bs

torch.set_num_threads(1)  # their number changes the last digits of a sum


# ---- 1. Balanced entropy
def integrate_over_beta(alpha, beta, integrand):
    """Integral over x in (0, 1) of integrand(ln x, ln f(x)), f the Beta density.

    In z = ln(x / (1 - x)) the ends are tame; dx = x (1 - x) dz.
    """

    def in_z(z):
        log_x = -np.logaddexp(0, -z)
        log_1_x = -np.logaddexp(0, z)
        log_f = (alpha - 1) * log_x + (beta - 1) * log_1_x
        log_f -= scipy.special.betaln(alpha, beta)
        return integrand(log_x, log_f) * math.exp(log_x + log_1_x)

    mode = math.log(alpha / beta)
    ends = [(-700, mode - 5), (mode - 5, mode + 5), (mode + 5, 700)]
    return sum(scipy.integrate.quad(in_z, *end, limit=500)[0] for end in ends)


def minus_f_log_f(log_x, log_f):
    return -math.exp(log_f) * log_f


def minus_xf_log_xf(log_x, log_f):
    return -math.exp(log_x + log_f) * (log_x + log_f)


BETAS = [(1.5, 0.7), (2, 2), (1.01, 30), (40, 3), (300, 500), (5, 0.2)]


@pytest.mark.parametrize("alpha, beta", BETAS)
def test_beta_entropy_is_its_integral(alpha, beta):
    expected = integrate_over_beta(alpha, beta, minus_f_log_f)
    found = bs.beta_entropy(torch.tensor(float(alpha)), torch.tensor(float(beta)))
    assert found.item() == pytest.approx(expected, abs=1e-5, rel=1e-5)


def draws_of_pixels(T=20, C=5, pixels=40, scale=3.0, seed=0):
    """prob_TCN: softmax draws of pixels that are undecided to various degrees."""
    generator = torch.Generator().manual_seed(seed)
    centre_1CN = scale * torch.randn(1, C, pixels, generator=generator)
    spread_11N = 2 * torch.rand(1, 1, pixels, generator=generator)
    noise_TCN = torch.randn(T, C, pixels, generator=generator)
    return (centre_1CN + spread_11N * noise_TCN).softmax(1)


def moments_of(prob_TCN):
    """mean_CN and the population variance var_CN."""
    return prob_TCN.mean(0), prob_TCN.var(0, correction=0)


def test_balanced_entropy_is_the_integral_of_its_definition():
    """MJEnt sums -int x f_i(x) ln(x f_i(x)) dx over the classes: H(m) is in it once."""
    mean_CN, var_CN = moments_of(draws_of_pixels(C=4, pixels=12, scale=1.5))
    found_N = bs.balanced_entropy(mean_CN, var_CN, dim=0)
    for n in range(12):
        mjent = 0.0
        entropy = 0.0
        for m, v in zip(mean_CN[:, n].tolist(), var_CN[:, n].tolist()):
            s = m * (1 - m) / v - 1
            mjent += integrate_over_beta(m * s, (1 - m) * s, minus_xf_log_xf)
            entropy -= m * math.log(m)
        expected = mjent / (entropy + math.log(2))
        assert found_N[n].item() == pytest.approx(expected, abs=1e-4, rel=1e-4)


def exact_beta_entropy(alpha, beta):
    """The textbook formula with 50 digits."""
    with mpmath.workdps(50):
        a = mpmath.mpf(alpha)
        b = mpmath.mpf(beta)
        h = mpmath.log(mpmath.beta(a, b)) + (a + b - 2) * mpmath.psi(0, a + b)
        return float(h - (a - 1) * mpmath.psi(0, a) - (b - 1) * mpmath.psi(0, b))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float64, 2e-7)])
def test_beta_entropy_is_exact_from_1e_8_to_1e13(dtype, bound):
    powers = torch.tensor(10.0 ** np.linspace(-8, 13, 22), dtype=dtype)
    alpha, beta = torch.cartesian_prod(torch.cat([powers, 1 + powers]), powers).T
    pairs = zip(alpha.tolist(), beta.tolist())
    exact = torch.tensor([exact_beta_entropy(a, b) for a, b in pairs]).double()
    error = (bs.beta_entropy(alpha, beta) - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < bound


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def degenerate_moments(dtype):
    """mean_7C and var_7C where the formula has no value, in the order of BalEnt."""
    sure = torch.tensor([1, 0, 0, 0], dtype=dtype)
    coin = torch.tensor([0.5, 0.5, 0, 0], dtype=dtype)
    even = torch.full((4,), 0.25, dtype=dtype)
    rows = [
        (even, even * (1 - even)),  # each draw is sure of another class
        (coin, coin * (1 - coin)),
        (sure, 0 * sure),  # all draws agree
        (coin, 0 * coin),
        (even, 0 * even),
        (even, torch.full_like(even, 1e-9)),
        (even, torch.full_like(even, 1e-2)),
    ]
    return torch.stack([m for m, _ in rows]), torch.stack([v for _, v in rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_finite_where_the_formula_is_not(dtype):
    mean, var = degenerate_moments(dtype)
    assert bs.balanced_entropy(mean, var).isfinite().all()
    assert bs.balent_acquisition(mean, var).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_pixels_are_in_the_right_order(dtype):
    apart, coins, sure, *agreed = bs.balanced_entropy(
        *degenerate_moments(dtype)
    ).tolist()
    assert max(apart, coins) < sure < agreed[0] < agreed[1]
    assert agreed[1] <= agreed[2] + 1e-6
    assert agreed[2] < agreed[3]


def test_acquisition_inverts_what_is_not_negative():
    mean_CN, var_CN = moments_of(draws_of_pixels(pixels=200))
    value_N = bs.balanced_entropy(mean_CN, var_CN, 0)
    score_N = bs.balent_acquisition(mean_CN, var_CN, 0)
    high_N = value_N >= 0
    assert 0 < high_N.sum() < 200
    assert torch.equal(score_N[high_N], 1 / value_N[high_N])
    assert torch.equal(score_N[~high_N], value_N[~high_N])


def test_score_does_not_depend_on_the_order_of_classes():
    mean_CN, var_CN = moments_of(draws_of_pixels())
    order = [3, 0, 4, 2, 1]
    expected = bs.balanced_entropy(mean_CN, var_CN, 0)
    found = bs.balanced_entropy(mean_CN[order], var_CN[order], 0)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_classes_may_lie_along_any_dimension():
    mean_CN, var_CN = moments_of(draws_of_pixels())
    expected = bs.balent_acquisition(mean_CN, var_CN, 0)
    assert torch.equal(bs.balent_acquisition(mean_CN.T, var_CN.T), expected)
    assert torch.equal(bs.balent_acquisition(mean_CN.T, var_CN.T, -1), expected)


@pytest.mark.parametrize("shape", [(5, 1), (1, 40), (5,), (5, 39)])
def test_unequal_shapes_are_refused(shape):
    mean_CN, _ = moments_of(draws_of_pixels())
    with pytest.raises(ValueError, match="expected equal shapes"):
        bs.balanced_entropy(mean_CN, torch.zeros(shape), 0)


def test_section_1_runs_alone():
    source = Path(bs.__file__).read_text("utf-8")
    section = source[source.index("# ---- 1. ") : source.index("# ---- 2. ")]
    alone = {}
    exec("import math, torch\n" + section, alone)  # noqa: S102
    moments = moments_of(draws_of_pixels())
    expected = bs.balent_acquisition(*moments, 0)
    assert torch.equal(alone["balent_acquisition"](*moments, 0), expected)


# ---- 2. Acquisition functions
def as_moments(prob_TCN):
    """Moments of shape (1, C, 1, N)."""
    mean_CN, var_CN = moments_of(prob_TCN)
    cond_N = torch.special.entr(prob_TCN).sum(1).mean(0)
    return bs.Moments(mean_CN[None, :, None], var_CN[None, :, None], cond_N[None, None])


def entropy_of(p):
    return -(p * np.log(p)).sum()


FORMULAS = {
    "entropy": lambda p_TC: entropy_of(p_TC.mean(0)),
    "margin": lambda p_TC: np.subtract(*np.sort(p_TC.mean(0))[-2:]),
    "least_confidence": lambda p_TC: 1 - p_TC.mean(0).max(),
    "bald": lambda p_TC: entropy_of(p_TC.mean(0)) - np.mean([*map(entropy_of, p_TC)]),
    "mean_std": lambda p_TC: p_TC.std(0).mean(),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_baseline_is_its_formula_at_each_pixel(name):
    prob_TCN = draws_of_pixels(pixels=9)
    found_N = bs.ACQUISITIONS[name](as_moments(prob_TCN))[0, 0]
    for n in range(9):
        expected = FORMULAS[name](prob_TCN[:, :, n].double().numpy())
        assert found_N[n].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [x for x in bs.ACQUISITIONS if x != "random"])
def test_an_undecided_pixel_scores_higher_than_a_certain_one(name):
    certain_TC = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    undecided_TC = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3]])
    moments = as_moments(torch.stack([certain_TC, undecided_TC], 2))
    score = bs.ACQUISITIONS[name](moments, torch.Generator().manual_seed(0))
    assert score.isfinite().all()
    assert score[0, 0, 1] > score[0, 0, 0]


def test_power_bald_picks_in_proportion_to_bald():
    bald_N = torch.tensor([0.05, 0.1, 0.2, 0.4])
    half_1C1N = torch.full((1, 2, 1, 4), 0.5)
    moments = bs.Moments(half_1C1N, 0 * half_1C1N, math.log(2) - bald_N[None, None])
    generator = torch.Generator().manual_seed(0)
    wins = torch.zeros(4)
    for _ in range(4000):
        wins[bs.ACQUISITIONS["power_bald"](moments, generator).argmax()] += 1
    assert torch.allclose(wins / 4000, bald_N / bald_N.sum(), atol=0.03)


# ---- 3. Network
@torch.no_grad()
def thinned_passes(model, x_B3HW, samples, seed):
    """prob_TBCHW in float64, a pass of each network without the dropped channels."""
    p = model.dropout.p
    channels = model.classify.in_channels
    generator = torch.Generator().manual_seed(seed)
    keep_TD = torch.rand(samples, channels, generator=generator) >= p
    feature_BDhw = model.eval().features(x_B3HW).double()
    probs = []
    for keep_D in keep_TD:
        weight = model.classify.weight.double() * keep_D[:, None, None] / (1 - p)
        logits = F.conv2d(feature_BDhw, weight, model.classify.bias.double())
        logits = F.interpolate(logits, x_B3HW.shape[-2:], mode="bilinear")
        probs.append(logits.softmax(1))
    return torch.stack(probs)


def decided_network(C=4, dropout=0.3, bias=0.0):
    """A network whose draws differ; with a `bias`, all of them prefer class 0."""
    torch.manual_seed(0)
    model = bs.MCDropoutFCN(C, "small", dropout, "none")
    model.classify.weight.data *= 8
    model.classify.bias.data[0] = bias
    return model


@pytest.mark.parametrize("C, bias", [(4, 0), (4, 8), (30, 0)])
def test_moments_are_those_of_passes_of_thinned_networks(C, bias):
    model = decided_network(C, bias=bias)
    x_B3HW = torch.rand(2, 3, 37, 50)
    prob_TBCHW = thinned_passes(model, x_B3HW, 7, seed=3)
    found = model.mc_moments(x_B3HW, 7, seed=3)
    expected_var = prob_TBCHW.var(0, correction=0)
    expected_entropy = torch.special.entr(prob_TBCHW).sum(2).mean(0)
    assert (found.mean_BCHW - prob_TBCHW.mean(0)).abs().max() < 2e-6
    assert torch.allclose(found.var_BCHW.double(), expected_var, 0.02, 1e-13)
    assert (found.cond_entropy_BHW - expected_entropy).abs().max() < 1e-5


def test_moments_without_dropout_are_those_of_one_pass():
    model = decided_network(dropout=0.0).eval()
    x_B3HW = torch.rand(1, 3, 16, 20)
    found = model.mc_moments(x_B3HW, 5)
    assert torch.allclose(found.mean_BCHW, model(x_B3HW).softmax(1), atol=1e-6)
    assert found.var_BCHW.max() < 1e-12


def test_moments_of_an_image_do_not_depend_on_the_batch():
    model = decided_network()
    x_B3HW = torch.rand(3, 3, 16, 20)
    together = model.mc_moments(x_B3HW, 5)
    alone = model.mc_moments(x_B3HW[1:2], 5)
    for expected, found in zip(alone, together):
        assert torch.allclose(expected[0], found[1], atol=1e-6)


def test_dropout_acts_in_train_mode_only():
    model = decided_network()
    x_B3HW = torch.rand(2, 3, 16, 20)
    assert torch.equal(model.eval()(x_B3HW), model(x_B3HW))
    assert not torch.equal(model.train()(x_B3HW), model(x_B3HW))


ARCHS = ["fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large"]


@pytest.mark.parametrize("arch", ARCHS)
def test_network_computes_what_torchvisions_does(arch):
    reference = torchvision.models.get_model(arch, weights_backbone=None, num_classes=5)
    model = bs.MCDropoutFCN(5, arch, weights="none")
    weights = reference.eval().state_dict().values()
    model.load_state_dict(dict(zip(model.state_dict(), weights)))
    x_B3HW = torch.rand(1, 3, 40, 56)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = reference((x_B3HW - mean) / std)["out"]
        assert torch.allclose(model.eval()(x_B3HW), expected, rtol=1e-3, atol=1e-3)


def test_there_is_no_dropout_within_the_trunk():
    model = bs.MCDropoutFCN(5, "deeplabv3_mobilenet_v3_large", weights="none")
    rates = [m.p for m in model.neck.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.0]


def test_imagenet_weights_are_asked_for_by_name(monkeypatch):
    """The download is replaced by weights that are all 0.25."""

    def download(self, *args, **kwargs):
        assert "resnet50" in self.url
        assert self.name == "IMAGENET1K_V1"
        state = torchvision.models.resnet50(weights=None).state_dict()
        return {name: torch.full_like(value, 0.25) for name, value in state.items()}

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", download)
    model = bs.MCDropoutFCN(5, "fcn_resnet50", weights="imagenet")
    assert all((weight == 0.25).all() for weight in model.backbone.parameters())
    assert not any((weight == 0.25).all() for weight in model.neck[0].parameters())


def test_mixed_precision_scores_within_the_error_of_bfloat16():
    model = decided_network()
    x_B3HW = torch.rand(1, 3, 32, 32)
    full = model.mc_moments(x_B3HW, 5)
    model.mixed = True
    mixed = model.mc_moments(x_B3HW, 5)
    assert mixed.mean_BCHW.dtype == torch.float32
    assert 0 < (full.mean_BCHW - mixed.mean_BCHW).abs().max() < 0.1


# ---- 4. Labels
CLASSES = ["road", "sky"]
HEADER = "image,y,x,label"


def read_labels(tmp_path, *lines, labels=None):
    """What add_labels makes of these lines, for the images a and c/d of 9 x 9 pixels."""
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([HEADER, *lines]), "utf-8-sig")
    return bs.add_labels(
        path=path, labels=labels or {"a": {}, "c/d": {}}, classes=CLASSES, size=(9, 9)
    )


ANSWERS = [
    ("sky", 1),
    ("ROAD", 0),
    ("1", 1),
    ("void", bs.IGNORE),
    ("", None),
]


@pytest.mark.parametrize("text, number", ANSWERS)
def test_a_label_is_a_name_or_a_number(text, number, tmp_path):
    assert read_labels(tmp_path, f"c/d,3,8,{text}") == [["c/d", 3, 8, number]]


WRONG_ROWS = [
    ("z,1,2,sky", "name of a training image"),
    ("a,1,sky", "image,y,x,label"),
    ("a,1,2,sky,", "image,y,x,label"),
    ("a,1,b,sky", "x from 0 to 8"),
    ("a,9,1,sky", "y from 0 to 8"),
    ("a,1,9,sky", "x from 0 to 8"),
    ("a,-1,1,sky", "y from 0 to 8"),
    ("a,1,1.5,sky", "x from 0 to 8"),
    ("a,2,2,2", "as label road, sky, a number below 2 or void"),
    ("a,2,2,tree", "as label road, sky"),
    ("a,1,1,void", "has a row already"),
    ('a,2,2,"sky', "(?s:.*)as label"),
]


@pytest.mark.parametrize("row, expected", WRONG_ROWS)
def test_a_wrong_row_is_named_by_its_line(row, expected, tmp_path):
    with pytest.raises(bs.InputError, match=f"labels.csv:[34]: .*{expected}"):
        read_labels(tmp_path, "a,1,1,sky", row, "a,5,5,sky")


def test_blank_lines_are_no_rows(tmp_path):
    assert read_labels(tmp_path, "", "a,1,2,sky", "") == [["a", 1, 2, 1]]


def test_a_pixel_of_an_earlier_round_is_refused(tmp_path):
    earlier = {"a": {(1, 2): 0}, "c/d": {}}
    with pytest.raises(bs.InputError, match="labels.csv:3: .*has a row already"):
        read_labels(tmp_path, "c/d,1,2,sky", "a,1,2,sky", labels=earlier)


def test_a_table_without_its_header_is_refused(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a;1;2;sky")
    with pytest.raises(bs.InputError, match="labels.csv:1: expected the header"):
        bs.add_labels({"a": {}}, path, CLASSES, (9, 9))


def test_streams_of_different_keys_differ():
    keys = ["picks 0 1", "picks 1 0", "order 0 1", "picks 0 1 0"]
    numbers = {torch.rand(1, generator=bs.stream(key)).item() for key in keys}
    assert len(numbers) == len(keys)
    assert bs.stream("picks 0").initial_seed() == bs.stream("picks 0").initial_seed()


# ---- 5. Training
def sparse_labels():
    """label_BHW with some 2 % of its pixels labelled, and points_BN3 of them."""
    torch.manual_seed(0)
    label_BHW = torch.randint(4, (2, 37, 50))
    label_BHW[torch.rand(2, 37, 50) > 0.02] = bs.IGNORE
    label_BHW[0, 0, 0] = 1  # corners, where the weights of upsampling end
    label_BHW[1, -1, -1] = 1
    points = [bs.points_at(label_HW) for label_HW in label_BHW]
    return label_BHW, torch.nn.utils.rnn.pad_sequence(points, True, bs.IGNORE)


def test_loss_at_points_is_the_masked_dense_cross_entropy():
    label_BHW, points_BN3 = sparse_labels()
    logits = torch.randn(2, 4, 10, 13, dtype=torch.double, requires_grad=True)
    size_2 = torch.tensor([50, 37])
    xy_BN2 = (2 * points_BN3[..., [1, 0]].double() + 1) / size_2 - 1
    loss, count = bs.point_loss(logits, xy_BN2, points_BN3[..., 2])
    upsampled = F.interpolate(logits, (37, 50), mode="bilinear")
    dense = F.cross_entropy(
        upsampled, label_BHW, ignore_index=bs.IGNORE, reduction="sum"
    )
    assert count == (label_BHW != bs.IGNORE).sum()
    assert torch.allclose(loss, dense)
    (expected,) = torch.autograd.grad(dense, logits)
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(found, expected)


def random_views(count=40):
    """Views of an image that holds its own coordinates, and a point of each."""
    torch.manual_seed(0)
    y_B1 = torch.randint(8, 52, (count, 1))
    x_B1 = torch.randint(8, 72, (count, 1))
    points_BN3 = torch.stack([y_B1, x_B1, torch.ones_like(x_B1)], 2)
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    image_B3HW = torch.stack([rows, columns, rows]).float().expand(count, -1, -1, -1)
    views = bs.augment(image_B3HW, points_BN3, *bs.random_affine(count))
    return points_BN3, *views


def test_a_view_shows_at_a_point_where_the_point_came_from():
    points_BN3, view_B3HW, xy_BN2, _ = random_views()
    seen_BC1N = F.grid_sample(view_B3HW, xy_BN2[:, None], align_corners=False)
    inside_B = (xy_BN2.abs() < 0.95).all(-1)[:, 0]
    error_B2 = seen_BC1N[:, :2, 0, 0] - points_BN3[:, 0, :2]
    assert inside_B.sum() > 20
    assert error_B2[inside_B].abs().max() < 0.01


def test_points_out_of_view_are_ignored():
    _, _, xy_BN2, class_BN = random_views()
    out_BN = (xy_BN2.abs() > 1).any(-1)
    assert out_BN.any()
    assert torch.equal(class_BN == bs.IGNORE, out_BN)
    assert (class_BN[~out_BN] == 1).all()


def test_views_zoom_log_uniformly_from_a_half_to_two():
    torch.manual_seed(0)
    scale_B2, _ = bs.random_affine(4000)
    octave_B = scale_B2[:, 1].log2()
    quartiles = octave_B.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert torch.allclose(quartiles, torch.linspace(-1, 1, 5), atol=0.06)
    assert torch.equal(scale_B2[:, 0].abs(), scale_B2[:, 1])


def test_half_of_the_views_are_flipped():
    torch.manual_seed(0)
    scale_B2, _ = bs.random_affine(4000)
    assert (scale_B2[:, 0] < 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_of_view_and_image_the_smaller_lies_anywhere_within_the_larger():
    torch.manual_seed(0)
    scale_B2, shift_B2 = bs.random_affine(4000)
    free_B1 = (1 - scale_B2[:, 1:]).abs()
    place_B2 = shift_B2 / free_B1
    quartiles = place_B2.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), dim=0)
    expected = torch.linspace(-1, 1, 5)[:, None].expand(5, 2)
    assert torch.allclose(quartiles, expected, atol=0.06)


def tiny_network(lr=1e-2, pretrained=False):
    """A network of one convolution, and its optimizer."""
    torch.manual_seed(0)
    model = bs.MCDropoutFCN(4, "small", 0.2, "none")
    return model, bs.make_optimizer(model, lr, pretrained)


UNLABELLED = [torch.zeros(2, 0, 3).long(), torch.full((2, 3, 3), bs.IGNORE)]


@pytest.mark.parametrize("points_BN3", UNLABELLED)
def test_a_batch_without_a_labelled_point_changes_nothing(points_BN3):
    model, optimizer = tiny_network()
    optimizer.param_groups[0]["weight_decay"] = 0
    optimizer.param_groups[1]["weight_decay"] = 0
    before = [parameter.clone() for parameter in model.parameters()]
    batch = (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), points_BN3)
    assert bs.train(model, [batch] * 3, optimizer, 3) == 0
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("pretrained, rate", [(True, 1e-3), (False, 1e-2)])
def test_a_pretrained_backbone_learns_at_a_tenth_of_the_rate(pretrained, rate):
    model, optimizer = tiny_network(pretrained=pretrained)
    backbone, head = optimizer.param_groups
    assert len(backbone["params"]) == len(list(model.backbone.parameters()))
    assert len(backbone["params"]) + len(head["params"]) == len([*model.parameters()])
    assert (backbone["lr"], head["lr"]) == (pytest.approx(rate), 1e-2)


def test_the_learning_rate_falls_to_zero_over_the_steps():
    model, optimizer = tiny_network()
    rates = []
    optimizer.register_step_pre_hook(
        lambda x, *_: rates.append(x.param_groups[-1]["lr"])
    )
    batch = (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), UNLABELLED[0])
    bs.train(model, [batch] * 4, optimizer, 4)
    expected = [1e-2 * (1 - step / 4) ** 0.9 for step in range(4)]
    assert rates == pytest.approx(expected)
    assert optimizer.param_groups[-1]["lr"] == 0


def one_scene():
    """image_13HW, label_HW and points_N3, a seventh of the pixels, of a scene."""
    image, label = bs.synthetic_scene(0)
    image_3HW = torch.from_numpy(np.array(image.resize((64, 48)))).movedim(2, 0)
    label_HW = torch.from_numpy(np.array(label.resize((64, 48), Image.NEAREST)))
    return image_3HW[None], label_HW, bs.points_at(label_HW)[::7]


def train_on_scene(points_N3, steps):
    """A network after some steps on a scene, and the loss that `train` returns."""
    torch.manual_seed(0)
    model = bs.MCDropoutFCN(8, "small", 0.2, "none")
    optimizer = bs.make_optimizer(model, 5e-3, False)
    batches = [(one_scene()[0], points_N3[None])] * steps
    return model, bs.train(model, batches, optimizer, steps)


def test_training_lowers_the_loss_on_its_points():
    points_N3 = one_scene()[2]
    _, first = train_on_scene(points_N3, 1)
    _, last = train_on_scene(points_N3, 60)
    assert last < first / 2


def test_labels_are_learned_better_than_labels_shuffled():
    image_13HW, label_HW, points_N3 = one_scene()
    shuffled_N3 = points_N3.clone()
    shuffled_N3[:, 2] = points_N3[torch.randperm(len(points_N3)), 2]
    hits = []
    for given_N3 in (points_N3, shuffled_N3):
        model, _ = train_on_scene(given_N3, 60)
        hits.append((bs.predict(model, image_13HW)[0] == label_HW).float().mean())
    assert hits[0] > hits[1] + 0.2


# ---- 6. Evaluation
def some_predictions():
    """pred and truth (3, 9, 9) of 6 classes; 2 and 4 do not occur in the truth."""
    torch.manual_seed(0)
    truth = torch.randint(0, 4, (3, 9, 9))
    truth[truth == 2] = 5
    truth[torch.rand(truth.shape) < 0.2] = bs.IGNORE
    return torch.randint(0, 6, (3, 9, 9)), truth


@pytest.mark.parametrize("k", range(6))
def test_iou_is_hits_over_either(k):
    pred, truth = some_predictions()
    found = bs.iou_per_class(bs.confusion_matrix(pred, truth, 6))[k].item()
    hit = (truth == k) & (pred == k)
    either = (truth == k) | ((pred == k) & (truth != bs.IGNORE))
    expected = math.nan
    if (truth == k).any():
        expected = (hit.sum() / either.sum()).item()
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_prediction_is_the_most_probable_class():
    model = decided_network().train()
    image_B3HW = torch.randint(256, (2, 3, 16, 20), dtype=torch.uint8)
    found = bs.predict(model, image_B3HW)
    expected = model.eval()(image_B3HW / 255).argmax(1)
    assert torch.equal(found, expected)


def test_a_network_that_diverged_is_refused():
    model = decided_network(bias=math.nan)
    with pytest.raises(bs.InputError, match="lower --lr"):
        bs.predict(model, torch.zeros(1, 3, 16, 20, dtype=torch.uint8))


# ---- 7. Acquisition
def free_pixels():
    """score_HW that rises along the rows, and free_HW without the last pixel."""
    free_HW = torch.ones(4, 5, dtype=torch.bool)
    free_HW[3, 4] = False
    return torch.arange(20.0).reshape(4, 5), free_HW


def test_the_best_free_pixels_are_picked_in_order():
    score_HW, free_HW = free_pixels()
    assert bs.pick_pixels(score_HW, free_HW, 3).tolist() == [[3, 3], [3, 2], [3, 1]]


def test_no_more_pixels_are_picked_than_are_free():
    score_HW, free_HW = free_pixels()
    assert len(bs.pick_pixels(score_HW, free_HW, 50).unique(dim=0)) == 19
    assert bs.pick_pixels(score_HW, 0 * free_HW, 50).shape == (0, 2)


def test_ties_are_broken_at_random():
    _, free_HW = free_pixels()
    counts_HW = torch.zeros(4, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1900):
        y, x = bs.pick_pixels(torch.zeros(4, 5), free_HW, 1, 0.0, generator)[0]
        counts_HW[y, x] += 1
    assert (counts_HW[free_HW] - 100).abs().max() < 40
    assert counts_HW[3, 4] == 0


def test_top_draws_at_random_from_the_best_part():
    score_HW, free_HW = free_pixels()
    counts_N = torch.zeros(20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        yx_N2 = bs.pick_pixels(score_HW, free_HW, 2, 0.5, generator)
        counts_N[score_HW[yx_N2[:, 0], yx_N2[:, 1]].long()] += 1
    assert (counts_N[9:19] - 200).abs().max() < 50  # the best ten of nineteen
    assert counts_N.sum() == counts_N[9:19].sum()


WRONG_FUNCTIONS = [
    (lambda m, generator=None: m.mean_BCHW, "mine gives shape"),
    (lambda m, generator=None: m.mean_BCHW[:, 0] * math.nan, "mine gives .* NaN"),
]


@pytest.mark.parametrize("function, message", WRONG_FUNCTIONS)
def test_a_function_of_the_wrong_shape_or_nan_is_named(function, message, monkeypatch):
    monkeypatch.setitem(bs.ACQUISITIONS, "mine", function)
    image_3HW = torch.zeros(3, 16, 20, dtype=torch.uint8)
    with pytest.raises(bs.InputError, match=message):
        bs.score_pixels(decided_network(), "mine", image_3HW, 5, bs.stream("0"))


# ---- 8. Data
def write_images(root, split, seeds, size=(64, 48)):
    """Scenes, in CamVid's layout."""
    (root / split).mkdir(parents=True)
    (root / f"{split}annot").mkdir()
    for seed in seeds:
        image, label = bs.synthetic_scene(seed)
        image.resize(size).save(root / split / f"{split}{seed}.png")
        label = label.resize(size, Image.NEAREST)
        label.save(root / f"{split}annot" / f"{split}{seed}.png")


def write_folder(root):
    """A dataset `folder` of four training and two test images, 48 x 64."""
    write_images(root, "train", range(4))
    write_images(root, "test", range(4, 6))
    (root / "classes.txt").write_text(
        bs.DATASETS["synthetic"].classes.replace(", ", "\n")
    )
    return root


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that tests only read."""
    return write_folder(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture
def folder(shared_folder, tmp_path):
    """A folder of one's own, to be changed."""
    return Path(shutil.copytree(shared_folder, tmp_path / "folder"))


def labels_of(frames):
    return [label_HW.numpy() for _, _, label_HW in frames]


def test_frames_are_scaled_down_to_fit(shared_folder):
    train, _ = bs.open_dataset("folder", shared_folder, (40, 32))
    name, image_3HW, label_HW = train[3]
    raw = np.array(Image.open(shared_folder / "trainannot/train3.png"))
    assert name == "train3"
    assert image_3HW.shape == (3, 40, 32)
    assert np.array_equal(label_HW[:24], raw[1::2, 1::2])
    assert (label_HW[24:] == bs.IGNORE).all()


def test_photographs_are_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    grey = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(12, 20))
    grey.save(folder / "train/train0.png", exif=exif)
    pool, _ = bs.open_dataset("folder", folder, (32, 32), asking=True)
    _, image_3HW, label_HW = pool[0]
    assert (label_HW[:20, :12] == 0).all()
    assert image_3HW[0, 19, 0] > image_3HW[0, 0, 0] > image_3HW[0, 0, 11]


def test_files_that_are_no_pictures_are_named_once(folder, capsys):
    for name in ("a.json", "b.json"):
        (folder / "train" / name).touch()
    train, _ = bs.open_dataset("folder", folder, (48, 64))
    assert len(train) == 4
    assert (
        "2 files are no pictures, or have the name of one: a.json"
        in capsys.readouterr().out
    )


WRONG_CLASSES = ["a", "a\na", "a\nA", "a\nVoid", "a\n7", "a\nred,1,2,3", "a\nred, pale"]
WRONG_CLASSES.append("\n".join(f"class{k}" for k in range(255)))


@pytest.mark.parametrize("text", WRONG_CLASSES)
def test_classes_that_cannot_be_are_refused(text, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(bs.InputError, match="classes.txt: .*expected 2 to 254"):
        bs.read_classes(path)


def test_classes_are_a_name_a_line(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# mine\ndark \n\n  # pale\nlight\n")
    assert bs.read_classes(path) == ["dark", "light"]


# name: raw ids -> classes, the frames of a split, a label file, the last class
OFFICIAL = {
    "cityscapes": (
        {7: 0, 8: 1, 11: 2, 26: 13, 33: 18, 0: 255, 9: 255, 29: 255},
        "a/a_{}",
        "gtFine/val/a/a_val_gtFine_labelIds.png",
        "bicycle",
    ),
    "voc2012": (
        {0: 0, 1: 1, 15: 15, 20: 20, 255: 255},
        "{}",
        "SegmentationClass/val.png",
        "tvmonitor",
    ),
    "ade20k": (
        {1: 0, 2: 1, 13: 12, 150: 149, 0: 255},
        "{}",
        "annotations/validation/validation.png",
        "thing150",
    ),
}


def write_official(name, root):
    """One frame a split in the official layout of a benchmark; its raw ids."""
    row = bs.DATASETS[name]
    ids, stem, _, _ = OFFICIAL[name]
    raw = np.random.default_rng(0).choice(list(ids), (24, 32)).astype(np.uint8)
    for split in row.splits:
        for pattern in (row.images, row.labels):
            file = pattern.format(split).replace("*", stem.format(split))
            path = root / f"{file}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(raw).save(path)
        if row.listed:
            path = root / row.listed.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(split)
    lines = [f"{k}\t0\tthing{k}, object {k}" for k in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tName", *lines]))
    return raw


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_benchmark_is_read_in_its_official_layout(name, tmp_path):
    raw = write_official(name, tmp_path)
    ids, _, label_file, last = OFFICIAL[name]
    train, val = bs.open_dataset(name, tmp_path, (24, 32))
    expected = np.vectorize(ids.get)(raw)
    assert (tmp_path / label_file).exists()
    assert train.classes[-1] == last
    assert (len(train), len(val)) == (1, 1)
    assert np.array_equal(labels_of(train)[0], expected)


COLOURS = [
    ("cityscapes", 18, [119, 11, 32]),
    ("camvid", 3, [128, 64, 128]),
    ("voc2012", 1, [128, 0, 0]),
    ("voc2012", 20, [0, 64, 128]),
]


@pytest.mark.parametrize("name, k, colour", COLOURS)
def test_a_dataset_has_its_usual_colours(name, k, colour):
    assert bs.palette(bs.DATASETS[name].colours)[k].tolist() == colour


@pytest.fixture
def server(tmp_path):
    """The address of a server of tmp_path."""
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=tmp_path
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def archive_of(shared_folder, tmp_path):
    """CamVid's row for an archive good.zip; cut.zip is its first half."""
    shutil.copytree(shared_folder, tmp_path / "source/Tutorial-master/CamVid")
    good = Path(shutil.make_archive(tmp_path / "good", "zip", tmp_path / "source"))
    content = good.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    return bs.DATASETS["camvid"]._replace(md5=hashlib.md5(content).hexdigest())


def test_a_dataset_is_fetched_from_the_first_good_mirror(
    shared_folder, tmp_path, server
):
    row = archive_of(shared_folder, tmp_path)
    urls = [f"{server}/missing.zip", f"{server}/cut.zip", f"{server}/good.zip"]
    bs.fetch(row._replace(urls=urls), tmp_path / "data/CamVid")
    assert list((tmp_path / "data").iterdir()) == [tmp_path / "data/CamVid"]
    train, _ = bs.open_dataset("camvid", tmp_path / "data/CamVid", (48, 64))
    assert len(train) == 4


def test_a_dataset_is_fetched_whole_or_not_at_all(shared_folder, tmp_path, server):
    row = archive_of(shared_folder, tmp_path)
    with pytest.raises(bs.InputError, match="does not exist: .*cut.zip: "):
        bs.fetch(row._replace(urls=[f"{server}/cut.zip"]), tmp_path / "data/CamVid")
    assert list((tmp_path / "data").iterdir()) == []


# ---- 9. Experiment
TINY = "--dataset folder --size 48 64 --epochs 1 --rounds 3 --pixels 4 --mc-samples 4"


def flags_of(text, root, out, tiny=TINY):
    """The command line of a tiny run: later flags replace earlier ones."""
    flags = f"{tiny} --batch-size 4 --workers 1 --root {root} --out {out}"
    return [*flags.split(), *text.split()]


def config_of(text, root, out):
    return bs.parse(flags_of(text, root, out))[0]


@pytest.fixture
def go(shared_folder, tmp_path, monkeypatch):
    """go("--flags"): main's exit code on a tiny run, without its pictures."""
    monkeypatch.setattr(bs, "draw_panel", lambda *_: None)

    def run_main(text="", root=shared_folder, out=tmp_path / "runs"):
        return bs.main(flags_of(text, root, out))

    return run_main


def story(run_folder, rounds=9):
    """The labels and the metrics of each round, but for the seconds it took."""
    records = [record | {"seconds": 0} for record in bs.read_metrics(run_folder)]
    files = sorted(run_folder.glob("round-*/labels.csv"))
    return [file.read_text("utf-8-sig") for file in files][:rounds], records[:rounds]


@pytest.fixture(scope="session")
def finished(shared_folder, tmp_path_factory):
    """The Config of a finished run, and what `run` returned."""
    config = config_of("", shared_folder, tmp_path_factory.mktemp("runs"))
    return config, bs.run(config)


def label_rows(config, r):
    """Rows [image, y, x, class] that round r labelled."""
    lines = bs.round_file(config, r, "labels.csv").read_text("utf-8-sig").split()
    rows = [line.split(",") for line in lines[1:]]
    return [[name, int(y), int(x), int(k)] for name, y, x, k in rows]


def test_a_run_leaves_its_files(finished):
    config, _ = finished
    files = {
        p.relative_to(config.folder).as_posix() for p in config.folder.rglob("*.*")
    }
    each = {
        f"round-0{r}/{name}" for r in range(3) for name in ("labels.csv", "panel.png")
    }
    assert files == each | {"config.json", "metrics.csv", "model.pt"}


def test_metrics_are_what_run_returns(finished):
    config, records = finished
    assert bs.read_metrics(config.folder) == records
    assert [record["pixels"] for record in records] == [16, 32, 48]
    assert [record["pixels_per_image"] for record in records] == [4, 8, 12]
    assert all(0 <= record["mIoU"] <= 1 for record in records)


def test_labels_are_the_truth(finished, shared_folder):
    config, _ = finished
    for name, y, x, k in label_rows(config, 0) + label_rows(config, 2):
        label = Image.open(shared_folder / f"trainannot/{name}.png")
        assert label.getpixel((x, y)) == k != bs.IGNORE


def test_no_pixel_is_labelled_twice(finished):
    config, _ = finished
    pixels = [tuple(row[:3]) for r in range(3) for row in label_rows(config, r)]
    assert len(set(pixels)) == len(pixels) == 48


def test_a_rerun_changes_nothing(finished):
    config, records = finished
    before = {path: path.stat().st_mtime_ns for path in config.folder.rglob("round*/*")}
    assert bs.run(config) == records
    after = {path: path.stat().st_mtime_ns for path in config.folder.rglob("round*/*")}
    assert after == before


def score_by_plain_passes(name, model, config, frame):
    """A second implementation of choose's score in round 1, from thinned networks."""
    image_name, image_3HW, _ = frame
    generator = bs.stream(f"picks {config.seed} 1 {image_name}")
    seed = torch.randint(2**31, (), generator=generator).item()
    prob = thinned_passes(model, image_3HW[None] / 255, config.mc_samples, seed)[:, 0]
    mean, var = moments_of(prob)
    if name == "balent":
        return bs.balent_acquisition(mean, var, 0)
    return torch.special.entr(mean).sum(0)


@pytest.mark.parametrize("name", ["balent", "entropy"])
def test_round_1_labels_the_best_pixels_by_round_0s_network(
    name, go, shared_folder, tmp_path
):
    flags = f"--acquisition {name} --epochs 40 --seed 1"
    config = config_of(flags, shared_folder, tmp_path / "runs")
    go(f"{flags} --rounds 1")
    model, _ = bs.load_model(config.folder / "model.pt")
    go(f"{flags} --rounds 2")
    pool, _ = bs.open_dataset("folder", shared_folder, config.size)
    for frame, image in zip(pool, pool.paths):
        score_HW = score_by_plain_passes(name, model, config, frame)
        score_HW[frame[2] == bs.IGNORE] = -math.inf
        for labelled, y, x, _ in label_rows(config, 0):
            if labelled == image:
                score_HW[y, x] = -math.inf
        picks = [score_HW[y, x] for i, y, x, _ in label_rows(config, 1) if i == image]
        expected = score_HW.flatten().topk(4).values
        found = torch.stack(picks).sort(descending=True).values
        assert torch.allclose(found, expected, rtol=2e-3, atol=2e-4)


def test_top_reaches_the_loop(go, shared_folder, tmp_path):
    """Its picks are others, but all among the best fifth."""
    go("--rounds 1 --epochs 20 --acquisition entropy --top 0.2")
    config = config_of(
        "--acquisition entropy --top 0.2", shared_folder, tmp_path / "runs"
    )
    model, _ = bs.load_model(config.folder / "model.pt")
    go("--rounds 2 --epochs 20 --acquisition entropy --top 0.2")
    pool, _ = bs.open_dataset("folder", shared_folder, config.size)
    score_HW = score_by_plain_passes("entropy", model, config, pool[0])
    rows = [row for row in label_rows(config, 1) if row[0] == "train0"]
    found = torch.stack([score_HW[y, x] for _, y, x, _ in rows])
    best = score_HW[pool[0][2] != bs.IGNORE].sort(descending=True).values
    assert found.min() > best[round(0.21 * len(best))]
    assert found.max() < best[4]


def test_each_function_picks_other_pixels(go, tmp_path):
    names = list(bs.ACQUISITIONS)
    assert go(f"--rounds 2 --acquisition {' '.join(names)}") == 0
    stories = [story(tmp_path / f"runs/folder-{name}-seed0")[0] for name in names]
    assert len({first for first, _ in stories}) == 1
    assert len({second for _, second in stories}) == len(names)


@pytest.mark.parametrize("moment", range(1, 8))
def test_a_run_killed_at_any_moment_ends_as_if_nothing_was(
    moment, go, finished, tmp_path, monkeypatch
):
    """Killed before the file of this number gets its name, its half still there."""
    calls = []

    def rename(part, path, original=os.replace):
        calls.append(part)
        if len(calls) == moment:
            raise KeyboardInterrupt
        original(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", rename)
        assert go("--rounds 2") == 130
    calls[-1].write_bytes(b"half")
    assert go("--rounds 2") == 0
    run_folder = tmp_path / "runs/folder-balent-seed0"
    assert story(run_folder) == story(finished[0].folder, 2)
    assert not list(run_folder.rglob(".*"))


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a copy of the finished run."""
    return Path(
        shutil.copytree(finished[0].folder, tmp_path / "runs/folder-balent-seed0")
    )


@pytest.mark.parametrize("content", [b"", b"round\n0\n"])
def test_metrics_that_lack_a_round_are_made_anew(content, go, copied, finished):
    (copied / "metrics.csv").write_bytes(content)
    assert go() == 0
    assert story(copied) == story(finished[0].folder)


@pytest.mark.parametrize("content", [b"\xff\0", b"round,mIoU\n0,one\n"])
def test_damaged_metrics_are_named(content, go, copied, capsys):
    (copied / "metrics.csv").write_bytes(content)
    assert "metrics.csv is damaged: delete it" in refused(capsys, go())


def test_a_corrected_label_trains_its_round_and_the_later_ones_anew(
    go, copied, finished
):
    path = copied / "round-01/labels.csv"
    path.write_text(
        re.sub(r",\d$", ",2", path.read_text("utf-8-sig"), flags=re.MULTILINE)
    )
    assert go() == 0
    _, before = story(finished[0].folder)
    _, after = story(copied)
    changed = [a["labels"] != b["labels"] for a, b in zip(after, before)]
    assert changed == [False, True, True]
    assert after[0] == before[0]


def refused(capsys, code):
    """The one line that main said as it refused."""
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_other_settings_in_the_same_folder_are_refused(go, copied, capsys):
    assert "pixels was 4, is 5: undo that" in refused(capsys, go("--pixels 5"))


def test_data_that_was_mended_is_accepted(go, folder, capsys):
    path = folder / "trainannot/train1.png"
    good = path.read_bytes()
    save_mask(path, 48, 64, 3)
    assert "train1.png has the mode" in refused(capsys, go(root=folder))
    path.write_bytes(good)
    assert go(root=folder) == 0


def test_training_that_failed_may_be_tried_otherwise(go, capsys, monkeypatch):
    def train(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(bs, "train", train)
        assert "out of memory" in refused(capsys, go())
    assert go("--batch-size 2 --lr 0.001") == 0


def test_data_that_changed_are_refused(go, copied, folder, capsys):
    path = folder / "trainannot/train1.png"
    mask = np.array(Image.open(path))
    Image.fromarray(mask[::-1]).save(path)
    assert "train/train1 was" in refused(capsys, go(root=folder))


@pytest.mark.parametrize("name", ["config.json", "round-00/labels.csv"])
@pytest.mark.parametrize("content", [b"\xff\xfa", b"{"])
def test_a_damaged_file_is_named(name, content, go, copied, capsys):
    (copied / name).write_bytes(content)
    assert name in refused(capsys, go())


def test_a_full_disk_leaves_no_half_file(go, tmp_path, capsys, monkeypatch):
    def save(_, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed")

    monkeypatch.setattr(torch, "save", save)
    assert "model.pt cannot be written" in refused(capsys, go())
    assert not list(tmp_path.rglob("*model.pt"))


def test_out_of_memory_is_one_line(go, capsys, monkeypatch):
    def train(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bs, "train", train)
    assert "out of memory: use a smaller" in refused(capsys, go())


def test_a_bug_shows_its_traceback(go, monkeypatch):
    def train(*_):
        raise RuntimeError("Unsupported memory format")

    monkeypatch.setattr(bs, "train", train)
    with pytest.raises(RuntimeError, match="Unsupported memory format"):
        go()


def test_curves_are_of_runs_that_compare(go, tmp_path):
    go("--rounds 1 --acquisition balent margin")
    go("--rounds 1 --epochs 0 --seed 1")
    go("--supervised")
    config = config_of("--supervised", "data", tmp_path / "runs")
    names = [path.name for path in bs.comparable(config)]
    assert names == [f"folder-{x}-seed0" for x in ("balent", "margin", "supervised")]
    assert (tmp_path / "runs/folder.png").exists()


def test_full_supervision_counts_every_pixel(go, shared_folder, tmp_path):
    assert go("--supervised") == 0
    (record,) = bs.read_metrics(tmp_path / "runs/folder-supervised-seed0")
    pool, _ = bs.open_dataset("folder", shared_folder, (48, 64))
    assert record["pixels"] == (np.stack(labels_of(pool)) != bs.IGNORE).sum()


def test_streamed_frames_give_the_same_run(go, finished, tmp_path, monkeypatch):
    no_memory = property(lambda _: (), lambda *_: None)
    monkeypatch.setattr(bs.Frames, "held", no_memory, raising=False)
    assert go("--workers 3") == 0
    assert story(tmp_path / "runs/folder-balent-seed0") == story(finished[0].folder)


def test_mixed_precision_trains(go, finished, tmp_path):
    assert go("--amp --rounds 1") == 0
    (record,) = bs.read_metrics(tmp_path / "runs/folder-balent-seed0")
    expected = finished[1][0]["loss"]
    assert record["loss"] != expected
    assert record["loss"] == pytest.approx(expected, rel=0.1)


def test_a_network_of_ones_own_is_a_row(go, tmp_path, monkeypatch):
    def tiny(weights):
        return torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Identity(), 8

    monkeypatch.setitem(bs.ARCHS, "tiny", tiny)
    assert go("--arch tiny --weights none --lr 0.01 --rounds 1") == 0
    model, saved = bs.load_model(tmp_path / "runs/folder-balent-seed0/model.pt")
    assert model.classify.in_channels == 8
    assert (saved["arch"], saved["pixels"]) == ("tiny", 16)


def test_a_model_pt_is_a_start(go, finished, tmp_path):
    path = finished[0].folder / "model.pt"
    assert go(f"--weights {path} --epochs 0 --rounds 1") == 0
    expected, _ = bs.load_model(path)
    found, saved = bs.load_model(tmp_path / "runs/folder-balent-seed0/model.pt")
    assert torch.equal(found.classify.weight, expected.classify.weight)
    assert saved["weights"] == str(path)


def test_a_model_pt_for_other_classes_is_refused(go, finished, folder, capsys):
    classes = (folder / "classes.txt").read_text().split()
    (folder / "classes.txt").write_text("\n".join(classes[::-1]))
    path = finished[0].folder / "model.pt"
    line = refused(capsys, go(f"--weights {path}", root=folder))
    assert "model.pt is small for ['sky', " in line


PRESETS = [
    ("", "cpu", ("small", [120, 160], 5, 20, "none", 2e-3)),
    ("", "cuda", ("fcn_resnet50", [360, 480], 10, 50, "imagenet", 5e-4)),
    ("--arch small", "cuda", ("small", [120, 160], 5, 20, "none", 2e-3)),
    (
        "--rounds 7 --dataset synthetic",
        "cuda",
        ("small", [96, 128], 7, 20, "none", 2e-3),
    ),
]


@pytest.mark.parametrize("flags, device, expected", PRESETS)
def test_settings_that_are_not_given_suit_the_machine(
    flags, device, expected, monkeypatch
):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda _: device)
    (config,) = bs.parse(f"--dataset camvid {flags}".split())
    names = ("arch", "size", "rounds", "epochs", "weights", "lr")
    assert tuple(getattr(config, name) for name in names) == expected
    assert (config.device, config.amp) == (device, device == "cuda")


BAD_FLAGS = [
    ("--dataset mars", "invalid choice: 'mars'"),
    ("--acquisition balent luck", "invalid choice: 'luck'"),
    ("--pixels ten", "invalid int value: 'ten'"),
    ("--rounds 0", "--rounds: 0: expected from 1"),
    ("--mc-samples 0", "--mc-samples: 0: expected from 1"),
    ("--epochs -1", "--epochs: -1: expected from 0"),
    ("--dropout 1", "--dropout: 1.0: expected from 0 to below 1"),
    ("--top nan", "--top: nan: expected from 0 to below 1"),
    ("--size 8 64", "--size: .8, 64.: expected 16 or more"),
    ("--seed 99999999999999999999", "--seed: 9+: expected from 0"),
    ("--device tpu", "--device tpu is not there: auto takes "),
    ("--colour red", "unrecognized arguments: --colour red"),
    ("--weights nowhere.pt", "nowhere.pt: expected the model.pt of a run"),
    ("--weights imagenet", "small has no ImageNet weights"),
    ("--arch deeplabv3_resnet50 --batch-size 1", "needs 2 images a process"),
    ("--oracle human --supervised", "--oracle human: expected no --supervised"),
    ("--root nowhere", "nowhere does not exist: check --root"),
    ("--dataset cityscapes", "cityscapes does not exist: log in at https"),
    ("--dataset camvid --root CamVid", "CamVid/CamVid does not exist: check --root"),
]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_get_one_line(flags, message, go, capsys):
    try:
        code = go(flags)
    except SystemExit as stop:  # argparse's
        code = stop.code
    assert re.search(message, refused(capsys, code))


def save_mask(path, *shape, value=0):
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


BAD_DATA = [
    (
        "train1.png is missing; .*trainannot holds train0.png",
        lambda path: path.unlink(),
    ),
    (
        "train1.png is .64, 20.; expected .64, 48., as its upright",
        lambda path: save_mask(path, 20, 64),
    ),
    (
        "train1.png has the mode RGB; expected .* one number per pixel",
        lambda path: save_mask(path, 48, 64, 3),
    ),
    ("train1.png has pixels of 50", lambda path: save_mask(path, 48, 64, value=50)),
    ("train1.png cannot be read as a picture", lambda path: os.truncate(path, 60)),
    (
        "train/. is missing; .* holds classes.txt",
        lambda path: shutil.rmtree(path.parents[1] / "train"),
    ),
]


@pytest.mark.parametrize("message, spoil", BAD_DATA)
def test_bad_data_get_one_line(message, spoil, go, folder, capsys):
    spoil(folder / "trainannot/train1.png")
    assert re.search(message, refused(capsys, go(root=folder)))


def test_masks_that_are_void_all_over_are_refused(go, folder, capsys):
    for path in (folder / "trainannot").iterdir():
        save_mask(path, 48, 64, value=bs.IGNORE)
    assert "every pixel of the training labels is void" in refused(
        capsys, go(root=folder)
    )


def test_a_run_says_what_its_labels_hold(go, folder, capsys):
    for path in (folder / "trainannot").iterdir():
        save_mask(path, 48, 64, value=1)
    go("--rounds 1", root=folder)
    expected = "sky 0.0%, building 100.0%, .* void 0.0%; 7 of 8 classes never occur"
    assert re.search(expected, capsys.readouterr().out)


# ---- 10. and 11. Pictures, labels from a person
def fill_in(path, root):
    """Label the rows of a labels.csv with the names of the true classes."""
    header, *lines = path.read_text("utf-8-sig").split()
    names = bs.DATASETS["synthetic"].classes.split(", ")
    filled = [header]
    for line in lines:
        name, y, x, _ = line.split(",")
        k = Image.open(root / f"trainannot/{name}.png").getpixel((int(x), int(y)))
        filled.append(f"{name},{y},{x},{'void' if k == bs.IGNORE else names[k]}")
    path.write_text("\n".join(filled))
    return filled


@pytest.fixture
def person(go, folder, tmp_path, shared_folder):
    """person(flags): run on photographs without labels; fill: label the last round."""
    shutil.rmtree(folder / "trainannot")
    run_folder = tmp_path / "runs/folder-balent-seed0"

    def fill(r):
        return fill_in(run_folder / f"round-0{r}/labels.csv", shared_folder)

    def run_human(flags=""):
        return go(f"--oracle human {flags}", root=folder)

    run_human.fill = fill
    run_human.folder = run_folder
    return run_human


def test_a_person_is_asked_first_and_trained_for_then(person, capsys):
    assert person() == 0
    assert "16 of 16 pixels wait for a label: open " in capsys.readouterr().out
    person.fill(0)
    assert person() == 0
    assert "round 1: 16 of 16 pixels wait" in capsys.readouterr().out
    assert len(bs.read_metrics(person.folder)) == 1


def test_void_labels_of_a_person_do_not_count(person):
    person()
    path = person.folder / "round-00/labels.csv"
    text = re.sub(",$", ",sky", path.read_text("utf-8-sig"), flags=re.MULTILINE)
    path.write_text(text.replace("sky", "void", 3))
    person()
    assert bs.read_metrics(person.folder)[0]["pixels"] == 13


def test_masks_are_the_predictions_of_the_photographs(person, folder):
    person()
    person.fill(0)
    person()
    model, _ = bs.load_model(person.folder / "model.pt")
    image = np.array(Image.open(folder / "train/train0.png"))
    pred_HW = bs.predict(model, torch.from_numpy(image).movedim(2, 0)[None])[0]
    mask = Image.open(person.folder / "round-00/masks/train0.png")
    assert mask.mode == "P"
    assert np.array_equal(mask, pred_HW)


def test_a_person_may_train_otherwise_and_keeps_the_labels(person):
    person()
    person.fill(0)
    person()
    labels = (person.folder / "round-00/labels.csv").read_text()
    before = bs.read_metrics(person.folder)
    assert person("--epochs 2 --lr 0.01") == 0
    after = bs.read_metrics(person.folder)
    assert (person.folder / "round-00/labels.csv").read_text() == labels
    assert after[0]["loss"] != before[0]["loss"]


def test_a_person_may_add_a_photograph_and_a_class(person, folder, capsys):
    person("--rounds 1")
    person.fill(0)
    shutil.copy(folder / "test/test4.png", folder / "train/train4.png")
    with (folder / "classes.txt").open("a") as file:
        file.write("\nmoose")
    assert person("--rounds 2") == 0
    assert "round 1: 20 of 20 pixels wait" in capsys.readouterr().out


def test_a_new_class_trains_a_finished_round_anew(person, folder, tmp_path):
    person("--rounds 1")
    person.fill(0)
    person("--rounds 1")
    with (folder / "classes.txt").open("a") as file:
        file.write("\nmoose")
    person("--rounds 1")
    _, saved = bs.load_model(person.folder / "model.pt")
    assert saved["classes"][-1] == "moose"


def test_a_photograph_that_changed_is_refused(person, folder, capsys):
    person()
    photo = Image.open(folder / "train/train0.png")
    photo.rotate(180).save(folder / "train/train0.png")
    assert "train/train0 was" in refused(capsys, person())


def page_data(path):
    """What a label page is made from."""
    (data,) = re.findall(r"= (\{.*\});$", path.read_text("utf-8"), re.MULTILINE)
    return json.loads(data)


def test_the_page_holds_the_pixels_of_labels_csv(person):
    person()
    data = page_data(person.folder / "round-00/label.html")
    rows = (person.folder / "round-00/labels.csv").read_text("utf-8-sig").split()[1:]
    assert data["folder"] == "folder-balent-seed0/round-00"
    assert data["classes"][-2:] == ["person", "void"]
    assert [f"{name},{y},{x}," for name, y, x, *_ in data["pixels"]] == rows


def test_names_cannot_end_the_script_of_the_page(person, folder):
    classes = ["a</script><img onerror=alert(1)>", *"bcdefgh"]
    (folder / "classes.txt").write_text("\n".join(classes))
    person()
    page = person.folder / "round-00/label.html"
    assert page.read_text("utf-8").count("</script>") == 1
    assert page_data(page)["classes"][:8] == classes


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium, whose downloads land in tmp_path."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is not installed")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--window-size=1280,720"):
        options.add_argument(flag)
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(tmp_path)}
    )
    driver = webdriver.Chrome(options)
    yield driver
    driver.quit()


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def wait_for(path):
    for _ in range(100):
        if path.exists():
            return
        time.sleep(0.1)


def test_a_person_labels_in_a_browser(person, browser, tmp_path):
    """All but one pixel as class 2, with a reload, a way back, and a correction."""
    person()
    browser.get((person.folder / "round-00/label.html").as_uri())
    press(browser, *"2222")
    browser.refresh()
    press(browser, "1", "\ue003", *"2222222222222")  # backspace
    assert browser.find_element("id", "text").text.startswith("16 / 16, 16 labelled")
    browser.find_elements("css selector", "nav button")[4].click()
    wait_for(tmp_path / "labels.csv")
    path = person.folder / "round-00/labels.csv"
    expected = path.read_text("utf-8-sig").replace(",\n", ",building\n")
    assert (tmp_path / "labels.csv").read_text("utf-8-sig") == expected
    shutil.move(tmp_path / "labels.csv", path)
    assert person() == 0
    assert (person.folder / "round-01/label.html").exists()


def save_gradient(path, kind):
    """A photograph twice the working size, whose colours tell the place."""
    rows, columns = np.meshgrid(range(96), range(128), indexing="ij")
    place = np.stack([rows * 2.5, columns * 1.9, 0 * rows + 128], 2).astype(np.uint8)
    exif = Image.Exif()
    if kind == "portrait":
        place = place.swapaxes(0, 1)
    if kind == "turned":
        exif[0x0112] = 6
    Image.fromarray(place).save(path, exif=exif)


@pytest.mark.parametrize("kind", ["landscape", "portrait", "turned"])
def test_the_outline_shows_the_pixel_of_the_photograph(kind, person, browser, folder):
    for path in (folder / "train").iterdir():
        save_gradient(path, kind)
    person()
    page = person.folder / "round-00/label.html"
    browser.get(page.as_uri())
    _, y, x, *_ = page_data(page)["pixels"][0]
    pool, _ = bs.open_dataset("folder", folder, (48, 64), asking=True)
    expected = pool[0][1][:, y, x].numpy()
    box = browser.find_element("css selector", "#crop rect").rect
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    found = shot.getpixel(tuple(map(int, middle)))
    assert np.abs(np.subtract(found, expected)).max() < 12


# ---- 12. Ranks and the command line
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def shell(*command, **kwargs):
    """Run a command with one thread a process; what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run(
        [*map(str, command)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        **kwargs,
    )


def torchrun(processes, flags):
    return shell(*TORCHRUN, f"--nproc_per_node={processes}", bs.__file__, *flags)


def test_any_number_of_processes_picks_the_same(go, shared_folder, tmp_path):
    text = "--epochs 0 --rounds 2 --device cpu --batch-size 6 --acquisition"
    text += " balent power_bald"
    torchrun(3, flags_of(text, shared_folder, tmp_path / "three"))
    assert go(text) == 0
    for name in ("balent", "power_bald"):
        expected, scores = story(tmp_path / f"runs/folder-{name}-seed0")
        found, other_scores = story(tmp_path / f"three/folder-{name}-seed0")
        assert found == expected
        assert other_scores[0]["mIoU"] == scores[0]["mIoU"]


GRADIENT = """
import sys, torch, balent_seg as bs

def plain(weights):
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Identity(), 8

def views(count):
    return torch.ones(count, 2), torch.zeros(count, 2)

bs.ARCHS["plain"] = plain
bs.random_affine = views
bs.make_optimizer = lambda model, *_: torch.optim.SGD(model.parameters(), 0.1)
sys.exit(bs.main())
"""


def test_a_step_of_two_processes_is_that_of_one(shared_folder, tmp_path):
    """Without dropout, views and BatchNorm, all that is left is the gradient."""
    (tmp_path / "step.py").write_text(GRADIENT)
    text = "--arch plain --dropout 0 --weights none --rounds 1 --device cpu"
    weights = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = flags_of(text, shared_folder, out)
        command = [*TORCHRUN, f"--nproc_per_node={processes}", tmp_path / "step.py"]
        shell(*command, *flags, env={"PYTHONPATH": str(Path(bs.__file__).parent)})
        path = out / "folder-balent-seed0/model.pt"
        weights.append(torch.load(path)["state_dict"]["classify.weight"])
    torch.manual_seed(0)
    assert torch.allclose(weights[1], weights[0], atol=1e-6)


def test_a_rank_that_dies_ends_the_job_and_the_rerun_goes_on(shared_folder, tmp_path):
    flags = flags_of("--rounds 2 --device cpu", shared_folder, tmp_path / "killed")
    command = [*TORCHRUN, "--nproc_per_node=2", bs.__file__, *flags]
    job = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE)
    run_folder = tmp_path / "killed/folder-balent-seed0"
    while not (run_folder / "round-00/labels.csv").exists() and job.poll() is None:
        time.sleep(0.02)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    job.communicate(timeout=100)
    assert job.returncode != 0
    torchrun(2, flags)
    torchrun(2, flags_of("--rounds 2 --device cpu", shared_folder, tmp_path / "whole"))
    assert story(run_folder) == story(tmp_path / "whole/folder-balent-seed0")


def test_the_first_command_runs_where_only_the_file_is(tmp_path):
    """On the synthetic scenes; RANK and WORLD_SIZE are a cluster scheduler's."""
    shutil.copy(bs.__file__, tmp_path)
    flags = TINY.partition("folder ")[2].split()
    command = [sys.executable, "balent_seg.py", *flags]
    done = shell(*command, cwd=tmp_path, env={"WORLD_SIZE": "4", "RANK": "1"})
    assert done.stderr == ""
    assert (tmp_path / "runs/synthetic-balent-seed0/round-02/panel.png").exists()


def test_a_terminal_without_umlauts_gets_escapes(folder, tmp_path):
    (folder / "train/train0.png").rename(folder / "train/ä.json")
    flags = flags_of("--oracle human", folder, tmp_path / "runs")
    environment = {"PYTHONIOENCODING": "ascii"}
    done = shell(sys.executable, bs.__file__, *flags, env=environment)
    assert r"name of one: \xe4.json" in done.stdout


def test_importing_does_nothing(tmp_path):
    root = Path(bs.__file__).parent
    code = "import sys, balent_seg; print('matplotlib' in sys.modules)"
    done = shell(
        sys.executable, "-c", code, env={"PYTHONPATH": str(root)}, cwd=tmp_path
    )
    assert done.stdout == "False\n"
    assert not list(tmp_path.iterdir())


def test_help_tells_of_every_setting_in_words(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        bs.main(["--help"])
    text = capsys.readouterr().out
    for setting in dataclasses.fields(bs.Config):
        assert re.search(rf"--{setting.name.replace('_', '-')}\b", text)
    assert "None" not in text


if __name__ == "__main__":
    section_8 = write_images.__code__.co_firstlineno
    names = [name for name in dir() if name.startswith("test_")]
    first = [n for n in names if globals()[n].__code__.co_firstlineno < section_8]
    sys.exit(pytest.main(["-q", *[f"{__file__}::{name}" for name in first]]))
