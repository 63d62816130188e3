"""What each memory lever saves and costs, measured; and with --plan what fits on which GPUs, computed.

    python benchmarks/memory.py                     # this machine, a small model
    python benchmarks/memory.py --size 1.3b         # one GPU, WAN 1.3B at 81 x 480 x 832, random weights
    python benchmarks/memory.py --plan              # WAN 1.3B, 5B and 14B on 24, 48, 80 GB and on 8 GPUs, none needed

Peaks are those of the allocator on a GPU, and of all storages of tensors alive at once on a CPU, where passes are in
float32. Times are relative to the first row, measured in the same run: on shared machines seconds say little.
"""

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config


sys.path.insert(0, str(Path(__file__).parents[1]))

from causal_wan.blocks import CausalConfig
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import PositiveInt, checked_dataclass
from causal_wan.config.settings import MemoryConfig, TrainingConfig
from causal_wan.geometry import LatentGeometry
from causal_wan.memory.levers import (
    cut_up_vae,
    enable_gradient_checkpointing,
    on_device,
    quantization_config,
    store_in_fp8,
)
from causal_wan.memory.matching import plan_matching
from causal_wan.memory.plan import (
    CUDA_OVERHEAD,
    GIB,
    MemoryPlan,
    plan_decoding,
    plan_encoding,
    plan_training,
    text_encoder_bytes,
    with_vae,
)
from causal_wan.memory.simulation import PeakMemory, ValidationWorkload, Workload
from causal_wan.model.conditions import Conditions
from causal_wan.model.kv_cache import CACHE_DTYPES
from causal_wan.model.streaming_vae import decode_in_parts
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import encode_videos
from causal_wan.sampling.noise import count_draws
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.training.setup import make_optimizer
from causal_wan.training.weights import trainable_parameters
from causal_wan.weights.lora import add_lora
from causal_wan.weights.transformer import load_transformer


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "small": {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "ffn_dim": 1024,
        "num_layers": 8,
        "text_dim": 256,
        "num_frame_per_block": 1,
    },
    "1.3b": {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    "5b": {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "ffn_dim": 14336,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
        "independent_first_frame": True,
    },
    "14b": {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40},
}
ARCHITECTURES = {
    name: {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "num_frame_per_block": 3} | own
    for name, own in ARCHITECTURES.items()
}
CLIPS = {"small": (17, 128, 128), "1.3b": (81, 480, 832), "5b": (121, 704, 1280), "14b": (81, 480, 832)}
WAN_2_2_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
VAES: dict[str, dict[str, Any]] = {"small": {}, "1.3b": {}, "5b": WAN_2_2_VAE, "14b": {}}
UMT5_XXL = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

RECOMPUTED = MemoryConfig(gradient_checkpointing=True)
STEP_LEVERS: dict[str, dict[str, Any]] = {
    "all weights, no lever": {},
    "--gradient_checkpointing": {"memory": RECOMPUTED},
    "... --gradient_checkpointing_interval 2": {"memory": replace(RECOMPUTED, gradient_checkpointing_interval=2)},
    "... --keep_attention_outputs": {"memory": replace(RECOMPUTED, keep_attention_outputs=True)},
    "... --offload_activations": {"memory": replace(RECOMPUTED, offload_activations=True)},
    "... --optimizer adamw8bit": {"memory": RECOMPUTED, "optimizer": "adamw8bit"},
    "LoRA of rank 64, --gradient_checkpointing": {"memory": RECOMPUTED, "lora_rank": 64},
    "... --offload_activations ": {"memory": replace(RECOMPUTED, offload_activations=True), "lora_rank": 64},
    "... --quantize_base fp8": {"memory": replace(RECOMPUTED, quantize_base="fp8"), "lora_rank": 64},
    "... --quantize_base int8": {"memory": replace(RECOMPUTED, quantize_base="int8"), "lora_rank": 64},
    "... --quantize_base nf4": {"memory": replace(RECOMPUTED, quantize_base="nf4"), "lora_rank": 64},
}
VAE_LEVERS = {
    "VAE, 2 clips": MemoryConfig(),
    "--vae_slicing": MemoryConfig(vae_slicing=True),
    "--vae_tiling": MemoryConfig(vae_tiling=True),
    "--offload_vae": MemoryConfig(offload_vae=True),
}
SAMPLING_LEVERS = {
    "sampling a video, LoRA of rank 64": MemoryConfig(),
    "--kv_cache_dtype int8": MemoryConfig(kv_cache_dtype="int8"),
}
DECODING_LEVERS = {"decoding a video": MemoryConfig(), "--vae_tiling ": MemoryConfig(vae_tiling=True)}


@checked_dataclass
class Config:
    """What to measure."""

    plan: bool = False
    """Compute what fits where, and measure nothing."""
    size: Literal["small", "1.3b", "5b", "14b"] = "small"
    """Architecture and clip."""
    num_steps: PositiveInt = 5
    """Timed steps of each row, after two that warm up; their median counts."""


# --- measured --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Of a row: bytes at the worst moment, foreseen bytes, seconds of a step."""

    peak: int
    planned: int
    seconds: float


def vae_config_of(size: str) -> dict[str, Any]:
    """All that the config.json of a size's VAE says."""
    with torch.device("meta"):
        return dict(AutoencoderKLWan(**VAES[size]).config)


def latent_shape_of(size: str) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a size's clips."""
    return LatentGeometry.of(vae_config_of(size), ARCHITECTURES[size]).latent_shape(*CLIPS[size])


def build(workload: Workload, device: torch.device) -> CausalWanTransformer3DModel:
    """The workload's transformer with random weights, as the training script would have it."""
    memory, lora = workload.memory, workload.lora_rank > 0
    torch.manual_seed(0)
    with torch.device(device):
        transformer = CausalWanTransformer3DModel.from_config(workload.architecture)
    if memory.quantize_base in ("nf4", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            transformer.to(workload.dtype).save_pretrained(Path(folder) / "transformer")
            del transformer
            transformer = load_transformer(
                folder,
                CausalConfig.of(workload.architecture),
                dtype=workload.dtype,
                quantization=quantization_config(memory.quantize_base, workload.dtype),
            )
    elif lora:
        transformer.to(workload.dtype)
    if memory.quantize_base == "fp8":
        store_in_fp8(transformer, workload.dtype)
    if lora:
        targets = workload.lora_target_modules
        add_lora(transformer, rank=workload.lora_rank, alpha=workload.lora_rank, target_modules=targets)
    if memory.gradient_checkpointing:
        enable_gradient_checkpointing(transformer, memory)
    return transformer.train()


def measure_step(workload: Workload, device: torch.device, num_steps: int) -> Measured:
    """A training step: forward, backward, optimizer."""
    transformer = build(workload, device)
    parameters = trainable_parameters(transformer)
    optimizer = make_optimizer(parameters, TrainingConfig(output_dir="", optimizer=workload.optimizer))
    latents = torch.randn(workload.batch_size, *workload.latent_shape, device=device)
    timesteps = torch.full((workload.batch_size, workload.latent_shape[1]), 757.0, device=device)
    prompt_embeds = torch.randn(
        workload.batch_size, workload.max_sequence_length, workload.architecture["text_dim"], device=device
    ).to(workload.dtype)

    def step() -> None:
        with torch.autocast(device.type, workload.dtype, enabled=workload.dtype != torch.float32):
            velocity = transformer(latents, timesteps, prompt_embeds, return_dict=False)[0]
        velocity.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's states
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    peak = peak_of(step, device, [*transformer.parameters(), *transformer.buffers(), *states])
    return Measured(peak, plan_training(workload).peak, seconds_of(step, device, num_steps))


def measure_encoding(memory: MemoryConfig, size: str, device: torch.device, num: int) -> Measured:
    """Encoding two clips with WAN's VAE, random weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = AutoencoderKLWan(**VAES[size]).to(dtype=dtype).eval()
    vae.to("cpu" if memory.offload_vae else device)
    cut_up_vae(vae, memory)
    videos = torch.zeros(2, 3, *CLIPS[size], device=device)

    def encode() -> None:
        with on_device(vae, device):
            encode_videos(vae, videos)

    waiting = [] if memory.offload_vae else list(vae.parameters())
    peak = peak_of(encode, device, [videos, *waiting])
    weights, encoding = plan_encoding(dict(vae.config), (2, *CLIPS[size]), dtype=dtype, memory=memory)
    return Measured(peak, weights + encoding, seconds_of(encode, device, num))


def measure_sampling(memory: MemoryConfig, workload: Workload, device: torch.device, num: int) -> Measured:
    """Sampling a video of validation in 3 steps a block."""
    validation = ValidationWorkload(latent_shape=workload.latent_shape)
    workload = replace(workload, lora_rank=64, memory=memory, validation=validation)
    transformer, dtype = build(workload, device).eval(), workload.dtype
    forward = transformer.forward

    def autocast_forward(*inputs: Any, **settings: Any) -> Any:  # as accelerate wraps it
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(*inputs, **settings)

    transformer.forward = autocast_forward
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CausalWanPipeline(**parts, transformer=transformer)
    text_shape = (1, workload.max_sequence_length, workload.architecture["text_dim"])

    def sample() -> None:
        noise = torch.randn(validation.num_draws, 1, *validation.latent_shape, device=device)
        conditions = Conditions(prompt_embeds=torch.randn(text_shape, device=device).to(dtype))
        cache_dtype = CACHE_DTYPES[memory.kv_cache_dtype]
        pipeline.sample_latents(conditions, noise, [1000, 757, 522], cache_dtype=cache_dtype)

    peak = peak_of(sample, device, [*transformer.parameters(), *transformer.buffers()])
    plan = plan_training(workload)
    return Measured(peak, plan.weights + plan.validation.sampling, seconds_of(sample, device, num))


def measure_decoding(memory: MemoryConfig, size: str, device: torch.device, num: int) -> Measured:
    """Decoding a video with WAN's VAE, random weights."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae, latent_shape = AutoencoderKLWan(**VAES[size]).to(device, dtype).eval(), latent_shape_of(size)
    cut_up_vae(vae, memory)
    latents = torch.zeros(1, *latent_shape, device=device)

    def decode() -> None:
        for _frames in decode_in_parts(vae, latents):
            pass

    peak = peak_of(decode, device, [latents, *vae.parameters()])
    planned = plan_decoding(dict(vae.config), latent_shape, dtype=dtype, memory=memory)
    weights = sum(parameter.nbytes for parameter in vae.parameters())
    return Measured(peak, weights + planned, seconds_of(decode, device, num))


def peak_of(run: Any, device: torch.device, present: Iterable[torch.Tensor]) -> int:
    """Bytes at the worst moment of a run, with what is there before it."""
    if device.type == "cuda":
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with PeakMemory(torch.nn.Module()) as memory:
        for tensor in present:
            memory.add(tensor)
        run()
    return memory.peak


def seconds_of(run: Any, device: torch.device, num_steps: int) -> float:
    """The median of some runs."""
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(config: Config) -> str:
    """The table of all levers on this machine, as Markdown."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_frames, height, width = CLIPS[config.size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    workload = Workload(
        dtype=dtype,
        architecture=ARCHITECTURES[config.size],
        latent_shape=latent_shape_of(config.size),
    )
    rows = {
        name: try_to_measure(measure_step, replace(workload, **changes), device, config.num_steps)
        for name, changes in STEP_LEVERS.items()
    }
    encoding = {
        name: try_to_measure(measure_encoding, memory, config.size, device, config.num_steps)
        for name, memory in VAE_LEVERS.items()
    }
    sampling = {
        name: try_to_measure(measure_sampling, memory, workload, device, config.num_steps)
        for name, memory in SAMPLING_LEVERS.items()
    }
    decoding = {
        name: try_to_measure(measure_decoding, memory, config.size, device, config.num_steps)
        for name, memory in DECODING_LEVERS.items()
    }
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
    clip = f"{num_frames} x {height} x {width}"
    lines = [
        f"{name}, torch {torch.__version__}; {config.size}, clips of {clip}, batch 1, {dtype}",
        "",
        "| lever | peak [GiB] | of the first | planned [GiB] | time, of the first |",
        "|---|---:|---:|---:|---:|",
        *describe_rows(rows),
        *describe_rows(encoding),
        *describe_rows(sampling),
        *describe_rows(decoding),
    ]
    return "\n".join(lines)


def try_to_measure(measurement: Any, lever: Any, *arguments: Any) -> Measured | str:
    """The measurement, or why there is none."""
    memory = lever.memory if isinstance(lever, Workload) else lever
    device = arguments[-2]
    if device.type == "cpu" and (memory.offload_activations or memory.offload_vae):
        return "host and device are one"
    if device.type == "cpu" and memory.quantize_base in ("nf4", "int8"):
        return "needs a GPU"
    try:
        return measurement(lever, *arguments)
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def describe_rows(rows: dict[str, Measured | str]) -> list[str]:
    """Lines of a table, relative to the first row that was measured."""
    first = next((row for row in rows.values() if isinstance(row, Measured)), None)
    lines = []
    for name, row in rows.items():
        if isinstance(row, Measured):
            cells = (
                f"{row.peak / GIB:.2f}",
                f"{row.peak / first.peak:.2f}",
                f"{row.planned / GIB:.2f}",
                f"{row.seconds / first.seconds:.2f}",
            )
        else:
            cells = (row, "", "", "")
        lines.append(f"| {name.strip()} | " + " | ".join(cells) + " |")
    return lines


# --- planned ---------------------------------------------------------------------------------------------------------

OFFLOADED = replace(RECOMPUTED, offload_activations=True)
PLANNED_LEVERS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, `--gradient_checkpointing`": {"memory": RECOMPUTED},
    "... `--optimizer adamw8bit`": {"memory": RECOMPUTED, "optimizer": "adamw8bit"},
    "LoRA of rank 64": {"lora_rank": 64},
    "LoRA of rank 64, `--gradient_checkpointing`": {"memory": RECOMPUTED, "lora_rank": 64},
    "... `--offload_activations`": {"memory": OFFLOADED, "lora_rank": 64},
    "... and `--kv_cache_dtype int8`": {"memory": replace(OFFLOADED, kv_cache_dtype="int8"), "lora_rank": 64},
    "... and `--quantize_base nf4`": {
        "memory": replace(OFFLOADED, kv_cache_dtype="int8", quantize_base="nf4"),
        "lora_rank": 64,
    },
}
CARDS = (24, 48, 80)  # GiB
NUM_SHARDS = 8


def describe_fit(plan: MemoryPlan) -> str:
    """The need in GiB of steps and of validation, and the smallest card that has both."""
    in_validation = {name: size for name, size in plan.moments.items() if "validation" in name}
    step = max(size for name, size in plan.moments.items() if name not in in_validation)
    needed = [(size + CUDA_OVERHEAD) / GIB for size in (step, max(in_validation.values()))]
    card = next((f"**{card} GB**" for card in CARDS if max(needed) <= card), "none")
    return f"{needed[0]:.0f} | {needed[1]:.0f} | {card}"


def plan(sizes: Sequence[str] = ("1.3b", "5b", "14b"), levers: Iterable[str] = PLANNED_LEVERS) -> str:
    """The table of what fits where, as Markdown, for runs with VAE and text encoder in bf16."""
    lines = [
        "| model | trained | 1 GPU: step | validation | fits | 8 GPUs, FSDP2: step | validation | fits |",
        "|---|---|---:|---:|---|---:|---:|---|",
    ]
    for size in sizes:
        for name in levers:
            workload = workload_of(size, **PLANNED_LEVERS[name])
            sharded = replace(workload, sharding="weights", num_shards=NUM_SHARDS)
            not_sharded = workload.memory.quantize_base or workload.optimizer == "adamw8bit"
            cells = [
                describe_workload(size, workload),
                "| | not with FSDP2" if not_sharded else describe_workload(size, sharded),
            ]
            lines.append(f"| {size.upper()} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def workload_of(size: str, **changes: Any) -> Workload:
    """A run at the size's own length and resolution, which validates."""
    latent_shape = latent_shape_of(size)
    validation = ValidationWorkload(latent_shape=latent_shape, measures_loss=True)
    return Workload(architecture=ARCHITECTURES[size], latent_shape=latent_shape, validation=validation, **changes)


def describe_workload(size: str, workload: Workload) -> str:
    """The need of a run with VAE and text encoder."""
    return describe_fit(with_beside(plan_training(workload), size))


MATCHED = (("1.3b", "1.3b"), ("1.3b", "14b"), ("14b", "14b"))  # student and critic, teacher
MATCHING_LEVERS: dict[str, dict[str, Any]] = {
    "all weights": {"memory": RECOMPUTED},
    "LoRA of rank 64": {"memory": RECOMPUTED, "lora_rank": 64},
    "... `--offload_activations --kv_cache_dtype int8`": {
        "memory": replace(OFFLOADED, kv_cache_dtype="int8"),
        "lora_rank": 64,
    },
}


def plan_matched(pairs: Iterable[tuple[str, str]] = MATCHED, levers: Iterable[str] = MATCHING_LEVERS) -> str:
    """The same of distribution matching, all with gradient checkpointing."""
    lines = [
        "| model | teacher | trained | 1 GPU: step | validation | fits | 8 GPUs, FSDP2: step | validation | fits |",
        "|---|---|---|---:|---:|---|---:|---:|---|",
    ]
    for size, teacher_size in pairs:
        for name in levers:
            workload = workload_of(size, has_clean_context=True, **MATCHING_LEVERS[name])
            sharded = replace(workload, sharding="weights", num_shards=NUM_SHARDS)
            cells = [describe_matching(size, teacher_size, each) for each in (workload, sharded)]
            lines.append(f"| {size.upper()} | {teacher_size.upper()} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_matching(size: str, teacher_size: str, student: Workload) -> str:
    """The need of a run of distribution matching in four steps."""
    whole = {**student.architecture, "num_frame_per_block": None}
    critic = replace(student, architecture=whole, has_clean_context=False)
    scorer = replace(critic, architecture={**ARCHITECTURES[teacher_size], "num_frame_per_block": None})
    shares = student.lora_rank > 0 and student.sharding == "none"
    plan = plan_matching(
        student,
        critic,
        replace(scorer, lora_rank=0, sharding="none"),
        num_draws=count_draws(4, "renoise"),
        critic_shares_base=shares,
        teacher_shares_base=shares and size == teacher_size,
    )
    return describe_fit(with_beside(plan, size))


def with_beside(plan: MemoryPlan, size: str) -> MemoryPlan:
    """The plan of a run with VAE and text encoder."""
    beside = plan_beside(size)
    return replace(
        plan,
        vae=beside.vae,
        encoding=beside.encoding,
        text_encoder=beside.text_encoder,
        validation=replace(plan.validation, decoding=beside.validation.decoding),
    )


@cache
def plan_beside(size: str) -> MemoryPlan:
    """What VAE and text encoder take, in bf16: no lever that is planned changes it."""
    nothing = MemoryPlan(workload=workload_of(size), weights=0, optimizer=0, passes=0)
    plan = with_vae(nothing, vae_config_of(size), dtype=torch.bfloat16, video_shape=CLIPS[size])
    return replace(plan, text_encoder=text_encoder_bytes(UMT5_XXL, torch.bfloat16))


if __name__ == "__main__":
    config = parse_config(Config, description=__doc__)
    print(f"{plan()}\n\nDistribution matching:\n\n{plan_matched()}" if config.plan else measure(config))
