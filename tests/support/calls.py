"""Counts the computing calls of a function: operators that compute, and launches of Triton kernels.

The operators of apc_kernels count for what they call: their kernels, and PyTorch's operators around them. Views and
allocations compute nothing.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from apc_kernels.ops import common

NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"}
NOTHING |= {"fill_"}  # conftest.py fills fresh memory with NaN


class Calls(TorchDispatchMode):
    """Counts the computing operators that are called inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace == "apc_kernels":
            with self:  # what its Python code calls comes here again
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        if not (func.is_view or name in NOTHING):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def count(function: Callable[[], object]) -> Counter:
    """Returns how often the function, on CPU tensors, calls each operator and Triton kernel."""
    launched, launch = Counter(), common.run

    def run(launches, x):
        launched.update(kernel.fn.__name__ for kernel, *_ in launches)
        with _disable_current_modes():  # the interpreter calls PyTorch
            launch(launches, x)

    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            if module.__name__.startswith("apc_kernels") and getattr(module, "run", None) is launch:
                stack.enter_context(mock.patch.object(module, "run", run))
        counted = stack.enter_context(Calls())
        function()
    return counted.calls + launched
