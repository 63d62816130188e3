"""Trajectories of a teacher: the ODE of its flow, solved from noise to data in many steps, and what is kept of it.

A bidirectional teacher solves a clip at once. A causal one solves block after block, each with the clean blocks before
it in the key/value cache: what a student that streams will have, too.

Shapes: B = batch, C = latent channels, F = latent frames, f = those of a block, H, W = latent height and width,
N = steps, K = latents that are kept, the clean end included, S = prompt tokens, D = text dimension.

Source: CausVid, arXiv 2412.07772, section 4.3; of a causal teacher, Causal Forcing, arXiv 2602.02214.
"""

import itertools
from collections.abc import Callable

import torch

from causal_wan.flow import NUM_TRAIN_TIMESTEPS, shift_timesteps
from causal_wan.rollout import Rollout
from causal_wan.transformer import CausalWanTransformer3DModel


def trajectory_timesteps(levels: torch.Tensor, num_inference_steps: int, timestep_shift: float) -> torch.Tensor:
    """The timesteps that a teacher is sampled at: an even grid, shifted towards noise, with the levels in it exactly.

    The entries of 1000 (1 - i / N) after the shift that are nearest to the levels are replaced by them.

    Args:
        levels: Timesteps to be kept, falling, in (0, 1000], float32 `(K - 1,)`.
        num_inference_steps: N.
        timestep_shift: > 0; 1 shifts nothing.

    Returns:
        Falling from 1000 to 0, float32 `(N + 1,)`.

    Raises:
        ValueError: If there are too few steps for two levels to have one each.
    """
    grid = shift_timesteps(
        NUM_TRAIN_TIMESTEPS * (1 - torch.arange(num_inference_steps + 1) / num_inference_steps), timestep_shift
    )
    inner = levels[levels < NUM_TRAIN_TIMESTEPS]
    nearest = [int((grid[1:-1] - level).abs().argmin()) + 1 for level in inner] if num_inference_steps > 1 else []
    if len(set(nearest)) < len(inner):
        raise ValueError(
            "num_inference_steps must be enough for each level of denoising_step_list to be a step of its own, got "
            f"{num_inference_steps} with timestep_shift {timestep_shift:g} for {levels.tolist()}; use more."
        )
    grid[nearest] = inner
    return grid


def solve(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    levels: torch.Tensor,
) -> torch.Tensor:
    """Follows a flow from noise to data by Euler's method, in float32.

    Args:
        predict: Latents and a timestep -> velocity, same shape.
        noise: `(B, C, f, H, W)`.
        timesteps: From `trajectory_timesteps`, `(N + 1,)`.
        levels: Those to be kept, `(K - 1,)`.

    Returns:
        Latents as they are at each level, and at the end, `(B, K, C, f, H, W)`.
    """
    latents, kept = noise.float(), []
    for timestep, following in itertools.pairwise(timesteps):
        if torch.isin(timestep, levels):
            kept.append(latents)
        velocity = predict(latents, timestep)
        latents = latents + (following - timestep) / NUM_TRAIN_TIMESTEPS * velocity.float()
    assert len(kept) == len(levels), (timesteps, levels)
    return torch.stack([*kept, latents], dim=1)


@torch.no_grad()
def sample_trajectories(
    transformer: CausalWanTransformer3DModel,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    timesteps: torch.Tensor,
    levels: torch.Tensor,
    *,
    negative_prompt_embeds: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """Trajectories of a teacher; a function of its inputs alone.

    Args:
        transformer: The teacher. If it has blocks, it is sampled block by block, each after the clean ones before it.
        noise: `(B, C, F, H, W)`, standard normal.
        prompt_embeds: `(B, S, D)`.
        timesteps: From `trajectory_timesteps`, `(N + 1,)`.
        levels: Those to be kept, `(K - 1,)`.
        negative_prompt_embeds: What guidance leads away from, `(B, S, D)`; None is no guidance.
        guidance_scale: Weight of the difference that the prompt makes.

    Returns:
        Noisy latents at each level, from noise to data, and the clean end, `(B, K, C, F, H, W)`, float32.

    Raises:
        ValueError: If F does not divide into blocks.
    """
    timesteps, levels = timesteps.to(noise.device), levels.to(noise.device)
    lengths = transformer.block_lengths(noise.shape[2])
    rollout = Rollout(transformer, timesteps, prompt_embeds, negative_prompt_embeds, guidance_scale)
    if len(lengths) > 1:
        rollout.cache = transformer.make_cache(
            noise.shape[0] * (1 + rollout.is_guided),
            *noise.shape[2:],
            device=noise.device,
            dtype=prompt_embeds.dtype,
        )
    blocks: list[torch.Tensor] = []
    start = 0
    for block_noise in noise.split(lengths, dim=2):

        def predict(latents: torch.Tensor, timestep: torch.Tensor, start: int = start) -> torch.Tensor:
            return rollout.predict(latents, timestep, start)

        blocks.append(solve(predict, block_noise, timesteps, levels))
        start += block_noise.shape[2]
        if start < noise.shape[2]:  # later blocks see this one clean
            rollout.predict(blocks[-1][:, -1], timesteps.new_zeros(()), start - block_noise.shape[2])
    return torch.cat(blocks, dim=3)
