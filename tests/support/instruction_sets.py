"""The instruction sets that the C++ kernels are compiled for, and which of them a test has to ask for."""

import pytest
import torch

others = pytest.mark.parametrize("isa", ["x86-64", "x86-64-v3", "x86-64-v4"])


def skip_the_one_in_use(isa: str) -> None:
    """All other tests are of the set that this process has chosen."""
    if isa == torch.ops.apc_kernels_cpp.instruction_set():
        pytest.skip(f"{isa} is what all other tests run on")
