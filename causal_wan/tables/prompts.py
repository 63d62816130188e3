"""Prompts: those of a cell of a table, and those of a file of its own."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from causal_wan.tables.delimited import read_delimited
from causal_wan.tables.files import read_json_lines
from causal_wan.tables.text_files import text_lines


COLUMN = "prompt"
IMAGE_COLUMN = "image"


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """What a video is to show.

    Attributes:
        prompt: Not blank, without white space around it.
        image: Path of its first frame, as the file has it; None is none.
        controls: Paths of the videos that it follows, by the names of the controls, likewise.
    """

    prompt: str
    image: str | None = None
    controls: dict[str, str] = field(default_factory=dict)


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
    """The prompts of a file; see `read_prompt_rows`."""
    return [row.prompt for row in read_prompt_rows(path)]


def read_prompt_rows(path: str, controls: Sequence[str] = ()) -> list[PromptRow]:
    """The prompts of a file, and what the videos begin with and follow; blank prompts are left out.

    Args:
        path: Of a CSV, TSV or JSON lines file with a column `prompt`, and perhaps one `image`, by the rules of tables;
            any other file is a text with a prompt a line.
        controls: Names of the student's controls: of such columns, too, if they are there.

    Raises:
        ValueError: If the file is not there or no text, has no `prompt` column, or has no prompt.
    """
    file = Path(path)
    if not file.is_file():
        there = "is none" if file.exists() else "does not exist"
        raise ValueError(f"prompts_file must be a text or CSV file, but {path} {there}.")
    check, kind, optional = partial(_check_names, path, controls), file.suffix.lower(), [IMAGE_COLUMN, *controls]
    if kind in (".csv", ".tsv", ".tab"):
        cells = read_delimited(file, [COLUMN], check, optional=optional).to_pylist()
    elif kind in (".jsonl", ".ndjson"):
        cells = read_json_lines(file, texts=optional, lists=[COLUMN], check=check).to_pylist()
    else:
        cells = [{COLUMN: line} for _, line in text_lines(file)]
    rows = [
        PromptRow(
            prompt=prompt,
            image=(cell.get(IMAGE_COLUMN) or "").strip() or None,
            controls={name: cell[name].strip() for name in controls if (cell.get(name) or "").strip()},
        )
        for cell in cells
        for prompt in prompts_of(cell[COLUMN], has_json=kind == ".csv")
    ]
    if not rows:
        raise ValueError(f"at least one prompt must not be empty; {path} has none.")
    return rows


def _check_names(path: str, controls: Sequence[str], names: Sequence[str]) -> None:
    for name, least in ((COLUMN, 1), *((name, 0) for name in (IMAGE_COLUMN, *controls))):
        if not least <= names.count(name) <= 1:
            count = f"{names.count(name)} of them" if name in names else ", ".join(names)
            raise ValueError(f"{path} must have a column named {name}, got {count}.")
