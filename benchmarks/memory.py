"""Measures the memory that a call needs at its peak beyond its arguments, results included.

On a CPU it runs in a process of its own, because memory that was freed before would be used again and not be counted.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.setting import DEVICE, ON_GPU

PROGRAM = "import sys; from {module} import {name}; print({name}(*sys.argv[1:]))"


def peak(measure: Callable[..., int], *arguments: str) -> int:
    """Returns the bytes at the peak: calls `measure`, which calls peak_here, in a process of its own on a CPU."""
    if ON_GPU:  # PyTorch counts its allocations there
        return measure(*arguments)
    program = PROGRAM.format(module=measure.__module__, name=measure.__name__)
    # Freed memory goes back to the system at once: otherwise it would be used again and not be counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the process that measures memory failed:\n{run.stderr}")
    return int(run.stdout)


def peaks(measure: Callable[..., int], *arguments: str, ours: str, other: str) -> dict[str, float]:
    """Returns a row's columns of memory in MiB: calls `measure` with each side as the last argument."""
    sides = {"memory_mib": ours, "other_memory_mib": other}
    return {column: peak(measure, *arguments, side) / 2**20 for column, side in sides.items()}


def peak_here(function: Callable) -> int:
    """Returns the bytes at the peak of a call; make a smaller call first, which loads libraries and starts threads."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # free pages of the heap would be used again and not be counted
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Reads bytes from /proc/self/status, because getrusage starts with the peak of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
