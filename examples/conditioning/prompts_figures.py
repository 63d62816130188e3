"""Measures how videos follow a prompt that changes: a table of what `prompts.sh` has sampled.

    python examples/conditioning/prompts_figures.py --data_dir outputs/prompts/data --output_dir outputs/prompts \\
        --samples "schedules, switch=outputs/prompts/samples/schedules-0-switch"

A folder of samples is what `generate.py --prompts_file heldout.csv` writes. Folders of the same name are seeds, whose
means are listed with their spread. For each clip, its frames are told apart by the second at which its colour changes:

    before       until half a block before it
    first block  from half a block after it on, for one block: the change itself may be half a block off
    later        after that

    colour       share of the frames whose ink has the hue of the clip's there: of all hues it is the nearest
    ink F1       of the frames with those of the clip, see examples/sketch/ink.py: whether the drawing goes on
"""

import colorsys
import csv
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository
sys.path.insert(0, str(Path(__file__).parents[1] / "sketch"))

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import checked_dataclass
from examples.sketch.ink import ink_f1, ink_mask
from examples.sketch.make_dataset import COLOURS, FRAME_RATE, KNOWN_COLOURS
from examples.sketch.report import contact_sheet, read_video


BLOCK_SECONDS = 12 / FRAME_RATE
NUM_SHOWN = 3  # clips on the contact sheet
PARTS = ("before", "first block", "later")
COLUMNS = [f"{figure}, {part}" for figure in ("colour", "ink F1") for part in PARTS]


@checked_dataclass
class Config:
    """What to measure."""

    data_dir: LocalPath
    """Folder with heldout.csv and videos/."""
    samples: tuple[str, ...]
    """NAME=FOLDER each."""
    output_dir: LocalPath
    """Folder for prompts.json, prompts.md and prompts.png, a contact sheet of the first samples of each name."""


def hue(colour: Sequence[float]) -> float:
    """In [0, 1), round a circle."""
    return colorsys.rgb_to_hsv(*colour)[0]


def nearest_colours(video: np.ndarray) -> np.ndarray:  # (T,)
    """Which of `KNOWN_COLOURS` the mean ink of each frame is nearest to in hue; -1 without ink.

    Lightness says little: thin lines are light, and the VAE makes them lighter.
    """
    palette = [hue(COLOURS[name]) for name in KNOWN_COLOURS]
    ink, pixels = ink_mask(video), torch.as_tensor(video).float()
    means = (pixels * ink[..., None]).sum(dim=(1, 2)) / ink.sum(dim=(1, 2)).clamp(min=1)[:, None]
    found = []
    for mean, has_ink in zip(means.tolist(), ink.flatten(1).any(dim=1).tolist(), strict=True):
        apart = [abs(hue(mean) - each) for each in palette]
        found.append(int(np.argmin([min(each, 1 - each) for each in apart])) if has_ink else -1)
    return np.array(found)


def parts_of(num_frames: int, second: float) -> list[np.ndarray]:
    """Frames of each of `PARTS`, bool `(T,)`."""
    times = np.arange(num_frames) / FRAME_RATE
    begins = second + BLOCK_SECONDS / 2
    is_first = (times >= begins) & (times < begins + BLOCK_SECONDS)
    return [times < second - BLOCK_SECONDS / 2, is_first, times >= begins + BLOCK_SECONDS]


def figures_of(video: np.ndarray, clip: np.ndarray, second: float) -> dict[str, float]:
    """`COLUMNS` of one sample."""
    is_right = nearest_colours(video) == nearest_colours(clip)
    f1 = ink_f1(video, clip).numpy()
    has_ink = ink_mask(clip).flatten(1).any(dim=1).numpy()
    figures = {}
    for name, part in zip(PARTS, parts_of(len(clip), second), strict=True):
        figures[f"colour, {name}"] = float(is_right[part & has_ink].mean())
        figures[f"ink F1, {name}"] = float(f1[part & has_ink].mean())
    return figures


def read_heldout(folder: Path) -> Iterator[tuple[np.ndarray, float]]:
    """Each clip, and the second at which it changes."""
    with (folder / "heldout.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            yield read_video(folder / "videos" / row["video"]), json.loads(row["prompt_schedule"])[1][0]


def measure(folder: Path, heldout: list[tuple[np.ndarray, float]]) -> dict[str, float]:
    """Means over the samples of a folder."""
    each = [
        figures_of(read_video(folder / f"{number:02d}.mp4"), clip, second)
        for number, (clip, second) in enumerate(heldout)
    ]
    return {column: statistics.fmean(figures[column] for figures in each) for column in COLUMNS}


def as_table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row for each name, means of its folders, and half of what lies between them."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for name, folders in found.items():
        cells = []
        for column in COLUMNS:
            values = [figures[column] for figures in folders]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show(config: Config, clips: list[np.ndarray], path: Path) -> None:
    """Draws the first clips with the samples of each name, of its first folder."""
    folders: dict[str, Path] = {}
    for sample in config.samples:
        name, _, folder = sample.partition("=")
        folders.setdefault(name, Path(folder))
    groups = [
        [clip, *(read_video(folder / f"{number:02d}.mp4") for folder in folders.values())]
        for number, clip in enumerate(clips[:NUM_SHOWN])
    ]
    contact_sheet(groups, path, ["clip", *folders])


def main(config: Config) -> None:
    """Measures all folders, and writes the table."""
    heldout = list(read_heldout(Path(config.data_dir)))
    found: dict[str, list[dict[str, float]]] = {}
    for sample in config.samples:
        name, _, folder = sample.partition("=")
        found.setdefault(name, []).append(measure(Path(folder), heldout))
    folder = Path(config.output_dir)
    (folder / "prompts.json").write_text(json.dumps(found, indent=2))
    (folder / "prompts.md").write_text(as_table(found))
    show(config, [clip for clip, _ in heldout], folder / "prompts.png")
    print(as_table(found))


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
