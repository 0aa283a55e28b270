"""SIGINT and SIGTERM as a request to stop at the next good moment, instead of at once."""

import signal
import threading


class Interrupts:
    """Notes the first of these signals while the block lasts. A second SIGINT ends the process as it would have; more
    SIGTERMs do not: a scheduler may send one to all processes, and torchrun passes its own on.

    `signal` is its number, or None; `status` what the process is then to exit with.
    """

    def __init__(self):
        self.signal, self._usual = None, {}

    @property
    def status(self) -> int:
        """Of a process that stopped by request: another one may have got the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._usual = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, self._usual[signal.SIGINT])
