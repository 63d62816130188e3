"""Prompts: those of a cell of a table, and those of a file of its own."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from causal_wan.tables.delimited import read_delimited
from causal_wan.tables.files import read_json_lines
from causal_wan.tables.text_files import text_lines


COLUMN = "prompt"


def prompts_of(cell: str | Sequence[str | None] | None, *, has_json: bool = False) -> Iterator[str]:
    """The prompts of a cell that are not blank, without white space around them.

    Args:
        cell: A text, or a list of them.
        has_json: Whether a text that is a JSON list of texts stands for these.
    """
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


def read_prompts_file(path: str) -> list[str]:
    """The prompts of a file, without white space around them; blank ones are left out.

    Args:
        path: Of a CSV, TSV or JSON lines file with a column `prompt`, by the rules of tables; any other file is a text
            with a prompt a line.

    Raises:
        ValueError: If the file is not there or no text, has no `prompt` column, or has no prompt.
    """
    file = Path(path)
    if not file.is_file():
        there = "is none" if file.exists() else "does not exist"
        raise ValueError(f"prompts_file must be a text or CSV file, but {path} {there}.")
    check, kind = partial(_check_names, path), file.suffix.lower()
    if kind in (".csv", ".tsv", ".tab"):
        cells = read_delimited(file, [COLUMN], check)[COLUMN].to_pylist()
    elif kind in (".jsonl", ".ndjson"):
        cells = read_json_lines(file, texts=[], lists=[COLUMN], check=check)[COLUMN].to_pylist()
    else:
        cells = [line for _, line in text_lines(file)]
    prompts = [prompt for cell in cells for prompt in prompts_of(cell, has_json=kind == ".csv")]
    if not prompts:
        raise ValueError(f"at least one prompt must not be empty; {path} has none.")
    return prompts


def _check_names(path: str, names: Sequence[str]) -> None:
    if names.count(COLUMN) != 1:
        count = f"{names.count(COLUMN)} of them" if COLUMN in names else ", ".join(names)
        raise ValueError(f"{path} must have a column named {COLUMN}, got {count}.")
