"""What data costs: decoding against bare PyAV and torchcodec, cached latents against encoding as training goes.

    python benchmarks/data.py                        # this machine: decoding, and the embedded checkpoint
    python benchmarks/data.py --size 1.3b            # one GPU: WAN 1.3B's VAE at 81 x 480 x 832, random weights

Times are relative to the first row of their table, measured in turns in the same run: on shared machines seconds say
little.
"""

import csv
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from diffusers import AutoencoderKLWan


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from causal_wan.cache.encoded_clips import CachedClips, CachedData, Encoders
from causal_wan.cache.tensor_cache import CacheWriter, TensorCache
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import PositiveInt, checked_dataclass
from causal_wan.data.clips import VideoDataset, load_video, normalize_videos
from causal_wan.data.rows import Row, load_rows
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.geometry import WAN
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.vae import encode_videos
from causal_wan.weights.parts import load_vae


SHAPES = {"small": ClipShape(81, 64, 112), "1.3b": ClipShape(81, 480, 832)}
NUM_CACHED = 12


@checked_dataclass
class Config:
    """What to measure."""

    size: Literal["small", "1.3b"] = "small"
    """Checkpoint and clips: the embedded one, or WAN 1.3B's shapes with random weights."""
    num_repeats: PositiveInt = 7
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


def one_row(path: Path, **settings: Any) -> tuple[Row, DataConfig]:
    """A table of one clip."""
    table = path.with_suffix(".csv")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["video", "prompt"], [path.name, "a moving pattern"]])
    data = DataConfig(dataset_base_path=str(path.parent), metadata_path=str(table), **settings)
    return load_rows(data)[0], data


# --- the cache -------------------------------------------------------------------------------------------------------


def benchmark_cache(folder: Path, config: Config) -> list[str]:
    """What a clip costs beside the transformer: decoded and encoded, or read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, vae = SHAPES[config.size], load_benchmark_vae(config.size).to(device)
    rows, data = clips_to_cache(folder, shape)
    encoders = Encoders("vae", "text", "fp32", False, "fp32", 512)
    cached = CachedData(folder / "cache", data, encoders, "bf16")
    videos, turns = VideoDataset(rows, data), itertools.count()

    def decode(index: int) -> torch.Tensor:
        return videos.load(index, torch.Generator(), shape)["video"]

    def encode(index: int) -> torch.Tensor:
        return encode_videos(vae, normalize_videos(decode(index).to(device)[None]))[0]

    with cached.latent_writer() as writer:
        for index, row in enumerate(rows):
            key, settings = cached.latent_key(row.content, shape), cached.latent_settings(shape)
            writer.add(key, encode(index).to(cached.dtype), settings, num_valid_frames=shape.num_frames)
    cached.latents.refresh()
    clips = CachedClips(videos, cached, fills=False)

    def read(index: int) -> torch.Tensor:
        return clips.load(index, torch.Generator(), shape)["latents"].to(device)

    seconds = measure(
        {
            "decoded, encoded and noised": lambda: noise(encode(next(turns) % NUM_CACHED), next(turns)),
            "decoded alone (workers do that ahead)": lambda: decode(next(turns) % NUM_CACHED),
            "read from the cache and noised": lambda: noise(read(next(turns) % NUM_CACHED), next(turns)),
        },
        config.num_repeats,
    )
    size = f"{shape.num_frames} x {shape.height} x {shape.width}"
    on_the_fly, decoding, reading = seconds.values()
    workers = decoding / (on_the_fly - decoding)
    return [
        f"| a clip of {size}, {device.type} | time, of the first |",
        "|---|---:|",
        *relative(seconds),
        "",
        f"From the cache a clip costs {on_the_fly / reading:.0f} times less beside the transformer.",
        f"Decoding a clip takes {workers:.2f} of the time of encoding it: without a cache, {math.ceil(workers)} "
        "worker(s) a GPU keep up even with one that does nothing but encode.",
    ]


def clips_to_cache(folder: Path, shape: ClipShape) -> tuple[list[Row], DataConfig]:
    """So many clips of a shape, each with a content of its own."""
    rows, data = [], None
    for number in range(NUM_CACHED):
        path = folder / f"cached{number}.mp4"
        write_clip(path, shape, seed=number)
        row, data = one_row(path, num_frames=shape.num_frames, height=shape.height, width=shape.width)
        rows.append(replace(row, content=str(number)))
    return rows, data


def noise(latents: torch.Tensor, number: int) -> None:
    """Noises latents `(C, F, H, W)` as a step does, to the end."""
    count = latents.shape[1]
    draw_noisy_batch(
        latents[None].float(),
        RegressionConfig(),
        [count],
        seed=0,
        sample_numbers=[number],
        num_valid_frames=[count],
    )
    if latents.device.type == "cuda":
        torch.cuda.synchronize()


def benchmark_reading(folder: Path, config: Config) -> list[str]:
    """Bytes that come from a cold disk for a clip, over those of its latents."""
    lines = ["| latents of a clip | bytes read from a cold disk, of its latents |", "|---|---:|"]
    for name, (num_frames, height, width) in SHAPES.items():
        cache, latents = folder / f"{name}-latents", torch.zeros(WAN.latent_shape(num_frames, height, width))
        with CacheWriter(cache) as writer:
            for number in range(NUM_CACHED):
                writer.add(bytes([number]), latents.bfloat16(), {})
        reader = TensorCache(cache)
        for path in reader.shards:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = _bytes_from_disk()
        needed = sum(reader.read(bytes([number]))[0].nbytes for number in range(0, NUM_CACHED, 3))
        read = _bytes_from_disk() - before
        lines.append(f"| {latents.nbytes // 2 / 2**20:.2f} MiB | {f'{read / needed:.2f}' if read else 'not told'} |")
    return lines


def _bytes_from_disk() -> int:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


def load_benchmark_vae(size: str) -> AutoencoderKLWan:
    """The embedded checkpoint's VAE, or WAN 2.1's with random weights."""
    if size == "small":
        return load_vae(str(ROOT / "examples" / "sketch" / "tiny-wan"))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return AutoencoderKLWan().to(dtype).requires_grad_(False).eval()


# --- training --------------------------------------------------------------------------------------------------------


def benchmark_training(folder: Path, config: Config) -> list[str]:
    """Share of the time of a step of the embedded checkpoint that is spent waiting for data."""
    make_dataset = ROOT / "examples" / "sketch" / "make_dataset.py"
    run([make_dataset, "--output_dir", folder / "data", "--kinds", "bird", "--num_clips", 24, "--num_heldout", 1])
    recipe = ["--config", ROOT / "examples" / "objectives" / "recipe.yaml"]
    recipe += ["--dataset_base_path", folder / "data" / "videos", "--metadata_path", folder / "data" / "train.csv"]
    data = [*recipe, "--validation_metadata_path", "None"]
    run([ROOT / "precompute_latents.py", *data, "--latents_dir", folder / "latents"])
    training = [*data, "--max_train_steps", 12, "--train_batch_size", 2, "--logging_steps", 1, "--no_cache_latents"]
    lines = ["| the embedded checkpoint, 2 clips a step | waiting for data, of a step | a step, of the first |"]
    lines, first = [*lines, "|---|---:|---:|"], None
    for name, flags in {
        "encoded as training goes, 1 worker": ["--dataloader_num_workers", 1],
        "encoded as training goes, 2 workers": ["--dataloader_num_workers", 2],
        "from the cache, no worker": ["--dataloader_num_workers", 0, "--latents_dir", folder / "latents"],
        "from the cache, 1 worker": ["--dataloader_num_workers", 1, "--latents_dir", folder / "latents"],
    }.items():
        output_dir = folder / name.replace(" ", "-")
        run([ROOT / "train_video_regression.py", *training, *flags, "--output_dir", output_dir])
        entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        steps = [entry for entry in entries if "generator_loss" in entry][2:]
        seconds = statistics.median(entry["seconds_per_step"] for entry in steps)
        waiting = statistics.median(entry["data_seconds_per_step"] for entry in steps)
        first = first or seconds
        lines.append(f"| {name} | {100 * waiting / seconds:.1f} % | {seconds / first:.2f} |")
    return lines


def run(command: list[object]) -> None:
    """A script of this repository, with one thread, which is what a process among several has."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )


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
    torch.set_num_threads(1)  # as in a worker of a data loader
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, {config.size}\n")
    with tempfile.TemporaryDirectory() as folder:
        for benchmark in (benchmark_decoding, benchmark_cache, benchmark_reading, benchmark_training):
            print("\n".join(benchmark(Path(folder), config)), "\n", sep="", flush=True)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
