"""Overlaps reading, network and writing: `ahead` reads in a thread, and `Behind` writes in another one.

Both hold a bounded number of items, so that the faster side waits for the slower one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
DEPTH = 3  # items that are read ahead, or wait to be written


def ahead(items: Iterable[Item], depth: int = DEPTH) -> Iterator[Item]:
    """Yields the items of an iterable, which a thread takes from it up to `depth` items ahead."""
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # pyright: ignore[reportReturnType]
    finally:
        pool.shutdown(cancel_futures=True)


class Behind:
    """Runs calls in a thread, one after another, until its block ends; an error appears in a later call or at the end.

    A call waits while `depth` earlier ones are not done. If the block raises an error, calls that wait are dropped.
    """

    def __init__(self, depth: int = DEPTH):
        self.depth, self.waiting = depth, deque[Future]()
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, function: Callable[..., object], *arguments: Any) -> None:
        while len(self.waiting) >= self.depth:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(function, *arguments))

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            while self.waiting and kind is None:
                self.waiting.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)
