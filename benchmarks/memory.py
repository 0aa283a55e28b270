"""What a call needs at its peak beyond its arguments, results included.

On a CPU measured in a process of its own: what was freed before would be used again, and not be counted.
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
    """Bytes, as a function of a module finds them by peak_here."""
    if ON_GPU:  # where PyTorch counts what it allocates
        return measure(*arguments)
    program = PROGRAM.format(module=measure.__module__, name=measure.__name__)
    # What is freed goes back to the system at once: kept, it would be used again and not be counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"the measurement of memory failed:\n{run.stderr}")
    return int(run.stdout)


def peaks(measure: Callable[..., int], *arguments: str, ours: str, other: str) -> dict[str, float]:
    """The columns of a row: MiB of ours and of the other, which are the last argument."""
    sides = {"memory_mib": ours, "other_memory_mib": other}
    return {column: peak(measure, *arguments, side) / 2**20 for column, side in sides.items()}


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


def kept(call: Callable, given: set[int]) -> int:
    """Bytes that a call's forward pass keeps for the backward one, apart from the storages that are given."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sum(storages.values())


def _status(field: str) -> int:
    """Not getrusage: what it gives for a process begins with the peak of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
