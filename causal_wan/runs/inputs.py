"""What a batch of the data loader becomes before a method of regression sees it: latents, conditions, and noise.

Shapes: B = batch, C = latent channels, C' = those of the controls, F = latent frames, H, W = latent height and width,
S = prompt tokens, D = text dimension, T = video frames.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from diffusers import AutoencoderKLWan

from causal_wan.blocks import middle_frames
from causal_wan.cache.encoded_clips import LatentKeeper
from causal_wan.data.clips import normalize_videos
from causal_wan.data.samples import ClipBatch
from causal_wan.data.settings import ClipShape
from causal_wan.devices import to_device
from causal_wan.geometry import LatentGeometry
from causal_wan.memory.levers import on_device
from causal_wan.methods.noising import NoisyBatch
from causal_wan.methods.perceptual import Comparison, draw_crops
from causal_wan.model.conditions import Conditions, embedded
from causal_wan.model.streaming_vae import decode_features
from causal_wan.model.vae import encode_videos
from causal_wan.runs.settings import RunConfig
from causal_wan.tables.prompt_schedules import FramePrompts


@dataclass(frozen=True, kw_only=True)
class RegressionBatch:
    """What the loss of a batch is made of; a `causal_wan.training.steps.PreparedBatch`.

    Attributes:
        noisy: Latents, noised to drawn levels.
        conditions: What the transformer is told beside.
        comparison: What is compared as the VAE's decoder sees it, with `--perceptual_weight`.
        num_bad_samples: Clips that did not decode and were replaced.
        num_items: Frames that the loss is over, a scalar tensor.
        num_tokens: Patches of all clips.
    """

    noisy: NoisyBatch
    conditions: Conditions
    comparison: Comparison | None
    num_bad_samples: int
    num_items: torch.Tensor
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Makes latents and embeddings of batches.

    Attributes:
        config: Of the run.
        prompt_embeds: Prompt -> `(S, D)`.
        vae: Its weights are not there if the run needs none.
        device: Of the passes.
        keeper: Keeps latents that are encoded; None if they are not to be kept.
        geometry: Of the checkpoint.
    """

    config: RunConfig
    prompt_embeds: Mapping[str, torch.Tensor]
    vae: AutoencoderKLWan
    device: torch.device
    keeper: LatentKeeper | None
    geometry: LatentGeometry

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.training.seed

    def find_latents(self, batch: ClipBatch) -> torch.Tensor:
        """Latents `(B, C, F, H, W)` of a batch of clips, some of which may be latents already."""
        return self._find_latents(batch.clips, batch.is_latents, batch.cache_keys, batch.num_valid_frames)

    def find_control_latents(self, batch: ClipBatch, latents: torch.Tensor) -> torch.Tensor | None:
        """Latents `(B, C', F, H, W)` of the controls of a batch, one after the other; zeros where they are left out.

        Args:
            batch: Of clips, some of whose controls may be latents already.
            latents: Of the clips, `(B, C, F, H, W)`.

        Returns:
            None of clips without controls.
        """
        count = len(self.config.data.control_column)
        if not count:
            return None
        found = latents.new_zeros(len(latents), count, *latents.shape[1:])
        places = [(b, k) for b in range(len(latents)) for k in range(count) if batch.controls[b][k] is not None]
        if places:
            controls = [batch.controls[b][k] for b, k in places]
            of_places = self._find_latents(
                controls,
                [control.dtype != torch.uint8 for control in controls],
                [batch.control_keys[b][k] for b, k in places],
                [batch.num_valid_frames[b] for b, _ in places],
            )
            for (b, k), control in zip(places, of_places, strict=True):
                found[b, k] = control
        return found.flatten(1, 2)

    def _find_latents(
        self,
        clips: list[torch.Tensor],
        are_latents: list[bool],
        cache_keys: list[bytes | None],
        num_valid_frames: list[int],
    ) -> torch.Tensor:
        if self.keeper is None and not any(are_latents):
            return self.encode(torch.stack([to_device(clip, self.device) for clip in clips]))
        found = []
        for clip, is_latents, key, num_valid in zip(clips, are_latents, cache_keys, num_valid_frames, strict=True):
            states = to_device(clip, self.device)
            if not is_latents:  # encoded on its own: what is kept does not depend on the batch
                latents = self.encode(states[None])[0]
                states = self.keeper.keep(key, latents, ClipShape(*clip.shape[1:]), num_valid)
            found.append(states.float())
        return torch.stack(found)

    def encode(self, videos: torch.Tensor) -> torch.Tensor:
        """Latents `(B, C, F, H, W)` of uint8 videos `(B, 3, T, height, width)` on the device."""
        with on_device(self.vae, self.device):
            return encode_videos(self.vae, normalize_videos(videos))

    def tell(self, prompts: Sequence[str | FramePrompts], num_latent_frames: int) -> Conditions:
        """Conditions of prompts that were embedded before training, one a clip or one for each of its video frames.

        A block has the prompt of the frame in its middle.
        """
        lengths = self.config.method.block_lengths(num_latent_frames)
        middles = middle_frames(lengths, self.geometry)
        of_blocks = [each if isinstance(each, str) else [each[frame] for frame in middles] for each in prompts]
        told = embedded(of_blocks, self.prompt_embeds, lengths, self.config.model.max_sequence_length)
        return told.to(self.device)

    def count_valid_frames(self, batch: ClipBatch) -> list[int]:
        """Latent frames before padding, of each clip of a batch."""
        return [self.config.data.geometry.num_latent_frames(frames) for frames in batch.num_valid_frames]

    def with_conditions(self, noisy: NoisyBatch, batch: ClipBatch) -> RegressionBatch:
        """What `compute_loss` gets: the noisy latents of a batch, and all else that it needs of it."""
        return RegressionBatch(
            noisy=noisy,
            conditions=replace(
                self.tell(batch.prompts, noisy.latents.shape[2]),
                control_latents=self.find_control_latents(batch, noisy.latents),
            ),
            comparison=self.compare(noisy, batch.sample_numbers),
            num_bad_samples=len(batch.errors),
            num_items=noisy.mask.sum(),
            num_tokens=len(noisy.latents) * self.geometry.num_tokens(noisy.latents.shape[1:]),
        )

    def compare(self, noisy: NoisyBatch, sample_numbers: Sequence[int]) -> Comparison | None:
        """What of a batch is compared as the VAE's decoder sees it; None without `--perceptual_weight`."""
        method = self.config.method
        if not method.perceptual_weight:
            return None
        max_timestep = method.perceptual_max_timestep
        crops = draw_crops(noisy, seed=self.seed, sample_numbers=sample_numbers, max_timestep=max_timestep)
        return Comparison(crops, max_timestep, features=partial(decode_features, self.vae))


PrepareBatch = Callable[[Inputs, ClipBatch], RegressionBatch]
