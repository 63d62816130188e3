"""Video regression: WAN learns to predict clean latents from noised latents of your own videos, in few causal steps.

    accelerate launch train_video_regression.py --config examples/sketch/recipe.yaml

    accelerate launch train_video_regression.py \\
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --dataset_base_path data/videos --metadata_path data/metadata.csv \\
        --output_dir outputs/my-wan --mixed_precision bf16 --gradient_checkpointing

For every block of `num_frame_per_block` latent frames, a level is drawn from `denoising_step_list` and the block is
noised to it. The transformer sees each block and those before it, at their levels, and predicts the velocity; the loss
is the squared error of the clean latents that follow from it, over the frames that are not clean already. Other
objectives are settings: `--timestep_sampling logit_normal` draws any level, for following the flow in any number of
steps; `--context clean` shows each block the clean blocks before it; `--loss_type`, `--loss_space` and
`--loss_weighting` change the error, and `--perceptual_weight` adds one that the VAE's decoder sees.

Regression learns a conditional mean: where the prompt and the past do not determine the video, a step list blurs (see
examples/objectives). `blur_gap_at_time_*` tells that from too little training; see docs/metrics.md.

Source: CausVid, arXiv 2412.07772, section 4.3, with (clip, fresh noise) in the place of ODE pairs.
"""

from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import checked_dataclass
from causal_wan.runs.settings import TRAINING_SETTINGS, RunConfig


@checked_dataclass
class Config(RunConfig):
    """Settings of a run, by group."""


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__, also_known=TRAINING_SETTINGS)

import torch

from causal_wan.data.samples import ClipBatch
from causal_wan.flow import latents_from_velocity, velocity
from causal_wan.methods.losses import frame_losses, masked_sum_over_count
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.perceptual import perceptual_sum
from causal_wan.methods.settings import RegressionConfig
from causal_wan.runs.inputs import Inputs, RegressionBatch
from causal_wan.runs.metrics import sum_by_level
from causal_wan.runs.regression import run_regression
from causal_wan.training.loop import Sums


def prepare_batch(inputs: Inputs, batch: ClipBatch) -> RegressionBatch:
    """Clips of the data loader -> latents noised block by block."""
    latents, method = inputs.find_latents(batch), inputs.config.method
    noisy = draw_noisy_batch(
        latents,
        method,
        method.block_lengths(latents.shape[2]),
        seed=inputs.seed,
        sample_numbers=batch.sample_numbers,
        num_valid_frames=inputs.count_valid_frames(batch),
    )
    return inputs.with_conditions(noisy, batch)


def compute_loss(
    method: RegressionConfig, transformer: torch.nn.Module, batch: RegressionBatch, num_items: torch.Tensor
) -> tuple[torch.Tensor, Sums]:
    """Mean over the step's noisy frames of the weighted error of the predicted clean latents, or of the velocity."""
    noisy = batch.noisy
    predicted_velocity = transformer(
        noisy.noisy_latents, noisy.timesteps, **batch.conditions.arguments(), return_dict=False, **noisy.context
    )[0]
    predicted_latents = latents_from_velocity(noisy.noisy_latents, predicted_velocity, noisy.sigmas)
    if method.loss_space == "latents":
        errors = frame_losses(predicted_latents, noisy.latents, method.loss_type)
    else:
        errors = frame_losses(predicted_velocity, velocity(noisy.latents, noisy.noise), method.loss_type)
    loss = masked_sum_over_count(method.loss_weights(noisy.sigmas) * errors, noisy.mask, num_items)
    perceptual, sums = perceptual_sum(batch.comparison, noisy, predicted_latents)  # 0 without --perceptual_weight
    loss = loss + method.perceptual_weight * perceptual / num_items
    return loss, sum_by_level(batch, predicted_latents, method) | sums


def main(config: Config) -> None:
    """Checks everything that needs no weights, then trains."""
    run_regression(config, prepare_batch, compute_loss)


if __name__ == "__main__":
    main(config)
