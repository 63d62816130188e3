"""Signs of life of what takes long: bars and lines that come after a while, and not at all where all is quick."""

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm


PATIENCE = 3.0  # seconds without a sign


def is_shown() -> bool:
    """Whether this process speaks for all: the main one of several, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def show_progress(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A bar of tqdm that comes after a while and leaves nothing behind; on the main process alone."""
    quiet = {"delay": PATIENCE, "leave": False, "dynamic_ncols": True, "disable": not is_shown()}
    return tqdm(iterable, **{**quiet, **settings})


@contextlib.contextmanager
def announced(work: str) -> Iterator[None]:
    """Says what is going on, once its body has taken a while; on the main process alone."""
    if not is_shown():
        yield
        return
    timer = threading.Timer(PATIENCE, tqdm.write, (f"{work} ...",), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
