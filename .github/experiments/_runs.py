"""What the scripts of this folder share: how to read the files of a run."""

import argparse
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import balent_seg as bs


def make_parser(text):
    """A parser of flags whose --help begins with this text."""
    return argparse.ArgumentParser(
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def read_settings(folder):
    """The settings of a run, a dict."""
    return torch.load(folder / "model.pt", map_location="cpu", weights_only=True)


def read_rows(path):
    """The rows of a CSV file that a run wrote, each a dict of texts."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def read_picks(folder):
    """{round: {image: rows [y, x]}} of all rounds of a run."""
    picks = {}
    for path in sorted(folder.glob("round-*/labels.csv")):
        images = {}
        for row in read_rows(path):
            images.setdefault(row["image"], []).append([int(row["y"]), int(row["x"])])
        picks[int(path.parent.name.removeprefix("round-"))] = images
    return picks


def read_frames(folder):
    """{image: (image_3HW, label_HW)} of the training images of a run; its classes."""
    settings = read_settings(folder)
    root = Path(settings["root"], bs.DATASETS[settings["dataset"]].folder)
    pool, _ = bs.open_dataset(settings["dataset"], root, settings["size"])
    frames = {}
    for name, (_, image_3HW, label_HW) in zip(pool.paths, pool):
        frames[name] = (image_3HW, label_HW)
    return frames, pool.classes
