"""Loss formulas, weights by level and the statistics that explain them. Pure functions, computed in float32.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, K = levels of a step list
or bins of continuous ones.
"""

import math

import torch
import torch.nn.functional as F

from causal_wan.config.choices import LossSpace, LossType, LossWeighting
from causal_wan.flow import shift_timesteps, sigmas_from_timesteps
from causal_wan.timesteps import NUM_TRAIN_TIMESTEPS


# Columns of the per-level statistics: sums over elements.
NUM_STATISTICS = 6


def frame_losses(predicted: torch.Tensor, target: torch.Tensor, loss_type: LossType = "mse") -> torch.Tensor:
    """Mean error of each latent frame.

    Args:
        predicted: `(B, C, F, H, W)`, latents or velocity.
        target: Same shape.
        loss_type: mse = (p - t)^2, l1 = |p - t|, huber = 0.5 (p - t)^2 where |p - t| < 1, else |p - t| - 0.5.

    Returns:
        `(B, F)`, float32.
    """
    elementwise = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[loss_type]
    return elementwise(predicted.float(), target.float(), reduction="none").mean(dim=(1, 3, 4))


def bell_weights(sigmas: torch.Tensor, timestep_shift: float = 1.0) -> torch.Tensor:
    """(b(sigma) - b(1)) / mean with b(sigma) = exp(-2 (sigma - 1/2)^2): most for the middle levels, 0 for pure noise.

    The mean is that of the numerator over the 1000 timesteps of the shifted table, so that the weights of levels drawn
    uniformly with that shift have mean 1. Without a shift it is sqrt(pi / 2) erf(1 / sqrt(2)) - exp(-1/2) = 0.2491.
    In the lineage they weigh the squared error of the velocity.

    Args:
        sigmas: In [0, 1], any shape.
        timestep_shift: Of the table.

    Returns:
        Same shape, float32, >= 0.

    Source: the training weight of WAN's flow matching in CausVid and Self Forcing, arXiv 2506.08009 (released code).
    """

    def numerator(levels: torch.Tensor) -> torch.Tensor:
        return torch.exp(-2 * (levels - 0.5).square()) - math.exp(-0.5)

    timesteps = torch.arange(NUM_TRAIN_TIMESTEPS, 0, -1, device=sigmas.device)
    table = sigmas_from_timesteps(shift_timesteps(timesteps, timestep_shift))
    return numerator(sigmas) / numerator(table).mean()


def min_snr_weights(sigmas: torch.Tensor, snr_gamma: float = 5.0) -> torch.Tensor:
    """min(SNR, gamma) with SNR = ((1 - sigma) / sigma)^2, for the error of predicted *latents*; 0 for pure noise.

    Args:
        sigmas: In [0, 1], any shape.
        snr_gamma: gamma > 0.

    Returns:
        Same shape, in [0, gamma].

    Source: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556, section 3.4.
    """
    return ((1 - sigmas) / sigmas).square().clamp(max=snr_gamma)  # sigma 0 has SNR infinity: gamma


def level_weights(
    sigmas: torch.Tensor,
    loss_weighting: LossWeighting,
    *,
    loss_space: LossSpace,
    timestep_shift: float = 1.0,
    snr_gamma: float = 5.0,
    min_loss_weight: float = 0.0,
) -> torch.Tensor:
    """What the error of a frame at a level is multiplied by.

    The errors of the two spaces differ by themselves: mse of latents = sigma^2 mse of velocity. Then

        none      1 in either space: mse of velocity weighs a level by 1 / sigma^2 against mse of latents
        bell      max(bell_weights, min_loss_weight) in either space: of velocity, with a minimum of 0, the lineage's
        min_snr   w = max(min_snr_weights, min_loss_weight) for latents, sigma^2 w for velocity: of mse the same loss

    Args:
        sigmas: In [0, 1], any shape.
        loss_weighting: Which weights.
        loss_space: What the error is of.
        timestep_shift: For bell, see there.
        snr_gamma: For min_snr, see there.
        min_loss_weight: No level has less (for min_snr, of latents): both are 0 for pure noise, from which sampling
            starts.

    Returns:
        Same shape, float32.
    """
    if loss_weighting == "none":
        return torch.ones_like(sigmas)
    if loss_weighting == "bell":
        return bell_weights(sigmas, timestep_shift).clamp(min=min_loss_weight)
    of_latents = min_snr_weights(sigmas, snr_gamma).clamp(min=min_loss_weight)
    return of_latents if loss_space == "latents" else sigmas.square() * of_latents


def masked_sum_over_count(values: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """sum(values where mask) / count.

    `count` is the number of kept elements of the *whole* optimizer step, over all processes and accumulated batches:
    then the sum over them is the plain mean over kept elements, whatever the split.

    Args:
        values: Any shape.
        mask: Same shape, bool.
        count: Scalar, > 0.
    """
    return torch.where(mask, values, 0.0).sum() / count


def level_statistics(
    predicted: torch.Tensor,
    target: torch.Tensor,
    level_indices: torch.Tensor,
    mask: torch.Tensor,
    num_levels: int,
) -> torch.Tensor:
    """Sums from which `level_metrics` tells, level by level, how far a student is.

    Sums of two calls add up to the sums of the two batches together, so they may be accumulated over steps and reduced
    over processes without ever averaging averages.

    Args:
        predicted: Predicted latents `(B, C, F, H, W)`.
        target: Clean latents, same shape.
        level_indices: Index of each frame's level in the step list, or of its bin, `(B, F)`, int64.
        mask: Frames that count, `(B, F)`, bool.
        num_levels: K.

    Returns:
        `(K, 6)` float64: count, sum (p - t)^2, sum p, sum p^2, sum t, sum t^2 over the elements of each level.
    """
    predicted, target = predicted.detach().double(), target.detach().double()
    per_frame = torch.stack(
        [
            torch.ones_like(target),
            (predicted - target).square(),
            predicted,
            predicted.square(),
            target,
            target.square(),
        ]
    ).sum(dim=(2, 4, 5))  # (6, B, F)
    per_frame = torch.where(mask, per_frame, 0.0).flatten(1).T  # (B F, 6)
    sums = per_frame.new_zeros(num_levels, NUM_STATISTICS)
    return sums.index_add_(0, level_indices.flatten(), per_frame)


def level_metrics(sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """Reads the sums of `level_statistics`.

    blur_gap = (Var(target) - Var(prediction) - MSE) / Var(target). At the optimum of a squared error the prediction is
    the conditional mean, and Var(target) = Var(prediction) + MSE (law of total variance). A gap away from 0 says that
    this level is still learning; near 0, with a loss that no longer falls, that more training will not sharpen it.
    Near 0 alone is not enough: a mean over more than the input leaves open has no gap either.

    Args:
        sums: `(..., 6)`, any leading shape, e.g. `(K, 6)`, or `(6,)` for all levels together.

    Returns:
        mse, predicted_mean, predicted_std, target_mean, target_std, blur_gap, count: each of the leading shape. NaN
        where count is 0.
    """
    count, squared_error, p, p2, t, t2 = sums.unbind(-1)
    mse = squared_error / count
    predicted_mean, target_mean = p / count, t / count
    predicted_var = p2 / count - predicted_mean.square()
    target_var = t2 / count - target_mean.square()
    return {
        "mse": mse,
        "predicted_mean": predicted_mean,
        "predicted_std": predicted_var.clamp(min=0).sqrt(),
        "target_mean": target_mean,
        "target_std": target_var.clamp(min=0).sqrt(),
        "blur_gap": (target_var - predicted_var - mse) / target_var,
        "count": count,
    }
