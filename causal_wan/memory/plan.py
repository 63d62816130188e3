"""How much memory a run will take on each GPU: found by running its parts without their numbers.

Passes of a shallow copy of the model are simulated (`causal_wan.memory.simulation`); layers are all alike, so two
depths tell the rest. What is not foreseen: what CUDA itself and cuDNN's workspaces take (about a GiB), and memory lost
between blocks of the allocator.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from causal_wan.config.settings import MemoryConfig
from causal_wan.geometry import LatentGeometry
from causal_wan.memory.simulation import (
    Workload,
    build,
    build_vae,
    simulate_comparing,
    simulate_decoding,
    simulate_encoding,
    simulate_measuring,
    simulate_passes,
    simulate_sampling,
)


GIB = 2**30
CUDA_OVERHEAD = GIB  # what is not foreseen, roughly
SHALLOW_DEPTHS = (2, 4)  # times the checkpointing interval
ENCODED_FRAMES = (17, 25)
DECODED_FRAMES = (4, 5)  # latent ones: what the convolutions remember is complete
BYTES_PER_PARAMETER = {"nf4": 0.5 + 4 / 64, "int8": 1, "fp8": 1}  # nf4 has a float32 scale for each 64 weights
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}  # a trainable parameter


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """Bytes that the parts of a validation take on top of all that waits meanwhile.

    Attributes:
        waiting: Only meanwhile: gradients that keep their place, weights that lend theirs to the average, what FSDP2
            has gathered.
        cache: Keys and values that a rollout remembers.
        sampling: A rollout, these included.
        decoding: Of a video.
        measuring: The loss of a held-out clip.
    """

    waiting: int = 0
    cache: int = 0
    sampling: int = 0
    decoding: int = 0
    measuring: int = 0

    @property
    def peak(self) -> int:
        """The worst moment of a validation."""
        return self.waiting + max(self.sampling, self.decoding, self.measuring)

    def __str__(self) -> str:
        parts = {
            f"sampling ({self.cache / GIB:.1f} of it keys and values)": self.sampling,
            "decoding": self.decoding,
            "held-out loss": self.measuring,
        }
        return ", ".join(f"{name} {num_bytes / GIB:.1f}" for name, num_bytes in parts.items() if num_bytes)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU, by what they hold.

    Attributes:
        workload: That it is for.
        weights: Of the transformer, between passes.
        optimizer: Its states, and the moving average.
        passes: Gradients, activations and weights that are gathered or cast, at the worst moment of a step.
        vae: Weights of the VAE while a step runs.
        encoding: What encoding a batch takes on top of all that waits meanwhile.
        text_encoder: Before the transformer is loaded, and while a step runs if it is kept.
        validation: What the parts of a validation take.
        rollout: What clips that the student draws in a step take on top of all that waits meanwhile.
        rollout_cache: Keys and values that it remembers for it, a part of this.
    """

    workload: Workload
    weights: int
    optimizer: int
    passes: int
    vae: int = 0
    encoding: int = 0
    text_encoder: int = 0
    keeps_text_encoder: bool = False
    validation: ValidationPlan = ValidationPlan()
    rollout: int = 0
    rollout_cache: int = 0

    @property
    def moments(self) -> dict[str, int]:
        """Bytes at the worst of each of the moments that the run consists of."""
        waiting = self.weights + self.optimizer + self.vae + self.keeps_text_encoder * self.text_encoder
        validation = self.validation
        parts = {
            "in a step": (waiting, self.passes),
            "rolling out": (waiting, self.rollout),
            "encoding clips": (waiting, self.encoding),
            "embedding prompts": (0, self.text_encoder),
            "sampling in validation": (waiting + validation.waiting, validation.sampling),
            "decoding in validation": (waiting + validation.waiting, validation.decoding),
            "validation's loss": (waiting + validation.waiting, validation.measuring),
        }
        return {moment: beside + own for moment, (beside, own) in parts.items() if own}

    @property
    def peak(self) -> int:
        """The worst moment of the run."""
        return max(self.moments.values())

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradients and activations": self.passes,
            "VAE": self.vae,
        }
        if self.keeps_text_encoder:
            parts["text encoder"] = self.text_encoder
        listed = ", ".join(f"{name} {num_bytes / GIB:.1f}" for name, num_bytes in parts.items())
        validation = f"encoding clips {self.encoding / GIB:.1f}, validation {self.validation.peak / GIB:.1f}"
        rollout = f"rollouts {self.rollout / GIB:.1f}, {self.rollout_cache / GIB:.1f} of it keys and values; "
        others = (rollout if self.rollout else "") + validation
        worst = max(self.moments, key=self.moments.__getitem__)
        return f"{self.peak / GIB:.1f} GiB at most, {worst} ({listed}; {others})"


def plan_training(workload: Workload) -> MemoryPlan:
    """The memory of steps and of validation, without VAE and text encoder."""
    sizes = parameter_sizes(workload)
    (passes,) = deepen(workload, simulate_passes)
    compared = 0 if workload.comparing_vae is None else simulate_comparing(workload)
    passes = compared + (passes - compared) // workload.num_sharing_a_clip  # each compares whole clips
    if workload.memory.quantize_base is not None:  # what is cast for a pass lives until the layer's backward is done
        num_layers, interval = workload.architecture["num_layers"], workload.memory.gradient_checkpointing_interval
        recomputed = num_layers // interval if workload.memory.gradient_checkpointing else 0
        passes += workload.dtype.itemsize * sizes.of_a_layer * (num_layers - recomputed + (recomputed > 0))
    sharded = workload.num_shards if workload.sharding != "none" else 1
    states = OPTIMIZER_BYTES[workload.optimizer] * sizes.trainable + (4 * sizes.trainable if workload.use_ema else 0)
    weights = sizes.frozen_bytes + 4 * sizes.trainable
    if workload.sharding == "optimizer":  # the model in 16 bits on each GPU, its float32 weights with the states
        weights = sizes.frozen_bytes + workload.dtype.itemsize * sizes.trainable
        states += 4 * sizes.trainable
    if workload.sharding == "weights":
        weights //= sharded
        # Two layers are gathered at a time, gradients of one are still whole, all others are sharded.
        gathered = workload.dtype.itemsize * (2 * sizes.of_a_layer + sizes.outside_layers)
        passes += gathered + 4 * sizes.trainable // sharded
    states //= sharded
    if workload.offload:
        weights, states = 0, 0
    validation = ValidationPlan() if workload.validation is None else _plan_passes_of_validation(workload, sizes)
    return MemoryPlan(workload=workload, weights=weights, optimizer=states, passes=passes, validation=validation)


def _plan_passes_of_validation(workload: Workload, sizes: "ParameterSizes") -> ValidationPlan:
    """What sampling and the held-out loss take, of whole clips: in validation, processes never share the tokens."""
    validation, itemsize = workload.validation, workload.dtype.itemsize
    waiting = 4 * sizes.trainable * (workload.keeps_gradients + validation.keeps_copy)
    of_passes = 0
    if workload.sharding == "weights":  # what is outside of layers stays gathered until the end
        waiting += itemsize * sizes.outside_layers
        of_passes = 2 * itemsize * sizes.of_a_layer
    if workload.memory.quantize_base is not None:
        of_passes = itemsize * sizes.of_a_layer
    cache = sampling = measuring = 0
    if validation.samples:
        cache, sampling = deepen(workload, simulate_sampling)
        sampling += of_passes
    if validation.measures_loss:
        (measuring,) = deepen(workload, simulate_measuring)
        measuring += of_passes
    return ValidationPlan(waiting=waiting, cache=cache, sampling=sampling, measuring=measuring)


def deepen(workload: Workload, simulate: Callable[[Workload, int], tuple[int, ...]]) -> tuple[int, ...]:
    """What a simulation of so many layers gives for all of them."""
    num_layers, interval = workload.architecture["num_layers"], workload.memory.gradient_checkpointing_interval
    depths = sorted({min(num_layers, depth * interval) for depth in SHALLOW_DEPTHS})
    simulated = zip(*(simulate(workload, depth) for depth in depths), strict=True)
    return tuple(_extrapolate(dict(zip(depths, values, strict=True)), num_layers) for values in simulated)


def describe_shortage(plan: MemoryPlan, free: int) -> str | None:
    """What to do when a run is likely to take more than is free [bytes], or None."""
    needed, workload, memory = plan.peak + CUDA_OVERHEAD, plan.workload, plan.workload.memory
    if needed <= free:
        return None
    short = {moment for moment, num_bytes in plan.moments.items() if num_bytes + CUDA_OVERHEAD > free}
    in_a_step, sampling = "in a step" in short, "sampling in validation" in short
    sharded, validation = workload.sharding == "weights", workload.validation
    levers = {
        "--gradient_checkpointing": in_a_step and not memory.gradient_checkpointing,
        "--offload_activations": in_a_step and memory.gradient_checkpointing and not memory.offload_activations,
        "--optimizer adamw8bit": not workload.lora_rank and not sharded and workload.optimizer == "adamw",
        "--quantize_base nf4": workload.lora_rank > 0 and not sharded and memory.quantize_base is None,
        "--lora_rank 64": not workload.lora_rank,
        "--vae_tiling": bool(short & {"encoding clips", "decoding in validation"}) and not memory.vae_tiling,
        "--kv_cache_dtype int8": sampling and plan.validation.cache > 0 and memory.kv_cache_dtype == "auto",
        "a smaller --local_attn_size": sampling and plan.validation.cache > 0,
        "--validation_guidance_scale 1": sampling and validation.is_guided,
        "precompute_latents.py and --latents_dir": bool(short & {"encoding clips", "embedding prompts"}),
        "a smaller --train_batch_size": in_a_step and workload.batch_size > 1,
        "more GPUs with accelerate_configs/fsdp2.yaml": short != {"embedding prompts"},
        "fewer --num_frames or a smaller --height and --width": short != {"embedding prompts"},
        "--validation_steps 0 (no validation)": all("validation" in moment for moment in short),
    }
    advice = ", ".join(lever for lever, helps in levers.items() if helps)
    return f"the run may need {needed / GIB:.1f} GiB a GPU, but {free / GIB:.1f} GiB are free; try {advice}."


def text_encoder_bytes(config: UMT5Config, dtype: torch.dtype) -> int:
    """Bytes of the text encoder's weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in UMT5EncoderModel(config).parameters()) * dtype.itemsize


def plan_encoding(
    vae_config: dict[str, Any],
    video_shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    memory: MemoryConfig,
) -> tuple[int, int]:
    """Bytes of the VAE's weights, and of what encoding a batch takes on top.

    Args:
        vae_config: As in its config.json.
        video_shape: (B, T, height, width).
        dtype: Of the VAE.
        memory: Slicing and tiling.
    """
    batch_size, num_frames, *size = video_shape
    vae = build_vae(vae_config, dtype)
    peaks = {}
    for frames in (min(num_frames, frames) for frames in ENCODED_FRAMES):  # it goes through them 4 or 8 at a time
        peaks[frames] = simulate_encoding(vae, (batch_size, frames, *size), memory)
    return sum(parameter.nbytes for parameter in vae.parameters()), _extrapolate(peaks, num_frames)


def plan_decoding(
    vae_config: dict[str, Any],
    latent_shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    memory: MemoryConfig,
) -> int:
    """Bytes that decoding a video of `latent_shape` (C, F, H, W) takes on top of the VAE's weights."""
    channels, num_frames, *size = latent_shape
    vae = build_vae(vae_config, dtype)
    peaks = {}
    for frames in (min(num_frames, frames) for frames in DECODED_FRAMES):
        peaks[frames] = simulate_decoding(vae, (channels, frames, *size), memory)
    return _extrapolate(peaks, num_frames)


def with_vae(
    plan: MemoryPlan, vae_config: dict[str, Any], *, dtype: torch.dtype, video_shape: tuple[int, int, int] | None
) -> MemoryPlan:
    """The plan of a run that has the VAE beside the transformer.

    Args:
        plan: Of the run without.
        vae_config: As in its config.json.
        dtype: Of the VAE.
        video_shape: (T, height, width) of the clips that are encoded; None if latents are read.
    """
    workload, memory = plan.workload, plan.workload.memory
    smallest = (1, *LatentGeometry.of(vae_config, workload.architecture).size_multiples)
    shape = (workload.batch_size, *(video_shape or smallest))
    weights, encoding = plan_encoding(vae_config, shape, dtype=dtype, memory=memory)
    comes = weights if memory.offload_vae else 0  # from the host, when it is needed
    decoding = 0
    if workload.validation is not None and workload.validation.samples:
        decoding = comes + plan_decoding(vae_config, workload.validation.latent_shape, dtype=dtype, memory=memory)
    return replace(
        plan,
        vae=weights - comes,
        encoding=0 if video_shape is None else comes + encoding,
        validation=replace(plan.validation, decoding=decoding),
    )


def _extrapolate(values: dict[int, int], at: int) -> int:
    """A straight line through the first and the last value, or the value itself if it is there."""
    if at in values:
        return values[at]
    (first, first_value), *_, (last, last_value) = values.items()
    return last_value + (last_value - first_value) * (at - last) // (last - first)


@dataclass(frozen=True)
class ParameterSizes:
    """Counts of parameters, and bytes of the frozen ones."""

    trainable: int
    frozen_bytes: int
    of_a_layer: int
    outside_layers: int


def parameter_sizes(workload: Workload) -> ParameterSizes:
    """Of the transformer of a workload, whole."""
    transformer = build(workload, num_layers=1)
    layer, num_layers = transformer.blocks, workload.architecture["num_layers"]
    per_parameter = BYTES_PER_PARAMETER.get(workload.memory.quantize_base)
    quantized = {id(m.weight) for m in layer.modules() if isinstance(m, torch.nn.Linear) and per_parameter}
    in_layer = {id(parameter) for parameter in layer.parameters()}
    trainable = frozen_bytes = outside = 0
    for parameter in transformer.parameters():
        count = num_layers if id(parameter) in in_layer else 1
        outside += parameter.numel() if id(parameter) not in in_layer else 0
        if parameter.requires_grad:
            trainable += count * parameter.numel()
        else:
            num_bytes = parameter.numel() * per_parameter if id(parameter) in quantized else parameter.nbytes
            frozen_bytes += count * int(num_bytes)
    of_a_layer = sum(parameter.numel() for parameter in layer.parameters())
    return ParameterSizes(trainable, frozen_bytes, of_a_layer, outside)
