"""What several operations share."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


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
