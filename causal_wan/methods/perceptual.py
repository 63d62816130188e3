"""A perceptual distance: of features that the VAE's decoder has of predicted and of clean latents, in a random crop.

A squared error of latents weighs each of their numbers alike; the decoder does not. Few frames of a clip are compared,
the less noisy ones alone, and each stands for others: decoding whole clips would take far more memory than training.

Everything random about a sample is a function of (seed, sample number), as in `causal_wan.methods.noising`.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width; N = samples that are
compared, f, h, w = the size of their crops; of a depth of the decoder D = channels, k = frames of each latent frame,
y, x = height and width.

Source: Berrada et al., Boosting Latent Diffusion with Perceptual Objectives, arXiv 2411.04873, section 3, and its
released code, for outliers. Channels are normalised in another way, see `relative_errors`; crops are of our own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from causal_wan.flow import broadcast_over_latents
from causal_wan.methods.noising import NoisyBatch
from causal_wan.seeds import RandomPurpose, seeded_generator


MAX_CROP = (3, 32, 32)  # latent frames, the first of which is context alone, and latent pixels
OUTLIER_QUANTILE = 0.02
OUTLIER_MARGIN = 2  # standard deviations
SMALLEST_SCALE = 1e-6


@dataclass(frozen=True)
class Crop:
    """Where a sample is compared.

    Attributes:
        sample: Number in its batch.
        frames, rows, columns: Of its latents.
        weight: How many frames each of those that are compared stands for.
    """

    sample: int
    frames: slice
    rows: slice
    columns: slice
    weight: float

    def of(self, latents: torch.Tensor) -> torch.Tensor:
        """The crop `(C, f, h, w)` of a batch of latents `(B, C, F, H, W)`."""
        return latents[self.sample, :, self.frames, self.rows, self.columns]


@dataclass(frozen=True)
class Comparison:
    """What of a batch is compared, and by what.

    Attributes:
        crops: Of the samples that have a frame to compare.
        max_timestep: Of the frames that are compared.
        features: Latents `(N, C, f, h, w)` -> features of some depths, `(N, D, (f - 1) k, y, x)` each, of all frames
            but the first.
    """

    crops: list[Crop]
    max_timestep: float
    features: Callable[[torch.Tensor], list[torch.Tensor]]


def draw_crops(noisy: NoisyBatch, *, seed: int, sample_numbers: Sequence[int], max_timestep: float) -> list[Crop]:
    """A crop of each sample that has a frame to compare.

    Args:
        noisy: A batch.
        seed: Of the run.
        sample_numbers: Number of each sample in the run, B of them.
        max_timestep: Of the frames that are compared.
    """
    crops = []
    for sample, (number, timesteps) in enumerate(zip(sample_numbers, noisy.learned_timesteps, strict=True)):
        is_compared = ((timesteps > 0) & (timesteps <= max_timestep)).tolist()
        if any(is_compared[1:]):
            generator = seeded_generator(seed, RandomPurpose.CROP, number)
            crops.append(draw_crop(generator, sample, is_compared, noisy.latents.shape[2:]))
    return crops


def draw_crop(
    generator: torch.Generator, sample: int, is_compared: Sequence[bool], shape: tuple[int, int, int]
) -> Crop:
    """A crop around one of the frames to compare, drawn uniformly, at a place that is drawn uniformly.

    Args:
        generator: Source of randomness.
        sample: Number in its batch.
        is_compared: Of each latent frame, whether it is to be compared; of the first it does not matter.
        shape: (F, H, W) of the latents.
    """

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    num_frames, *size = (min(most, length) for most, length in zip(MAX_CROP, shape, strict=True))
    candidates = [frame for frame in range(1, shape[0]) if is_compared[frame]]
    chosen = candidates[draw(len(candidates))]
    first = min(max(chosen - 1 - draw(num_frames - 1), 0), shape[0] - num_frames)
    num_compared = sum(is_compared[first + 1 : first + num_frames])
    top, left = (draw(length - cropped + 1) for length, cropped in zip(shape[1:], size, strict=True))
    return Crop(
        sample=sample,
        frames=slice(first, first + num_frames),
        rows=slice(top, top + size[0]),
        columns=slice(left, left + size[1]),
        weight=len(candidates) / num_compared,
    )


def perceptual_sum(
    comparison: Comparison | None, noisy: NoisyBatch, predicted_latents: torch.Tensor
) -> tuple[torch.Tensor | float, dict[str, torch.Tensor]]:
    """The distance of predicted from clean latents, summed over all frames with little noise, of which some are drawn.

    Divided by the number of frames that the loss is over, it is a mean in which frames of more noise count as 0. Those
    are clean where they are context of others: nothing is learned from them, nor from what lies outside of the crops.

    Args:
        comparison: None compares nothing.
        noisy: The batch.
        predicted_latents: `(B, C, F, H, W)`.

    Returns:
        The sum, a scalar. For the log, the sum over the frames that were drawn and their number, float64 `(2,)`, by
        name; nothing if nothing is compared.
    """
    if comparison is None:
        return 0.0, {}
    crops = comparison.crops
    if not crops:
        return 0.0, {"perceptual": predicted_latents.new_zeros(2, dtype=torch.float64)}
    target = torch.stack([crop.of(noisy.latents) for crop in crops])
    is_low = noisy.mask & (noisy.timesteps <= comparison.max_timestep)
    is_compared = torch.stack([is_low[crop.sample, crop.frames] for crop in crops])  # (N, f)
    predicted = torch.stack([crop.of(predicted_latents) for crop in crops])
    predicted = torch.where(broadcast_over_latents(is_compared), predicted, target)
    with torch.no_grad():
        target_features = comparison.features(target)
    distances = feature_distances(comparison.features(predicted), target_features)
    distances = torch.where(is_compared[:, 1:], distances, 0.0)
    total = sum(crop.weight * of_frames.sum() for crop, of_frames in zip(crops, distances, strict=True))
    logged = torch.stack([distances.detach().double().sum(), is_compared[:, 1:].double().sum()])
    return total, {"perceptual": logged}


def feature_distances(predicted: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_l 2^-l d_l / sum_l 2^-l over the depths l of a decoder, with d_l = `relative_errors`.

    Args:
        predicted: Features, from the first depth on, `(N, D, (f - 1) k, y, x)` each; k is 1 at the first.
        target: Same shapes.

    Returns:
        `(N, f - 1)`, float32, >= 0; 0 for equal features.
    """
    num_frames = target[0].shape[2]
    weights = [2.0**-depth for depth in range(len(target))]
    errors = [relative_errors(p, t, num_frames) for p, t in zip(predicted, target, strict=True)]
    return sum(weight * error for weight, error in zip(weights, errors, strict=True)) / sum(weights)


def relative_errors(predicted: torch.Tensor, target: torch.Tensor, num_frames: int) -> torch.Tensor:
    """(p - t)^2 / max(m, median of m over the channels), averaged over a latent frame, m the mean of t^2 in a channel.

    Both are divided by what the target has: each by its own, features of a wrong size would be no error. So no channel
    counts much for being large; nor for being next to 0. Divided by the norm over the channels at a place, as in the
    released code, or by a variance, an error explodes where a picture is flat. Outliers of the target are left out of
    the error and of m.

    Args:
        predicted: Features of one depth, `(N, D, num_frames k, y, x)`.
        target: Same shape.
        num_frames: Latent frames.

    Returns:
        `(N, num_frames)`, float32.
    """
    predicted, target = predicted.float(), target.float()
    kept = ~find_outliers(target)
    in_channels = (2, 3, 4)
    squares = torch.where(kept, target, 0.0).square().sum(dim=in_channels, keepdim=True)
    means = squares / kept.sum(dim=in_channels, keepdim=True).clamp(min=1)  # (N, D, 1, 1, 1)
    scales = torch.maximum(means, means.median(dim=1, keepdim=True).values).clamp(min=SMALLEST_SCALE)
    errors = torch.where(kept, (predicted - target).square() / scales, 0.0)
    of_frames, counts = (each.unflatten(2, (num_frames, -1)).sum(dim=(1, 3, 4, 5)) for each in (errors, kept))
    return of_frames / counts.clamp(min=1)


def find_outliers(features: torch.Tensor) -> torch.Tensor:
    """Which elements lie far from most of their channel and frame, with their neighbours in it.

    Far is more than two standard deviations outside of what is between the 2 % and the 98 % quantile: decoders have a
    few places of very large numbers, which mean nothing to the eye.

    Args:
        features: `(N, D, T, y, x)`.

    Returns:
        Same shape, bool.
    """
    maps = features.detach().flatten(-2)
    num_extreme = int(OUTLIER_QUANTILE * maps.shape[-1])
    margin = OUTLIER_MARGIN * maps.std(dim=-1, correction=0)
    low, high = (maps.kthvalue(place, dim=-1).values for place in (1 + num_extreme, maps.shape[-1] - num_extreme))
    least, most = (bound[..., None, None] for bound in (low - margin, high + margin))
    is_far = (features < least) | (features > most)
    return F.max_pool3d(is_far.float(), kernel_size=(1, 3, 3), stride=1, padding=(0, 1, 1)) > 0
