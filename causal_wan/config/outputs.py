"""Whether what a command makes can be written where it is to go, asked before hours are spent on it."""

import tempfile
from collections.abc import Collection
from pathlib import Path


def check_output_file(name: str, path: str | Path, suffixes: Collection[str]) -> None:
    """Checks that a file can be written; leaves nothing behind.

    Args:
        name: Of the setting.
        path: Its value; the folder that it is in need not be there.
        suffixes: That the file may have, with the dot.

    Raises:
        ValueError: If it cannot, or has another suffix.
    """
    path, wanted = Path(path), " or ".join(suffixes)
    if path.is_dir():
        raise ValueError(f"{name} must be a file that ends in {wanted}, but {path} is a folder; name one in it.")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{name} must be a file that ends in {wanted}, got {path}.")
    _check_can_write(name, path.parent)


def check_output_folder(name: str, path: str | Path) -> None:
    """Checks that a folder can be written to, or made; leaves nothing behind.

    Args:
        name: Of the setting.
        path: Its value.

    Raises:
        ValueError: If it cannot.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{name} must be a folder, but {path} is a file; use another one.")
    _check_can_write(name, Path(path))


def _check_can_write(name: str, folder: Path) -> None:
    """Of a folder, or of the nearest one above it that is there."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise ValueError(f"{name} must be in a folder, but {there} is a file; use another one.")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be where files can be written, but {folder} is not ({error.strerror}); use another one."
        ) from None
