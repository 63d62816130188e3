"""Copies to a device, and back, that the host does not wait for."""

from collections.abc import Callable

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device. A copy to a GPU goes by way of pinned memory: a plain one would wait for all it does."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class LateCopy:
    """Hands tensors of a GPU to the host when the next one comes, by when they are there; those of a CPU at once."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event, Callable[[torch.Tensor], None]] | None = None

    def hand_in(self, tensor: torch.Tensor, use: Callable[[torch.Tensor], None]) -> None:
        """Has `use` called with the tensor on the host, and before that that of what was handed in last."""
        self.flush()
        if tensor.device.type != "cuda":
            use(tensor)
            return
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending = (host, copied, use)

    def flush(self) -> None:
        """Waits for what has been handed in, and has it used."""
        if self._pending is None:
            return
        host, copied, use = self._pending
        self._pending = None
        copied.synchronize()
        use(host)


class LateReader(LateCopy):
    """Reads small tensors of a GPU one step late, when they are there without waiting; those of a CPU at once."""

    def hand_in(self, values: torch.Tensor, read: Callable[..., None]) -> None:
        """Has `read` called with the values, and before that the reader of what was handed in last."""
        super().hand_in(values, lambda host: read(*host.tolist()))
