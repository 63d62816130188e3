"""Rows of the tables that can be trained on: each is checked by opening its file, without decoding."""

import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import av
from tqdm.auto import tqdm

from causal_wan.data.file_manifest import FileFacts, FileManifest
from causal_wan.data.frames import check_same_frames, min_num_frames, num_sampleable_frames
from causal_wan.data.settings import DataConfig
from causal_wan.tables.prompt_schedules import Prompt, PromptSchedule
from causal_wan.tables.sources import FILE_SUFFIXES, Source, read_sources
from causal_wan.tables.table import Table, TableRow, read_table
from causal_wan.video.decoding import probe_video
from causal_wan.video.facts import NO_TRAITS, Traits, VideoFacts
from causal_wan.video.limits import VideoLimits
from causal_wan.video.opening import EmbeddedVideo, describe_error
from causal_wan.video.paths import NO_BASE, resolve_path


logger = logging.getLogger(__name__)

MAX_ERRORS_SHOWN = 20
WARNINGS = {
    Traits.HIGH_DYNAMIC_RANGE: "are HDR (PQ or HLG): they are shown without tone mapping, pale; convert them to SDR",
    Traits.INTERLACED: "are interlaced: moving edges are combed; deinterlace them",
    Traits.LATE_KEY_FRAME: "do not begin with a key frame: they are read from the first one on",
    Traits.UNKNOWN: "are known from an older cache only: where the frame rate varies, pixels are not square or "
    "pictures are mirrored, the latents are wrong. Put the files in their place once to have that checked",
}


@dataclass(frozen=True)
class Row:
    """A row of the table that can be trained on."""

    number: int  # 1 is the first
    video: Path | EmbeddedVideo
    prompts: tuple[Prompt, ...]
    num_frames: int  # in the file
    frame_rate: float  # the mean where it varies
    height: int
    width: int
    traits: Traits = NO_TRAITS  # what is out of the ordinary in the file
    source: int = 0  # of several
    name: str = ""  # of the video, as the table has it
    content: str = ""  # what its latents are found by, if it is known: `FileFacts.shown`
    controls: tuple["Row", ...] = ()  # videos of the same frames, without prompts

    @property
    def facts(self) -> VideoFacts:
        """What is known of the file."""
        return VideoFacts(self.num_frames, self.frame_rate, self.height, self.width, self.traits)


class BadRow(NamedTuple):
    """A row that cannot be used: the name of its table, the row, and why."""

    table: str
    row: TableRow
    error: Exception


class ShortClipError(ValueError):
    """A clip has fewer frames than are sampled."""


def with_controls(rows: Iterable[Row]) -> list[Row]:
    """All videos of rows: each row, then its controls."""
    return [each for row in rows for each in (row, *row.controls)]


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
    warn_of_traits(with_controls(rows))
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


def warn_of_traits(rows: Sequence[Row]) -> None:
    """Says once of how many clips something is to be known."""
    for trait, warning in WARNINGS.items():
        if count := sum(bool(row.traits & trait) for row in rows):
            logger.warning("%d clip(s) %s", count, warning)


def _list_bad_rows(bad: Sequence[BadRow], place: str, total: int, *, name_tables: bool) -> str:
    lines = [f"{len(bad)} of {total} rows of {place} cannot be used:"]
    for name, row, error in bad[:MAX_ERRORS_SHOWN]:
        table = f"{name}, " if name_tables else ""
        lines.append(f"  {table}row {row.number}, {row.video or 'no path'}: {describe_error(error)}")
    hidden = len(bad) - MAX_ERRORS_SHOWN
    return "\n".join([*lines, f"  and {hidden} more"] if hidden > 0 else lines)


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
        shared = {field.name for field in fields(Source)} & {field.name for field in fields(DataConfig)}
        return [Source(**{name: vars(config)[name] for name in shared})]
    sources = [
        replace(
            source,
            follow_links=source.follow_links or config.follow_links,
            control_column=source.control_column or config.control_column,
        )
        for source in read_sources(config.dataset_config)
    ]
    for source in sources:
        if len(source.control_column) != len(config.control_column):
            raise ValueError(
                f"{config.dataset_config} must name as many controls for {source.metadata_path} as control_column, "
                f"{len(config.control_column)}, got {' '.join(source.control_column)}."
            )
    return [
        replace(source, dataset_base_path=config.dataset_base_path)
        if source.dataset_base_path is None and Path(source.metadata_path).suffix.lower() in FILE_SUFFIXES
        else source
        for source in sources
    ]


def source_weights(config: DataConfig) -> list[float] | None:
    """The share of each table in the samples, in any unit; None is in proportion to their rows."""
    weights = [source.weight for source in sources_of(config)]
    return None if None in weights else weights


def check_row(
    row: TableRow,
    config: DataConfig,
    *,
    source: int = 0,
    manifest: FileManifest | None = None,
    as_shown: bool = False,
) -> Row:
    """One row, checked, with its controls.

    Args:
        row: Of the table.
        config: Says what is too short, and what files may ask for.
        source: Number of the table.
        manifest: Facts of files, which are then not opened, unless they lack what is noted today.
        as_shown: Whether a frame is decoded for what it alone tells; buckets and manifests need it in any case.

    Raises:
        ValueError: With the reason, if the row cannot be used.
        OSError: If the file cannot be read.
        av.FFmpegError: If it is no video.
    """
    found = find_video(row, manifest)
    if not row.prompts:
        raise ValueError("the prompt is empty")
    checked = _check_video(row, found, config, source=source, manifest=manifest, as_shown=as_shown)
    check_length(checked, min_num_frames(config), config)
    check_schedules(checked)
    controls = []
    for name, video in zip(config.control_column, row.controls, strict=True):
        try:
            if video is None or (isinstance(video, str) and not video.strip()):
                raise ValueError("the cell is empty; give each clip a video, or leave the row out")
            of_control = replace(row, video=video, prompts=(), controls=())
            found = find_video(of_control, manifest)
            control = _check_video(of_control, found, config, source=source, manifest=manifest, as_shown=as_shown)
            controls.append(match_control(control, checked, config.limits))
        except (ValueError, OSError, av.FFmpegError) as error:
            raise ValueError(f"its control {name}, {video or 'no path'}: {describe_error(error)}") from error
    return replace(checked, controls=tuple(controls))


def _check_video(
    row: TableRow,
    found: tuple[Path | EmbeddedVideo, FileFacts | None],
    config: DataConfig,
    *,
    source: int,
    manifest: FileManifest | None,
    as_shown: bool,
) -> Row:
    """The video of a row, whatever its length, from `find_video`; other arguments and errors as in `check_row`."""
    video, known = found
    if known is not None and known.traits is None and (isinstance(video, EmbeddedVideo) or video.exists()):
        known = known.with_facts(probe_video(video, limits=config.limits, as_shown=True))
        manifest.add([known])
    if known is not None:
        facts = known.facts
    else:
        # A manifest serves runs with buckets, too, which need the size as shown.
        as_shown = as_shown or manifest is not None or len(config.resolution_buckets) > 1
        facts = probe_video(video, limits=config.limits, as_shown=as_shown)
    content = known.shown if known is not None else ""
    return Row(row.number, video, row.prompts, *facts, source=source, name=str(row.video), content=content)


def match_control(control: Row, clip: Row, limits: VideoLimits) -> Row:
    """A video that is to control a clip, with the clip's rate to the last digit, by which frames are chosen.

    Raises:
        ValueError: If the two do not show the same frames of the same picture.
        OSError, av.FFmpegError: If a file cannot be read.
    """
    facts = check_same_frames((control.video, control.facts), (clip.video, clip.facts), limits)
    return replace(control, frame_rate=facts.frame_rate, traits=facts.traits)


def check_schedules(row: Row) -> None:
    """Checks that prompts along a clip begin before it ends.

    Raises:
        ValueError: If not.
    """
    for prompt in row.prompts:
        if isinstance(prompt, PromptSchedule):
            prompt.check_ends_before(row.num_frames / row.frame_rate)


def check_length(row: Row, wanted: int, config: DataConfig) -> None:
    """Checks that a clip has so many frames, unless short ones are padded.

    Raises:
        ShortClipError: If not.
    """
    available = num_sampleable_frames(row.num_frames, row.frame_rate, config)
    if available < wanted and config.short_clips != "pad":
        if row.traits & Traits.PICTURE:
            raise ShortClipError(describe_short_picture(wanted))
        rate = "" if config.frame_sampling == "uniform" else f" at {config.sampling_rate:g} frames a second"
        raise ShortClipError(f"{available} frames{rate}, fewer than num_frames={wanted} (see --short_clips)")


def describe_short_picture(wanted: int) -> str:
    """Why a picture is no clip of so many frames."""
    return (
        f"a picture and not a video that can be read as num_frames={wanted}: it has 1 frame, for --num_frames "
        "1 or --frame_buckets 1 (see --short_clips)"
    )


def find_video(row: TableRow, manifest: FileManifest | None = None) -> tuple[Path | EmbeddedVideo, FileFacts | None]:
    """The video of a row, and what the manifest knows of it.

    Raises:
        ValueError: If there is none; of a file that is not there, if the manifest does not know its name either.
    """
    if row.error is not None:
        raise ValueError(row.error)
    known = None
    if isinstance(row.video, EmbeddedVideo):
        video = row.video
        known = manifest.find(video) if manifest is not None else None
    elif row.video and row.base is None:
        raise ValueError(NO_BASE)
    else:
        try:
            video = resolve_path(row.video, Path(row.base or ""), follow_links=row.follow_links)
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
