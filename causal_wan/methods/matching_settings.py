"""Settings of distribution matching: the teacher, the critic, and how often each has its turn."""

from typing import Annotated

from causal_wan.config.choices import LocalPath
from causal_wan.config.ranges import (
    GuidanceScale,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    Timestep,
    TimestepShift,
    checked_dataclass,
)


@checked_dataclass
class MatchingConfig:
    """Distribution matching: the teacher, the critic, and how often each has its turn."""

    teacher: LocalPath | None = None
    """Whose clips the student's are to be like: output folder of a run, diffusers folder, hub id or file of weights;
    None is the base model. Tune it on your clips first: see docs/distribution_matching.md."""
    teacher_guidance_scale: GuidanceScale = 4.0
    """Classifier-free guidance of the teacher, which the student learns to do without; 1 is without. What Self Forcing
    calls real_guidance_scale 3 is 4 here: it adds 3 times the difference to the guided prediction's own."""
    teacher_negative_prompt: str = ""
    """What the teacher's guidance leads away from."""
    student_lora: LocalPath | None = None
    """With --lora_rank: the LoRA that the student's goes on from, the result of a run on the same base model."""
    critic: LocalPath | None = None
    """What the critic starts as, if not as the teacher: such as a model of 1.3B beside a teacher of 14B."""
    critic_learning_rate: Annotated[float, Range(gt=0, hint="try 4e-7, or 2e-5 for LoRA")] = 4e-7
    """Of the critic. 4e-7 suits all weights (Self Forcing); LoRA wants about 2e-5."""
    critic_lora_rank: PositiveInt | None = None
    """With --lora_rank: rank of the critic's adapters; None is the student's, or that of a teacher that is a LoRA."""
    student_every: PositiveInt = 5
    """Steps between two updates of the student; the critic is updated in every step."""
    critic_warmup_steps: NonNegativeInt = 100
    """First steps, in which the critic alone is updated: it has to know the student's clips."""
    matching_timesteps: tuple[Timestep, Timestep] = (20.0, 980.0)
    """Least and largest timestep at which teacher and critic look at clips."""
    matching_timestep_shift: TimestepShift = 5.0
    """Shift of these timesteps towards noise, as timestep_shift."""
    prompts_file: LocalPath | None = None
    """Text with a prompt a line, or CSV or JSON lines with a `prompt` column; in the place of the tables' prompts."""
    real_clip_probability: Share = 0.0
    """Share of the samples for which the teacher looks at the real clip of the prompt in the place of the student's
    (data forcing). For a student that has converged without; it needs clips."""
    regression_weight: NonNegativeFloat = 0.0
    """Weight of the loss of train_video_regression.py beside; it needs clips."""

    adversarial_weight: NonNegativeFloat = 0.0
    """Weight of an adversarial loss beside: a small discriminator on features of the teacher learns to tell real clips
    from the student's. It needs clips, and many of them; try 0.003."""
    adversarial_learning_rate: PositiveFloat = 1e-4
    """Of the discriminator."""
    adversarial_warmup_steps: NonNegativeInt = 500
    """First steps, in which the discriminator alone is updated by it; over as many more the weight grows."""
    adversarial_penalty: NonNegativeFloat = 100.0
    """Weight of how much a little noise changes the discriminator's answer to real clips (R1)."""

    def __post_init__(self) -> None:
        low, high = self.matching_timesteps
        if not 0 < low < high:
            raise ValueError(
                f"matching_timesteps must be the least and the largest, above 0, got {low:g} {high:g}; 20 980 is a "
                "good choice."
            )

    @property
    def needs_clips(self) -> bool:
        """Whether real clips have a part in it, or prompts are enough."""
        return self.real_clip_probability > 0 or self.regression_weight > 0 or self.adversarial_weight > 0

    def describe(self) -> str:
        """It in a line."""
        guidance = f", guidance {self.teacher_guidance_scale:g}" if self.teacher_guidance_scale != 1 else ""
        clips = f", real clips for {self.real_clip_probability:.0%}" if self.real_clip_probability else ""
        clips += f", regression x {self.regression_weight:g}" if self.regression_weight else ""
        clips += f", adversarial x {self.adversarial_weight:g}" if self.adversarial_weight else ""
        return (
            f"distribution matching{guidance}{clips}; critic every step, student every {self.student_every} after "
            f"{self.critic_warmup_steps}"
        )
