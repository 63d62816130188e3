"""Memory levers: what they change is memory, not what is learned."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import memory as memory_benchmark
import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT, TINY_TRANSFORMER, run_here

import train_video_regression
from causal_wan.blocks import CausalConfig
from causal_wan.config.parsing import parse_config
from causal_wan.config.settings import MemoryConfig
from causal_wan.memory.levers import (
    cut_up_vae,
    enable_gradient_checkpointing,
    on_device,
    quantization_config,
    store_in_fp8,
)
from causal_wan.memory.plan import GIB, describe_shortage, plan_decoding, plan_encoding, plan_training
from causal_wan.memory.simulation import PeakMemory, ValidationWorkload, Workload, simulate_comparing
from causal_wan.methods.perceptual import Comparison, draw_crops, perceptual_sum
from causal_wan.model.conditions import Conditions
from causal_wan.model.kv_cache import CACHE_DTYPES
from causal_wan.model.streaming_vae import decode_features, decode_in_parts
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import encode_videos
from causal_wan.runs import plan as run_plan
from causal_wan.runs.validation import Validation
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.video.writing import as_frames
from causal_wan.weights.lora import add_lora
from causal_wan.weights.parts import load_vae
from causal_wan.weights.transformer import load_transformer


SLOW = pytest.mark.slow


CHECKPOINTING = {
    "every layer": MemoryConfig(gradient_checkpointing=True),
    "every second layer": MemoryConfig(gradient_checkpointing=True, gradient_checkpointing_interval=2),
    "but attention": MemoryConfig(gradient_checkpointing=True, keep_attention_outputs=True),
    "inputs offloaded": MemoryConfig(gradient_checkpointing=True, offload_activations=True),
    "all of it": MemoryConfig(
        gradient_checkpointing=True,
        gradient_checkpointing_interval=2,
        keep_attention_outputs=True,
        offload_activations=True,
    ),
}


def make_transformer(**changes):
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**{**TINY_TRANSFORMER, "num_frame_per_block": 1, "num_layers": 4, **changes})


def pass_through(transformer, *, has_context=False):
    """Gradients of one pass, by name, and the most memory that it took beside the weights [bytes]."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 3, 16, 16, generator=generator)
    prompt_embeds = torch.randn(1, 8, 16, generator=generator)
    timesteps, context = torch.tensor([[757.0, 522.0, 0.0]]), latents if has_context else None
    with PeakMemory(transformer) as memory:
        velocity = transformer(latents, timesteps, prompt_embeds, return_dict=False, context_latents=context)[0]
        velocity.square().mean().backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}, memory.peak


def cosine(gradients, expected):
    """Of the angle between two sets of gradients."""
    assert gradients.keys() == expected.keys()
    flat, flat_expected = (torch.cat([g[name].flatten() for name in sorted(g)]) for g in (gradients, expected))
    return torch.nn.functional.cosine_similarity(flat, flat_expected, dim=0)


@pytest.mark.parametrize("config", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
def test_recomputing_layers_changes_no_gradient_and_takes_less_memory(config):
    expected, memory_without = pass_through(make_transformer())
    transformer = make_transformer()
    enable_gradient_checkpointing(transformer, config)
    gradients, memory_with = pass_through(transformer)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert memory_with < 0.9 * memory_without


def test_recomputing_half_of_the_layers_lies_between_all_and_none():
    memory = {}
    for interval in (1, 2, 4):
        transformer = make_transformer(num_layers=8)
        config = MemoryConfig(gradient_checkpointing=True, gradient_checkpointing_interval=interval)
        enable_gradient_checkpointing(transformer, config)
        memory[interval] = pass_through(transformer)[1]
    assert memory[1] < memory[2] < memory[4]


def test_attention_runs_once_when_its_outputs_are_kept(monkeypatch):
    calls = {True: 0, False: 0}
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            calls[keep] += operator is attention
            return operator(*args, **(kwargs or {}))

    for keep in calls:
        transformer = make_transformer()
        enable_gradient_checkpointing(
            transformer, MemoryConfig(gradient_checkpointing=True, keep_attention_outputs=keep)
        )
        with Count():
            pass_through(transformer)
    assert calls[False] == 2 * calls[True] > 0


@pytest.mark.parametrize("name", ["keep_attention_outputs", "offload_activations"])
def test_what_is_about_recomputed_layers_is_refused_without_them(name):
    with pytest.raises(ValueError, match=f"{name} is about recomputed layers; add --gradient_checkpointing"):
        MemoryConfig(**{name: True})


def test_a_base_in_fp8_takes_half_and_trains_like_its_rounded_self():
    def make_lora(round_weights):
        transformer = make_transformer().to(torch.bfloat16)
        if round_weights:
            for name, parameter in transformer.named_parameters():
                if fp8_dtypes[name] == torch.float8_e4m3fn:
                    parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
        else:
            store_in_fp8(transformer, torch.bfloat16)
        stored = {name: p.dtype for name, p in transformer.named_parameters()}
        torch.manual_seed(2)
        add_lora(transformer, rank=2, alpha=2, target_modules=["to_q", "ffn.net.2"])
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        enable_gradient_checkpointing(transformer, MemoryConfig(gradient_checkpointing=True))
        return transformer, stored

    in_fp8, fp8_dtypes = make_lora(round_weights=False)
    rounded, _ = make_lora(round_weights=True)
    assert fp8_dtypes["blocks.0.attn1.to_q.weight"] == torch.float8_e4m3fn
    assert fp8_dtypes["proj_out.weight"] != torch.float8_e4m3fn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients, expected = pass_through(in_fp8)[0], pass_through(rounded)[0]
    assert cosine(gradients, expected) > 0.999  # adapters meet float32 in one and bfloat16 in the other
    assert in_fp8.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.float8_e4m3fn  # and is stored so again


def allow_quantization_without_a_gpu(monkeypatch):
    """bitsandbytes has kernels for CPUs; diffusers asks for a GPU nevertheless."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer

    for quantizer in (BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_learns_about_what_the_whole_base_learns(kind, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="optional: pip install bitsandbytes")
    allow_quantization_without_a_gpu(monkeypatch)
    make_transformer(attention_head_dim=64, ffn_dim=256).save_pretrained(tmp_path / "transformer")
    gradients = {}
    for quantize_base in (None, kind):
        transformer = load_transformer(
            str(tmp_path),
            CausalConfig(num_frame_per_block=1),
            dtype=torch.bfloat16,
            quantization=quantization_config(quantize_base, torch.bfloat16),
        )
        torch.manual_seed(2)
        add_lora(transformer, rank=4, alpha=4, target_modules=["to_q", "to_v", "ffn.net.2"])
        enable_gradient_checkpointing(transformer, MemoryConfig(gradient_checkpointing=True))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients[quantize_base] = pass_through(transformer)[0]
    assert transformer.blocks[0].attn1.to_q.base_layer.weight.dtype in (torch.uint8, torch.int8)
    assert transformer.proj_out.weight.dtype == torch.bfloat16
    assert cosine(gradients[kind], gradients[None]) > (0.9 if kind == "nf4" else 0.97)


def test_empty_weights_have_the_dtypes_of_loaded_ones(checkpoint):
    arguments = {"causal": CausalConfig(num_frame_per_block=1), "dtype": torch.bfloat16}
    loaded = load_transformer(str(checkpoint), **arguments)
    empty = load_transformer(str(checkpoint), **arguments, empty=True)
    assert empty.config.num_frame_per_block == 1
    assert {n: (p.dtype, p.shape) for n, p in empty.named_parameters()} == {
        n: (p.dtype, p.shape) for n, p in loaded.named_parameters()
    }
    for name, buffer in loaded.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer)


def test_empty_weights_take_no_memory(tmp_path):
    with torch.device("meta"):
        large = make_transformer(num_attention_heads=16, attention_head_dim=128, ffn_dim=8192, num_layers=8)
    large.save_config(tmp_path)
    before = psutil.Process().memory_info().rss
    empty = load_transformer("unused", CausalConfig(num_frame_per_block=1), generator_ckpt=str(tmp_path), empty=True)
    size = sum(p.numel() * p.element_size() for p in empty.parameters())
    assert size > 1e9
    assert psutil.Process().memory_info().rss - before < 0.1 * size


def test_a_module_is_on_another_device_for_a_while_and_comes_back():
    module = torch.nn.Linear(2, 2)
    with on_device(module, torch.device("cpu")):
        assert module.weight.device.type == "cpu"
    meta = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(RuntimeError, match="inside"), on_device(meta, torch.device("meta")):
        raise RuntimeError("inside")


def test_a_module_that_waits_on_the_host_comes_back_without_a_copy():
    module = torch.nn.Linear(2, 2).requires_grad_(False)
    weight, where = module.weight, module.weight.data_ptr()
    with pytest.raises(RuntimeError, match="inside"), on_device(module, torch.device("meta")):
        assert module.weight.device.type == module.bias.device.type == "meta"
        raise RuntimeError("inside")
    assert module.weight.data_ptr() == where
    assert torch.equal(module.weight, weight)
    assert not module.weight.requires_grad


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["all activations", "recomputed"])
def test_the_plan_is_what_a_step_takes(lora_rank, recompute):
    """Simulated with 2 and 4 layers of 9, against a real step of all 9 on this machine."""
    memory = MemoryConfig(gradient_checkpointing=recompute)
    transformer = make_transformer(num_layers=9, ffn_dim=256)
    architecture = dict(transformer.config)
    if lora_rank:
        add_lora(transformer, rank=lora_rank, alpha=1, target_modules=["to_q", "ffn.net.2"])
    if recompute:
        enable_gradient_checkpointing(transformer, memory)
    _, measured = pass_through(transformer)
    workload = Workload(
        architecture=architecture,
        latent_shape=(4, 3, 16, 16),
        max_sequence_length=8,
        lora_rank=lora_rank,
        lora_target_modules=("to_q", "ffn.net.2"),
        dtype=torch.float32,
        memory=memory,
    )
    plan = plan_training(workload)
    trainable = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    assert plan.weights == sum(p.nbytes for p in transformer.parameters())
    assert plan.optimizer == 8 * trainable
    assert plan.passes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("recompute", [False, True], ids=["all activations", "recomputed"])
def test_the_plan_counts_the_clean_clip_that_teacher_forcing_adds(recompute):
    memory = MemoryConfig(gradient_checkpointing=recompute)
    transformer = make_transformer(num_layers=9, ffn_dim=256)
    workload = Workload(
        architecture=dict(transformer.config),
        latent_shape=(4, 3, 16, 16),
        max_sequence_length=8,
        dtype=torch.float32,
        memory=memory,
    )
    if recompute:
        enable_gradient_checkpointing(transformer, memory)
    _, measured = pass_through(transformer, has_context=True)
    plan = plan_training(replace(workload, has_clean_context=True))
    assert plan.passes == pytest.approx(measured, rel=0.02)
    assert plan.passes > 1.1 * plan_training(workload).passes


@pytest.mark.parametrize(
    "recompute", [pytest.param(False, id="all activations"), pytest.param(True, id="recomputed", marks=SLOW)]
)
def test_the_plan_counts_what_comparing_by_the_decoder_takes(checkpoint, recompute):
    """Beside activations; or in the place that a layer takes when it is recomputed, if there is enough."""
    vae, memory_config = load_vae(str(checkpoint)), MemoryConfig(gradient_checkpointing=recompute)
    transformer = make_transformer(num_layers=9, in_channels=16, out_channels=16)
    workload = Workload(
        architecture=dict(transformer.config),
        latent_shape=(16, 3, 36, 34),
        max_sequence_length=8,
        dtype=torch.float32,
        memory=memory_config,
        comparing_vae=dict(vae.config),
    )
    if recompute:
        enable_gradient_checkpointing(transformer, memory_config)
    timesteps = torch.tensor([[522.0, 522.0, 300.0]])
    with PeakMemory(torch.nn.ModuleList([transformer, vae])) as memory:
        latents = torch.randn(1, 16, 3, 36, 34)
        velocity = transformer(latents, timesteps, torch.randn(1, 8, 16), return_dict=False)[0]
        noisy = SimpleNamespace(latents=latents, timesteps=timesteps, mask=timesteps > 0, learned_timesteps=timesteps)
        crops = draw_crops(noisy, seed=0, sample_numbers=[0], max_timestep=700.0)
        total, _ = perceptual_sum(Comparison(crops, 700.0, partial(decode_features, vae)), noisy, latents - velocity)
        (velocity.square().mean() + total).backward()
    plan, without = plan_training(workload), plan_training(replace(workload, comparing_vae=None))
    assert plan.passes == pytest.approx(memory.peak, rel=0.04)  # which has the crops themselves, too
    alone = simulate_comparing(workload)
    assert without.passes + 0.5 * alone < plan.passes <= without.passes + alone
    shared = plan_training(replace(workload, num_sharing_a_clip=2)).passes
    assert shared == alone + (plan.passes - alone) // 2


def test_the_plan_of_encoding_is_what_encoding_takes(checkpoint):
    vae = load_vae(str(checkpoint))
    videos = torch.zeros(1, 3, 33, 32, 48)
    with PeakMemory(vae) as memory:
        memory.add(videos)
        encode_videos(vae, videos)
    weights, encoding = plan_encoding(vae.config, (1, 33, 32, 48), dtype=torch.float32, memory=MemoryConfig())
    assert weights == sum(p.nbytes for p in vae.parameters())
    assert encoding == pytest.approx(memory.peak, rel=0.02)


def sample_and_measure(workload):
    """Most bytes that sampling a video and a pass over a held-out clip really take beside the weights."""
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**workload.architecture).eval()
    if workload.lora_rank:
        transformer.to(workload.dtype)
        add_lora(transformer, rank=4, alpha=4, target_modules=list(workload.lora_target_modules))
    forward, precision = transformer.forward, (workload.dtype, workload.dtype != torch.float32)

    def autocast_forward(*inputs, **settings):  # as accelerate wraps it
        with torch.autocast("cpu", precision[0], enabled=precision[1]):
            return forward(*inputs, **settings)

    transformer.forward = autocast_forward
    pipeline = CausalWanPipeline(
        **dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")), transformer=transformer
    )
    validation, peaks = workload.validation, []
    with torch.no_grad():
        with PeakMemory(transformer) as memory:
            embeds = torch.randn(1, workload.max_sequence_length, 16).to(workload.dtype)
            conditions = Conditions(prompt_embeds=embeds)
            pipeline.sample_latents(
                conditions,
                torch.randn(validation.num_draws, 1, *validation.latent_shape),
                [1000, 750, 500],
                negative_conditions=conditions if validation.is_guided else None,
                cache_dtype=CACHE_DTYPES[workload.memory.kv_cache_dtype],
            )
        peaks.append(memory.peak)
        with PeakMemory(transformer) as memory:
            latents, timesteps = torch.randn(1, *validation.latent_shape), torch.full((1, 6), 500.0)
            transformer(latents, timesteps, embeds, context_latents=latents if workload.has_clean_context else None)
        peaks.append(memory.peak)
    return peaks


@pytest.mark.parametrize(
    ("changes", "causal", "is_guided", "kv_cache_dtype"),
    [
        ({}, {"num_frame_per_block": 1}, False, "auto"),
        pytest.param({"dtype": torch.bfloat16}, {"num_frame_per_block": 2}, False, "auto", marks=SLOW),
        pytest.param({"dtype": torch.bfloat16, "lora_rank": 4}, {"num_frame_per_block": 1}, True, "auto", marks=SLOW),
        pytest.param(
            {"dtype": torch.float16, "has_clean_context": True}, {"num_frame_per_block": 3}, False, "int8", marks=SLOW
        ),
        ({"dtype": torch.bfloat16}, {"num_frame_per_block": 1, "local_attn_size": 2}, True, "int8"),
        ({}, {"num_frame_per_block": None}, True, "auto"),
    ],
    ids=["float32", "bf16", "lora, guided", "fp16, int8", "window, int8, guided", "bidirectional, guided"],
)
def test_the_plan_of_validation_is_what_its_passes_take(changes, causal, is_guided, kv_cache_dtype):
    """Simulated with 2 and 4 layers of 9, and one block; really sampled in 3 steps a block with all 9 layers."""
    shape = (4, 6, 16, 16)
    workload = Workload(
        architecture={**TINY_TRANSFORMER, "ffn_dim": 256, "num_layers": 9, **causal},
        latent_shape=shape,
        max_sequence_length=8,
        memory=MemoryConfig(kv_cache_dtype=kv_cache_dtype),
        validation=ValidationWorkload(latent_shape=shape, measures_loss=True, is_guided=is_guided),
        **{"dtype": torch.float32, **changes},
    )
    plan = plan_training(workload).validation
    sampling, measuring = sample_and_measure(workload)
    assert plan.sampling == pytest.approx(sampling, rel=0.02)
    assert plan.measuring == pytest.approx(measuring, rel=0.04)  # norms are one operation here, and several there


@pytest.mark.parametrize(
    "tiling", [pytest.param(False, id="whole frames"), pytest.param(True, id="tiles", marks=SLOW)]
)
def test_the_plan_of_decoding_is_what_decoding_takes(checkpoint, tiling):
    vae, memory_config = load_vae(str(checkpoint)), MemoryConfig(vae_tiling=tiling)
    cut_up_vae(vae, memory_config)
    latents = torch.zeros(1, 16, 9, 40, 48)
    with PeakMemory(vae) as memory:
        memory.add(latents)
        for frames in decode_in_parts(vae, latents):
            as_frames(frames[0])
    plan = plan_decoding(dict(vae.config), (16, 9, 40, 48), dtype=torch.float32, memory=memory_config)
    assert plan == pytest.approx(memory.peak, rel=0.02)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_plan_of_a_run_is_what_its_validation_takes_which_has_no_cache_while_it_decodes(
    write_recipe, monkeypatch, capsys, mixed_precision
):
    plans, measured, left = [], {"sample": [], "write": []}, []
    plan_run = run_plan.plan_run
    monkeypatch.setattr(run_plan, "plan_run", lambda *given: plans.append(plan_run(*given)) or plans[0])

    def watch(name):
        part = getattr(Validation, name)

        def run(validation, *given):
            present = torch.nn.ModuleList([validation.inputs.vae, *(g for g in given if hasattr(g, "blocks"))])
            with PeakMemory(present) as memory:
                result = part(validation, *given)
            measured[name].append(memory.peak)
            left.append(memory.current)
            return result

        monkeypatch.setattr(Validation, name, run)

    for name in measured:
        watch(name)
    changes = {"height": 64, "width": 96, "num_frame_per_block": 1, "validation_guidance_scale": 2.0}
    path, _ = write_recipe(max_train_steps=1, train_batch_size=1, mixed_precision=mixed_precision, **changes)
    run_here("train_video_regression.py", "--config", path)
    validation = plans[0].validation
    assert validation.measuring > 0
    assert max(measured["sample"]) == pytest.approx(validation.sampling, rel=0.05)
    assert max(measured["write"]) == pytest.approx(validation.decoding, rel=0.05)
    assert validation.cache > 0.05 * validation.sampling
    assert max(left) < 0.5 * validation.cache
    printed = capsys.readouterr().out
    assert f"in validation: {validation}" in printed
    assert "validation  every 4 steps and at the end: 2 video(s) and the loss on 2 held-out clip(s)" in printed


def test_the_plan_leaves_the_random_numbers_of_the_run_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    architecture = {**TINY_TRANSFORMER, "num_layers": 1}
    plan_training(Workload(architecture=architecture, latent_shape=(4, 3, 16, 16), lora_rank=2))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_levers_and_shards_lower_the_plan():
    def peak(**changes):
        memory = MemoryConfig(**changes.pop("memory", {}))
        workload = {"architecture": {**TINY_TRANSFORMER, "num_layers": 6}, "latent_shape": (4, 3, 16, 16)}
        workload |= {"memory": memory}
        return plan_training(Workload(**(workload | changes))).peak

    recomputed = {"gradient_checkpointing": True}
    whole = peak(memory=recomputed)
    assert whole < peak()
    assert peak(memory=recomputed, optimizer="adamw8bit") < whole < peak(memory=recomputed, use_ema=True)
    assert peak(memory=recomputed, sharding="weights", num_shards=8) < whole
    assert peak(memory=recomputed, sharding="optimizer") < whole  # the model in 16 bits is not cast for each pass
    lora = peak(memory=recomputed, lora_rank=2)
    assert peak(memory={**recomputed, "offload_activations": True}, lora_rank=2) < lora < whole
    assert whole < peak(memory={**recomputed, "gradient_checkpointing_interval": 2}) < peak()
    assert lora < peak(memory={**recomputed, "keep_attention_outputs": True}, lora_rank=2)


def test_a_run_that_does_not_fit_is_told_what_to_do():
    memory = MemoryConfig(gradient_checkpointing=True)
    plan = plan_training(Workload(architecture=TINY_TRANSFORMER, latent_shape=(4, 3, 16, 16), memory=memory))
    assert describe_shortage(plan, free=2 * GIB) is None
    message = describe_shortage(plan, free=GIB // 2)
    assert "the run may need 1.0 GiB a GPU, but 0.5 GiB are free; try --offload_activations" in message
    assert "--optimizer adamw8bit" in message
    assert "--gradient_checkpointing" not in message
    sharded = replace(plan, workload=replace(plan.workload, sharding="weights", num_shards=8))
    assert "adamw8bit" not in describe_shortage(sharded, free=0)


def plan_tiny(**changes):
    """Of a tiny model that validates clips of three blocks."""
    validation = changes.pop("validation", {})
    shape = (4, 3, 16, 16)
    workload = {"architecture": {**TINY_TRANSFORMER, "num_frame_per_block": 1}, "latent_shape": shape}
    workload["validation"] = ValidationWorkload(latent_shape=shape, measures_loss=True, **validation)
    return plan_training(Workload(**(workload | changes)))


def test_in_validation_a_process_holds_what_waits_only_then_and_whole_clips():
    plan = plan_tiny()
    num_weights = sum(p.numel() for p in make_transformer(num_layers=2).parameters())
    assert plan_tiny(keeps_gradients=True).validation.waiting == 4 * num_weights
    assert plan_tiny(use_ema=True, validation={"keeps_copy": True}).validation.waiting == 4 * num_weights
    shared = plan_tiny(num_sharing_a_clip=2)
    assert shared.validation == plan.validation
    assert shared.passes == plan.passes // 2
    sharded, whole = (plan_tiny(sharding="weights", num_shards=shards) for shards in (8, 1))
    assert sharded.weights == whole.weights // 8
    assert sharded.validation == whole.validation  # activations, and layers as they are gathered
    assert sharded.moments["sampling in validation"] < plan.moments["sampling in validation"]


def test_a_validation_that_does_not_fit_is_told_what_to_do():
    memory = MemoryConfig(gradient_checkpointing=True)
    plan = plan_tiny(memory=memory, lora_rank=2, validation={"is_guided": True})
    plan = replace(plan, validation=replace(plan.validation, cache=2 * GIB, sampling=3 * GIB))
    message = describe_shortage(plan, free=3 * GIB)
    for lever in (
        *("--kv_cache_dtype int8", "a smaller --local_attn_size", "--validation_guidance_scale 1"),
        *("--validation_steps 0 (no validation)", "fsdp2.yaml"),
    ):
        assert lever in message
    for lever in ("--offload_activations", "--vae_tiling", "--latents_dir"):
        assert lever not in message
    assert "3.0 GiB at most, sampling in validation" in str(plan)
    decoding = replace(plan, validation=replace(plan.validation, cache=0, sampling=0, decoding=3 * GIB))
    message = describe_shortage(decoding, free=3 * GIB)
    assert "--vae_tiling" in message
    assert "--kv_cache_dtype" not in message
    step = describe_shortage(replace(plan, passes=3 * GIB), free=3 * GIB)
    assert "--offload_activations" in step
    assert "--validation_steps 0" not in step  # would not be enough


@pytest.fixture
def plan_of(recipe, tmp_path):
    """The plan of a run with these flags, in words and numbers."""

    def plan(*flags):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, "output_dir": str(tmp_path), "validation_metadata_path": None}))
        config = parse_config(train_video_regression.Config, ["--config", str(path), *flags])
        run = (config, SimpleNamespace(validation_rows=[], has_clips=True), Accelerator(cpu=True))
        return run_plan.describe_memory(*run), run_plan.plan_run(*run)

    return plan


@pytest.mark.slow
def test_the_plan_has_the_vae_where_latents_are_read_but_videos_are_decoded(plan_of):
    _, without = plan_of("--latents_dir", "latents")
    _, plan = plan_of("--latents_dir", "latents", "--validation_prompts", "a ball")
    assert (without.vae, without.encoding, without.validation.peak) == (0, 0, 0)
    assert plan.vae > 0
    assert plan.encoding == plan.text_encoder == 0
    assert plan.validation.decoding > 0
    assert plan.validation.measuring == 0
    _, off = plan_of("--latents_dir", "latents", "--validation_prompts", "a ball", "--validation_steps", "0")
    assert off == without
    _, waits = plan_of("--latents_dir", "latents", "--validation_prompts", "a ball", "--offload_vae")
    assert waits.vae == 0
    assert waits.validation.decoding == plan.validation.decoding + plan.vae


def test_the_plan_has_the_vae_where_its_decoder_compares_what_is_learned(plan_of):
    _, without = plan_of("--latents_dir", "latents")
    _, plan = plan_of("--latents_dir", "latents", "--perceptual_weight", "1")
    assert plan.vae > 0 == without.vae
    assert plan.passes > without.passes
    assert plan.encoding == plan.validation.peak == 0
    _, in_16_bits = plan_of("--latents_dir", "latents", "--perceptual_weight", "1", "--vae_dtype", "bf16")
    assert in_16_bits.vae == plan.vae // 2
    assert in_16_bits.passes < plan.passes


@pytest.mark.slow
def test_the_plan_says_that_context_parallelism_does_not_share_what_is_validated(plan_of, monkeypatch):
    flags = ("--validation_prompts", "a ball")
    assert "context parallelism" not in plan_of(*flags)[0]
    monkeypatch.setattr(run_plan, "context_mesh", lambda accelerator: object())
    assert "context parallelism shares the tokens of steps, not of validation" in plan_of(*flags)[0]


@pytest.mark.slow
@pytest.mark.parametrize("lever", memory_benchmark.PLANNED_LEVERS)
def test_the_table_of_the_document_is_what_the_benchmark_plans(lever):
    head, _, *rows = memory_benchmark.plan(levers=[lever]).splitlines()
    assert len(rows) == 3
    for text in ("docs/memory_and_speed.md", "benchmarks/results/memory_plan.md"):
        written = (ROOT / text).read_text().splitlines()
        start = written.index(head)
        assert set(rows) < set(written[start : start + 2 + 3 * len(memory_benchmark.PLANNED_LEVERS)])


@pytest.mark.slow
def test_the_table_of_distribution_matching_is_what_the_benchmark_plans():
    head, _, row = memory_benchmark.plan_matched([("1.3b", "14b")], ["LoRA of rank 64"]).splitlines()
    for text in ("docs/distribution_matching.md", "benchmarks/results/memory_plan.md"):
        written = (ROOT / text).read_text().splitlines()
        assert row in written[written.index(head) :]
