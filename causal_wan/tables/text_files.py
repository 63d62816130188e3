"""Text files as people have them: with byte order marks, in UTF-16, with line ends of any kind."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


# UTF-32 first: its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ARCHIVES = {b"PK\3\4": "a zip archive or a workbook", b"\x1f\x8b": "compressed", b"PAR1": "Parquet"}
MAX_SHOWN = 60
MAX_TEXT_BYTES = 1 << 20  # of a text that is one prompt


def encoding_of(start: bytes) -> str:
    """The encoding that a text's first bytes name, or UTF-8."""
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A text file, to be read and closed; bytes that are no UTF-8 are kept, for `check_text` to find their place.

    Args:
        path: Of a UTF-8 file, or one with a byte order mark.
        newline: As in `open`; of None, lines end with \\n, \\r or \\r\\n, and nothing else ends them.

    Raises:
        ValueError: If it is an archive, as Excel's workbooks are.
    """
    with path.open("rb") as file:
        start = file.read(4)
    for mark, kind in ARCHIVES.items():
        if start.startswith(mark):
            raise ValueError(f"{path} must be text, but is {kind}; unpack it, or export it as CSV UTF-8.")
    encoding = encoding_of(start)
    return path.open(encoding=encoding, errors=_errors(encoding), newline=newline)


def check_is_utf_8(path: Path) -> None:
    """Checks that a text has no mark of another encoding, for readers that know UTF-8 alone.

    Raises:
        ValueError: If it has.
    """
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    if not encoding.startswith("utf-8"):
        raise ValueError(
            f"{path} must be text in UTF-8 to be streamed, but is in {encoding.upper()}; save it as UTF-8."
        )


def _errors(encoding: str) -> str:
    return "surrogateescape" if encoding.startswith("utf-8") else "strict"


def check_text(text: str, path: str | Path, place: str = "it") -> None:
    """Checks what came from `open_text`.

    Raises:
        ValueError: If it holds bytes that were no UTF-8, or NUL characters.
    """
    if "\0" in text:
        raise ValueError(
            f"{path} must be text in UTF-8, but {place} has NUL characters, as UTF-16 without a mark has; save it as "
            "UTF-8."
        )
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        guess = text.encode(errors="surrogateescape").decode("cp1252", errors="replace")
        start = max(error.start - MAX_SHOWN // 2, 0)
        shown = guess[start : start + MAX_SHOWN]
        raise ValueError(
            f"{path} must be text in UTF-8, but {place} is not; in Windows' cp1252 or Latin-1 it would be {shown!r}. "
            "Save it as UTF-8 (in Excel, CSV UTF-8)."
        ) from None


def undecodable(path: str | Path, error: UnicodeDecodeError) -> ValueError:
    """The error to raise for a file in UTF-16 or UTF-32 that breaks off, or is none."""
    return ValueError(f"{path} must be text in UTF-8, or whole in UTF-16 ({error}); save it as UTF-8.")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1.

    Raises:
        ValueError: If a line is no text; names it.
    """
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                check_text(line, path, f"line {number}")
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise undecodable(path, error) from None


def decode_text(content: bytes, name: str | Path) -> str:
    """A short text.

    Raises:
        ValueError: If it is none, or more than `MAX_TEXT_BYTES`.
    """
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"{name} must be a text of at most {MAX_TEXT_BYTES} bytes, the prompt of one clip.")
    encoding = encoding_of(content)
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding, _errors(encoding)).read()
    except UnicodeDecodeError as error:
        raise undecodable(name, error) from None
    check_text(text, name)
    return text
