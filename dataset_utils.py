"""Files -> batches: the CSV of clips and prompts, checked, decoded, sampled, resized, and put into a seeded order.

Knows no noise, model, rank or device. What a run sees is a function of (seed, sample number): neither the number of
processes and workers nor an interruption changes it.

Shapes: B = batch, T = video frames, height, width in pixels.
"""

import contextlib
import csv
import glob
import io
import logging
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import av
import numpy as np
import torch
from datasets import Features, Value, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2
from tqdm.auto import tqdm

from causal_wan.video_files import decode_frames, describe_error, probe_video, resolve_path


logger = logging.getLogger(__name__)

MAX_ERRORS_SHOWN = 20
MAX_REPLACEMENTS = 10
MAX_WORKERS = 256  # whose clips are noted
ORDER_STREAM, CLIP_STREAM = 0, 1  # of a run's random numbers; 2 is the noise in causal_wan.regression


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The clips: where they are, and what the model sees of them."""

    dataset_base_path: str
    """Folder that the paths in the CSV are relative to; they cannot leave it."""
    metadata_path: str
    """CSV with a row a clip."""
    video_column: str = "video"
    """Column with the path of the video."""
    caption_column: str = "prompt"
    """Column with the prompt."""
    num_frames: int = 81
    """Video frames of a clip, 4k + 1 for the WAN VAE."""
    height: int = 480
    """Pixels, a multiple of 16."""
    width: int = 832
    """Pixels, a multiple of 16."""
    time_division_factor: int = 4
    """Video frames to a latent frame; num_frames must be a multiple of it, plus 1."""
    frame_sampling: Literal["uniform", "head", "random"] = "uniform"
    """uniform spreads num_frames over the whole clip, right for a process; head and random keep to frame_rate."""
    frame_rate: float = 16.0
    """Frames a second that head and random sample at; WAN's is 16."""
    short_clips: Literal["error", "skip", "pad"] = "error"
    """Clips with too few frames: stop, leave them out, or repeat the last frame (which the loss then leaves out)."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """Rows that cannot be used: stop and list them, or list them and go on without."""
    max_bad_samples: int = 10
    """Clips that may fail to decode while training, before the run stops."""

    def __post_init__(self) -> None:
        factor = self.time_division_factor
        if factor < 1:
            raise ValueError(f"time_division_factor must be 1 or more, got {factor}; 4 is the WAN VAE's.")
        if self.num_frames < 1 or (self.num_frames - 1) % factor:
            below = max(self.num_frames - 1, 0) // factor * factor + 1
            raise ValueError(
                f"num_frames must be {factor}k + 1 for the WAN VAE, got {self.num_frames}; use {below} or "
                f"{below + factor}."
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size < 16 or size % 16:
                below = max(size // 16 * 16, 16)
                raise ValueError(f"{name} must be a multiple of 16, got {size}; use {below} or {below + 16}.")
        if not 0 < self.frame_rate < math.inf:
            raise ValueError(f"frame_rate must be above 0 and finite, got {self.frame_rate}; WAN's is 16.")
        if self.max_bad_samples < 0:
            raise ValueError(f"max_bad_samples must be 0 or more, got {self.max_bad_samples}.")


@dataclass(frozen=True)
class Row:
    """A row of the CSV that can be trained on."""

    number: int  # 1 is the first below the header
    path: Path
    prompt: str
    num_frames: int  # in the file
    frame_rate: float
    height: int
    width: int


class ShortClipError(ValueError):
    """A clip has fewer frames than are sampled."""


# --- checking rows ---------------------------------------------------------------------------------------------------


def load_rows(config: DataConfig) -> list[Row]:
    """Reads the CSV and checks every row by opening its file, without decoding.

    Returns:
        The rows that can be used, in the order of the file.

    Raises:
        ValueError: If the CSV cannot be used, if rows are bad (all of them are found, the first 20 listed), or if no
            row is left.
    """
    table = read_table(config)
    base = Path(config.dataset_base_path).resolve()

    def check(item: tuple[int, dict[str, str | None]]) -> Row | tuple[int, str, Exception]:
        number, values = item
        try:
            return check_row(number, values[config.video_column], values[config.caption_column], base, config)
        except (ValueError, OSError, av.FFmpegError) as error:
            return number, values[config.video_column] or "", error

    with ThreadPoolExecutor(8) as pool:
        results = list(
            tqdm(pool.map(check, enumerate(table, 1)), total=len(table), desc="checking clips", delay=2, leave=False)
        )
    rows = [result for result in results if isinstance(result, Row)]
    bad = [result for result in results if not isinstance(result, Row)]
    if config.short_clips == "skip":
        long_enough = [result for result in bad if not isinstance(result[2], ShortClipError)]
        if num_skipped := len(bad) - len(long_enough):
            logger.warning("left out %d clip(s) with too few frames", num_skipped)
        bad = long_enough
    if bad:
        listed = [f"  row {number}, {path or 'no path'}: {describe_error(error)}" for number, path, error in bad]
        hidden = len(listed) - MAX_ERRORS_SHOWN
        more = [f"  and {hidden} more"] if hidden > 0 else []
        headline = f"{len(bad)} of {len(table)} rows of {config.metadata_path} cannot be used:"
        report = "\n".join([headline, *listed[:MAX_ERRORS_SHOWN], *more])
        if config.on_bad_sample == "error":
            raise ValueError(report + "\nCorrect or remove them, or leave them out with --on_bad_sample skip.")
        logger.warning(report)
    if not rows:
        raise ValueError(f"{config.metadata_path} must have at least one usable row; none of {len(table)} is left.")
    return rows


def read_table(config: DataConfig) -> list[dict[str, str | None]]:
    """The rows of the CSV, all values as text.

    Raises:
        ValueError: If the file is missing, empty, no CSV, or lacks a column.
    """
    path = Path(config.metadata_path)
    if not path.is_file():
        raise ValueError(f"metadata_path must be a CSV file, but {path} does not exist.")
    if not Path(config.dataset_base_path).is_dir():
        raise ValueError(f"dataset_base_path must be a folder, but {config.dataset_base_path} is not one.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8 ({error}); save it as CSV UTF-8.") from None
    if not text.strip():
        raise ValueError(f"{path} must have a header and at least one row, but is empty.")
    reader = csv.reader(io.StringIO(text))
    try:
        header, first_row = next(reader), next(reader, None)
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV ({error}); a quote may be open.") from None
    missing = [name for name in (config.video_column, config.caption_column) if name not in header]
    if missing:
        raise ValueError(
            f"{path} must have the columns {config.video_column} and {config.caption_column}, but has "
            f"{', '.join(header)}; name yours with --video_column and --caption_column."
        )
    if first_row is None:
        raise ValueError(f"{path} must have at least one row below its header, but has none.")
    if len(first_row) > len(header):  # pandas would take the first column for row names, and shift the others
        raise ValueError(
            f"{path} must have {len(header)} fields a row, but its first row has {len(first_row)}; put quotes around "
            "prompts with commas."
        )
    # As text, and no word taken for a missing value: a prompt may be 123 or None. A cache of its own, so that a
    # changed file is read anew and nothing has to be writable.
    features = Features({name: Value("string") for name in header})
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache_dir:
        try:
            table = load_dataset(
                "csv",
                data_files=glob.escape(str(path)),  # else rows[1].csv is not found, and rows*.csv several files
                split="train",
                features=features,
                keep_default_na=False,
                keep_in_memory=True,
                cache_dir=cache_dir,
            )
        except DatasetGenerationError as error:
            cause = str(error.__cause__).strip()
            raise ValueError(
                f"{path} must have {len(header)} fields a row ({cause}); put quotes around prompts with commas, and "
                "close them."
            ) from error
        return list(table.select_columns([config.video_column, config.caption_column]))


def check_row(number: int, video: str | None, prompt: str | None, base: Path, config: DataConfig) -> Row:
    """One row, checked.

    Raises:
        ValueError: With the reason, if the row cannot be used.
        OSError: If the file cannot be read.
        av.FFmpegError: If it is no video.
    """
    path = resolve_path(video, base)
    if not (prompt or "").strip():
        raise ValueError("the prompt is empty")
    num_frames, frame_rate, height, width = probe_video(path)
    row = Row(number, path, prompt.strip(), num_frames, frame_rate, height, width)
    available, wanted = num_sampleable_frames(row.num_frames, row.frame_rate, config), config.num_frames
    if available < wanted and config.short_clips != "pad":
        rate = "" if config.frame_sampling == "uniform" else f" at {config.frame_rate:g} frames a second"
        raise ShortClipError(f"{available} frames{rate}, fewer than num_frames={wanted} (see --short_clips)")
    return row


# --- sampling and decoding -------------------------------------------------------------------------------------------


def num_sampleable_frames(num_file_frames: int, file_frame_rate: float, config: DataConfig) -> int:
    """How many different moments of a file can be sampled as the config says."""
    if config.frame_sampling == "uniform":
        return num_file_frames
    return int((num_file_frames - 1) / file_frame_rate * config.frame_rate + 1e-6) + 1


def sample_frame_indices(
    num_file_frames: int, file_frame_rate: float, config: DataConfig, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Which frames of a file make the clip.

    Args:
        num_file_frames: Frames in the file.
        file_frame_rate: Its frames a second.
        config: Says how many frames and by what rule.
        generator: Chooses the start of random sampling.

    Returns:
        Indices, non-decreasing, int64 `(num_frames,)`, and how many of them come before padding.
    """
    wanted = config.num_frames
    num_valid = min(wanted, num_sampleable_frames(num_file_frames, file_frame_rate, config))
    if config.frame_sampling == "uniform":
        indices = torch.linspace(0, num_file_frames - 1, num_valid, dtype=torch.float64)
    else:
        indices = torch.arange(num_valid, dtype=torch.float64) * file_frame_rate / config.frame_rate
        if config.frame_sampling == "random":
            slack = num_file_frames - 1 - float(indices[-1])
            indices += slack * torch.rand((), generator=generator, dtype=torch.float64)
    indices = indices.round().long().clamp(max=num_file_frames - 1)
    return torch.cat([indices, indices[-1:].expand(wanted - num_valid)]), num_valid


class ResizeToCover(v2.Transform):
    """Resizes so that height x width is just covered, aspect ratio kept."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Called by torchvision for each picture `(..., H, W)`."""
        scale = max(self.height / inpt.shape[-2], self.width / inpt.shape[-1])
        size = [max(self.height, round(inpt.shape[-2] * scale)), max(self.width, round(inpt.shape[-1] * scale))]
        return v2.functional.resize(inpt, size, antialias=True)


def build_video_transform(height: int, width: int) -> v2.Transform:
    """Aspect-preserving resize and centre crop of uint8 pictures `(..., H, W)`."""
    return v2.Compose([ResizeToCover(height, width), v2.CenterCrop((height, width))])


def normalize_videos(videos: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], same shape.

    For the training device: workers hand over uint8, a quarter of the bytes.
    """
    return videos.float() / 127.5 - 1


# --- data sets -------------------------------------------------------------------------------------------------------


class Loadable(Protocol):
    """What can be streamed: `len` rows, each loaded with a generator of its own."""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]: ...


class VideoDataset:
    """Clips as the model sees them: decoded, sampled, resized and cropped."""

    def __init__(self, rows: Sequence[Row], config: DataConfig) -> None:
        self.rows, self.config = list(rows), config
        self.transform = build_video_transform(config.height, config.width)
        # (process, index) of what each worker of a data loader is at, for `name_clips_of_dead_workers`.
        self.loading = torch.full((MAX_WORKERS, 2), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One clip.

        Returns:
            video: uint8 `(3, T, height, width)`; prompt; row_index; num_valid_frames: frames before padding.

        Raises:
            ValueError: If the clip does not decode; names row and file.
        """
        row, worker = self.rows[index], get_worker_info()
        if worker is not None:
            self.loading[worker.id % MAX_WORKERS] = torch.tensor([os.getpid(), index])
        indices, num_valid = sample_frame_indices(row.num_frames, row.frame_rate, self.config, generator)
        try:
            frames = decode_frames(row.path, indices, self.transform)
        except (ValueError, OSError, av.FFmpegError) as error:
            raise ValueError(f"row {row.number}, {row.path}: {describe_error(error)}") from error
        return {
            "video": frames.movedim(0, 1),
            "prompt": row.prompt,
            "row_index": index,
            "num_valid_frames": num_valid,
        }


@contextlib.contextmanager
def name_clips_of_dead_workers(dataset: Loadable) -> Iterator[None]:
    """Says which clip a worker of a data loader was at when it died, which torch does not know.

    Raises:
        RuntimeError: In the place of torch's.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        dead = [int(process) for process in found[1].split(",")] if found else []
        if not dead or not isinstance(dataset, VideoDataset):
            raise
        rows = [dataset.rows[index] for process, index in dataset.loading.tolist() if process in dead]
        clips = ", ".join(f"row {row.number}, {row.path}" for row in rows)
        raise RuntimeError(
            f"a process that decodes clips died at {clips} ({str(error).splitlines()[0]}). If it was killed, memory "
            "ran out: use fewer --dataloader_num_workers. If it dies at this clip again, the file breaks the decoder: "
            "remove the row. Then go on with --resume_from_checkpoint latest."
        ) from error


class SampleStream(Dataset):
    """The samples of a run in their order: item i is sample number start + i, epoch after epoch, each shuffled anew.

    A data loader goes through it in sequence; shuffling, resuming and splitting over processes all follow from the
    numbers. A clip that does not decode is replaced by the next of its epoch and reported in `errors`.

    Args:
        dataset: Rows to stream.
        num_samples: End of the run, in samples, all processes together.
        seed: Of the order and of each sample's own randomness.
        start: Samples that the run has seen already.
    """

    def __init__(self, dataset: Loadable, *, num_samples: int, seed: int, start: int = 0) -> None:
        self.dataset, self.num_samples, self.seed, self.start = dataset, num_samples, seed, start
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.num_samples - self.start

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not 0 <= item < len(self):
            raise IndexError(item)
        number, errors = self.start + item, []
        generator = seeded_generator(self.seed, CLIP_STREAM, number)
        for index in self._candidates(number):
            try:
                sample = self.dataset.load(index, generator)
            except ValueError as error:
                errors.append(str(error))
                continue
            return {**sample, "sample_number": number, "errors": errors}
        raise ValueError(f"{len(errors)} clips in a row did not decode; the last: {errors[-1]}")

    def _candidates(self, number: int) -> Iterator[int]:
        """The row of a sample, then those that may replace it."""
        epoch, offset = divmod(number, len(self.dataset))
        if epoch != self._epoch:
            generator = seeded_generator(self.seed, ORDER_STREAM, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.dataset), generator=generator)
        for step in range(min(MAX_REPLACEMENTS, len(self.dataset))):
            yield int(self._order[(offset + step) % len(self.dataset)])


def seeded_generator(seed: int, stream: int, number: int) -> torch.Generator:
    """A generator for one sample (of CLIP_STREAM) or for the order of one epoch (of ORDER_STREAM) of a run."""
    (state,) = np.random.SeedSequence(seed, spawn_key=(stream, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> 1))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> a batch: videos `(B, 3, T, height, width)` or latents `(B, C, F, H, W)`, and the rest as lists and
    int64 tensors `(B,)`."""
    batch = {
        "prompts": [sample["prompt"] for sample in samples],
        "row_indices": torch.tensor([sample["row_index"] for sample in samples]),
        "sample_numbers": torch.tensor([sample["sample_number"] for sample in samples]),
        "num_valid_frames": torch.tensor([sample["num_valid_frames"] for sample in samples]),
        "errors": [error for sample in samples for error in sample["errors"]],
    }
    for one, many in (("video", "videos"), ("latents", "latents")):
        if one in samples[0]:
            batch[many] = torch.stack([sample[one] for sample in samples])
    return batch


# --- descriptions ----------------------------------------------------------------------------------------------------


def describe_rows(rows: Sequence[Row]) -> str:
    """Rows, prompts, lengths, rates and sizes in one line."""
    frames = [row.num_frames for row in rows]
    (height, width), _ = Counter((row.height, row.width) for row in rows).most_common(1)[0]
    sizes = len({(row.height, row.width) for row in rows})
    return (
        f"{len(rows)} clips, {len({row.prompt for row in rows})} prompts; {min(frames)} to {max(frames)} frames "
        f"(median {median(frames):g}) at {median(row.frame_rate for row in rows):g} a second, {height} x {width}"
        + (f" and {sizes - 1} other sizes" if sizes > 1 else "")
    )


def describe_speed_up(rows: Sequence[Row], config: DataConfig) -> str | None:
    """One sentence when uniform sampling speeds clips up by more than a quarter, else None."""
    if config.frame_sampling != "uniform":
        return None
    played = config.num_frames / config.frame_rate
    factors = [row.num_frames / row.frame_rate / played for row in rows]
    if median(factors) <= 1.25:
        return None
    return (
        f"uniform sampling plays clips {median(factors):.1f} times as fast (up to {max(factors):.1f}): "
        f"{config.num_frames} frames at {config.frame_rate:g} a second are {played:.1f} s, the clips last "
        f"{median(factors) * played:.1f} s (median). Right for a drawing process; for real motion use "
        "--frame_sampling head, or cut the clips."
    )
