"""Lists the instruction sets that the C++ kernels are compiled for, and runs programs on the others."""

import os
import sys
from pathlib import Path

import forked
import pytest
import torch

from apc_kernels import library

others = pytest.mark.parametrize("isa", ["x86-64", "x86-64-v3", "x86-64-v4"])

TESTS = Path(__file__).resolve().parents[1] / "apc_kernels"


def run(isa: str, program: str) -> None:
    """Runs a program, which may import tests of apc_kernels, on an instruction set, in a process: it is chosen once.

    It skips a set that the processor lacks, and the one that this process has chosen, because all other tests use it.
    """
    library.cpu()  # loads it
    if isa == torch.ops.apc_kernels_cpp.instruction_set():
        pytest.skip(f"{isa} is what all other tests run on")
    finished = forked.run(
        ["-c", f"{program}\nassert torch.ops.apc_kernels_cpp.instruction_set() == {isa!r}"],
        env=os.environ | {"APC_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join(map(str, (TESTS, *sys.path)))},
    )
    if "this processor allows" in finished.stderr:
        pytest.skip(f"needs a processor with {isa}")
    assert finished.returncode == 0, finished.stderr
