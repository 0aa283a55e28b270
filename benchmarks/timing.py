"""Times two functions in turn, so that what slows the machine down slows both: quote the median of the ratios.

On a GPU each call is timed by events on the stream, after a write that is larger than the L2 cache has gone over it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

COLD = 256 * 2**20  # bytes written between calls on a GPU


@dataclass(frozen=True)
class Pair:
    """Seconds of ours and of the other, call by call."""

    ours: list[float]
    other: list[float]

    def row(self) -> dict[str, float]:
        ratios = sorted(other / ours for ours, other in zip(self.ours, self.other, strict=True))
        quarter = len(ratios) // 4
        return {
            "ours_ms": 1e3 * statistics.median(self.ours),
            "other_ms": 1e3 * statistics.median(self.other),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[quarter],
            "ratio_high": ratios[-1 - quarter],
            "rounds": len(ratios),
        }


def paired(ours: Callable, other: Callable, device: str = "cpu", seconds: float = 2.0) -> Pair:
    """At least 7 rounds of one call each, more while `seconds` allow."""
    time_one = _time_on_gpu if device == "cuda" else _time_on_cpu
    for function in (ours, other):
        time_one(function)
    pair, start = Pair([], []), time.perf_counter()
    while len(pair.ours) < 7 or (time.perf_counter() - start < seconds and len(pair.ours) < 200):
        pair.ours.append(time_one(ours))
        pair.other.append(time_one(other))
    return pair


def result_row(
    operation: str, case: str, backend: str, other: str, pair: Pair, bytes_moved: int, device: str, **more: float
) -> dict:
    """A row of a results file: what was measured beside what, and the bytes that had to move over a copy's."""
    row = {"operation": operation, "case": case, "other": other, "backend": backend, **pair.row(), **more}
    row["gb_per_s"] = bytes_moved / 1e6 / row["ours_ms"]
    row["percent_of_copy"] = 100e9 * row["gb_per_s"] / copy_bandwidth(device)
    return row


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes a second that a plain copy of 256 MB reads and writes here, now: what memory-bound work is measured by."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    time_one = _time_on_gpu if device == "cuda" else _time_on_cpu
    times = [time_one(lambda: target.copy_(source)) for _ in range(9)]
    return 2 * source.numel() * source.element_size() / statistics.median(times[2:])


def _time_on_cpu(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _time_on_gpu(function: Callable) -> float:
    torch.empty(COLD, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond: the launches below are queued before the first one starts
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
