"""Attention, training step and sampling, each against a floor or a peer that is timed in the same run.

    python benchmarks/speed.py                  # this machine, small models; what `make benchmark` runs
    python benchmarks/speed.py --size 1.3b      # one GPU, WAN 1.3B at 81 x 480 x 832, random weights, bf16
    python benchmarks/speed.py --parts sampling

Only ratios count: the machines are shared and noisy. The variants of a table take turns, round by round, and a ratio
is the median over rounds of the ratios within a round.
"""

import functools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


sys.path.insert(0, str(Path(__file__).parents[1]))

from causal_wan.block_attention import block_causal_spans
from causal_wan.flow import add_noise, latents_from_velocity, sampling_timesteps, sigmas_from_timesteps
from causal_wan.pipeline import DEFAULT_STEP_LIST, CausalWanPipeline
from causal_wan.rollout import draw_noise
from causal_wan.settings import TrainingConfig
from causal_wan.streaming_vae import StreamingDecoder
from causal_wan.training import make_accelerator, make_optimizer, prepare_run, train
from causal_wan.transformer import CausalWanTransformer3DModel


Part = Literal["attention", "modulation", "step", "sampling"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """An architecture and the latents of its clips."""

    architecture: dict[str, int]
    latent_shape: tuple[int, int, int, int]  # (C, F, H, W)
    block: int = 3

    @property
    def num_tokens(self) -> int:
        """Of a clip."""
        _, num_frames, height, width = self.latent_shape
        return num_frames * (height // 2) * (width // 2)


COMMON = {"in_channels": 16, "out_channels": 16, "freq_dim": 256}
SIZES = {
    "small": Size(
        architecture=COMMON
        | {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4, "text_dim": 256},
        latent_shape=(16, 21, 20, 24),
    ),
    "1.3b": Size(
        architecture=COMMON
        | {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        latent_shape=(16, 21, 60, 104),
    ),
}
STEP_LIST = DEFAULT_STEP_LIST[:-1]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    size: Literal["small", "1.3b"] = "small"
    """Architecture and clip."""
    parts: tuple[Part, ...] = ("attention", "modulation", "step", "sampling")
    """Tables to make."""
    num_rounds: int = 7
    """Rounds of each table, after one that warms up."""
    device: str | None = None
    """None is the GPU if there is one."""


@dataclass
class Bench:
    """Where and how often things are timed."""

    size: Size
    device: torch.device
    num_rounds: int

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def seconds(self, run: Callable[[], Any]) -> float:
        """Wall time of one run, to its end on the device."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compare(self, variants: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
        """Of each variant: its median time, and the median of its ratios to the first."""
        rounds = []
        for number in range(self.num_rounds + 1):
            times = {name: self.seconds(run) for name, run in variants.items()}
            if number:
                rounds.append(times)
        first = next(iter(variants))
        return {
            name: (
                statistics.median(times[name] for times in rounds),
                statistics.median(times[name] / times[first] for times in rounds),
            )
            for name in variants
        }

    def table(self, title: str, variants: dict[str, Callable[[], Any]]) -> list[str]:
        """Lines of Markdown."""
        measured = self.compare(variants)
        first = next(iter(variants))
        lines = ["", f"| {title} | time, of {first} | ms |", "|---|---:|---:|"]
        return lines + [f"| {name} | {ratio:.2f} | {1e3 * s:.1f} |" for name, (s, ratio) in measured.items()]


# --- attention -------------------------------------------------------------------------------------------------------


def measure_attention(bench: Bench) -> list[str]:
    """Block-causal self-attention, forward and backward, in the forms that it can take."""
    size, heads = bench.size, bench.size.architecture["num_attention_heads"]
    shape = (1, heads, size.num_tokens, size.architecture["attention_head_dim"])
    states = [torch.randn(shape, device=bench.device, dtype=bench.dtype, requires_grad=True) for _ in range(3)]
    num_frames = size.latent_shape[1]
    frame_tokens = size.num_tokens // num_frames
    spans = block_causal_spans([size.block] * (num_frames // size.block), frame_tokens)
    block = torch.arange(size.num_tokens, device=bench.device) // (frame_tokens * size.block)

    def per_block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        parts = [
            F.scaled_dot_product_attention(
                query[:, :, span.query_start : span.query_end],
                key[:, :, span.key_start : span.query_end],
                value[:, :, span.key_start : span.query_end],
            )
            for span in spans
        ]
        return torch.cat(parts, dim=2)

    forms: dict[str, Callable[..., torch.Tensor]] = {
        "full attention": F.scaled_dot_product_attention,
        "one dense call a block": per_block,
        "a dense mask": functools.partial(F.scaled_dot_product_attention, attn_mask=block[:, None] >= block[None, :]),
    }
    if bench.device.type == "cuda":  # there is no backward of it on a CPU
        mask = create_block_mask(
            lambda b, h, q, k: block[q] >= block[k], None, None, size.num_tokens, size.num_tokens, device=bench.device
        )
        forms["FlexAttention, compiled"] = functools.partial(torch.compile(flex_attention), block_mask=mask)

    def run(form: Callable[..., torch.Tensor]) -> None:
        out = form(*states)
        torch.autograd.grad(out, states, torch.ones_like(out))

    variants = {name: functools.partial(run, form) for name, form in forms.items()}
    pairs = sum((span.query_end - span.query_start) * (span.query_end - span.key_start) for span in spans)
    title = f"attention, {size.num_tokens} tokens, {len(spans)} blocks, forward + backward"
    note = f"Block-causal attention has {pairs / size.num_tokens**2:.2f} of the pairs."
    return [*bench.table(title, variants), "", note]


# --- the transformer -------------------------------------------------------------------------------------------------


def make_transformer(bench: Bench, **causal: int) -> CausalWanTransformer3DModel:
    """With random weights, in the precision that is trained."""
    torch.manual_seed(0)
    with torch.device(bench.device):
        return CausalWanTransformer3DModel(**bench.size.architecture, **causal)


def make_inputs(bench: Bench) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, timesteps by frame, and embeddings of a prompt."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, *bench.size.latent_shape, generator=generator)
    timesteps = 1000 * torch.rand(1, bench.size.latent_shape[1], generator=generator)
    prompt_embeds = torch.randn(1, 512, bench.size.architecture["text_dim"], generator=generator)
    return latents.to(bench.device), timesteps.to(bench.device), prompt_embeds.to(bench.device)


def measure_modulation(bench: Bench) -> list[str]:
    """A layer that is told the timesteps of frames, against the stock model that is told those of tokens."""
    architecture = bench.size.architecture | {"num_layers": 2}
    latents, timesteps, prompt_embeds = make_inputs(bench)
    by_token = timesteps.repeat_interleave(bench.size.num_tokens // timesteps.shape[1], dim=1)
    models = []
    for kind in (WanTransformer3DModel, CausalWanTransformer3DModel):
        with torch.device(bench.device):
            models.append(kind(**architecture))

    def run(model: torch.nn.Module, timesteps: torch.Tensor) -> None:
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            velocity = model(latents, timesteps, prompt_embeds, return_dict=False)[0]
        velocity.float().square().mean().backward()
        model.zero_grad()

    variants = {
        "stock, a timestep a token": functools.partial(run, models[0], by_token),
        "ours, a timestep a frame": functools.partial(run, models[1], timesteps),
    }
    lines = bench.table("2 layers, forward + backward, both ways in time", variants)
    if bench.device.type == "cuda":
        peaks = {}
        for name, variant in variants.items():
            torch.cuda.reset_peak_memory_stats()
            variant()
            peaks[name] = torch.cuda.max_memory_allocated()
        stock, ours = peaks.values()
        lines += ["", f"Peak memory of ours, of the stock model's: {ours / stock:.2f}."]
    return lines


# --- the training step -----------------------------------------------------------------------------------------------


class Stopwatch:
    """Times of the steps of a loop, taken where each begins."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.starts = bench, []

    def lap(self) -> None:
        """A step begins."""
        self.bench.wait()
        self.starts.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a step, the median after two that warm up."""
        return statistics.median(b - a for a, b in zip(self.starts[2:], self.starts[3:], strict=False))


NUM_STEPS = 12


def run_bare_loop(bench: Bench, model: torch.nn.Module, folder: str) -> float:
    """Seconds of a step: forward, backward, clip, optimizer, and nothing else."""
    config = TrainingConfig(output_dir=folder)
    parameters = list(model.parameters())
    optimizer, watch = make_optimizer(parameters, config), Stopwatch(bench)
    latents, timesteps, prompt_embeds = make_inputs(bench)
    for _ in range(NUM_STEPS):
        watch.lap()
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            velocity = model(latents, timesteps, prompt_embeds, return_dict=False)[0]
        velocity.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return watch.seconds


def run_our_loop(bench: Bench, model: torch.nn.Module, folder: str) -> float:
    """Seconds of a step of `causal_wan.training.train` on the same work."""
    precision = "bf16" if bench.dtype == torch.bfloat16 else "no"
    config = TrainingConfig(
        output_dir=folder,
        max_train_steps=NUM_STEPS,
        mixed_precision=precision,
        checkpointing_steps=10 * NUM_STEPS,
        report_to=("none",),
    )
    watch, inputs = Stopwatch(bench), make_inputs(bench)
    run = prepare_run(make_accelerator(config), config, model)

    def prepare_batch(batch: Any) -> dict[str, Any]:
        watch.lap()
        return {"num_items": torch.ones((), device=bench.device), "num_tokens": bench.size.num_tokens}

    def compute_loss(
        model: torch.nn.Module, batch: Any, num_items: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        velocity = model(*inputs, return_dict=False)[0]
        return velocity.float().square().mean(), {}

    train(
        run,
        make_dataloader=lambda *, start, end, step: torch.utils.data.DataLoader(range(start, end)),
        prepare_batch=prepare_batch,
        compute_loss=compute_loss,
        summarize=lambda sums: {},
    )
    return watch.seconds


def measure_step(bench: Bench) -> list[str]:
    """Our loop against the bare one, in turns."""
    ratios, bare = [], []
    for _ in range(max(bench.num_rounds // 2, 1)):
        seconds = []
        for loop in (run_bare_loop, run_our_loop):
            model = make_transformer(bench, num_frame_per_block=bench.size.block).train()
            if bench.device.type == "cuda":
                model.enable_gradient_checkpointing()
            with tempfile.TemporaryDirectory() as folder:
                seconds.append(loop(bench, model, folder))
            del model
        bare.append(seconds[0])
        ratios.append(seconds[1] / seconds[0])
    return [
        "",
        "| training step | time, of the bare loop | ms |",
        "|---|---:|---:|",
        f"| bare loop: forward, backward, clip, AdamW | 1.00 | {1e3 * statistics.median(bare):.1f} |",
        f"| `training.train`, without data | {statistics.median(ratios):.3f} | |",
    ]


# --- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_without_cache(
    transformer: CausalWanTransformer3DModel, prompt_embeds: torch.Tensor, noise: torch.Tensor, steps: tuple
) -> torch.Tensor:
    """What a rollout computes, by passes over all earlier blocks as well."""
    timesteps = sampling_timesteps(steps).to(noise.device)
    block, clean = transformer.config.num_frame_per_block, noise[0][:, :, :0]
    for start in range(0, noise.shape[3], block):
        noisy = noise[0][:, :, start : start + block]
        for step, timestep in enumerate(timesteps):
            frames = torch.cat([clean, noisy], dim=2)
            levels = torch.zeros(frames.shape[0], frames.shape[2], device=noise.device)
            levels[:, start:] = timestep
            velocity = transformer(frames.to(prompt_embeds.dtype), levels, prompt_embeds, return_dict=False)[0]
            sigmas = sigmas_from_timesteps(timestep.expand(len(frames)))
            latents = latents_from_velocity(noisy, velocity[:, :, start:], sigmas)
            if step + 1 < len(timesteps):
                fresh = noise[step + 1][:, :, start : start + block]
                noisy = add_noise(latents, fresh, sigmas_from_timesteps(timesteps[step + 1].expand(len(frames))))
        clean = torch.cat([clean, latents], dim=2)
    return clean


def measure_sampling(bench: Bench) -> list[str]:
    """The rollout with its cache, against passes over the past, and against 50 guided steps both ways in time."""
    size = bench.size
    transformer = make_transformer(bench, num_frame_per_block=size.block).to(bench.dtype).eval()
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CausalWanPipeline(**parts, transformer=transformer)
    noise = draw_noise(1, size.latent_shape, len(STEP_LIST)).to(bench.device)
    prompt_embeds = make_inputs(bench)[2].to(bench.dtype)
    with_cache = pipeline.sample_latents(prompt_embeds, noise, STEP_LIST)
    without = sample_without_cache(transformer, prompt_embeds, noise, STEP_LIST)
    error = (with_cache - without).abs().max() / without.abs().max()
    variants = {
        "with the cache": lambda: pipeline.sample_latents(prompt_embeds, noise, STEP_LIST),
        "over the past again": lambda: sample_without_cache(transformer, prompt_embeds, noise, STEP_LIST),
        "one pass both ways in time": functools.partial(run_one_pass, bench, transformer, prompt_embeds),
    }
    measured = bench.compare(variants)
    ratio, one_pass = measured["over the past again"][1], measured["one pass both ways in time"][1]
    lines = [
        "",
        f"| sampling {size.latent_shape[1]} latent frames in blocks of {size.block}, {len(STEP_LIST)} steps "
        "| time, of the rollout with the cache |",
        "|---|---:|",
        "| with the cache | 1.00 |",
        f"| over the past again (equal to {float(error):.0e}) | {ratio:.2f} |",
        f"| 50 steps both ways in time with guidance: 100 passes, of which one was timed | {100 * one_pass:.1f} |",
    ]
    return lines + describe_stream(bench, pipeline, prompt_embeds, noise)


@torch.no_grad()
def run_one_pass(bench: Bench, transformer: CausalWanTransformer3DModel, prompt_embeds: torch.Tensor) -> None:
    """Of the whole clip as one block."""
    latents, timesteps, _ = make_inputs(bench)
    block = transformer.config.num_frame_per_block
    transformer.set_causal_config(num_frame_per_block=None)
    transformer(latents.to(bench.dtype), timesteps[:, 0], prompt_embeds, return_dict=False)
    transformer.set_causal_config(num_frame_per_block=block)


def describe_stream(
    bench: Bench, pipeline: CausalWanPipeline, prompt_embeds: torch.Tensor, noise: torch.Tensor
) -> list[str]:
    """Frames a second and the wait for the first ones, with WAN 2.1's VAE, random weights."""
    vae = AutoencoderKLWan() if bench.size is SIZES["1.3b"] else AutoencoderKLWan(base_dim=16, num_res_blocks=1)
    vae = vae.to(bench.device, bench.dtype).eval()

    def stream() -> Iterator[float]:
        decoder = StreamingDecoder(vae)
        bench.wait()
        start = time.perf_counter()
        for block in pipeline.sample_blocks(prompt_embeds, noise, STEP_LIST):
            decoder.decode(block)
            bench.wait()
            yield time.perf_counter() - start

    list(stream())  # warms up
    times = [list(stream()) for _ in range(max(bench.num_rounds // 2, 1))]
    first, whole = statistics.median(t[0] for t in times), statistics.median(t[-1] for t in times)
    num_frames = 4 * (noise.shape[3] - 1) + 1
    return [
        "",
        f"Decoded block by block: the first frames after {first / whole:.2f} of the time of the clip ({first:.2f} s), "
        f"{num_frames / whole:.1f} frames a second on this machine.",
    ]


# --- the whole -------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], list[str]]] = {
    "attention": measure_attention,
    "modulation": measure_modulation,
    "step": measure_step,
    "sampling": measure_sampling,
}


def main(config: Config) -> None:
    """Prints the tables as Markdown."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(SIZES[config.size], device, config.num_rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} thread(s)"
    print(
        f"{name}{threads}, torch {torch.__version__}; {config.size}, latents {bench.size.latent_shape}, {bench.dtype}"
    )
    for part in config.parts:
        print("\n".join(PARTS[part](bench)), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
