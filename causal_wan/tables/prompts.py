"""Prompts: those of a cell of a table, and those of a file of its own."""

import ast
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from causal_wan.tables.delimited import ROW, read_delimited
from causal_wan.tables.files import read_json_lines
from causal_wan.tables.prompt_schedules import COLUMN as SCHEDULE_COLUMN
from causal_wan.tables.prompt_schedules import Prompt, parse_prompt_schedule
from causal_wan.tables.sources import check_suffix
from causal_wan.tables.text_files import text_lines


COLUMN = "prompt"
IMAGE_COLUMN = "image"
DELIMITED = (".csv", ".tsv", ".tab")
JSON_LINES = (".jsonl", ".ndjson")
LINES = (".txt", "")  # a prompt a line


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """What a video is to show.

    Attributes:
        row: In the file, as people count: of a text or JSON lines the line, of others the row below the header; 1 is
            the first.
        prompt: Not blank, without white space around it; or a schedule of such.
        image: Path of its first frame, as the file has it; None is none.
        controls: Paths of the videos that it follows, by the names of the controls, likewise.
    """

    row: int = 1
    prompt: Prompt
    image: str | None = None
    controls: dict[str, str] = field(default_factory=dict)


def prompts_of(cell: str | Sequence[str | None] | None, *, has_json: bool = False) -> Iterator[str]:
    """The prompts of a cell that are not blank, without white space around them.

    Args:
        cell: A text, or a list of them.
        has_json: Whether a text that is a list of texts stands for these: as JSON, or as pandas writes lists.
    """
    if has_json and isinstance(cell, str) and cell.lstrip().startswith("["):
        parsed = None  # a prompt that begins with a bracket
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                parsed = parse(cell.strip())
                break
        if isinstance(parsed, list) and all(isinstance(text, str) for text in parsed):
            cell = parsed
    for text in [cell] if isinstance(cell, str) else cell or ():
        if text and text.strip():
            yield text.strip()


def prompts_or_schedule(texts: Sequence[str], cell: Any) -> tuple[tuple[Prompt, ...], str | None]:
    """What a row shows, and what is wrong with its schedule: the schedule where its cell is filled, else the prompts.

    Args:
        texts: The prompts.
        cell: Of the column of schedules, see `parse_prompt_schedule`.
    """
    try:
        schedule = parse_prompt_schedule(cell)
    except ValueError as error:
        return tuple(texts), str(error).removesuffix(".")
    return (tuple(texts) if schedule is None else (schedule,)), None


def read_prompts_file(path: str, name: str = "prompts_file") -> list[Prompt]:
    """The prompts of a file; see `read_prompt_rows`."""
    return [row.prompt for row in read_prompt_rows(path, name)]


def read_prompt_rows(path: str, name: str = "prompts_file", *, controls: Sequence[str] = ()) -> list[PromptRow]:
    """The prompts of a file, and what the videos begin with and follow; blank prompts are left out.

    Args:
        path: Of a CSV, TSV or JSON lines file with a column `prompt`, or `prompt_schedule`, or both, and perhaps one
            `image`, by the rules of tables; or of a text with a prompt a line.
        name: Of the setting, for the error.
        controls: Names of the student's controls: of such columns, too, if they are there.

    Raises:
        ValueError: If the file is not there or of another kind, has no column of prompts, or has no prompt or a bad
            schedule.
    """
    file = Path(path)
    if not file.is_file():
        there = "is none" if file.exists() else "does not exist"
        raise ValueError(f"{name} must be a text or CSV file, but {path} {there}.")
    check_suffix(file, (*LINES, *DELIMITED, *JSON_LINES), name)
    check, kind, optional = partial(_check_names, path, controls), file.suffix.lower(), [IMAGE_COLUMN, *controls]
    if kind in DELIMITED:
        cells = read_delimited(file, [COLUMN], check, optional=[*optional, SCHEDULE_COLUMN]).to_pylist()
    elif kind in JSON_LINES:
        columns = {"texts": optional, "lists": [COLUMN], "others": [SCHEDULE_COLUMN]}
        cells = read_json_lines(file, check=check, **columns).to_pylist()
    else:
        cells = [{COLUMN: line, ROW: number} for number, line in text_lines(file)]
    rows = [
        PromptRow(
            row=cell[ROW],
            prompt=prompt,
            image=(cell.get(IMAGE_COLUMN) or "").strip() or None,
            controls={name: cell[name].strip() for name in controls if (cell.get(name) or "").strip()},
        )
        for cell in cells
        for prompt in _prompts_of_row(cell, f"{path}, row {cell[ROW]}", has_json=kind in DELIMITED)
    ]
    if not rows:
        raise ValueError(f"at least one prompt must not be empty; {path} has none.")
    return rows


def count_blank(rows: Sequence[PromptRow]) -> int:
    """How many rows of a file are blank before the last of some of its rows."""
    return rows[-1].row - len({row.row for row in rows})


def _prompts_of_row(cell: dict[str, Any], place: str, *, has_json: bool) -> tuple[Prompt, ...]:
    texts = tuple(prompts_of(cell.get(COLUMN), has_json=has_json))
    prompts, error = prompts_or_schedule(texts, cell.get(SCHEDULE_COLUMN))
    if error is not None:
        raise ValueError(f"{place}: {error}.")
    return prompts


def _check_names(path: str, controls: Sequence[str], names: Sequence[str]) -> None:
    optional = (IMAGE_COLUMN, SCHEDULE_COLUMN, *controls)
    for name, least in ((COLUMN, SCHEDULE_COLUMN not in names), *((name, 0) for name in optional)):
        if not least <= names.count(name) <= 1:
            count = f"{names.count(name)} of them" if name in names else ", ".join(names)
            raise ValueError(f"{path} must have a column named {name}, got {count}.")
