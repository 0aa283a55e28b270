"""Overlaps reading, network and writing: threads work on the next items while the caller is busy with one.

`mapped` calls a function for many items in several threads, `ahead` reads in one thread, and `Behind` writes in another
one. All hold a bounded number of items, so that the faster side waits for the slower one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Given = TypeVar("Given")
Made = TypeVar("Made")
DEPTH = 3  # items that are read ahead, or wait to be written


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Gives a pool of threads; if the block fails, calls that have not begun are dropped."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def mapped(
    pool: ThreadPoolExecutor,
    function: Callable[[Given], Made],
    items: Iterable[Given],
    *,
    most: int,
    weigh: Callable[[Given | Made], int],
    limit: int,
    early: bool = False,
) -> Iterator[Made]:
    """Yields function(item) for each item, in order, computed by the threads of a pool.

    Args:
        pool: Threads that call the function.
        function: The function to call; what it raises ends the iteration.
        items: The items, which may come from an iterator that computes them when asked.
        most: Number of items that are taken before the first result is yielded.
        weigh: Returns the weight of an item until its result is there, and of the result until it is yielded.
        limit: Take no further items while those in work weigh more than this.
        early: Yield results as soon as they are there, rather than take as many items as allowed first.
    """
    waiting: deque[tuple[Given, Future[Made]]] = deque()

    def in_work() -> int:
        return sum(weigh(future.result() if _succeeded(future) else item) for item, future in waiting)

    for item in items:
        waiting.append((item, pool.submit(function, item)))
        while waiting and (len(waiting) >= most or in_work() > limit or (early and waiting[0][1].done())):
            yield waiting.popleft()[1].result()
    while waiting:
        yield waiting.popleft()[1].result()


def _succeeded(future: Future) -> bool:
    return future.done() and future.exception() is None


def ahead(items: Iterable[Item], depth: int = DEPTH) -> Iterator[Item]:
    """Yields the items of an iterable, which a thread takes from it up to `depth` items ahead."""
    iterator, end = iter(items), object()
    with threads(1) as pool:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # pyright: ignore[reportReturnType]


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
