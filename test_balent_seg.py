"""Tests of balent_seg: each is a second, slower implementation of a claim, or an invariance.

    python -m pytest -q test_balent_seg.py        the tests, in minutes on a CPU
    python test_balent_seg.py                     the benchmark
"""

import csv
import functools
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import mpmath  # comes with torch, by way of sympy
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image

import balent_seg as bs

HERE = Path(__file__).parent
TINY = {"size": (32, 48), "epochs": 1, "workers": 0, "rounds": 3, "pixels": 4, "mc_samples": 4}
TINY_FLAGS = "--size 32 48 --epochs 1 --workers 0 --rounds 3 --pixels 4 --mc-samples 4".split()


def softmax_moments(T=20, C=5, shape=(40,), scale=3.0, seed=0):
    """Moments over T draws of random softmax outputs, of every kind from certain to undecided."""
    g = torch.Generator().manual_seed(seed)
    centre = scale * torch.randn(1, C, *shape, generator=g)
    spread = torch.rand(1, 1, *shape, generator=g) * 2
    prob = (centre + spread * torch.randn(T, C, *shape, generator=g)).softmax(1)
    return prob.mean(0), prob.var(0, correction=0), prob


# ---- 1. Balanced entropy -------------------------------------------------------------------------


def integrate(a: float, b: float, term) -> float:
    """int term(ln x, ln f(x)) dx over Beta(a, b), in z = ln(x / (1 - x)): no end is singular there."""

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
    alpha = torch.tensor(1 + 10.0 ** np.linspace(-8, 10, 37), dtype=dtype)
    beta = torch.tensor(10.0 ** np.linspace(-3, 10, 40), dtype=dtype)
    alpha, beta = (x.flatten() for x in torch.meshgrid(alpha, beta, indexing="ij"))
    exact = [exact_beta_entropy(a, b) for a, b in zip(alpha.tolist(), beta.tolist(), strict=True)]
    exact = torch.tensor(exact, dtype=torch.float64)
    error = (bs.beta_entropy(alpha, beta) - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() < (5e-6 if dtype == torch.float32 else 5e-9)


def test_beta_entropy_is_symmetric_and_zero_for_the_uniform_distribution():
    a, b = torch.rand(2, 1000) * 50 + 0.01
    assert torch.allclose(bs.beta_entropy(a, b), bs.beta_entropy(b, a), atol=1e-5)
    assert bs.beta_entropy(torch.ones(1), torch.ones(1)).abs() < 1e-6


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
    twice = (mjent + torch.special.entr(mean).sum(0)) / (torch.special.entr(mean).sum(0) + math.log(2))
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
        assert value.isfinite().all() and bs.balent_acquisition(mean.to(dtype), var.to(dtype)).isfinite().all()
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


def test_score_knows_no_order_of_classes_no_layout_and_no_dtype():
    mean, var, _ = softmax_moments(C=7, shape=(3, 5, 9))
    mean, var = mean.transpose(0, 1), var.transpose(0, 1)  # (3, 7, 5, 9)
    score = bs.balent_acquisition(mean, var)
    assert score.shape == (3, 5, 9)
    permuted = torch.randperm(7)
    assert torch.allclose(bs.balent_acquisition(mean[:, permuted], var[:, permuted]), score, rtol=2e-4)
    last = bs.balent_acquisition(mean.movedim(1, -1), var.movedim(1, -1), dim=-1)
    assert torch.equal(last, score)
    alone = torch.cat([bs.balent_acquisition(m[None], v[None]) for m, v in zip(mean, var)])
    assert torch.allclose(alone, score, rtol=2e-4)
    double = bs.balanced_entropy(mean.double(), var.double()).float()
    assert torch.allclose(double, bs.balanced_entropy(mean, var), atol=2e-3)


def test_section_1_runs_alone():
    source = Path(bs.__file__).read_text()
    section = re.search(r"# ---- 1\. .*?(?=# ---- 2\. )", source, re.S).group()
    alone: dict = {}
    exec("import math, torch\n" + section, alone)
    mean, var, _ = softmax_moments()
    assert torch.equal(alone["balent_acquisition"](mean, var, 0), bs.balent_acquisition(mean, var, 0))


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
    moments = bs.Moments(torch.full((1, 2, 1, 4), 0.5), torch.zeros(1, 2, 1, 4), (math.log(2) - bald)[None, None])
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


def test_moments_are_those_of_explicit_passes_through_thinned_classifiers():
    model, x = small().eval(), torch.rand(2, 3, 37, 50)
    moments = model.mc_moments(x, samples=7, seed=3)
    with torch.no_grad():
        feature, probs = model.features(x), []
        for weight_CD in model.thinned(7, 3):
            logits = F.conv2d(feature, weight_CD[:, :, None, None], model.classify.bias)
            logits = F.interpolate(logits, size=(37, 50), mode="bilinear", align_corners=False)
            probs.append(logits.double().softmax(1))
    prob = torch.stack(probs)
    assert prob.var(0).max() > 0.01
    assert torch.allclose(moments.mean_BCHW.double(), prob.mean(0), atol=1e-6)
    assert torch.allclose(moments.var_BCHW.double(), prob.var(0, correction=0), atol=1e-6, rtol=1e-3)
    cond = torch.special.entr(prob).sum(2).mean(0)
    assert torch.allclose(moments.cond_entropy_BHW.double(), cond, atol=1e-5)


def test_a_thinned_classifier_drops_a_share_of_channels_and_keeps_the_mean():
    model = small(dropout=0.3)
    weight_TCD = model.thinned(3000, 0)
    assert ((weight_TCD == 0).float().mean().item()) == pytest.approx(0.3, abs=0.01)
    assert torch.allclose(weight_TCD.mean(0), model.classify.weight[:, :, 0, 0], atol=0.25)
    assert ((weight_TCD == 0).all(1) == (weight_TCD == 0).any(1)).all()  # whole channels


def test_many_draws_have_the_moments_of_element_wise_dropout():
    model, x, T = small(), torch.rand(1, 3, 6, 6), 6000
    model.backbone = torch.nn.Conv2d(3, 192, 1)  # stride 1: no upsampling between mask and pixel
    moments = model.mc_moments(x, T)
    with torch.no_grad():
        feature = model.features(x)
        probs = [model.classify(F.dropout(feature, 0.3)).softmax(1) for _ in range(T)]
    prob = torch.stack(probs)
    error = prob.std(0) / T**0.5  # of each mean
    assert ((moments.mean_BCHW - prob.mean(0)).abs() < 6 * error + 1e-4).all()
    square_error = (prob - prob.mean(0)).square().std(0) / T**0.5
    assert ((moments.var_BCHW - prob.var(0)).abs() < 6 * square_error + 1e-4).all()


def test_moments_do_not_depend_on_batch_mode_or_what_came_before():
    model, x = small(), torch.rand(3, 3, 32, 40)
    together = model.train().mc_moments(x, 5, seed=1)
    assert model.training
    torch.rand(10)
    alone = [model.eval().mc_moments(image[None], 5, seed=1) for image in x]
    for k, found in enumerate(together):
        assert torch.allclose(found, torch.cat([m[k] for m in alone]), atol=1e-6)
    assert not torch.allclose(together.mean_BCHW, model.mc_moments(x, 5, seed=2).mean_BCHW, atol=1e-3)


def test_small_variances_survive_float32():
    """A pixel sure to 1e-4: its variance of 1e-9 must not drown in the rounding of P^2."""
    model = small(classes=2)
    model.backbone = torch.nn.Conv2d(3, 192, 1)
    with torch.no_grad():
        model.classify.bias.copy_(torch.tensor([9.0, 0.0]))
    x = torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        feature = model.features(x).double()
        logits = torch.einsum("tcd,bdhw->tbchw", model.thinned(50, 0).double(), feature)
        prob = (logits + model.classify.bias.double()[:, None, None]).softmax(2)
    var = prob.var(0, correction=0)
    assert var.min() < 1e-6
    assert torch.allclose(model.mc_moments(x, 50).var_BCHW.double(), var, rtol=0.02, atol=1e-13)


def test_dropout_acts_in_training_only_and_only_before_the_last_layer():
    model = bs.MCDropoutFCN(3, "deeplabv3_mobilenet_v3_large", weights="none")  # has dropout of its own
    x = torch.rand(2, 3, 64, 64)
    rates = [m.p for m in model.modules() if isinstance(m, (torch.nn.Dropout, torch.nn.Dropout2d)) and m.p]
    assert rates == [model.dropout.p]
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x)) and model(x).shape == (2, 3, 64, 64)
        model.train()
        feature = model.dropout(model.features(x)) == 0
    assert feature.flatten(2).all(2).float().mean() > 0.1  # whole channels


def test_fcn_resnet50_is_torchvisions():
    model = bs.MCDropoutFCN(11, "fcn_resnet50", weights="none")
    reference = __import__("torchvision").models.segmentation.fcn_resnet50(weights_backbone=None, num_classes=11)
    state = dict(zip(model.state_dict(), reference.state_dict().values(), strict=True))
    model.load_state_dict(state)
    x, norm = torch.rand(1, 3, 40, 56), model.normalise
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), reference.eval()(norm(x))["out"], rtol=1e-3, atol=1e-3)


def test_weights_come_from_a_model_pt_or_a_torchvision_backbone(tmp_path):
    path, model = str(tmp_path / "w.pt"), small()
    torch.save({"weights": model.state_dict(), "round": 0}, path)
    assert torch.equal(bs.MCDropoutFCN(4, "small", weights=path).classify.weight, model.classify.weight)
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
