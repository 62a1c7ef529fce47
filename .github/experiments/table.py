"""A markdown table of runs: mIoU by round, mean ± s.d. over the seeds.

python .github/experiments/table.py runs/camvid-*

The area is the mean height of the curve, by trapezoids. "BalEnt minus it" is the mean of
the differences in area of the seeds, its standard error in brackets, and the differences
of each seed; "at last" is the same after the last round.
"""

import sys
from pathlib import Path

import numpy as np
from _runs import bs, make_parser


def read_runs(folders):
    """{name: {seed: mIoU of each round, then the area}}."""
    runs = {}
    for folder in folders:
        miou = [record["mIoU"] for record in bs.read_metrics(folder)]
        if not miou or np.isnan(miou).any():
            sys.exit(f"{folder}: expected the folder of a run, with mIoU")
        heights = np.convolve(miou, [0.5, 0.5], "valid") if len(miou) > 1 else miou
        name, _, seed = folder.name.rpartition("-seed")
        runs.setdefault(name, {})[seed] = np.array([*miou, np.mean(heights)])
    return runs


def mean_and_spread(values):
    """Mean ± sample standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def lead(balent, other, column):
    """BalEnt's mean lead over the seeds of both, its standard error, and the leads."""
    seeds = [seed for seed in other if seed in balent]
    leads = np.array([balent[seed][column] - other[seed][column] for seed in seeds])
    if balent is other or len(leads) == 0:
        return ""
    error = ""
    if len(leads) > 1:
        error = f" ({np.std(leads, ddof=1) / len(leads) ** 0.5:.3f})"
    by_seed = " ".join(f"{value:+.3f}" for value in leads)
    return f"{np.mean(leads):+.3f}{error}: {by_seed}"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run")
    runs = read_runs(parser.parse_args().run)
    rounds = (
        max(len(values) for seeds in runs.values() for values in seeds.values()) - 1
    )
    head = [
        "mIoU by round",
        *map(str, range(rounds)),
        "area",
        "BalEnt minus it",
        "at last",
    ]
    print("|", " | ".join(head), "|")
    print("|", " | ".join(["---"] * len(head)), "|")
    for name, seeds in runs.items():
        table = np.array(list(seeds.values()))
        cells = [mean_and_spread(column) for column in table.T]
        cells[-1:-1] = [""] * (rounds + 1 - len(cells))
        balent = runs.get(f"{name.partition('-')[0]}-balent", seeds)
        cells += [lead(balent, seeds, -1), lead(balent, seeds, -2)]
        print("|", " | ".join([name, *cells]), "|")


if __name__ == "__main__":
    main()
