"""The training step over its floor, where its time goes, how it scales, and what fewer bits do to it."""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import Bench, table
from flops import count_forward_flops
from layers import run_passes

from causal_wan.blocks import CausalConfig
from causal_wan.config.settings import TrainingConfig
from causal_wan.records.metrics import STUDENT
from causal_wan.training.loop import train
from causal_wan.training.profiling import draw_parts
from causal_wan.training.setup import make_accelerator, make_optimizer, prepare_run


ROOT = Path(__file__).parents[1]
NUM_STEPS = 12
NUM_WARM_UP = 2


class NoBatch(NamedTuple):
    """What a step counts, of inputs that are always the same."""

    num_items: torch.Tensor
    num_tokens: int


def make_bare_step(bench: Bench, model: torch.nn.Module) -> Callable[[], None]:
    """A step: forward, backward, clip, optimizer, and nothing else."""
    config, inputs = TrainingConfig(output_dir=""), bench.make_inputs()
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters, config)

    def step() -> None:
        with bench.autocast():
            velocity = model(*inputs, return_dict=False)[0]
        velocity.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_in_turns(bench: Bench, bare_step: Callable[[], None], model: torch.nn.Module) -> list[tuple[float, float]]:
    """Seconds of a bare step and of one of `causal_wan.training.loop.train`, which take turns, step by step."""
    bare, ours, ends, inputs = [], [], [], bench.make_inputs()

    def prepare_batch(batch: Any) -> NoBatch:
        if ends:
            ours.append(bench.now() - ends[-1])
        bare.append(bench.seconds(bare_step))
        ends.append(bench.now())
        return NoBatch(torch.ones((), device=bench.device), bench.size.num_tokens)

    def compute_loss(
        model: torch.nn.Module, batch: Any, num_items: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        velocity = model(*inputs, return_dict=False)[0]
        return velocity.float().square().mean(), {}

    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            output_dir=folder,
            max_train_steps=NUM_STEPS,
            mixed_precision="bf16" if bench.is_gpu else "no",
            checkpointing_steps=10 * NUM_STEPS,
            report_to=("none",),
        )
        train(
            prepare_run(make_accelerator(config), config, {STUDENT: model}),
            make_dataloader=lambda *, start, end, step: torch.utils.data.DataLoader(range(start, end)),
            prepare_batch=prepare_batch,
            losses={STUDENT: compute_loss},
            summarize=lambda sums: {},
        )
    return list(zip(bare, ours, strict=False))[NUM_WARM_UP:]


def matmul_rate(bench: Bench) -> float:
    """Operations a second of a large product of matrices, the best of many: what the machine can do."""
    width = 8192 if bench.is_gpu else 1536
    a, b = (torch.randn(width, width, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return 2 * width**3 / min(bench.seconds(lambda: a @ b) for _ in range(20))


def measure_step(bench: Bench) -> list[str]:
    """Our loop against the bare one, in turns, and both against what their products would take at full rate."""
    models = [bench.make_transformer(num_frame_per_block=bench.size.block).train() for _ in range(2)]
    if bench.is_gpu:
        for model in models:
            model.enable_gradient_checkpointing()
    pairs = run_in_turns(bench, make_bare_step(bench, models[0]), models[1])
    rate = matmul_rate(bench)
    bare, ratio = statistics.median(b for b, _ in pairs), statistics.median(ours / b for b, ours in pairs)
    flops = bench.size.flops
    floor = flops.step(recomputes=bench.is_gpu) / rate
    mfu = flops.step() / (bare * ratio) / rate
    rows = [
        ("bare loop: forward, backward, clip, AdamW", "1.00", f"{1e3 * bare:.1f}"),
        ("`training.train`, without data", f"{ratio:.3f}", ""),
        (
            "floor: its products at the rate of a large one",
            f"{floor / bare:.2f}",
            f"{1e3 * floor:.1f}",
        ),
    ]
    goals = [bench.goal("our loop, of the bare one", ratio, at_most=1.02 if bench.is_gpu else 1.03)]
    if bench.is_gpu:
        goals.append(bench.goal("MFU", mfu, at_least=0.55))
    return [
        *table(("training step", "time, of the bare loop", "ms"), rows),
        "",
        f"{flops.step() / 1e12:.3g} TFLOP a step, forward and backward, block-causal pairs only; a large product ran "
        f"at {rate / 1e12:.3g} TFLOP/s. MFU of our loop: {mfu:.2f} of that rate.",
        *goals,
    ]


def measure_scaling(bench: Bench) -> list[str]:
    """Forward and backward against the length of clips, their size, and how many there are."""
    channels, num_frames, height, width = bench.size.latent_shape
    cases = {f"{frames} latent frames": ((channels, frames, height, width), 1) for frames in (1, 5, 21, 42)}
    cases["half the height and width"] = ((channels, num_frames, height // 4 * 2, width // 4 * 2), 1)
    cases["2 clips"] = (bench.size.latent_shape, 2)
    model = bench.make_transformer(num_frame_per_block=bench.size.block).train()
    if bench.is_gpu:
        model.enable_gradient_checkpointing()

    def causal_config(shape: tuple[int, ...]) -> CausalConfig:
        return CausalConfig(num_frame_per_block=None if shape[1] % bench.size.block else bench.size.block)

    def run(shape: tuple[int, ...], batch_size: int) -> None:
        model.set_causal_config(causal_config(shape))
        run_passes(bench, model, bench.make_inputs(shape, batch_size))

    whole = f"{num_frames} latent frames"
    order = [whole, *(name for name in cases if name != whole)]
    measured = bench.compare({name: functools.partial(run, *cases[name]) for name in order})

    def work(name: str) -> float:
        shape, batch_size = cases[name]
        lengths = causal_config(shape).block_lengths(shape[1])
        return batch_size * count_forward_flops(bench.size.architecture, shape, lengths).total

    rows = [(name, f"{measured[name][1]:.3f}", f"{work(name) / work(whole):.3f}") for name in cases]
    return table(("forward + backward", f"time, of {whole}", "operations, of the same"), rows)


def measure_context(bench: Bench) -> list[str]:
    """Forward and backward of teacher forcing, against blocks that see noisy ones."""
    model = bench.make_transformer(num_frame_per_block=bench.size.block).train()
    if bench.is_gpu:
        model.enable_gradient_checkpointing()
    inputs = bench.make_inputs()
    variants = {
        "--context noisy": functools.partial(run_passes, bench, model, inputs),
        "--context clean": functools.partial(run_passes, bench, model, inputs, context_latents=inputs[0]),
    }
    work = [
        count_forward_flops(
            bench.size.architecture, bench.size.latent_shape, bench.size.block_lengths, has_clean_context=is_clean
        ).total
        for is_clean in (False, True)
    ]
    measured = bench.compare(variants)
    rows = [
        (name, f"{ratio:.2f}", f"{operations / work[0]:.2f}")
        for (name, (_, ratio)), operations in zip(measured.items(), work, strict=True)
    ]
    return table(("forward + backward", "time, of noisy context", "operations, of the same"), rows)


# --- real runs on the embedded checkpoint ----------------------------------------------------------------------------


def run_script(folder: Path, name: str, *flags: object) -> list[dict[str, float]]:
    """The metrics of a run on sketches, whose latents are kept."""
    command = [sys.executable, "train_video_regression.py", "--config", "examples/objectives/recipe.yaml"]
    command += ["--dataset_base_path", folder / "data" / "videos", "--metadata_path", folder / "data" / "train.csv"]
    command += ["--output_dir", folder / name, "--latents_dir", folder / "latents", "--cache_latents", "True"]
    command += ["--validation_metadata_path", "None", "--logging_steps", 1, *flags]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def make_sketches(folder: Path) -> None:
    """A few clips."""
    command = [sys.executable, "examples/sketch/make_dataset.py", "--output_dir", folder / "data"]
    command += ["--kinds", "bird,umbrella", "--num_clips", 16, "--num_heldout", 1]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)


def measure_precision(bench: Bench) -> list[str]:
    """Speed and loss of the embedded checkpoint on sketches, in fewer bits, against bf16 and AdamW."""
    variants = {
        "bf16": (),
        "bf16, --optimizer adamw8bit": ("--optimizer", "adamw8bit"),
        "--mixed_precision fp8": ("--mixed_precision", "fp8"),
        "float32": ("--mixed_precision", "no"),
    }
    num_steps, rows = 24, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sketches(folder)
        for name, flags in variants.items():
            common = ("--mixed_precision", "bf16", "--max_train_steps", num_steps, "--lr_scheduler", "constant")
            precision = common[2:] if "--mixed_precision" in flags else common
            entries = run_script(folder, name.replace(" ", "-"), *precision, "--lr_warmup_steps", 0, *flags)
            losses = [entry["generator_loss"] for entry in entries]
            seconds = statistics.median(entry["compute_seconds_per_step"] for entry in entries[num_steps // 2 :])
            parts = [statistics.mean(losses[start : start + 8]) for start in range(0, num_steps, 8)]
            rows.append((name, seconds, parts))
    columns = (
        "embedded checkpoint, 8 sketches a step",
        "a step, of bf16",
        *(f"loss, steps {a} to {a + 7}" for a in (1, 9, 17)),
    )
    return table(
        columns,
        [(name, f"{seconds / rows[0][1]:.2f}", *(f"{part:.4f}" for part in parts)) for name, seconds, parts in rows],
    )


def measure_parts(bench: Bench, picture: Path | None = None) -> list[str]:
    """Where the time of a step goes, on sketches that are encoded as training goes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sketches(folder)
        run_script(
            folder,
            "run",
            "--cache_latents",
            "False",
            "--latents_dir",
            "None",
            "--max_train_steps",
            8,
            "--profile",
            4,
            7,
        )
        parts = json.loads((folder / "run" / "profile" / "step.json").read_text())
    if picture is not None:
        draw_parts(parts, picture, "a step of the embedded checkpoint, 8 sketches, nothing cached")
    whole = sum(seconds for name, seconds in parts.items() if "within" not in name)
    lines = table(
        ("embedded checkpoint, 8 sketches a step, nothing cached", "share of a step"),
        [(name, f"{seconds / whole:.3f}") for name, seconds in parts.items()],
    )
    return lines if picture is None else [*lines, "", f"![parts of a step]({picture.name})"]
