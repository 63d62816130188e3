"""Tensors on disk by key: written whole or not at all, in shards, and checked when read. Knows no video and no model.

A cache is a folder of safetensors files. A tensor lies in one piece in its file, in the order of the file's header, so
shards can be read one by one from front to back. Any number of processes may write at once, each to files of its own.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


logger = logging.getLogger(__name__)

GIB = 2**30
SHARD_BYTES = 256 << 20
MAX_SHARD_ENTRIES = 512  # the header is read with each entry: thousands of small ones would cost more than they are
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # as safetensors calls them
FORMAT = "causal-wan tensor cache 2"
EAGER_SECONDS = 1.0  # at least between the shards of an eager writer
STALE_SECONDS = 3600  # after which a half-written shard is nobody's


class CorruptTensorError(ValueError):
    """A tensor of a cache is not what was written."""


def settings_key(settings: dict[str, Any], *parts: str) -> bytes:
    """The key of what was made from `parts` under settings, 16 bytes."""
    text = json.dumps([settings, *parts], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def describe_differences(settings: dict[str, Any], others: Iterable[dict[str, Any]]) -> str:
    """How wanted settings differ from the most similar of those that a cache has."""
    differences = [
        [
            f"{name} is {other.get(name, 'not set')} in the cache, {settings.get(name, 'not set')} in this run"
            for name in sorted(settings.keys() | other.keys())
            if settings.get(name) != other.get(name)
        ]
        for other in others
    ]
    return "; ".join(min(differences, key=len, default=[]))


class TensorCache:
    """Reads a cache. About 200 bytes of memory an entry; shards are opened as they are needed.

    Args:
        folder: Of the shards; need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards: list[Path] = []
        self.settings: list[dict[str, Any]] = []  # those that differ
        self._entries: dict[bytes, int] = {}  # key -> number of its shard
        self._known: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Takes in the shards that were written since; those that are damaged are reported and left out.

        Of entries with one key, the one that was written last counts: it was made because another is damaged.
        """
        new = [path for path in self.folder.glob("*.safetensors") if path.name not in self._known]
        self._known |= {path.name for path in new}
        for path in sorted(new, key=_when_written):
            try:
                with safe_open(path, framework="pt") as shard:
                    metadata, names = shard.metadata() or {}, list(shard.keys())
                if metadata.get("format") != FORMAT:
                    logger.warning("%s is no shard of this cache and left out", path)
                    continue
                settings, keys = json.loads(metadata["settings"]), [bytes.fromhex(name) for name in names]
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                logger.warning("%s is damaged and left out (%s); its entries will be made anew", path, error)
                continue
            if settings not in self.settings:
                self.settings.append(settings)
            self._entries |= dict.fromkeys(keys, len(self.shards))
            self.shards.append(path)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def read(self, key: bytes) -> tuple[torch.Tensor, dict[str, Any]]:
        """A tensor and the facts that were stored with it.

        Raises:
            KeyError: If it is not there.
            CorruptTensorError: If it is not what was written.
        """
        path, name = self.shards[self._entries[key]], key.hex()
        try:
            tensor, stored = _read_entry(path, name)
            facts, expected = stored["facts"], stored["checksum"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CorruptTensorError(_corrupt(path, name, str(error))) from error
        if checksum(tensor, facts) != expected:
            raise CorruptTensorError(_corrupt(path, name, "its checksum is another"))
        return tensor, facts

    def facts(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(settings, facts) of each entry, of the headers alone: shard by shard."""
        for number, path in enumerate(self.shards):
            with safe_open(path, framework="pt") as shard:
                metadata = shard.metadata()
            settings = json.loads(metadata["settings"])
            for name, stored in json.loads(metadata["facts"]).items():
                if self._entries.get(bytes.fromhex(name)) == number:  # and is not made anew in another shard
                    yield settings, stored["facts"]

    def in_order(self) -> Iterator[bytes]:
        """All keys as they lie on disk: shard by shard, front to back."""
        for path in self.shards:
            with safe_open(path, framework="pt") as shard:
                yield from map(bytes.fromhex, shard.offset_keys())

    def corrupt_keys(self, keys: Iterable[bytes] | None = None) -> Iterator[bytes]:
        """Reads entries, all by default, and gives the keys of those that are damaged."""
        for key in self.in_order() if keys is None else keys:
            try:
                self.read(key)
            except CorruptTensorError as error:
                logger.warning("%s", error)
                yield key

    def forget(self, keys: Iterable[bytes]) -> None:
        """Takes entries out of the index alone."""
        for key in keys:
            self._entries.pop(key, None)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Takes entries out of the index and out of their shards, which are written anew without them."""
        by_shard: dict[int, set[str]] = {}
        for key in keys:
            by_shard.setdefault(self._entries[key], set()).add(key.hex())
        self.forget(keys)
        for number, dropped in by_shard.items():
            path = self.shards[number]
            with safe_open(path, framework="pt") as shard:
                metadata = shard.metadata()
                tensors = {name: shard.get_tensor(name) for name in shard.keys() if name not in dropped}  # noqa: SIM118
            facts = json.loads(metadata["facts"])
            metadata["facts"] = json.dumps({name: facts[name] for name in tensors})
            if tensors:
                _write_whole(path, tensors, metadata)
            else:
                path.unlink()


def _read_entry(path: Path, name: str) -> tuple[torch.Tensor, dict[str, Any]]:
    """A tensor of a safetensors file and its facts, reading no more than the header and its bytes.

    The library maps files into memory, by which disks read ahead: up to ten times the bytes (`benchmarks/data.py`).

    Raises:
        ValueError: If the file has changed since the library has checked its header.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
        start, end = header[name]["data_offsets"]
        file.seek(8 + length + start)
        content = bytearray(file.read(end - start))
    if len(content) != end - start:
        raise ValueError("it is cut off")
    tensor = torch.frombuffer(content, dtype=DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
    return tensor, json.loads(header["__metadata__"]["facts"])[name]


def _corrupt(path: Path, name: str, reason: str) -> str:
    return (
        f"entry {name} of {path} is damaged ({reason}); precompute_latents.py --verify makes it anew, or "
        "precompute_trajectories.py --verify if it is a trajectory"
    )


def _when_written(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:  # another process has just removed it
        return 0, path.name


def checksum(tensor: torch.Tensor, facts: dict[str, Any]) -> str:
    """Of a tensor's bytes, type and shape, and of what is known of it."""
    known = xxhash.xxh3_128(json.dumps([str(tensor.dtype), list(tensor.shape), facts], sort_keys=True).encode())
    known.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return known.hexdigest()


def _write_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes beside and renames, so that a kill leaves no half of a shard."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o644)  # safetensors lets nobody else read
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class CacheWriter:
    """Collects tensors and writes them in shards; on leaving its context, also by an exception, writes the rest.

    Args:
        folder: Of the shards; made if need be.
        shard_bytes: Size at which shards are written.
        eager: Also write when a tenth of the time since the start has passed since the last shard, so that other
            processes can soon read what is new, in few shards all the same.
    """

    def __init__(self, folder: str | Path, *, shard_bytes: int = SHARD_BYTES, eager: bool = False) -> None:
        self.folder, self.shard_bytes, self.eager = Path(folder), shard_bytes, eager
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pending: dict[str, dict[str, tuple[torch.Tensor, dict[str, Any]]]] = {}  # settings -> name -> ...
        self._num_bytes = 0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.flush()

    def add(self, key: bytes, tensor: torch.Tensor, settings: dict[str, Any], **facts: Any) -> None:
        """Takes a tensor, and what is to be known of it: values that JSON can hold.

        Raises:
            OSError: If a shard was due and could not be written.
        """
        tensor = tensor.detach().cpu().contiguous()
        own = self._pending.setdefault(json.dumps(settings, sort_keys=True), {})
        own[key.hex()] = tensor, {"facts": facts, "checksum": checksum(tensor, facts)}
        self._num_bytes += tensor.nbytes
        now = time.monotonic()
        is_full = self._num_bytes >= self.shard_bytes or len(own) >= MAX_SHARD_ENTRIES
        if is_full or (self.eager and now - self._last >= max(EAGER_SECONDS, (now - self._start) / 10)):
            self.flush()

    def flush(self) -> None:
        """Writes what was collected, a shard for each settings.

        Raises:
            OSError: If the disk is full or the folder read-only; what was written before stays.
        """
        pending, self._pending, self._num_bytes = self._pending, {}, 0
        for settings, entries in pending.items():
            tensors = {name: tensor for name, (tensor, _) in entries.items()}
            facts = json.dumps({name: fact for name, (_, fact) in entries.items()})
            metadata = {"format": FORMAT, "settings": settings, "facts": facts}
            try:
                _write_whole(self.folder / f"{uuid.uuid4().hex}.safetensors", tensors, metadata)
            except SafetensorError as error:  # as safetensors reports a full disk
                raise OSError(f"a shard could not be written to {self.folder}: {error}") from error
        self._last = time.monotonic()


def free_bytes(folder: str | Path) -> int:
    """Disk that is free where a folder is or will be."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free


def check_disk(name: str, folder: str | Path, num_bytes: int) -> None:
    """Checks that there is so much room in the folder that a setting names.

    Raises:
        ValueError: If not.
    """
    free = free_bytes(folder)
    if num_bytes > free:
        raise ValueError(
            f"{name} must have room for {num_bytes / GIB:.2f} GiB, but {folder} has {free / GIB:.2f} GiB; make room, "
            "use another folder, or --latents_dtype bf16."
        )


def remove_stale_shards(folder: str | Path) -> None:
    """Removes what killed processes left half-written: ours, and those of safetensors, which writes beside as well."""
    for path in [*Path(folder).glob(".*.partial"), *Path(folder).glob(".tmp*")]:
        with contextlib.suppress(FileNotFoundError):  # its process was done after all
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
