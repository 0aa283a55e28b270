"""What a call needs at its peak beyond its arguments, results included.

On a CPU measured in a process of its own: what was freed before would be used again, and not be counted. A benchmark
has a function `peak_of(*arguments: str)`, which returns peak_here(...) of one of its calls;

    python -m benchmarks.memory benchmarks.encode nchw forward auto

calls it and prints the bytes, and peak("benchmarks.encode", "nchw", "forward", "auto") starts that.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import apc_kernels
from benchmarks import ROOT, setting
from benchmarks.setting import DEVICE, ON_GPU


def peak(benchmark: str, *arguments: str) -> int:
    """Bytes, as the benchmark's peak_of finds them."""
    if ON_GPU:  # where PyTorch counts what it allocates
        return import_module(benchmark).peak_of(*arguments)
    command = [sys.executable, "-m", "benchmarks.memory", benchmark, *arguments]
    # What is freed goes back to the system at once: kept, it would be used again and not be counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the measurement of memory failed:\n{run.stderr}")
    return int(run.stdout)


def peaks(
    benchmark: str, *arguments: str, ours: str = "auto", other: str = "stock", compiled: bool = False
) -> dict[str, float]:
    """The columns of a row: MiB of ours and of the other (", compiled"), which are the last argument of peak_of."""
    return {
        f"{prefix}memory_mib": peak(benchmark, *arguments, side) / 2**20
        for prefix, side in (("", ours), ("other_", other + ", compiled" * compiled))
    }


def peak_here(function: Callable) -> int:
    """Bytes. Libraries should have been loaded, and threads started, by a smaller call; what is compiled, compiled."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # pages that lie free in the heap would be used again as well
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def peak_of_side(side: str, ours: Callable, stock: Callable, ready: Callable, case: Any, small: Any) -> int:
    """What peak_of returns for an operation.

    Args:
        side: a backend for ours, or "stock", or "stock, compiled".
        ready: makes a call of one of the two functions in a case.
        small: the case of a call that goes before; what is compiled is compiled for one case alone.
    """
    theirs, compiled = side.startswith("stock"), side.endswith("compiled")
    function = stock if theirs else ours
    function = setting.compile_anew(function) if compiled else function
    first, call = (ready(function, some) for some in (case if compiled else small, case))
    with apc_kernels.backend("auto" if theirs else side):
        first()
        return peak_here(call)


def _status(field: str) -> int:
    """Not getrusage: what it gives for a process begins with the peak of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("python -m benchmarks.memory BENCHMARK [ARGUMENT …]: a module's name, and what its peak_of takes")
    print(import_module(sys.argv[1]).peak_of(*sys.argv[2:]))


if __name__ == "__main__":
    main()
