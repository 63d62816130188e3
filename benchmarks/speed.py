"""Layers, steps, encoding, sampling and start-up, each against a floor or a peer that is timed in the same run.

    python benchmarks/speed.py                  # this machine, small models; part of `make benchmark`
    python benchmarks/speed.py --size mid --parts step
    python benchmarks/speed.py --size 1.3b --parts attention modulation    # one GPU, WAN 1.3B, 81 x 480 x 832, bf16

Prints Markdown, and with `--output` writes it as well. The exit status is 1 if a goal is missed.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch


sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import SIZES, Bench
from generation import measure_sampling, measure_vae
from layers import measure_attention, measure_checkpointing, measure_compilation, measure_modulation
from startup import measure_startup
from steps import measure_context, measure_parts, measure_precision, measure_scaling, measure_step

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import PositiveInt, checked_dataclass


Part = Literal[
    *("attention", "modulation", "compilation", "checkpointing", "step", "scaling", "context", "vae", "sampling"),
    *("precision", "parts", "startup"),
]


@checked_dataclass
class Config:
    """What to measure."""

    size: Literal["small", "mid", "1.3b"] = "small"
    """Architecture and clip; the last three parts run the embedded checkpoint whatever it is."""
    parts: tuple[Part, ...] = get_args(Part)
    """Tables to make."""
    num_rounds: PositiveInt = 5
    """Rounds of each table, after one that warms up."""
    output: LocalPath | None = None
    """Markdown file to write what is printed to; pictures go beside it."""
    device: str | None = None
    """None is the GPU if there is one."""


def main(config: Config) -> None:
    """Prints the tables as Markdown."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(SIZES[config.size], device, config.num_rounds)
    picture = None if config.output is None else Path(config.output).with_suffix(".png")
    measures: dict[str, Callable[[Bench], list[str]]] = {
        "attention": measure_attention,
        "modulation": measure_modulation,
        "compilation": measure_compilation,
        "checkpointing": measure_checkpointing,
        "step": measure_step,
        "scaling": measure_scaling,
        "context": measure_context,
        "vae": measure_vae,
        "sampling": measure_sampling,
        "precision": measure_precision,
        "parts": partial(measure_parts, picture=picture),
        "startup": measure_startup,
    }
    command = f"python benchmarks/speed.py --size {config.size} --parts {' '.join(config.parts)}"
    lines = [f"`{command}`, on a shared machine: {bench.describe()}; latents {bench.size.latent_shape}, {bench.dtype}"]
    print(lines[0])
    for part in config.parts:
        made = measures[part](bench)
        print("\n".join(made), flush=True)
        lines += made
    if config.output is not None:
        Path(config.output).write_text("\n".join(lines) + "\n")
    if bench.missed:
        print(f"goals missed: {'; '.join(bench.missed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
