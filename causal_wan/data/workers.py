"""Processes that decode clips, and which clip one was at when it died."""

import contextlib
import re
from collections.abc import Iterator

from causal_wan.data.clips import Loadable, VideoDataset
from causal_wan.data.shared_memory import GIB, SharedMemoryError, advice


@contextlib.contextmanager
def name_clips_of_dead_workers(dataset: Loadable) -> Iterator[None]:
    """Says which clip a worker of a data loader was at when it died or hung, which torch does not know.

    Raises:
        RuntimeError: In the place of torch's.
    """
    try:
        yield
    except RuntimeError as error:
        message = _describe_dead_workers(getattr(dataset, "videos", dataset), error)  # behind a cache
        if message is None:
            raise
        again = "Then run the same command again; training goes on with --resume_from_checkpoint latest."
        raise RuntimeError(f"{message} {again}") from error


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
