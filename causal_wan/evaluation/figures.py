"""Figures of samples beside the clips of their prompts: each one's, their means, and along the video."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from causal_wan.evaluation.learned_metrics import ClipScore, Lpips
from causal_wan.evaluation.video_metrics import (
    border_flicker,
    by_block,
    frame_changes,
    frame_psnr,
    frame_sharpness,
    frame_ssim,
)
from causal_wan.progress import show_progress
from causal_wan.tables.prompt_schedules import FramePrompts


Sample = tuple[torch.Tensor, dict[str, float]]  # video in [0, 1], (T, 3, height, width); what was timed


@dataclass(frozen=True)
class Judges:
    """Networks that measure; None is left out."""

    lpips: Lpips | None = None
    clip: ClipScore | None = None


def mean(values: list[float]) -> float:
    """Of those that are numbers."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.fmean(numbers) if numbers else math.nan


def measure(
    samples: list[Sample],
    targets: list[torch.Tensor],
    prompts: list[str | FramePrompts],
    starts: list[int],
    judges: Judges = Judges(),
) -> dict[str, Any]:
    """Figures of each sample against its target, their means, and curves by block."""
    each, curves = [], {"psnr": [], "lpips": [], "sharpness_ratio": []}
    measured = show_progress(zip(samples, targets, prompts, strict=True), total=len(samples), desc="figures")
    for (video, timed), target, prompt in measured:
        psnr, sharpness, wanted = frame_psnr(video, target), frame_sharpness(video), frame_sharpness(target)
        lpips = judges.lpips(video, target) if judges.lpips else torch.full((len(video),), math.nan)
        each.append(
            {
                "psnr": float(psnr.mean()),
                "ssim": float(frame_ssim(video, target).mean()),
                "lpips": float(lpips.mean()),
                "clip_score": judges.clip(video, prompt) if judges.clip else math.nan,
                "sharpness_ratio": _ratio(sharpness.mean(), wanted.mean()),
                "motion_ratio": _ratio(frame_changes(video).mean(), frame_changes(target).mean()),
                "border_flicker": border_flicker(video, starts),
                **timed,
            }
        )
        curves["psnr"].append(by_block(psnr, starts))
        curves["lpips"].append(by_block(lpips, starts))
        ratios = zip(by_block(sharpness, starts), by_block(wanted, starts), strict=True)
        curves["sharpness_ratio"].append([_ratio(*pair) for pair in ratios])
    means = {key: mean([figures[key] for figures in each]) for key in each[0]}
    by_block_means = {key: [mean(list(values)) for values in zip(*rows, strict=True)] for key, rows in curves.items()}
    return {"mean": means, "by_block": by_block_means, "samples": each}


def measure_clips(
    targets: list[torch.Tensor], prompts: list[str | FramePrompts], starts: list[int], judges: Judges
) -> dict[str, Any]:
    """Figures of the clips themselves, to compare with."""
    pairs = zip(targets, prompts, strict=True)
    scores = [judges.clip(target, prompt) for target, prompt in pairs] if judges.clip else []
    flicker = mean([border_flicker(target, starts) for target in targets])
    return {"mean": {"clip_score": mean(scores), "border_flicker": flicker}}


def _ratio(value: Any, of: Any) -> float:
    return float(value) / float(of) if float(of) > 0 else math.nan
