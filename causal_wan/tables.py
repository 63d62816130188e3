"""Files and data sets -> rows of a table: which videos there are, and their prompts. No video is opened.

CSV, JSON lines, Parquet, a folder of videos with texts beside them, WebDataset tars, and what `datasets` has saved or
the hub holds.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, config
from huggingface_hub.constants import HF_HUB_CACHE

from causal_wan.sources import (
    JSON_SUFFIXES,
    PlainRow,
    Source,
    as_prompts,
    check_columns,
    check_types,
    is_binary,
    is_text,
    open_dataset,
)
from causal_wan.text_tables import csv_rows, json_rows, pair_rows
from causal_wan.video_files import EmbeddedVideo


CHUNK_ROWS = 10_000


@dataclass(frozen=True)
class TableRow:
    """A row as it is in the table, unchecked."""

    number: int  # 1 is the first
    video: str | EmbeddedVideo | None
    prompts: tuple[str, ...]  # empty ones included


class TableRows(Sequence[TableRow]):
    """The rows of a table, kept as Arrow and made when asked for: a million take some hundred megabytes.

    Args:
        rows: As plain values.
        base_path: Folder below which the paths of videos must lie; None if there are none.
        dataset: Holds the videos of rows that are embedded,
        video_column: in this column.
    """

    SCHEMA = pa.schema([("video", pa.string()), ("is_embedded", pa.bool_()), ("prompts", pa.list_(pa.string()))])

    def __init__(
        self,
        rows: Iterable[PlainRow],
        *,
        base_path: Path | None,
        dataset: Dataset | None = None,
        video_column: str = "",
    ) -> None:
        self.base_path, self.dataset, self.video_column = base_path, dataset, video_column
        rows, batches = iter(rows), []
        while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
            columns = zip(zip(*chunk, strict=True), self.SCHEMA.types, strict=True)
            batches.append(pa.record_batch([pa.array(*column) for column in columns], schema=self.SCHEMA))
        self._table = pa.Table.from_batches(batches, self.SCHEMA)

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> TableRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TableRow]: ...
    def __getitem__(self, index: int | slice) -> TableRow | list[TableRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._make_row(index, *(column[index].as_py() for column in self._table.columns))

    def __iter__(self) -> Iterator[TableRow]:
        index = itertools.count()
        for batch in self._table.to_batches(CHUNK_ROWS):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield self._make_row(next(index), *values)

    def _make_row(self, index: int, path: str | None, is_embedded: bool, prompts: list[str]) -> TableRow:
        video = EmbeddedVideo(self.dataset, index, self.video_column) if is_embedded else path
        return TableRow(index + 1, video, tuple(prompts))

    @property
    def has_paths(self) -> bool:
        """Whether a row names a file."""
        return any(isinstance(row.video, str) for row in self)


def read_table(source: Source) -> TableRows:
    """The rows of a source, unchecked. Paths are to be looked up below the `base_path` of what comes back.

    Raises:
        ValueError: If the source is not there, cannot be read, lacks a column, or holds other than text in one.
    """
    path = Path(source.name)
    reader = {".csv": csv_rows, ".parquet": _parquet_rows, **dict.fromkeys(JSON_SUFFIXES, json_rows)}.get(path.suffix)
    if source.metadata_path is None or (path.is_dir() and not _is_dataset_folder(source)):
        rows = TableRows(pair_rows(path), base_path=path)
    elif reader is None or path.is_dir() or "://" in source.name:
        rows = _read_dataset(source)
    elif not path.is_file():
        raise ValueError(f"metadata_path must be a file, a folder or a data set, but {path} does not exist.")
    elif reader is _parquet_rows and _embeds_videos(path, source):
        rows = _read_dataset(source)
    else:
        rows = TableRows(reader(path, source), base_path=source.base_folder())
    if not len(rows):
        raise ValueError(f"{source.name} must have at least one row, but has none.")
    return rows


def _is_dataset_folder(source: Source) -> bool:
    patterns = ("*.tar", "*.parquet", "data/*.parquet")
    return source.is_saved or any(next(Path(source.name).glob(pattern), None) is not None for pattern in patterns)


def _embeds_videos(path: Path, source: Source) -> bool:
    """Whether a Parquet file holds videos, not the paths of some.

    Raises:
        ValueError: If it is none, or its columns are not as they should be.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} must be a Parquet file, but cannot be read as one ({error}).") from None
    check_columns(schema.names, source)
    check_types(schema, source)
    return not is_text(schema.field(source.video_column).type)


def _parquet_rows(path: Path, source: Source) -> Iterator[PlainRow]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(CHUNK_ROWS, columns=source.columns):
            yield from _arrow_rows(pa.table(batch), source)


def _arrow_rows(table: pa.Table, source: Source) -> Iterator[PlainRow]:
    """The rows of an Arrow table; the bytes of videos are not touched."""
    videos = table[source.video_column]
    if pa.types.is_struct(videos.type):
        paths, bytes_there = pc.struct_field(videos, "path").to_pylist(), pc.struct_field(videos, "bytes").is_valid()
    elif is_binary(videos.type):
        paths, bytes_there = [None] * len(videos), videos.is_valid()
    else:
        paths, bytes_there = videos.to_pylist(), pa.array([False] * len(videos))
    captions = [table[column].to_pylist() for column in source.caption_columns]
    for path, is_embedded, *values in zip(paths, bytes_there.to_pylist(), *captions, strict=True):
        yield path, is_embedded, [prompt for value in values for prompt in as_prompts(value)]


def _read_dataset(source: Source) -> TableRows:
    dataset = open_dataset(source)
    batches = dataset.with_format("arrow").iter(CHUNK_ROWS)
    rows = TableRows(
        (row for batch in batches for row in _arrow_rows(batch, source)),
        base_path=None,
        dataset=dataset.select_columns([source.video_column]),
        video_column=source.video_column,
    )
    if rows.has_paths:
        rows.base_path = _cache_folder(rows) if source.is_on_hub else source.base_folder()
    return rows


def _cache_folder(rows: TableRows) -> Path:
    """The folder in which `datasets` has put the files of a data set of the hub."""
    hub, own = (Path(os.path.realpath(folder)) for folder in (HF_HUB_CACHE, config.HF_DATASETS_CACHE))
    path = next(row.video for row in rows if isinstance(row.video, str))
    return hub if Path(os.path.realpath(path)).is_relative_to(hub) else own
