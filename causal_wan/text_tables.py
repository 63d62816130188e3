"""Files of text -> rows of a table: CSV, JSON lines, and folders of videos with texts beside them.

All values are text as it stands: 123, None and NA are prompts.
"""

import csv
import glob
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError

from causal_wan.sources import PlainRow, Source, as_prompts, check_columns


VIDEO_SUFFIXES = {
    *(".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
}
TEXT_SUFFIX = ".txt"
MAX_LISTED = 20
CHUNK_ROWS = 10_000


# --- CSV -------------------------------------------------------------------------------------------------------------


def csv_rows(path: Path, source: Source) -> Iterator[PlainRow]:
    """The rows of a CSV; a cell that is a JSON list of texts is several prompts.

    Raises:
        ValueError: If the file is empty, no CSV, or lacks a column.
    """
    table = _load_csv(path, source)
    for batch in table.with_format("arrow").iter(CHUNK_ROWS):
        captions = [batch[column].to_pylist() for column in source.caption_columns]
        for video, *cells in zip(batch[source.video_column].to_pylist(), *captions, strict=True):
            yield video, False, [prompt for cell in cells for prompt in _parse_cell(cell or "")]


def _parse_cell(cell: str) -> list[str]:
    if cell.lstrip().startswith("["):
        try:
            values = json.loads(cell)
        except ValueError:
            return [cell]
        if all(isinstance(value, str) for value in values):
            return values
    return [cell]


def _load_csv(path: Path, source: Source) -> Dataset:
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
    check_columns(header, source)
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
        return table.select_columns(source.columns)


# --- JSON lines ------------------------------------------------------------------------------------------------------


def json_rows(path: Path, source: Source) -> Iterator[PlainRow]:
    """The rows of a file with one JSON object a line, or of one JSON list of objects.

    Raises:
        ValueError: If it is none, lacks a column, or holds other than text in one.
    """
    seen: dict[str, None] = {}  # in the order of the file
    for number, entry in enumerate(_json_objects(path), 1):
        seen.update(dict.fromkeys(entry))
        for column in source.columns:
            _check_json(entry.get(column), f"{path}, row {number}, {column}", column != source.video_column)
        prompts = [prompt for column in source.caption_columns for prompt in as_prompts(entry.get(column))]
        yield entry.get(source.video_column), False, prompts
    if seen:  # a row may leave out what it has not, but not all of them
        check_columns(list(seen), source)


def _json_objects(path: Path) -> Iterator[dict[str, Any]]:
    line = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            is_list = file.read(1024).lstrip().startswith("[")
            file.seek(0)
            for text in [file.read()] if is_list else file:
                line += 1
                value = json.loads(text) if text.strip() else []
                for entry in value if isinstance(value, list) else [value]:
                    if not isinstance(entry, dict):
                        raise ValueError(f"got {_describe(entry)}")
                    yield entry
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8 ({error}).") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must have one JSON object a line, but line {line}: {error}.") from None


def _check_json(value: Any, where: str, may_be_list: bool) -> None:
    texts = value if may_be_list and isinstance(value, list) else [value]
    for text in texts:
        if isinstance(text, str) and not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{where} must be text, but has half a character in it: {text!a}.")
        if not (text is None or isinstance(text, str)):
            allowed = "text or a list of texts" if may_be_list else "the path of a file"
            raise ValueError(f"{where} must be {allowed}, got {_describe(text)}; put quotes around it.")


def _describe(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value", type(None): "nothing"}
    return f"{kinds.get(type(value), 'a number')} ({json.dumps(value)[:40]})"


# --- folders ---------------------------------------------------------------------------------------------------------


def pair_rows(folder: Path) -> Iterator[PlainRow]:
    """Videos below a folder, each with the text of the same name beside it, in the order of their names.

    Raises:
        ValueError: If there are no videos, or if videos or texts have no partner (all are found, the first listed).
    """
    if not folder.is_dir():
        raise ValueError(f"metadata_path must be a file, a folder or a data set, but {folder} does not exist.")
    videos: dict[Path, list[Path]] = {}
    texts: dict[Path, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                videos.setdefault(path.with_suffix(""), []).append(path)
            elif path.suffix.lower() == TEXT_SUFFIX:
                texts[path.with_suffix("")] = path
    if not videos:
        raise ValueError(
            f"{folder} must hold videos with texts beside them (name.mp4 and name.txt), tars or a saved data set, but "
            "has no videos."
        )
    _check_pairs(folder, videos, texts)
    for stem, (video,) in sorted(videos.items()):
        yield str(video.relative_to(folder)), False, [_read_text(texts[stem], folder)]


def _check_pairs(folder: Path, videos: dict[Path, list[Path]], texts: dict[Path, Path]) -> None:
    problems = [f"{min(videos[stem])} has no text beside it" for stem in videos.keys() - texts.keys()]
    problems += [f"{texts[stem]} has no video beside it" for stem in texts.keys() - videos.keys()]
    problems += [f"{' and '.join(map(str, sorted(paths)))} share a text" for paths in videos.values() if paths[1:]]
    if problems:
        listed = sorted(problems)[:MAX_LISTED]
        more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        headline = f"each video in {folder} must have a text of its own, name.mp4 and name.txt:"
        raise ValueError("\n  ".join([headline, *listed, *more]))


def _read_text(path: Path, folder: Path) -> str:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)) or not real.is_file():
        raise ValueError(f"{path} must be a file below {folder}, symlinks resolved.")
    try:
        return real.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8 ({error}).") from None
