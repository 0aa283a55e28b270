"""Judges what happens to bad input: it works and is right, or it gets an error that names it; anything else fails."""

import signal
from collections.abc import Callable
from contextlib import contextmanager

NAMED = (ValueError, TypeError, OSError, FloatingPointError)


@contextmanager
def within(seconds: int):
    """Raises a TimeoutError in the main thread where the block takes longer than this."""

    def stop(*_):
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(call: Callable[[], object], right: Callable[[object], bool], *names: str, seconds: int = 10) -> str:
    """Returns "right" or "named", or raises an AssertionError that says what else happened.

    An error has to hold one of the names.
    """
    try:
        with within(seconds):
            result = call()
    except NAMED as error:
        text = str(error)
        assert any(name in text for name in names), f"the error names none of {names}: {type(error).__name__}: {text}"
        assert "\n" not in text, f"the error has several lines: {text}"
        return "named"
    assert right(result), "accepted in silence, and the result is wrong"
    return "right"
