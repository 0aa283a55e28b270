"""Lists the instruction sets that the C++ kernels are compiled for, and skips the one that all tests use."""

import pytest

from apc_kernels import info

others = pytest.mark.parametrize("isa", ["x86-64", "x86-64-v3", "x86-64-v4"])


def skip_the_one_in_use(isa: str) -> None:
    """Skips the set that this process has chosen, because all other tests use it."""
    if isa == info.kernels("cpu")["instructions"]:  # the first call loads the library
        pytest.skip(f"{isa} is what all other tests run on")
