"""What is known of video files: content, frames, rate and size; trusted as long as a file's size and time stay.

With it a run need not open the files again, nor even have them: latents are found by content.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from causal_wan.video.facts import CHANGED_TRAITS, Traits, VideoFacts
from causal_wan.video.opening import EmbeddedVideo, Video


logger = logging.getLogger(__name__)

NAME = "files.parquet"
SCHEMA = {
    "path": pa.string(),
    "name": pa.string(),
    "size": pa.int64(),
    "mtime_ns": pa.int64(),
    "content": pa.string(),
    "num_frames": pa.int64(),
    "frame_rate": pa.float64(),
    "height": pa.int32(),
    "width": pa.int32(),
    "traits": pa.int32(),
}
READING = 2  # how files with traits are read; 1 took their frames by number, and showed them as they are stored


@dataclass(frozen=True)
class FileFacts:
    """A file: where it was, its name in the table, bytes, time, SHA-256; frames, frames a second, pixels, traits.

    Of files that are no videos the last five are 0. Traits are None where they were not noted yet.
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    content: str
    num_frames: int = 0
    frame_rate: float = 0.0
    height: int = 0
    width: int = 0
    traits: int | None = 0

    @property
    def facts(self) -> VideoFacts:
        """What is known of the video."""
        traits = Traits.UNKNOWN if self.traits is None else Traits(self.traits)
        return VideoFacts(self.num_frames, self.frame_rate, self.height, self.width, traits)

    @property
    def shown(self) -> str:
        """What identifies the pictures that are read: the content, and how it is read if that has changed."""
        return f"{self.content}, reading {READING}" if self.facts.traits & CHANGED_TRAITS else self.content

    def with_facts(self, facts: VideoFacts) -> Self:
        """The same file, of which more is known."""
        return replace(self, **facts._asdict() | {"traits": int(facts.traits)})


def hash_content(video: Video) -> str:
    """SHA-256 of a file's bytes."""
    with video.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stat_of(video: Video) -> tuple[str, int, int]:
    """Where a file is, its bytes, and when it changed; a data set's row changes with the name of the data set."""
    if isinstance(video, EmbeddedVideo):
        return f"{video.dataset._fingerprint}/{video.index}/{video.column}", 0, 0
    stat = video.stat()
    return str(video), stat.st_size, stat.st_mtime_ns


class FileManifest:
    """The facts of a folder's `files.parquet`, by path and by name; about 1 kB of memory a file.

    Args:
        folder: Need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self.by_path: dict[str, FileFacts] = {}
        self.by_name: dict[str, FileFacts] = {}
        if self.path.is_file():
            try:
                rows = pq.read_table(self.path).to_pylist()
                self.add(FileFacts(**{"traits": None, **row}) for row in rows)
            except (OSError, pa.ArrowException, TypeError) as error:
                logger.warning("%s is damaged, so files are read anew: %s", self.path, error)
        self.is_changed = False

    def add(self, facts: Iterable[FileFacts]) -> None:
        """Takes in facts, in the place of older ones of the same paths."""
        for fact in facts:
            self.by_path[fact.path] = self.by_name[fact.name] = fact
            self.is_changed = True

    def find(self, video: Video) -> FileFacts | None:
        """The facts of a file, if it is as it was."""
        path, size, mtime_ns = stat_of(video)
        known = self.by_path.get(path)
        return known if known is not None and (known.size, known.mtime_ns) == (size, mtime_ns) else None

    def content(self, path: Path) -> str:
        """SHA-256 of a file that is no video, found once."""
        blob = os.path.basename(os.path.realpath(path))
        if len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
            return blob  # the hub's cache names files by their content
        known = self.find(path)
        if known is None:
            known = FileFacts(*stat_of(path)[:1], path.name, *stat_of(path)[1:], hash_content(path))
            self.by_path[known.path] = known
            self.is_changed = True
        return known.content

    def save(self) -> None:
        """Writes all facts, whole or not at all, if there are new ones. One process at a time.

        Raises:
            OSError: If they cannot be written.
        """
        if not self.is_changed:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [vars(facts) for facts in self.by_path.values()]
        partial = self.path.with_name(f".{NAME}.{os.getpid()}.partial")
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(SCHEMA.items())), partial)
        os.replace(partial, self.path)
        self.is_changed = False
