"""What runs without its numbers: passes of a shallow model and of the VAE on tensors that have shapes and no contents.

The storages that are alive at each moment are added up. `causal_wan.memory.plan` makes a run's plan of it.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, M = draws of noise.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from causal_wan.config.settings import DEFAULT_LORA_TARGETS, MemoryConfig
from causal_wan.memory.levers import cut_up_vae, enable_gradient_checkpointing
from causal_wan.methods.perceptual import MAX_CROP, feature_distances
from causal_wan.model.conditions import Conditions
from causal_wan.model.kv_cache import CACHE_DTYPES
from causal_wan.model.streaming_vae import decode_features, decode_in_parts
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import encode_videos
from causal_wan.sampling.rollout import Rollout
from causal_wan.weights.lora import add_lora


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
class ValidationWorkload:
    """What decides how much memory a validation takes, beside the transformer.

    Attributes:
        latent_shape: (C, F, H, W) of the videos that are sampled and of the held-out clips.
        samples: Whether videos are sampled, one after another.
        measures_loss: Whether the loss on held-out clips is measured, one after another.
        is_guided: Whether each pass is made with the prompt and with the negative one.
        num_draws: M, of the noise of a video.
        keeps_copy: Whether the trained weights wait on the device while their average takes their place.
    """

    latent_shape: tuple[int, int, int, int]
    samples: bool = True
    measures_loss: bool = False
    is_guided: bool = False
    num_draws: int = 3
    keeps_copy: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What decides how much memory a run takes.

    Attributes:
        architecture: Config of the transformer, as in its config.json, with what makes it causal.
        latent_shape: (C, F, H, W) of a clip.
        dtype: Of the passes.
        num_passes: That make a step; gradients are there from the second on.
        keeps_gradients: Whether they have a place of their own between steps too (DDP).
        has_clean_context: Whether the clean clip goes through the layers beside the noisy one (teacher forcing).
        sharding: Of what the optimizer changes: nothing; its states (ZeRO-2); or the weights too (FSDP2, ZeRO-3).
        num_shards: Processes that share it.
        num_sharing_a_clip: Processes among which the tokens of a clip are split while it trains.
        offload: Whether sharded weights and states wait in the host's memory.
        validation: What happens between steps, if anything.
        comparing_vae: Config of the VAE by whose decoder predicted latents are compared too, if they are.
        vae_dtype: Of that VAE.
    """

    architecture: dict[str, Any]
    latent_shape: tuple[int, int, int, int]
    batch_size: int = 1
    num_passes: int = 1
    keeps_gradients: bool = False
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
    validation: ValidationWorkload | None = None
    comparing_vae: dict[str, Any] | None = None
    vae_dtype: torch.dtype = torch.float32


# --- models without contents -----------------------------------------------------------------------------------------


def build(workload: Workload, num_layers: int) -> CausalWanTransformer3DModel:
    """The transformer of a workload on the meta device, with fewer layers."""
    architecture = {key: value for key, value in workload.architecture.items() if not key.startswith("_")}
    architecture["num_layers"] = num_layers
    with torch.device("meta"):
        transformer = CausalWanTransformer3DModel.from_config(architecture)
    # A frozen base; weights as they are gathered; or the model beside the optimizer's float32 weights.
    if workload.lora_rank or workload.sharding != "none":
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


def build_vae(vae_config: dict[str, Any], dtype: torch.dtype) -> AutoencoderKLWan:
    """A VAE on the meta device."""
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(vae_config)
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    return vae


def _take_shape(model: torch.nn.Module) -> None:
    """Puts tensors of the mode that is entered in the place of a model's meta tensors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            placed = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, torch.nn.Parameter(placed, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _in_precision(transformer: CausalWanTransformer3DModel, dtype: torch.dtype) -> Callable[..., Any]:
    """The forward as accelerate wraps it: what is cast for a pass is let go at its end."""

    def forward(*inputs: Any, **settings: Any) -> Any:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return transformer(*inputs, **settings)

    return forward


def _make_conditions(workload: Workload, batch_size: int) -> Conditions:
    shape = (batch_size, workload.max_sequence_length, workload.architecture["text_dim"])
    return Conditions(prompt_embeds=torch.empty(shape, dtype=workload.dtype))


# --- training --------------------------------------------------------------------------------------------------------


def simulate_passes(workload: Workload, num_layers: int) -> tuple[int]:
    """Most bytes that the passes of a step take beside the weights."""
    transformer, vae = build(workload, num_layers), _build_comparing_vae(workload)
    with FakeTensorMode():
        _take_shape(transformer)
        _take_shape(vae)
        if workload.sharding == "weights":
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        if workload.memory.gradient_checkpointing:
            enable_gradient_checkpointing(transformer, workload.memory, offload=_to_nowhere)
        transformer.train()
        with PeakMemory(torch.nn.ModuleList([transformer, vae])) as tracker:
            for _ in range(min(workload.num_passes + workload.keeps_gradients, 2)):
                inputs = _make_inputs(workload, workload.batch_size, workload.latent_shape)
                velocity = _in_precision(transformer, workload.dtype)(**inputs)[0].float()
                (velocity.square().mean() + _compare(vae, velocity)).backward()
    return (tracker.peak,)


def simulate_comparing(workload: Workload) -> int:
    """Of these, most bytes that comparing what the VAE's decoder sees takes, for whole clips."""
    vae = _build_comparing_vae(workload)
    with FakeTensorMode():
        _take_shape(vae)
        velocity = torch.zeros(workload.batch_size, *workload.latent_shape, requires_grad=True)
        with PeakMemory(vae) as tracker:
            (velocity.sum() + _compare(vae, velocity)).backward()
    return tracker.peak


def _build_comparing_vae(workload: Workload) -> torch.nn.Module:
    """The frozen VAE by which latents are compared, or what has no weights."""
    if workload.comparing_vae is None:
        return torch.nn.Identity()
    return build_vae(workload.comparing_vae, workload.vae_dtype).requires_grad_(False)


def _compare(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor | float:
    """What `causal_wan.methods.perceptual.perceptual_sum` does, of all clips of a batch."""
    if not isinstance(vae, AutoencoderKLWan):
        return 0.0
    crops = latents[:, :, : MAX_CROP[0], : MAX_CROP[1], : MAX_CROP[2]]
    with torch.no_grad():
        target = decode_features(vae, crops)
    return feature_distances(decode_features(vae, crops), target).sum()


def _make_inputs(workload: Workload, batch_size: int, latent_shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Of a pass over whole clips."""
    latents = torch.empty(batch_size, *latent_shape)
    return {
        "hidden_states": latents,
        "timestep": torch.empty(batch_size, latent_shape[1]),
        **_make_conditions(workload, batch_size).arguments(),
        "context_latents": latents if workload.has_clean_context else None,
        "return_dict": False,
    }


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


# --- validation ------------------------------------------------------------------------------------------------------


def simulate_sampling(workload: Workload, num_layers: int) -> tuple[int, int]:
    """Bytes of the keys and values of a rollout, and most bytes that it takes beside the weights, these included.

    It is the last block that is sampled: the cache has its full size from the first on.
    """
    validation = workload.validation
    transformer = build(workload, num_layers).eval()
    with FakeTensorMode(), torch.no_grad():
        _take_shape(transformer)
        channels, num_frames, height, width = validation.latent_shape
        start = num_frames - transformer.block_lengths(num_frames)[-1]
        with PeakMemory(transformer) as tracker:
            earlier_blocks = torch.empty(1, channels, start, height, width)
            conditions = _make_conditions(workload, 1)
            noise = torch.empty(validation.num_draws, 1, *validation.latent_shape)
            rollout = Rollout(
                _in_precision(transformer, workload.dtype),
                torch.empty(min(validation.num_draws, 2)),
                conditions,
                negative_conditions=conditions if validation.is_guided else None,
            )
            if start:
                batch_size, dtype = 1 + validation.is_guided, CACHE_DTYPES[workload.memory.kv_cache_dtype]
                rollout.cache = transformer.make_cache(batch_size, num_frames, height, width, dtype=dtype)
                rollout.cache.num_frames = start
            rollout.sample_block(noise[:, :, :, start:].clone(), start)
            del earlier_blocks
    return rollout.cache.num_bytes if start else 0, tracker.peak


def simulate_measuring(workload: Workload, num_layers: int) -> tuple[int]:
    """Most bytes that the loss of a held-out clip takes beside the weights."""
    transformer, vae = build(workload, num_layers).eval(), _build_comparing_vae(workload)
    with FakeTensorMode(), torch.no_grad():
        _take_shape(transformer)
        _take_shape(vae)
        with PeakMemory(torch.nn.ModuleList([transformer, vae])) as tracker:
            inputs = _make_inputs(workload, 1, workload.validation.latent_shape)
            velocity = _in_precision(transformer, workload.dtype)(**inputs)[0].float()
            velocity.square().mean() + _compare(vae, velocity)
    return (tracker.peak,)


# --- the VAE ---------------------------------------------------------------------------------------------------------


def simulate_encoding(vae: AutoencoderKLWan, video_shape: tuple[int, int, int, int], memory: MemoryConfig) -> int:
    """Most bytes that encoding videos of (B, T, height, width) takes beside the weights."""
    batch_size, *size = video_shape
    with FakeTensorMode(), torch.no_grad():
        _take_shape(vae)
        cut_up_vae(vae, memory)
        videos = torch.empty(batch_size, 3, *size)
        with PeakMemory(vae) as tracker:
            tracker.add(videos)
            encode_videos(vae, videos)
    return tracker.peak


def simulate_decoding(vae: AutoencoderKLWan, latent_shape: tuple[int, int, int, int], memory: MemoryConfig) -> int:
    """Most bytes that decoding a video takes beside the weights, frames leaving as they come."""
    with FakeTensorMode(), torch.no_grad():
        _take_shape(vae)
        cut_up_vae(vae, memory)
        latents = torch.empty(1, *latent_shape)
        with PeakMemory(vae) as tracker:
            tracker.add(latents)
            for _frames in decode_in_parts(vae, latents):  # each is there until the next one is
                pass
    return tracker.peak
