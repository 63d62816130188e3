"""What a batch of prompts, or of clips, becomes before the losses of distribution matching see it.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from causal_wan.data.samples import ClipBatch
from causal_wan.devices import to_device
from causal_wan.methods.adversarial import ramp
from causal_wan.methods.distribution_matching import draw_exit, draw_scored, draw_uses_clip, takes_student_turn
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.runs.inputs import Inputs, PrepareBatch, RegressionBatch
from causal_wan.sampling.noise import draw_noise
from causal_wan.sampling.rollout import SamplingSchedule
from causal_wan.sampling.self_forcing import ExitedRollout, roll_out_to_exit
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.training.weights import reshard


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What score networks look at beside the clip: `noise` `(B, C, F, H, W)`, at `timesteps` `(B,)`."""

    noise: torch.Tensor
    timesteps: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ToldApart:
    """What a discriminator takes beside the clips.

    Attributes:
        scored: At which it looks at real clips and at the student's.
        perturbation: More noise for real clips, `(B, C, F, H, W)`, of which a little is added.
        is_real: Which frames of real clips are no padding, bool `(B, F)`.
        share: Of its weight that the student's loss has by now.
    """

    scored: Scored
    perturbation: torch.Tensor
    is_real: torch.Tensor
    share: float


@dataclass(frozen=True, kw_only=True)
class MatchingBatch:
    """What the losses of student and critic are made of; a `causal_wan.training.steps.PreparedBatch`.

    Attributes:
        rollout: Of the student, for its own turn and the critic's.
        conditions: What it was to show.
        negative_conditions: What the teacher is guided away from; None if it is not guided.
        matching: At which teacher and critic are compared; None in a step without a turn of the student.
        critic: At which the critic is trained.
        clips: Real clips `(B, C, F, H, W)`, if they have a part in it.
        uses_clip: Where the teacher looks at them, bool `(B,)`; None is nowhere.
        regression: They for the loss of regression, if it has a part.
        told_apart: What a discriminator takes, if there is one.
        num_bad_samples: Clips that did not decode and were replaced.
        num_items: Latent frames of all clips, a scalar tensor.
        num_tokens: Patches of all clips.
        exit_step: Step of the schedule at which the rollout ended.
        num_steps: Of the schedule.
    """

    rollout: ExitedRollout
    conditions: Conditions
    negative_conditions: Conditions | None
    matching: Scored | None
    critic: Scored
    clips: torch.Tensor | None
    uses_clip: torch.Tensor | None
    regression: RegressionBatch | None
    told_apart: ToldApart | None
    num_bad_samples: int
    num_items: torch.Tensor
    num_tokens: int
    exit_step: int
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class MatchingInputs:
    """Makes batches of prompts or clips into rollouts, with all draws that the losses take.

    Everything random is a function of the seed and the sample's number, or the step's.

    Attributes:
        inputs: Of the run.
        student: What draws, unwrapped.
        schedule: At which it draws.
        latent_shape: (C, F, H, W) of clips that are not there.
        prepare_clips: Clips -> what regression takes.
        step: Tells how many steps are done.
    """

    inputs: Inputs
    student: CausalWanTransformer3DModel
    schedule: SamplingSchedule
    latent_shape: tuple[int, int, int, int]
    prepare_clips: PrepareBatch
    step: Callable[[], int]

    @torch.no_grad()
    def prepare(self, batch: ClipBatch) -> MatchingBatch:
        """Rolls the student out; called by all processes alike."""
        inputs, matching, step = self.inputs, self.inputs.config.matching, self.step()
        is_student_turn = takes_student_turn(step, matching)
        regression = self.prepare_clips(inputs, batch) if matching.regression_weight else None
        clips = None if regression is None else regression.noisy.latents
        if matching.needs_clips and clips is None:
            clips = inputs.find_latents(batch)
        shape = self.latent_shape if clips is None else tuple(clips.shape[1:])
        num_clips, num_frames = len(batch.prompts), shape[1]
        conditions = inputs.tell(batch.prompts, num_frames)
        negative = [matching.teacher_negative_prompt] * num_clips
        rollout, exit_step = self.roll_out(conditions, shape, batch.sample_numbers, step)
        return MatchingBatch(
            rollout=rollout,
            conditions=conditions,
            negative_conditions=inputs.tell(negative, num_frames) if matching.teacher_guidance_scale != 1 else None,
            matching=self.draw(RandomPurpose.MATCHING, shape, batch) if is_student_turn else None,
            critic=self.draw(RandomPurpose.CRITIC, shape, batch),
            clips=clips,
            uses_clip=self.draw_uses_clip(batch, num_frames) if matching.real_clip_probability else None,
            regression=regression,
            told_apart=self.tell_apart(batch, shape, step) if matching.adversarial_weight else None,
            num_bad_samples=len(batch.errors),
            num_items=to_device(torch.tensor(num_clips * num_frames), inputs.device),
            num_tokens=num_clips * inputs.geometry.num_tokens(shape),
            exit_step=exit_step,
            num_steps=len(self.schedule.timesteps),
        )

    def roll_out(
        self, conditions: Conditions, shape: tuple[int, int, int, int], sample_numbers: list[int], step: int
    ) -> tuple[ExitedRollout, int]:
        """Clips of the student, drawn in as many steps as the step of the run says, and the last of these."""
        seed, schedule = self.inputs.seed, self.schedule
        exit_step = draw_exit(len(schedule.timesteps), seed=seed, step=step)
        generators = [seeded_generator(seed, RandomPurpose.ROLLOUT, number) for number in sample_numbers]
        noise = draw_noise(len(sample_numbers), shape, schedule.num_draws, generator=generators)
        rollout = roll_out_to_exit(self.student, conditions, to_device(noise, self.inputs.device), schedule, exit_step)
        reshard(self.student)
        return rollout, exit_step

    def draw(self, purpose: RandomPurpose, shape: tuple[int, int, int, int], batch: ClipBatch) -> Scored:
        """Noise and timesteps of score networks, on the device."""
        noise, timesteps = draw_scored(
            shape,
            self.inputs.config.matching,
            seed=self.inputs.seed,
            purpose=purpose,
            sample_numbers=batch.sample_numbers,
        )
        return Scored(noise=to_device(noise, self.inputs.device), timesteps=to_device(timesteps, self.inputs.device))

    def tell_apart(self, batch: ClipBatch, shape: tuple[int, int, int, int], step: int) -> ToldApart:
        """What a discriminator takes, on the device."""
        valid = torch.tensor(self.inputs.count_valid_frames(batch))
        return ToldApart(
            scored=self.draw(RandomPurpose.ADVERSARIAL, shape, batch),
            perturbation=self.draw(RandomPurpose.PERTURBATION, shape, batch).noise,
            is_real=to_device(torch.arange(shape[1]) < valid[:, None], self.inputs.device),
            share=ramp(step, self.inputs.config.matching.adversarial_warmup_steps),
        )

    def draw_uses_clip(self, batch: ClipBatch, num_frames: int) -> torch.Tensor:
        """For which samples the teacher looks at the real clip, on the device."""
        uses_clip = draw_uses_clip(
            self.inputs.config.matching.real_clip_probability,
            seed=self.inputs.seed,
            sample_numbers=batch.sample_numbers,
            are_whole=[valid == num_frames for valid in self.inputs.count_valid_frames(batch)],
        )
        return to_device(uses_clip, self.inputs.device)
