"""What only a GPU can show: the strategies with nccl, 16 bits, quantized weights, and WAN 1.3B at its real size.

python -m pytest -m gpu
"""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT, run_here, run_script

import causal_wan.training.steps
import train_video_regression
from causal_wan.config.settings import MemoryConfig, TrainingConfig
from causal_wan.memory.levers import enable_gradient_checkpointing, store_in_fp8
from causal_wan.memory.plan import GIB, plan_training
from causal_wan.memory.simulation import Workload
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.training.setup import make_optimizer
from causal_wan.training.weights import trainable_parameters
from causal_wan.weights.lora import add_lora


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SCRIPT = "train_video_regression.py"
WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}


def launch(recipe_path, *flags, strategy="single_gpu"):
    """`accelerate launch` on one GPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 1]
    command += ["--config_file", ROOT / "accelerate_configs" / f"{strategy}.yaml", SCRIPT, "--config", recipe_path]
    return run_script([*command, *flags])


def test_a_step_never_waits_for_the_gpu(write_recipe, monkeypatch):
    """Not in preparing a batch of latents that are kept, nor in the step itself."""
    train_step, prepare = causal_wan.training.steps.train_step, train_video_regression.prepare_batch
    num_watched = 0

    def watched(action):
        def run(*given, **settings):
            nonlocal num_watched
            num_watched += 1
            torch.cuda.set_sync_debug_mode("error" if num_watched > 8 else "default")  # after a pass over the clips
            try:
                return action(*given, **settings)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(causal_wan.training.steps, "train_step", watched(train_step))
    monkeypatch.setattr(train_video_regression, "prepare_batch", watched(prepare))
    path, _ = write_recipe(max_train_steps=8, cache_latents=True, mixed_precision="bf16", logging_steps=100)
    run_here("train_video_regression.py", "--config", path)
    assert num_watched == 2 * 8


def losses(output_dir):
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry["generator_loss"] for entry in entries]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2_offload", "zero2", "zero3", "zero3_offload"])
def test_a_strategy_on_one_gpu_learns_what_plain_training_does_and_resumes(write_recipe, strategy, lora_rank):
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="optional: pip install deepspeed")
    settings = {"lora_rank": lora_rank, "mixed_precision": "bf16", "learning_rate": 1e-3}
    path, plain = write_recipe("plain", **settings)
    launch(path)
    path, output_dir = write_recipe("strategy", **settings)
    launch(path, "--max_train_steps", 2, strategy=strategy)
    launch(path, "--resume_from_checkpoint", "latest", strategy=strategy)
    assert losses(output_dir) == pytest.approx(losses(plain), rel=0.03)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "adamw8bit"],
        ["--lora_rank", "4", "--quantize_base", "nf4"],
        ["--lora_rank", "4", "--quantize_base", "int8"],
        ["--lora_rank", "4", "--quantize_base", "fp8"],
        ["--mixed_precision", "fp8"],
        ["--compile"],
        ["--gradient_checkpointing", "--offload_activations", "--keep_attention_outputs"],
        ["--vae_tiling", "--vae_slicing", "--offload_vae"],
    ],
    ids=["adamw8bit", "nf4", "int8", "fp8-base", "fp8-passes", "compile", "activations", "vae"],
)
def test_memory_levers_train_in_bf16(write_recipe, flags):
    if {"adamw8bit", "nf4", "int8"} & set(flags):
        pytest.importorskip("bitsandbytes", reason="optional: pip install bitsandbytes")
    path, output_dir = write_recipe(mixed_precision="bf16")
    launch(path, *flags)
    assert len(losses(output_dir)) == 4
    assert all(math.isfinite(loss) for loss in losses(output_dir))


@pytest.mark.parametrize("case", ["full", "lora", "lora in fp8"])
def test_a_step_of_wan_1_3b_takes_the_planned_memory(case):
    """81 x 480 x 832, random weights, bf16, layers recomputed."""
    memory = MemoryConfig(gradient_checkpointing=True, quantize_base="fp8" if "fp8" in case else None)
    architecture = {**WAN_1_3B, "text_dim": 4096, "num_frame_per_block": 3}
    workload = Workload(
        architecture=architecture, latent_shape=(16, 21, 60, 104), lora_rank=64 * (case != "full"), memory=memory
    )
    with torch.device("cuda"):
        transformer = CausalWanTransformer3DModel.from_config(architecture)
    if workload.lora_rank:
        transformer.to(torch.bfloat16)
        if memory.quantize_base == "fp8":
            store_in_fp8(transformer, torch.bfloat16)
        add_lora(transformer, rank=64, alpha=64, target_modules=workload.lora_target_modules)
    enable_gradient_checkpointing(transformer, memory)
    parameters = trainable_parameters(transformer)
    optimizer = make_optimizer(parameters, TrainingConfig(output_dir=""))
    latents = torch.randn(1, 16, 21, 60, 104, device="cuda")
    timesteps = torch.full((1, 21), 757.0, device="cuda")
    prompt_embeds = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            velocity = transformer.train()(latents, timesteps, prompt_embeds, return_dict=False)[0]
        loss = velocity.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    measured = torch.cuda.max_memory_allocated()
    assert measured / GIB == pytest.approx(plan_training(workload).peak / GIB, rel=0.15)
