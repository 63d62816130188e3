"""What a student sees of a teacher's trajectories: each block at the level that is drawn for it.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, K = latents that are
kept, the clean end included, L = entries of the student's step list.

Source: CausVid, arXiv 2412.07772, section 4.3."""

from collections.abc import Sequence

import torch

from causal_wan.devices import to_device
from causal_wan.flow import broadcast_over_latents, sigmas_from_timesteps, velocity_from_latents
from causal_wan.methods.noising import NoisyBatch, draw_context, draw_levels
from causal_wan.methods.settings import RegressionConfig
from causal_wan.seeds import noise_generator


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
    generators = [noise_generator(seed, number) for number in sample_numbers]
    drawn = [draw_levels(generator, method, block_lengths, latents.shape[2]) for generator in generators]
    drawn_timesteps, drawn_indices = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    timesteps, indices = (to_device(parts, latents.device) for parts in (drawn_timesteps, drawn_indices))
    context_latents, context_timesteps = draw_context(latents, method, generators)
    where = indices[:, None, None, :, None, None].expand(-1, 1, latents.shape[1], -1, *latents.shape[3:])
    sigmas = sigmas_from_timesteps(timesteps)
    is_clean = broadcast_over_latents(sigmas == 0)
    noisy_latents = torch.where(is_clean, latents, trajectories.gather(1, where)[:, 0])
    velocity = velocity_from_latents(noisy_latents, latents, sigmas)
    return NoisyBatch(
        latents=latents,
        noise=latents + torch.where(is_clean, 0.0, velocity),
        noisy_latents=noisy_latents,
        level_indices=indices,
        timesteps=timesteps,
        sigmas=sigmas,
        mask=timesteps > 0,
        learned_timesteps=drawn_timesteps,
        context_latents=context_latents,
        context_timesteps=context_timesteps,
    )
