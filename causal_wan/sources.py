"""Where clips come from: files and data sets, their columns, and the list of several that --dataset_config names."""

import difflib
import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tarfile import TarError
from typing import Any

import pyarrow as pa
import yaml
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    Video,
    disable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
BUILDERS = {".csv": "csv", ".parquet": "parquet", ".tar": "webdataset", **dict.fromkeys(JSON_SUFFIXES, "json")}
SAVED_DATASET = ("state.json", "dataset_info.json", "dataset_dict.json")  # one of these is in what `datasets` saves

PlainRow = tuple[str | None, bool, list[str]]  # path, whether the data set holds the bytes, prompts


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where clips come from."""

    metadata_path: str | None = None  # file, folder or hub id; None is the folder of videos itself
    dataset_base_path: str | None = None  # folder that paths are relative to, and cannot leave
    video_column: str = "video"
    caption_columns: tuple[str, ...] = ("prompt",)
    weight: float | None = None  # share of the samples among several sources, in any unit; None is by rows
    split: str = "train"  # of a data set with several
    revision: str | None = None  # of a data set on the hub

    def __post_init__(self) -> None:
        if self.metadata_path is None and self.dataset_base_path is None:
            raise ValueError("a source must have a metadata_path, or a dataset_base_path with videos and texts in it.")
        if not self.caption_columns:
            raise ValueError(f"{self.name}: caption_columns must name at least one column.")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"{self.name}: weight must be above 0 and finite, got {self.weight}.")

    @property
    def name(self) -> str:
        return str(self.metadata_path or self.dataset_base_path)

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys([self.video_column, *self.caption_columns]))

    @property
    def is_on_hub(self) -> bool:
        """Whether it is a data set of the hub, by its name."""
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and Path(self.name).suffix not in BUILDERS
        return self.metadata_path is not None and bool(is_name) and not Path(self.name).exists()

    @property
    def is_saved(self) -> bool:
        """Whether it is a folder that `datasets` saved."""
        return any((Path(self.name) / name).is_file() for name in SAVED_DATASET)

    def base_folder(self) -> Path:
        """The folder below which files lie.

        Raises:
            ValueError: If there is none.
        """
        if self.dataset_base_path is None:
            raise ValueError(f"{self.name} names files, so --dataset_base_path must say below which folder they lie.")
        if not Path(self.dataset_base_path).is_dir():
            raise ValueError(f"dataset_base_path must be a folder, but {self.dataset_base_path} is not one.")
        return Path(self.dataset_base_path)


# --- several sources -------------------------------------------------------------------------------------------------


def read_sources(path: str | Path) -> list[Source]:
    """The sources of a YAML file: a list of mappings with the keys of `Source`; paths are relative to the file.

    Raises:
        ValueError: If the file is not there or no such list, if a key or a value is none of a source's, or if some
            sources have weights and others have none.
    """
    if not Path(path).is_file():
        raise ValueError(f"--dataset_config must name a YAML file, but {path} does not exist.")
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be valid YAML: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must be a list of sources, each beginning with `- metadata_path: ...`.")
    sources = []
    for number, entry in enumerate(entries, 1):
        try:
            sources.append(_read_source(entry, Path(path).parent))
        except ValueError as error:
            raise ValueError(f"{path}, source {number}: {error}") from None
    with_weight = [source.weight is not None for source in sources]
    if any(with_weight) and not all(with_weight):
        without = with_weight.index(False) + 1
        raise ValueError(f"{path}: all sources must have a weight, or none, but source {without} has none.")
    return sources


def _read_source(entry: Any, folder: Path) -> Source:
    if not isinstance(entry, dict):
        raise ValueError(f"a source must be a mapping, got {entry!r}; write `- metadata_path: ...`.")
    keys = [field.name for field in fields(Source)]
    values = {"caption_columns" if key == "caption_column" else key: value for key, value in entry.items()}
    for key, value in values.items():
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(keys)}."
            raise ValueError(f"{key!r} is no setting of a source; {hint}")
        _check_setting(key, value)
    captions = values.get("caption_columns", ["prompt"])
    values["caption_columns"] = (captions,) if isinstance(captions, str) else tuple(captions)
    source = Source(**values)
    base = None if source.dataset_base_path is None else str(folder / source.dataset_base_path)
    return replace(source, metadata_path=_locate(source, folder), dataset_base_path=base)


def _check_setting(key: str, value: Any) -> None:
    is_text = isinstance(value, str)
    if key == "weight":
        kind, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    elif key == "caption_columns":
        is_list = isinstance(value, list) and all(isinstance(column, str) for column in value)
        kind, fits = "a name or a list of names", is_text or is_list
    else:
        kind, fits = "text", is_text
    if not (fits or (value is None and key in ("metadata_path", "dataset_base_path", "weight", "revision"))):
        raise ValueError(f"{key} must be {kind}, got {value!r}.")


def _locate(source: Source, folder: Path) -> str | None:
    """A path relative to a folder as one that can be opened; names on the hub and addresses as they are."""
    path = source.metadata_path
    if path is None or "://" in path or (not (folder / path).exists() and source.is_on_hub):
        return path
    return str(folder / path)


# --- columns ---------------------------------------------------------------------------------------------------------


def check_columns(columns: Sequence[str], source: Source) -> None:
    """Checks that a table has the columns that a source names.

    Raises:
        ValueError: If not; lists those that it has.
    """
    if not set(source.columns) <= set(columns):
        raise ValueError(
            f"{source.name} must have the columns {source.video_column} and {' and '.join(source.caption_columns)}, "
            f"but has {', '.join(columns)}; name yours with --video_column and --caption_column."
        )


def check_types(schema: pa.Schema, source: Source) -> None:
    """Checks that columns hold what they should.

    Raises:
        ValueError: If not; names the column and what it holds.
    """
    video = schema.field(source.video_column).type
    if not (is_text(video) or is_binary(video) or (pa.types.is_struct(video) and _has_video_fields(video))):
        raise ValueError(
            f"{source.name}: the column {source.video_column} must hold paths or videos, but holds {video}; name "
            "another with --video_column."
        )
    for column in source.caption_columns:
        kind = schema.field(column).type
        if not is_text(kind) and not (hasattr(kind, "value_type") and is_text(kind.value_type)):
            raise ValueError(
                f"{source.name}: the column {column} must hold text or lists of texts, but holds {kind}; name another "
                "with --caption_column."
            )


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of text."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _has_video_fields(kind: pa.StructType) -> bool:
    return {field.name for field in kind} >= {"bytes", "path"}


def as_prompts(value: str | Sequence[str | None] | None) -> list[str]:
    """The prompts in a column: a text, several, or nothing, which is an empty text."""
    values = [value] if value is None or isinstance(value, str) else value
    return [text or "" for text in values]


# --- data sets -------------------------------------------------------------------------------------------------------


def open_dataset(source: Source, *, streaming: bool = False) -> Dataset | IterableDataset:
    """A source as a data set of `datasets`, whose videos are not decoded.

    Args:
        source: A folder that `datasets` saved, Parquet files, tars, JSON lines, a hub id, or the address of files.
        streaming: Whether to read as it goes, without a copy on disk.

    Raises:
        ValueError: If it cannot be loaded, lacks a column, or holds something else in one.
    """
    disable_progress_bars()
    arguments = {} if source.is_saved else _loading_arguments(source)
    try:
        if source.is_saved:
            dataset = _load_saved(source, streaming)
        else:
            features = _undecoded_tar_features(arguments)
            dataset = load_dataset(**arguments, features=features, streaming=streaming)
    except (DatasetsError, OSError, ValueError, RuntimeError, TarError) as error:
        causes = f"{error} {error.__cause__ or ''}".strip()
        raise ValueError(f"{source.name} could not be loaded as a data set: {causes}") from error
    features = dataset.features or Features()
    check_columns(list(features), source)
    if isinstance(features[source.video_column], Video):
        dataset = dataset.cast_column(source.video_column, Video(decode=False))
    check_types(dataset.features.arrow_schema, source)
    return dataset.select_columns(source.columns)


def _load_saved(source: Source, streaming: bool) -> Dataset | IterableDataset:
    dataset = load_from_disk(source.name)
    if isinstance(dataset, DatasetDict):
        if source.split not in dataset:
            raise ValueError(f"it has no split {source.split}, but {', '.join(dataset)}.")
        dataset = dataset[source.split]
    num_files = max(len(dataset.cache_files), 1)
    return dataset.to_iterable_dataset(num_shards=min(num_files, len(dataset))) if streaming else dataset


def _loading_arguments(source: Source) -> dict[str, Any]:
    """What `load_dataset` has to know of a source.

    Raises:
        ValueError: If it is nothing that can be loaded.
    """
    name, path = source.name, Path(source.name)
    builder = BUILDERS.get(path.suffix)
    if builder and ("://" in name or path.is_file()):
        return {"path": builder, "data_files": name if "://" in name else glob.escape(name), "split": "train"}
    if path.is_dir():
        if tars := sorted(path.glob("*.tar")):
            return {"path": "webdataset", "data_files": [glob.escape(str(tar)) for tar in tars], "split": "train"}
        return {"path": name, "split": source.split}
    if source.is_on_hub:
        return {"path": name, "split": source.split, "revision": source.revision}
    raise ValueError(
        "metadata_path must be a .csv, .jsonl, .parquet or .tar file, a folder, or the name of a data set on the hub "
        f"(owner/name), got {name}" + ("." if path.exists() else ", which does not exist.")
    )


def _undecoded_tar_features(arguments: dict[str, Any]) -> Features | None:
    """For WebDataset tars, the columns that `datasets` finds in them, videos as plain bytes.

    As `Video`, it would drop the bytes of any clip whose name in the tar is also that of a file below the current
    folder, and go by that file.
    """
    if arguments["path"] in ("csv", "parquet", "json"):
        return None
    features = load_dataset(**arguments, streaming=True).features or {}
    if not {"__key__", "__url__"} <= features.keys():
        return None
    videos = {name: Value("binary") for name, feature in features.items() if isinstance(feature, Video)}
    return Features({**features, **videos})
