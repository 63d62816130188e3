"""Settings of regression, what they imply, and which of them do not go together.

Shapes: B = batch, F = latent frames, K = levels of the step list, or bins of continuous ones.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from causal_wan.blocks import CausalConfig
from causal_wan.config.choices import LossSpace, LossType, LossWeighting
from causal_wan.config.ranges import (
    AttentionWindow,
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
from causal_wan.timesteps import NUM_TRAIN_TIMESTEPS, Sampler, check_denoising_step_list, shift_timestep


if TYPE_CHECKING:  # settings are read before torch is there; methods that make tensors import what they need
    import torch


BIN_WIDTH = 100  # of the timesteps that metrics of continuous levels are told by


@checked_dataclass
class RegressionConfig:
    """The method: which noise levels the student learns, and the loss."""

    generator_task: Literal["causal_video", "bidirectional_video"] = "causal_video"
    """causal_video draws one level per block and attends to past blocks; bidirectional_video draws one per clip."""
    num_frame_per_block: PositiveInt = 3
    """Latent frames of a block; the latent frames of a clip must divide by it. Ignored by bidirectional_video."""
    independent_first_frame: bool = False
    """The first latent frame is a block of its own, as in image-to-video."""
    local_attn_size: AttentionWindow = -1
    """Latent frames that a block sees, counted back from its end; -1 is all."""
    sink_size: NonNegativeInt = 0
    """First latent frames that generation keeps in its cache although the window has left them."""
    denoising_step_list: tuple[Timestep, ...] = (1000, 757, 522, 0)
    """Timesteps to train on, from noise to data; 0 makes blocks enter clean, as context. Sampling drops the 0, and so
    does training with context clean or augmented. Ignored by continuous timestep_sampling."""
    warp_denoising_step: bool = False
    """Shift the step list towards noise by timestep_shift. The default list is shifted already (shift 8)."""
    timestep_sampling: Literal["step_list", "uniform", "logit_normal"] = "step_list"
    """step_list draws entries of denoising_step_list, for sampling at them. The others draw any timestep, for sampling
    in any number of steps along the flow: 1000 u with u uniform, or the sigmoid of a normal variable, shifted by
    timestep_shift."""
    timestep_shift: TimestepShift = 5.0
    """k in 1000 k u / (1 + (k - 1) u): towards noise above 1. Always acts on continuous levels, and on the steps that
    their students sample in; on a step list only with warp_denoising_step."""
    logit_mean: Annotated[float, Range(ge=-20, le=20, hint="far from 0 all levels are the same")] = 0.0
    """Mean of the normal variable of logit_normal; above 0 draws more noise."""
    logit_std: PositiveFloat = 1.0
    """Its standard deviation."""
    clean_block_probability: Annotated[float, Range(ge=0, lt=1)] = 0.0
    """Share of the blocks that enter clean, as context, under continuous levels, like the 0 of a step list. Without it
    (and with shift 5) 1 % of the blocks have a timestep below 50, while in sampling all past blocks are clean."""
    num_inference_steps: PositiveInt = 50
    """Steps that a student of continuous levels samples in (validation, generate.py, evaluate.py)."""
    sampler: Sampler | None = None
    """How the student goes from step to step there: renoise noises its prediction anew, euler keeps its noise and
    follows the flow. None is renoise for a step list and euler for continuous levels."""
    context: Literal["noisy", "clean", "augmented"] = "noisy"
    """What a block sees of those before it. noisy: their noisy selves, each at its level (diffusion forcing). clean:
    the clip itself (teacher forcing), at twice the tokens. augmented: the clip with a little noise."""
    context_noise: Annotated[float, Range(gt=0, le=1000, hint="for none use --context clean")] = 100.0
    """Largest timestep of the noise of context augmented; it is drawn for each clip, uniformly from 0 on."""
    first_frame_probability: Share = 0.0
    """Share of the samples whose first latent frame is given, as by a picture: it enters clean and is in no loss.
    Above 0, validation and evaluate.py give the student the first frame of held-out clips; see generate.py --image."""
    loss_type: LossType = "mse"
    """Error that is averaged."""
    loss_space: LossSpace = "latents"
    """latents compares predicted with clean latents; velocity weighs each level by 1 / sigma^2 against that (mse)."""
    loss_weighting: LossWeighting = "none"
    """Weights by level. bell: most for the middle, as flow matching in CausVid and Self Forcing, there of velocity.
    min_snr: min(SNR, snr_gamma) for latents, and sigma^2 times that for velocity."""
    snr_gamma: PositiveFloat = 5.0
    """gamma of min_snr."""
    min_loss_weight: NonNegativeFloat = 0.1
    """No level gets less weight than this: bell and min_snr both give none to pure noise, where sampling starts."""
    perceptual_weight: NonNegativeFloat = 0.0
    """Weight of a second error beside that of the latents: of the features that the VAE's decoder has of them, in a
    random crop (latent perceptual loss). 0 is without; it keeps the VAE on the device and takes memory."""
    perceptual_max_timestep: Annotated[float, Range(gt=0, le=1000, hint="700 is the default")] = 700.0
    """Only frames of this timestep or less are compared so: of much noise, a mean is predicted, and no picture."""

    def __post_init__(self) -> None:
        _ = self.causal  # refuses what does not go together
        check_denoising_step_list(self.denoising_step_list)
        self._check_levels()
        self._check_context()
        self._check_weights()
        self._check_perceptual()

    def _check_levels(self) -> None:
        if self.is_continuous and self.warp_denoising_step:
            raise ValueError(
                f"warp_denoising_step is about denoising_step_list, which timestep_sampling {self.timestep_sampling} "
                "does not draw from; leave it out: timestep_shift acts on continuous levels as it is."
            )
        if not self.is_continuous and self.clean_block_probability:
            raise ValueError(
                "clean_block_probability is about continuous levels, but timestep_sampling is step_list; put a 0 at "
                "the end of denoising_step_list instead."
            )

    def _check_context(self) -> None:
        if not self.has_clean_context:
            return
        if self.generator_task == "bidirectional_video":
            raise ValueError(
                f"context {self.context} is about the blocks before a block, but bidirectional_video has one block "
                "only; use --context noisy or --generator_task causal_video."
            )
        if self.clean_block_probability:
            raise ValueError(
                f"clean_block_probability makes some blocks enter clean as context, but with context {self.context} "
                "all blocks have a clean past; use one or the other."
            )

    def _check_weights(self) -> None:
        starts_at_noise = not self.is_continuous and self.denoising_step_list[0] == NUM_TRAIN_TIMESTEPS
        if self.loss_weighting != "none" and not self.min_loss_weight and starts_at_noise:
            raise ValueError(
                f"min_loss_weight must be above 0 with a step list that begins with {NUM_TRAIN_TIMESTEPS}, since "
                f"loss_weighting {self.loss_weighting} gives it no weight: the first step of sampling would never be "
                "learned; use 0.1."
            )

    def _check_perceptual(self) -> None:
        if not self.perceptual_weight or self.is_continuous:
            return
        lowest = min(step for step in self.denoising_step_list if step > 0)
        if self.warp_denoising_step:
            lowest = shift_timestep(lowest, self.timestep_shift)
        if lowest > self.perceptual_max_timestep:
            raise ValueError(
                f"perceptual_max_timestep must be at least the lowest level above 0 of the step list, {lowest:g}, got "
                f"{self.perceptual_max_timestep:g}: no frame would ever be compared; raise it."
            )

    @property
    def is_continuous(self) -> bool:
        """Whether levels are drawn from a range, and not from the step list."""
        return self.timestep_sampling != "step_list"

    @property
    def has_clean_context(self) -> bool:
        """Whether blocks see the clip itself before them (teacher forcing)."""
        return self.context != "noisy"

    @property
    def bin_width(self) -> float | None:
        """Of the bins that metrics of continuous levels are told by; None for a step list."""
        return BIN_WIDTH if self.is_continuous else None

    @property
    def causal(self) -> CausalConfig:
        """What the transformer has to know: blocks (none of a bidirectional student), window, sink and first frame."""
        is_causal = self.generator_task == "causal_video"
        return CausalConfig(
            num_frame_per_block=self.num_frame_per_block if is_causal else None,
            local_attn_size=self.local_attn_size,
            sink_size=self.sink_size,
            independent_first_frame=self.independent_first_frame,
        )

    def block_lengths(self, num_latent_frames: int) -> list[int]:
        """Latent frames of each block; see `causal_wan.blocks.frame_block_lengths`."""
        return self.causal.block_lengths(num_latent_frames)

    def levels(self) -> "torch.Tensor":
        """What metrics are told by, float32 `(K,)`: timesteps of the step list after warping, or where bins begin.

        With a clean context the list has no 0: every block is to be learned.
        """
        import torch

        from causal_wan.flow import sampling_timesteps, training_timesteps

        if self.is_continuous:
            return torch.arange(0, NUM_TRAIN_TIMESTEPS, BIN_WIDTH, dtype=torch.float32)
        of_list = sampling_timesteps if self.has_clean_context else training_timesteps
        return of_list(
            self.denoising_step_list,
            warp_denoising_step=self.warp_denoising_step,
            timestep_shift=self.timestep_shift,
        )

    @property
    def num_levels(self) -> int:
        """K, told without a tensor: a step asks for it."""
        if self.is_continuous:
            return len(range(0, NUM_TRAIN_TIMESTEPS, BIN_WIDTH))
        return sum(step > 0 or not self.has_clean_context for step in self.denoising_step_list)

    def inference_timesteps(self) -> "torch.Tensor":
        """The timesteps that the student is sampled at, float32 `(num_steps,)`, from noise to data."""
        from causal_wan.flow import inference_timesteps

        if self.is_continuous:
            return inference_timesteps(self.num_inference_steps, self.timestep_shift)
        levels = self.levels()
        return levels[levels > 0]

    @property
    def student_sampler(self) -> Sampler:
        """How the student is sampled; see `causal_wan.sampling.rollout.Rollout`."""
        return self.sampler or ("euler" if self.is_continuous else "renoise")

    def loss_weights(self, sigmas: "torch.Tensor") -> "torch.Tensor":
        """Weights of frames at these levels, of the same shape; see `causal_wan.methods.losses.level_weights`."""
        from causal_wan.methods.losses import level_weights

        return level_weights(
            sigmas,
            self.loss_weighting,
            loss_space=self.loss_space,
            timestep_shift=self.timestep_shift,
            snr_gamma=self.snr_gamma,
            min_loss_weight=self.min_loss_weight,
        )

    def describe(self) -> str:
        """The method in a line."""
        if self.is_continuous:
            levels = f"{self.timestep_sampling} levels with shift {self.timestep_shift:g}"
        else:
            levels = "levels " + " ".join(f"{level:g}" for level in self.levels().tolist())
        context = f", {self.context} context" if self.has_clean_context else ""
        if self.first_frame_probability:
            context += f", first frame given to {self.first_frame_probability:.0%} of the clips"
        weights = f" with {self.loss_weighting} weights" if self.loss_weighting != "none" else ""
        loss = f"{self.loss_type} of {self.loss_space}{weights}"
        if self.perceptual_weight:
            loss += f" + {self.perceptual_weight:g} x decoder features up to timestep {self.perceptual_max_timestep:g}"
        return f"{self.generator_task}, {levels}{context}, {loss}"
