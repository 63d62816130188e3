"""How much memory a training run will take on each GPU: found by running its passes without their numbers.

A pass of a shallow copy of the model is run on tensors that have shapes and no contents, and the storages that are
alive at each moment are added up. Layers are all alike, so two depths tell the rest. What is not foreseen: what CUDA
itself and cuDNN's workspaces take (about a GiB), and memory lost between blocks of the allocator.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import UMT5Config, UMT5EncoderModel

from causal_wan.encoding import encode_videos
from causal_wan.memory import cut_up_vae, enable_gradient_checkpointing
from causal_wan.models import add_lora, load_transformer_config
from causal_wan.settings import DEFAULT_LORA_TARGETS, MemoryConfig
from causal_wan.transformer import CausalWanTransformer3DModel


GIB = 2**30
CUDA_OVERHEAD = GIB  # what is not foreseen, roughly
SHALLOW_DEPTHS = (2, 4)  # times the checkpointing interval
ENCODED_FRAMES = (17, 25)
BYTES_PER_PARAMETER = {"nf4": 0.5 + 4 / 64, "int8": 1, "fp8": 1}  # nf4 has a float32 scale for each 64 weights
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2}  # a trainable parameter


class PeakMemory(TorchDispatchMode):
    """Adds up the storages that come to life while it is entered, on any device, with or without contents.

    Args:
        model: Its weights are there already and do not count.

    Attributes:
        current, peak: Bytes alive now, and at the worst moment so far.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._alive: set[int] = {_storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.current = self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage until it is freed; one that is counted already is not counted again."""
        storage, key = tensor.untyped_storage(), _storage_key(tensor)
        if key in self._alive or tensor.device.type == "meta":
            return
        self._alive.add(key)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.current -= num_bytes


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What decides how much memory a training step takes.

    Attributes:
        architecture: Config of the transformer, as in its config.json, with what makes it causal.
        latent_shape: (C, F, H, W) of a clip.
        dtype: Of the passes.
        num_passes: That make a step; gradients are there from the second on.
        has_clean_context: Whether the clean clip goes through the layers beside the noisy one (teacher forcing).
        sharding: Of what the optimizer changes: nothing; its states (ZeRO-2); or the weights too (FSDP2, ZeRO-3).
        num_shards: Processes that share it.
        num_sharing_a_clip: Processes among which the tokens of a clip are split.
        offload: Whether sharded weights and states wait in the host's memory.
    """

    architecture: dict[str, Any]
    latent_shape: tuple[int, int, int, int]
    batch_size: int = 1
    num_passes: int = 1
    max_sequence_length: int = 512
    has_clean_context: bool = False
    lora_rank: int = 0
    lora_target_modules: tuple[str, ...] = DEFAULT_LORA_TARGETS
    dtype: torch.dtype = torch.bfloat16
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    use_ema: bool = False
    sharding: Literal["none", "optimizer", "weights"] = "none"
    num_shards: int = 1
    num_sharing_a_clip: int = 1
    offload: bool = False


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
    """

    workload: Workload
    weights: int
    optimizer: int
    passes: int
    vae: int = 0
    encoding: int = 0
    text_encoder: int = 0
    keeps_text_encoder: bool = False

    @property
    def peak(self) -> int:
        """The worst moment of the run."""
        waiting = self.weights + self.optimizer + self.vae + self.keeps_text_encoder * self.text_encoder
        return max(waiting + self.passes, waiting + self.encoding, self.text_encoder)

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
        return f"{self.peak / GIB:.1f} GiB a GPU at most ({listed}; encoding clips {self.encoding / GIB:.1f})"


def plan_training(workload: Workload) -> MemoryPlan:
    """The memory of a training step, without VAE and text encoder."""
    num_layers, interval = workload.architecture["num_layers"], workload.memory.gradient_checkpointing_interval
    depths = {min(num_layers, depth * interval) for depth in SHALLOW_DEPTHS}
    passes = _extrapolate({depth: _simulated_passes(workload, depth) for depth in sorted(depths)}, num_layers)
    passes //= workload.num_sharing_a_clip
    sizes = _parameter_sizes(workload)
    if workload.memory.quantize_base is not None:  # what is cast for a pass lives until the layer's backward is done
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
    return MemoryPlan(workload=workload, weights=weights, optimizer=states, passes=passes)


def describe_shortage(plan: MemoryPlan, free: int) -> str | None:
    """What to do when a run is likely to take more than is free [bytes], or None."""
    needed, workload, memory = plan.peak + CUDA_OVERHEAD, plan.workload, plan.workload.memory
    if needed <= free:
        return None
    sharded = workload.sharding == "weights"
    levers = {
        "--gradient_checkpointing": not memory.gradient_checkpointing,
        "--offload_activations": memory.gradient_checkpointing and not memory.offload_activations,
        "--optimizer adamw8bit": not workload.lora_rank and not sharded and workload.optimizer == "adamw",
        "--quantize_base nf4": workload.lora_rank > 0 and not sharded and memory.quantize_base is None,
        "--lora_rank 64": not workload.lora_rank,
        "--vae_tiling": plan.encoding > plan.passes and not memory.vae_tiling,
        "a smaller --train_batch_size": workload.batch_size > 1,
        "more GPUs with accelerate_configs/fsdp2.yaml": True,
        "fewer --num_frames or a smaller --height and --width": True,
    }
    advice = ", ".join(lever for lever, helps in levers.items() if helps)
    return f"the run may need {needed / GIB:.1f} GiB a GPU, but {free / GIB:.1f} GiB are free; try {advice}."


def plan_run(
    checkpoint: str,
    video_shape: tuple[int, int, int],
    *,
    causal_config: dict[str, Any],
    generator_ckpt: str | None = None,
    revision: str | None = None,
    vae_dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype = torch.bfloat16,
    encodes: bool = True,
    keeps_text_encoder: bool = False,
    **workload: Any,
) -> MemoryPlan:
    """The memory of a run that embeds prompts, then encodes clips and trains, from the checkpoint's configs alone.

    Args:
        checkpoint: Diffusers folder or hub id of a WAN pipeline.
        video_shape: (T, height, width) of a clip.
        causal_config: What makes the transformer causal, as `causal_settings` returns it.
        generator_ckpt: As in `load_transformer`.
        revision: Of a hub repository.
        vae_dtype: Of the VAE.
        text_dtype: Of the text encoder.
        encodes: Whether the run encodes clips and prompts itself.
        keeps_text_encoder: Whether the text encoder stays, for prompts that are not known beforehand.
        workload: Fields of `Workload` but for `architecture` and `latent_shape`.
    """
    architecture = load_transformer_config(checkpoint, generator_ckpt=generator_ckpt, revision=revision)
    vae_config = AutoencoderKLWan.load_config(checkpoint, subfolder="vae", revision=revision)
    text_config = UMT5Config.from_pretrained(checkpoint, subfolder="text_encoder", revision=revision)
    num_frames, height, width = video_shape
    temporal, spatial = (
        vae_config.get(f"scale_factor_{name}", size) for name, size in (("temporal", 4), ("spatial", 8))
    )
    latent_shape = (vae_config["z_dim"], (num_frames - 1) // temporal + 1, height // spatial, width // spatial)
    planned = Workload(architecture={**architecture, **causal_config}, latent_shape=latent_shape, **workload)
    if not encodes:
        return plan_training(planned)
    vae, encoding = plan_encoding(
        vae_config, (planned.batch_size, *video_shape), dtype=vae_dtype, memory=planned.memory
    )
    waits_on_the_host = planned.memory.offload_vae
    return replace(
        plan_training(planned),
        vae=0 if waits_on_the_host else vae,
        encoding=encoding + (vae if waits_on_the_host else 0),
        text_encoder=text_encoder_bytes(text_config, text_dtype),
        keeps_text_encoder=keeps_text_encoder,
    )


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
    batch_size, num_frames, height, width = video_shape
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(vae_config)
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    peaks = {}
    # The encoder goes through a clip 4 or 8 frames at a time.
    few, more = (min(num_frames, frames) for frames in ENCODED_FRAMES)
    with FakeTensorMode(), torch.no_grad():
        _take_shape(vae)
        cut_up_vae(vae, memory)
        for frames in (few, more):
            videos = torch.empty(batch_size, 3, frames, height, width)
            with PeakMemory(vae) as tracker:
                tracker.add(videos)
                encode_videos(vae, videos)
            peaks[frames] = tracker.peak
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    return weights, _extrapolate(peaks, num_frames)


def _extrapolate(values: dict[int, int], at: int) -> int:
    """A straight line through the first and the last value, or the value itself if it is there."""
    if at in values:
        return values[at]
    (first, first_value), *_, (last, last_value) = values.items()
    return last_value + (last_value - first_value) * (at - last) // (last - first)


@dataclass(frozen=True)
class _ParameterSizes:
    """Counts of parameters, and bytes of the frozen ones."""

    trainable: int
    frozen_bytes: int
    of_a_layer: int
    outside_layers: int


def _parameter_sizes(workload: Workload) -> _ParameterSizes:
    transformer = _build(workload, num_layers=1)
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
    return _ParameterSizes(trainable, frozen_bytes, of_a_layer, outside)


def _build(workload: Workload, num_layers: int) -> CausalWanTransformer3DModel:
    """The transformer of a workload on the meta device, with fewer layers."""
    architecture = {key: value for key, value in workload.architecture.items() if not key.startswith("_")}
    architecture["num_layers"] = num_layers
    with torch.device("meta"):
        transformer = CausalWanTransformer3DModel.from_config(architecture)
    if workload.lora_rank or workload.sharding == "weights":  # a frozen base, or weights as they are gathered
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(workload.dtype)
    if workload.lora_rank:
        with torch.random.fork_rng(devices=[]):  # adapters start at random: not at the cost of the run's own
            add_lora(
                transformer,
                rank=workload.lora_rank,
                alpha=workload.lora_rank,
                target_modules=workload.lora_target_modules,
            )
    return transformer


def _take_shape(model: torch.nn.Module) -> None:
    """Puts tensors of the mode that is entered in the place of a model's meta tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            placed = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, torch.nn.Parameter(placed, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _simulated_passes(workload: Workload, num_layers: int) -> int:
    """Most bytes that the passes of a step take beside the weights."""
    transformer = _build(workload, num_layers)
    with FakeTensorMode():
        _take_shape(transformer)
        if workload.sharding == "weights":
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        if workload.memory.gradient_checkpointing:
            enable_gradient_checkpointing(transformer, workload.memory, offload=_to_nowhere)
        transformer.train()
        with PeakMemory(transformer) as tracker:
            for _ in range(min(workload.num_passes, 2)):
                _forward_and_backward(transformer, workload)
    return tracker.peak


def _forward_and_backward(transformer: CausalWanTransformer3DModel, workload: Workload) -> None:
    latents = torch.empty(workload.batch_size, *workload.latent_shape)
    timesteps = torch.empty(workload.batch_size, workload.latent_shape[1])
    text_dim = workload.architecture["text_dim"]
    prompt_embeds = torch.empty(workload.batch_size, workload.max_sequence_length, text_dim, dtype=workload.dtype)
    with torch.autocast("cpu", workload.dtype, enabled=workload.dtype != torch.float32):
        context = latents if workload.has_clean_context else None
        velocity = transformer(latents, timesteps, prompt_embeds, return_dict=False, context_latents=context)[0]
    velocity.float().square().mean().backward()


def _drop_gradient(parameter: torch.nn.Parameter) -> None:
    """Stands for the reduction of a gradient to this process's shard of it, which is counted elsewhere."""
    parameter.grad = None


@contextlib.contextmanager
def _to_nowhere() -> Iterator[None]:
    """Saved tensors are let go, and come back without contents."""
    with saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype), lambda saved: torch.empty(saved[0], dtype=saved[1])
    ):
        yield
