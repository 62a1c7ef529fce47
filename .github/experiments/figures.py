"""Draw the two figures of the results from the numbers in this folder.

python .github/experiments/figures.py

curves.png: mIoU against labelled pixels in the three regimes, of results.csv.
picks.png: the picks' distance and how many lie at boundaries, of picks.csv.
"""

from pathlib import Path

import numpy as np
from _runs import make_parser, read_rows
from matplotlib.figure import Figure

HERE = Path(__file__).parent
# of results.csv: the regime, its variant, which seeds, and the title of its picture
REGIMES = (
    ("CWFID", "", "mean of 0 to 4", "CWFID, 5 seeds"),
    ("CamVid", "bfloat16", "each", "CamVid, 5 seeds"),
    ("CamVid pretrained", "", "each", "CamVid, pretrained, 3 seeds"),
)
COLOURS = {
    "balent": "tab:red",
    "margin": "tab:blue",
    "power_bald": "tab:cyan",
    "random": "black",
    "entropy": "tab:green",
    "mean_std": "tab:orange",
    "bald": "tab:purple",
    "every pixel": "grey",
}
PICKED_BY = (
    "random",
    "power_bald",
    "margin --top 0.05",
    "margin",
    "balent",
    "h_twice",
    "least_confidence",
    "entropy",
    "mean_std",
    "bald",
)


def to_numbers(cells):
    """An array of these texts; NaN where there is none."""
    return np.array([float(cell) if cell else np.nan for cell in cells])


def select(regime, variant, seeds):
    """{function: mIoU of each round}, averaged over the seeds."""
    runs = {}
    for row in read_rows(HERE / "results.csv"):
        wanted = row["seed"] == seeds or (seeds == "each" and row["seed"].isdecimal())
        if wanted and row["regime"] == regime and row["variant"] == variant:
            rounds = runs.setdefault(row["function"], {})
            rounds.setdefault(int(row["round"]), []).append(float(row["mIoU"]))
    return {
        function: [np.mean(values) for values in rounds.values()]
        for function, rounds in runs.items()
    }


def draw_curves(path):
    figure = Figure((12, 4.5), layout="constrained")
    grid = figure.subplots(1, len(REGIMES))
    for axes, (regime, variant, seeds, title) in zip(grid, REGIMES):
        axes.set(title=title, xlabel="labelled pixels an image")
        curves = select(regime, variant, seeds)
        for function, colour in COLOURS.items():
            values = curves[function]
            if function == "every pixel":
                axes.axhline(values[0], color=colour, linestyle="--", label=function)
            else:
                pixels = [10 * (r + 1) for r in range(len(values))]
                axes.plot(pixels, values, "o-", color=colour, label=function)
    grid[0].set_ylabel("mIoU, mean over the seeds")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(COLOURS))
    figure.savefig(path)


def draw_picks(path):
    figure = Figure((12, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="median distance to the nearest pick, in pixels")
    right.set(title="picks within a pixel of a class boundary, in %")
    rows = read_rows(HERE / "picks.csv")
    for (regime, _, _, _), marker in zip(REGIMES, "osD"):
        cells = {row["function"]: row for row in rows if row["regime"] == regime}
        distance = [cells.get(name, {}).get("distance") for name in PICKED_BY]
        share = [cells.get(name, {}).get("at_boundary") for name in PICKED_BY]
        style = {"linestyle": "none", "marker": marker, "alpha": 0.7}
        left.plot(to_numbers(distance), PICKED_BY, label=regime, **style)
        right.plot(100 * to_numbers(share), PICKED_BY, **style)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    left.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(REGIMES))
    figure.savefig(path)


def main():
    make_parser(__doc__).parse_args()
    draw_curves(HERE.parent / "curves.png")
    draw_picks(HERE.parent / "picks.png")


if __name__ == "__main__":
    main()
