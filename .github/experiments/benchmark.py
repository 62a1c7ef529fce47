"""How exact and how fast balent_seg is, in ratios measured in one run.

python .github/experiments/benchmark.py    from the repository's folder; minutes on a CPU
"""

import multiprocessing
import os
import re
from pathlib import Path

import mpmath
import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.benchmark
import torchvision
from _runs import bs, make_parser

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAMVID = (360, 480, 11)
ADE20K = (512, 512, 150)
POINTS = 20


def exact_beta_entropy(alpha, beta):
    """The textbook formula with 50 digits."""
    with mpmath.workdps(50):
        a = mpmath.mpf(alpha)
        b = mpmath.mpf(beta)
        h = mpmath.log(mpmath.beta(a, b)) + (a + b - 2) * mpmath.psi(0, a + b)
        return float(h - (a - 1) * mpmath.psi(0, a) - (b - 1) * mpmath.psi(0, b))


def textbook_beta_entropy(a, b):
    """The textbook formula, term by term."""
    h = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    h = h - (a - 1) * torch.digamma(a) - (b - 1) * torch.digamma(b)
    return h + (a + b - 2) * torch.digamma(a + b)


def print_accuracy():
    """Errors of h in float32 on 4,000 points of a log-uniform grid."""
    rng = np.random.default_rng(0)
    alpha = 1 + torch.tensor(10.0 ** rng.uniform(-8, 10, 4000)).float()
    beta = torch.tensor(10.0 ** rng.uniform(-3, 10, 4000)).float()
    pairs = zip(alpha.tolist(), beta.tolist())
    exact = torch.tensor([exact_beta_entropy(a, b) for a, b in pairs]).double()
    for name, h in (
        ("textbook", textbook_beta_entropy),
        ("balent_seg", bs.beta_entropy),
    ):
        error = (h(alpha, beta) - exact).abs() / exact.abs().clamp(min=1)
        share = (~(error < 0.01)).double().mean()
        print(
            f"h in float32, {name}: {share:.1%} off by over 1 %, most {error.max():.1e}"
        )


def seconds(function):
    """How long a call takes on average."""
    threads = torch.get_num_threads()
    timer = torch.utils.benchmark.Timer(
        "function()", globals={"function": function}, num_threads=threads
    )
    return timer.timeit(5).mean


def fcn_resnet50(classes):
    """The network whose costs are compared."""
    model = bs.MCDropoutFCN(classes, weights="none").eval()
    model.mixed = DEVICE == "cuda"
    return model.to(DEVICE, memory_format=torch.channels_last)


@torch.no_grad()
def print_scoring(H, W, C):
    """Scoring an image with 50 draws, against one forward pass."""
    model = fcn_resnet50(C)
    x_13HW = torch.rand(1, 3, H, W, device=DEVICE)
    moments = model.mc_moments(x_13HW)
    balent = bs.ACQUISITIONS["balent"]
    forward = seconds(lambda: model(x_13HW))
    scoring = seconds(lambda: balent(model.mc_moments(x_13HW))) / forward
    alone = seconds(lambda: balent(moments)) / forward
    print(f"{H} x {W} x {C}: scoring {scoring:.2f} passes, BalEnt alone {alone:.3f}")


def resident_bytes():
    """The most memory that was in use so far."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@torch.no_grad()
def scoring_memory(samples):
    """What scoring takes beyond the network, in maps of all classes."""
    H, W, C = ADE20K
    model = fcn_resnet50(C)
    x_13HW = torch.rand(1, 3, H, W, device=DEVICE)
    before = resident_bytes()
    bs.ACQUISITIONS["balent"](model.mc_moments(x_13HW, samples))
    return (resident_bytes() - before) / (4 * H * W * C)


def random_points(H, W, C):
    """points_2N3 of two images."""
    columns = [torch.randint(size, (2, POINTS)) for size in (H, W, C)]
    return torch.stack(columns, -1).to(DEVICE)


def print_loss(H, W, C):
    """The loss of a dense label against that at its few points, both backward."""
    points_2N3 = random_points(H, W, C)
    label = torch.full((2, H, W), bs.IGNORE, device=DEVICE)
    for b in range(2):
        y_N, x_N, class_N = points_2N3[b].T
        label[b, y_N, x_N] = class_N
    xy = (2 * points_2N3[..., [1, 0]] + 1) / torch.tensor([W, H], device=DEVICE) - 1
    logits = torch.randn(2, C, H // 8, W // 8, device=DEVICE, requires_grad=True)

    def dense():
        upsampled = F.interpolate(logits, (H, W), mode="bilinear")
        F.cross_entropy(upsampled, label, ignore_index=bs.IGNORE).backward()

    def sparse():
        loss, _ = bs.point_loss(logits, xy, points_2N3[..., 2])
        loss.backward()

    ratio = seconds(dense) / seconds(sparse)
    print(f"{H} x {W} x {C}: a dense loss takes {ratio:.0f} times as long as {POINTS}")


def print_step(H, W, C):
    """A step of `train`, against one of a bare loop of torchvision."""
    image = torch.randint(256, (2, 3, H, W), dtype=torch.uint8, device=DEVICE)
    label = torch.randint(C, (2, H, W), device=DEVICE)
    points = random_points(H, W, C)
    model = fcn_resnet50(C)
    ours = bs.make_optimizer(model, 1e-3, False)
    fcn = torchvision.models.get_model(
        "fcn_resnet50", weights_backbone=None, num_classes=C
    )
    fcn = fcn.to(DEVICE, memory_format=torch.channels_last)
    theirs = torch.optim.AdamW(fcn.parameters())

    def bare():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=model.mixed):
            logits = fcn(image.float() / 255)["out"].float()
        theirs.zero_grad()
        F.cross_entropy(logits, label).backward()
        theirs.step()

    step = seconds(lambda: bs.train(model, [(image, points)], ours, 1))
    print(
        f"{H} x {W} x {C}: a training step takes {step / seconds(bare):.2f} bare ones"
    )


def main():
    make_parser(__doc__).parse_args()
    torch.set_num_threads(os.cpu_count())
    print_accuracy()
    for shape in (CAMVID, ADE20K):
        print_scoring(*shape)
        print_loss(*shape)
        print_step(*shape)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        few, many = pool.map(scoring_memory, [10, 50], chunksize=1)
    print(f"scoring takes {few:.1f} class maps with 10 draws, {many:.1f} with 50")


if __name__ == "__main__":
    main()
