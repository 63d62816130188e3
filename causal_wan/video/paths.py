"""Files that a table names, found below their folder and nowhere else."""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path


WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
NORMAL_FORMS = ("NFC", "NFD")


def resolve_path(video: str | None, base: Path) -> Path:
    """The file that a cell names: as it is written, or else without spaces around it, with slashes for backslashes,
    and with accents composed or decomposed as they are on the disk.

    Raises:
        ValueError: If it is no path below the base folder, symlinks resolved, or no file.
    """
    if not (video or "").strip():
        raise ValueError("the path is empty")
    if "\0" in video:
        raise ValueError("the path has a NUL character in it")
    found = next((name for name in _spellings(video, base) if os.path.lexists(base / name)), video)
    path = Path(os.path.realpath(base / found))  # Path.resolve raises RuntimeError where links go in a circle
    if WINDOWS_DRIVE.match(video) and not path.exists():
        raise ValueError("the path must be below dataset_base_path, such as clips/a.mp4, not on a drive of Windows")
    if ":" in video.split("/")[0] and not path.exists():
        raise ValueError("the path must name a file below dataset_base_path, not a URL or protocol")
    if not path.is_relative_to(os.path.realpath(base)):
        raise ValueError("the path leaves dataset_base_path")
    _check_file(path)
    return path


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError("the path is a folder")
    if not path.exists():
        raise ValueError("the file does not exist")
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError("the path is a pipe, socket or device, not a file")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")


def _spellings(name: str, base: Path) -> Iterator[str]:
    """How a path may be written on the disk, likeliest first."""
    for text in dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/"))):
        yield text
        if not text.isascii():
            yield _spell_as_on_disk(text, base)


def _spell_as_on_disk(name: str, base: Path) -> str:
    """The path with each part in the form in which it is there; folders and files may have come from two machines."""
    spelled = Path()
    for part in Path(name).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in NORMAL_FORMS))
        spelled /= next((form for form in forms if os.path.lexists(base / spelled / form)), part)
    return str(spelled)
