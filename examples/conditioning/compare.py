"""How far students follow a condition: a table over all seeds, and a contact sheet of the first.

    python examples/conditioning/compare.py --data_dir outputs/conditioning/control/data \\
        --runs outputs/conditioning/control/seed-0 --output examples/conditioning/control

Each run has the folders own/, wrong/ and none/ of samples, by the tables of `tables.py`. Writes OUTPUT.md and
OUTPUT.png. Beside the students: white paper, and another of the drawings that the prompt may mean, as if by chance.
"""

import csv
import sys
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository
sys.path.insert(0, str(Path(__file__).parents[1] / "sketch"))

from report import contact_sheet, mean_scores, read_video
from tables import wrong_of

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import PositiveInt, checked_dataclass


COLUMNS = ("ink F1, last frame", "ink F1, mean over frames", "PSNR [dB]")


@checked_dataclass
class Config:
    """What to compare."""

    data_dir: LocalPath
    """Folder with heldout.csv, targets.csv and videos/."""
    runs: tuple[LocalPath, ...]
    """Output folders of runs, one a seed, with own/, wrong/ and none/."""
    output: LocalPath
    """Path of the table and the contact sheet, without suffix."""
    num_shown: PositiveInt = 4
    """Held-out clips on the contact sheet."""


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_samples(run: Path, given: str, count: int) -> list[np.ndarray]:
    """The videos that a run has made by one of the tables."""
    return [read_video(run / given / f"{number:02d}.mp4") for number in range(count)]


def by_chance(rows: list[dict[str, str]], targets: list[dict[str, str]]) -> list[str]:
    """For each row another drawing that its prompt may mean: the first in the table of all that is not a row's own."""
    own = {row["video"] for row in rows}
    return [
        next(each["video"] for each in targets if each["prompt"] == row["prompt"] and each["video"] not in own)
        for row in rows
    ]


def describe(scores: list[dict[str, float]]) -> str:
    """Cells of a row: the mean over seeds, and the least and the most where there are several."""
    cells = []
    for name in COLUMNS:
        values, digits = [each[name] for each in scores], 1 if "dB" in name else 3
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.{digits}f}{spread}")
    return " | ".join(cells)


def main(config: Config) -> None:
    data, output = Path(config.data_dir), Path(config.output)
    rows = read_table(data / "heldout.csv")
    clips = [read_video(data / "videos" / row["video"]) for row in rows]
    others = [clips[wrong_of(number, len(rows))] for number in range(len(rows))]
    chance = [read_video(data / "videos" / name) for name in by_chance(rows, read_table(data / "targets.csv"))]
    samples = {
        given: [read_samples(Path(run), given, len(rows)) for run in config.runs] for given in ("own", "wrong", "none")
    }
    own, wrong, none = samples.values()
    lines = {
        "white paper, against the clip": [mean_scores([np.full_like(clip, 255) for clip in clips], clips)],
        "another drawing of the prompt, against the clip": [mean_scores(chance, clips)],
        "**its own condition, against the clip**": [mean_scores(videos, clips) for videos in own],
        "a wrong condition, against the clip": [mean_scores(videos, clips) for videos in wrong],
        "a wrong condition, against the clip that it is of": [mean_scores(videos, others) for videos in wrong],
        "no condition, against the clip": [mean_scores(videos, clips) for videos in none],
    }
    table = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    table += [f"| {name} | {describe(scores)} |" for name, scores in lines.items()]
    output.with_suffix(".md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
    first = [samples[given][0] for given in samples]
    groups = list(zip(clips, *first, strict=True))[: config.num_shown]
    contact_sheet(groups, output.with_suffix(".png"), ["clip", "its own condition", "a wrong condition", "none"])
    print(f"contact sheet  {output.with_suffix('.png')}")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
