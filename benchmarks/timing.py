"""Times two functions in turn, so that a slow machine slows both: quote the median of the ratios.

On a GPU each call is timed by events on the stream, after a write larger than the L2 cache has cleared it. The times of
operations are related to what the machine reaches at that moment in a copy and in a product of matrices.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.setting import DEVICE, REHEARSAL, SECONDS, here

# Cycles that a GPU waits before a timed call, about 1, 8 and 64 ms, so that its launches are queued ahead. A call that
# waits for the GPU itself is never queued ahead, and its gaps are measured.
SLEEPS = (2_000_000, 16_000_000, 128_000_000)
COLD = 256 * 2**20  # bytes written between calls on a GPU
COPIED = (1 if REHEARSAL else 256) * 2**20  # bytes
MATRIX = 64 if REHEARSAL else here(2048, 8192)  # rows and columns
MAX_ROUNDS = 200


class Pair(NamedTuple):
    """Holds the seconds of our calls and of the other side's, in the order of measurement."""

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
    """Times both functions in turn, for at least `rounds` rounds (one in a rehearsal), and more until `seconds` pass.

    Both are called once before, to warm up, unless `rounds` is below 5: then calls are long, and have been made before.
    The clock is for a CPU; a GPU has its own.
    """
    least = 1 if REHEARSAL else rounds
    if least >= 5:
        for function in (ours, other):
            time_one(function, clock)
    pair, start = Pair([], []), time.perf_counter()
    while len(pair.ours) < least or (time.perf_counter() - start < seconds and len(pair.ours) < MAX_ROUNDS):
        pair.ours.append(time_one(ours, clock))
        pair.other.append(time_one(other, clock))
    return pair


def rates(seconds: float, moved: int, operations: int, dtype: torch.dtype) -> dict[str, float]:
    """Relates a call to the machine: its bytes a second to a copy's, its operations a second to a matrix product's."""
    copied, threads = moved / seconds, torch.get_num_threads()
    found = {"bytes": moved, "gb_per_s": copied / 1e9, "percent_of_copy": 100 * copied / copy_bandwidth(threads)}
    if operations:
        rate = operations / seconds
        found |= {"operations": operations, "gflop_per_s": rate / 1e9}
        found["percent_of_matrix"] = 100 * rate / matrix_rate(dtype, threads)
    return found


@functools.cache
def copy_bandwidth(threads: int) -> float:
    """Measures the bytes a second that the fastest of 20 plain copies reads and writes."""
    source = torch.ones(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(time_one(lambda: target.copy_(source)) for _ in range(20))


@functools.cache
def matrix_rate(dtype: torch.dtype, threads: int) -> float:
    """Measures the operations a second of a product of square matrices, once for each number of threads."""
    a, b = torch.randn(2, MATRIX, MATRIX, device=DEVICE).to(dtype)
    times = [time_one(lambda: a @ b) for _ in range(7)]
    return 2 * MATRIX**3 / statistics.median(times[2:])


def time_one(function: Callable, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the seconds that one call takes."""
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
        queued = not start.query()  # all launches are queued before the GPU starts: no gap comes from Python
        end.record()
        end.synchronize()
        if queued:
            break
    return start.elapsed_time(end) / 1e3
