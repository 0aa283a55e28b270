"""Turns SIGINT and SIGTERM into a request to stop after the current step."""

import signal
import threading


class Interrupts:
    """Records the first SIGINT or SIGTERM until the block ends.

    A second SIGINT ends the process at once. Further SIGTERMs do not: a scheduler may send one to every process, and
    torchrun forwards its own. `signal` is the number of the signal, or None.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous = {}

    @property
    def status(self) -> int:
        """Returns the exit status after a stop; another process may have received the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers in no other
            self._previous = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number, frame) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
