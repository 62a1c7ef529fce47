"""How much the picks depend on the draws: two sets of 50 draws of one network.

python .github/experiments/overlap.py runs/camvid-balent-seed0

On every sixth training image of a run, with its last network, it prints what the two sets
share of the best ten pixels and of the best 5 %, for three functions.
"""

from pathlib import Path

import torch
from _runs import bs, make_parser, read_frames

FUNCTIONS = ("balent", "margin", "mean_std")


def share_of_best(scores, count):
    """The share of the `count` best pixels of one map that are the other's, too."""
    first, second = [score_HW.flatten().topk(count).indices for score_HW in scores]
    return torch.isin(first, second).float().mean().item()


def main():
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    folder = parser.parse_args().run
    model, _ = bs.load_model(folder / "model.pt")
    frames, _ = read_frames(folder)
    ten = {name: [] for name in FUNCTIONS}
    part = {name: [] for name in FUNCTIONS}
    balents = []
    for image_3HW, label_HW in list(frames.values())[::6]:
        x_13HW = image_3HW[None].float() / 255
        twice = [model.mc_moments(x_13HW, 50, seed) for seed in (0, 1)]
        void_HW = label_HW == bs.IGNORE
        for name in FUNCTIONS:
            scores = []
            for moments in twice:
                score_HW = bs.ACQUISITIONS[name](moments)[0]
                scores.append(score_HW.masked_fill(void_HW, -torch.inf))
            ten[name].append(share_of_best(scores, 10))
            part[name].append(share_of_best(scores, label_HW.numel() // 20))
            if name == "balent":
                picks_N = scores[0].flatten().topk(10).indices
                moments = twice[0]
                balent_BHW = bs.balanced_entropy(moments.mean_BCHW, moments.var_BCHW)
                balents.append(balent_BHW.flatten()[picks_N].abs().median())
    for name in FUNCTIONS:
        print(
            f"{name}: two sets of 50 draws share {torch.tensor(ten[name]).mean():.1%} "
            f"of the best ten pixels, {torch.tensor(part[name]).mean():.0%} of the "
            "best 5 %"
        )
    print(f"median |BalEnt| of its picks: {torch.stack(balents).median():.0e}")


if __name__ == "__main__":
    main()
