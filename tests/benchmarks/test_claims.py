"""Tests the README's claims of memory and speed that hold on any machine, with generous slack.

Figures are those of benchmarks/results; here stands what has to hold anywhere that the CPU library runs, on one thread.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import MapCase
from head_cases import CodeCase
from upsample_cases import UpsampleCase

from apc_kernels import info
from benchmarks.operation import BOTH
from benchmarks.run import OPERATIONS, Row, sides
from benchmarks.setting import DEVICE, DTYPE
from benchmarks.timing import paired

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
PEAKS = {  # MiB beyond the arguments, results included; (2, 150, 64, 64) to 512×512 takes PyTorch 900, 304, 304 and 600
    "upsample_cross_entropy": 0.05 * 900,
    "cross_entropy_and_dice": 0.05 * 900,  # PyTorch takes twice as much
    "upsample_argmax": 10,
    "upsample_confusion": 10,
    "upsample_softmax": 10,
    "encode": 0.1 * 1280,
}
MEASURED = f"""
import json, sys
sys.path[:] = {sys.path!r}  # the same packages as here
import torch
from benchmarks.run import OPERATIONS, peak_of
torch.set_num_threads(1)
entries = [OPERATIONS[name] for name in {[*PEAKS]}]
given = [(entry.name, str(entry.cases[0]), "nchw", entry.directions[-1]) for entry in entries]
print(json.dumps({{each[0]: peak_of(*each, "PyTorch" if each[0] == "encode" else "cpp") for each in given}}))
"""

needs_library = pytest.mark.skipif(
    DEVICE != "cpu" or info.why_not("cpp", "pyramid_pool", "cpu", DTYPE) is not None,
    reason="needs the CPU library, and no GPU that benchmarks would take instead",
)


def clears_peaks() -> bool:
    """Returns True if this system can reset a process's peak of memory."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def peaks():
    if not clears_peaks():
        pytest.skip("needs a Linux that lets a process reset the peak of its memory")
    keep_nothing = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURED]
    run = subprocess.run(command, cwd="/", env=os.environ | keep_nothing, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_library
@pytest.mark.parametrize("what", PEAKS)
def test_peak_of_memory(peaks, what):
    assert 0 <= peaks[what] / MIB <= PEAKS[what]


SMALL = UpsampleCase(1, 150, (32, 32), (256, 256))
FASTER = {  # an operation's case and direction, and how many times as fast ours has to be at least
    "upsample_cross_entropy": (SMALL, BOTH, 2.5),
    "cross_entropy_and_dice": (SMALL, BOTH, 4),
    "upsample_argmax": (SMALL, "", 5),
    "encode": (CodeCase(1, 256, (48, 48), 32), BOTH, 5),
    "pyramid_pool": (MapCase((1, 512, 64, 64)), BOTH, 2),
}


@needs_library
@pytest.mark.parametrize("what", FASTER)
def test_faster(threads, what):
    threads(1)
    (case, direction, least), operation = FASTER[what], OPERATIONS[what]
    (other,) = operation.others
    calls, _ = sides(Row(operation, case, "nchw", direction, "cpp" if operation.kernel else "PyTorch", other))
    assert paired(calls.ours, calls.theirs, seconds=0, rounds=3).row()["ratio"] >= least
