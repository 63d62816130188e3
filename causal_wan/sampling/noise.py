"""The noise that videos are sampled from, frame by frame, so that a frame's is the same in any clip.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, M = draws of noise.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from causal_wan.devices import to_device
from causal_wan.timesteps import Sampler


Generators = torch.Generator | list[torch.Generator] | None


def count_draws(num_steps: int, sampler: Sampler) -> int:
    """M, the draws of noise that so many steps take."""
    return num_steps if sampler == "renoise" else 1


def draw_frame_noise(
    batch_size: int,
    frame_shape: tuple[int, int, int],
    num_draws: int,
    *,
    generator: Generators = None,
    device: torch.device | None = None,
) -> Iterator[torch.Tensor]:
    """Noise for `sample_blocks`, frame after frame without end: `(M, B, C, 1, H, W)` each.

    The noise of a frame depends neither on the length of the clip nor on its blocks, and with a list of generators,
    one a sample, not on the batch.

    Args:
        batch_size: B.
        frame_shape: (C, H, W).
        num_draws: M, see `count_draws`.
        generator: One, or a list of B.
        device: Where the noise is wanted; it is drawn where the generator is.
    """
    channels, height, width = frame_shape
    shape = (batch_size, num_draws, channels, 1, height, width)
    first = generator[0] if isinstance(generator, list) else generator
    drawn_on = device if first is None else first.device
    while True:
        noise = randn_tensor(shape, generator=generator, device=drawn_on)
        yield to_device(noise, device or noise.device).transpose(0, 1)


def draw_noise(batch_size: int, latent_shape: tuple[int, int, int, int], num_draws: int, **where: Any) -> torch.Tensor:
    """The noise of a whole clip of `latent_shape` (C, F, H, W), `(M, B, C, F, H, W)`; see `draw_frame_noise`."""
    channels, num_frames, height, width = latent_shape
    frames = draw_frame_noise(batch_size, (channels, height, width), num_draws, **where)
    return torch.cat(list(itertools.islice(frames, num_frames)), dim=3)
