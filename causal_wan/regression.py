"""What regression on a step list shares, whatever its data: the draw of levels and noise, and the metrics by level.

Everything random about a sample is a function of (seed, sample number): the same with any number of processes,
accumulation steps or restarts.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, K = levels of the step list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from causal_wan.flow import (
    add_noise,
    check_denoising_step_list,
    frame_block_lengths,
    per_frame,
    sigmas_from_timesteps,
    training_timesteps,
)
from causal_wan.losses import LossType, level_metrics


NOISE_STREAM = 2  # of a run's random numbers; 0 and 1 belong to dataset_utils


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """The method: which noise levels the student learns, and the loss."""

    generator_task: Literal["causal_video", "bidirectional_video"] = "causal_video"
    """causal_video draws one level per block and attends to past blocks; bidirectional_video draws one per clip."""
    num_frame_per_block: int = 3
    """Latent frames of a block; the latent frames of a clip must divide by it. Ignored by bidirectional_video."""
    independent_first_frame: bool = False
    """The first latent frame is a block of its own, as in image-to-video."""
    local_attn_size: int = -1
    """Latent frames that a block sees, counted back from its end; -1 is all."""
    sink_size: int = 0
    """First latent frames that generation keeps in its cache although the window has left them."""
    denoising_step_list: tuple[float, ...] = (1000, 757, 522, 0)
    """Timesteps to train on, from noise to data; 0 makes blocks enter clean, as context. Sampling drops the 0."""
    warp_denoising_step: bool = False
    """Shift the step list towards noise by timestep_shift. The default list is shifted already (shift 8)."""
    timestep_shift: float = 5.0
    """k in 1000 k u / (1 + (k - 1) u); only with warp_denoising_step."""
    loss_type: LossType = "mse"
    """Error that is averaged."""
    loss_space: Literal["latents", "velocity"] = "latents"
    """latents compares predicted with clean latents; velocity weighs each level by 1 / sigma^2 against that (mse)."""

    def __post_init__(self) -> None:
        check_denoising_step_list(self.denoising_step_list)
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift must be above 0, got {self.timestep_shift}; 1 shifts nothing.")
        if self.num_frame_per_block < 1:
            raise ValueError(f"num_frame_per_block must be 1 or more, got {self.num_frame_per_block}.")

    @property
    def attention_block(self) -> int | None:
        """`num_frame_per_block` for the transformer: None is bidirectional."""
        return self.num_frame_per_block if self.generator_task == "causal_video" else None

    def block_lengths(self, num_latent_frames: int) -> list[int]:
        """Latent frames of each block; see `causal_wan.flow.frame_block_lengths`."""
        return frame_block_lengths(
            num_latent_frames, self.attention_block, independent_first_frame=self.independent_first_frame
        )

    def levels(self) -> torch.Tensor:
        """Timesteps of the step list after warping, float32 `(K,)`."""
        return training_timesteps(
            self.denoising_step_list,
            warp_denoising_step=self.warp_denoising_step,
            timestep_shift=self.timestep_shift,
        )


def sample_generator(seed: int, sample_number: int) -> torch.Generator:
    """A CPU generator for the noise of one sample of a run; drawing on the CPU makes a run the same on every device.

    Independent of what `dataset_utils.seeded_generator` gives for the same seed and number.
    """
    (state,) = np.random.SeedSequence(seed, spawn_key=(NOISE_STREAM, sample_number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> 1))


def draw_level_indices(
    generator: torch.Generator, levels: torch.Tensor, block_lengths: Sequence[int], num_valid_frames: int
) -> torch.Tensor:
    """Draws an entry of the step list for each block, uniformly among the draws that have something to learn.

    At least one block that is not padding gets a level above 0: a clip that is clean all over has no loss (and, alone
    in its batch, a mean over nothing). With a list ending in 0 that would be every fourth step of bidirectional_video.

    Args:
        generator: Source of randomness.
        levels: Timesteps of the step list, `(K,)`.
        block_lengths: Latent frames of each block.
        num_valid_frames: Latent frames before padding, >= 1.

    Returns:
        Indices into `levels`, one a frame, int64 `(F,)`.

    Source: CausVid, arXiv 2412.07772, section 4.2 (independent level per chunk).
    """
    while True:
        per_block = torch.randint(len(levels), (1, len(block_lengths)), generator=generator)
        (indices,) = per_frame(per_block, block_lengths)
        if (levels[indices[:num_valid_frames]] > 0).any():
            return indices


@dataclass(frozen=True)
class NoisyBatch:
    """Latents noised to drawn levels.

    Attributes:
        latents, noise, noisy_latents: `(B, C, F, H, W)`, float32.
        level_indices: Entry of the step list, `(B, F)`, int64.
        timesteps: `(B, F)`, float32.
        sigmas: `(B, F)`, float32.
        mask: Frames that the loss is over: not clean and not padding, `(B, F)`, bool.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    level_indices: torch.Tensor
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    mask: torch.Tensor


def draw_noisy_batch(
    latents: torch.Tensor,
    levels: torch.Tensor,
    block_lengths: Sequence[int],
    *,
    seed: int,
    sample_numbers: Sequence[int],
    num_valid_frames: Sequence[int],
) -> NoisyBatch:
    """Noises clean latents, each block to a level of its own.

    Args:
        latents: Clean latents `(B, C, F, H, W)`.
        levels: Timesteps of the step list, `(K,)`, on the CPU.
        block_lengths: Latent frames of each block.
        seed: Of the run.
        sample_numbers: Number of each sample in the run, B of them.
        num_valid_frames: Latent frames before padding, of each sample.
    """
    indices, noise = [], []
    for number, num_valid in zip(sample_numbers, num_valid_frames, strict=True):
        generator = sample_generator(seed, number)
        indices.append(draw_level_indices(generator, levels, block_lengths, num_valid))
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    frames = torch.arange(latents.shape[2])
    valid = frames < torch.tensor(list(num_valid_frames))[:, None]
    level_indices = torch.stack(indices)
    timesteps = levels[level_indices]
    device = latents.device
    noise_batch, sigmas = torch.stack(noise).to(device), sigmas_from_timesteps(timesteps).to(device)
    return NoisyBatch(
        latents=latents,
        noise=noise_batch,
        noisy_latents=add_noise(latents, noise_batch, sigmas),
        level_indices=level_indices.to(device),
        timesteps=timesteps.to(device),
        sigmas=sigmas,
        mask=((timesteps > 0) & valid).to(device),
    )


def num_valid_latent_frames(num_valid_frames: int, time_division_factor: int = 4) -> int:
    """Latent frames that see no padded video frame, of a clip with so many real ones: (T - 1) // 4 + 1."""
    return (num_valid_frames - 1) // time_division_factor + 1


def summarize_levels(statistics: torch.Tensor, levels: torch.Tensor) -> dict[str, float]:
    """Metrics of `causal_wan.losses.level_statistics`: of all levels together, and of each level that was drawn.

    Args:
        statistics: Sums, `(K, 6)`.
        levels: Timesteps of the step list, `(K,)`.

    Returns:
        target_latent_mean/std and pred_latent_mean/std; loss_at_time_T (mean squared error of predicted latents),
        pred_latent_std_at_time_T and blur_gap_at_time_T for each timestep T.
    """
    overall = {name: float(value) for name, value in level_metrics(statistics.sum(dim=0)).items()}
    metrics = {
        "target_latent_mean": overall["target_mean"],
        "target_latent_std": overall["target_std"],
        "pred_latent_mean": overall["predicted_mean"],
        "pred_latent_std": overall["predicted_std"],
    }
    by_level = level_metrics(statistics)
    for index, level in enumerate(levels.tolist()):
        if by_level["count"][index] > 0:
            metrics[f"loss_at_time_{level:g}"] = float(by_level["mse"][index])
            metrics[f"pred_latent_std_at_time_{level:g}"] = float(by_level["predicted_std"][index])
            metrics[f"blur_gap_at_time_{level:g}"] = float(by_level["blur_gap"][index])
    return metrics
