"""Tables of clips: CSV, JSONL, Parquet, folders of videos and texts, and `datasets` data sets -> rows.

A row names a video, or is one with its bytes, and has prompts. Videos are neither opened nor looked for here.
"""

import bisect
import csv
import dataclasses
import difflib
import glob
import io
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationError, DatasetsError
from huggingface_hub.constants import HF_HUB_CACHE

from causal_wan.video_files import EmbeddedVideo, resolve_path


FILE_SUFFIXES = {".csv", ".jsonl", ".ndjson", ".parquet"}
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
SAVED_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
CHUNK_ROWS = 1024
MAX_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table, and how to read it."""

    metadata_path: str
    dataset_base_path: str | None = None
    video_column: str = "video"
    caption_column: tuple[str, ...] = ("prompt",)
    weight: float | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True)
class TableRow:
    """A row, as the table has it.

    Args:
        number: 1 is the first.
        video: A path, or the video itself.
        prompts: Those that are not blank, without white space around them.
        base: Folder that a path is relative to and must not leave; None where no path is allowed.
    """

    number: int
    video: str | EmbeddedVideo | None
    prompts: tuple[str, ...]
    base: str | None = None


class Table(Sequence[TableRow]):
    """The rows of a table, made when they are asked for: what is kept is Arrow's, in memory or mapped from the disk.

    Args:
        cells: An Arrow table, or a `datasets` data set in the format arrow.
        source: Names the columns.
        bases: Folders that paths may lie in; with several, the first that a path is written below is that of its row.
        videos: The data set again, giving Python's values, where it may hold the bytes of videos.
        has_json: Whether a text that is a JSON list of texts stands for these.
    """

    def __init__(
        self,
        cells: pa.Table | Dataset,
        source: Source,
        bases: Sequence[str],
        *,
        videos: Dataset | None = None,
        has_json: bool = False,
    ) -> None:
        self.cells, self.source, self.bases, self.videos, self.has_json = cells, source, bases, videos, has_json

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
        captions = zip(*(cells[name].to_pylist() for name in self.source.caption_column), strict=True)
        videos = self._videos(cells[self.source.video_column], start)
        for number, (video, texts) in enumerate(zip(videos, captions, strict=True), start + 1):
            prompts = tuple(prompt for text in texts for prompt in _prompts(text, has_json=self.has_json))
            yield TableRow(number, video, prompts, self._base(video))

    def _videos(self, column: pa.ChunkedArray, start: int) -> list[str | EmbeddedVideo | None]:
        if self.videos is None or _is_text(column.type):
            return column.to_pylist()
        # Whether there are bytes is seen without reading them.
        content, paths = column, [None] * len(column)
        if pa.types.is_struct(column.type):
            content = pc.struct_field(column, "bytes")
            if column.type.get_field_index("path") >= 0:
                paths = pc.struct_field(column, "path").to_pylist()
        return [
            EmbeddedVideo(self.videos, index, self.source.video_column) if is_there else path
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


def _prompts(cell: str | list[str | None] | None, *, has_json: bool) -> Iterator[str]:
    if has_json and isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            parsed = json.loads(cell)
        except ValueError:
            parsed = None  # a prompt that begins with a bracket
        if isinstance(parsed, list) and all(isinstance(text, str) for text in parsed):
            cell = parsed
    for text in [cell] if isinstance(cell, str) else cell or ():
        if text and text.strip():
            yield text.strip()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_table(source: Source) -> Table:
    """The rows of a table of any kind: the kind is seen from `metadata_path`.

    Raises:
        ValueError: If it is not there, is none, has no rows, or lacks a column.
    """
    path = Path(source.metadata_path)
    if path.is_dir():
        is_saved = any((path / name).is_file() for name in SAVED_DATASET_FILES)
        table = _read_data_set(_load_saved(source), source, []) if is_saved else _read_pairs(source)
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


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a data set on the hub, and none of a file."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and Path(name).suffix.lower() not in FILE_SUFFIXES


def _read_file(source: Source) -> Table:
    path = Path(source.metadata_path)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"a table must end in {', '.join(readers)}, got {path.name}; rename or convert it.")
    if source.dataset_base_path is None:
        raise ValueError(f"dataset_base_path must name the folder that the paths in {path} are relative to.")
    cells = reader(path, source)
    return Table(cells, source, [source.dataset_base_path], has_json=reader is _read_csv)


def _check_columns(names: Iterable[str], source: Source) -> None:
    names = list(names)
    if not {source.video_column, *source.caption_column} <= set(names):
        raise ValueError(
            f"{source.metadata_path} must have the columns {source.video_column} and "
            f"{' and '.join(source.caption_column)}, but has {', '.join(names)}; name yours with --video_column and "
            "--caption_column."
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _check_captions(schema: pa.Schema, source: Source) -> None:
    for name in source.caption_column:
        kind = schema.field(name).type
        if not _is_text(kind) and not (_is_list(kind) and _is_text(kind.value_type)):
            raise ValueError(
                f"{source.metadata_path} must hold text or lists of text in the column {name}, but holds {kind}; "
                "convert it, or name another with --caption_column."
            )


# --- files -----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, source: Source) -> Dataset:
    """All values as text.

    Raises:
        ValueError: If the file is empty, no CSV, or lacks a column.
    """
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
    _check_columns(header, source)
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
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache_dir:
        try:
            table = datasets.load_dataset(
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
    return table.select_columns([source.video_column, *source.caption_column]).with_format("arrow")


def _read_jsonl(path: Path, source: Source) -> pa.Table:
    """One object a line; Arrow's own reader would take texts that look like times for times."""
    names, chunks = {}, []
    schema = pa.schema(
        {source.video_column: pa.string()} | dict.fromkeys(source.caption_column, pa.list_(pa.string()))
    )
    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        try:
            while batch := list(itertools.islice(lines, CHUNK_ROWS)):
                rows = []
                for number, line in batch:
                    values = _parse_line(line, number, path)
                    names.update(dict.fromkeys(values))
                    rows.append(_pick_values(values, number, source))
                chunks.append(pa.Table.from_pylist(rows, schema))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be text in UTF-8 ({error}).") from None
    if chunks:
        _check_columns(names, source)
    return pa.concat_tables(chunks).combine_chunks() if chunks else schema.empty_table()


def _parse_line(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must have a JSON object in each line, but line {number} is none ({error})."
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must have a JSON object in each line, but line {number} is of type {type(values).__name__}."
        )
    return values


def _pick_values(values: dict[str, Any], number: int, source: Source) -> dict[str, Any]:
    picked = {}
    for name in (source.video_column, *source.caption_column):
        value = values.get(name)
        texts = value if isinstance(value, list) and name in source.caption_column else [value]
        wrong = [text for text in texts if text is not None and not isinstance(text, str)]
        if wrong:
            wanted = "text" if name == source.video_column else "text or a list of texts"
            raise ValueError(
                f"{source.metadata_path}, line {number}: {name} must be {wanted}, but holds {wrong[0]!r:.100}; put "
                "numbers in quotes."
            )
        try:
            "".join(text or "" for text in texts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{source.metadata_path}, line {number}: {name} is no Unicode text ({error}).") from None
        picked[name] = value if name == source.video_column else texts
    return picked


def _read_parquet(path: Path, source: Source) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(schema.names, source)
            if not _is_text(schema.field(source.video_column).type):
                raise ValueError(
                    f"{path} must hold paths as text in the column {source.video_column}, but holds "
                    f"{schema.field(source.video_column).type}; with videos in it, load it as a `datasets` data set and "
                    "save that with save_to_disk."
                )
            _check_captions(schema, source)
            return file.read(columns=[source.video_column, *source.caption_column]).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read ({error}).") from None


# --- folders of videos and texts -------------------------------------------------------------------------------------


def _read_pairs(source: Source) -> Table:
    """`name.mp4` with `name.txt`, at any depth, in the order of their names.

    Raises:
        ValueError: If there are none, or one of two is missing; names them.
    """
    folder = Path(source.metadata_path)
    videos, texts = [], set()
    for name in sorted(_visible_files(folder)):
        if Path(name).suffix.lower() in VIDEO_SUFFIXES:
            videos.append(name)
        elif Path(name).suffix.lower() == ".txt":
            texts.add(name)
    partner = {name: str(Path(name).with_suffix(".txt")) for name in videos}
    alone = [f"{name} has no {text}" for name, text in partner.items() if text not in texts]
    alone += [f"{name} has no video" for name in sorted(texts - set(partner.values()))]
    if alone:
        more = f", and {len(alone) - MAX_SHOWN} more" if len(alone) > MAX_SHOWN else ""
        raise ValueError(
            f"{folder} must have a text with the prompt beside each video, such as a.mp4 and a.txt: "
            f"{', '.join(alone[:MAX_SHOWN])}{more}."
        )
    if not videos:
        raise ValueError(
            f"{folder} must hold videos with texts beside them, such as a.mp4 and a.txt, or a `datasets` data set, but "
            f"has no video; name a table in it by its file."
        )
    base = source.dataset_base_path or str(folder)
    below = os.path.relpath(folder, base)
    cells = {
        "video": pa.array([os.path.normpath(os.path.join(below, name)) for name in videos], pa.string()),
        "prompt": pa.array([_read_text(text, folder) for text in partner.values()], pa.string()),
    }
    return Table(pa.table(cells), replace(source, video_column="video", caption_column=("prompt",)), [base])


def _visible_files(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):  # macOS leaves ._a.mp4 beside a.mp4
                yield os.path.relpath(os.path.join(root, name), folder)


def _read_text(name: str, folder: Path) -> str:
    try:
        return resolve_path(name, folder).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder / name} must be text in UTF-8 ({error}).") from None
    except ValueError as error:
        path = folder / name
        if path.is_file() and not path.stat().st_size:
            return ""  # found later, as a row without a prompt
        raise ValueError(f"{path} must be a text below {folder}: {error}.") from None


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


def _read_hub(source: Source) -> Table:
    """A data set of the hub: the bytes in it, or files that `datasets` has downloaded."""
    name = source.metadata_path
    try:
        loaded = datasets.load_dataset(name, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError, DatasetsError, pa.ArrowException) as error:
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
    _check_columns(dataset.column_names, source)
    column = source.video_column
    feature = dataset.features[column]
    if isinstance(feature, datasets.Video):
        if feature.decode:
            dataset = dataset.cast_column(column, datasets.Video(decode=False))
    elif not (
        (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary"))
        or (isinstance(feature, dict) and "bytes" in feature)
    ):
        raise ValueError(
            f"{source.metadata_path} must hold videos in the column {column}, as Video, bytes or paths, but holds "
            f"{feature}; name another with --video_column."
        )
    cells = dataset.select_columns([column, *source.caption_column]).with_format("arrow")
    _check_captions(dataset.features.arrow_schema, source)
    bases = downloads if source.dataset_base_path is None else [source.dataset_base_path]
    return Table(cells, source, bases, videos=dataset.select_columns([column]).with_format(None))


# --- several tables --------------------------------------------------------------------------------------------------


def read_sources(path: str) -> list[Source]:
    """The tables that a YAML file lists; paths in it are relative to the file.

    Raises:
        ValueError: If it is not there or no list of mappings, if a key or value is none of `Source`, or if some tables
            have weights and others have none.
    """
    if not Path(path).is_file():
        raise ValueError(f"dataset_config must name a YAML file, but {path} does not exist.")
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be valid YAML: {error}") from None
    if not isinstance(loaded, list) or not loaded or not all(isinstance(item, dict) for item in loaded):
        raise ValueError(
            f"{path} must be a list of tables, each a mapping that begins with `- metadata_path:`, got "
            f"{type(loaded).__name__}."
        )
    sources = [_parse_source(item, number, path) for number, item in enumerate(loaded, 1)]
    without = [number for number, source in enumerate(sources, 1) if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(
            f"{path} must give a weight to all tables or to none, but {', '.join(map(str, without))} of "
            f"{len(sources)} have none."
        )
    return sources


def _parse_source(item: dict[Any, Any], number: int, path: str) -> Source:
    where, names = f"{path}, table {number}", [field.name for field in dataclasses.fields(Source)]
    values = {}
    for key, value in item.items():
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}."
            raise ValueError(f"{where}: {key!r} is not a setting of a table; {hint}")
        values[key] = _parse_value(key, value, where)
    if values.get("metadata_path") is None:
        raise ValueError(f"{where}: metadata_path must be given.")
    values = {key: value for key, value in values.items() if value is not None}
    folder = Path(path).parent
    beside = folder / values["metadata_path"]
    if beside.exists() or not is_hub_name(values["metadata_path"]):
        values["metadata_path"] = str(beside)
    if "dataset_base_path" in values:
        values["dataset_base_path"] = str(folder / values["dataset_base_path"])
    return Source(**values)


def _parse_value(key: str, value: Any, where: str) -> Any:
    if value is None:
        return None
    if key == "weight":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{where}: weight must be a number above 0, got {value!r}; leave the table out instead.")
        return float(value)
    if key == "caption_column":
        columns = value if isinstance(value, list) else [value]
        if not columns or not all(isinstance(column, str) for column in columns):
            raise ValueError(f"{where}: caption_column must be a name or a list of names, got {value!r}.")
        return tuple(columns)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text, got {value!r}; put it in quotes.")
    return value
