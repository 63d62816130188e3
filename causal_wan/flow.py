"""Flow matching: noise levels, noising, velocity <-> clean latents, step lists. Pure tensor functions.

Convention, the one of WAN and diffusers: sigma = 1 is noise, sigma = 0 is data, timestep = 1000 sigma exactly.

    noisy_latents = (1 - sigma) latents + sigma noise        velocity = noise - latents

Nothing here draws random numbers, knows a model or looks a level up in a table: a scheduler's table ends at sigma
0.005 to 0.008, so that a look-up leaks noise into blocks that are meant to be clean.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width.
"""

from collections.abc import Sequence

import torch

from causal_wan.timesteps import (
    NUM_TRAIN_TIMESTEPS,
    Sampler,
    check_denoising_step_list,
    check_timestep_shift,
    shift_timestep,
)


DEFAULT_TIMESTEP_SHIFT = 5.0  # of sampling in many steps: what WAN and Self Forcing use


def sigmas_from_timesteps(timesteps: torch.Tensor) -> torch.Tensor:
    """sigma = timestep / 1000, in float32.

    Args:
        timesteps: Any shape, values in [0, 1000].

    Returns:
        Same shape, float32, values in [0, 1]. Timestep 0 is sigma 0: exactly clean.
    """
    return timesteps.to(torch.float32) / NUM_TRAIN_TIMESTEPS


def broadcast_over_latents(per_frame: torch.Tensor) -> torch.Tensor:
    """Reshapes a value per sample `(B,)` or per frame `(B, F)` so that it broadcasts over `(B, C, F, H, W)`.

    Raises:
        ValueError: If the tensor has neither one nor two dimensions.
    """
    if per_frame.ndim == 1:
        return per_frame[:, None, None, None, None]
    if per_frame.ndim == 2:
        return per_frame[:, None, :, None, None]
    raise ValueError(f"levels must have shape (B,) or (B, F), got {tuple(per_frame.shape)}.")


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """(1 - sigma) latents + sigma noise.

    Args:
        latents: Clean latents, `(B, C, F, H, W)`.
        noise: Standard normal noise, same shape.
        sigmas: In [0, 1], `(B,)` or `(B, F)`.

    Returns:
        noisy_latents, same shape; equal to `latents` at sigma 0 and to `noise` at sigma 1.

    Source: Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747, optimal-transport path.
    """
    sigmas = broadcast_over_latents(sigmas)
    return (1 - sigmas) * latents + sigmas * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """noise - latents: the derivative of `add_noise` with respect to sigma, and what a WAN transformer predicts."""
    return noise - latents


def latents_from_velocity(noisy_latents: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """latents = noisy_latents - sigma velocity, in float32. Inverse of `velocity_from_latents`.

    Args:
        noisy_latents: `(B, C, F, H, W)`.
        velocity: Same shape.
        sigmas: In [0, 1], `(B,)` or `(B, F)`.

    Returns:
        Clean latents, same shape, float32.
    """
    return noisy_latents.float() - broadcast_over_latents(sigmas) * velocity.float()


def velocity_from_latents(noisy_latents: torch.Tensor, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """velocity = (noisy_latents - latents) / sigma, in float32. Inverse of `latents_from_velocity`.

    Args:
        noisy_latents: `(B, C, F, H, W)`.
        latents: Same shape.
        sigmas: In (0, 1], `(B,)` or `(B, F)`; at sigma 0 the velocity cannot be told and the result is not finite.
    """
    return (noisy_latents.float() - latents.float()) / broadcast_over_latents(sigmas)


def euler_step(
    noisy_latents: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor, next_sigmas: torch.Tensor
) -> torch.Tensor:
    """noisy_latents + (next_sigma - sigma) velocity, in float32: a step of the flow's ODE towards data.

    To next_sigma 0 it is `latents_from_velocity`.

    Args:
        noisy_latents: At sigma, `(B, C, F, H, W)`.
        velocity: Predicted there, same shape.
        sigmas: In (0, 1], `(B,)` or `(B, F)`.
        next_sigmas: Below sigmas, same shape.

    Returns:
        Latents at next_sigma, same shape, float32.

    Source: Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747; what diffusers'
    `FlowMatchEulerDiscreteScheduler` does, with exact sigmas.
    """
    return noisy_latents.float() + broadcast_over_latents(next_sigmas - sigmas) * velocity.float()


def shift_timesteps(timesteps: torch.Tensor, shift: float) -> torch.Tensor:
    """Warps timesteps towards noise: 1000 k u / (1 + (k - 1) u) with u = timestep / 1000, k = shift.

    The closed form of what CausVid and Self Forcing call `warp_denoising_step`, where it is a table look-up.
    With shift 5: 1000, 750, 500, 250 become 1000, 937.5, 833.3, 625. 0 and 1000 stay.

    Args:
        timesteps: In [0, 1000], any shape.
        shift: > 0; 1 changes nothing.

    Source: Esser et al., Scaling Rectified Flow Transformers, arXiv 2403.03206, section 5.3.2.
    """
    return shift_timestep(timesteps.to(torch.float64), shift).to(torch.float32)


def training_timesteps(
    denoising_step_list: Sequence[float], *, warp_denoising_step: bool = False, timestep_shift: float = 1.0
) -> torch.Tensor:
    """The levels a student is trained on, float32 `(num_levels,)`, from noise to data, a trailing 0 included."""
    check_denoising_step_list(denoising_step_list)
    timesteps = torch.tensor(list(denoising_step_list), dtype=torch.float32)
    return shift_timesteps(timesteps, timestep_shift) if warp_denoising_step else timesteps


def sampling_timesteps(
    denoising_step_list: Sequence[float], *, warp_denoising_step: bool = False, timestep_shift: float = 1.0
) -> torch.Tensor:
    """The levels a student is sampled at, float32 `(num_steps,)`: the training levels without a trailing 0."""
    timesteps = training_timesteps(
        denoising_step_list, warp_denoising_step=warp_denoising_step, timestep_shift=timestep_shift
    )
    return timesteps[timesteps > 0]


def inference_timesteps(num_inference_steps: int, timestep_shift: float) -> torch.Tensor:
    """The levels of sampling in many steps, float32 `(num_inference_steps,)`: 1000 (1 - i / N), shifted towards noise.

    With 50 steps and shift 8 the entries 36 and 44 are the 757 and 522 of CausVid's step list.

    Args:
        num_inference_steps: N, 1 or more.
        timestep_shift: > 0; 1 shifts nothing.

    Raises:
        ValueError: If one of them is not.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be 1 or more, got {num_inference_steps}; 50 is WAN's own.")
    check_timestep_shift(timestep_shift)
    evenly = NUM_TRAIN_TIMESTEPS * (1 - torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps)
    return shift_timesteps(evenly, timestep_shift)


def choose_sampling(
    own_timesteps: Sequence[float],
    own_sampler: Sampler,
    *,
    denoising_step_list: Sequence[float] | None = None,
    num_inference_steps: int | None = None,
    timestep_shift: float | None = None,
    sampler: Sampler | None = None,
) -> tuple[list[float], Sampler]:
    """The timesteps and the sampler to use, of what is asked for and what a student has of its own.

    Args:
        own_timesteps: For when neither a list nor a number of steps is given.
        own_sampler: Likewise.
        denoising_step_list: Timesteps that fall from noise to data.
        num_inference_steps: See `inference_timesteps`.
        timestep_shift: Of these steps; None is 5.
        sampler: None is renoise with a list, and euler with a number of steps.

    Raises:
        ValueError: If they do not go together.
    """
    if denoising_step_list is not None and num_inference_steps is not None:
        raise ValueError(
            "denoising_step_list names the timesteps that num_inference_steps would lay out, got both; give one."
        )
    if timestep_shift is not None and num_inference_steps is None:
        raise ValueError("timestep_shift shifts the steps of num_inference_steps; give both, or neither.")
    if denoising_step_list is not None:
        return list(denoising_step_list), sampler or "renoise"
    if num_inference_steps is not None:
        shift = DEFAULT_TIMESTEP_SHIFT if timestep_shift is None else timestep_shift
        return inference_timesteps(num_inference_steps, shift).tolist(), sampler or "euler"
    return list(own_timesteps), sampler or own_sampler


def per_frame(per_block: torch.Tensor, block_lengths: Sequence[int]) -> torch.Tensor:
    """Repeats a value per block `(B, num_blocks)` over the block's frames: `(B, F)`."""
    return per_block.repeat_interleave(torch.tensor(block_lengths, device=per_block.device), dim=1)
