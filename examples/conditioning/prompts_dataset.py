"""Sketches whose colour changes while they are drawn, with a prompt for each of the two colours: a prompt_schedule.

    python examples/conditioning/prompts_dataset.py --output_dir outputs/prompts/data

Writes `videos/*.mp4` and tables. A clip is one of `examples/sketch/make_dataset.py`: at a second of its own, all ink
takes another colour, and the drawing goes on in it.

    train.csv     clips with a `prompt_schedule`
    plain.csv     the same drawings without a change, with a `prompt`: for a student that never sees one
    heldout.csv   clips with a `prompt_schedule`, of drawings that are in neither
    without.csv   their first prompt alone
    wrong.csv     their schedules with a third colour in the place of the second
"""

import csv
import json
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import PositiveInt, Seed, checked_dataclass
from examples.sketch.make_dataset import FRAME_RATE, KNOWN_COLOURS, Sketch, draw, prompt, split, write_mp4


KINDS = ("house", "cup", "mushroom", "boat")  # of those that the base model of `tiny-wan` knows
SECONDS = (1.3, 3.6)  # between which colours change, of 5


@dataclass(frozen=True)
class Change:
    """A drawing that goes on in another colour from a second on; `other` is the colour of neither part."""

    sketch: Sketch
    colour: str
    other: str
    second: float

    @property
    def file_name(self) -> str:
        """Of the clip."""
        return "-".join([*astuple(self.sketch), self.colour]).replace(" ", "_") + ".mp4"

    def schedule(self, colour: str) -> str:
        """The cell of a table, with a colour for the second part."""
        prompts = [[0, prompt(self.sketch)], [self.second, prompt(replace(self.sketch, colour=colour))]]
        return json.dumps(prompts)

    def frames(self) -> np.ndarray:  # (T, H, W, 3) uint8
        """The clip."""
        before, after = draw(self.sketch), draw(replace(self.sketch, colour=self.colour))
        is_after = np.arange(len(before)) / FRAME_RATE >= self.second
        return np.where(is_after[:, None, None, None], after, before)


@checked_dataclass
class Config:
    """What to draw, and where to put it."""

    output_dir: LocalPath
    """Folder that gets videos/ and the tables."""
    num_clips: PositiveInt = 160
    """Clips in train.csv and in plain.csv."""
    num_heldout: PositiveInt = 12
    """Clips in heldout.csv."""
    seed: Seed = 0
    """Chooses which sketches are drawn, their second colours, and when they change."""
    num_workers: PositiveInt = 2
    """Processes that draw."""


def choose_changes(config: Config) -> tuple[list[Change], list[Change]]:
    """Those to train on, and those that are held out."""
    rng = random.Random(config.seed)
    counts = {"num_clips": config.num_clips, "num_heldout": config.num_heldout}
    parts = []
    for sketches in split(KINDS, KNOWN_COLOURS, **counts, seed=config.seed):
        changes = []
        for sketch in sketches:
            colours = rng.sample([colour for colour in KNOWN_COLOURS if colour != sketch.colour], 2)
            changes.append(Change(sketch, *colours, round(rng.uniform(*SECONDS), 2)))
        parts.append(changes)
    return parts[0], parts[1]


def write_clip(change: Change, folder: Path) -> None:
    """The clip, and the same drawing without a change."""
    write_mp4(change.frames(), folder / change.file_name)
    write_mp4(draw(change.sketch), folder / f"plain-{change.file_name}")


def write_table(path: Path, column: str, rows: list[tuple[str, str]]) -> None:
    """A CSV of clips, and prompts or schedules."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video", column), *rows])


def main(config: Config) -> None:
    """Draws the clips and writes the tables."""
    folder, (train, heldout) = Path(config.output_dir), choose_changes(config)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(config.num_workers) as workers:
        clips = workers.map(partial(write_clip, folder=folder / "videos"), [*train, *heldout], chunksize=4)
        for _ in tqdm(clips, total=len(train) + len(heldout), desc="drawing", unit="clip"):
            pass
    for name, changes in (("train", train), ("heldout", heldout)):
        rows = [(change.file_name, change.schedule(change.colour)) for change in changes]
        write_table(folder / f"{name}.csv", "prompt_schedule", rows)
    plain = [(f"plain-{change.file_name}", prompt(change.sketch)) for change in train]
    write_table(folder / "plain.csv", "prompt", plain)
    write_table(folder / "without.csv", "prompt", [(each.file_name, prompt(each.sketch)) for each in heldout])
    wrong = [(change.file_name, change.schedule(change.other)) for change in heldout]
    write_table(folder / "wrong.csv", "prompt_schedule", wrong)
    print(f"{len(train)} training and {len(heldout)} held-out clips are in {folder}")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
