"""Names, sizes and checks that settings and tensors share. Imports no library, so that settings are read at once."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal


NUM_TRAIN_TIMESTEPS = 1000
FRAME_RATE = 16  # frames a second of WAN's videos

# From a level to the next: predict the clean latents and noise them again, or follow the flow's ODE.
Sampler = Literal["renoise", "euler"]
LossType = Literal["mse", "l1", "huber"]
LossSpace = Literal["latents", "velocity"]
LossWeighting = Literal["none", "bell", "min_snr"]
LpipsNet = Literal["alex", "vgg", "squeeze"]
LoraNames = Literal["diffusers", "original", "comfyui", "kohya"]
MAX_VBENCH_SAMPLES = 1000  # of a prompt


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


def frame_block_lengths(
    num_latent_frames: int, num_frame_per_block: int | None, *, independent_first_frame: bool = False
) -> list[int]:
    """How the latent frames of a clip fall into blocks.

    Args:
        num_latent_frames: F.
        num_frame_per_block: Latent frames a block; None, or F or more, makes the whole clip one block.
        independent_first_frame: The first frame is a block of its own, later blocks have `num_frame_per_block`.

    Returns:
        Latent frames of each block, in order; they add up to F.

    Raises:
        ValueError: If F does not divide into blocks.

    Source: CausVid, arXiv 2412.07772, section 4.1; `independent_first_frame` as in Self Forcing, arXiv 2506.08009.
    """
    first = [1] if independent_first_frame and num_frame_per_block is not None else []
    rest = num_latent_frames - len(first)
    if num_frame_per_block is None or num_frame_per_block >= rest > 0:
        return [*first, rest]
    if num_frame_per_block < 1 or rest % num_frame_per_block:
        below = rest // max(num_frame_per_block, 1) * max(num_frame_per_block, 1) + len(first)
        above = below + max(num_frame_per_block, 1)
        raise ValueError(
            f"the number of latent frames must be {'1 + ' if first else ''}a multiple of num_frame_per_block="
            f"{num_frame_per_block}, got {num_latent_frames}; use {below or above} or {above} latent frames "
            f"(num_frames {4 * (below or above) - 3} or {4 * above - 3}), or another num_frame_per_block."
        )
    return first + [num_frame_per_block] * (rest // num_frame_per_block)


def num_valid_latent_frames(num_valid_frames: int, time_division_factor: int = 4) -> int:
    """Latent frames that see no padded video frame, of a clip with so many real ones: (T - 1) // 4 + 1."""
    return (num_valid_frames - 1) // time_division_factor + 1


def beside_fp8(mixed_precision: str | None) -> str | None:
    """The precision of all but the products that fp8 has in 8 bits: bf16; any other precision is everything's."""
    return "bf16" if mixed_precision == "fp8" else mixed_precision
