"""How much ink a sketched clip has, and how well it matches another: ink F1, colour error, PSNR.

Functions take clips as (T, H, W, 3) uint8 arrays or tensors, prediction first. A white clip scores 17 to 20 dB
PSNR on sketches, so PSNR alone says little; a white clip's ink F1 is 0.
"""

import numpy as np
import torch
from torch.nn.functional import max_pool2d


INK_DARKNESS = 90
"""A pixel is ink where its darkest channel is at least this far below 255."""


def ink_mask(video: np.ndarray | torch.Tensor) -> torch.Tensor:  # (T, H, W) bool
    """Where pixels are clearly not white."""
    return torch.as_tensor(video).amin(dim=-1) <= 255 - INK_DARKNESS


def ink_amount(video: np.ndarray | torch.Tensor) -> torch.Tensor:  # (T,)
    """Mean darkness of each frame, in [0, 1], by the darkest channel of a pixel: blur changes nothing of it."""
    return 1 - torch.as_tensor(video).amin(dim=-1).float().mean(dim=(1, 2)) / 255


def ink_f1(
    prediction: np.ndarray | torch.Tensor, target: np.ndarray | torch.Tensor, tolerance: int = 1
) -> torch.Tensor:  # (T,)
    """F1 of the ink in each frame, in [0, 1].

    Precision is the share of predicted ink within `tolerance` pixels (a square neighbourhood) of target ink; recall is
    the share of target ink so near to predicted ink. Two frames without ink score 1, ink against no ink scores 0.
    """
    predicted_ink, target_ink = ink_mask(prediction), ink_mask(target)
    precision = _share_within(predicted_ink, target_ink, tolerance)
    recall = _share_within(target_ink, predicted_ink, tolerance)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-6)
    both_empty = ~predicted_ink.flatten(1).any(1) & ~target_ink.flatten(1).any(1)
    return torch.where(both_empty, torch.ones_like(f1), f1)


def mean_ink_f1(prediction: np.ndarray | torch.Tensor, target: np.ndarray | torch.Tensor, tolerance: int = 1) -> float:
    """Mean of `ink_f1` over the frames whose target has ink; NaN where no frame has."""
    has_ink = ink_mask(target).flatten(1).any(1)
    return ink_f1(prediction, target, tolerance)[has_ink].mean().item()


def colour_error(prediction: np.ndarray | torch.Tensor, target: np.ndarray | torch.Tensor) -> float:
    """Mean absolute difference of the two clips' mean ink colours, over RGB, in [0, 1], wherever the ink lies.

    A clip without ink counts as white.
    """
    return (_ink_colour(prediction) - _ink_colour(target)).abs().mean().item()


def psnr(prediction: np.ndarray | torch.Tensor, target: np.ndarray | torch.Tensor) -> float:
    """Peak signal-to-noise ratio of the whole clip in dB; infinite for equal clips."""
    error = torch.as_tensor(prediction).float() - torch.as_tensor(target).float()
    return (10 * torch.log10(255**2 / error.square().mean())).item()


def _share_within(ink: torch.Tensor, other: torch.Tensor, tolerance: int) -> torch.Tensor:
    """Share of each frame's `ink` with `other` ink within `tolerance`; 0 where there is none."""
    near = max_pool2d(other[:, None].float(), 2 * tolerance + 1, stride=1, padding=tolerance)[:, 0] > 0
    return (ink & near).flatten(1).sum(1) / ink.flatten(1).sum(1).clamp(min=1)


def _ink_colour(video: np.ndarray | torch.Tensor) -> torch.Tensor:  # (3,) in [0, 1]
    ink = torch.as_tensor(video)[ink_mask(video)].float()
    return ink.mean(dim=0) / 255 if len(ink) else torch.ones(3)
