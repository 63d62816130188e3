"""Which tables of clips there are, and how each is read: its columns, its folder, its share of the samples."""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import read_yaml
from causal_wan.config.ranges import PositiveFloat, checked_dataclass
from causal_wan.tables.delimited import SUFFIXES
from causal_wan.tables.prompt_schedules import schedule_column
from causal_wan.video.paths import resolve_path, visible_files


TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
FILE_SUFFIXES = {*SUFFIXES, ".jsonl", ".ndjson", ".parquet"}


@checked_dataclass
class Source:
    """A table, and how to read it."""

    metadata_path: LocalPath
    dataset_base_path: LocalPath | None = None
    video_column: str = "video"
    caption_column: tuple[str, ...] = ("prompt",)
    control_column: tuple[str, ...] = ()
    weight: PositiveFloat | None = None
    split: str = "train"
    revision: str | None = None
    follow_links: bool = False

    @property
    def video_columns(self) -> tuple[str, ...]:
        """Of the videos: the clip, and those that control it."""
        return (self.video_column, *self.control_column)

    @property
    def columns(self) -> list[str]:
        """All that are read."""
        return list(dict.fromkeys([*self.video_columns, *self.caption_column]))


def check_suffix(path: Path, suffixes: Iterable[str], what: str = "a table") -> None:
    """Checks that a file is of a kind that is read, by its name.

    Args:
        path: Of the file.
        suffixes: Of these kinds, in lower case, with the dot; an empty one stands for names without.
        what: The file is to be.

    Raises:
        ValueError: If it is not.
    """
    if path.suffix.lower() not in suffixes:
        listed = ", ".join(filter(None, suffixes))
        raise ValueError(f"{what} must end in {listed}, got {path.name}; rename or convert it.")


def check_columns(names: Iterable[str], source: Source) -> None:
    """Checks that a table has the columns that its source names; one of schedules stands for those of prompts.

    Raises:
        ValueError: If not, or if one is there twice; names those there are.
    """
    names, wanted = list(names), source.columns
    schedules = schedule_column(names)
    for name in [*wanted, *([] if schedules is None else [schedules])]:
        if names.count(name) > 1:
            raise ValueError(
                f"{source.metadata_path} must have one column {name}, but has {names.count(name)} of that name; "
                "rename or remove the others."
            )
    needed = wanted if schedules is None else source.video_columns
    if not set(needed) <= set(names):
        flags = "--video_column and --caption_column"
        if source.control_column:
            flags = "--video_column, --caption_column and --control_column"
        raise ValueError(
            f"{source.metadata_path} must have the columns {' and '.join(wanted)}, but has "
            f"{', '.join(names) or 'none'}; name yours with {flags}."
        )


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts, or all missing."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def is_list(kind: pa.DataType) -> bool:
    """Whether values of a type are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def caption_columns(names: Collection[str], source: Source) -> list[str]:
    """The columns of prompts that a table has."""
    names = set(names) - {schedule_column(names)}
    return [name for name in source.caption_column if name in names]


def read_columns(names: Iterable[str], source: Source) -> list[str]:
    """The columns that are read of a table, of those that it has: videos, prompts, and schedules of prompts."""
    names = list(names)
    schedules = [name for name in [schedule_column(names)] if name is not None]
    return list(dict.fromkeys([*source.video_columns, *caption_columns(names, source), *schedules]))


def check_captions(schema: pa.Schema, source: Source) -> None:
    """Checks that the columns of prompts hold texts, or lists of them.

    Raises:
        ValueError: If not; names the column.
    """
    for name in caption_columns(schema.names, source):
        kind = schema.field(name).type
        if not is_text(kind) and not (is_list(kind) and is_text(kind.value_type)):
            raise ValueError(
                f"{source.metadata_path} must hold text or lists of text in the column {name}, but holds {kind}; "
                "convert it, or name another with --caption_column."
            )


def is_tar(path: str | Path) -> bool:
    """Whether a file is a tar, or one that is compressed, by its name."""
    return str(path).lower().endswith(TAR_SUFFIXES)


def find_files(source: Source, suffixes: tuple[str, ...]) -> list[str]:
    """The files in the folder of a source, at any depth, whose names end in a suffix; in the order of their names.

    Raises:
        ValueError: If one is a link, or in a linked folder, that leads out of the folder and must not.
    """
    folder = Path(source.metadata_path)
    names = visible_files(folder, follow_links=source.follow_links)
    found = sorted(name for name in names if name.lower().endswith(suffixes))
    for name in found:
        try:
            resolve_path(name, folder, follow_links=source.follow_links)
        except ValueError as error:
            raise ValueError(f"{folder / name} must be a file below {folder}: {error}.") from None
    return [os.path.join(folder, name) for name in found]


def is_hub_name(name: str) -> bool:
    """Whether a name can be that of a data set on the hub, and none of a file."""
    is_file = Path(name).suffix.lower() in FILE_SUFFIXES or is_tar(name)
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not is_file


# --- several tables --------------------------------------------------------------------------------------------------


def read_sources(path: str) -> list[Source]:
    """The tables that a YAML file lists; paths in it are relative to the file.

    Raises:
        ValueError: If it is not there or no list of mappings, if a key or value is none of `Source`, or if some tables
            have weights and others have none.
    """
    loaded = read_yaml(path, "dataset_config")
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
    if key in ("caption_column", "control_column"):
        columns = value if isinstance(value, list) else [value]
        if not columns or not all(isinstance(column, str) for column in columns):
            raise ValueError(f"{where}: {key} must be a name or a list of names, got {value!r}.")
        return tuple(columns)
    if key == "follow_links":
        if not isinstance(value, bool):
            raise ValueError(f"{where}: follow_links must be true or false, got {value!r}.")
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be text, got {value!r}; put it in quotes.")
    return value
