"""Each round labels the best pixels of the whole pool, with no quota for an image.

python .github/experiments/pool.py --acquisition balent margin --out runs-pool

It takes the flags of balent_seg.py. Round 0 has --pixels random pixels an image. For each
later round this script writes labels.csv itself, with the best pixels of all images
together, as many as before; then balent_seg trains on them.
"""

import csv
import sys
from dataclasses import replace

import torch
from _runs import bs, read_frames, read_picks


def score_pool(config, frames, r):
    """score_NHW of all images; -inf where a pixel is void or has a label."""
    model, _ = bs.load_model(config.folder / "model.pt")
    model = model.to(config.device)
    torch.manual_seed(config.seed * 1000 + r)
    acquisition = bs.ACQUISITIONS[config.acquisition]
    labelled = list(read_picks(config.folder).values())
    scores = []
    for name, (image_3HW, label_HW) in frames.items():
        x_13HW = image_3HW[None].float() / 255
        seed = torch.randint(2**31, ()).item()
        moments = model.mc_moments(x_13HW, config.mc_samples, seed)
        score_HW = acquisition(moments)[0].cpu()
        score_HW[label_HW == bs.IGNORE] = -torch.inf
        for images in labelled:
            for y, x in images.get(name, []):
                score_HW[y, x] = -torch.inf
        scores.append(score_HW)
    return torch.stack(scores)


def label_pool(config, r):
    """Write the labels.csv of round r."""
    frames, classes = read_frames(config.folder)
    score_NHW = score_pool(config, frames, r)
    best_K = score_NHW.flatten().topk(config.pixels * len(frames)).indices
    names = list(frames)
    rows = []
    for n, y, x in torch.stack(
        torch.unravel_index(best_K, score_NHW.shape), 1
    ).tolist():
        label_HW = frames[names[n]][1]
        rows.append((names[n], y, x, classes[label_HW[y, x]]))
    path = config.folder / f"round-{r:02d}" / "labels.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "y", "x", "label"), *sorted(rows)])


def main():
    for config in bs.parse(sys.argv[1:]):
        for r in range(config.rounds):
            if r > 0:
                label_pool(config, r)
            bs.run(replace(config, rounds=r + 1))


if __name__ == "__main__":
    main()
