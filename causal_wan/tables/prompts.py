"""Prompts in a file: a text with one a line, or a CSV with a `prompt` column."""

import csv
from pathlib import Path


def read_prompts_file(path: str) -> list[str]:
    """The prompts of a file, without white space around them; blank ones are left out.

    Raises:
        ValueError: If the file is not there, has no `prompt` column, or has no prompt.
    """
    if not Path(path).is_file():
        raise ValueError(f"prompts_file must be a text or CSV file, but {path} does not exist.")
    lines = _read_csv(path) if path.endswith(".csv") else Path(path).read_text().splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("at least one prompt must not be empty; got none.")
    return prompts


def _read_csv(path: str) -> list[str]:
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "prompt" not in rows[0]:
        raise ValueError(f"{path} must have a column named prompt, got {', '.join(rows[0])}.")
    return [row["prompt"] or "" for row in rows]
