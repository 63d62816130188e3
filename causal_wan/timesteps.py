"""Timesteps as settings: their range, their shift, and what a step list and a shift may be. Imports no library."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal


NUM_TRAIN_TIMESTEPS = 1000
# From a level to the next: predict the clean latents and noise them again, or follow the flow's ODE.
Sampler = Literal["renoise", "euler"]


def check_denoising_step_list(denoising_step_list: Sequence[float]) -> None:
    """Checks that a step list can be trained on and sampled from.

    Raises:
        ValueError: If the list is empty, leaves [0, 1000], does not fall strictly, or has no entry above 0.
    """
    steps = list(denoising_step_list)
    if not steps or steps[0] <= 0:
        raise ValueError(f"denoising_step_list must begin with a timestep above 0, got {steps}; use 1000 757 522 0.")
    if any(not 0 <= step <= NUM_TRAIN_TIMESTEPS for step in steps):
        raise ValueError(f"denoising_step_list must lie in [0, 1000], got {steps}.")
    if any(after >= before for before, after in itertools.pairwise(steps)):
        raise ValueError(f"denoising_step_list must fall from noise to data, got {steps}; sort it and drop doubles.")


def check_timestep_shift(timestep_shift: float) -> None:
    """Checks that timesteps can be shifted by it.

    Raises:
        ValueError: If it is not above 0, or not finite.
    """
    if not 0 < timestep_shift < math.inf:
        raise ValueError(f"timestep_shift must be above 0 and finite, got {timestep_shift}; 1 shifts nothing.")


def shift_timestep(timestep: Any, shift: float) -> Any:
    """1000 k u / (1 + (k - 1) u) with u = timestep / 1000, k = shift: of a number, or of all numbers of a tensor."""
    u = timestep / NUM_TRAIN_TIMESTEPS
    return NUM_TRAIN_TIMESTEPS * shift * u / (1 + (shift - 1) * u)
