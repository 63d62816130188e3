"""ODE regression: the student of `train_video_regression.py`, trained on trajectories of a teacher in place of videos.

    accelerate launch precompute_trajectories.py --config examples/wan_1.3b_full.yaml \\
        --prompts_file prompts.txt --trajectories_dir data/trajectories

    accelerate launch train_ode_regression.py --config examples/wan_1.3b_full.yaml \\
        --trajectories_dir data/trajectories --output_dir outputs/my-wan

For every block of `num_frame_per_block` latent frames a level is drawn from `denoising_step_list`, and the block is
what the teacher's trajectory is at that level. The loss is the squared error of the clean latents that the student
predicts, against the trajectory's end: noise and end belong together, so that even pure noise tells what to draw. So
the student keeps its noise from step to step (`--sampler euler`): fresh noise between steps belongs to another end.

The choice of the script is all that changes: flags, recipes, checkpoints, resuming, validation and evaluation are as
in video regression. Tables and video settings concern held-out clips alone (`--validation_metadata_path`), whose loss
is that of video regression.

Source: CausVid, arXiv 2412.07772, section 4.3; with a causal teacher Causal Forcing, arXiv 2602.02214.
"""

from dataclasses import field

from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import checked_dataclass
from causal_wan.methods.settings import RegressionConfig
from causal_wan.runs.settings import TrajectoryRunConfig


@checked_dataclass
class Config(TrajectoryRunConfig):
    """Settings of a run, by group."""

    method: RegressionConfig = field(default_factory=lambda: RegressionConfig(sampler="euler"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.is_continuous:
            raise ValueError(
                "trajectories are kept at the levels of denoising_step_list, got timestep_sampling "
                f"{self.method.timestep_sampling}; leave it out, or use train_video_regression.py."
            )


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__)

import torch

from causal_wan.data.samples import ClipBatch
from causal_wan.devices import to_device
from causal_wan.flow import latents_from_velocity, velocity
from causal_wan.methods.losses import frame_losses, masked_sum_over_count
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.perceptual import perceptual_sum
from causal_wan.methods.trajectories import take_noisy_batch
from causal_wan.runs.inputs import Inputs, RegressionBatch
from causal_wan.runs.metrics import sum_by_level
from causal_wan.runs.regression import load_clips, run_regression
from causal_wan.runs.trajectory_data import TrajectoryData, load_trajectory_data
from causal_wan.training.loop import Sums


def prepare_batch(inputs: Inputs, batch: ClipBatch) -> RegressionBatch:
    """Trajectories of the data loader -> each block as it is at the level that is drawn for it."""
    trajectories = torch.stack([to_device(clip, inputs.device) for clip in batch.clips]).float()  # (B, K, C, F, H, W)
    latents, method = trajectories[:, -1], inputs.config.method
    noisy = take_noisy_batch(
        trajectories[:, : len(method.levels())],
        latents,
        method,
        method.block_lengths(latents.shape[2]),
        seed=inputs.seed,
        sample_numbers=batch.sample_numbers,
    )
    return inputs.with_conditions(noisy, batch)


def compute_loss(
    method: RegressionConfig, transformer: torch.nn.Module, batch: RegressionBatch, num_items: torch.Tensor
) -> tuple[torch.Tensor, Sums]:
    """Mean over the step's noisy frames of the error of the predicted ends of the trajectories."""
    noisy = batch.noisy
    predicted_velocity = transformer(
        noisy.noisy_latents, noisy.timesteps, **batch.conditions.arguments(), return_dict=False, **noisy.context
    )[0]
    predicted_latents = latents_from_velocity(noisy.noisy_latents, predicted_velocity, noisy.sigmas)
    if method.loss_space == "latents":
        errors = frame_losses(predicted_latents, noisy.latents, method.loss_type)
    else:  # of the straight line to the end, which is the one step that the student is to make
        errors = frame_losses(predicted_velocity, velocity(noisy.latents, noisy.noise), method.loss_type)
    loss = masked_sum_over_count(method.loss_weights(noisy.sigmas) * errors, noisy.mask, num_items)
    perceptual, sums = perceptual_sum(batch.comparison, noisy, predicted_latents)  # 0 without --perceptual_weight
    loss = loss + method.perceptual_weight * perceptual / num_items
    return loss, sum_by_level(batch, predicted_latents, method) | sums


# --- what it is trained on -------------------------------------------------------------------------------------------


def load_data(config: Config) -> TrajectoryData:
    """The trajectories, and the held-out clips.

    Raises:
        ValueError: If they cannot be used.
    """
    block_lengths = config.method.block_lengths(config.num_latent_frames(config.data.shape))
    clips = load_clips(config, held_out_only=True)
    return load_trajectory_data(config.trajectories_dir, clips, config.method.levels(), block_lengths)


def prepare_held_out(inputs: Inputs, batch: ClipBatch) -> RegressionBatch:
    """Held-out clips -> latents noised block by block, as in video regression."""
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


def main(config: Config) -> None:
    """Checks everything that needs no weights, then trains."""
    run_regression(config, prepare_batch, compute_loss, load_data=load_data, prepare_held_out=prepare_held_out)


if __name__ == "__main__":
    main(config)
