"""A folder dataset from a part of CamVid.

python .github/experiments/subset.py data/CamVid data/half --step 2
python .github/experiments/subset.py data/CamVid data/held-out --held-out

With --step 2 every second training frame is for training. With --held-out the last
quarter of each training sequence is the test split, in place of CamVid's; settings are
chosen on it, never on the test images.
"""

import shutil
from itertools import groupby
from pathlib import Path

from _runs import bs, make_parser


def sequence(path):
    """The part of a frame's name that all frames of its sequence share."""
    return path.name[:6]


def split_frames(source, held_out, step):
    """The images for training, and those held out."""
    images = sorted((source / "train").iterdir())
    if not held_out:
        return images[::step], []
    train = []
    test = []
    for _, frames in groupby(images, sequence):
        frames = list(frames)
        end = len(frames) * 3 // 4
        train += frames[:end:step]
        test += frames[end:]
    return train, test


def copy_frames(images, label_folder, target, split):
    """Copy images and their labels."""
    for image in images:
        label = label_folder / f"{image.stem}.png"
        for path, name in ((image, split), (label, f"{split}annot")):
            folder = target / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("source", type=Path, help="the folder CamVid")
    parser.add_argument("target", type=Path, help="the new folder")
    parser.add_argument("--step", type=int, default=1, help="take every STEP-th frame")
    parser.add_argument("--held-out", action="store_true", help="make a test split")
    args = parser.parse_args()
    train, test = split_frames(args.source, args.held_out, args.step)
    copy_frames(train, args.source / "trainannot", args.target, "train")
    copy_frames(test, args.source / "trainannot", args.target, "test")
    if not args.held_out:
        test = sorted((args.source / "test").iterdir())
        copy_frames(test, args.source / "testannot", args.target, "test")
    names = "\n".join(bs.DATASETS["camvid"].classes)
    (args.target / "classes.txt").write_text(f"{names}\n")


if __name__ == "__main__":
    main()
