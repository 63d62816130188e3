"""What an evaluation found, as metrics.json, and as one HTML page that fetches nothing.

Paths and prompts may come from anyone: all text is escaped, and the page forbids itself scripts and requests.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from causal_wan.geometry import FRAME_RATE
from causal_wan.video.writing import write_video


# What the table shows: name, how it is written, what it says.
FIGURES = {
    "psnr": ("PSNR [dB]", "likeness to the clip; blur raises it"),
    "ssim": ("SSIM", "likeness of structure, 1 is the clip itself"),
    "lpips": ("LPIPS", "distance from the clip as people see it, 0 is the clip itself; blur raises it too"),
    "clip_score": ("CLIP score", "likeness to the prompt; compare with the clips'"),
    "sharpness_ratio": ("sharpness, of the clip's", "below 1 is softer; what likeness does not see"),
    "motion_ratio": ("motion, of the clip's", "mean change from frame to frame"),
    "border_flicker": ("flicker at borders of blocks", "jolts there, of those inside blocks; compare with the clips'"),
    "frames_per_second": ("frames a second", "sampling and decoding, without loading and text"),
    "peak_memory_gib": ("peak memory [GiB]", "of the GPU, while sampling and decoding"),
    "first_block_seconds": ("first block [s]", "until the latents of the first block are there"),
}
CURVES = {
    "psnr": "PSNR by block [dB]",
    "lpips": "LPIPS by block",
    "sharpness_ratio": "Sharpness by block, of the clip's",
}
LEVELS = {
    "loss": ("loss", "mean squared error of the predicted latents"),
    "blur_gap": ("blur gap", "share of the target's variance that prediction and error do not account for"),
    "pred_latent_std": ("spread predicted", "standard deviation of the predicted latents"),
    "target_latent_std": ("spread of the clips", "of the clips' own latents"),
}
PLOT_LEFT, PLOT_WIDTH, PLOT_TOP, PLOT_HEIGHT = 42, 252, 10, 100  # of a curve, in a picture of 300 x 126


def write_metrics(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON, with null for what is not a finite number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_without_nan(content), indent=1), encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_videos(
    folder: Path,
    columns: Mapping[str, Sequence[torch.Tensor]],
    prompts: Sequence[tuple[int, str]],
    frame_rate: float = FRAME_RATE,
) -> list[dict[str, Any]]:
    """Writes `videos/NN-column.mp4`.

    Args:
        folder: Of the result.
        columns: Name -> a video for each prompt, in [0, 1], `(T, 3, height, width)`.
        prompts: Number of the row, and its prompt.
        frame_rate: Frames a second of the files.

    Returns:
        For each row its number, its prompt and its videos as data URIs.
    """
    shown = []
    for number, (row, prompt) in enumerate(prompts):
        uris = {}
        for name, videos in columns.items():
            path = folder / "videos" / f"{number:02d}-{name}.mp4"
            write_video(path, videos[number].movedim(1, 0) * 2 - 1, frame_rate)
            uris[name] = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        shown.append({"number": row, "prompt": prompt, "videos": uris})
    return shown


def write_report(
    path: Path, content: Mapping[str, Any], measured: Mapping[str, Any], shown: list[dict[str, Any]]
) -> None:
    """Writes the page.

    Args:
        path: Of the page.
        content: checkpoint, metadata_path, notes and heldout_loss of the evaluation.
        measured: Kind of sample -> its figures: mean and, but for the clips themselves, by_block.
        shown: From `write_videos`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["figure"] = write_figure
    curves = [draw_curve(title, key, measured) for key, title in CURVES.items()]
    page = environment.get_template("report.html.jinja").render(
        checkpoint=content["checkpoint"],
        table=content["metadata_path"],
        notes=content["notes"],
        heldout_loss=content["heldout_loss"],
        levels=LEVELS,
        kinds=list(measured),
        shown=shown,
        figures=table(measured),
        curves=[curve for curve in curves if curve["lines"]],
    )
    path.write_text(page, encoding="utf-8")


def write_figure(value: float) -> str:
    """Three digits that count; nothing for nan."""
    return "" if math.isnan(value) else f"{value:.3g}"


def table(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of means: those that have a figure."""
    lines = []
    for key, (title, note) in FIGURES.items():
        texts = {name: write_figure(figures["mean"].get(key, math.nan)) for name, figures in measured.items()}
        if any(texts.values()):
            lines.append({"title": title, "note": note, "values": texts})
    return lines


def draw_curve(title: str, key: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """A curve by block for each kind of sample that has one, as dots and as points of an SVG line."""
    series = {name: figures["by_block"][key] for name, figures in measured.items() if "by_block" in figures}
    series = {name: curve for name, curve in series.items() if not all(map(math.isnan, curve))}
    values = [value for curve in series.values() for value in curve if not math.isnan(value)]
    low, high = min([0.0, *values]), max([0.0, *values]) or 1.0
    lines = {}
    for name, curve in series.items():
        step = PLOT_WIDTH / max(len(curve) - 1, 1)
        lines[name] = [
            (PLOT_LEFT + step * index, PLOT_TOP + PLOT_HEIGHT * (high - value) / (high - low))
            for index, value in enumerate(curve)
            if not math.isnan(value)
        ]
    return {"title": title, "lines": lines, "high": write_figure(high), "low": write_figure(low)}
