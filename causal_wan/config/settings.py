"""Settings of a run but those of its clips (`data_config`) and of its method (`regression_config`), by group.

Like those, it imports nothing that takes time: `--help` and mistakes in flags are answered before torch is there.
"""

from typing import Annotated, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from causal_wan.config.choices import LocalPath
from causal_wan.config.ranges import (
    Decay,
    GuidanceScale,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    checked_dataclass,
)


# Attention projections and feed-forward of every layer; what WAN LoRAs are commonly trained on.
DEFAULT_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
LatentsDtype = Literal["bf16", "fp16", "fp32"]
DATALOADER_TIMEOUT = 1800.0  # seconds: far longer than any clip should take, and an end to waiting
KVCacheDtype = Literal["auto", "int8"]


@checked_dataclass
class BaseModelConfig:
    """The base model, and how it encodes clips and prompts."""

    pretrained_model_name_or_path: LocalPath
    """Diffusers folder or hub id of a WAN text-to-video pipeline, e.g. Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    max_sequence_length: PositiveInt = 512
    """Tokens that prompts are cut and padded to; 512 is what WAN was trained with."""
    vae_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE; bf16 rounds the latents."""


@checked_dataclass
class ModelConfig(BaseModelConfig):
    """The base model, and which of its weights are trained."""

    generator_ckpt: LocalPath | None = None
    """Start the student from these weights: a diffusers folder, the result of a run, a .safetensors, or a .pt of
    CausVid or Self Forcing, in diffusers' names or WAN's own."""
    lora_rank: NonNegativeInt = 0
    """Train LoRA adapters of this rank; 0 trains all weights."""
    lora_alpha: PositiveFloat | None = None
    """Adapters are scaled by alpha / rank; None is the rank (scale 1)."""
    lora_target_modules: tuple[str, ...] = DEFAULT_LORA_TARGETS
    """Linear layers that get adapters, by the ends of their names."""
    control_learning_rate_scale: PositiveFloat = 1.0
    """With --control_column: the learning rate of the input layer, over that of all other weights."""

    def __post_init__(self) -> None:
        if not self.lora_target_modules:
            raise ValueError(f"lora_target_modules must name linear layers, e.g. {' '.join(DEFAULT_LORA_TARGETS)}.")


@checked_dataclass
class MemoryConfig:
    """What to trade for memory; see docs/memory_and_speed.md."""

    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: far less memory for a third more compute."""
    gradient_checkpointing_interval: PositiveInt = 1
    """Recompute every n-th layer only: 2 is half of them."""
    keep_attention_outputs: bool = False
    """Recompute layers but for their attention, whose outputs are kept."""
    offload_activations: bool = False
    """Keep the inputs of recomputed layers in the host's memory until the backward pass."""
    quantize_base: Literal["nf4", "int8", "fp8"] | None = None
    """Store the frozen base of a LoRA run in 4 or 8 bits: nf4 (QLoRA) and int8 by bitsandbytes, fp8 by diffusers."""
    vae_slicing: bool = False
    """Encode and decode the clips of a batch one after another."""
    vae_tiling: bool = False
    """Encode and decode clips in overlapping tiles; blends them, so that latents differ a little from whole ones."""
    offload_vae: bool = False
    """Keep the VAE in the host's memory while it is not in use."""
    kv_cache_dtype: KVCacheDtype = "auto"
    """Precision of the keys and values that sampling remembers of earlier blocks: auto is that of the passes, int8
    half of 16 bits, scaled by token and head. Videos change about as much as from float32 to bf16."""

    def __post_init__(self) -> None:
        for name in ("keep_attention_outputs", "offload_activations"):
            if getattr(self, name) and not self.gradient_checkpointing:
                raise ValueError(f"{name} is about recomputed layers; add --gradient_checkpointing.")


@checked_dataclass
class TrainingConfig:
    """The run: how long, how fast, what is kept."""

    output_dir: LocalPath
    """Folder of the result, the checkpoints, the logs and the validation videos."""
    seed: Annotated[int, Range(ge=0, le=2**32 - 1, hint="numpy takes no other")] = 0
    """Seeds the order of the data, the noise and the draws of noise levels."""
    max_train_steps: PositiveInt = 10_000
    """Optimizer steps of the whole run."""
    train_batch_size: PositiveInt = 1
    """Clips in one pass of one process."""
    gradient_accumulation_steps: PositiveInt = 1
    """Passes of each process that make one optimizer step."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the optimizer's states in 8 bits (bitsandbytes)."""
    learning_rate: Annotated[float, Range(gt=0, hint="try 2e-6, or 1e-4 for LoRA")] = 2e-6
    """2e-6 suits full fine-tuning (CausVid, Self Forcing); LoRA wants about 1e-4."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """One of diffusers' schedules."""
    lr_warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises from 0; not with the plain constant schedule."""
    adam_beta1: Decay = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: Decay = 0.999
    """Decay of the mean of squared gradients."""
    adam_weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """Keeps AdamW from dividing by zero."""
    max_grad_norm: Annotated[float, Range(ge=0, hint="0 leaves gradients as they are")] = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | None = None
    """Precision of the passes; what `accelerate launch` or its config file says by default. fp8 has the products of
    layers in 8 bits (torchao), for GPUs from Hopper on, and the rest in bf16."""
    allow_tf32: bool = False
    """TensorFloat-32 matrix products on Ampere GPUs and newer."""
    use_ema: bool = False
    """Keep an exponential moving average of the weights; it is what is validated and saved as the result."""
    ema_decay: Decay = 0.99
    """Decay of the average; reached after a warm-up."""
    dataloader_num_workers: NonNegativeInt = 2
    """Processes that read and decode ahead, for each training process."""
    dataloader_timeout: PositiveFloat = DATALOADER_TIMEOUT
    """Seconds that a step waits for its clips, at most. A process that hangs is noticed ten minutes later."""
    checkpointing_steps: PositiveInt = 500
    """Steps between checkpoints, from which a run can be resumed."""
    checkpoints_total_limit: PositiveInt | None = None
    """How many checkpoints are kept, the newest; None keeps all."""
    resume_from_checkpoint: LocalPath | None = None
    """`latest` (starts anew when there is none) or the path of a checkpoint."""
    logging_steps: PositiveInt = 10
    """Steps between log entries, each over all steps since the last."""
    report_to: tuple[Literal["wandb", "tensorboard", "trackio", "all", "none"], ...] = ("tensorboard",)
    """Trackers, any number; `all` that are installed. metrics.jsonl is written in any case."""
    tracker_project_name: str = "causal-wan"
    """Project that wandb and trackio file the run under."""
    run_name: str | None = None
    """What trackers call the run; the name of the output folder by default. A resumed run keeps its name."""
    validation_steps: Annotated[int, Range(ge=0, hint="0 is no validation")] = 500
    """Steps between validations; there is one after the last step too. 0 is none at all: prompts and held-out clips of
    validation are then not even read, and nothing is kept in memory for them."""
    validate_first: bool = False
    """Validate before the first step of a new run too (step 0): what does not fit or work shows at once."""
    max_nonfinite_steps: PositiveInt = 10
    """Steps in a row that may be skipped because the loss is not finite, before the run stops."""
    profile: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step to profile, e.g. 10 12: a trace and a chart of a step's parts go to profile/."""

    def __post_init__(self) -> None:
        if self.validate_first and not self.validation_steps:
            raise ValueError("validate_first asks for a validation, validation_steps 0 for none; leave one out.")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to must name trackers, or be none alone, got {' '.join(self.report_to)}.")
        if self.run_name is not None and (self.run_name in ("", ".", "..") or "/" in self.run_name):
            raise ValueError(f"run_name must serve as the name of a folder, got {self.run_name!r}; leave out slashes.")
        if self.profile is not None and not self.profile[0] <= self.profile[1] <= self.max_train_steps:
            raise ValueError(
                f"profile must be a first and a last step, from 1 to max_train_steps={self.max_train_steps}, got "
                f"{self.profile[0]} {self.profile[1]}; 10 12 is a good choice."
            )
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "lr_warmup_steps needs a schedule that warms up; use --lr_scheduler constant_with_warmup."
            )

    def samples_per_step(self, num_replicas: int) -> int:
        """Clips of an optimizer step, over all passes and processes; see `count_replicas`."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_replicas


@checked_dataclass
class ValidationConfig:
    """What a run is judged by while it trains."""

    validation_prompts: tuple[str, ...] = ()
    """Prompts to sample at each validation."""
    validation_metadata_path: LocalPath | None = None
    """CSV of held-out clips, like metadata_path: their loss is measured and their prompts are sampled."""
    num_validation_samples: PositiveInt = 4
    """How many of the held-out clips are used, from the first row on."""
    validation_guidance_scale: GuidanceScale = 1.0
    """Classifier-free guidance of the samples above 1, for students of any level; train with --caption_dropout."""

    @property
    def negative_prompts(self) -> list[str]:
        """What is embedded beside the prompts: the empty prompt, if samples are guided."""
        return [""] if self.validation_guidance_scale > 1 else []

    @property
    def has_work(self) -> bool:
        """Whether there is anything to sample or to measure."""
        return bool(self.validation_prompts) or self.validation_metadata_path is not None


@checked_dataclass
class CacheConfig:
    """Latents and prompt embeddings on disk, in the place of VAE and text encoder."""

    latents_dir: LocalPath | None = None
    """Folder that precompute_latents.py has filled; nothing is encoded then."""
    cache_latents: bool = False
    """Keep latents as they are encoded, in latents_dir else in `cache` of the output folder, and read them after."""
    latents_dtype: LatentsDtype = "bf16"
    """Precision that latents are kept in."""


@checked_dataclass
class TrajectoriesConfig:
    """Trajectories of a teacher, in the place of clips."""

    trajectories_dir: LocalPath
    """Folder that precompute_trajectories.py has filled."""


@checked_dataclass
class HubConfig:
    """Where the result goes beside the output folder. The token is that of `hf auth login`, or HF_TOKEN's."""

    push_to_hub: bool = False
    """Upload the result, with a model card, to the hub."""
    hub_model_id: str | None = None
    """Name of the repository, USER/NAME; None is the name of the output folder, of the user who is logged in."""
    hub_strategy: Literal["end", "every_save"] = "end"
    """every_save also uploads each checkpoint while training goes on, as last-checkpoint/."""
    hub_private_repo: bool = False
    """Make a new repository private."""

    def __post_init__(self) -> None:
        if not self.push_to_hub and (self.hub_model_id or self.hub_strategy != "end" or self.hub_private_repo):
            raise ValueError("settings of the hub are given, but nothing is to be uploaded; add --push_to_hub.")
        if self.hub_model_id is not None:
            try:
                validate_repo_id(self.hub_model_id)
            except HFValidationError as error:
                raise ValueError(f"hub_model_id must be a name on the hub such as me/my-wan: {error}") from None
