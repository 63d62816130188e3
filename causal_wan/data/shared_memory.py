"""The memory by which the workers of a data loader hand over their batches: whether there is enough of it.

torch puts each tensor into a file of /dev/shm, whichever way of sharing it is set to. Where that is full, a thread of
the worker prints an error and drops the batch, for which the training process then waits without end. Docker gives a
container 64 MB of it; a clip of 81 x 480 x 832 takes 97 MB.
"""

import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info


FOLDER = Path("/dev/shm")
MIB, GIB = 2**20, 2**30
PREFETCH_FACTOR = 2  # batches ahead of each worker: torch's own default, on which the room depends
SECONDS_TO_WAIT = 60.0  # for room, which comes as batches are taken


class SharedMemoryError(RuntimeError):
    """There was no room for a batch."""


class SharedMemory(NamedTuple):
    """What a process sees of it: the name of the machine, and free bytes; None if there is no limit but memory."""

    machine: str
    free: int | None


def free_bytes() -> int | None:
    """Free bytes of it; None if there is no such folder, or if it has no limit of its own."""
    if not FOLDER.is_dir():
        return None
    status = os.statvfs(FOLDER)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def shared_memory_here() -> SharedMemory:
    """That of this process, for `check_shared_memory`."""
    return SharedMemory(socket.gethostname(), free_bytes())


def check_shared_memory(
    seen: Sequence[SharedMemory], *, batch_bytes: int, num_workers: int, pin_memory: bool
) -> str | None:
    """Checks, before anything is loaded, that workers can hand over their batches.

    Args:
        seen: By each process of the launch, since those of a machine share it.
        batch_bytes: Of the largest batch.
        num_workers: Of the data loader of each process.
        pin_memory: Whether a thread of the process takes batches out as they come; else one stays until the next one
            is there.

    Returns:
        A warning where there is room for some batches, but not for as many as are decoded ahead.

    Raises:
        ValueError: If there is not even room to hand over one batch after the other.
    """
    warning = None
    num_held, num_ahead = 0 if pin_memory else 1, num_workers * PREFETCH_FACTOR
    for machine in sorted({each.machine for each in seen}) if num_workers else ():
        free = [each.free for each in seen if each.machine == machine]
        if None in free:
            continue
        num_processes, least = len(free), num_held + 1
        wanted = num_processes * (num_held + num_ahead) * batch_bytes
        if min(free) >= wanted:
            continue
        what_to_do = advice(wanted + wanted // 8)  # others use it, too
        of_each = f"of {batch_bytes / MIB:.1f} MiB for each of {num_processes} process(es)"
        has = f"{machine} has {min(free) / MIB:.1f} MiB free"
        if min(free) < num_processes * least * batch_bytes:
            raise ValueError(
                f"shared memory, {FOLDER}, must have room for {least} batch(es) {of_each}, but {has}; {what_to_do}."
            )
        warning = (
            f"shared memory, {FOLDER}, should have room for the {num_ahead} batches {of_each} that are decoded ahead, "
            f"but {has}. Steps may wait for clips; {what_to_do}."
        )
    return warning


def advice(num_bytes: int) -> str:
    """What to do where there is less than so much of it."""
    size = math.ceil(num_bytes / GIB)
    return (
        f"in Docker, run with --shm-size={size}g or --ipc=host; elsewhere, enlarge {FOLDER}; or decode nothing ahead, "
        "--dataloader_num_workers 0"
    )


def collate_shared(collate: Callable[[Sequence[Any]], Any], samples: Sequence[Any]) -> Any:
    """A batch; that of a worker in shared memory already, so that an error on the way reaches the training process."""
    batch = collate(samples)
    if get_worker_info() is not None:
        share(batch)
    return batch


def share(batch: Any) -> None:
    """Moves the tensors of a batch to shared memory; waits for a while if there is no room.

    Raises:
        SharedMemoryError: If there is none by then.
        RuntimeError: If they cannot be moved for another reason.
    """
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while True:
        tensors = [tensor for tensor in _tensors_of(batch) if not tensor.is_shared()]
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        # Asked before it is tried: each attempt that fails leaves an empty file behind.
        while (free := free_bytes()) is not None and free < num_bytes and time.monotonic() < deadline:
            time.sleep(0.1)
        try:
            for tensor in tensors:
                tensor.share_memory_()
            return
        except RuntimeError as error:
            if "No space left" not in str(error):
                raise
            if time.monotonic() >= deadline:
                raise SharedMemoryError(
                    f"DataLoader worker (pid {os.getpid()}) has {num_bytes / MIB:.1f} MiB to hand over, but {FOLDER} "
                    f"has {(free or 0) / MIB:.1f} MiB free"
                ) from error
        time.sleep(0.1)


def _tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif is_dataclass(batch):
        yield from _tensors_of([getattr(batch, field.name) for field in fields(batch)])
    elif isinstance(batch, dict):
        yield from _tensors_of(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors_of(value)
