"""Adversarial losses: a discriminator tells real clips from a student's, and the student learns what it goes by.

Shapes: B = batch, F = latent frames. A logit is one answer for a latent frame: above 0 is real.

Source: the saturating-free loss of Goodfellow et al., arXiv 1406.2661, section 3, on noised clips as in DMD2,
arXiv 2405.14867, section 4.3; the penalty is R1, arXiv 1801.04406, by a finite difference.
"""

import torch
from torch.nn.functional import softplus


def student_losses(logits: torch.Tensor) -> torch.Tensor:
    """-log of the probability that each frame of the student's is real, `(B, F)`."""
    return softplus(-logits)


def discriminator_losses(
    real: torch.Tensor, drawn: torch.Tensor, is_real: torch.Tensor, perturbed: torch.Tensor, penalty: float
) -> torch.Tensor:
    """-log of the probability of the right answers, and how much that to real frames changes with a little noise.

    Args:
        real: Logits of real clips, `(B, F)`.
        drawn: Logits of the student's, same shape.
        is_real: Which frames of real clips are no padding, bool, same shape; others count as nothing.
        perturbed: Logits of real clips with a little more noise, same shape.
        penalty: Weight of the squared change.

    Returns:
        `(B, F)`.
    """
    of_real = softplus(-real) + penalty * (real - perturbed).square()
    return torch.where(is_real, of_real, 0.0) + softplus(drawn)


def ramp(step: int, num_steps: int) -> float:
    """Share of its weight that the student's loss has after `step` steps: 0 for `num_steps`, whole after as many more.

    A discriminator that knows nothing yet leads nowhere.
    """
    return 1.0 if num_steps == 0 else min(max(step / num_steps - 1, 0.0), 1.0)
