"""Provides helpers that several operations share: argument checks, the working precision, Triton launches."""
# pyright: reportPrivateUsage=false
# PyTorch tells under these names alone whether something traces, transforms or differentiates a call.

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from apc_kernels.dispatch import FLOATS


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got one in {tensor.layout}")


def check_flag(value: bool, name: str) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {name_of(tensor.dtype)}")


def working_dtype(x: Tensor) -> torch.dtype:
    """Returns the precision that sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def working(x: Tensor) -> Tensor:
    return x.to(working_dtype(x))


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which autocast rounds nothing; it leaves no trace in a graph if autocast is off."""
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def runs_eagerly() -> bool:
    """Tells whether calls run at once: nothing traces, transforms or records them, and no mode changes them."""
    return not (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def only_computes(*tensors: Tensor | None) -> bool:
    """Tells whether a call on these tensors only computes: it runs at once, and is not differentiated."""
    if not runs_eagerly() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        return False
    return all(map(is_plain, tensors))


PLAIN = frozenset((Tensor, torch.nn.Parameter))  # types that replace no operators


PLAIN_ARGUMENTS = PLAIN.union(map(type, (None, 0, 0.0, True, "", [], ()))) | {torch.Size}


def are_plain(arguments: Sequence[Any]) -> bool:
    """Tells whether an operator's arguments, but for members of lists, are of no type that replaces operators."""
    return PLAIN_ARGUMENTS.issuperset(map(type, arguments))


def is_plain(tensor: Tensor | None) -> bool:
    """Tells whether a tensor, if there is one, holds numbers and is of no subclass that replaces operators."""
    return tensor is None or (type(tensor) in PLAIN and not tensor.is_meta)


def widened(tensor: Tensor, name: str, x: Tensor) -> Tensor:
    """Returns a small tensor in the working precision of the map x if autocast has rounded it, else unchanged."""
    check_tensor(tensor, name)
    if tensor.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type):
        return tensor.to(working_dtype(x))
    return tensor


def check_small(tensor: Tensor, name: str, shapes: Sequence[tuple[int, ...]], x: Tensor) -> Tensor:
    """Checks a small tensor and returns it: one of the shapes, on x's device, float32 (float64 if x is float64)."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not working_dtype(x) or tensor.layout is not torch.strided:
        tensor = _checked_dtype(tensor, name, x)
    for shape in shapes:
        # Ranks first: comparing (B, J) with (J,) would tie B to J in an exported program.
        if tensor.dim() == len(shape) and tensor.shape == shape:
            break
    else:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected {allowed}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected a tensor on x's device, {x.device}, got one on {tensor.device}")
    return tensor


def _checked_dtype(tensor: Tensor, name: str, x: Tensor) -> Tensor:
    tensor, expected = widened(tensor, name, x), working_dtype(x)
    if tensor.dtype != expected:
        given, of_map = name_of(tensor.dtype), name_of(x.dtype)
        raise ValueError(f"{name}: expected {name_of(expected)} for a map in {of_map}, got {given}")
    return tensor


def as_scales(scales: Sequence[int]) -> list[int]:
    try:
        return list(map(operator.index, scales))
    except TypeError:
        raise TypeError(f"scales: expected a sequence of integers, got {scales!r}") from None


def regions_of(scales: Sequence[int]) -> int:
    """Returns the number of regions of all scales, Σ s²."""
    return sum(map(operator.mul, scales, scales))


def check_scales(scales: Sequence[int], most: int, largest: int) -> list[int]:
    scales = as_scales(scales)
    if not 1 <= len(scales) <= most:
        raise ValueError(f"scales: expected 1 to {most} scales, got {len(scales)}")
    if min(scales) < 1 or max(scales) > largest:
        raise ValueError(f"scales: expected scales of 1 to {largest}, got {tuple(scales)}")
    return scales


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Tells whether the strides, in any order, leave neither gap nor overlap between the elements."""
    if 0 in size:
        return min(stride) >= 0
    expected = 1
    for step, n in sorted((step, n) for n, step in zip(size, stride, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return min(stride) >= 0


def run(launches: list[tuple[Any, ...]], x: Tensor) -> None:
    """Runs Triton launches (kernel, grid, arguments) on x's device."""
    with torch.cuda.device_of(x):
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)
