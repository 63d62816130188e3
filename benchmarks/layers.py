"""Attention, modulation, compilation, recomputation: what layers cost, against floors and peers."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench import Bench, ratio_table, table
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from causal_wan.config.settings import MemoryConfig
from causal_wan.memory.levers import enable_gradient_checkpointing
from causal_wan.model.block_attention import TokenSpan, attend_in_spans, block_causal_spans
from causal_wan.model.compiling import compile_layers, seconds_compiling
from causal_wan.model.transformer import CausalWanTransformer3DModel


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
GPU_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def measure_attention(bench: Bench) -> list[str]:
    """Block-causal self-attention, forward and backward, in the forms that it can take."""
    size, heads = bench.size, bench.size.architecture["num_attention_heads"]
    shape = (1, size.num_tokens, heads, size.architecture["attention_head_dim"])
    states = [torch.randn(shape, device=bench.device, dtype=bench.dtype, requires_grad=True) for _ in range(3)]
    frame_tokens = size.num_tokens // size.latent_shape[1]
    spans = block_causal_spans(size.block_lengths, frame_tokens)
    block = torch.arange(size.num_tokens, device=bench.device) // (frame_tokens * size.block)
    forms: dict[str, Attention] = {
        "full attention": attend,
        "one dense call a block": functools.partial(attend_in_spans, attend, spans=spans),
        "... with plain slices": functools.partial(attend_in_slices, spans=spans),
        "a dense mask": functools.partial(attend, attn_mask=block[:, None] >= block[None, :]),
    }
    if bench.is_gpu:  # of FlexAttention there is no backward pass on a CPU
        forms |= of_gpu_backends(bench, states, spans, block)

    def run(form: Attention) -> None:
        out = form(*states)
        torch.autograd.grad(out, states, torch.ones_like(out))

    measured = bench.compare({name: functools.partial(run, form) for name, form in forms.items()})
    pairs = size.flops.self_attention / (4 * size.num_tokens**2 * heads * shape[-1] * size.architecture["num_layers"])
    title = f"attention, {size.num_tokens} tokens, {len(spans)} blocks, forward + backward"
    lines = ratio_table(title, measured)
    lines += ["", f"Block-causal attention has {pairs:.2f} of the pairs."]
    if bench.is_gpu:
        peaks = {name: bench.peak_gib(functools.partial(run, form)) for name, form in forms.items()}
        lines += table(("peak memory", "GiB"), [(name, f"{peak:.2f}") for name, peak in peaks.items()])
    else:
        lines.append(
            bench.goal("block-causal of full attention's time", measured["one dense call a block"][1], at_most=0.75)
        )
    return lines


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """torch's attention over `(B, L, N, E)`."""
    states = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*states, attn_mask=attn_mask).transpose(1, 2)


def attend_in_slices(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: list[TokenSpan]
) -> torch.Tensor:
    """Dense calls whose gradients of keys and values are filled up with zeros and added, one after the other."""
    parts = [
        attend(
            query[:, span.query_start : span.query_end],
            key[:, span.key_start : span.query_end],
            value[:, span.key_start : span.query_end],
        )
        for span in spans
    ]
    return torch.cat(parts, dim=1)


def of_gpu_backends(
    bench: Bench, states: list[torch.Tensor], spans: list[TokenSpan], block: torch.Tensor
) -> dict[str, Attention]:
    """Full and block-causal attention by each kernel that there is, and FlexAttention."""

    def by(backend: SDPBackend, form: Attention) -> Attention:
        def attention(*states: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return form(*states)

        return attention

    forms: dict[str, Attention] = {}
    for name, backend in GPU_BACKENDS.items():
        full = by(backend, attend)
        try:
            full(*states)
        except RuntimeError:  # not for this card, type or head size
            continue
        forms[f"{name}: full attention"] = full
        forms[f"{name}: one dense call a block"] = by(backend, functools.partial(attend_in_spans, attend, spans=spans))
    length = bench.size.num_tokens
    mask = create_block_mask(lambda b, h, q, k: block[q] >= block[k], None, None, length, length, device=bench.device)
    flex = torch.compile(functools.partial(flex_attention, block_mask=mask))
    forms["FlexAttention, compiled"] = lambda *states: flex(*(x.transpose(1, 2) for x in states)).transpose(1, 2)
    return forms


def run_passes(
    bench: Bench, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **context: torch.Tensor
) -> None:
    """Forward and backward."""
    with bench.autocast():
        velocity = model(*inputs, return_dict=False, **context)[0]
    velocity.float().square().mean().backward()
    model.zero_grad()


def measure_modulation(bench: Bench) -> list[str]:
    """A layer that is told the timesteps of frames, against the stock model that is told those of tokens."""
    architecture = bench.size.architecture | {"num_layers": 2}
    latents, timesteps, prompt_embeds = bench.make_inputs()
    by_token = timesteps.repeat_interleave(bench.size.num_tokens // timesteps.shape[1], dim=1)
    models = []
    for kind in (WanTransformer3DModel, CausalWanTransformer3DModel):
        with torch.device(bench.device):
            models.append(kind(**architecture))
    variants: dict[str, Callable[[], Any]] = {
        "stock, a timestep a token": functools.partial(
            run_passes, bench, models[0], (latents, by_token, prompt_embeds)
        ),
        "ours, a timestep a frame": functools.partial(
            run_passes, bench, models[1], (latents, timesteps, prompt_embeds)
        ),
    }
    lines = ratio_table("2 layers, forward + backward, both ways in time", bench.compare(variants))
    if bench.is_gpu:
        stock, ours = (bench.peak_gib(variant) for variant in variants.values())
        lines += ["", f"Peak memory of ours, of the stock model's: {ours / stock:.2f}."]
    return lines


def measure_compilation(bench: Bench) -> list[str]:
    """Layers as they are, and compiled."""
    models = {
        name: bench.make_transformer(num_frame_per_block=bench.size.block).train() for name in ("eager", "--compile")
    }
    compile_layers(models["--compile"], num_shapes=1)
    inputs, before = bench.make_inputs(), seconds_compiling()
    run_passes(bench, models["--compile"], inputs)
    spent = seconds_compiling() - before
    variants = {name: functools.partial(run_passes, bench, model, inputs) for name, model in models.items()}
    measured = bench.compare(variants)
    lines = ratio_table("the transformer, forward + backward", measured)
    lines += [
        "",
        f"Compiling took {spent / measured['eager'][0]:.1f} times as long as such a pass ({spent:.0f} s), once.",
    ]
    if bench.is_gpu:
        eager, compiled = (bench.peak_gib(variant) for variant in variants.values())
        lines += [f"Peak memory compiled, of eager: {compiled / eager:.2f}."]
    return lines


def measure_checkpointing(bench: Bench) -> list[str]:
    """What recomputing layers costs."""
    levers = {
        "--gradient_checkpointing": MemoryConfig(gradient_checkpointing=True),
        "... --gradient_checkpointing_interval 2": MemoryConfig(
            gradient_checkpointing=True, gradient_checkpointing_interval=2
        ),
        "... --keep_attention_outputs": MemoryConfig(gradient_checkpointing=True, keep_attention_outputs=True),
    }
    variants: dict[str, Callable[[], Any]] = {}
    for name, memory in {**({} if bench.is_gpu else {"all kept": None}), **levers}.items():  # 112 GiB at 1.3B
        model = bench.make_transformer(num_frame_per_block=bench.size.block).train()
        if memory is not None:
            enable_gradient_checkpointing(model, memory)
        variants[name] = functools.partial(run_passes, bench, model, bench.make_inputs())
    measured = bench.compare(variants)
    lines = ratio_table("the transformer, forward + backward", measured)
    if not bench.is_gpu:
        share = 1 - 1 / measured["--gradient_checkpointing"][1]
        lines += ["", f"Recomputation is {share:.2f} of a checkpointed pass; a quarter is what is to be expected."]
    return lines
