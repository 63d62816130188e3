"""Trajectories of a teacher: the ODE of its flow, solved in many steps, and what a student sees of it.

A bidirectional teacher solves a clip at once. A causal one solves block after block, each with the clean blocks before
it in the key/value cache: what a student that streams will have, too.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, N = steps, K = latents that
are kept, the clean end included, L = entries of the student's step list, S = prompt tokens, D = text dimension.

Source: CausVid, arXiv 2412.07772, section 4.3; of a causal teacher, Causal Forcing, arXiv 2602.02214.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from causal_wan.basics import NUM_TRAIN_TIMESTEPS
from causal_wan.devices import to_device
from causal_wan.flow import broadcast_over_latents, inference_timesteps, sigmas_from_timesteps, velocity_from_latents
from causal_wan.methods.noising import NoisyBatch, draw_context, draw_level_indices, sample_generator
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.rollout import Rollout


def trajectory_timesteps(levels: torch.Tensor, num_inference_steps: int, timestep_shift: float) -> torch.Tensor:
    """The timesteps that a teacher is sampled at: an even grid, shifted towards noise, with the levels in it exactly.

    The entries of `causal_wan.flow.inference_timesteps` that are nearest to the levels are replaced by them.

    Args:
        levels: Timesteps to be kept, falling, in (0, 1000], float32 `(K - 1,)`.
        num_inference_steps: N.
        timestep_shift: > 0; 1 shifts nothing.

    Returns:
        Falling from 1000, float32 `(N,)`; the last step goes to 0.

    Raises:
        ValueError: If there are too few steps for two levels to have one each.
    """
    grid = inference_timesteps(num_inference_steps, timestep_shift)
    inner = levels[levels < NUM_TRAIN_TIMESTEPS]
    nearest = [int((grid[1:] - level).abs().argmin()) + 1 for level in inner] if num_inference_steps > 1 else []
    if len(set(nearest)) < len(inner):
        raise ValueError(
            "num_inference_steps must be enough for each level of denoising_step_list to be a step of its own, got "
            f"{num_inference_steps} with timestep_shift {timestep_shift:g} for {levels.tolist()}; use more."
        )
    grid[nearest] = inner
    return grid


def sample_trajectories(
    transformer: CausalWanTransformer3DModel,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timesteps: torch.Tensor,
    levels: torch.Tensor,
    *,
    progress: tqdm | None = None,
    **guidance: Any,
) -> torch.Tensor:
    """Trajectories of a teacher by Euler's method; a function of its inputs alone.

    Args:
        transformer: The teacher. If it has blocks, it is sampled block by block, each after the clean ones before it.
        noise: `(B, C, F, H, W)`, standard normal.
        prompt_embeds: `(B, S, D)`.
        timesteps: From `trajectory_timesteps`, `(N,)`.
        levels: Those to be kept, `(K - 1,)`.
        progress: Updated at each step of each block.
        guidance: `negative_prompt_embeds` and `guidance_scale` of `causal_wan.sampling.rollout.Rollout`.

    Returns:
        Noisy latents at each level, from noise to data, and the clean end, `(B, K, C, F, H, W)`, float32.

    Raises:
        ValueError: If F does not divide into blocks.
    """
    steps, kept = timesteps.tolist(), {level: [] for level in levels.tolist()}
    starts_at_noise = steps[0] in kept

    def keep(rollout: Rollout, number: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        following = number % len(steps) + 1  # steps are counted over all blocks
        if following < len(steps) and steps[following] in kept:
            kept[steps[following]].append(latents)
        if progress is not None:
            progress.update()
        return latents

    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CausalWanPipeline(**parts, transformer=transformer)
    end = pipeline.sample_latents(prompt_embeds, noise[None], steps, sampler="euler", on_step_end=keep, **guidance)
    inner = [torch.cat(blocks, dim=2) for blocks in kept.values() if blocks]
    return torch.stack([*([noise.float()] if starts_at_noise else []), *inner, end], dim=1)


def take_noisy_batch(
    trajectories: torch.Tensor,
    latents: torch.Tensor,
    method: RegressionConfig,
    block_lengths: Sequence[int],
    *,
    seed: int,
    sample_numbers: Sequence[int],
) -> NoisyBatch:
    """Each block as it is at the level that is drawn for it, on its way to the end of its trajectory.

    The draws of levels are those of `causal_wan.methods.noising.draw_noisy_batch` for the same seed, numbers and step
    list.
    `noise` is what one would have to add to the end to get the noisy latents.

    Args:
        trajectories: At each entry of the step list, `(B, L, C, F, H, W)`.
        latents: Their ends, `(B, C, F, H, W)`.
        method: Says how levels are drawn, and what the context is.
        block_lengths: Latent frames of each block.
        seed: Of the run.
        sample_numbers: Number of each sample in the run, B of them.
    """
    generators = [sample_generator(seed, number) for number in sample_numbers]
    levels, num_frames = method.levels(), latents.shape[2]
    indices = torch.stack([draw_level_indices(each, levels, block_lengths, num_frames) for each in generators])
    context_latents, context_timesteps = draw_context(latents, method, generators)
    timesteps, indices = (to_device(part, latents.device) for part in (levels[indices], indices))
    where = indices[:, None, None, :, None, None].expand(-1, 1, latents.shape[1], -1, *latents.shape[3:])
    noisy_latents, sigmas = trajectories.gather(1, where)[:, 0], sigmas_from_timesteps(timesteps)
    is_clean = broadcast_over_latents(sigmas == 0)
    velocity = velocity_from_latents(noisy_latents, latents, sigmas)
    return NoisyBatch(
        latents=latents,
        noise=latents + torch.where(is_clean, 0.0, velocity),
        noisy_latents=noisy_latents,
        level_indices=indices,
        timesteps=timesteps,
        sigmas=sigmas,
        mask=timesteps > 0,
        context_latents=context_latents,
        context_timesteps=context_timesteps,
    )
