"""How good generated videos are, beside the videos of the same prompts: pure functions of pixels.

Likeness (PSNR, SSIM) asks for the very video; where a prompt leaves a choice, a good sample scores low. Sharpness,
motion and flicker do not: they compare amounts. Blur shows in sharpness alone: it raises PSNR.

Shapes: T = frames, height, width in pixels; videos are in [0, 1], `(T, 3, height, width)`.
"""

import itertools
from collections.abc import Sequence

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from causal_wan.geometry import WAN, LatentGeometry


LUMA = (0.299, 0.587, 0.114)
MAX_PSNR = 100.0  # dB, of equal frames


def frame_psnr(video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each frame in dB, at most 100, `(T,)`."""
    _check_alike(video, target)
    values = peak_signal_noise_ratio(video, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=MAX_PSNR)


def frame_ssim(video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each frame, 1 for equal ones, `(T,)`."""
    _check_alike(video, target)
    return structural_similarity_index_measure(video, target, data_range=1.0, reduction="none").reshape(len(video))


def frame_sharpness(video: torch.Tensor) -> torch.Tensor:
    """Energy of fine detail in each frame: the variance of the Laplacian of its brightness, `(T,)`.

    Compare videos by the ratio of their means: below 1 is softer than the target, above 1 is noisier.
    """
    luma = _luma(video)
    inner = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    return laplacian.flatten(1).var(dim=1)


def frame_changes(video: torch.Tensor) -> torch.Tensor:
    """Mean absolute change of brightness from each frame to the next, `(T - 1,)`: the amount of motion."""
    return _luma(video).diff(dim=0).abs().mean(dim=(1, 2))


def frame_jolts(video: torch.Tensor) -> torch.Tensor:
    """Mean absolute change of the change, `(T - 2,)`; entry t is about frame t + 1. Even motion has little."""
    return _luma(video).diff(n=2, dim=0).abs().mean(dim=(1, 2))


def border_flicker(video: torch.Tensor, block_starts: Sequence[int]) -> float:
    """How much more a video jolts where a block begins than inside blocks; 1 is no more.

    Args:
        video: `(T, 3, height, width)`.
        block_starts: First frame of each block; see `first_frames_of_blocks`.

    Returns:
        The ratio; nan of a video of one block, or without jolts inside of blocks.
    """
    jolts = frame_jolts(video)
    touches = torch.zeros(len(jolts), dtype=torch.bool)
    for start in block_starts:
        if start > 0:  # the two second differences that span the border
            touches[max(start - 2, 0) : start] = True
    if not touches.any() or touches.all() or jolts[~touches].mean() == 0:
        return float("nan")
    return float(jolts[touches].mean() / jolts[~touches].mean())


def first_frames_of_blocks(block_lengths: Sequence[int], geometry: LatentGeometry = WAN) -> list[int]:
    """First video frame of each block of latent frames: those of the blocks before it lie before it."""
    ends = itertools.accumulate(block_lengths, initial=0)
    return [geometry.num_frames(before) for before in [*ends][:-1]]


def by_block(values: torch.Tensor, block_starts: Sequence[int]) -> list[float]:
    """The mean of values by frame `(T,)` over each block: how quality drifts along a video."""
    ends = [*block_starts[1:], len(values)]
    return [float(values[start:end].mean()) for start, end in zip(block_starts, ends, strict=True)]


def _luma(video: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tchw,c->thw", video.float(), torch.tensor(LUMA, device=video.device))


def _check_alike(video: torch.Tensor, target: torch.Tensor) -> None:
    if video.shape != target.shape:
        raise ValueError(
            f"videos must have the same frames and size to be compared, got {tuple(video.shape)} and "
            f"{tuple(target.shape)}; sample with the settings of the target."
        )
