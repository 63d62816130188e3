"""Shows what the quickstart has learned: a contact sheet, the loss curve, and a table before and after training.

    python examples/sketch/report.py --data_dir outputs/sketch/data --before outputs/sketch/before \\
        --after outputs/sketch/after --run outputs/sketch/run --output_dir outputs/sketch

Every figure is over all held-out clips; the contact sheet shows the first of them, as they come.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import matplotlib.pyplot as plt
import numpy as np
from ink import colour_error, ink_f1, mean_ink_f1, psnr
from PIL import Image, ImageDraw, ImageFont


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import PositiveInt, checked_dataclass


TOLERANCE = 2  # pixels
NUM_FRAMES_SHOWN = 8
NUM_COLOURS = 128  # of a contact sheet, a third of the bytes
LABEL_WIDTH = 140  # pixels, before they are enlarged


@checked_dataclass
class Config:
    """Where the pieces are."""

    data_dir: LocalPath
    """Folder with heldout.csv and videos/."""
    before: LocalPath
    """Folder of the samples before training: 00.mp4, 01.mp4, ... in the order of heldout.csv."""
    after: LocalPath
    """Folder of the samples after training."""
    run: LocalPath
    """Output folder of the run, with metrics.jsonl."""
    output_dir: LocalPath
    """Folder for contact_sheet.png and loss.png."""
    num_rows: PositiveInt = 8
    """Held-out clips on the contact sheet, from the first on."""


def read_video(path: Path) -> np.ndarray:
    """All frames, uint8 `(T, height, width, 3)`."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def score(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The figures of one video against the clip of the same prompt."""
    return {
        "ink F1, last frame": ink_f1(predicted[-1:], target[-1:], TOLERANCE).item(),
        "ink F1, mean over frames": mean_ink_f1(predicted, target, TOLERANCE),
        "colour error on ink": colour_error(predicted, target),
        "PSNR [dB]": psnr(predicted, target),
    }


def mean_scores(videos: list[np.ndarray], targets: list[np.ndarray]) -> dict[str, float]:
    """Each figure, averaged over the clips."""
    scores = [score(video, target) for video, target in zip(videos, targets, strict=True)]
    return {name: float(np.mean([entry[name] for entry in scores])) for name in scores[0]}


def table(columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table with a row a figure."""
    names = next(iter(columns.values()))
    lines = [f"| {'':26} | " + " | ".join(f"{column:>12}" for column in columns) + " |"]
    lines.append("|" + "-" * 28 + "|" + "|".join("-" * 13 + ":" for _ in columns) + "|")
    for name in names:
        lines.append(f"| {name:26} | " + " | ".join(f"{column[name]:12.3f}" for column in columns.values()) + " |")
    return "\n".join(lines)


def contact_sheet(groups: list[list[np.ndarray]], path: Path, labels: Sequence[str] = ()) -> None:
    """One group a prompt: target above, then before and after training; time from left to right.

    Frames are enlarged twice. With labels, one for each video of a group, each row has its own before it.
    """
    rows = []
    for group in groups:
        for number, video in enumerate(group):
            times = np.linspace(len(video) // NUM_FRAMES_SHOWN, len(video) - 1, NUM_FRAMES_SHOWN).round().astype(int)
            frames = [np.pad(f, ((1, 0), (1, 0), (0, 0)), constant_values=225) for f in video[times]]
            if labels:
                frames.insert(0, label_image(labels[number], len(frames[0])))
            rows.append(np.concatenate(frames, axis=1))
        rows.append(np.full((5, rows[-1].shape[1], 3), 120, np.uint8))
    sheet = Image.fromarray(np.concatenate(rows[:-1]))
    sheet = sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.LANCZOS)
    sheet.quantize(NUM_COLOURS).save(path, optimize=True)


def label_image(text: str, height: int) -> np.ndarray:
    """Black text on white, uint8 `(height, LABEL_WIDTH, 3)`."""
    image = Image.new("RGB", (LABEL_WIDTH, height), "white")
    ImageDraw.Draw(image).text((4, height // 2), text, fill="black", anchor="lm", font=ImageFont.load_default(11))
    return np.asarray(image)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """What a run has logged, entry by entry."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def plot_by_level(axis: plt.Axes, entries: list[dict[str, float]], prefix: str, **style: Any) -> None:
    """The metrics of that prefix, one for each level, over the steps."""
    for name in sorted({name for entry in entries for name in entry if name.startswith(prefix)}):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axis.plot(*zip(*points, strict=True), label=name, **style)
    axis.set(xlabel="step")
    axis.grid(alpha=0.3)


def plot_losses(run: Path, path: Path) -> None:
    """The loss, and the loss at each level, over the steps."""
    entries = read_metrics(run)
    figure, axis = plt.subplots(figsize=(9, 4))
    plot_by_level(axis, entries, "generator_loss", linewidth=2.5, color="black")
    plot_by_level(axis, entries, "loss_at_time_", linewidth=1.2)
    axis.set(ylabel="squared error", yscale="log")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")  # beside the lines: there may be eleven
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(config: Config) -> None:
    data_dir, output_dir = Path(config.data_dir), Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "heldout.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    targets = [read_video(data_dir / "videos" / row["video"]) for row in rows]
    before, after = (
        [read_video(Path(folder) / f"{number:02d}.mp4") for number in range(len(rows))]
        for folder in (config.before, config.after)
    )
    white = [np.full_like(target, 255) for target in targets]
    contact_sheet(list(zip(targets, before, after, strict=True))[: config.num_rows], output_dir / "contact_sheet.png")
    plot_losses(Path(config.run), output_dir / "loss.png")
    columns = {
        "white paper": mean_scores(white, targets),
        "before": mean_scores(before, targets),
        "after": mean_scores(after, targets),
    }
    (output_dir / "scores.json").write_text(json.dumps(columns, indent=2))
    print(f"\n{len(rows)} held-out prompts, few-step samples against the clip of the same prompt:\n")
    print(table(columns))
    print(f"\nvideos         {config.after}/*.mp4 (before training: {config.before}/*.mp4)")
    print(f"contact sheet  {output_dir / 'contact_sheet.png'} (target, before, after; time left to right)")
    print(f"loss plot      {output_dir / 'loss.png'}")
    print(f'your own       python generate.py --checkpoint {config.run} --prompt "{rows[0]["prompt"]}"')


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
