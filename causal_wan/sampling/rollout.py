"""Sampling of a clip, block by block, with a key/value cache.

For each block of latent frames: start from noise; at each level predict the velocity and go to the next level; then
one pass on the clean block at timestep 0 writes the cache for the blocks to come. Two samplers go from level to level:

    renoise     predict the clean latents and noise them again, with fresh noise: for students of a step list
    euler       follow the flow's ODE, with no further noise: for students of any level, in few steps or many

Shapes: B = batch, C = latent channels, C' = those of the controls, F = latent frames, f = those of a block, H, W =
latent height and width, N = sampling steps, M = draws of noise: N of renoise, 1 of euler.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from causal_wan.devices import to_device
from causal_wan.flow import add_noise, euler_step, latents_from_velocity, sigmas_from_timesteps
from causal_wan.geometry import WAN, LatentGeometry
from causal_wan.model.conditions import Conditions
from causal_wan.model.kv_cache import KVCache
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.noise import count_draws
from causal_wan.timesteps import Sampler


@dataclass(frozen=True, kw_only=True)
class SamplingSchedule:
    """How a clip goes from noise to data.

    Attributes:
        timesteps: Levels `(N,)`, falling.
        sampler: How to go from one to the next.
    """

    timesteps: torch.Tensor
    sampler: Sampler

    @property
    def num_draws(self) -> int:
        """M."""
        return count_draws(len(self.timesteps), self.sampler)


@dataclass
class Rollout:
    """A clip in the making.

    Attributes:
        transformer: Predicts velocities.
        timesteps: Sampling levels `(N,)`, from noise to data.
        conditions: What passes are told; may be replaced between steps, with `replace_conditions`.
        sampler: How to go from level to level.
        negative_conditions: Those that guidance leads away from; None is no guidance.
        guidance_scale: Weight of the difference that the prompt makes.
        attention_kwargs: For the transformer; may hold the LoRA `scale`.
        on_step_end: Called with the rollout, the number of the step, its timestep and the block's latents after it,
            which it returns or replaces.
        cache: Keys and values of earlier blocks; None for a clip of one block.
        next_conditions: Called before each block with its first latent frame and its length; what it returns is
            what passes are told from then on, None changes nothing.
        recaches: Whether the clean frames that the cache holds are passed through once more where it changes them, so
            that their keys and values are those under the new ones.
        skips_given_blocks: Whether a block that is given whole is not passed through step by step; set it to False
            where processes that are given different things make each pass in common.
        is_stopped: Set it to have the clip end with the block of the current step.
    """

    transformer: CausalWanTransformer3DModel
    timesteps: torch.Tensor
    conditions: Conditions
    sampler: Sampler = "renoise"
    negative_conditions: Conditions | None = None
    guidance_scale: float = 1.0
    attention_kwargs: dict[str, Any] | None = None
    on_step_end: Callable[["Rollout", int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    cache: KVCache | None = None
    next_conditions: Callable[[int, int], Conditions | None] | None = None
    recaches: bool = False
    skips_given_blocks: bool = True
    is_stopped: bool = False

    def __post_init__(self) -> None:
        self._num_steps = 0
        self._control_latents: torch.Tensor | None = None  # of the block that is passed through
        # First frames, latents and controls of the blocks that are held.
        self._past: list[tuple[int, torch.Tensor, torch.Tensor | None]] = []
        self.replace_conditions(self.conditions, self.negative_conditions)

    @property
    def is_guided(self) -> bool:
        """Whether each pass is made with the prompt and with the negative one."""
        return self.negative_conditions is not None

    def replace_conditions(self, conditions: Conditions, negative_conditions: Conditions | None) -> None:
        """Goes on with others, of the same shapes."""
        self.conditions, self.negative_conditions = conditions, negative_conditions
        parts = [conditions, negative_conditions] if self.is_guided else [conditions]
        self._of_passes = Conditions.cat(parts)  # the same tensors for all passes: the cache knows them again

    def run(
        self,
        noise: Iterable[torch.Tensor],
        block_lengths: Iterable[int],
        initial_latents: torch.Tensor | None = None,
        control_latents: Iterable[torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Samples blocks, and gives each `(B, C, f, H, W)` as soon as it exists.

        Args:
            noise: Of each frame of the clip, `(M, B, C, 1, H, W)`.
            block_lengths: Latent frames of each block.
            control_latents: Of each frame, `(B, C', 1, H, W)`; a clip ends where they end.
            initial_latents: The clip's first frames `(B, C, F', H, W)`, given; they come out as they are. The others
                of a block that they begin are sampled beside them.
        """
        frames, start = iter(noise), 0
        controls = None if control_latents is None else iter(control_latents)
        num_given = 0 if initial_latents is None else initial_latents.shape[2]
        lengths = iter(block_lengths)
        length = next(lengths, None)
        if self.next_conditions is not None and length is not None:
            self._turn_to(self.next_conditions(0, length))
        while length is not None and not self.is_stopped:
            if controls is not None and not self._take_controls(controls, length):
                return
            block_noise = torch.cat(list(itertools.islice(frames, length)), dim=3)
            given = None
            if start < num_given:
                given = initial_latents[:, :, start : start + length].to(block_noise.device, torch.float32)
            is_skipped = given is not None and given.shape[2] == length and self.skips_given_blocks
            block = given if is_skipped else self.sample_block(block_noise, start, given)
            yield block
            following = next(lengths, None)
            if self.cache is not None and following is not None:
                self._go_on(block, start, following)
            start, length = start + length, following

    def _take_controls(self, controls: Iterator[torch.Tensor], length: int) -> bool:
        """Takes those of the next block, of so many frames; False if there are not enough of them."""
        found = list(itertools.islice(controls, length))
        if len(found) < length:
            return False
        self._control_latents = torch.cat(found, dim=2)
        return True

    def _turn_to(self, conditions: Conditions | None) -> None:
        if conditions is not None:
            self.replace_conditions(conditions, self.negative_conditions)

    def _go_on(self, block: torch.Tensor, start: int, following: int) -> None:
        """Writes a clean block to the cache, and turns to what the next, of `following` frames, is told."""
        end = start + block.shape[2]
        new = None if self.next_conditions is None else self.next_conditions(end, following)
        if self.recaches:
            self._past = [past for past in self._past if self.cache.is_kept(past[0], past[1].shape[2], end)]
            self._past.append((start, block, self._control_latents))
        if new is None or not self.recaches:
            self.predict(block, self.timesteps.new_zeros(()), start)
            self._turn_to(new)
            return
        self._turn_to(new)
        self.cache.restart()
        for at, past, controls in self._past:
            self._control_latents = controls
            self.cache.leave_out(at - self.cache.num_frames)
            self.predict(past, self.timesteps.new_zeros(()), at)

    def sample_block(self, noise: torch.Tensor, start_frame: int, given: torch.Tensor | None = None) -> torch.Tensor:
        """Clean latents `(B, C, f, H, W)`, float32, of the block that begins at a frame of the clip.

        Args:
            noise: `(M, B, C, f, H, W)`: entry 0 starts the block, entry i is the fresh noise for the step to level i.
            start_frame: Its first latent frame.
            given: Its first frames, clean `(B, C, f', H, W)`; each pass sees them at timestep 0.
        """
        noisy_latents, batch_size = with_given(noise[0].float(), given), noise.shape[1]
        num_given = 0 if given is None else given.shape[2]
        for step, timestep in enumerate(self.timesteps):
            velocity = self.predict(noisy_latents, self._timestep_of(timestep, noise.shape[3], num_given), start_frame)
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
            noisy_latents = with_given(noisy_latents, given)
            if self.on_step_end is not None:
                noisy_latents = self.on_step_end(self, self._num_steps, timestep, noisy_latents)
            self._num_steps += 1
            if self.is_stopped:
                return with_given(latents, given)  # clean as far as it got
        return noisy_latents

    @staticmethod
    def _timestep_of(timestep: torch.Tensor, num_frames: int, num_given: int) -> torch.Tensor:
        """The timestep of a block, or, if some of its frames are given, of each of its frames, `(f,)`."""
        if not num_given:
            return timestep
        is_given = torch.arange(num_frames, device=timestep.device) < num_given
        return torch.where(is_given, 0.0, timestep)

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, start_frame: int) -> torch.Tensor:
        """The velocity `(B, C, f, H, W)` of a block at a timestep, or one a frame `(f,)`; writes it to the cache."""
        conditions, controls = self._of_passes, self._control_latents
        if controls is not None:
            conditions = replace(conditions, control_latents=torch.cat([controls] * (1 + self.is_guided)))
        if self.is_guided:
            latents = torch.cat([latents, latents])
        velocity = self.transformer(
            latents.to(conditions.dtype),
            timestep.expand(latents.shape[0], *timestep.shape),
            **conditions.arguments(),
            attention_kwargs=self.attention_kwargs,
            cache=self.cache,
            start_frame=start_frame if self.cache is not None else 0,
            return_dict=False,
        )[0]
        if self.is_guided:
            positive, negative = velocity.float().chunk(2)
            velocity = negative + self.guidance_scale * (positive - negative)
        return velocity


def with_given(latents: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """Latents `(B, C, f, H, W)` with those in the place of the first that are given."""
    return latents if given is None else torch.cat([given, latents[:, :, given.shape[2] :]], dim=2)


@torch.no_grad()
def roll_out(
    transformer: CausalWanTransformer3DModel,
    conditions: Conditions,
    noise: torch.Tensor | Iterable[torch.Tensor],
    schedule: SamplingSchedule,
    *,
    num_latent_frames: int | None = None,
    initial_latents: torch.Tensor | None = None,
    control_latents: Iterable[torch.Tensor] | None = None,
    cache_dtype: torch.dtype | None = None,
    geometry: LatentGeometry = WAN,
    **settings: Any,
) -> Iterator[torch.Tensor]:
    """Samples clean latents, and gives each block `(B, C, f, H, W)` as soon as it exists.

    Args:
        transformer: Says what the blocks are.
        conditions: What the videos are to show, B of them; where prompts change along a clip, a block has that of its
            first frame; controls are those of the whole clip.
        noise: Of a clip, `(M, B, C, F, H, W)`; or of one frame after the other, `(M, B, C, 1, H, W)`.
        schedule: Takes M draws of noise.
        num_latent_frames: F, for noise that comes frame by frame; None goes on for as long as blocks are asked for, in
            memory of fixed size.
        initial_latents: First latent frames of the clip `(B, C, F', H, W)`, to be continued: whole blocks, or one
            frame, a picture.
        control_latents: In the place of those of `conditions`: of one frame after the other, `(B, C', 1, H, W)`, each
            taken when its block begins: where they end, the clip ends.
        cache_dtype: Of remembered keys and values: None is that of the passes, torch.int8 half of 16 bits.
        geometry: Of the checkpoint, for errors.
        settings: `negative_conditions` with `guidance_scale`, `attention_kwargs`, `on_step_end`, `next_conditions`,
            `recaches`, `skips_given_blocks`; see `Rollout`.

    Raises:
        ValueError: If the noise does not have the draws that the steps take; if F does not divide into blocks; if
            initial latents are neither whole blocks nor one frame, or leave nothing to sample; if controls are of
            another length; if there is no end and no window or no blocks.
    """
    first, frames, num_of_noise = _frames_of_noise(noise, schedule)
    num_latent_frames, causal = num_of_noise or num_latent_frames, transformer.causal_config
    lengths = causal.iterate_block_lengths(num_latent_frames)
    if initial_latents is not None:
        causal.check_continues(initial_latents.shape[2], num_latent_frames, geometry)
    if control_latents is None and conditions.control_latents is not None:
        control_latents = conditions.control_latents.split(1, dim=2)
        if num_latent_frames is not None and len(control_latents) != num_latent_frames:
            raise ValueError(
                f"control_latents must have the {num_latent_frames} latent frames of the clip, got "
                f"{len(control_latents)}."
            )
    conditions = replace(conditions, control_latents=None)  # those of a pass are the block's
    timesteps = to_device(schedule.timesteps, first.device)
    if conditions.prompt_of_frame is not None:
        settings["next_conditions"], conditions = conditions_by_block(conditions), conditions.at_frame(0)
    rollout = Rollout(transformer, timesteps, conditions, schedule.sampler, **settings)
    # A one-block clip attends to itself alone: no cache, the stock computation.
    if num_latent_frames is None or len(causal.block_lengths(num_latent_frames)) > 1:
        rollout.cache = transformer.make_cache(
            first.shape[1] * (1 + rollout.is_guided),
            num_latent_frames or causal.local_attn_size,
            *first.shape[-2:],
            device=first.device,
            dtype=cache_dtype,
        )
    yield from rollout.run(frames, lengths, initial_latents, control_latents)


def conditions_by_block(conditions: Conditions) -> Callable[[int, int], Conditions | None]:
    """`Rollout.next_conditions` of clips along which the prompt changes."""
    numbers = conditions.prompt_of_frame.T.tolist()
    current = numbers[0]

    def next_conditions(start: int, length: int) -> Conditions | None:
        nonlocal current
        before, current = current, numbers[min(start, len(numbers) - 1)]
        return None if current == before else conditions.at_frame(start)

    return next_conditions


def _frames_of_noise(
    noise: torch.Tensor | Iterable[torch.Tensor], schedule: SamplingSchedule
) -> tuple[torch.Tensor, Iterator[torch.Tensor], int | None]:
    """The first frame's noise, that of all frames `(M, B, C, 1, H, W)`, and how many there are if that is known."""
    num_frames, frames = None, iter(noise)
    if isinstance(noise, torch.Tensor):
        num_frames = noise.shape[3] if noise.ndim == 6 else None
        frames = iter(noise.split(1, dim=3)) if noise.ndim == 6 else iter([noise])
    first = next(frames)
    if first.ndim != 6 or first.shape[0] != schedule.num_draws:
        raise ValueError(
            f"noise must have shape (num_draws, B, C, F, H, W) with num_draws={schedule.num_draws} for "
            f"{len(schedule.timesteps)} steps of the sampler {schedule.sampler}, got {tuple(first.shape)}."
        )
    return first, itertools.chain([first], frames), num_frames
