"""Being told to stop, by Ctrl-C or by signals of clusters that want a machine back; and what a run ends with then."""

import logging
import signal
from typing import Self


logger = logging.getLogger(__name__)

EXIT_STOPPED = 75
"""Exit status of a run that was told to stop: what is done is kept, the same command goes on (EX_TEMPFAIL)."""


class StopRequest:
    """Notes SIGINT (Ctrl-C), and SIGTERM and SIGUSR1, by which clusters announce that they want the machine back.

    While it is entered. A second SIGINT ends the process at once, with a KeyboardInterrupt. torchrun keeps Ctrl-C from
    its processes, which have a session of their own, and sends each one SIGINT in its place.

    `received` is about this process, `agreed` is what all processes act on.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> Self:
        self.received = self.agreed = False
        self._handlers = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        more = ""
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            more = "; once more ends it at once"
        logger.warning(
            "received %s: stopping as soon as what is done can be kept%s", signal.Signals(number).name, more
        )
        self.received = True
