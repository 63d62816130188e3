"""Prompt tables with the condition of each held-out clip, that of another, and none: own.csv, wrong.csv, none.csv.

python examples/conditioning/tables.py --data_dir outputs/conditioning/control/data --condition control
"""

import csv
import sys
from pathlib import Path
from typing import Literal


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import checked_dataclass


@checked_dataclass
class Config:
    """Where the clips are, and what they are to be sampled with."""

    data_dir: LocalPath
    """Folder with heldout.csv; gets the tables."""
    condition: Literal["picture", "control"]
    """picture is the first frame of the clip, control a video in a column of heldout.csv."""
    control: str = "outline"
    """That column."""


def wrong_of(number: int, num_rows: int) -> int:
    """The row whose condition another row is given, to see whose drawing comes: the next but two."""
    return (number + 3) % num_rows


def main(config: Config) -> None:
    folder = Path(config.data_dir)
    with (folder / "heldout.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    source, name = ("video", "image") if config.condition == "picture" else (config.control, config.control)
    others = {"own": list(range(len(rows))), "wrong": [wrong_of(number, len(rows)) for number in range(len(rows))]}
    for table, of_rows in (others | {"none": [None] * len(rows)}).items():
        with (folder / f"{table}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", name])
            for row, other in zip(rows, of_rows, strict=True):
                writer.writerow([row["prompt"], "" if other is None else rows[other][source]])


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
