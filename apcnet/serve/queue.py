"""Runs the work of many requests in one thread, and work of one kind that arrives together in one call.

    queue = BatchQueue()
    future = queue.submit("upper", "a", lambda texts: [text.upper() for text in texts], most=8)
    future.result().value

The thread takes the oldest work first, and with it all other work of the same key, up to `most`. If there is less than
that, it waits for more, but no longer than `wait` seconds after the oldest arrived. Work that is cancelled before its
turn is dropped.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

Run = Callable[[Sequence[Any]], Sequence[Any]]


class Done(NamedTuple):
    """Holds the result of a piece of work.

    Attributes:
        value: The result.
        waited: Seconds from the arrival of the work to its start.
        took: Seconds that its batch took.
    """

    value: Any
    waited: float
    took: float


class _Work(NamedTuple):
    """Holds a piece of work that waits; all work of a key has the same functions."""

    key: Hashable
    item: Any
    run: Run
    most: int
    since: float
    future: Future


class BatchQueue:
    """Runs work in a thread of its own, in batches.

    Args:
        wait: Seconds to wait at most for further work of a batch.
        on_batch: Function that the thread calls after each batch with its number of items and its seconds.
    """

    def __init__(self, wait: float = 0.0, on_batch: Callable[[int, float], None] = lambda size, seconds: None):
        self.wait, self.on_batch = wait, on_batch
        self._waiting: deque[_Work] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="apcnet network", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Returns the number of items that wait."""
        return len(self._waiting)

    @property
    def is_running(self) -> bool:
        """Tells whether the queue takes work."""
        return self._thread.is_alive() and not self._closed

    def submit(self, key: Hashable, item: Any, run: Run, most: int = 1) -> "Future[Done]":
        """Puts an item into the queue.

        Args:
            key: Items of equal keys may form a batch.
            item: The item.
            run: Function that maps a list of items to the list of their results; it is called in the queue's thread.
            most: Largest number of items in a batch.

        Returns:
            A future of `Done`; cancelling it drops the item if its batch has not begun.
        """
        work = _Work(key, item, run, most, time.monotonic(), Future())
        with self._changed:
            if self._closed:
                raise RuntimeError("queue: expected one that is open, got one that is closed")
            self._waiting.append(work)
            self._changed.notify()
        return work.future

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more work, finishes what waits, and returns whether that took less than `timeout` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            start = time.monotonic()
            begun = [work for work in batch if work.future.set_running_or_notify_cancel()]
            if not begun:
                continue
            try:
                values = begun[0].run([work.item for work in begun])
                if len(values) != len(begun):
                    raise ValueError(f"run: expected a result for each of {len(begun)} items, got {len(values)}")
            except BaseException as error:
                for work in begun:
                    work.future.set_exception(error)
                continue
            took = time.monotonic() - start
            self.on_batch(len(begun), took)
            for work, value in zip(begun, values, strict=True):
                work.future.set_result(Done(value, start - work.since, took))

    def _next_batch(self) -> list[_Work] | None:
        """Waits for work, and takes it out; None if the queue is closed and empty."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            first = self._waiting[0]
            while self._count(first) < first.most and not self._closed:
                left = first.since + self.wait - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[_Work] = []
            others: deque[_Work] = deque()
            for work in self._waiting:
                is_one = work.key == first.key and len(batch) < first.most
                (batch if is_one else others).append(work)
            self._waiting = others
            return batch

    def _count(self, first: _Work) -> int:
        return sum(work.key == first.key for work in self._waiting)
