"""Splits a job over the processes that torchrun has started, and shows the progress of all of them as one."""

import time
from collections import Counter
from collections.abc import Callable
from secrets import token_hex

from apcnet.bulk.files import Report
from apcnet.distributed import gather, rank, reached, world_size
from apcnet.watch import connect

PATIENCE = 3600.0  # seconds without a finished image, which may be large, before a process is said to hang
PAUSE = 0.2  # seconds between two looks at the others

Progress = Callable[[int, int], None]


def parse_shard(text: str) -> tuple[int, int]:
    """Reads I/N: part I of N, counted from 1."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"shard: expected I/N with I from 1 to N, such as 1/4, got {text}")
    return int(index), int(count)


def split(predict: Callable[[tuple[int, int], Progress], Report], shard: tuple[int, int], show: Progress) -> Report:
    """Lets each process predict its part of a shard, and returns the report on all parts, in each process.

    A process waits until all are done: torchrun ends the others when one of them exits with an error status, and an
    image that cannot be read is such an error.

    Args:
        predict: Predicts a shard, and calls a function with the number of finished images and the total.
        shard: The part of the job that all processes have together.
        show: Called with the number of images that all processes have finished, and their total.
    """
    if world_size() == 1:
        return predict(shard, show)
    counts = _Counts(show)
    part = (shard[0] - 1) * world_size() + rank() + 1, shard[1] * world_size()
    report = predict(part, counts.progress)
    counts.wait_for_all()
    reports: list[Report] = gather(report)
    failures = [failure for each in reports for failure in each.failures]
    kinds = sum((each.kinds for each in reports), Counter())
    return Report(kinds.total(), failures, sum(each.skipped for each in reports), kinds)


class _Counts:
    """Adds up the finished images of all processes, in a store that they share."""

    def __init__(self, show: Progress):
        self.store, self.show = connect(gather(token_hex(8))[0]), show
        self.done = self.total = 0  # of this process, as the store knows them

    def progress(self, done: int, total: int) -> None:
        """Takes the numbers of this process, and shows those of all."""
        reached()
        all_done, all_total = self.store.add("done", done - self.done), self.store.add("total", total - self.total)
        self.done, self.total = done, total
        self.show(all_done, all_total)

    def wait_for_all(self) -> None:
        self.store.add("finished", 1)
        while self.store.add("finished", 0) < world_size():
            self.show(self.store.add("done", 0), self.store.add("total", 0))
            time.sleep(PAUSE)
