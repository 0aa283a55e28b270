"""Overlaps the steps of a job: threads work on the next items while the caller is busy with one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


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
