"""Where the picks lie on the grid of the feature map, which has stride 4 with `small`.

python .github/experiments/lattice.py runs/camvid-*

Of the picks of rounds 1 and later of each run it prints the share on the quarter of the
pixels that are nearest to a position of the feature map, and the share in the outer two
pixels of the image.
"""

from pathlib import Path

import numpy as np
from _runs import make_parser, read_picks, read_settings


def main():
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a run")
    for folder in parser.parse_args().run:
        rows = []
        for r, images in read_picks(folder).items():
            if r > 0:
                for image_rows in images.values():
                    rows.extend(image_rows)
        if not rows:
            continue
        yx_N2 = np.array(rows)
        H, W = read_settings(folder)["size"]
        nearest_N = np.isin(yx_N2 % 4, (1, 2)).all(1)
        outer_N = ((yx_N2 < 2) | (yx_N2 >= (H - 2, W - 2))).any(1)
        print(
            f"{folder.name}: {nearest_N.mean():.1%} nearest to a position of the "
            f"feature map, {outer_N.mean():.1%} in the outer two pixels"
        )


if __name__ == "__main__":
    main()
