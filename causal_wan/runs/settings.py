"""Settings of a run that trains a student by regression, and what of them must fit together."""

from pathlib import Path

from causal_wan.config.fields import names_of
from causal_wan.config.ranges import Decay, checked_dataclass
from causal_wan.config.settings import (
    CacheConfig,
    HubConfig,
    MemoryConfig,
    ModelConfig,
    TrainingConfig,
    TrajectoriesConfig,
    ValidationConfig,
)
from causal_wan.data.settings import ClipShape, DataConfig, check_can_be_cached, check_waits_for_clips
from causal_wan.methods.matching_settings import MatchingConfig
from causal_wan.methods.settings import RegressionConfig


MAX_ROLLOUT_STEPS = 16  # passes a block in each step of training


@checked_dataclass
class RunConfig:
    """Settings of a run that trains a student, by group."""

    model: ModelConfig
    memory: MemoryConfig
    data: DataConfig
    method: RegressionConfig
    training: TrainingConfig
    validation: ValidationConfig
    cache: CacheConfig
    hub: HubConfig
    compile: bool = False
    """Compile the transformer's layers: faster steps, after a minute or so for each shape of clips."""
    dry_run: bool = False
    """Resolve the config, check the data, print the plan and the memory it takes, and stop; loads no weights."""

    def __post_init__(self) -> None:
        for shape in self.data.all_shapes():
            self.method.block_lengths(self.num_latent_frames(shape))
        check_waits_for_clips(self.data, self.training.dataloader_timeout)
        if self.cache_dir is not None:
            check_can_be_cached(self.data)
        if self.model.control_learning_rate_scale != 1 and not self.data.control_column:
            raise ValueError(
                "control_learning_rate_scale is about the input layer of a student with controls; name their columns "
                "with --control_column, or leave it out."
            )
        if self.memory.quantize_base and not self.model.lora_rank:
            raise ValueError(
                f"quantize_base {self.memory.quantize_base} freezes the base, so something else must be trained; add "
                "--lora_rank 64, or leave it out."
            )
        if self.compile and (self.memory.keep_attention_outputs or self.memory.quantize_base):
            raise ValueError(
                "compile makes one operation of a layer, in which neither keep_attention_outputs finds attention nor "
                "quantize_base unpacks weights; leave it or them out."
            )
        self._check_perceptual()
        if self.training.validate_first and not self.validation.has_work:
            raise ValueError(
                "validate_first needs something to validate; add --validation_prompts or --validation_metadata_path, "
                "or leave it out."
            )

    def _check_perceptual(self) -> None:
        if not self.method.perceptual_weight:
            return
        if self.memory.offload_vae:
            raise ValueError(
                "perceptual_weight needs the VAE's decoder on the device in every step, where offload_vae does not "
                "leave it; leave one out (--vae_dtype bf16 halves the VAE)."
            )
        if min(self.num_latent_frames(shape) for shape in self.data.all_shapes()) < 2:
            raise ValueError(
                "perceptual_weight compares latent frames after the first, of which the VAE makes a picture; clips "
                "must have more than that one: raise num_frames, or leave perceptual_weight out."
            )

    @property
    def validates(self) -> bool:
        """Whether there are validations at all, if there is something to validate."""
        return self.training.validation_steps > 0

    @property
    def held_out_path(self) -> str | None:
        """Table of the held-out clips, if they are wanted."""
        return self.validation.validation_metadata_path if self.validates else None

    @property
    def cache_dir(self) -> Path | None:
        """Folder of latents and prompt embeddings, if there is one."""
        if self.cache.latents_dir is not None:
            return Path(self.cache.latents_dir)
        return Path(self.training.output_dir) / "cache" if self.cache.cache_latents else None

    @property
    def encodes(self) -> bool:
        """Whether clips and prompts may have to be encoded, rather than read."""
        return self.cache_dir is None or self.cache.cache_latents

    def needs_vae(self, has_clips: bool, is_validated: bool) -> bool:
        """Whether weights of the VAE are needed: to encode clips, decode samples or compare what its decoder sees."""
        return (self.encodes and has_clips) or is_validated or self.method.perceptual_weight > 0

    def num_latent_frames(self, shape: ClipShape) -> int:
        """F, latent frames of a clip."""
        return self.data.geometry.num_latent_frames(shape.num_frames)


@checked_dataclass
class TrajectoryRunConfig(RunConfig, TrajectoriesConfig):
    """The same, of a run on trajectories of a teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.control_column:
            raise ValueError(
                "control_column needs clips to control, and a teacher's trajectories are none; train with "
                "train_video_regression.py, or leave it out."
            )


@checked_dataclass
class MatchingTrainingConfig(TrainingConfig):
    """The run: how long, how fast, what is kept."""

    adam_beta1: Decay = 0.0
    """Decay of the mean of gradients; 0 follows a critic that changes (Self Forcing, DMD2)."""


@checked_dataclass
class MatchingRunConfig(RunConfig):
    """The same, of a run of distribution matching."""

    training: MatchingTrainingConfig
    matching: MatchingConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_student()
        self._check_data()
        for name in ("student_lora", "critic_lora_rank"):
            if vars(self.matching)[name] is not None and not self.model.lora_rank:
                raise ValueError(f"{name} is about LoRA; add --lora_rank 64, or leave it out.")

    def _check_student(self) -> None:
        method = self.method
        if method.sink_size:
            raise ValueError(
                "sink_size is for sampling, and the pass that trains sees no sink; leave it out, and give it to "
                "generate.py."
            )
        if method.first_frame_probability:
            raise ValueError(
                "first_frame_probability gives students a picture, which the teacher knows nothing of; leave it out, "
                "and train with pictures by train_video_regression.py."
            )
        if method.perceptual_weight and not self.matching.regression_weight:
            raise ValueError(
                "perceptual_weight is part of the loss of regression, which has no part in this run; add "
                "--regression_weight 0.1, or leave it out."
            )
        if method.is_continuous and method.num_inference_steps > MAX_ROLLOUT_STEPS:
            raise ValueError(
                f"num_inference_steps must be the few steps that the student is to draw in, at most "
                f"{MAX_ROLLOUT_STEPS}, got {method.num_inference_steps}; add --num_inference_steps 4, or "
                "--timestep_sampling step_list with a --denoising_step_list."
            )

    def _check_data(self) -> None:
        if self.data.control_column:
            raise ValueError(
                "control_column is nothing that the teacher follows; train with controls by "
                "train_video_regression.py, or leave it out."
            )
        if self.matching.needs_clips:
            if self.matching.prompts_file is not None:
                raise ValueError(
                    "real_clip_probability, regression_weight and adversarial_weight need clips, but prompts_file "
                    "gives prompts alone; use --metadata_path, or leave them out."
                )
            return
        if len(self.data.all_shapes()) > 1:
            raise ValueError("clips that are drawn have one size and length; leave out buckets and schedules.")
        if self.data.streaming and self.matching.prompts_file is None:
            raise ValueError("the prompts of streams are not known beforehand; list them in a --prompts_file.")


TRAINING_SETTINGS = frozenset(names_of(TrajectoryRunConfig)) | frozenset(names_of(MatchingRunConfig))
"""All that a recipe of a training script may hold: it serves other scripts too, which pass over what is not theirs."""
