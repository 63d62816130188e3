"""CSV and its kin, as spreadsheets and pandas write them -> Arrow tables of texts.

The separator is a comma, semicolon, tab or bar: that by which the header has the columns that are wanted. Other
columns may be empty, without a name, or there twice: pandas' index, or what Excel leaves behind a last comma.
"""

import csv
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from causal_wan.tables.text_files import check_text, open_text, undecodable


SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
SEPARATORS = ",;\t|"
ROW = "__row__"  # the column with the number of the row in the file; see `read_delimited`
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')  # Excel's own first line
CHUNK_ROWS = 1 << 16
MAX_FIELD = 1 << 24  # characters; else a quote that never closes takes all memory
QUOTING = "write quotes within a prompt twice, and put quotes around prompts with commas or line breaks"


@dataclass(frozen=True)
class Form:
    """How a file is written.

    Args:
        separator: Of fields.
        has_separator_line: Whether its first line says so.
        spaces_before: Whether quotes follow on spaces, which are then no part of a field,
        spaces_after: and whether spaces follow on quotes.
    """

    separator: str
    has_separator_line: bool = False
    spaces_before: bool = False
    spaces_after: bool = False


class _SpacedQuoteError(Exception):
    """Names what `Form` has to say for the file to be read."""


def read_delimited(
    path: Path, wanted: Sequence[str], check: Callable[[list[str]], None], *, optional: Sequence[str] = ()
) -> pa.Table:
    """The wanted columns, all values as text: a prompt may be 123, None or a date.

    Args:
        path: Of the file.
        wanted: Names of the columns.
        check: Is given the names of all columns, and raises a ValueError if wanted ones are not there that must be.
        optional: Names of columns that are read as well where they are there.

    Returns:
        These columns, and `ROW`: 1 is the first below the header. Rows with nothing in them are counted, as people
        and spreadsheets count them, and left out.

    Raises:
        ValueError: If the file is empty, no such table, or lacks a column; names row and line.
    """
    csv.field_size_limit(MAX_FIELD)
    try:
        form = _find_form(path, wanted)
        while True:
            try:
                return _read(path, form, wanted, optional, check)
            except _SpacedQuoteError as error:
                form = replace(form, **{str(error): True})
    except UnicodeDecodeError as error:
        raise undecodable(path, error) from None


def _find_form(path: Path, wanted: Sequence[str]) -> Form:
    with open_text(path, newline="") as file:
        if found := SEPARATOR_LINE.fullmatch(file.readline(MAX_FIELD)):
            return Form(found[1], has_separator_line=True)
    return Form(min(SEPARATORS, key=lambda separator: _misfit(_header(path, separator), wanted)))


def _misfit(header: list[str] | None, wanted: Sequence[str]) -> tuple[int, float]:
    if header is None:
        return len(set(wanted)), -1.5  # its quotes are said to be wrong, unless another separator finds columns
    return len(set(wanted) - {name.strip() for name in header}), -len(header)


def _header(path: Path, separator: str) -> list[str] | None:
    try:
        form = Form(separator, spaces_before=True, spaces_after=True)  # names are stripped anyway
        return next(_records(path, form), (0, 0, []))[2]
    except ValueError:
        return None


def _read(
    path: Path, form: Form, wanted: Sequence[str], optional: Sequence[str], check: Callable[[list[str]], None]
) -> pa.Table:
    records = _records(path, form)
    header = [name.strip() for name in next(records, (0, 0, []))[2]]
    if not header:
        raise ValueError(f"{path} must have a header and at least one row, but is empty.")
    check_text("".join(header), path, "its header")
    check(header)
    wanted = [name for name in dict.fromkeys([*wanted, *optional]) if name in header]
    places = [header.index(name) for name in wanted]
    schema, chunks = pa.schema({**dict.fromkeys(wanted, pa.string()), ROW: pa.int64()}), []
    rows = ((*_pick(record, len(header), places, path), record[0]) for record in records)
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        columns = dict(zip(schema.names, zip(*chunk, strict=True), strict=True))
        chunks.append(pa.table(columns, schema))
    if not chunks:
        raise ValueError(f"{path} must have at least one row below its header, but has none.")
    return pa.concat_tables(chunks)


def _pick(record: tuple[int, int, list[str]], num_columns: int, columns: Sequence[int], path: Path) -> list[str]:
    number, line, fields = record
    place = f"row {number} (line {line})"
    if any(field.strip() for field in fields[num_columns:]):
        raise ValueError(f"{path} must have {num_columns} fields a row, but {place} has {len(fields)}; {QUOTING}.")
    check_text("".join(fields), path, place)
    return [fields[column] if column < len(fields) else "" for column in columns]


def _records(path: Path, form: Form) -> Iterator[tuple[int, int, list[str]]]:
    """(Number, first line, fields) of all records that have something in them; the header is number 0."""
    with open_text(path, newline="") as file:
        if form.has_separator_line:
            file.readline()
        before = int(form.has_separator_line)
        lines = _without_spaces(file, form) if form.spaces_after else file
        reader = csv.reader(lines, delimiter=form.separator, strict=True, skipinitialspace=form.spaces_before)
        number, line = 0, before + 1
        try:
            for fields in reader:
                if any(field.strip() for field in fields):
                    if not form.spaces_before and any(map(_begins_late, fields)):
                        raise _SpacedQuoteError("spaces_before")
                    yield number, line, fields
                    number += 1
                elif number:  # above the header they are nothing
                    number += 1
                line = before + reader.line_num + 1
        except csv.Error as error:
            if "expected after" in str(error) and not form.spaces_after:
                raise _SpacedQuoteError("spaces_after") from None
            raise ValueError(_quote_error(path, number, line, str(error))) from None


def _begins_late(field: str) -> bool:
    """Whether a field is a quote after spaces."""
    return field[:1] == " " and field.lstrip(" ")[:1] == '"'


def _without_spaces(lines: Iterable[str], form: Form) -> Iterator[str]:
    """The lines without the spaces between a quote that closes a field and the separator, or the end of the line."""
    separator, is_open = re.escape(form.separator), False
    opening = re.compile(' *"' if form.spaces_before else '"')
    # Two quotes are one of the text.
    closing = re.compile(rf'([^"]*(?:""[^"]*)*"(?!"))(?: +(?=[{separator}\r\n]|\Z))?')
    to_next = re.compile(rf"[^{separator}]*{separator}?")
    for line in lines:
        kept, place = [], 0
        while place < len(line):
            if not is_open and (opened := opening.match(line, place)):
                kept.append(opened[0])
                place, is_open = opened.end(), True
            if is_open:
                closed = closing.match(line, place)
                if closed is None:  # the field goes on in the next line
                    kept.append(line[place:])
                    break
                kept.append(closed[1])
                place, is_open = closed.end(), False
            rest = to_next.match(line, place)
            kept.append(rest[0])
            place = rest.end()
        yield "".join(kept)


def _quote_error(path: Path, number: int, line: int, cause: str) -> str:
    row = f"row {number} (line {line})" if number else f"the header (line {line})"
    if "field limit" in cause:
        return (
            f"{path} must have fields of at most {MAX_FIELD} characters, but {row} has a longer one; is a quote open?"
        )
    what = "opens a quote that never closes" if "end of data" in cause else f"has a quote out of place ({cause})"
    separators = "" if number else "; fields are separated by commas, semicolons, tabs or bars"
    return f"{path} must close its quotes at the end of a field, but {row} {what}; {QUOTING}{separators}."
