"""What a run of regression logs beside its loss: sums over batches, and the metrics that they become."""

import torch

from causal_wan.methods.losses import level_statistics
from causal_wan.methods.noising import summarize_levels
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.compiling import seconds_compiling
from causal_wan.runs.inputs import RegressionBatch
from causal_wan.runs.settings import RunConfig
from causal_wan.training.loop import Sums


def sum_by_level(batch: RegressionBatch, predicted_latents: torch.Tensor, method: RegressionConfig) -> Sums:
    """What `summarize` makes metrics of, for a batch and predicted clean latents `(B, C, F, H, W)`."""
    noisy = batch.noisy
    statistics = level_statistics(predicted_latents, noisy.latents, noisy.level_indices, noisy.mask, method.num_levels)
    return {"levels": statistics, "num_bad_samples": statistics.new_full((), batch.num_bad_samples)}


def summarize(config: RunConfig, sums: Sums) -> dict[str, float]:
    """Sums of `sum_by_level`, and of `perceptual_sum`, over steps and processes -> metrics."""
    method = config.method
    metrics = summarize_levels(sums["levels"].cpu(), method.levels(), bin_width=method.bin_width)
    metrics["num_bad_samples"] = float(sums["num_bad_samples"])
    if "perceptual" in sums and sums["perceptual"][1] > 0:
        total, count = sums["perceptual"].tolist()
        metrics["perceptual_loss"] = total / count
    return metrics | ({"compile_seconds": seconds_compiling()} if config.compile else {})
