"""What several operations share."""

import contextlib
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apc_kernels import dispatch


def check_dtype(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        given = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {given}")


def working(x: Tensor) -> Tensor:
    """x in the precision that sums are kept in: float64 as it is, everything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Keeps autocast from rounding a reference's products; leaves no trace in a graph where autocast is off."""
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def reads_in_place(x: Tensor) -> bool:
    """Whether kernels take this map's layout: columns (NCHW) or channels (NHWC) side by side."""
    return x.stride(3) == 1 or x.stride(1) == 1 or x.shape[3] == 1 or x.shape[1] == 1


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides, in whatever order, put the elements of a size side by side without gap or overlap."""
    if 0 in size:
        return min(stride) >= 0
    expected = 1
    for step, n in sorted((step, n) for n, step in zip(size, stride, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= n
    return min(stride) >= 0


def run(launches: list[tuple], x: Tensor) -> None:
    """Runs Triton launches (kernel, grid, arguments) on x's device."""
    with torch.cuda.device_of(x):
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)


def check_small(tensor: Tensor, name: str, shapes: Sequence[tuple[int, ...]], x: Tensor) -> Tensor:
    """A tensor that goes beside the map x: one of the shapes, x's device, float32 (float64 beside float64).

    Under autocast it may come in low precision, out of a convolution say, and is widened.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    # Ranks first: comparing (B, J) with (J,) would tie B to J in an exported program.
    if all(tensor.dim() != len(shape) or tuple(tensor.shape) != shape for shape in shapes):
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected {allowed}, got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected a tensor on x's device, {x.device}, got one on {tensor.device}")
    expected = torch.float64 if x.dtype == torch.float64 else torch.float32
    if tensor.dtype != expected:
        if tensor.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type):
            return tensor.to(expected)
        given, beside = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, x.dtype))
        raise ValueError(f"{name}: expected {str(expected)[6:]} beside a map in {beside}, got {given}")
    return tensor


def check_scales(scales: Sequence[int], most: int, largest: int) -> list[int]:
    try:
        scales = [operator.index(s) for s in scales]
    except TypeError:
        raise TypeError(f"scales: expected a sequence of integers, got {scales!r}") from None
    if not 1 <= len(scales) <= most:
        raise ValueError(f"scales: expected 1 to {most} scales, got {len(scales)}")
    if min(scales) < 1 or max(scales) > largest:
        raise ValueError(f"scales: expected scales of 1 to {largest}, got {tuple(scales)}")
    return scales


def call(
    folder: str,
    function: str,
    x: Tensor,
    limits: Mapping[str, str],
    arguments: Sequence,
    results: Sequence[Tensor],
) -> None:
    """Runs a raw function on the backend that serves it. Every backend has it with these arguments and results.

    Kernels take small tensors contiguous and maps in any layout that reads_in_place; the reference takes everything.
    """
    name = dispatch.select(function, x, limits)
    function = getattr(dispatch.kernels(name, folder), function)
    if not x.numel():
        for result in results:
            result.zero_()
        return
    if name == "reference":
        computed = function(*arguments)
        for result, value in zip(results, [computed] if isinstance(computed, Tensor) else computed, strict=True):
            result.copy_(value)
        return
    written = [readable(result) for result in results]
    function(*map(readable, arguments), *written)
    for result, target in zip(results, written, strict=True):
        if target is not result:
            result.copy_(target)


def readable(argument):
    """What kernels take in its place: a copy of a tensor that they cannot read where it lies, all else as it is."""
    if not isinstance(argument, Tensor) or (argument.dim() == 4 and reads_in_place(argument)):
        return argument
    return argument.contiguous()
