"""Sampling of a clip, block by block, with a key/value cache.

For each block of latent frames: start from noise; at each level predict the velocity and go to the next level; then
one pass on the clean block at timestep 0 writes the cache for the blocks to come. Two samplers go from level to level:

    renoise     predict the clean latents and noise them again, with fresh noise: for students of a step list
    euler       follow the flow's ODE, with no further noise: for students of any level, in few steps or many

Shapes: B = batch, C = latent channels, F = latent frames, f = those of a block, H, W = latent height and width,
N = sampling steps, M = draws of noise: N of renoise, 1 of euler.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from causal_wan.devices import to_device
from causal_wan.flow import add_noise, euler_step, latents_from_velocity, sigmas_from_timesteps
from causal_wan.model.kv_cache import KVCache
from causal_wan.model.transformer import CausalWanTransformer3DModel
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


@dataclass
class Rollout:
    """A clip in the making.

    Attributes:
        transformer: Predicts velocities.
        timesteps: Sampling levels `(N,)`, from noise to data.
        prompt_embeds: `(B, S, D)`; may be replaced between steps.
        sampler: How to go from level to level.
        negative_prompt_embeds: Those that guidance leads away from, `(B, S, D)`; None is no guidance.
        guidance_scale: Weight of the difference that the prompt makes.
        attention_kwargs: For the transformer; may hold the LoRA `scale`.
        on_step_end: Called with the rollout, the number of the step, its timestep and the block's latents after it,
            which it returns or replaces.
        cache: Keys and values of earlier blocks; None for a clip of one block.
        is_stopped: Set it to have the clip end with the block of the current step.
    """

    transformer: CausalWanTransformer3DModel
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    sampler: Sampler = "renoise"
    negative_prompt_embeds: torch.Tensor | None = None
    guidance_scale: float = 1.0
    attention_kwargs: dict[str, Any] | None = None
    on_step_end: Callable[["Rollout", int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    cache: KVCache | None = None
    is_stopped: bool = False

    def __post_init__(self) -> None:
        self._num_steps = 0
        self.replace_prompt(self.prompt_embeds, self.negative_prompt_embeds)

    @property
    def is_guided(self) -> bool:
        """Whether each pass is made with the prompt and with the negative one."""
        return self.negative_prompt_embeds is not None

    def replace_prompt(self, prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor | None) -> None:
        """Goes on with other embeddings, of the same shapes."""
        self.prompt_embeds, self.negative_prompt_embeds = prompt_embeds, negative_prompt_embeds
        parts = [prompt_embeds, negative_prompt_embeds] if self.is_guided else [prompt_embeds]
        self._embeds = torch.cat(parts)  # one tensor for all passes: the cache knows it again

    def run(
        self,
        noise: Iterable[torch.Tensor],
        block_lengths: Iterable[int],
        initial_latents: torch.Tensor | None = None,
    ) -> Iterator[torch.Tensor]:
        """Samples blocks, and gives each `(B, C, f, H, W)` as soon as it exists.

        Args:
            noise: Of each frame of the clip, `(M, B, C, 1, H, W)`.
            block_lengths: Latent frames of each block.
            initial_latents: The clip's first blocks `(B, C, F', H, W)`, given; they come out as they are.
        """
        frames, start = iter(noise), 0
        num_given = 0 if initial_latents is None else initial_latents.shape[2]
        lengths = iter(block_lengths)
        length = next(lengths, None)
        while length is not None and not self.is_stopped:
            block_noise = torch.cat(list(itertools.islice(frames, length)), dim=3)
            if start < num_given:
                block = initial_latents[:, :, start : start + length].to(block_noise.device, torch.float32)
            else:
                block = self.sample_block(block_noise, start)
            yield block
            following = next(lengths, None)
            if self.cache is not None and following is not None:
                self.predict(block, self.timesteps.new_zeros(()), start)
            start, length = start + length, following

    def sample_block(self, noise: torch.Tensor, start_frame: int) -> torch.Tensor:
        """Clean latents `(B, C, f, H, W)`, float32, of the block that begins at a frame of the clip.

        Args:
            noise: `(M, B, C, f, H, W)`: entry 0 starts the block, entry i is the fresh noise for the step to level i.
            start_frame: Its first latent frame.
        """
        noisy_latents, batch_size = noise[0].float(), noise.shape[1]
        for step, timestep in enumerate(self.timesteps):
            velocity = self.predict(noisy_latents, timestep, start_frame)
            sigmas = sigmas_from_timesteps(timestep.expand(batch_size))
            latents = latents_from_velocity(noisy_latents, velocity, sigmas)
            if step + 1 == len(self.timesteps):
                noisy_latents = latents
            else:
                next_sigmas = sigmas_from_timesteps(self.timesteps[step + 1].expand(batch_size))
                if self.sampler == "renoise":
                    noisy_latents = add_noise(latents, noise[step + 1].float(), next_sigmas)
                else:
                    noisy_latents = euler_step(noisy_latents, velocity, sigmas, next_sigmas)
            if self.on_step_end is not None:
                noisy_latents = self.on_step_end(self, self._num_steps, timestep, noisy_latents)
            self._num_steps += 1
            if self.is_stopped:
                return latents  # clean as far as it got
        return noisy_latents

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, start_frame: int) -> torch.Tensor:
        """The velocity `(B, C, f, H, W)` of a block at a timestep; writes the block to the cache."""
        if self.is_guided:
            latents = torch.cat([latents, latents])
        velocity = self.transformer(
            latents.to(self._embeds.dtype),
            timestep.expand(latents.shape[0]),
            self._embeds,
            attention_kwargs=self.attention_kwargs,
            cache=self.cache,
            start_frame=start_frame if self.cache is not None else 0,
            return_dict=False,
        )[0]
        if self.is_guided:
            positive, negative = velocity.float().chunk(2)
            velocity = negative + self.guidance_scale * (positive - negative)
        return velocity


def check_initial_latents(num_given: int, block_lengths: Sequence[int], num_latent_frames: int | None) -> None:
    """Checks that a clip can be continued from its first frames.

    Args:
        num_given: Latent frames that are given.
        block_lengths: Of the clip, as far as they matter.
        num_latent_frames: Of the clip; None has no end.

    Raises:
        ValueError: If they do not end with a block, or leave nothing to sample.
    """
    ends = list(itertools.accumulate(block_lengths))
    if num_given in ends and num_given != num_latent_frames:
        return
    below = max((end for end in ends if end < num_given), default=None)
    nearest = [end for end in (below, next((end for end in ends if end > num_given), None)) if end is not None]
    fitting = [end for end in nearest if end != num_latent_frames]
    raise ValueError(
        "a video to continue must end with a block and before the clip does, which has "
        f"{'no end' if num_latent_frames is None else f'{num_latent_frames} latent frames'}, got {num_given} latent "
        f"frames ({4 * num_given - 3} frames); "
        + (f"give {' or '.join(str(4 * end - 3) for end in fitting)} frames." if fitting else "ask for more frames.")
    )
