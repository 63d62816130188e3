"""Data sets that are read as training goes, without a copy on disk: WebDataset tars, Parquet, JSON lines, local or on
the hub, file after file.

A clip comes with its bytes, or with a path below `dataset_base_path`. Nothing is decoded here.
"""

import glob
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from datasets import (
    DatasetDict,
    IterableDataset,
    Video,
    disable_progress_bars,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from huggingface_hub import HfFileSystem

from causal_wan.config.refusals import DataError
from causal_wan.tables.prompt_schedules import Prompt, schedule_column
from causal_wan.tables.prompts import prompts_of, prompts_or_schedule
from causal_wan.tables.sources import (
    TAR_SUFFIXES,
    Source,
    caption_columns,
    check_captions,
    check_columns,
    find_files,
    is_text,
    read_columns,
)
from causal_wan.tables.tars import ERROR
from causal_wan.tables.text_files import check_is_utf_8
from causal_wan.tables.undecoded import LOADING_ERRORS, is_saved_dataset, load_undecoded
from causal_wan.video.paths import NO_BASE, resolve_path


BUILDERS = {
    **dict.fromkeys(TAR_SUFFIXES, "webdataset"),
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
}


@dataclass(frozen=True)
class StreamedVideo:
    """A clip whose bytes came with the stream; opens like a path."""

    content: bytes
    name: str

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes as a file.

        Raises:
            ValueError: If it is to be written.
        """
        if mode != "rb":
            raise ValueError(f"a streamed video can be read only, with mode rb, got {mode}.")
        return io.BytesIO(self.content)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class StreamedRow:
    """A row as it came, unchecked."""

    file: int
    row: int  # in the file, from 0
    name: str  # for people
    video: bytes | str | None
    prompts: tuple[Prompt, ...]  # those that are not blank, without white space around them; or a schedule alone
    follow_links: bool = False  # whether those in the folder of its file may lead out of it
    error: str | None = None  # why it cannot be used, if that is known already
    controls: tuple[bytes | str | None, ...] = ()  # the videos that control it, like `video`

    @property
    def num_bytes(self) -> int:
        return sum(len(video or "") for video in (self.video, *self.controls))

    def find_video(self, base: str | None) -> Path | StreamedVideo:
        """The clip.

        Args:
            base: Folder that a path is relative to and must not leave; None where no path is allowed.

        Raises:
            ValueError: If there is none, or none that may be opened.
        """
        if self.error is not None:
            raise ValueError(self.error)
        if not self.prompts:
            raise ValueError("the prompt is empty")
        return self._find(self.video, base)

    def find_controls(self, base: str | None) -> list[Path | StreamedVideo]:
        """The videos that control it; arguments and errors as in `find_video`."""
        return [self._find(video, base) for video in self.controls]

    def _find(self, video: bytes | str | None, base: str | None) -> Path | StreamedVideo:
        if isinstance(video, bytes) and video:
            return StreamedVideo(video, self.name)
        if isinstance(video, bytes):
            raise ValueError("the file is empty")
        if video and base is None:
            raise ValueError(NO_BASE)
        return resolve_path(video, Path(base or ""), follow_links=self.follow_links)


@dataclass(frozen=True)
class Stream:
    """A data set that is read file after file.

    Args:
        source: What was asked for.
        dataset: Its columns and no others, undecoded.
        files: Names of its files, where they are known.
    """

    source: Source
    dataset: IterableDataset
    files: tuple[str, ...] = ()

    @property
    def num_files(self) -> int:
        return self.dataset.num_shards

    def split_further(self) -> "Stream":
        """The same rows in more files, if the format allows it: Parquet by groups of rows."""
        return replace(self, dataset=self.dataset.reshard())

    def read_file(self, file: int, start: int = 0) -> Iterator[StreamedRow]:
        """The rows of a file in order, from a row on.

        Raises:
            DataError: If the file cannot be read to its end.
        """
        row = -1
        # `iter` reads all that it is given; going through a data set itself takes another share in each worker.
        rows = self.dataset.shard(self.num_files, file).iter(batch_size=1)
        try:
            for row, columns in enumerate(rows):
                if row >= start:
                    yield self._make_row(file, row, {name: values[0] for name, values in columns.items()})
        except LOADING_ERRORS as error:
            name = self._name_of(file)
            cause = " ".join(str(error).removeprefix(f"{name}: ").split()) or type(error).__name__
            raise DataError(
                f"{name} cannot be read after row {row + 1}: {cause.removesuffix('.')}. Repair or remove it, or see "
                "to the connection."
            ) from error

    def _name_of(self, file: int) -> str:
        """A file by its name, or else by its number."""
        if len(self.files) == 1 or len(self.files) == self.num_files:
            return self.files[min(file, len(self.files) - 1)]
        return f"file {file + 1} of {self.num_files} of {self.source.metadata_path}"

    def _make_row(self, file: int, row: int, columns: dict[str, Any]) -> StreamedRow:
        (video, path), *controls = (self._read(columns[name]) for name in self.source.video_columns)
        name = f"row {row + 1} of file {file + 1} of {self.source.metadata_path}"
        if path:
            name += f" ({os.path.basename(path)})"
        captions = caption_columns(columns, self.source)
        texts = tuple(prompt for column in captions for prompt in prompts_of(columns[column]))
        prompts, bad_schedule = prompts_or_schedule(texts, columns.get(schedule_column(columns)))
        return StreamedRow(
            *(file, row, name, video, prompts),
            follow_links=self.source.follow_links,
            error=columns.get(ERROR) or bad_schedule,
            controls=tuple(control for control, _ in controls),
        )

    def _read(self, value: dict[str, Any] | bytes | str | None) -> tuple[bytes | str | None, str | None]:
        """The bytes of a video, or where it is if there are none; and its path, if it comes with one."""
        if not isinstance(value, dict):
            return value, None
        path, content = value.get("path"), value.get("bytes")
        if content is None and path and self._is_own_file(path):
            content = HfFileSystem().cat_file(path)
        return path if content is None else content, path

    def _is_own_file(self, path: str) -> bool:
        """Whether a path is a file in the hub's repository of this data set; no other address is opened."""
        start = f"hf://datasets/{self.source.metadata_path}@"
        return path.startswith(start) and not {"..", "."} & set(path.split("/")) and "::" not in path


# --- opening ---------------------------------------------------------------------------------------------------------


def open_stream(source: Source) -> Stream:
    """A data set to be read as training goes.

    Args:
        source: `metadata_path` is a tar, Parquet or JSON lines file, a folder of such, a folder that `datasets` saved,
            the name of a data set on the hub, or the address of files (`hf://...`, `https://...`, with `*`).

    Raises:
        ValueError: If it cannot be opened, lacks a column, or holds something else in one.
    """
    disable_progress_bars()
    is_saved = is_saved_dataset(Path(source.metadata_path))
    arguments = {} if is_saved else _loading_arguments(source)
    try:
        dataset = _load_saved(source) if is_saved else load_undecoded(arguments, source, streaming=True)
        if dataset.features is None:  # its first rows could not be read: that says why
            next(iter(dataset), None)
    except (*LOADING_ERRORS, ImportError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) else None
        causes = f"{error} {cause or ''}".strip()
        raise ValueError(f"{source.metadata_path} could not be opened as a stream: {causes}") from error
    check_columns(dataset.features or (), source)
    for name in source.video_columns:
        if isinstance(dataset.features[name], Video):
            dataset = dataset.cast_column(name, Video(decode=False))
        _check_video(dataset.features.arrow_schema.field(name).type, name, source)
    check_captions(dataset.features.arrow_schema, source)
    errors = [ERROR] if ERROR in dataset.features else []
    columns = [*read_columns(dataset.features, source), *errors]
    return Stream(source, dataset.select_columns(columns), _name_files(arguments))


def _check_video(kind: pa.DataType, name: str, source: Source) -> None:
    is_video = pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}
    if not (is_video or is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise ValueError(
            f"{source.metadata_path} must hold videos in the column {name}, as Video, bytes or paths, but holds "
            f"{kind}; name another with {'--video_column' if name == source.video_column else '--control_column'}."
        )


def _load_saved(source: Source) -> IterableDataset:
    dataset = load_from_disk(source.metadata_path)
    if isinstance(dataset, DatasetDict):
        if source.split not in dataset:
            raise ValueError(f"it has no split {source.split}, but {', '.join(dataset)}.")
        dataset = dataset[source.split]
    return dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset.cache_files), len(dataset))))


def _name_files(arguments: dict[str, Any]) -> tuple[str, ...]:
    """The files that `load_dataset` is told of by their names; none if it finds them itself."""
    given = arguments.get("data_files", [])
    if isinstance(given, str):
        given = [] if "://" in given and glob.has_magic(given) else [given]
    return tuple(re.sub(r"\[([*?[])\]", r"\1", name) for name in given)  # what `glob.escape` did


def _loading_arguments(source: Source) -> dict[str, Any]:
    """What `load_dataset` has to know of a source.

    Raises:
        ValueError: If it is nothing that can be streamed.
    """
    name = source.metadata_path
    path = Path(name)
    builder = next((kind for suffix, kind in BUILDERS.items() if name.lower().endswith(suffix)), None)
    if builder == "json" and path.is_file():
        check_is_utf_8(path)
    if builder and ("://" in name or path.is_file()):
        return {"path": builder, "data_files": name if "://" in name else glob.escape(name), "split": "train"}
    if path.is_dir():
        for kind in dict.fromkeys(BUILDERS.values()):
            if files := find_files(source, tuple(suffix for suffix, own in BUILDERS.items() if own == kind)):
                for file in files if kind == "json" else ():
                    check_is_utf_8(Path(file))
                return {"path": kind, "data_files": [glob.escape(file) for file in files], "split": "train"}
        raise ValueError(f"{name} must hold {', '.join(BUILDERS)} files to be streamed, but has none.")
    if not path.exists() and not path.suffix and name.count("/") == 1:
        return {"path": name, "split": source.split, "revision": source.revision}
    there = "" if path.exists() else ", which does not exist"
    raise ValueError(
        f"what is streamed must be {', '.join(BUILDERS)} files, a folder of them, or a data set on the hub "
        f"(owner/name), got {name}{there}; a CSV is small, and read without --streaming."
    )
