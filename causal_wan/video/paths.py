"""Files that a table names, or that a folder holds, found below their folder and nowhere else.

A link may lead to another place below the folder. In a snapshot of the hub's cache it may also lead to the blobs of
its own repository, where the hub keeps the content; anywhere else only if that is asked for.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path


logger = logging.getLogger(__name__)

WINDOWS_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
NORMAL_FORMS = ("NFC", "NFD")
HUB_REPOSITORY = re.compile(r"(datasets|models|spaces)--.+")
NO_BASE = (
    "the data set holds no bytes of the video, and no file may be opened; name the folder of its files with "
    "--dataset_base_path"
)
"""What is wrong with a path for which there is no folder."""


def resolve_path(video: str | None, base: Path, *, follow_links: bool = False) -> Path:
    """The file that a cell names: as it is written, or else without spaces around it, with slashes for backslashes,
    and with accents composed or decomposed as they are on the disk.

    Args:
        video: The cell.
        base: Folder that the path is relative to.
        follow_links: Whether links in the folder may lead out of it.

    Raises:
        ValueError: If it is no path below the base folder, links resolved, or no file.
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
    root = Path(os.path.realpath(base))
    if not path.is_relative_to(root):
        path = _follow_link(found, base, root, follow_links=follow_links)
    _check_file(path)
    return path


def _follow_link(name: str, base: Path, root: Path, *, follow_links: bool) -> Path:
    """Where a path leads that is written as one below the base folder, and is none."""
    here = os.path.abspath(base)
    written = Path(
        os.path.normpath(os.path.join(here, name))
    )  # before links, so that `..` leads out of no linked folder
    if not written.is_relative_to(here) and not written.is_relative_to(root):
        raise ValueError("the path leaves dataset_base_path")
    path = Path(os.path.realpath(written))
    if not (follow_links or path.is_relative_to(root) or _is_own_blob(path, root)):
        raise ValueError(
            f"the path leaves dataset_base_path by a link, to {path}; put the file itself there, or allow links with "
            "--follow_links"
        )
    return path


def _is_own_blob(path: Path, root: Path) -> bool:
    """Whether a file is the content of one in the hub's cache, of the repository that a folder is a snapshot of."""
    for snapshot in (root, *root.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and HUB_REPOSITORY.fullmatch(repository.name):
            return path.parent == repository / "blobs"
    return False


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError("the path is a folder")
    if path.is_symlink():  # what `realpath` leaves of a circle
        raise ValueError("the file does not exist: its link leads in a circle")
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


# --- folders ---------------------------------------------------------------------------------------------------------


def visible_files(folder: Path, *, follow_links: bool = False) -> Iterator[str]:
    """Names of all files below a folder but hidden ones; a folder is read once, however many links lead to it.

    Linked files are among them, wherever they lead.

    Args:
        folder: To look into.
        follow_links: Whether linked folders may be elsewhere.

    Raises:
        ValueError: If a folder cannot be read, or a linked one is elsewhere and must not be.
    """
    folders, links, seen = [""], [], set()
    while folders:
        name = folders.pop()
        seen.add(os.path.realpath(folder / name))
        for entry in _scan(folder / name):
            below = os.path.join(name, entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append(below)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append(below)
            else:
                yield below
        while links and not folders:  # at last, so that what is below the folder goes by its own name
            link = links.pop(0)
            if _leads_to_new(folder / link, folder, seen, follow_links=follow_links):
                folders.append(link)


def _scan(folder: Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_symlink() and not os.path.exists(entry.path):
                    logger.warning("%s is a link that leads nowhere, or in a circle", entry.path)
                if not entry.name.startswith("."):  # macOS leaves ._a.mp4 beside a.mp4
                    yield entry
    except OSError as error:
        raise ValueError(f"{folder} must be a folder that can be read ({error.strerror}).") from None


def _leads_to_new(link: Path, folder: Path, seen: set[str], *, follow_links: bool) -> bool:
    target = os.path.realpath(link)
    if target in seen:
        logger.warning("%s is a link to %s, which is read already, and once", link, target)
        return False
    if not follow_links and not Path(target).is_relative_to(os.path.realpath(folder)):
        raise ValueError(
            f"{folder} must hold its files itself, but {link} is a link to the folder {target}; put it there, "
            "allow links with --follow_links, or remove the link."
        )
    return True
