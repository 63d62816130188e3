"""Processes that decode clips: how they are started, and which clip one was at when it died."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from causal_wan.config.refusals import DataError
from causal_wan.data.clips import Loadable, VideoDataset
from causal_wan.data.shared_memory import GIB, PREFETCH_FACTOR, SharedMemoryError, advice


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def worker_settings(num_workers: int, timeout: float) -> dict[str, Any]:
    """Of a data loader, what is about its workers.

    Args:
        num_workers: Processes that decode ahead; 0 is none.
        timeout: Seconds after which a batch that does not come is an error.
    """
    if not num_workers:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "timeout": timeout,
        "prefetch_factor": PREFETCH_FACTOR,
        "worker_init_fn": leave_signals_to_parent,
    }


def leave_signals_to_parent(worker: int) -> None:
    """Makes a worker outlive signals to all processes of a run: it has clips to bring for the step that is not done.

    A terminal, torchrun and clusters send them to workers too. A SIGTERM of the parent's ends it, as it does without.

    Args:
        worker: Its number.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # threads that are started later have the same mask
    threading.Thread(target=_wait_for_parents_signal, args=(os.getppid(),), daemon=True).start()


def _wait_for_parents_signal(parent: int) -> None:
    while True:
        came = signal.sigwaitinfo(SIGNALS)
        if came.si_signo == signal.SIGTERM and came.si_pid == parent:
            os._exit(0)


@contextlib.contextmanager
def name_clips_of_dead_workers(
    dataset: Loadable, go_on: Callable[[], str] = lambda: "Then run the same command again."
) -> Iterator[None]:
    """Says which clip a worker of a data loader was at when it died or hung, which torch does not know.

    Args:
        dataset: What they load from.
        go_on: Says how to go on once the cause is mended.

    Raises:
        DataError: One of theirs, with how to go on.
        RuntimeError: In the place of torch's.
    """
    try:
        yield
    except DataError as error:
        raise DataError(f"{error} {go_on()}") from error
    except RuntimeError as error:
        message = _describe_dead_workers(getattr(dataset, "videos", dataset), error)  # behind a cache
        if message is None:
            raise
        raise RuntimeError(f"{message} {go_on()}") from error


def _describe_dead_workers(dataset: Loadable, error: RuntimeError) -> str | None:
    """What became of a worker, at which clip if that is known, and what to do; None if the error is another."""
    notes = dataset.loading.tolist() if isinstance(dataset, VideoDataset) else []

    def clips(indices: list[int]) -> str:
        return "".join(f" at row {dataset.rows[index].number}, {dataset.rows[index].video}" for index in indices)

    text = str(error)
    if timeout := re.search(r"DataLoader timed out after ([\d.]+) seconds", text):
        where = clips([index for _, index, is_loading in notes if is_loading > 0])
        return (
            f"no batch has come from the processes that decode clips for {float(timeout[1]):g} seconds"
            f"{f'; they are{where}' if where else ''}. If the disk or the network is that slow, raise "
            "--dataloader_timeout. If it stops at this clip again, the file hangs the decoder: remove the row. If it "
            "stops anywhere, decode in the training process: --dataloader_num_workers 0."
        )
    found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\).*", text)
    if found is None:
        return None
    dead = [int(process) for process in found[1].split(",")]
    where = clips([index for process, index, _ in notes if process in dead])
    if isinstance(error, SharedMemoryError) or "Bus error" in text:
        return (
            f"a process that decodes clips had no shared memory to hand over what it had decoded{where} ({found[0]}): "
            f"{advice(16 * GIB)}."
        )
    return (
        f"a process that decodes clips died{where} ({found[0]}). If it was killed, memory ran out: use fewer "
        "--dataloader_num_workers. If it dies at this clip again, the file breaks the decoder: remove the row."
    )
