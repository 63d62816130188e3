"""Distribution matching: a student's own clips become like a teacher's, so that few steps draw what many do.

    accelerate launch train_dmd.py --config examples/wan_1.3b_lora.yaml --lora_rank 64 \\
        --student_lora outputs/my-wan --teacher outputs/my-teacher \\
        --prompts_file prompts.txt --output_dir outputs/my-sharp-wan --learning_rate 1e-5 --critic_learning_rate 2e-5

The student draws clips block by block, as it does when it streams (self forcing). Two score networks look at each
clip, noised: the frozen teacher, which knows what clips should be like, and a critic, which is trained beside and
knows what the student's clips are like. The student moves from where the critic would put its clip towards where the
teacher would. Nothing is compared with a clip of the same prompt, so prompts are enough, and nothing is averaged.

It starts from a student of `train_video_regression.py` or `train_ode_regression.py`, or from weights of Self Forcing
or CausVid (`--generator_ckpt`). The student is trained at the steps that it is sampled at: those of
`denoising_step_list`, or `--num_inference_steps` along the flow. Flags, recipes, checkpoints, resuming, validation and
evaluation are as in video regression. Its loss says nothing: look at the samples, and stop early; see
docs/distribution_matching.md. Real clips can have a part: in the teacher's place, in a loss of regression, or beside a
discriminator (`--adversarial_weight`).

Source: DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867; Self Forcing, arXiv 2506.08009; real clips in the place of the
student's (`--real_clip_probability`), arXiv 2606.18478.
"""

from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import checked_dataclass
from causal_wan.runs.settings import TRAINING_SETTINGS, MatchingRunConfig


@checked_dataclass
class Config(MatchingRunConfig):
    """Settings of a run, by group."""


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__, also_known=TRAINING_SETTINGS)

import torch

import train_video_regression
from causal_wan.distillation.inputs import MatchingBatch
from causal_wan.distillation.metrics import sum_critic, sum_discriminator, sum_matching
from causal_wan.distillation.run import Scores, noised, run_distribution_matching
from causal_wan.flow import latents_from_velocity, sigmas_from_timesteps, velocity
from causal_wan.methods import adversarial
from causal_wan.methods.distribution_matching import distribution_matching_losses, matching_direction
from causal_wan.methods.losses import frame_losses
from causal_wan.training.loop import Sums


def student_loss(
    scores: Scores, student: torch.nn.Module, batch: MatchingBatch, num_items: torch.Tensor
) -> tuple[torch.Tensor, Sums]:
    """Mean over the step's latent frames of the distribution matching loss, of the last step of the rollouts."""
    rollout, matching = batch.rollout, scores.config.matching
    predicted_velocity = student(
        rollout.exit_inputs,
        rollout.exit_timesteps,
        **batch.conditions.arguments(),
        **rollout.context,
        return_dict=False,
    )[0]
    latents = latents_from_velocity(
        rollout.exit_inputs, predicted_velocity, sigmas_from_timesteps(rollout.exit_timesteps)
    )
    direction, normalizer = matching_direction(latents, *scores.compare(latents, batch))
    loss = distribution_matching_losses(latents, direction, normalizer).sum() / num_items
    sums = sum_matching(direction, normalizer, batch)
    if batch.told_apart is not None and batch.told_apart.share > 0:
        logits = scores.discriminator(scores.look(noised(latents, batch.matching), batch.matching, batch))
        weight = matching.adversarial_weight * batch.told_apart.share
        loss = loss + weight * adversarial.student_losses(logits).sum() / num_items
    if batch.regression is not None:
        regression, own = train_video_regression.compute_loss(
            scores.config.method, student, batch.regression, num_items
        )
        loss, sums = loss + matching.regression_weight * regression, sums | own
    return loss, sums


def critic_loss(critic: torch.nn.Module, batch: MatchingBatch, num_items: torch.Tensor) -> tuple[torch.Tensor, Sums]:
    """Mean over the step's latent frames of the error of the critic's velocity, on the student's clips."""
    latents, drawn = batch.rollout.latents, batch.critic
    predicted_velocity = critic(
        noised(latents, drawn), drawn.timesteps, **batch.conditions.arguments(), return_dict=False
    )[0]
    errors = frame_losses(predicted_velocity, velocity(latents, drawn.noise))
    return errors.sum() / num_items, sum_critic(errors.mean(dim=1), batch)


def discriminator_loss(
    scores: Scores, discriminator: torch.nn.Module, batch: MatchingBatch, num_items: torch.Tensor
) -> tuple[torch.Tensor, Sums]:
    """Mean over the step's latent frames of the error of what tells real clips from the student's."""
    real, drawn, perturbed = discriminator(scores.look_at_both(batch)).chunk(3)
    is_real, penalty = batch.told_apart.is_real, scores.config.matching.adversarial_penalty
    losses = adversarial.discriminator_losses(real, drawn, is_real, perturbed, penalty)
    return losses.sum() / num_items, sum_discriminator(real, drawn, is_real)


def main(config: Config) -> None:
    """Checks everything that needs no weights, then trains."""
    run_distribution_matching(
        config,
        student_loss,
        critic_loss,
        discriminator_loss,
        prepare_clips=train_video_regression.prepare_batch,
        regression_loss=train_video_regression.compute_loss,
    )


if __name__ == "__main__":
    main(config)
