"""CSV, JSONL and Parquet files, and folders of videos and texts -> Arrow tables of paths and prompts.

Values stay text, whatever they look like: a prompt may be 123, None or a date.
"""

import itertools
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from causal_wan.tables.delimited import ROW, read_delimited
from causal_wan.tables.prompt_schedules import COLUMN as SCHEDULES
from causal_wan.tables.sources import Source, check_captions, check_columns, is_text, read_columns
from causal_wan.tables.text_files import MAX_TEXT_BYTES, decode_text, text_lines
from causal_wan.video.opening import OTHER_MEDIA_SUFFIXES, VIDEO_SUFFIXES
from causal_wan.video.paths import resolve_path, visible_files


logger = logging.getLogger(__name__)

CHUNK_ROWS = 1024
MAX_SHOWN = 5


# --- files -----------------------------------------------------------------------------------------------------------


def read_csv(path: Path, source: Source) -> pa.Table:
    """All values as text.

    Raises:
        ValueError: If the file is empty, no CSV, or lacks a column; names row and line.
    """
    check = partial(check_columns, source=source)
    return read_delimited(path, source.columns, check, optional=[SCHEDULES])


def read_jsonl(path: Path, source: Source) -> pa.Table:
    """The columns of a JSON lines file that a source names."""
    check = partial(check_columns, source=source)
    texts, lists = source.video_columns, source.caption_column
    return read_json_lines(path, texts=texts, lists=lists, others=[SCHEDULES], check=check)


def read_json_lines(
    path: Path,
    *,
    texts: Sequence[str],
    lists: Sequence[str],
    check: Callable[[list[str]], None],
    others: Sequence[str] = (),
) -> pa.Table:
    """One object a line; Arrow's own reader would take texts that look like times for times.

    Args:
        path: Of the file.
        texts: Keys of texts.
        lists: Keys of texts or lists of them, which become lists.
        check: Is given all keys, and raises a ValueError if others are wanted.
        others: Keys of anything; texts stay as they are, the rest becomes JSON.

    Returns:
        What the keys have, and `ROW`, the number of the line.

    Raises:
        ValueError: If a line is no object, or holds something else; names it.
    """
    names, chunks = {}, []
    as_text = dict.fromkeys([*texts, *others], pa.string())
    wanted = as_text | dict.fromkeys(lists, pa.list_(pa.string()))
    schema = pa.schema({**wanted, ROW: pa.int64()})
    lines = text_lines(path)
    while batch := list(itertools.islice(lines, CHUNK_ROWS)):
        rows = []
        for number, line in batch:
            values = _parse_line(line, number, path)
            for name in set(others) & values.keys():
                if not isinstance(values[name], str | None):
                    values[name] = json.dumps(values[name], ensure_ascii=False)
            names.update(dict.fromkeys(values))
            picked = {name: _pick_value(values, name, number, path, is_list=name in lists) for name in wanted}
            rows.append({**picked, ROW: number})
        chunks.append(pa.Table.from_pylist(rows, schema))
    if chunks:
        check(list(names))
    return pa.concat_tables(chunks).combine_chunks() if chunks else schema.empty_table()


class _RepeatedKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return values


def _parse_line(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=_unique_keys)
    except _RepeatedKeyError as error:
        raise ValueError(
            f"{path} must have each key once in an object, but line {number} has {error} twice."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must have a JSON object in each line, but line {number} is none ({error})."
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must have a JSON object in each line, but line {number} is of type {type(values).__name__}."
        )
    return values


def _pick_value(
    values: dict[str, Any], name: str, number: int, path: Path, *, is_list: bool
) -> str | list[str | None] | None:
    value = values.get(name)
    texts = value if is_list and isinstance(value, list) else [value]
    wrong = [text for text in texts if text is not None and not isinstance(text, str)]
    if wrong:
        wanted = "text or a list of texts" if is_list else "text"
        raise ValueError(
            f"{path}, line {number}: {name} must be {wanted}, but holds {wrong[0]!r:.100}; put numbers in quotes."
        )
    try:
        "".join(text or "" for text in texts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}, line {number}: {name} is no Unicode text ({error}).") from None
    return texts if is_list else value


def read_parquet(path: Path, source: Source) -> pa.Table:
    """The columns of a Parquet file that a source names.

    Raises:
        ValueError: If the file cannot be read, or a column is missing or holds something else.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_columns(schema.names, source)
            for name in source.video_columns:
                if not is_text(kind := schema.field(name).type):
                    raise ValueError(
                        f"{path} must hold paths as text in the column {name}, but holds {kind}; with videos in it, "
                        "load it with `datasets`, save that with save_to_disk, and name its folder."
                    )
            check_captions(schema, source)
            return file.read(columns=read_columns(schema.names, source)).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read ({error}).") from None


# --- folders of videos and texts -------------------------------------------------------------------------------------


def read_pairs(folder: Path, *, follow_links: bool = False) -> pa.Table:
    """`name.mp4` with `name.txt`, at any depth, in the order of their names; columns video and prompt.

    A GIF beside a video of its name is a preview. It is left out, and so are pictures and sounds; it is said of how
    many.

    Args:
        folder: Of both.
        follow_links: Whether links in it may lead out of it.

    Raises:
        ValueError: If there are none, or one of two is missing; names them. If a text or folder is a link that leads
            out of the folder, and must not.
    """
    videos, texts, others = _sort_files(folder, follow_links=follow_links)
    if others:
        logger.warning("%s: left out %s", folder, _count_suffixes(others))
    partner = {name: texts[_stem(name)][0] for name in videos if _stem(name) in texts}
    alone = [f"{name} has no {Path(name).with_suffix('.txt')}" for name in videos if name not in partner]
    unread = {_stem(name): name for name in others}
    for name in sorted({name for names in texts.values() for name in names} - set(partner.values())):
        there = f", only {unread[_stem(name)]}, which is not read" if _stem(name) in unread else ""
        alone.append(f"{name} has no video{there}")
    if alone:
        more = f", and {len(alone) - MAX_SHOWN} more" if len(alone) > MAX_SHOWN else ""
        raise ValueError(
            f"{folder} must have a text with the prompt beside each video, such as a.mp4 and a.txt: "
            f"{', '.join(alone[:MAX_SHOWN])}{more}."
        )
    if not videos:
        there = f", only {_count_suffixes(others)}" if others else ""
        raise ValueError(
            f"{folder} must hold videos with texts beside them, such as a.mp4 and a.txt, or a `datasets` data set, "
            f"but has no video{there}; name a table in it by its file."
        )
    prompts = [_read_text(text, folder, follow_links=follow_links) for text in partner.values()]
    return pa.table({"video": pa.array(videos, pa.string()), "prompt": pa.array(prompts, pa.string())})


def _sort_files(folder: Path, *, follow_links: bool) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Videos, texts by what they have in common with their video, and media that are left out, by their names."""
    kinds: dict[str, list[str]] = {"video": [], "gif": [], "text": [], "other": []}
    for name in sorted(visible_files(folder, follow_links=follow_links)):
        suffix = Path(name).suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            kinds["gif" if suffix == ".gif" else "video"].append(name)
        elif suffix == ".txt" or suffix in OTHER_MEDIA_SUFFIXES:
            kinds["text" if suffix == ".txt" else "other"].append(name)
    stems = {_stem(name) for name in kinds["video"]}
    previews = [name for name in kinds["gif"] if _stem(name) in stems]
    videos = sorted({*kinds["video"], *kinds["gif"]} - set(previews))
    texts: dict[str, list[str]] = {}
    for name in kinds["text"]:
        texts.setdefault(_stem(name), []).append(name)
    return videos, texts, sorted([*kinds["other"], *previews])


def _count_suffixes(names: Sequence[str]) -> str:
    """4 file(s) that are not read as videos: 3 .jpg, 1 .mxf."""
    counts = Counter(Path(name).suffix.lower() for name in names).most_common()
    listed = ", ".join(f"{count} {suffix}" for suffix, count in counts)
    return f"{len(names)} file(s) that are not read as videos: {listed}"


def _stem(name: str) -> str:
    """What a video and its text have in common; accents may be composed in one and decomposed in the other."""
    return unicodedata.normalize("NFC", str(Path(name).with_suffix("")))


def _read_text(name: str, folder: Path, *, follow_links: bool) -> str:
    path = folder / name
    try:
        with resolve_path(name, folder, follow_links=follow_links).open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except ValueError as error:
        if path.is_file() and not path.stat().st_size:
            return ""  # found later, as a row without a prompt
        raise ValueError(f"{path} must be a text below {folder}: {error}.") from None
    return decode_text(content, path)
