"""What a method of regression has beside the transformer: latents and embeddings of its batches, and its metrics.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, S = prompt tokens,
D = text dimension, T = video frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLWan
from tqdm.auto import tqdm

from causal_wan.data.clips import normalize_videos
from causal_wan.data.settings import ClipShape
from causal_wan.devices import to_device
from causal_wan.geometry import num_valid_latent_frames
from causal_wan.memory.levers import on_device
from causal_wan.methods.losses import level_statistics
from causal_wan.methods.noising import NoisyBatch, summarize_levels
from causal_wan.model.compiling import seconds_compiling
from causal_wan.model.text import pad_prompt_embeds
from causal_wan.model.vae import encode_videos
from causal_wan.runs.data import RunData
from causal_wan.runs.settings import RunConfig
from causal_wan.training.loop import Sums
from causal_wan.training.steps import Batch


@dataclass
class Inputs:
    """What a method has beside the transformer, and what makes latents and embeddings of its batches.

    Attributes:
        config: Of the run.
        prompt_embeds: Prompt -> `(S, D)`.
        vae: Its weights are not there if the run needs none.
        device: Of the passes.
        data: Of the run.
    """

    config: RunConfig
    prompt_embeds: Mapping[str, torch.Tensor]
    vae: AutoencoderKLWan
    device: torch.device
    data: RunData
    bad_clips: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.levels = self.config.method.levels()
        self.seed = self.config.training.seed

    def find_latents(self, batch: Batch) -> torch.Tensor:
        """Latents `(B, C, F, H, W)` of a batch of clips, some of which may be latents already."""
        clips = batch["clips"]
        if self.data.keeper is None and not clips[0].is_floating_point():
            return self.encode(torch.stack([to_device(clip, self.device) for clip in clips]))
        found, known = [], zip(clips, batch["cache_keys"], batch["num_valid_frames"], strict=True)
        for clip, key, num_valid in known:
            states = to_device(clip, self.device)
            if not clip.is_floating_point():  # encoded on its own: what is kept does not depend on the batch
                latents = self.encode(states[None])[0]
                states = self.data.keeper.keep(key, latents, ClipShape(*clip.shape[1:]), num_valid)
            found.append(states.float())
        return torch.stack(found)

    def encode(self, videos: torch.Tensor) -> torch.Tensor:
        """Latents `(B, C, F, H, W)` of uint8 videos `(B, 3, T, height, width)` on the device."""
        with on_device(self.vae, self.device):
            return encode_videos(self.vae, normalize_videos(videos))

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Padded embeddings `(B, S, D)` of prompts that were embedded before training."""
        embeds = [self.prompt_embeds[prompt] for prompt in prompts]
        return to_device(pad_prompt_embeds(embeds, self.config.model.max_sequence_length), self.device)

    def count_valid_frames(self, batch: Batch) -> list[int]:
        """Latent frames before padding, of each clip of a batch."""
        factor = self.config.data.time_division_factor
        return [num_valid_latent_frames(frames, factor) for frames in batch["num_valid_frames"]]

    def with_prompts(self, noisy: NoisyBatch, batch: Batch) -> Batch:
        """What `compute_loss` gets: noisy latents, the embeddings of a batch, and what the loop counts."""
        return {
            "noisy": noisy,
            "prompt_embeds": self.embed(batch["prompts"]),
            "num_bad_samples": len(batch["errors"]),
            "num_items": noisy.mask.sum(),
            "num_tokens": noisy.latents[:, 0].numel() // 4,  # patches of 1 x 2 x 2
        }

    def count_errors(self, batch: Batch, predicted_latents: torch.Tensor) -> Sums:
        """What `summarize` makes metrics of, for a prepared batch and predicted clean latents `(B, C, F, H, W)`."""
        noisy = batch["noisy"]
        statistics = level_statistics(
            predicted_latents, noisy.latents, noisy.level_indices, noisy.mask, len(self.levels)
        )
        return {"levels": statistics, "num_bad_samples": statistics.new_full((), batch["num_bad_samples"])}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Sums of `compute_loss` over steps and processes -> metrics by level."""
        metrics = summarize_levels(sums["levels"].cpu(), self.levels, bin_width=self.config.method.bin_width)
        metrics["num_bad_samples"] = float(sums["num_bad_samples"])
        return metrics | ({"compile_seconds": seconds_compiling()} if self.config.compile else {})

    def take_note(self, batch: Batch) -> None:
        """Remembers how far the batch has come in the streams, and reports clips of it that broke and were replaced.

        Raises:
            ValueError: Above `max_bad_samples`.
        """
        if "lane_states" in batch:
            self.data.lane_states.update(batch)
        for error in batch["errors"]:
            if error not in self.bad_clips:  # said once, though it comes back every epoch
                tqdm.write(f"replaced a clip that does not decode: {error}")
        self.bad_clips.update(batch["errors"])
        if len(self.bad_clips) > self.config.data.max_bad_samples:
            raise ValueError(
                f"at most max_bad_samples={self.config.data.max_bad_samples} clips may fail to decode, but "
                f"{len(self.bad_clips)} did, last: {batch['errors'][-1]}. Repair or remove them, or raise "
                "--max_bad_samples."
            )
