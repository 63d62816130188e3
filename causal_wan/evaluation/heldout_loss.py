"""The loss of a student on held-out clips, level by level, with the draws of training's own validation.

Shapes: B = batch, C = latent channels, C' = those of controls, F = latent frames, H, W = latent height and width, T =
video frames, K = levels of a step list or bins of continuous ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan

from causal_wan.data.clips import load_videos, normalize_videos, shown_prompts
from causal_wan.data.rows import Row
from causal_wan.data.settings import DataConfig
from causal_wan.flow import latents_from_velocity
from causal_wan.methods.losses import NUM_STATISTICS, level_metrics, level_statistics
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.vae import encode_videos
from causal_wan.progress import show_progress
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.prompt_changes import embed_frame_prompts
from causal_wan.tables.prompt_schedules import FramePrompts


@dataclass(frozen=True, kw_only=True)
class HeldOutClip:
    """A clip that a student is measured on.

    Attributes:
        prompt: Of the clip, or that of each of its frames.
        video: uint8 `(3, T, height, width)`.
        controls: Videos that the student follows, like `video`, in the order of its controls.
        num_valid_frames: Video frames before padding.
    """

    prompt: str | FramePrompts
    video: torch.Tensor
    controls: list[torch.Tensor]
    num_valid_frames: int

    @classmethod
    def load(cls, row: Row, data: DataConfig) -> Self:
        """The clip of a row as validation shows it.

        Raises:
            ValueError, OSError, av.FFmpegError: If it does not decode.
        """
        (video, *controls), num_valid = load_videos(row, data.shape, data, torch.Generator())
        prompt = shown_prompts(row, data.shape, data, torch.Generator())[0]
        return cls(prompt=prompt, video=video, controls=controls, num_valid_frames=num_valid)

    def control_latents(self, vae: AutoencoderKLWan, device: torch.device) -> torch.Tensor | None:
        """Latents of the controls `(1, C', F, H, W)`; None if there are none."""
        if not self.controls:
            return None
        latents = [encode_videos(vae, normalize_videos(video[None].to(device))) for video in self.controls]
        return torch.cat(latents, dim=1)


@torch.no_grad()
def heldout_statistics(
    pipeline: CausalWanPipeline,
    clips: Sequence[HeldOutClip],
    method: RegressionConfig,
    *,
    seed: int,
    max_sequence_length: int,
) -> torch.Tensor:
    """Noises the clips block by block, has the student predict them, and sums its errors; see `level_statistics`.

    Args:
        pipeline: The student with its VAE and text encoder.
        clips: What it is measured on.
        method: Of the run: levels and context.
        seed: Of the run: with it, draws are those of the validation while training.
        max_sequence_length: Tokens that prompts are padded to.

    Returns:
        Sums, `(K, 6)`, float64, on the CPU.
    """
    transformer, geometry = pipeline.transformer, pipeline.geometry
    device, dtype = transformer.device, transformer.dtype
    num_levels = len(method.levels())
    sums = torch.zeros(num_levels, NUM_STATISTICS, dtype=torch.float64)
    for number, clip in enumerate(show_progress(clips, desc="held-out loss")):
        latents = encode_videos(pipeline.vae, normalize_videos(clip.video[None].to(device)))
        noisy = draw_noisy_batch(
            latents,
            method,
            transformer.block_lengths(latents.shape[2]),
            seed=seed,
            sample_numbers=[number],
            num_valid_frames=[geometry.num_latent_frames(clip.num_valid_frames)],
        )
        told = embed_frame_prompts(pipeline, clip.prompt, latents.shape[2], max_sequence_length).to(device, dtype)
        conditions = replace(told, control_latents=clip.control_latents(pipeline.vae, device))
        noisy_latents = noisy.noisy_latents.to(dtype)
        inputs = {**conditions.arguments(), **noisy.context}
        velocity = transformer(noisy_latents, noisy.timesteps, **inputs, return_dict=False)[0]
        predicted = latents_from_velocity(noisy.noisy_latents, velocity, noisy.sigmas)
        sums += level_statistics(predicted, latents, noisy.level_indices, noisy.mask, num_levels).cpu()
    return sums


def summarize_heldout_loss(
    statistics: torch.Tensor, levels: torch.Tensor, *, bin_width: float | None = None
) -> dict[str, Any]:
    """Figures of `heldout_statistics`.

    Args:
        statistics: Sums, `(K, 6)`.
        levels: Timesteps of the step list, or where bins begin, `(K,)`.
        bin_width: Of the bins; None is a step list.

    Returns:
        loss (mean squared error of predicted latents over all levels) and by_level: for each level above 0 its
        timestep (of a bin, where it begins), loss, blur_gap, pred_latent_std and target_latent_std; nan where the
        level was not drawn.
    """
    figures = level_metrics(statistics)
    by_level = [
        {
            "timestep": level,
            "loss": float(figures["mse"][index]),
            "blur_gap": float(figures["blur_gap"][index]),
            "pred_latent_std": float(figures["predicted_std"][index]),
            "target_latent_std": float(figures["target_std"][index]),
        }
        for index, level in enumerate(levels.tolist())
        if level > 0 or bin_width is not None
    ]
    return {"loss": float(level_metrics(statistics.sum(dim=0))["mse"]), "by_level": by_level}
