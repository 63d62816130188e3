"""What the benchmarks share: sizes, timing in turns, tables of ratios, goals.

Only ratios count: the machines are shared and noisy. So on a CPU it is processor time that is compared; variants take
turns, round by round, and a ratio is the median over rounds of the ratios within a round.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from flops import ForwardFlops, count_forward_flops

from causal_wan.geometry import WAN
from causal_wan.model.transformer import CausalWanTransformer3DModel


COMMON = {"in_channels": WAN.channels, "out_channels": WAN.channels, "freq_dim": 256}
SMALL_VAE = {"base_dim": 16, "num_res_blocks": 1}


@dataclass(frozen=True, kw_only=True)
class Size:
    """An architecture and the latents of its clips."""

    architecture: dict[str, int]
    latent_shape: tuple[int, int, int, int]  # (C, F, H, W)
    vae: dict[str, int] = field(default_factory=lambda: SMALL_VAE)
    block: int = 3

    @property
    def num_tokens(self) -> int:
        """Of a clip."""
        return WAN.num_tokens(self.latent_shape)

    @property
    def block_lengths(self) -> list[int]:
        """Latent frames of each block."""
        return [self.block] * (self.latent_shape[1] // self.block)

    @property
    def flops(self) -> ForwardFlops:
        """Of a pass of a clip."""
        return count_forward_flops(self.architecture, self.latent_shape, self.block_lengths)


SIZES = {
    "small": Size(
        architecture=COMMON
        | {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4, "text_dim": 256},
        latent_shape=WAN.latent_shape(81, 160, 192),
    ),
    "mid": Size(
        architecture=COMMON
        | {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 8, "text_dim": 512},
        latent_shape=WAN.latent_shape(81, 160, 192),
    ),
    "1.3b": Size(
        architecture=COMMON
        | {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096},
        latent_shape=WAN.latent_shape(81, 480, 832),
        vae={},
    ),
}


@dataclass
class Bench:
    """Where and how often things are timed; and which goals were missed."""

    size: Size
    device: torch.device
    num_rounds: int
    missed: list[str] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        """Whether there is one."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU."""
        return torch.bfloat16 if self.is_gpu else torch.float32

    def describe(self) -> str:
        """The machine, in a line."""
        if self.is_gpu:
            return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        return f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s), torch {torch.__version__}"

    def autocast(self) -> torch.autocast:
        """The precision that is trained in."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.is_gpu)

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def now(self) -> float:
        """Seconds on the device's clock when it has done all that it was told.

        On a CPU it is the processor time of this process alone: others run beside it.
        """
        self.wait()
        return time.perf_counter() if self.is_gpu else time.process_time()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run, to its end on the device."""
        start = self.now()
        run()
        return self.now() - start

    def compare(self, variants: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
        """Of each variant: its median time, and the median of its ratios to the first; after a round to warm up."""
        rounds = [{name: self.seconds(run) for name, run in variants.items()} for _ in range(self.num_rounds + 1)][1:]
        first = next(iter(variants))
        return {
            name: (
                statistics.median(times[name] for times in rounds),
                statistics.median(times[name] / times[first] for times in rounds),
            )
            for name in variants
        }

    def peak_gib(self, run: Callable[[], Any]) -> float:
        """Highest memory of a GPU in one run."""
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30

    def goal(self, text: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> str:
        """A line that says whether a goal is met; those that are not make the benchmark fail."""
        is_met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        if not is_met:
            self.missed.append(f"{text}: {value:.3g}")
        bound = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}"
        return f"Goal: {text} {bound}. Measured: {value:.3g}, {'met' if is_met else '**missed**'}."

    def make_transformer(self, **causal: int) -> CausalWanTransformer3DModel:
        """With random weights in float32, as they are trained."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return CausalWanTransformer3DModel(**self.size.architecture, **causal)

    def make_vae(self) -> AutoencoderKLWan:
        """With random weights: WAN 2.1's, or a small one."""
        torch.manual_seed(0)
        return AutoencoderKLWan(**self.size.vae).to(self.device, self.dtype).eval()

    def make_inputs(
        self, latent_shape: Sequence[int] | None = None, batch_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps by frame, and embeddings of prompts."""
        shape = latent_shape or self.size.latent_shape
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(batch_size, *shape, generator=generator)
        timesteps = 1000 * torch.rand(batch_size, shape[1], generator=generator)
        embeds = torch.randn(batch_size, 512, self.size.architecture["text_dim"], generator=generator)
        return latents.to(self.device), timesteps.to(self.device), embeds.to(self.device)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of Markdown; the first column is text, the others are numbers."""
    lines = ["", f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def ratio_table(title: str, measured: dict[str, tuple[float, float]]) -> list[str]:
    """Lines of Markdown for what `Bench.compare` gives."""
    first = next(iter(measured))
    rows = [(name, f"{ratio:.2f}", f"{1e3 * seconds:.1f}") for name, (seconds, ratio) in measured.items()]
    return table((title, f"time, of {first}", "ms"), rows)
