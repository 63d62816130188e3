"""A run of distribution matching: a student and its critic in turns, beside a frozen teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from causal_wan.config.parsing import user_errors
from causal_wan.distillation.discriminator import Discriminator, look_inside
from causal_wan.distillation.inputs import MatchingBatch, MatchingInputs, Scored
from causal_wan.distillation.metrics import summarize_matching
from causal_wan.distillation.prompt_data import load_matching_data
from causal_wan.distillation.roles import Roles, make_roles
from causal_wan.distillation.samples import SampleMeasures
from causal_wan.flow import add_noise, latents_from_velocity, sigmas_from_timesteps
from causal_wan.methods.distribution_matching import guided, takes_student_turn
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.records.metrics import STUDENT
from causal_wan.runs.inputs import PrepareBatch
from causal_wan.runs.parts import check_strategy, find_critic, find_matching_teacher
from causal_wan.runs.plan import print_plan
from causal_wan.runs.regression import (
    BegunRun,
    ComputeLoss,
    begin_run,
    check_settings,
    make_validation,
    start_training,
    train_run,
)
from causal_wan.runs.settings import MatchingRunConfig
from causal_wan.sampling.rollout import SamplingSchedule
from causal_wan.training.loop import Sums
from causal_wan.training.run import Run
from causal_wan.training.strategies import context_mesh
from causal_wan.training.weights import reshard
from causal_wan.weights.lora import LORA_WEIGHTS_NAME


CRITIC, DISCRIMINATOR = "critic", "discriminator"
PERTURBATION = 0.1  # standard deviations of noise that are to change a discriminator's answer little


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The two networks that look at the student's clips.

    Attributes:
        config: Of the run.
        accelerator: Of the run.
        teacher: Frozen.
        critic: Unwrapped.
        discriminator: Unwrapped, if there is one; it goes by what the teacher makes of clips.
    """

    config: MatchingRunConfig
    accelerator: Accelerator
    teacher: CausalWanTransformer3DModel
    critic: CausalWanTransformer3DModel
    discriminator: Discriminator | None = None

    @torch.no_grad()
    def compare(self, latents: torch.Tensor, batch: MatchingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents `(B, C, F, H, W)` that critic and teacher predict from the student's, noised alike.

        The teacher is guided; for some samples it looks at the real clip in the place of the student's.
        """
        drawn = batch.matching
        noisy = noised(latents, drawn)
        critic_latents = self.predict(self.critic, noisy, drawn, batch.conditions)
        reshard(self.critic)
        if batch.uses_clip is not None:
            uses_clip = batch.uses_clip[:, None, None, None, None]
            noisy = torch.where(uses_clip, noised(batch.clips, drawn), noisy)
        teacher_latents = self.predict(self.teacher, noisy, drawn, batch.conditions)
        if batch.negative_conditions is not None:
            unconditional = self.predict(self.teacher, noisy, drawn, batch.negative_conditions)
            scale = self.config.matching.teacher_guidance_scale
            teacher_latents = guided(teacher_latents, unconditional, scale)
        return critic_latents, teacher_latents

    def predict(
        self, model: CausalWanTransformer3DModel, noisy: torch.Tensor, drawn: Scored, conditions: Conditions
    ) -> torch.Tensor:
        """Clean latents that a score network predicts, float32."""
        with self.accelerator.autocast():
            velocity = model(noisy, drawn.timesteps, **conditions.arguments(), return_dict=False)[0]
        return latents_from_velocity(noisy, velocity, sigmas_from_timesteps(drawn.timesteps))

    def look(self, noisy: torch.Tensor, drawn: Scored, batch: MatchingBatch) -> list[torch.Tensor]:
        """What the teacher makes of noisy clips on its way; gradients go through it to the clips."""
        with self.accelerator.autocast():
            return look_inside(self.teacher, noisy, drawn.timesteps, batch.conditions)

    @torch.no_grad()
    def look_at_both(self, batch: MatchingBatch) -> list[torch.Tensor]:
        """What it makes of real clips, of the student's, and of real ones with a little more noise, as one batch."""
        drawn = batch.told_apart.scored
        real, of_student = noised(batch.clips, drawn), noised(batch.rollout.latents, drawn)
        perturbed = real + PERTURBATION * batch.told_apart.perturbation
        seen = [self.look(noisy, drawn, batch) for noisy in (real, of_student, perturbed)]
        return [torch.cat(of_depth) for of_depth in zip(*seen, strict=True)]


def noised(latents: torch.Tensor, drawn: Scored) -> torch.Tensor:
    """Clips as score networks see them."""
    return add_noise(latents, drawn.noise, sigmas_from_timesteps(drawn.timesteps))


StudentLoss = Callable[[Scores, torch.nn.Module, MatchingBatch, torch.Tensor], tuple[torch.Tensor, Sums]]
CriticLoss = Callable[[torch.nn.Module, MatchingBatch, torch.Tensor], tuple[torch.Tensor, Sums]]
DiscriminatorLoss = StudentLoss


def run_distribution_matching(
    config: MatchingRunConfig,
    student_loss: StudentLoss,
    critic_loss: CriticLoss,
    discriminator_loss: DiscriminatorLoss,
    *,
    prepare_clips: PrepareBatch,
    regression_loss: ComputeLoss,
) -> None:
    """Checks everything that needs no weights, then trains, and saves the student.

    Args:
        config: Of the run.
        student_loss: The loss of a turn of the student as its share of the step's mean, and sums to log.
        critic_loss: Likewise of the critic.
        discriminator_loss: Likewise of the discriminator, if there is one.
        prepare_clips: Clips of the data loader -> noisy latents, for the loss of regression.
        regression_loss: It, on held-out clips.
    """
    with user_errors():
        config = check_settings(config)
        check_student_lora(config.matching.student_lora)
        teacher, source = find_matching_teacher(config), find_critic(config)
        data = load_matching_data(config)
    if config.dry_run:
        print_plan(config, data)
        return
    made: list[Roles] = []

    def make_student(config: MatchingRunConfig, accelerator: Accelerator) -> CausalWanTransformer3DModel:
        made.append(make_roles(config, teacher, source, accelerator))
        return made[0].student

    also_embedded = [config.matching.teacher_negative_prompt] if config.matching.teacher_guidance_scale != 1 else []
    begun = begin_run(
        config,
        data,
        check_launch=check_matching_strategy,
        make_transformer=make_student,
        also_embedded=also_embedded,
    )
    roles, config = made.pop(), begun.inputs.config
    run, scores = start_roles(begun, roles)
    inputs = MatchingInputs(
        inputs=begun.inputs,
        student=run.student.unwrapped_model,
        schedule=SamplingSchedule(
            timesteps=config.method.inference_timesteps(), sampler=config.method.student_sampler
        ),
        latent_shape=begun.inputs.geometry.latent_shape(*config.data.shape),
        prepare_clips=prepare_clips,
        step=lambda: run.state.step,
    )
    train_run(
        begun,
        run,
        prepare_batch=inputs.prepare,
        losses={
            STUDENT: partial(student_loss, scores),
            CRITIC: critic_loss,
            DISCRIMINATOR: partial(discriminator_loss, scores),
        },
        turns=lambda step: [
            role for role in run.trainees if role != STUDENT or takes_student_turn(step, config.matching)
        ],
        summarize=partial(summarize_matching, config),
        validate=make_validation(begun, partial(regression_loss, config.method), prepare_clips, SampleMeasures()),
    )


def start_roles(begun: BegunRun, roles: Roles) -> tuple[Run, Scores]:
    """The run of all that is trained, and the networks that look at the student's clips."""
    config = begun.inputs.config
    models, matching = {STUDENT: roles.student, CRITIC: roles.critic}, config.matching
    if matching.adversarial_weight:
        models[DISCRIMINATOR] = Discriminator.of(roles.teacher, config.training.seed)
    rates = {CRITIC: matching.critic_learning_rate, DISCRIMINATOR: matching.adversarial_learning_rate}
    run = start_training(begun, models, role_rates={role: rate for role, rate in rates.items() if role in models})
    return run, Scores(
        config=config,
        accelerator=begun.accelerator,
        teacher=roles.teacher,
        critic=run.trainees[CRITIC].unwrapped_model,
        discriminator=run.trainees[DISCRIMINATOR].unwrapped_model if DISCRIMINATOR in models else None,
    )


def check_student_lora(student_lora: str | None) -> None:
    """Checks that there is something to go on from, if it is on this machine; a hub id is looked at when it is loaded.

    Raises:
        ValueError: If there is not.
    """
    if student_lora is None:
        return
    path = Path(student_lora)
    is_hub_id = not path.exists() and student_lora.count("/") == 1
    if not (is_hub_id or path.is_file() or (path / LORA_WEIGHTS_NAME).is_file()):
        what = "give whole weights as --generator_ckpt." if path.exists() else "which is not there."
        raise ValueError(
            f"student_lora must be the output folder of a run with --lora_rank, which holds {LORA_WEIGHTS_NAME}, got "
            f"{student_lora}, {what}"
        )


def check_matching_strategy(config: MatchingRunConfig, accelerator: Any) -> None:
    """Checks, before anything is encoded, that student and critic can be trained as the run is launched.

    Raises:
        ValueError: If they cannot.
    """
    check_strategy(config, accelerator, num_models=2)
    if context_mesh(accelerator) is not None:
        raise ValueError(
            "context parallelism shares the tokens of one model's passes, and three take part here; launch with "
            "accelerate_configs/fsdp2.yaml or ddp.yaml."
        )
