"""What the processes of a launch tell each other, and how they wait for one that works. Knows no accelerator.

All of it goes through a group of its own, of gloo: what is gathered never passes through the memory of a GPU, as it
does under NCCL, and the group that computes the steps is not held open meanwhile. So that one can keep a short
timeout, by which a process that hangs in a step is found, and this one can be patient.
"""

import functools
import socket
from datetime import timedelta
from typing import Any

import torch.distributed


PATIENCE = timedelta(days=7)
"""How long processes wait here for one that works.

One process downloads and hashes encoders, writes 57 GB of a result, or is done with its share of a data set hours
after the others; nobody can tell a slow disk from one that hangs, so no shorter time is right for all. It costs
little: a process that ends, by an error or a kill, ends the wait at once, since the connections to it break.
"""


def process_index() -> int:
    """The number of this process; 0 if it is alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def num_processes() -> int:
    """How many there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def cpu_group() -> torch.distributed.ProcessGroup | None:
    """The group of all processes that talks over the network of the hosts; None if there is one process alone.

    The first call has to be made by every process.

    Raises:
        RuntimeError: If they cannot reach each other.
    """
    if not torch.distributed.is_initialized():
        return None
    return _group_beside(torch.distributed.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_beside(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    """Of the processes of `world`; made anew where there is another one."""
    try:
        return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise RuntimeError(
            "the processes of a launch must reach each other over TCP, but a connection failed; set "
            "GLOO_SOCKET_IFNAME to the network interface that joins the machines, such as eth0."
        ) from error


def wait_for_all() -> None:
    """Waits until every process has come here, for as long as `PATIENCE`."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier(group=cpu_group())


def gather_lists(items: list[Any]) -> list[Any]:
    """The items of all processes, in their order. Called by every process, and as patient as `wait_for_all`."""
    if not torch.distributed.is_initialized():
        return items
    parts: list[list[Any]] = [[] for _ in range(num_processes())]
    torch.distributed.all_gather_object(parts, items, group=cpu_group())
    return [item for part in parts for item in part]


def gather_on_machine(items: list[Any]) -> list[Any]:
    """The items of the processes of this machine, in their order. Called by every process of all machines."""
    here = socket.gethostname()
    return [item for machine, item in gather_lists([(here, item) for item in items]) if machine == here]
