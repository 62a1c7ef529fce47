"""What was picked, and what was learned from it.

python .github/experiments/why.py runs/camvid-*

For the picks of rounds 1 and later: the share of them within a pixel of a class boundary,
the median distance in pixels to the nearest pick of the same image and round, and class
by class the share of the picks and the IoU after the last round, over the seeds of a
function. The first line is that of all pixels.
"""

from pathlib import Path

import numpy as np
from _runs import bs, make_parser, read_frames, read_picks, read_rows


def near_boundary(label_HW):
    """True where one of the eight pixels around has another class."""
    H, W = label_HW.shape
    around = np.pad(label_HW, 1, "edge")
    near_HW = np.zeros((H, W), bool)
    for y, x in np.ndindex(3, 3):
        other_HW = around[y : y + H, x : x + W]
        near_HW |= (other_HW != label_HW) & (other_HW != bs.IGNORE)
    return near_HW & (label_HW != bs.IGNORE)


def nearest_distances(yx_N2):
    """Of each pick to its nearest neighbour."""
    distance_NN = np.linalg.norm(yx_N2[:, None] - yx_N2, axis=2)
    np.fill_diagonal(distance_NN, np.inf)
    return distance_NN.min(1)


def print_line(name, near, distances, labels, ious, classes):
    known = [label for label in labels if label != bs.IGNORE]
    counts = np.bincount(known, minlength=len(classes))
    text = f"{name}: {np.sum(near) / len(known):.1%} at a boundary"
    if distances:
        text += f", {np.median(distances):.0f} apart"
    print(text)
    for k, class_name in enumerate(classes):
        line = f"  {class_name}: {counts[k] / len(known):.1%} of the pixels"
        if ious:
            line += f", IoU {np.mean(ious, 0)[k]:.3f}"
        print(line)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run")
    folders = parser.parse_args().run
    frames, classes = read_frames(folders[0])
    label_of = {name: label_HW.numpy() for name, (_, label_HW) in frames.items()}
    near_of = {name: near_boundary(label_HW) for name, label_HW in label_of.items()}
    every_label = np.concatenate([label_HW.ravel() for label_HW in label_of.values()])
    every_near = np.concatenate([near_HW.ravel() for near_HW in near_of.values()])
    print_line("all pixels", every_near, [], every_label, [], classes)

    groups = {}
    for folder in folders:
        groups.setdefault(folder.name.rpartition("-seed")[0], []).append(folder)
    for name, group in groups.items():
        near = []
        distances = []
        labels = []
        ious = []
        for folder in group:
            last = read_rows(folder / "metrics.csv")[-1]
            ious.append([float(last[f"IoU {class_name}"]) for class_name in classes])
            for r, images in read_picks(folder).items():
                for image, rows in images.items():
                    if r > 0:
                        yx_N2 = np.array(rows)
                        y_N, x_N = yx_N2.T
                        near.extend(near_of[image][y_N, x_N])
                        labels.extend(label_of[image][y_N, x_N])
                        distances.extend(nearest_distances(yx_N2))
        if labels:
            print_line(name, near, distances, labels, ious, classes)
        else:  # every pixel
            print(f"{name}: IoU {np.mean(ious, 0).round(3)}")


if __name__ == "__main__":
    main()
