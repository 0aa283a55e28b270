"""Times two functions in turn, so that what slows the machine down slows both: quote the median of the ratios.

On a GPU each call is timed by events on the stream, after a write that is larger than the L2 cache has gone over it.
Beside what operations take stands what the machine gives at that moment: a copy, and a product of matrices.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.setting import DEVICE, REHEARSAL, SECONDS, here

SLEEPS = (2_000_000, 16_000_000, 128_000_000)  # cycles that a GPU waits: about 1, 8 and 64 ms. What itself waits for
# the GPU is never queued ahead, and has its gaps
COLD = 256 * 2**20  # bytes written between calls on a GPU
COPIED = here(256, 256, 1) * 2**20  # bytes
MATRIX = here(2048, 8192, 64)  # rows and columns
MOST = 200  # rounds


@dataclass(frozen=True)
class Pair:
    """Seconds of ours and of the other, call by call."""

    ours: list[float]
    other: list[float]

    def row(self) -> dict[str, float]:
        times, ratios = sorted(self.ours), sorted(b / a for a, b in zip(self.ours, self.other, strict=True))
        quarter = len(ratios) // 4
        return {
            "ours_ms": 1e3 * statistics.median(times),
            "ours_low_ms": 1e3 * times[quarter],
            "ours_high_ms": 1e3 * times[-1 - quarter],
            "other_ms": 1e3 * statistics.median(self.other),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[quarter],
            "ratio_high": ratios[-1 - quarter],
            "rounds": len(ratios),
        }


def paired(
    ours: Callable,
    other: Callable,
    seconds: float = SECONDS,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> Pair:
    """At least so many rounds of one call each (one in a rehearsal), more while `seconds` allow.

    Where less than 5 will do, calls are long, and both have been made already: then there is none to warm up by.
    The clock is a CPU's, a GPU has its own.
    """
    least = 1 if REHEARSAL else rounds
    if least >= 5:
        for function in (ours, other):
            time_one(function, clock)
    pair, start = Pair([], []), time.perf_counter()
    while len(pair.ours) < least or (time.perf_counter() - start < seconds and len(pair.ours) < MOST):
        pair.ours.append(time_one(ours, clock))
        pair.other.append(time_one(other, clock))
    return pair


def rates(seconds: float, moved: int, operations: int, dtype: torch.dtype) -> dict[str, float]:
    """What a call makes of the machine: bytes that have to move, over a copy's, and operations, over a product's."""
    copied, threads = moved / seconds, torch.get_num_threads()
    found = {"bytes": moved, "gb_per_s": copied / 1e9, "percent_of_copy": 100 * copied / copy_bandwidth(threads)}
    if operations:
        rate = operations / seconds
        found |= {"operations": operations, "gflop_per_s": rate / 1e9}
        found["percent_of_matrix"] = 100 * rate / matrix_rate(dtype, threads)
    return found


@functools.cache
def copy_bandwidth(threads: int) -> float:
    """Bytes a second that the fastest of some plain copies reads and writes here: memory-bound work's measure."""
    source = torch.ones(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(time_one(lambda: target.copy_(source)) for _ in range(20))


@functools.cache
def matrix_rate(dtype: torch.dtype, threads: int) -> float:
    """Operations a second of a product of square matrices here, in a run of its own for each number of threads."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=DEVICE).to(dtype)
    times = [time_one(lambda: a @ b) for _ in range(7)]
    return 2 * MATRIX**3 / statistics.median(times[2:])


def time_one(function: Callable, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds."""
    if DEVICE == "cuda":
        return _time_on_gpu(function)
    start = clock()
    function()
    return clock() - start


def _time_on_gpu(function: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in SLEEPS:
        torch.empty(COLD, dtype=torch.int8, device="cuda").zero_()
        torch.cuda._sleep(cycles)
        start.record()
        function()
        queued = not start.query()  # all of it, before the GPU came to the first launch: no gap is Python's
        end.record()
        end.synchronize()
        if queued:
            break
    return start.elapsed_time(end) / 1e3
