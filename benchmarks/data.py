"""What data costs: decoding against bare PyAV and torchcodec, cached latents against encoding as training goes.

    python benchmarks/data.py                        # this machine: decoding, and the embedded checkpoint
    python benchmarks/data.py --size 1.3b            # one GPU: WAN 1.3B's VAE at 81 x 480 x 832, random weights

Times are relative to the first row of their table, measured in turns in the same run: on shared machines seconds say
little.
"""

import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import tyro


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from causal_wan.sample_order import ClipShape
from dataset_utils import DataConfig, Row, load_rows, load_video


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    size: Literal["small", "1.3b"] = "small"
    """Checkpoint and clips: the embedded one, or WAN 1.3B's shapes with random weights."""
    num_repeats: int = 7
    """Timed turns of each row, after one that warms up; their median counts."""


# --- decoding --------------------------------------------------------------------------------------------------------


def write_clip(path: Path, shape: ClipShape, seed: int = 0) -> None:
    """A moving pattern with noise, H.264, at 16 frames a second."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape.height, : shape.width].astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, width=shape.width, height=shape.height)
        stream.pix_fmt = "yuv420p"
        for frame in range(shape.num_frames):
            waves = [np.sin((x * a + y * b) / 40 + frame / 8 + seed) for a, b in ((1, 0.3), (0.2, 1), (0.7, -0.7))]
            picture = 128 + 100 * np.stack(waves, axis=-1) + rng.normal(0, 4, (*x.shape, 1))
            frame_of_video = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame_of_video))
        container.mux(stream.encode())


def decode_with_pyav(path: Path) -> None:
    """Every frame to RGB, and nothing else."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            frame.to_ndarray(format="rgb24")


def torchcodec_decoder() -> Callable[[Path], None] | None:
    """Decodes every frame with torchcodec; None where it or its FFmpeg is not installed."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None

    def decode(path: Path) -> None:
        decoder = VideoDecoder(str(path), num_ffmpeg_threads=0)
        decoder.get_frames_in_range(0, len(decoder))

    return decode


def benchmark_decoding(folder: Path, config: Config) -> list[str]:
    """Clips of 81 frames as they come from the file, and as the model sees them."""
    lines = ["| 81 frames | time, of bare PyAV |", "|---|---:|"]
    shown = ClipShape(81, 480, 832)
    for name, shape in (("480 x 832", shown), ("720 x 1280, to 480 x 832", ClipShape(81, 720, 1280))):
        path = folder / f"{shape.height}.mp4"
        write_clip(path, shape)
        row, settings = one_row(path)
        ways = {
            f"{name}: bare PyAV, all frames to RGB": lambda path=path: decode_with_pyav(path),
            f"{name}: ours, sampled, resized and cropped": lambda row=row, settings=settings: load_video(
                row, shown, settings, torch.Generator()
            ),
        }
        if (decode := torchcodec_decoder()) is not None:
            ways[f"{name}: torchcodec, all frames to RGB"] = lambda path=path, decode=decode: decode(path)
        lines += relative(measure(ways, config.num_repeats))
        if decode is None:
            lines.append(f"| {name}: torchcodec | not installed |")
    return lines


def one_row(path: Path) -> tuple[Row, DataConfig]:
    """A table of one clip."""
    table = path.with_suffix(".csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["video", "prompt"], [path.name, "a moving pattern"]])
    settings = DataConfig(dataset_base_path=str(path.parent), metadata_path=str(table))
    return load_rows(settings)[0], settings


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(ways: dict[str, Callable[[], object]], num_repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(num_repeats + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def relative(seconds: dict[str, float]) -> list[str]:
    """Rows of a table, each relative to the first."""
    first = next(iter(seconds.values()))
    return [f"| {name} | {value / first:.2f} |" for name, value in seconds.items()]


def main(config: Config) -> None:
    """Prints the tables."""
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(benchmark_decoding(Path(folder), config)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
