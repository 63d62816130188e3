"""Memory levers: what they change is memory, not what is learned."""

import sys
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import ROOT, TINY_TRANSFORMER, run_script

from causal_wan.encoding import encode_videos
from causal_wan.memory import enable_gradient_checkpointing, on_device, quantization_config, store_in_fp8
from causal_wan.memory_plan import GIB, PeakMemory, Workload, describe_shortage, plan_encoding, plan_training
from causal_wan.models import add_lora, load_transformer, load_vae
from causal_wan.settings import MemoryConfig
from causal_wan.transformer import CausalWanTransformer3DModel


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
            num_frame_per_block=1,
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
    arguments = {"num_frame_per_block": 1, "dtype": torch.bfloat16}
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
    empty = load_transformer("unused", num_frame_per_block=1, generator_ckpt=str(tmp_path), empty=True)
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


def test_the_plan_of_encoding_is_what_encoding_takes(checkpoint):
    vae = load_vae(str(checkpoint))
    videos = torch.zeros(1, 3, 33, 32, 48)
    with PeakMemory(vae) as memory:
        memory.add(videos)
        encode_videos(vae, videos)
    weights, encoding = plan_encoding(vae.config, (1, 33, 32, 48), dtype=torch.float32, memory=MemoryConfig())
    assert weights == sum(p.nbytes for p in vae.parameters())
    assert encoding == pytest.approx(memory.peak, rel=0.02)


def test_the_plan_leaves_the_random_numbers_of_the_run_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    architecture = {**TINY_TRANSFORMER, "num_layers": 1}
    plan_training(Workload(architecture=architecture, latent_shape=(4, 3, 16, 16), lora_rank=2))
    assert torch.equal(torch.rand(1), expected)


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


@pytest.mark.slow
def test_the_table_of_the_document_is_what_the_benchmark_plans():
    run = run_script([sys.executable, "benchmarks/memory.py", "--plan"])
    assert run.stdout.count("|") > 100
    for text in ("docs/memory_and_speed.md", "benchmarks/results/memory_plan.md"):
        assert run.stdout.strip() in (ROOT / text).read_text()
