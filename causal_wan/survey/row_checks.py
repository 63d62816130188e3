"""One record a row of a data set: whether its video can be used, and what is in it.

Records are kept in a file, so that a check goes on where an earlier one ended, and reads again only what has changed.

Shapes: T = frames, height, width in pixels.
"""

import functools
import hashlib
import itertools
import json
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from torchvision.transforms import v2

from causal_wan.data.file_manifest import stat_of
from causal_wan.data.rows import Row, check_row, find_video
from causal_wan.data.settings import DataConfig
from causal_wan.tables.prompt_schedules import PromptSchedule
from causal_wan.tables.table import TableRow
from causal_wan.video.decoding import decode_frames
from causal_wan.video.limits import VideoLimits
from causal_wan.video.opening import Video, describe_error


VERSION = 3  # of the records; those of another version are made anew
NUM_LOOKS = 8  # frames of a clip that are looked at, evenly spread
LOOK_SIZE = 32  # pixels, both ways
WHOLE_FILE_BYTES = 64 << 20  # larger files are told apart by their size, beginning and end
CHUNK_ROWS = 16

# What is kept in memory of a record: 64 bytes a row.
FACTS = np.dtype(
    [
        ("key", "u8"),
        ("offset", "i8"),  # of the record in its file
        ("is_bad", "?"),
        ("frames", "i4"),
        ("rate", "f4"),  # frames a second
        ("height", "i4"),  # as shown, not as stored
        ("width", "i4"),
        ("bytes", "i8"),
        ("luma", "f4"),  # mean brightness, 0 to 255
        ("motion", "f4"),  # change of brightness from look to look, where it is largest
        ("content", "u8"),  # hash of the file
        ("traits", "u4"),  # `causal_wan.video.facts.Traits`
    ]
)

NumberedRow = tuple[int, TableRow]  # 1 is the first of all tables together


# --- making records --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowChecker:
    """Rows -> records; goes to other processes.

    Args:
        config: Says where files are and what is too short; of short clips, records are made as of others.
        known_keys: File with the keys of all records that are there, sorted, or None.
    """

    config: DataConfig
    known_keys: str | None = None

    def __call__(self, rows: Sequence[NumberedRow]) -> list[dict[str, Any]]:
        """A record a row; of those that are known already, row and key alone."""
        records = []
        for number, row in rows:
            record = {"row": number, "key": self.key(row)}
            if not (self.known_keys and _contains(_load_keys(self.known_keys), record["key"])):
                record |= self.facts(row)
            records.append(record)
        return records

    def key(self, row: TableRow) -> int:
        """Identifies what a record depends on: the file with its size and time, and whether there is a prompt.

        Of a schedule also when its last prompt begins, which the file must reach.
        """
        state = self._state(row)
        facts = [VERSION, row.base, str(row.video), state, bool(row.prompts), vars(self.config.limits)]
        facts += [[name, self._state(each)] for name, each in self._controls(row)]
        facts += [prompt.seconds[-1] for prompt in row.prompts if isinstance(prompt, PromptSchedule)]
        return hash_bytes(json.dumps(facts).encode())

    @staticmethod
    def _state(row: TableRow) -> Sequence[Any]:
        try:
            return stat_of(find_video(row)[0])
        except (ValueError, OSError) as error:
            return [str(error)]

    def _controls(self, row: TableRow) -> Iterator[tuple[str, TableRow]]:
        """The videos that control the row's, each as a row."""
        for name, video in zip(self.config.control_column, row.controls, strict=True):
            yield name, replace(row, video=video, controls=())

    def facts(self, row: TableRow) -> dict[str, Any]:
        """What is in the video of a row, or the error by which it, or a control of it, cannot be used."""
        # The report tells which clips are short, and the size as shown is seen in decoding.
        config = replace(self.config, short_clips="pad", resolution_buckets=())
        try:
            checked = check_row(row, config, as_shown=True)
            for name, control in zip(config.control_column, checked.controls, strict=True):
                self._decode(name, control)
            return {
                "frames": checked.num_frames,
                "rate": round(checked.frame_rate, 4),
                "traits": int(checked.traits),
                **look_at_file(checked.video),
                **look_at_pictures(checked.video, checked.num_frames, self.config.limits),
            }
        except (ValueError, OSError, av.FFmpegError) as error:
            return {"error": describe_error(error)}

    def _decode(self, name: str, control: Row) -> None:
        try:
            look_at_pictures(control.video, control.num_frames, self.config.limits)
        except (ValueError, OSError, av.FFmpegError) as error:
            raise ValueError(f"its control {name}, {control.name}: {describe_error(error)}") from error


@functools.cache
def _load_keys(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _contains(keys: np.ndarray, key: int) -> bool:
    at = np.searchsorted(keys, np.uint64(key))
    return at < len(keys) and int(keys[at]) == key


def hash_bytes(content: bytes) -> int:
    """A hash of 64 bits: among a million, two different contents share one once in 40 million data sets."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def look_at_file(video: Video) -> dict[str, int]:
    """Size and hash of a file; of a large one, the hash is that of its size, beginning and end."""
    with video.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= WHOLE_FILE_BYTES:
            return {"bytes": size, "content": _hash_file(file, size)}
        part = WHOLE_FILE_BYTES // 4
        hashes = [_hash_file(file, part)]
        file.seek(size - part)
        return {"bytes": size, "content": hash_bytes(str([size, *hashes, _hash_file(file, part)]).encode())}


def _hash_file(file: BinaryIO, count: int) -> int:
    digest = hashlib.blake2b(digest_size=8)
    while count > 0 and (block := file.read(min(count, 1 << 20))):
        digest.update(block)
        count -= len(block)
    return int.from_bytes(digest.digest())


def look_at_pictures(video: Video, num_frames: int, limits: VideoLimits) -> dict[str, float]:
    """Decodes a clip to its end, and describes a few of its frames: size as shown, brightness and motion."""
    sizes = []

    def shrink(frame: torch.Tensor) -> torch.Tensor:
        sizes.append(frame.shape[-2:])
        return v2.functional.resize(frame, [LOOK_SIZE, LOOK_SIZE], antialias=True)

    indices = torch.linspace(0, num_frames - 1, NUM_LOOKS, dtype=torch.float64).round().long()
    looks = decode_frames(video, indices, shrink, limits=limits).float()
    luma = (looks * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1)  # (T, 32, 32)
    height, width = sizes[0]
    return {
        "height": height,
        "width": width,
        "luma": round(float(luma.mean()), 3),
        "motion": round(float(luma.diff(dim=0).abs().amax(dim=(1, 2)).mean()), 3),
    }


# --- keeping records -------------------------------------------------------------------------------------------------


class RecordFile:
    """Records as lines of JSON; what is added is on the disk soon, and a torn last line is dropped.

    Args:
        path: Of the file; is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("r+b")
        self._known = np.fromiter(self._read(), FACTS)
        self._known = self._known[np.argsort(self._known["key"], kind="stable")]
        self._keys = self._known["key"].copy()  # contiguous, or every search would copy them

    def _read(self) -> Iterator[tuple]:
        end = 0
        for line in self._file:
            record = _parse(line)
            if record is None:
                break
            yield _to_facts(record, end)
            end += len(line)
        self._file.truncate(end)

    def save_keys(self, path: Path) -> None:
        """Writes the keys of all records, sorted, for `RowChecker`."""
        np.save(path, self._keys)

    def find(self, key: int) -> np.void:
        """The facts of a record that was there at the start."""
        return self._known[np.searchsorted(self._keys, np.uint64(key))]

    def add(self, record: dict[str, Any]) -> tuple:
        """Appends a record; returns its facts."""
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
        return _to_facts(record, offset)

    def flush(self) -> None:
        """Hands what was added to the operating system."""
        self._file.flush()

    def read(self, facts: np.void) -> dict[str, Any]:
        """The whole record that facts are of."""
        self._file.seek(int(facts["offset"]))
        return json.loads(self._file.readline())


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "key" in record else None


def _to_facts(record: dict[str, Any], offset: int) -> tuple:
    values = [record.get(name, 0) for name in FACTS.names[3:]]
    return record["key"], offset, "error" in record, *values


# --- making many -----------------------------------------------------------------------------------------------------


def check_rows(rows: Iterable[NumberedRow], checker: RowChecker, num_processes: int) -> Iterator[list[dict[str, Any]]]:
    """Records of rows, chunk by chunk as they are done; few chunks are held at a time.

    Args:
        rows: Any number of them.
        checker: Makes the records.
        num_processes: That it runs in; 0 is this one. One that dies takes its row with it, not the check.
    """
    rows = iter(rows)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK_ROWS)), [])
    if not num_processes:
        yield from map(checker, chunks)
        return
    lost: list[NumberedRow] = []  # in the hands of processes when one of them died
    while True:
        yield from _check_until_death(chunks, checker, num_processes, lost)
        if not lost:
            return
        for row in lost:
            yield [_check_alone(row, checker)]
        lost.clear()


def _check_until_death(
    chunks: Iterator[list[NumberedRow]], checker: RowChecker, num_processes: int, lost: list[NumberedRow]
) -> Iterator[list[dict[str, Any]]]:
    """Runs until there are no chunks, or a process dies; the rows without a record are then in `lost`."""
    running: dict[Future, list[NumberedRow]] = {}
    with ProcessPoolExecutor(num_processes, initializer=_begin_process) as pool:
        while not lost:
            for chunk in itertools.islice(chunks, 2 * num_processes - len(running)):
                try:
                    running[pool.submit(checker, chunk)] = chunk
                except BrokenProcessPool:
                    lost += chunk
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                chunk = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    lost += chunk
        for future in wait(running).done:
            lost += running[future]


def _begin_process() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that collects the records


def _check_alone(row: NumberedRow, checker: RowChecker) -> dict[str, Any]:
    """The record of one row, made in a process of its own."""
    with ProcessPoolExecutor(1, initializer=_begin_process) as pool:
        try:
            (record,) = pool.submit(checker, [row]).result()
            return record
        except BrokenProcessPool:
            error = "the decoder dies at this file, or memory runs out"
            return {"row": row[0], "key": checker.key(row[1]), "error": error}
