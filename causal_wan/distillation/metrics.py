"""What a run of distribution matching logs: its losses say little, so the parts that they are made of.

Shapes: B = batch, N = steps of the student's schedule, K = bins of timesteps.
"""

import torch

from causal_wan.devices import to_device
from causal_wan.distillation.inputs import MatchingBatch
from causal_wan.methods.settings import BIN_WIDTH
from causal_wan.runs.metrics import summarize
from causal_wan.runs.settings import MatchingRunConfig
from causal_wan.timesteps import NUM_TRAIN_TIMESTEPS
from causal_wan.training.loop import Sums


NUM_BINS = NUM_TRAIN_TIMESTEPS // BIN_WIDTH


def sum_matching(direction: torch.Tensor, normalizer: torch.Tensor, batch: MatchingBatch) -> Sums:
    """Of a turn of the student: lengths of g, normalisers, and where rollouts ended; see `matching_direction`."""
    exits = [float(len(direction) * (number == batch.exit_step)) for number in range(batch.num_steps)]
    return {
        "matching_gradient": direction.square().mean(dim=(1, 2, 3, 4)).sqrt().sum(),
        "matching_normalizer": normalizer.sum(),
        "matching_exits": to_device(torch.tensor(exits, dtype=torch.float64), direction.device),
    }


def sum_critic(errors: torch.Tensor, batch: MatchingBatch) -> Sums:
    """Of a turn of the critic: its errors `(B,)` by bin of their timesteps, `(K, 2)` sums and counts."""
    bins = (batch.critic.timesteps / BIN_WIDTH).long().clamp(max=NUM_BINS - 1)
    values = torch.stack([errors.double(), torch.ones_like(errors, dtype=torch.float64)], dim=1)
    by_bin = torch.zeros(NUM_BINS, 2, dtype=torch.float64, device=errors.device)
    return {
        "critic_levels": by_bin.index_add(0, bins, values),
        "critic_bad_samples": by_bin.new_full((), batch.num_bad_samples),
    }


def sum_discriminator(real: torch.Tensor, drawn: torch.Tensor, is_real: torch.Tensor) -> Sums:
    """Of a turn of the discriminator: its right answers, and all of its answers, `(2,)`."""
    right = ((real > 0) & is_real).sum() + (drawn < 0).sum()
    return {"discriminator_right": torch.stack([right, is_real.sum() + drawn.numel()]).double()}


def summarize_matching(config: MatchingRunConfig, sums: Sums) -> dict[str, float]:
    """Sums over steps and processes -> metrics; those of the student in steps with a turn of its."""
    metrics = {"num_bad_samples": float(sums["critic_bad_samples"])} if "critic_bad_samples" in sums else {}
    for number, (total, count) in enumerate(sums["critic_levels"].tolist() if "critic_levels" in sums else []):
        if count:
            metrics[f"critic_loss_at_time_{BIN_WIDTH * number}_to_{BIN_WIDTH * (number + 1)}"] = total / count
    if "discriminator_right" in sums:
        right, count = sums["discriminator_right"].tolist()
        metrics["discriminator_accuracy"] = right / count
    if "levels" in sums:
        metrics |= summarize(config, {**sums, "num_bad_samples": sums["critic_bad_samples"]})
    if "matching_exits" in sums and (num_clips := float(sums["matching_exits"].sum())):
        metrics["matching_gradient_norm"] = float(sums["matching_gradient"]) / num_clips
        metrics["matching_normalizer"] = float(sums["matching_normalizer"]) / num_clips
        timesteps = config.method.inference_timesteps().tolist()
        for timestep, count in zip(timesteps, sums["matching_exits"].tolist(), strict=True):
            metrics[f"exit_share_at_time_{timestep:g}"] = count / num_clips
    return metrics
