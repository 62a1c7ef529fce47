"""Learn the labels of all rounds of a finished run anew, in one round.

python .github/experiments/relearn.py runs/camvid-balent-seed0 --epochs 80 --out runs-80

The other settings are those of the run.
"""

import csv
from dataclasses import fields
from pathlib import Path

from _runs import bs, make_parser, read_rows, read_settings


def main():
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the finished run")
    parser.add_argument("--epochs", type=int, required=True, help="of the one round")
    parser.add_argument("--out", required=True, help="another folder than that of RUN")
    args = parser.parse_args()
    old = read_settings(args.run)
    settings = {field.name: old[field.name] for field in fields(bs.Config)}
    settings |= {"epochs": args.epochs, "rounds": 1, "out": args.out}
    config = bs.Config(**settings)

    rows = [("image", "y", "x", "label")]
    for path in sorted(args.run.glob("round-*/labels.csv")):
        rows.extend(row.values() for row in read_rows(path))
    path = config.folder / "round-00" / "labels.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    bs.run(config)


if __name__ == "__main__":
    main()
