"""Trajectories of a teacher: the ODE of its flow, solved in many steps.

A bidirectional teacher solves a clip at once. A causal one solves block after block, each with the clean blocks before
it in the key/value cache: what a student that streams will have, too.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, N = steps, K = latents that
are kept, the clean end included.

Source: CausVid, arXiv 2412.07772, section 4.3; of a causal teacher, Causal Forcing, arXiv 2602.02214.
"""

from typing import Any

import torch
from tqdm.auto import tqdm

from causal_wan.flow import inference_timesteps
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.rollout import Rollout, SamplingSchedule, roll_out
from causal_wan.timesteps import NUM_TRAIN_TIMESTEPS


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
    conditions: Conditions,
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
        conditions: What they are to show, B of them.
        timesteps: From `trajectory_timesteps`, `(N,)`.
        levels: Those to be kept, `(K - 1,)`.
        progress: Updated at each step of each block.
        guidance: `negative_conditions` and `guidance_scale` of `causal_wan.sampling.rollout.Rollout`.

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

    schedule = SamplingSchedule(timesteps=timesteps, sampler="euler")
    blocks = roll_out(transformer, conditions, noise[None], schedule, on_step_end=keep, **guidance)
    end = torch.cat(list(blocks), dim=2)
    inner = [torch.cat(of_level, dim=2) for of_level in kept.values() if of_level]
    return torch.stack([*([noise.float()] if starts_at_noise else []), *inner, end], dim=1)
