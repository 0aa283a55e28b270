"""Turns SIGINT, SIGTERM and SIGHUP into a request to stop after the current step."""

import signal
import threading

from apcnet.distributed import lost_process

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is lost; Windows has no such signal


class Interrupts:
    """Records the first SIGINT, SIGTERM or SIGHUP until the block ends.

    A second SIGINT ends the process at once. Further SIGTERMs do not: a scheduler may send one to every process, and
    torchrun forwards its own. A SIGHUP that nohup ignores stays ignored. `signal` is the number of the signal, or None.
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
            numbers = [signal.SIGINT, signal.SIGTERM]
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
                numbers.append(HANGUP)
            self._previous = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.signal is not None and lost_process(error):  # torchrun ends all processes after one has failed
            raise SystemExit(self.status) from None

    def _record(self, number, frame) -> None:
        self.signal = self.signal or number
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
