"""What a call needs at its peak beyond its arguments, results included.

Measured in a process of its own: what was freed before would be used again, and not be counted. A benchmark offers
`python -m benchmarks.<name> --peak ARGUMENTS`, which prints peak_here(...); peak(...) starts that.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import ROOT


def peak(benchmark: str, *arguments: str) -> int:
    """Bytes, as `python -m benchmark --peak arguments` finds them."""
    command = [sys.executable, "-m", benchmark, "--peak", *arguments]
    # What is freed goes back to the system at once: kept, it would be used again and not be counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the measurement of memory failed:\n{run.stderr}")
    return int(run.stdout)


def peak_here(function: Callable, device: str) -> int:
    """Bytes. Libraries should have been loaded, and threads started, by a smaller call."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is resident now
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Not getrusage: what it gives for a process begins with the peak of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
