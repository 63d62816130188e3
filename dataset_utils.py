"""Files -> batches: clips and prompts, checked, decoded, sampled, resized, augmented, and put into a seeded order.

Knows no noise, model, rank or device. What a run sees is a function of (seed, sample number): neither the number of
processes and workers nor an interruption changes it.

Shapes: B = batch, T = video frames, height, width in pixels.
"""

import contextlib
import itertools
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol

import av
import torch
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2
from tqdm.auto import tqdm

from causal_wan.data.file_manifest import FileFacts, FileManifest
from causal_wan.data.sample_order import CAPTION_STREAM, CLIP_STREAM, SampleOrder, seeded_generator
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.data.shared_memory import GIB, SharedMemoryError, advice
from causal_wan.tables.rows import Table, TableRow, read_table
from causal_wan.tables.sources import FILE_SUFFIXES, Source, read_sources
from causal_wan.video.decoding import EmbeddedVideo, decode_frames, describe_error, probe_video, resolve_path


logger = logging.getLogger(__name__)

MAX_ERRORS_SHOWN = 20
MAX_REPLACEMENTS = 10
MAX_WORKERS = 256  # whose clips are noted


@dataclass(frozen=True)
class Row:
    """A row of the table that can be trained on."""

    number: int  # 1 is the first
    video: Path | EmbeddedVideo
    prompts: tuple[str, ...]
    num_frames: int  # in the file
    frame_rate: float
    height: int
    width: int
    source: int = 0  # of several
    name: str = ""  # of the video, as the table has it
    content: str = ""  # SHA-256 of the file, if it is known


class BadRow(NamedTuple):
    """A row that cannot be used: the name of its table, the row, and why."""

    table: str
    row: TableRow
    error: Exception


class ShortClipError(ValueError):
    """A clip has fewer frames than are sampled."""


# --- checking rows ---------------------------------------------------------------------------------------------------


def sources_of(config: DataConfig) -> list[Source]:
    """The tables of a config: its own, or those that `dataset_config` lists.

    Raises:
        ValueError: If there are none, or that list cannot be used.
    """
    if config.dataset_config is None:
        if config.metadata_path is None:
            raise ValueError(
                "exactly one of metadata_path and dataset_config must be given, got neither; --metadata_path names "
                "one table, --dataset_config a YAML list of several."
            )
        own = {name: vars(config)[name] for name in ("metadata_path", "dataset_base_path")}
        return [Source(**own, video_column=config.video_column, caption_column=config.caption_column)]
    return [
        replace(source, dataset_base_path=config.dataset_base_path)
        if source.dataset_base_path is None and Path(source.metadata_path).suffix.lower() in FILE_SUFFIXES
        else source
        for source in read_sources(config.dataset_config)
    ]


def source_weights(config: DataConfig) -> list[float] | None:
    """The share of each table in the samples, in any unit; None is in proportion to their rows."""
    weights = [source.weight for source in sources_of(config)]
    return None if None in weights else weights


def read_tables(config: DataConfig, *, need_files: bool = True) -> list[Table]:
    """The rows of each table, unchecked.

    Args:
        config: Names the tables.
        need_files: Whether the folders of their videos must be there.

    Raises:
        ValueError: If a table cannot be used, or such a folder is not there.
    """
    tables = []
    for source in sources_of(config):
        tables.append(read_table(source))
        if need_files and source.dataset_base_path is not None and not Path(source.dataset_base_path).is_dir():
            raise ValueError(f"dataset_base_path must be a folder, but {source.dataset_base_path} is not one.")
    return tables


def load_rows(config: DataConfig, manifest: FileManifest | None = None) -> list[Row]:
    """Reads the tables and checks every row by opening its file, without decoding.

    Args:
        config: Names the tables, and says what is too short.
        manifest: Facts of files, which are then not opened; and need not be there, if the manifest knows their names.

    Returns:
        The rows that can be used, in the order of the tables.

    Raises:
        ValueError: If a table cannot be used, if rows are bad (all of them are found, the first 20 listed), or if no
            row is left.
    """
    tables = read_tables(config, need_files=manifest is None)
    names = [table.source.metadata_path for table in tables]

    def check(item: tuple[int, TableRow]) -> Row | BadRow:
        source, row = item
        try:
            return check_row(row, config, source=source, manifest=manifest)
        except (ValueError, OSError, av.FFmpegError) as error:
            return BadRow(names[source], row, error)

    items = ((source, row) for source, table in enumerate(tables) for row in table)
    total = sum(map(len, tables))
    with ThreadPoolExecutor(8) as pool:
        results = list(tqdm(pool.map(check, items), total=total, desc="checking clips", delay=2, leave=False))
    rows = [result for result in results if isinstance(result, Row)]
    bad = [result for result in results if isinstance(result, BadRow)]
    if config.short_clips == "skip":
        long_enough = [result for result in bad if not isinstance(result.error, ShortClipError)]
        if num_skipped := len(bad) - len(long_enough):
            logger.warning("left out %d clip(s) with too few frames", num_skipped)
        bad = long_enough
    place = names[0] if len(names) == 1 else f"{config.dataset_config}"
    if bad:
        report = _list_bad_rows(bad, place, total, name_tables=len(names) > 1)
        if config.on_bad_sample == "error":
            raise ValueError(report + "\nCorrect or remove them, or leave them out with --on_bad_sample skip.")
        logger.warning(report)
    if not rows:
        raise ValueError(f"{place} must have at least one usable row; none of {total} is left.")
    left = {row.source for row in rows}
    for name in (name for source, name in enumerate(names) if source not in left):
        logger.warning("%s has no usable row: the other tables fill its share", name)
    return rows


def _list_bad_rows(bad: Sequence[BadRow], place: str, total: int, *, name_tables: bool) -> str:
    lines = [f"{len(bad)} of {total} rows of {place} cannot be used:"]
    for name, row, error in bad[:MAX_ERRORS_SHOWN]:
        table = f"{name}, " if name_tables else ""
        lines.append(f"  {table}row {row.number}, {row.video or 'no path'}: {describe_error(error)}")
    hidden = len(bad) - MAX_ERRORS_SHOWN
    return "\n".join([*lines, f"  and {hidden} more"] if hidden > 0 else lines)


def check_row(row: TableRow, config: DataConfig, *, source: int = 0, manifest: FileManifest | None = None) -> Row:
    """One row, checked.

    Raises:
        ValueError: With the reason, if the row cannot be used.
        OSError: If the file cannot be read.
        av.FFmpegError: If it is no video.
    """
    video, known = find_video(row, manifest)
    if not row.prompts:
        raise ValueError("the prompt is empty")
    if known is not None:
        facts = known.num_frames, known.frame_rate, known.height, known.width
    else:
        # A manifest serves runs with buckets, too, which need the size as shown.
        as_shown = manifest is not None or len(config.resolution_buckets) > 1
        facts = probe_video(video, limits=config.limits, as_shown=as_shown)
    content = known.content if known is not None else ""
    checked = Row(row.number, video, row.prompts, *facts, source=source, name=str(row.video), content=content)
    check_length(checked, min_num_frames(config), config)
    return checked


def check_length(row: Row, wanted: int, config: DataConfig) -> None:
    """Checks that a clip has so many frames, unless short ones are padded.

    Raises:
        ShortClipError: If not.
    """
    available = num_sampleable_frames(row.num_frames, row.frame_rate, config)
    if available < wanted and config.short_clips != "pad":
        rate = "" if config.frame_sampling == "uniform" else f" at {config.frame_rate:g} frames a second"
        raise ShortClipError(f"{available} frames{rate}, fewer than num_frames={wanted} (see --short_clips)")


def find_video(row: TableRow, manifest: FileManifest | None = None) -> tuple[Path | EmbeddedVideo, FileFacts | None]:
    """The video of a row, and what the manifest knows of it.

    Raises:
        ValueError: If there is none; of a file that is not there, if the manifest does not know its name either.
    """
    known = None
    if isinstance(row.video, EmbeddedVideo):
        video = row.video
        known = manifest.find(video) if manifest is not None else None
    elif row.video and row.base is None:
        raise ValueError(
            "the data set holds no bytes of the video, and no file may be opened; name the folder of its files with "
            "--dataset_base_path"
        )
    else:
        try:
            video = resolve_path(row.video, Path(row.base or ""))
            known = manifest.find(video) if manifest is not None else None
        except ValueError:
            known = manifest.by_name.get(row.video) if manifest is not None else None
            if known is None or not known.num_frames:
                raise
            base = os.path.realpath(row.base)
            video = Path(os.path.realpath(os.path.join(base, row.video)))
            if os.path.lexists(video) or not video.is_relative_to(base):
                raise
    return video, known if known is not None and known.num_frames else None


# --- shapes ----------------------------------------------------------------------------------------------------------


def min_num_frames(config: DataConfig) -> int:
    """Frames that a clip must have: for the shortest bucket, or for the longest stage of a schedule."""
    return min(config.frame_buckets) if config.frame_buckets else max(length for _, length in config.frame_stages)


def choose_bucket(row: Row, config: DataConfig) -> int:
    """The bucket of a clip: nearest aspect ratio, then longest that it has the frames for.

    Among sizes of one aspect ratio, the largest that needs no enlarging is taken.
    """
    if len(config.buckets) == 1:
        return 0
    available = num_sampleable_frames(row.num_frames, row.frame_rate, config)

    def misfit(bucket: int) -> tuple[float, ...]:
        length, size = config.buckets[bucket]
        stretch = enlarging = pixels = lack = 0.0
        if size is not None:
            height, width = size
            stretch = round(abs(math.log(row.height / row.width * width / height)), 6)
            enlarging = max(height / row.height, width / row.width, 1.0) - 1
            pixels = height * width
        if length is not None:
            lack = max(length - available, 0)
        return stretch, enlarging, -pixels, lack, -(length or 0)

    return min(range(len(config.buckets)), key=misfit)


def clip_shapes(row: Row, config: DataConfig) -> list[ClipShape]:
    """Every shape in which a run may show a clip."""
    return config.shapes_of_bucket(choose_bucket(row, config))


# --- sampling and decoding -------------------------------------------------------------------------------------------


def num_sampleable_frames(num_file_frames: int, file_frame_rate: float, config: DataConfig) -> int:
    """How many different moments of a file can be sampled as the config says."""
    if config.frame_sampling == "uniform":
        return num_file_frames
    return int((num_file_frames - 1) / file_frame_rate * config.frame_rate + 1e-6) + 1


def sample_frame_indices(
    num_file_frames: int, file_frame_rate: float, num_frames: int, config: DataConfig, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Which frames of a file make the clip.

    Args:
        num_file_frames: Frames in the file.
        file_frame_rate: Its frames a second.
        num_frames: Frames of the clip.
        config: Says by what rule.
        generator: Chooses the start of random sampling, and the window of a temporal crop.

    Returns:
        Indices, non-decreasing, int64 `(num_frames,)`, and how many of them come before padding.
    """
    num_valid = min(num_frames, num_sampleable_frames(num_file_frames, file_frame_rate, config))
    last = num_file_frames - 1
    if config.frame_sampling == "uniform":
        start, window = 0.0, float(last)
        if config.temporal_crop < 1:
            share, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            shortest = max(config.temporal_crop * last, num_valid - 1)  # no frame twice
            window = shortest + share * (last - shortest)
            start = place * (last - window)
        indices = torch.linspace(start, start + window, num_valid, dtype=torch.float64)
    else:
        indices = torch.arange(num_valid, dtype=torch.float64) * file_frame_rate / config.frame_rate
        if config.frame_sampling == "random":
            slack = last - float(indices[-1])
            indices += slack * torch.rand((), generator=generator, dtype=torch.float64)
    indices = indices.round().long().clamp(max=last)
    return torch.cat([indices, indices[-1:].expand(num_frames - num_valid)]), num_valid


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


def augment_video(video: torch.Tensor, config: DataConfig, generator: torch.Generator) -> torch.Tensor:
    """Mirrors and recolours a clip, uint8 `(3, T, H, W)`, all frames alike, as the generator decides."""
    if config.horizontal_flip and float(torch.rand((), generator=generator)) < config.horizontal_flip:
        video = video.flip(-1)
    if any(config.color_jitter):
        picture = video.flatten(1, 2)  # one picture `(3, T * H, W)`: one mean for all frames
        changes = (2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1) * torch.tensor(config.color_jitter)
        brightness, contrast, saturation, hue = changes.tolist()
        picture = v2.functional.adjust_brightness(picture, 1 + brightness)
        picture = v2.functional.adjust_contrast(picture, 1 + contrast)
        picture = v2.functional.adjust_saturation(picture, 1 + saturation)
        video = v2.functional.adjust_hue(picture, hue).reshape(video.shape)
    return video


def normalize_videos(videos: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], same shape.

    For the training device: workers hand over uint8, a quarter of the bytes.
    """
    return videos.float() / 127.5 - 1


# --- data sets -------------------------------------------------------------------------------------------------------


class Loadable(Protocol):
    """What can be streamed: `len` rows, each loaded in a shape, with a generator of its own."""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]: ...


class VideoDataset:
    """Clips as the model sees them: decoded, sampled, resized, cropped and augmented."""

    def __init__(self, rows: Sequence[Row], config: DataConfig) -> None:
        self.rows, self.config = list(rows), config
        # (process, index, whether it is still loading) of each worker's last row, for `name_clips_of_dead_workers`.
        self.loading = torch.full((MAX_WORKERS, 3), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]:
        """One clip.

        Returns:
            video: uint8 `(3, T, height, width)`; prompts; row_index; num_valid_frames: frames before padding.

        Raises:
            ValueError: If the clip does not decode; names row and file.
        """
        row = self.rows[index]
        try:
            with self.noted(index):
                video, num_valid = load_video(row, shape, self.config, generator)
        except (ValueError, OSError, av.FFmpegError) as error:
            raise ValueError(f"row {row.number}, {row.video}: {describe_error(error)}") from error
        return {"video": video, "prompts": row.prompts, "row_index": index, "num_valid_frames": num_valid}

    @contextlib.contextmanager
    def noted(self, index: int) -> Iterator[None]:
        """Notes that a worker of a data loader is at a row, while it is."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        note = self.loading[worker.id % MAX_WORKERS]
        note.copy_(torch.tensor([os.getpid(), index, True]))
        try:
            yield
        finally:
            note[2] = False


def load_video(row: Row, shape: ClipShape, config: DataConfig, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """A clip as the model sees it, uint8 `(3, T, height, width)`, and its frames before padding.

    Raises:
        ValueError, OSError, av.FFmpegError: If it does not decode.
    """
    indices, num_valid = sample_frame_indices(row.num_frames, row.frame_rate, shape.num_frames, config, generator)
    frames = decode_frames(row.video, indices, build_video_transform(shape.height, shape.width), limits=config.limits)
    return augment_video(frames.movedim(0, 1), config, generator), num_valid


@contextlib.contextmanager
def name_clips_of_dead_workers(dataset: Loadable) -> Iterator[None]:
    """Says which clip a worker of a data loader was at when it died or hung, which torch does not know.

    Raises:
        RuntimeError: In the place of torch's.
    """
    try:
        yield
    except RuntimeError as error:
        message = _describe_dead_workers(getattr(dataset, "videos", dataset), error)  # behind a cache
        if message is None:
            raise
        again = "Then run the same command again; training goes on with --resume_from_checkpoint latest."
        raise RuntimeError(f"{message} {again}") from error


def _describe_dead_workers(dataset: Loadable, error: RuntimeError) -> str | None:
    """What became of a worker, at which clip if that is known, and what to do; None if the error is another."""
    notes = dataset.loading.tolist() if isinstance(dataset, VideoDataset) else []

    def clips(indices: list[int]) -> str:
        return "".join(f" at row {dataset.rows[index].number}, {dataset.rows[index].video}" for index in indices)

    text = str(error)
    if timeout := re.search(r"DataLoader timed out after ([\d.]+) seconds", text):
        where = clips([index for _, index, is_loading in notes if is_loading > 0])
        return (
            f"no batch has come from the processes that decode clips for {float(timeout[1]):g} seconds"
            f"{f'; they are{where}' if where else ''}. If the disk or the network is that slow, raise "
            "--dataloader_timeout. If it stops at this clip again, the file hangs the decoder: remove the row. If it "
            "stops anywhere, decode in the training process: --dataloader_num_workers 0."
        )
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\).*", text)
    if found is None:
        return None
    dead = [int(process) for process in found[1].split(",")]
    where = clips([index for process, index, _ in notes if process in dead])
    if isinstance(error, SharedMemoryError) or "Bus error" in text:
        return (
            f"a process that decodes clips had no shared memory to hand over what it had decoded{where} ({found[0]}): "
            f"{advice(16 * GIB)}."
        )
    return (
        f"a process that decodes clips died{where} ({found[0]}). If it was killed, memory ran out: use fewer "
        "--dataloader_num_workers. If it dies at this clip again, the file breaks the decoder: remove the row."
    )


class SampleStream(Dataset):
    """The samples of a run in their order: item i is sample number start + i, epoch after epoch, each shuffled anew.

    A data loader goes through it in sequence; shuffling, resuming and splitting over processes all follow from the
    numbers. A clip that does not decode is replaced by the next of its epoch and reported in `errors`. Of several
    prompts each sample draws one, or the empty prompt with a probability of `caption_dropout`.

    Args:
        dataset: Rows to stream.
        order: Their order, and that of their buckets.
        config: Gives each bucket its shape, and the caption dropout.
        start: Samples that the run has seen already.
        end: End of the run, in samples, all processes together.
    """

    def __init__(self, dataset: Loadable, order: SampleOrder, config: DataConfig, *, start: int, end: int) -> None:
        self.dataset, self.order, self.config = dataset, order, config
        self.start, self.end = start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not 0 <= item < len(self):
            raise IndexError(item)
        number, errors = self.start + item, []
        generator = seeded_generator(self.order.seed, CLIP_STREAM, number)
        shape = self.config.shape_at(self.order.bucket(number), self.order.step(number))
        for index in itertools.islice(self.order.candidates(number), MAX_REPLACEMENTS):
            try:
                sample = self.dataset.load(index, generator, shape)
            except ValueError as error:
                errors.append(str(error))
                continue
            prompt = choose_prompt(sample.pop("prompts"), self.config, seed=self.order.seed, number=number)
            return {**sample, "prompt": prompt, "sample_number": number, "errors": errors}
        raise ValueError(f"{len(errors)} clips in a row did not decode; the last: {errors[-1]}")


def choose_prompt(prompts: Sequence[str], config: DataConfig, *, seed: int, number: int) -> str:
    """The prompt of a sample, one of several, or the empty one."""
    if len(prompts) == 1 and not config.caption_dropout:
        return prompts[0]
    drop, choice = torch.rand(
        2, generator=seeded_generator(seed, CAPTION_STREAM, number), dtype=torch.float64
    ).tolist()
    return "" if drop < config.caption_dropout else prompts[int(choice * len(prompts))]


@dataclass(frozen=True)
class StreamDecoder:
    """Rows of a stream -> clips as the model sees them, like those of a table.

    Args:
        config: Settings of the clips.
        seed: Of the run.
        samples_per_step: Samples of an optimizer step, all processes together.
        start_sample: A sample that begins a step,
        start_step: and the number of that step.
    """

    config: DataConfig
    seed: int
    samples_per_step: int
    start_sample: int = 0
    start_step: int = 0

    def __call__(self, video: Any, prompts: tuple[str, ...], number: int) -> dict[str, Any] | None:
        """One clip; None if it is short and to be left out.

        Raises:
            ValueError, OSError, av.FFmpegError: If it cannot be used.
        """
        if not prompts:
            raise ValueError("the prompt is empty")
        row = Row(0, video, prompts, *probe_video(video, limits=self.config.limits))
        shape = self.config.shape_at(0, self.start_step + (number - self.start_sample) // self.samples_per_step)
        try:
            check_length(row, shape.num_frames, self.config)
        except ShortClipError:
            if self.config.short_clips == "skip":
                return None
            raise
        clip, num_valid = load_video(row, shape, self.config, seeded_generator(self.seed, CLIP_STREAM, number))
        prompt = choose_prompt(prompts, self.config, seed=self.seed, number=number)
        return {"video": clip, "prompt": prompt, "num_valid_frames": num_valid}


def order_samples(rows: Sequence[Row], config: DataConfig, **settings: Any) -> SampleOrder:
    """The order of a run's samples over rows; `settings` are those of `SampleOrder`."""
    return SampleOrder([choose_bucket(row, config) for row in rows], [row.source for row in rows], **settings)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> a batch.

    Returns:
        Lists. clips: videos, uint8 `(3, T, height, width)`, and latents, float `(C, F, H, W)`; cache_keys: of videos
        whose latents are to be kept, else None; prompts and errors; row_indices, sample_numbers and num_valid_frames:
        ints and no tensors, which would wait for a GPU to tell them.
    """
    return {
        "clips": [sample["latents"] if "latents" in sample else sample["video"] for sample in samples],
        "cache_keys": [sample.get("cache_key") for sample in samples],
        "prompts": [sample["prompt"] for sample in samples],
        "row_indices": [sample["row_index"] for sample in samples],
        "sample_numbers": [sample["sample_number"] for sample in samples],
        "num_valid_frames": [sample["num_valid_frames"] for sample in samples],
        "errors": [error for sample in samples for error in sample["errors"]],
    }


# --- descriptions ----------------------------------------------------------------------------------------------------


def describe_rows(rows: Sequence[Row]) -> str:
    """Rows, prompts, lengths, rates, sizes and duration in one line."""
    frames = [row.num_frames for row in rows]
    (height, width), _ = Counter((row.height, row.width) for row in rows).most_common(1)[0]
    sizes = len({(row.height, row.width) for row in rows})
    num_prompts = len({prompt for row in rows for prompt in row.prompts})
    return (
        f"{len(rows)} clips, {num_prompts} prompts; {min(frames)} to {max(frames)} frames "
        f"(median {median(frames):g}) at {median(row.frame_rate for row in rows):g} a second, {height} x {width}"
        + (f" and {sizes - 1} other sizes" if sizes > 1 else "")
        + f"; {sum(row.num_frames / row.frame_rate for row in rows) / 60:.1f} minutes in all"
    )


def describe_shapes(rows: Sequence[Row], config: DataConfig) -> list[str]:
    """Lines on the buckets and stages of a run that has more than one shape."""
    lines = []
    if len(config.buckets) > 1:
        counts = Counter(choose_bucket(row, config) for row in rows)
        buckets = [_describe_shape(config.shapes_of_bucket(bucket)[-1]) for bucket in range(len(config.buckets))]
        lines.append("buckets     " + ", ".join(f"{name}: {counts[i]} clips" for i, name in enumerate(buckets)))
    for stages, schedule in ((config.frame_stages, "frames"), (config.size_stages, "resolution")):
        if len(stages) > 1:
            values = [value if isinstance(value, int) else f"{value[0]} x {value[1]}" for _, value in stages]
            parts = [f"{value} from step {first}" for (first, _), value in zip(stages, values, strict=True)]
            lines.append(f"schedule    {schedule}: " + ", ".join(parts))
    return lines


def _describe_shape(shape: ClipShape) -> str:
    return f"{shape.num_frames} x {shape.height} x {shape.width}"


def describe_flip(rows: Sequence[Row], config: DataConfig) -> str | None:
    """A warning when clips are mirrored, which their prompts or writing in them may not survive."""
    if not config.horizontal_flip:
        return None
    sided = sum(bool(re.search(r"\b(left|right)\b", prompt, re.I)) for row in rows for prompt in row.prompts)
    said = f"; {sided} prompts here say left or right" if sided else ""
    return f"--horizontal_flip mirrors writing, and what prompts call left and right{said}."


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
