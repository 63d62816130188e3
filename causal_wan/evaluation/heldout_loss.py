"""The loss of a student on held-out clips, level by level, with the draws of training's own validation.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, K = levels of a step list
or bins of continuous ones.
"""

from collections.abc import Sequence
from typing import Any

import torch

from causal_wan.data.clips import normalize_videos
from causal_wan.flow import latents_from_velocity
from causal_wan.methods.losses import NUM_STATISTICS, level_metrics, level_statistics
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.vae import encode_videos
from causal_wan.progress import show_progress
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.prompt_changes import embed_frame_prompts
from causal_wan.tables.prompt_schedules import FramePrompts


@torch.no_grad()
def heldout_statistics(
    pipeline: CausalWanPipeline,
    clips: Sequence[tuple[torch.Tensor, int]],
    prompts: Sequence[str | FramePrompts],
    method: RegressionConfig,
    *,
    seed: int,
    max_sequence_length: int,
) -> torch.Tensor:
    """Noises the clips block by block, has the student predict them, and sums its errors; see `level_statistics`.

    Args:
        pipeline: The student with its VAE and text encoder.
        clips: uint8 videos `(3, T, height, width)`, and their frames before padding.
        prompts: One a clip, or that of each of its frames.
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
    pairs = show_progress(zip(clips, prompts, strict=True), total=len(clips), desc="held-out loss")
    for number, ((clip, num_valid), prompt) in enumerate(pairs):
        latents = encode_videos(pipeline.vae, normalize_videos(clip[None].to(device)))
        noisy = draw_noisy_batch(
            latents,
            method,
            transformer.block_lengths(latents.shape[2]),
            seed=seed,
            sample_numbers=[number],
            num_valid_frames=[geometry.num_latent_frames(num_valid)],
        )
        conditions = embed_frame_prompts(pipeline, prompt, latents.shape[2], max_sequence_length).to(device, dtype)
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
