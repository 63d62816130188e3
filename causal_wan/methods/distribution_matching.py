"""Distribution matching distillation: what pulls a student's clips towards the clips of a teacher.

Two score networks look at the same noised clip: the teacher knows the wanted distribution, the critic the student's.
Where their clean predictions differ, the student moves from the critic's towards the teacher's.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width.

Source: DMD, arXiv 2311.18828, section 3; DMD2, arXiv 2405.14867; on rollouts of a causal student Self Forcing,
arXiv 2506.08009, section 3.3.
"""

from collections.abc import Sequence

import torch

from causal_wan.flow import shift_timesteps
from causal_wan.methods.matching_settings import MatchingConfig
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.timesteps import NUM_TRAIN_TIMESTEPS


MIN_NORMALIZER = 1e-6


@torch.no_grad()
def matching_direction(
    latents: torch.Tensor, critic_latents: torch.Tensor, teacher_latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """g = D_critic - D_teacher, and n = mean |x - D_teacher| of each clip.

    Up to the factor (1 - sigma) / sigma^2, g is the difference of the two scores: the gradient of the Kullback-Leibler
    divergence of the student's noised clips from the teacher's.

    Args:
        latents: x, what the student drew, `(B, C, F, H, W)`.
        critic_latents: Clean latents that the critic predicts from x noised, same shape.
        teacher_latents: The teacher's, same shape.

    Returns:
        g, same shape, and n, `(B, 1, 1, 1, 1)`, both float64.

    Source: DMD, arXiv 2311.18828, equations 7 and 8.
    """
    teacher_latents = teacher_latents.double()
    normalizer = (latents.double() - teacher_latents).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return critic_latents.double() - teacher_latents, normalizer.clamp(min=MIN_NORMALIZER)


def distribution_matching_losses(
    latents: torch.Tensor, direction: torch.Tensor, normalizer: torch.Tensor
) -> torch.Tensor:
    """½ (x - stopgrad(x - g / n))^2, the mean of each latent frame: its gradient with respect to x is g / n.

    The value says nothing about how far the student is: it stays near constant by construction.

    Args:
        latents: x, `(B, C, F, H, W)`; a gradient goes to it alone.
        direction: g, of `matching_direction`.
        normalizer: n.

    Returns:
        `(B, F)`, float64; their mean has the gradient g / (n numel).
    """
    target = latents.detach().double() - direction / normalizer
    return 0.5 * (latents.double() - target).square().mean(dim=(1, 3, 4))


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: u + scale (c - u). A scale of w + 1 adds w (c - u) to the conditional."""
    return unconditional + guidance_scale * (conditional - unconditional)


def draw_scored(
    latent_shape: Sequence[int],
    config: MatchingConfig,
    *,
    seed: int,
    purpose: RandomPurpose,
    sample_numbers: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and timesteps at which score networks look at clips; a function of seed, purpose and sample number.

    Args:
        latent_shape: (C, F, H, W).
        config: The range of timesteps, and their shift.
        seed: Of the run.
        purpose: Whose draws they are.
        sample_numbers: One a clip, in the run.

    Returns:
        Standard normal noise `(B, C, F, H, W)`, and timesteps `(B,)`, one a clip: uniform, shifted, then clamped.
    """
    noise, timesteps = [], []
    for number in sample_numbers:
        generator = seeded_generator(seed, purpose, number)
        timesteps.append(NUM_TRAIN_TIMESTEPS * torch.rand((), generator=generator))
        noise.append(torch.randn(*latent_shape, generator=generator))
    shifted = shift_timesteps(torch.stack(timesteps), config.matching_timestep_shift)
    low, high = config.matching_timesteps
    return torch.stack(noise), shifted.clamp(low, high).float()


def draw_uses_clip(
    probability: float, *, seed: int, sample_numbers: Sequence[int], are_whole: Sequence[bool]
) -> torch.Tensor:
    """Which samples have the teacher look at the real clip in the place of the student's, bool `(B,)`.

    A clip that is padded is none to learn from: its last frames stand still.

    Source: data forcing, arXiv 2606.18478.
    """
    draws = [
        torch.rand((), generator=seeded_generator(seed, RandomPurpose.REAL_CLIP, number)) for number in sample_numbers
    ]
    return torch.stack(draws).lt(probability) & torch.tensor(list(are_whole))


def draw_exit(num_steps: int, *, seed: int, step: int) -> int:
    """At which of its sampling steps a rollout ends, from 0 on: uniform, and the same in all passes of a step."""
    return int(torch.randint(num_steps, (), generator=seeded_generator(seed, RandomPurpose.EXIT, step)))


def takes_student_turn(step: int, config: MatchingConfig) -> bool:
    """Whether the student is updated in the step after `step` that are done: after the warm-up, every so often."""
    return step >= config.critic_warmup_steps and (step - config.critic_warmup_steps) % config.student_every == 0
