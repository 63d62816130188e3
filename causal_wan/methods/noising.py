"""What regression shares, whatever its data: the draw of levels, noise and context, and the metrics by level.

Levels come from a step list, for a student that is sampled at them, or from a continuous range, for one that follows
the flow in any number of steps. Of the blocks before it, a block sees noisy latents (diffusion forcing) or clean ones
(teacher forcing).

Everything random about a sample is a function of (seed, sample number): the same with any number of processes,
accumulation steps or restarts.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, K = levels of the step
list, or bins of continuous ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from causal_wan.devices import to_device
from causal_wan.flow import add_noise, per_frame, shift_timesteps, sigmas_from_timesteps
from causal_wan.methods.losses import level_metrics
from causal_wan.methods.settings import BIN_WIDTH, RegressionConfig
from causal_wan.seeds import noise_generator
from causal_wan.timesteps import NUM_TRAIN_TIMESTEPS


def draw_level_indices(
    generator: torch.Generator,
    levels: torch.Tensor,
    block_lengths: Sequence[int],
    num_valid_frames: int,
    num_given_frames: int = 0,
) -> torch.Tensor:
    """Draws an entry of the step list for each block, uniformly among the draws that have something to learn.

    At least one block that is not padding gets a level above 0: a clip that is clean all over has no loss (and, alone
    in its batch, a mean over nothing). With a list ending in 0 that would be every fourth step of bidirectional_video.

    Args:
        generator: Source of randomness.
        levels: Timesteps of the step list, `(K,)`.
        block_lengths: Latent frames of each block.
        num_valid_frames: Latent frames before padding, >= 1.
        num_given_frames: First latent frames that are given, fewer than that: nothing is learned of them.

    Returns:
        Indices into `levels`, one a frame, int64 `(F,)`.

    Source: CausVid, arXiv 2412.07772, section 4.2 (independent level per chunk).
    """
    while True:
        per_block = torch.randint(len(levels), (1, len(block_lengths)), generator=generator)
        (indices,) = per_frame(per_block, block_lengths)
        if (levels[indices[num_given_frames:num_valid_frames]] > 0).any():
            return indices


def draw_continuous_timesteps(
    generator: torch.Generator,
    method: RegressionConfig,
    block_lengths: Sequence[int],
    num_valid_frames: int,
    num_given_frames: int = 0,
) -> torch.Tensor:
    """Draws a timestep for each block, independently of the others; see `RegressionConfig.timestep_sampling`.

    As from a step list, at least one block that is not padding gets a level above 0.

    Args:
        generator: Source of randomness.
        method: Its `timestep_sampling`, `timestep_shift`, `logit_mean`, `logit_std` and `clean_block_probability`.
        block_lengths: Latent frames of each block.
        num_valid_frames: Latent frames before padding, >= 1.
        num_given_frames: First latent frames that are given, as in `draw_level_indices`.

    Returns:
        Timesteps in [0, 1000], one a frame, float32 `(F,)`; 0 only of blocks that enter clean.

    Source: Diffusion Forcing, arXiv 2407.01392, section 3 (independent levels); Esser et al., arXiv 2403.03206,
    section 3.1 (logit-normal) and 5.3.2 (shift).
    """
    while True:
        if method.timestep_sampling == "uniform":
            u = 1 - torch.rand(1, len(block_lengths), generator=generator)  # in (0, 1]
        else:
            normal = torch.randn(1, len(block_lengths), generator=generator)
            u = torch.sigmoid(method.logit_mean + method.logit_std * normal)
        timesteps = shift_timesteps(NUM_TRAIN_TIMESTEPS * u, method.timestep_shift)
        is_clean = torch.rand(timesteps.shape, generator=generator) < method.clean_block_probability
        (timesteps,) = per_frame(torch.where(is_clean, 0.0, timesteps), block_lengths)
        if (timesteps[num_given_frames:num_valid_frames] > 0).any():
            return timesteps


def draw_num_given_frames(generator: torch.Generator, method: RegressionConfig, num_valid_frames: int) -> int:
    """How many first latent frames of a sample are given: 1 in a share of the samples, `first_frame_probability`.

    Nothing is drawn if that is 0. A clip of one frame gives none away.
    """
    if not method.first_frame_probability:
        return 0
    is_given = torch.rand((), generator=generator).item() < method.first_frame_probability
    return int(is_given and num_valid_frames > 1)


def draw_levels(
    generator: torch.Generator, method: RegressionConfig, block_lengths: Sequence[int], num_valid_frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a level for each block, and whether the first frame is given; arguments as in `draw_level_indices`.

    Returns:
        Timesteps, one a frame, float32 `(F,)`, 0 of a frame that is given; and their indices into `method.levels()`,
        int64 `(F,)`, which tell nothing of that frame.
    """
    levels, num_given = method.levels(), draw_num_given_frames(generator, method, num_valid_frames)
    if method.is_continuous:
        timesteps = draw_continuous_timesteps(generator, method, block_lengths, num_valid_frames, num_given)
        indices = (timesteps / BIN_WIDTH).long().clamp(max=len(levels) - 1)
    else:
        indices = draw_level_indices(generator, levels, block_lengths, num_valid_frames, num_given)
        timesteps = levels[indices]
    return torch.where(torch.arange(len(timesteps)) < num_given, 0.0, timesteps), indices


@dataclass(frozen=True)
class NoisyBatch:
    """Latents noised to drawn levels.

    Attributes:
        latents, noise, noisy_latents: `(B, C, F, H, W)`, float32.
        level_indices: Entry of the step list, or bin of the timestep, `(B, F)`, int64.
        timesteps: `(B, F)`, float32.
        sigmas: `(B, F)`, float32.
        mask: Frames that the loss is over: not clean and not padding, `(B, F)`, bool.
        context_latents: What blocks see of those before them, `(B, C, F, H, W)`; None is their noisy latents.
        context_timesteps: Its level, `(B,)`, float32; None with context_latents.
        learned_timesteps: Timesteps of the frames that the loss is over, 0 of all others, `(B, F)`, float32, on the
            host, for what it decides.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    noisy_latents: torch.Tensor
    level_indices: torch.Tensor
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    mask: torch.Tensor
    learned_timesteps: torch.Tensor
    context_latents: torch.Tensor | None = None
    context_timesteps: torch.Tensor | None = None

    @property
    def context(self) -> dict[str, torch.Tensor | None]:
        """The context as arguments of the transformer."""
        return {"context_latents": self.context_latents, "context_timestep": self.context_timesteps}


def draw_noisy_batch(
    latents: torch.Tensor,
    method: RegressionConfig,
    block_lengths: Sequence[int],
    *,
    seed: int,
    sample_numbers: Sequence[int],
    num_valid_frames: Sequence[int],
) -> NoisyBatch:
    """Noises clean latents, each block to a level of its own.

    Args:
        latents: Clean latents `(B, C, F, H, W)`.
        method: Says how levels are drawn, and what the context is.
        block_lengths: Latent frames of each block.
        seed: Of the run.
        sample_numbers: Number of each sample in the run, B of them.
        num_valid_frames: Latent frames before padding, of each sample.
    """
    generators = [noise_generator(seed, number) for number in sample_numbers]
    drawn = [
        draw_levels(generator, method, block_lengths, num_valid)
        for generator, num_valid in zip(generators, num_valid_frames, strict=True)
    ]
    timesteps, level_indices = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    device = latents.device
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    noise = to_device(noise, device)
    context_latents, context_timesteps = draw_context(latents, method, generators)
    valid = torch.arange(latents.shape[2]) < torch.tensor(list(num_valid_frames))[:, None]
    sigmas = to_device(sigmas_from_timesteps(timesteps), device)
    return NoisyBatch(
        latents=latents,
        noise=noise,
        noisy_latents=add_noise(latents, noise, sigmas),
        level_indices=to_device(level_indices, device),
        timesteps=to_device(timesteps, device),
        sigmas=sigmas,
        mask=to_device((timesteps > 0) & valid, device),
        learned_timesteps=torch.where(valid, timesteps, 0.0),
        context_latents=context_latents,
        context_timesteps=context_timesteps,
    )


def draw_context(
    latents: torch.Tensor, method: RegressionConfig, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What blocks see of those before them, `(B, C, F, H, W)`, and its level `(B,)`; None is their noisy latents.

    With context augmented, a timestep is drawn for each clip, uniformly in [0, context_noise], and the student told.

    Args:
        latents: Clean latents `(B, C, F, H, W)`.
        method: Its `context` and `context_noise`.
        generators: Sources of randomness, one a clip.

    Source: teacher forcing as in Self Forcing, arXiv 2506.08009, figure 1; noise on what is conditioned on, with
    its level as an input, as in GameNGen, arXiv 2408.14837, section 3.2.1.
    """
    if not method.has_clean_context:
        return None, None
    if method.context == "clean":
        return latents, latents.new_zeros(len(latents))
    levels = torch.cat([torch.rand(1, generator=generator) for generator in generators]) * method.context_noise
    noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
    levels, noise = to_device(levels, latents.device), to_device(noise, latents.device)
    return add_noise(latents, noise, sigmas_from_timesteps(levels)), levels


def summarize_levels(
    statistics: torch.Tensor, levels: torch.Tensor, *, bin_width: float | None = None
) -> dict[str, float]:
    """Metrics of `causal_wan.methods.losses.level_statistics`: of all levels, and of each level that was drawn.

    Args:
        statistics: Sums, `(K, 6)`.
        levels: Timesteps of the step list, or where bins begin, `(K,)`.
        bin_width: Of the bins; None is a step list.

    Returns:
        target_latent_mean/std and pred_latent_mean/std; loss_at_time_T (mean squared error of predicted latents),
        pred_latent_std_at_time_T and blur_gap_at_time_T for each timestep T, or bin T, as in loss_at_time_900_to_1000.
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
            time = f"{level:g}" if bin_width is None else f"{level:g}_to_{level + bin_width:g}"
            metrics[f"loss_at_time_{time}"] = float(by_level["mse"][index])
            metrics[f"pred_latent_std_at_time_{time}"] = float(by_level["predicted_std"][index])
            metrics[f"blur_gap_at_time_{time}"] = float(by_level["blur_gap"][index])
    return metrics
