"""Measures a student on held-out clips, and lays its videos beside theirs in a report.

    python evaluate.py --checkpoint outputs/my-wan --metadata_path data/heldout.csv --dataset_base_path data/videos

Writes `metrics.json`, `report.html` (self-contained: videos, curves by block, table) and `videos/NN.mp4` to
`--output_dir`. `--num_base_steps 50` samples the model that the student was made from as well, in so many steps and
both ways in time. Each prompt is sampled from noise of its own number, so results can be laid side by side.
"""

import base64
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from diffusers import WanPipeline
from tqdm.auto import tqdm

from causal_wan.config import parse_config, user_errors
from causal_wan.encoding import check_video_size, decode_latents, encode_prompts, pad_prompt_embeds
from causal_wan.models import load_vae
from causal_wan.pipeline import CausalWanPipeline
from causal_wan.regression import sample_generator
from causal_wan.sample_order import ClipShape
from causal_wan.student import SamplingSettings, choose_device, load_student, read_run, resolve_settings
from causal_wan.video_metrics import (
    border_flicker,
    by_block,
    first_frames_of_blocks,
    frame_changes,
    frame_psnr,
    frame_sharpness,
    frame_ssim,
)
from causal_wan.video_writing import FRAME_RATE, write_video
from dataset_utils import DataConfig, Row, load_rows, load_video


TEMPLATE = Path(__file__).parent / "causal_wan" / "evaluation_report.html.jinja"

# What the table shows: name, how it is written, what it says.
FIGURES = {
    "psnr": ("PSNR [dB]", "likeness to the clip; blur raises it"),
    "ssim": ("SSIM", "likeness of structure, 1 is the clip itself"),
    "sharpness_ratio": ("sharpness, of the clip's", "below 1 is softer; what likeness does not see"),
    "motion_ratio": ("motion, of the clip's", "mean change from frame to frame"),
    "border_flicker": ("flicker at borders of blocks", "jolts there, of those inside blocks; compare with the clip's"),
    "frames_per_second": ("frames a second", "sampling and decoding, without loading and text"),
    "peak_memory_gib": ("peak memory [GiB]", "of the GPU, while sampling and decoding"),
    "first_block_seconds": ("first block [s]", "until the latents of the first block are there"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure, and on which clips."""

    checkpoint: str
    """Output folder of a run, or a diffusers WAN folder or hub id."""
    metadata_path: str
    """Table of held-out clips, as in training."""
    dataset_base_path: str | None = None
    """Folder that its paths are relative to."""
    video_column: str = "video"
    """Column with the path of the video."""
    caption_column: tuple[str, ...] = ("prompt",)
    """Column with the prompt; of several the first that is not empty is sampled."""
    output_dir: str = "outputs/evaluation"
    """Folder of the result."""
    num_samples: int = 16
    """Clips that are measured, from the first row on."""
    num_base_steps: int = 0
    """Steps of the base model, sampled both ways in time for comparison; 0 leaves it out."""
    guidance_scale: float = 5.0
    """Classifier-free guidance of the base model; 1 is none."""
    num_frame_per_block: int | None = None
    """Latent frames of a block; None is the checkpoint's own setting."""
    denoising_step_list: tuple[float, ...] | None = None
    """Timesteps to sample at; None is the run's list, or 1000 757 522."""
    num_frames: int | None = None
    """Video frames, 4k + 1; None is what the run was trained on, or 81."""
    height: int | None = None
    """Pixels; None is what the run was trained on, or 480."""
    width: int | None = None
    """Pixels; None is what the run was trained on, or 832."""
    seed: int = 0
    """Seeds the noise."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the transformer and the text encoder; None is bf16 on a GPU and fp32 on a CPU."""
    device: str | None = None
    """None is the GPU if there is one."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {self.num_samples}.")
        if self.num_base_steps < 0:
            raise ValueError(f"num_base_steps must be 0 (leave the base out) or more, got {self.num_base_steps}.")


Sample = tuple[torch.Tensor, dict[str, float]]  # video in [0, 1], (T, 3, height, width); what was timed


def main(config: Config) -> None:
    """Samples every prompt, measures, and writes the report."""
    device, dtype = choose_device(config.device, config.dtype)
    with user_errors():
        run = read_run(config.checkpoint)
        settings = resolve_settings(
            run,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            denoising_step_list=config.denoising_step_list,
        )
        data = data_config(config, run, settings)
        rows = load_rows(data)[: config.num_samples]
        student = load_student(config.checkpoint, run, dtype, num_frame_per_block=config.num_frame_per_block)
        shape = ClipShape(settings.num_frames, settings.height, settings.width)
        check_video_size(*shape, vae=student.vae, transformer=student.transformer)
    lengths = student.transformer.block_lengths((shape.num_frames - 1) // student.vae_scale_factor_temporal + 1)
    starts = first_frames_of_blocks(lengths, student.vae_scale_factor_temporal)
    targets = [load_video(row, shape, data, torch.Generator())[0].movedim(0, 1) / 255 for row in rows]

    folder = Path(config.output_dir)
    results = {"student": sample_all(student, rows, partial(sample_student, settings, config.seed), device)}
    if config.num_base_steps:
        student.to("cpu")
        base = load_base(config.checkpoint, run, dtype)
        results["base"] = sample_all(base, rows, partial(sample_base, settings, config), device)
    measured = {name: measure(samples, targets, starts) for name, samples in results.items()}
    measured["clips"] = {"mean": {"border_flicker": mean([border_flicker(target, starts) for target in targets])}}
    save(folder, config, rows, targets, results, measured)
    for name, figures in measured.items():
        listed = ", ".join(f"{key} {value:.3g}" for key, value in figures["mean"].items() if not math.isnan(value))
        print(f"{name:9} {listed}")
    print(f"report    {folder / 'report.html'}")


def data_config(config: Config, run: dict[str, Any], settings: SamplingSettings) -> DataConfig:
    """The clips as the run was shown them."""
    shown = {name: run[name] for name in ("frame_sampling", "frame_rate", "time_division_factor") if name in run}
    data = DataConfig(
        dataset_base_path=config.dataset_base_path,
        metadata_path=config.metadata_path,
        video_column=config.video_column,
        caption_column=config.caption_column,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        **shown,
    )
    return data.for_validation()


# --- sampling --------------------------------------------------------------------------------------------------------


def sample_all(pipeline: WanPipeline, rows: list[Row], sample: Callable[..., Sample], device: str) -> list[Sample]:
    """A sample of each row's prompt."""
    pipeline.to(device)
    return [sample(pipeline, number, row.prompts[0]) for number, row in enumerate(tqdm(rows, desc="videos"))]


def sample_student(
    settings: SamplingSettings, seed: int, pipeline: CausalWanPipeline, number: int, prompt: str
) -> Sample:
    """A video in few steps, block by block."""
    device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
    embeds = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [prompt], settings.max_sequence_length)
    size = (settings.num_frames, settings.height, settings.width)
    noise = pipeline.draw_noise(1, *size, settings.timesteps, generator=sample_generator(seed, number)).to(device)
    prompt_embeds = pad_prompt_embeds(embeds, settings.max_sequence_length).to(device, dtype)
    ends: list[float] = []

    def note_time(*block: Any) -> None:
        _wait_for(device)
        ends.append(time.perf_counter())

    _reset_peak_memory(device)
    start = time.perf_counter()
    latents = pipeline.sample_latents(prompt_embeds, noise, settings.timesteps, on_block_end=note_time)
    video = decode_latents(pipeline.vae, latents)[0]
    _wait_for(device)
    seconds = time.perf_counter() - start
    timed = {"frames_per_second": video.shape[1] / seconds, "first_block_seconds": ends[0] - start}
    return _as_target(video), timed | _peak_memory(device)


def load_base(checkpoint: str, run: dict[str, Any], dtype: torch.dtype) -> WanPipeline:
    """The stock pipeline of the model that the student was made from."""
    base, revision = run.get("pretrained_model_name_or_path", checkpoint), run.get("revision")
    pipeline = WanPipeline.from_pretrained(
        base, vae=load_vae(base, revision=revision), dtype=dtype, revision=revision, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_base(settings: SamplingSettings, config: Config, pipeline: WanPipeline, number: int, prompt: str) -> Sample:
    """A video in many steps, as stock diffusers makes it."""
    _reset_peak_memory(pipeline.transformer.device)
    start = time.perf_counter()
    video = pipeline(
        prompt,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        num_inference_steps=config.num_base_steps,
        guidance_scale=config.guidance_scale,
        generator=sample_generator(config.seed, number),
        output_type="pt",
    ).frames[0]
    _wait_for(pipeline.transformer.device)
    timed = {"frames_per_second": len(video) / (time.perf_counter() - start)}
    return video.float().cpu(), timed | _peak_memory(pipeline.transformer.device)


def _as_target(video: torch.Tensor) -> torch.Tensor:
    """`(3, T, height, width)` in [-1, 1] -> `(T, 3, height, width)` in [0, 1]."""
    return ((video.float().clamp(-1, 1) + 1) / 2).movedim(0, 1).cpu()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> dict[str, float]:
    """On a GPU alone: a process on the CPU shares its memory with all that it has loaded."""
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


# --- measuring -------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    """Of those that are numbers."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.fmean(numbers) if numbers else math.nan


def measure(samples: list[Sample], targets: list[torch.Tensor], starts: list[int]) -> dict[str, Any]:
    """Figures of each sample against its target, their means, and curves by block."""
    each, curves = [], {"psnr": [], "sharpness_ratio": []}
    for (video, timed), target in zip(samples, targets, strict=True):
        psnr, sharpness, wanted = frame_psnr(video, target), frame_sharpness(video), frame_sharpness(target)
        each.append(
            {
                "psnr": float(psnr.mean()),
                "ssim": float(frame_ssim(video, target).mean()),
                "sharpness_ratio": _ratio(sharpness.mean(), wanted.mean()),
                "motion_ratio": _ratio(frame_changes(video).mean(), frame_changes(target).mean()),
                "border_flicker": border_flicker(video, starts),
                **timed,
            }
        )
        curves["psnr"].append(by_block(psnr, starts))
        ratios = zip(by_block(sharpness, starts), by_block(wanted, starts), strict=True)
        curves["sharpness_ratio"].append([_ratio(*pair) for pair in ratios])
    means = {key: mean([figures[key] for figures in each]) for key in each[0]}
    by_block_means = {key: [mean(list(values)) for values in zip(*rows, strict=True)] for key, rows in curves.items()}
    return {"mean": means, "by_block": by_block_means, "samples": each}


def _ratio(value: Any, of: Any) -> float:
    return float(value) / float(of) if float(of) > 0 else math.nan


# --- the report ------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    config: Config,
    rows: list[Row],
    targets: list[torch.Tensor],
    results: dict[str, list[Sample]],
    measured: dict[str, Any],
) -> None:
    """Writes videos, metrics.json and report.html."""
    columns = {"clip": targets, **{name: [video for video, _ in samples] for name, samples in results.items()}}
    shown = []
    for number, row in enumerate(rows):
        paths = {}
        for name, videos in columns.items():
            paths[name] = folder / "videos" / f"{number:02d}-{name}.mp4"
            write_video(paths[name], videos[number].movedim(1, 0) * 2 - 1, FRAME_RATE)
        encoded = {name: base64.b64encode(path.read_bytes()).decode() for name, path in paths.items()}
        shown.append({"number": row.number, "prompt": row.prompts[0], "videos": encoded})
    content = {"checkpoint": config.checkpoint, "metadata_path": config.metadata_path, "seed": config.seed}
    content |= {"num_samples": len(rows), "rows": [row.number for row in rows], **measured}
    (folder / "metrics.json").write_text(json.dumps(_without_nan(content), indent=1))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        checkpoint=config.checkpoint,
        table=config.metadata_path,
        columns=list(columns),
        shown=shown,
        figures=table(measured),
        curves=[draw_curve(title, key, measured) for key, title in CURVES.items()],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")


CURVES = {"psnr": "PSNR by block [dB]", "sharpness_ratio": "Sharpness by block, of the clip's"}


def _without_nan(value: Any) -> Any:
    """JSON knows no nan."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def table(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of means."""
    lines = []
    for key, (title, note) in FIGURES.items():
        values = {name: figures["mean"].get(key, math.nan) for name, figures in measured.items()}
        texts = {name: "" if math.isnan(value) else f"{value:.3g}" for name, value in values.items()}
        if any(texts.values()):
            lines.append({"title": title, "note": note, "values": texts})
    return lines


def draw_curve(title: str, key: str, measured: dict[str, Any]) -> dict[str, Any]:
    """A curve by block for each kind of sample, as points of an SVG of 300 x 120."""
    series = {name: figures["by_block"][key] for name, figures in measured.items() if "by_block" in figures}
    values = [value for curve in series.values() for value in curve if not math.isnan(value)] or [0.0]
    low, high = min(0.0, *values), max(values) or 1.0
    lines = {}
    for name, curve in series.items():
        step = 270 / max(len(curve) - 1, 1)
        points = [
            (20 + step * index, 110 - 100 * (value - low) / (high - low))
            for index, value in enumerate(curve)
            if not math.isnan(value)
        ]
        lines[name] = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return {"title": title, "lines": lines, "high": f"{high:.3g}", "low": f"{low:.3g}"}


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
