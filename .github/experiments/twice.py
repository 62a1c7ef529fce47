"""How many of the best 5 % of the pixels stay the same if H is counted twice.

python .github/experiments/twice.py runs/synthetic-balent-seed0 runs/camvid-balent-seed0

It prints that of 100,000 simulated pixels, and of five training images of each run with
its last network; and on which share of the pixels BalEnt is below 0.
"""

from pathlib import Path

import torch
from _runs import bs, make_parser, read_frames
from h_twice import h_twice


def compare(moments):
    """What the best pixels share, and where BalEnt is below 0, as a text."""
    balent_BHW = bs.balanced_entropy(moments.mean_BCHW, moments.var_BCHW)
    count = balent_BHW.numel() // 20
    once_N = bs.ACQUISITIONS["balent"](moments).flatten().topk(count).indices
    twice_N = h_twice(moments).flatten().topk(count).indices
    shared = torch.isin(once_N, twice_N).float().mean()
    below = (balent_BHW < 0).float().mean()
    return f"{shared:.1%} shared, {below:.0%} below 0"


def simulated_moments():
    """Moments of 50 draws of the softmax of normal logits, more or less spread."""
    generator = torch.Generator().manual_seed(0)
    shape = (11, 1, 100_000)
    centre = 2 * torch.randn(1, *shape, generator=generator)
    spread = 2 * torch.rand(1, 1, *shape[1:], generator=generator)
    noise = torch.randn(50, *shape, generator=generator)
    prob = (centre + spread * noise).softmax(1)
    return bs.Moments(prob.mean(0)[None], prob.var(0, correction=0)[None], None)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, nargs="*", help="folder of a run")
    folders = parser.parse_args().run
    print("simulated:", compare(simulated_moments()))
    for folder in folders:
        model, _ = bs.load_model(folder / "model.pt")
        frames, _ = read_frames(folder)
        for name in list(frames)[:: max(1, len(frames) // 4)]:
            moments = model.mc_moments(frames[name][0][None].float() / 255)
            print(folder.name, f"{name}:", compare(moments))


if __name__ == "__main__":
    main()
