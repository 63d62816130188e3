"""Tables of clips: CSV, JSONL, Parquet, folders of videos and texts, and `datasets` data sets -> rows.

A row names a video, or is one with its bytes, and has prompts. Videos are neither opened nor looked for here.
"""

import bisect
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Value
from datasets.exceptions import DatasetsError
from huggingface_hub.constants import HF_HUB_CACHE

from causal_wan.tables.delimited import ROW, SUFFIXES
from causal_wan.tables.files import read_csv, read_jsonl, read_pairs, read_parquet
from causal_wan.tables.prompt_schedules import Prompt, schedule_column
from causal_wan.tables.prompts import prompts_of, prompts_or_schedule
from causal_wan.tables.sources import (
    TAR_SUFFIXES,
    Source,
    caption_columns,
    check_captions,
    check_columns,
    check_suffix,
    find_files,
    is_hub_name,
    is_tar,
    is_text,
)
from causal_wan.tables.tars import ERROR
from causal_wan.tables.undecoded import LOADING_ERRORS, is_saved_dataset, load_undecoded
from causal_wan.video.opening import EmbeddedVideo


CHUNK_ROWS = 1024


@dataclass(frozen=True)
class TableRow:
    """A row, as the table has it.

    Args:
        number: In its file, as people count; 1 is the first.
        video: A path, or the video itself.
        prompts: Those that are not blank, without white space around them; of a row with a schedule, that alone.
        controls: The videos that control it, like `video`.
        base: Folder that a path is relative to and must not leave; None where no path is allowed.
        follow_links: Whether links in that folder may lead out of it.
        error: Why the row cannot be used, if that is known already.
    """

    number: int
    video: str | EmbeddedVideo | None
    prompts: tuple[Prompt, ...]
    base: str | None = None
    follow_links: bool = False
    error: str | None = None
    controls: tuple[str | EmbeddedVideo | None, ...] = ()


class Table(Sequence[TableRow]):
    """The rows of a table, made when they are asked for: what is kept is Arrow's, in memory or mapped from the disk.

    Args:
        cells: An Arrow table, or a `datasets` data set in the format arrow.
        source: Names the columns.
        bases: Folders that paths may lie in; with several, the first that a path is written below is that of its row.
        videos: The data set again, giving Python's values, where it may hold the bytes of videos.
        schedules: The data set again, giving Python's values, where it has a column of schedules.
        has_json: Whether a text that is a JSON list of texts stands for these.
    """

    def __init__(
        self,
        cells: pa.Table | Dataset,
        source: Source,
        bases: Sequence[str],
        *,
        videos: Dataset | None = None,
        schedules: Dataset | None = None,
        has_json: bool = False,
    ) -> None:
        self.cells, self.source, self.bases, self.videos, self.has_json = cells, source, bases, videos, has_json
        self.schedules = cells if schedules is None else schedules

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> TableRow:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return next(self._rows(index, index + 1))

    def __iter__(self) -> Iterator[TableRow]:
        for start in range(0, len(self), CHUNK_ROWS):
            yield from self._rows(start, min(start + CHUNK_ROWS, len(self)))

    def _rows(self, start: int, end: int) -> Iterator[TableRow]:
        cells = self.cells[start:end]
        columns = [cells[name].to_pylist() for name in caption_columns(cells.column_names, self.source)]
        captions = zip(*columns, strict=True) if columns else [()] * len(cells)
        videos, *controls = (self._videos(cells[name], name, start) for name in self.source.video_columns)
        controls = zip(*controls, strict=True) if controls else [()] * len(cells)
        errors = cells[ERROR].to_pylist() if ERROR in cells.column_names else [None] * len(cells)
        numbers = cells[ROW].to_pylist() if ROW in cells.column_names else range(start + 1, end + 1)
        rows = zip(numbers, videos, captions, self._schedules(start, end), errors, controls, strict=True)
        for number, video, texts, schedule, error, own in rows:
            texts = tuple(prompt for text in texts for prompt in prompts_of(text, has_json=self.has_json))
            prompts, bad_schedule = prompts_or_schedule(texts, schedule)
            facts = (self._base(video), self.source.follow_links, error or bad_schedule, own)
            yield TableRow(number, video, prompts, *facts)

    def _schedules(self, start: int, end: int) -> list[Any]:
        name = schedule_column(self.schedules.column_names)
        if name is None:
            return [None] * (end - start)
        column = self.schedules[start:end][name]
        return column.to_pylist() if isinstance(column, pa.ChunkedArray) else list(column)

    def _videos(self, column: pa.ChunkedArray, name: str, start: int) -> list[str | EmbeddedVideo | None]:
        if self.videos is None or is_text(column.type):
            return column.to_pylist()
        # Whether there are bytes is seen without reading them.
        content, paths = column, [None] * len(column)
        if pa.types.is_struct(column.type):
            content = pc.struct_field(column, "bytes")
            if column.type.get_field_index("path") >= 0:
                paths = pc.struct_field(column, "path").to_pylist()
        return [
            EmbeddedVideo(self.videos, index, name, path or "") if is_there else path
            for index, (is_there, path) in enumerate(zip(content.is_valid().to_pylist(), paths, strict=True), start)
        ]

    def _base(self, video: str | EmbeddedVideo | None) -> str | None:
        if not isinstance(video, str) or len(self.bases) < 2:
            return self.bases[0] if self.bases else None
        return next((base for base in self.bases if Path(video).is_relative_to(base)), self.bases[0])


class Tables(Sequence[TableRow]):
    """The rows of several tables, one after another."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = list(tables)
        self.ends = list(itertools.accumulate(map(len, self.tables)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> TableRow:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self.ends, index)
        return self.tables[place][index - self.ends[place]]  # from its end

    def name(self, index: int) -> str:
        """What the table of a row is called."""
        return self.tables[bisect.bisect_right(self.ends, index)].source.metadata_path

    def __iter__(self) -> Iterator[TableRow]:
        return itertools.chain.from_iterable(self.tables)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_table(source: Source) -> Table:
    """The rows of a table of any kind: the kind is seen from `metadata_path`.

    Raises:
        ValueError: If it is not there, is none, has no rows, or lacks a column.
    """
    path = Path(source.metadata_path)
    if path.is_dir():
        if is_saved_dataset(path):
            table = _read_data_set(_load_saved(source), source, [])
        else:
            table = _read_tars(source) if any(map(is_tar, os.listdir(path))) else _read_folder(source)
    elif path.is_file() and is_tar(path):
        table = _read_tars(source)
    elif path.is_file():
        table = _read_file(source)
    elif is_hub_name(source.metadata_path):
        table = _read_hub(source)
    else:
        raise ValueError(
            f"metadata_path must be a CSV, JSONL or Parquet file, a folder, or the name of a data set on the hub, but "
            f"{path} does not exist."
        )
    if not len(table):
        raise ValueError(f"{path} must have at least one row, but has none.")
    return table


def _read_folder(source: Source) -> Table:
    """Videos with texts beside them; another base folder may be given only to find them from there."""
    if source.control_column:
        raise ValueError(
            f"control_column must name columns of a table, but {source.metadata_path} is a folder of videos and "
            "texts; write a CSV with their paths."
        )
    folder, base = source.metadata_path, source.dataset_base_path or source.metadata_path
    source = replace(source, video_column="video", caption_column=("prompt",))
    cells = read_pairs(Path(folder), follow_links=source.follow_links)
    below = os.path.relpath(folder, base)
    paths = [os.path.normpath(os.path.join(below, name)) for name in cells["video"].to_pylist()]
    return Table(cells.set_column(0, "video", pa.array(paths, pa.string())), source, [base])


def _read_file(source: Source) -> Table:
    path = Path(source.metadata_path)
    readers = dict.fromkeys(SUFFIXES, read_csv)
    readers |= {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".parquet": read_parquet}
    check_suffix(path, [*readers, *TAR_SUFFIXES])
    reader = readers[path.suffix.lower()]
    if source.dataset_base_path is None:
        raise ValueError(f"dataset_base_path must name the folder that the paths in {path} are relative to.")
    cells = reader(path, source)
    return Table(cells, source, [source.dataset_base_path], has_json=reader is read_csv)


# --- `datasets` ------------------------------------------------------------------------------------------------------


def _load_saved(source: Source) -> Dataset:
    try:
        loaded = datasets.load_from_disk(source.metadata_path)
    except (OSError, ValueError, KeyError, TypeError, DatasetsError, pa.ArrowException) as error:
        raise ValueError(f"{source.metadata_path} is no data set that `datasets` can load ({error}).") from None
    if not isinstance(loaded, DatasetDict):
        return loaded
    if source.split not in loaded:
        raise ValueError(
            f"{source.metadata_path} must have the split {source.split}, but has {', '.join(loaded)}; name one with "
            "split in --dataset_config."
        )
    return loaded[source.split]


def _read_tars(source: Source) -> Table:
    """WebDataset tars, one or all in a folder; `datasets` keeps a copy of what is in them in its cache."""
    path = Path(source.metadata_path)
    files = find_files(source, TAR_SUFFIXES) if path.is_dir() else [str(path)]
    arguments = {"path": "webdataset", "data_files": [glob.escape(file) for file in files], "split": "train"}
    try:
        loaded = load_undecoded(arguments, source, streaming=False)
    except LOADING_ERRORS as error:
        reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise ValueError(f"{path} must be WebDataset tars, but cannot be read as such ({reason}).") from error
    return _read_data_set(loaded, source, [])


def _read_hub(source: Source) -> Table:
    """A data set of the hub: the bytes in it, or files that `datasets` has downloaded."""
    name = source.metadata_path
    try:
        arguments = {"path": name, "split": source.split, "revision": source.revision}
        loaded = load_undecoded(arguments, source, streaming=False)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"metadata_path must be a file or folder that is there, or a data set on the hub, but {name} is not here, "
            f"and loading the split {source.split} of it from the hub failed: {error}"
        ) from error
    # Where files of this repository alone are, and what came out of archives.
    repository = os.path.join(HF_HUB_CACHE, "datasets--" + name.replace("/", "--"))
    return _read_data_set(loaded, source, [repository, str(datasets.config.DOWNLOADED_DATASETS_PATH)])


def _read_data_set(dataset: Dataset, source: Source, downloads: Sequence[str]) -> Table:
    """The rows of a data set whose column holds videos, as bytes or paths.

    Args:
        dataset: Loaded; nothing of it is decoded.
        source: Names the columns.
        downloads: Folders for paths, if the source names none.
    """
    check_columns(dataset.column_names, source)
    for column in source.video_columns:
        feature = dataset.features[column]
        if isinstance(feature, datasets.Video):
            if feature.decode:
                dataset = dataset.cast_column(column, datasets.Video(decode=False))
        elif not (
            (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary"))
            or (isinstance(feature, dict) and "bytes" in feature)
        ):
            flag = "--video_column" if column == source.video_column else "--control_column"
            raise ValueError(
                f"{source.metadata_path} must hold videos in the column {column}, as Video, bytes or paths, but holds "
                f"{feature}; name another with {flag}."
            )
    errors = [ERROR] if ERROR in dataset.column_names else []
    captions, name = caption_columns(dataset.column_names, source), schedule_column(dataset.column_names)
    schedules = None if name is None else dataset.select_columns([name]).with_format(None)
    texts = [*source.video_columns, *captions, *errors]
    cells = dataset.select_columns(list(dict.fromkeys(texts))).with_format("arrow")
    check_captions(dataset.features.arrow_schema, source)
    bases = downloads if source.dataset_base_path is None else [source.dataset_base_path]
    videos = dataset.select_columns(list(source.video_columns)).with_format(None)
    return Table(cells, source, bases, videos=videos, schedules=schedules)
