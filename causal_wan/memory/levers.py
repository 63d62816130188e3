"""Memory levers, each a flag: recompute layers, keep activations or the base elsewhere or smaller, cut the VAE up.

`benchmarks/memory.py` measures what each of them saves and costs; `causal_wan.memory.plan` foresees what a run takes.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan, BitsAndBytesConfig
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from causal_wan.config.settings import MemoryConfig
from causal_wan.devices import to_device
from causal_wan.model.transformer import CausalWanTransformer3DModel


# What scaled_dot_product_attention runs on each backend, and FlashAttention's own package.
_ATTENTION_OPS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "flash_attn::_flash_attn_forward",
    "flash_attn_3::fwd",
)

_TO_THE_HOST = partial(save_on_cpu, pin_memory=True)

# Kept whole: they are small, and what enters and leaves the layers goes through them.
_NOT_QUANTIZED = ["patch_embedding", "condition_embedder", "proj_out"]


def enable_gradient_checkpointing(
    transformer: CausalWanTransformer3DModel,
    config: MemoryConfig,
    *,
    offload: Callable[[], contextlib.AbstractContextManager] = _TO_THE_HOST,
) -> None:
    """Makes a transformer recompute layers in the backward pass, as the config says; changes no gradient.

    Args:
        transformer: Changed in place.
        config: Which layers, what is kept of them, and where their inputs are kept.
        offload: A context in which saved tensors go elsewhere; the host by default.

    Source: "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174; keeping attention's outputs as in
    "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198, section 5.
    """
    chosen = {id(layer) for layer in transformer.blocks[:: config.gradient_checkpointing_interval]}
    # Layers draw nothing, so there is no state of random generators to keep.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.keep_attention_outputs:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _attention_ops())
        if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:  # of newer versions of torch
            settings["respect_saved_tensors_hooks"] = False  # offloading them fails in the backward pass

    def run(layer: torch.nn.Module, *inputs: object) -> torch.Tensor:
        if id(layer) not in chosen:
            return layer(*inputs)
        with offload() if config.offload_activations else contextlib.nullcontext():
            return checkpoint(layer, *inputs, **settings)

    transformer.enable_gradient_checkpointing(run)


def _attention_ops() -> list[torch._ops.OpOverload]:
    """Those of the attention operators that this installation has."""
    found = []
    for name in _ATTENTION_OPS:
        namespace, _, operator = name.partition("::")
        if hasattr(getattr(torch.ops, namespace), operator):
            found.append(getattr(getattr(torch.ops, namespace), operator).default)
    return found


def check_can_quantize(quantize_base: str | None, device: torch.device) -> None:
    """Checks that there is what nf4 and int8 need.

    Raises:
        ValueError: If bitsandbytes is not installed, or there is no GPU.
    """
    if quantize_base not in ("nf4", "int8"):
        return
    if device.type == "cpu":
        raise ValueError(f"--quantize_base {quantize_base} needs a GPU, but there is none; use --quantize_base fp8.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise ValueError(
            f"--quantize_base {quantize_base} needs bitsandbytes; run `pip install bitsandbytes`, or use "
            "--quantize_base fp8."
        ) from None


def quantization_config(quantize_base: str | None, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What diffusers needs to load a transformer in nf4 or int8; None for other storage.

    Source: QLoRA, arXiv 2305.14314, section 3 (nf4); LLM.int8(), arXiv 2208.07339.
    """
    if quantize_base not in ("nf4", "int8"):
        return None
    if quantize_base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=_NOT_QUANTIZED,
    )


def store_in_fp8(transformer: CausalWanTransformer3DModel, compute_dtype: torch.dtype) -> None:
    """Keeps the weights of layers in 8 bits and casts each when it is used; embeddings and norms stay as they are."""
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)


def cut_up_vae(vae: AutoencoderKLWan, config: MemoryConfig) -> None:
    """Turns on slicing and tiling as the config says."""
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_tiling:
        vae.enable_tiling()


@contextlib.contextmanager
def on_device(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Lets a module that waits on the host, and does not change, be on a device for a while; elsewhere it stays.

    Weights come back as they were, without a copy. Those that go to a GPU lie in pinned memory from then on.
    """
    if device.type == "cpu" or next(module.parameters()).device.type != "cpu":
        yield
        return
    waiting = module.state_dict()
    if device.type == "cuda":
        waiting = {name: weight.pin_memory() for name, weight in waiting.items()}
    module.load_state_dict({name: to_device(weight, device) for name, weight in waiting.items()}, assign=True)
    try:
        yield
    finally:
        module.load_state_dict(waiting, assign=True)
