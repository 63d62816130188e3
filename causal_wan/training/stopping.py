"""Being told to stop, by signals that clusters send before they take a machine back; and what a run ends with then."""

import logging
import signal
from typing import Self


logger = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""Exit status after SIGTERM or SIGUSR1: a checkpoint was written, the same command goes on (EX_TEMPFAIL)."""


class StopRequest:
    """Notes SIGTERM and SIGUSR1, by which clusters announce that they want the machine back, while it is entered.

    `received` is about this process, `agreed` is what all processes act on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> Self:
        self.received = self.agreed = False
        self._handlers = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        logger.warning("received %s: stopping as soon as what is done can be kept", signal.Signals(number).name)
        self.received = True
