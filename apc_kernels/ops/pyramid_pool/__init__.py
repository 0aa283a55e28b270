"""Implements pyramid_pool: adaptive average pooling at several scales in one read of the map."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.common import as_scales, check_dtype, check_scales, check_tensor, is_dense, regions_of
from apc_kernels.ops.operator import Operator, define, fill
from apc_kernels.ops.pyramid_pool import reference

MAX_SCALES, MAX_SCALE = 64, 32768
MAX_SIZE = 2**31  # of an axis, exclusive
# On a GPU the reference serves larger maps (csrc/pyramid_pool/pyramid_pool.cuh).
MAX_GPU_SIZE, MAX_GPU_COLUMNS, MAX_GPU_CHANNELS = 8192, 512, 2**21


def pyramid_pool(x: Tensor, scales: Sequence[int] = (1, 2, 3, 6)) -> Tensor:
    """Averages a map over the s×s bins of every scale s, in one read of the map.

        out[b, c, offset(s) + i·s + j] = mean of x[b, c, y, x] over y in bin i of h, x in bin j of w
        bin i of n positions: floor(i·n/s) … ceil((i+1)·n/s) − 1

    Equivalent to:

        pooled = [F.adaptive_avg_pool2d(x, s).flatten(2) for s in scales]
        torch.cat(pooled, 2)

    Args:
        x: (B, C, h, w), float32, bfloat16, float16 or float64. NCHW and channels_last maps, and slices of them with
            adjacent columns or channels, are read in place; any other layout is copied once. On a GPU the reference
            serves maps of more than 8192 rows or columns, or more than two million channels.
        scales: 1 to 64 numbers of bins, up to 32768 each; a scale may exceed h or w. On a GPU the reference serves
            scales that add up to more than 512.

    Returns:
        (B, C, J), J = Σ s², contiguous, in x's dtype: scale by scale in the given order, each row-major. Sums are kept
        in float32 (float64 for float64).

    Nothing is saved for backward but the size of x; the gradient has the strides of torch.empty_like(x). The operation
    is differentiable any number of times by torch.autograd (not by torch.func.grad, which does not see through custom
    operators), and deterministic to the bit. Autocast leaves x's dtype alone. An infinity or NaN stays in the bins that
    contain it, except in the reference and in exported models, whose matrix products spread it over a row and column.
    """
    check_tensor(x, "x")
    return _pool(x, as_scales(scales))


def _triton() -> ModuleType:
    from apc_kernels.ops.pyramid_pool import triton

    return triton


KERNELS = Kernels(reference, triton=_triton, cuda=True)


def _limits(size: Sequence[int], scales: Sequence[int]) -> dict[str, str]:
    """Returns the reasons why GPU kernels cannot take a call, by backend."""
    if max(size[2:]) <= MAX_GPU_SIZE and size[1] <= MAX_GPU_CHANNELS and sum(scales) <= MAX_GPU_COLUMNS:
        return {}
    reason = (
        f"the kernels take up to {MAX_GPU_SIZE} rows and columns, {MAX_GPU_CHANNELS} channels and scales adding up to "
        f"{MAX_GPU_COLUMNS}; the map is {tuple(size)}, the scales add up to {sum(scales)}"
    )
    return {"triton": reason, "cuda": reason}


def _check(x: Tensor, scales: Sequence[int]) -> tuple[Tensor, list[int]]:
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions (B, C, h, w), got {x.dim()}: {tuple(x.shape)}")
    check_dtype(x, "x")
    _check_size(x.shape, "x")
    return x, check_scales(scales, MAX_SCALES, MAX_SCALE)


def _check_size(size: Sequence[int], name: str) -> None:
    if not (1 <= size[2] < MAX_SIZE and 1 <= size[3] < MAX_SIZE):
        raise ValueError(f"{name}: expected a height and width of 1 to {MAX_SIZE - 1}, got {tuple(size)}")


def _gradient(grad: Tensor, scales: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Computes the gradient of x, a map of the given size and strides, from the gradient of the result."""
    grad_x = _empty_gradient(grad, scales, size, stride)
    if not (grad_x.is_contiguous() or is_dense(size, stride)):
        raise ValueError(f"stride: expected the strides of a dense map of {tuple(size)}, got {tuple(stride)}")
    on = grad, _limits(size, scales)
    fill(KERNELS, "pyramid_pool_backward", on, (grad, scales), grad_x, for_reference=(size,))
    return grad_x


def _empty_gradient(grad: Tensor, scales: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> Tensor:
    scales = check_scales(scales, MAX_SCALES, MAX_SCALE)
    check_dtype(grad, "grad")
    if len(size) != 4 or len(stride) != 4:
        raise ValueError(f"size, stride: expected 4 numbers each, got {tuple(size)} and {tuple(stride)}")
    _check_size(size, "size")
    expected = (size[0], size[1], regions_of(scales))
    if tuple(grad.shape) != expected:
        raise ValueError(f"grad: expected {expected} for a map of {tuple(size)}, got {tuple(grad.shape)}")
    return grad.new_empty_strided(size, stride)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.scales = inputs
    ctx.size = x.shape
    ctx.stride = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


_pool = Operator(
    "pyramid_pool(Tensor x, SymInt[] scales) -> Tensor",
    KERNELS,
    _check,
    on=lambda x, scales: (x, _limits(x.shape, scales)),
    empty=lambda x, scales: x.new_empty(*x.shape[:2], regions_of(scales)),
    backward=lambda ctx, grad: (_backward(grad, ctx.scales, ctx.size, ctx.stride), None),
    remember=_remember,
)

# The pooling is linear: the gradient of its gradient is the pooling again.
_backward = define(
    "pyramid_pool_backward(Tensor grad, SymInt[] scales, SymInt[] size, SymInt[] stride) -> Tensor",
    _gradient,
    _empty_gradient,
    backward=lambda ctx, grad: (_pool(grad, ctx.scales), None, None, None),
    remember=lambda ctx, inputs, output: setattr(ctx, "scales", inputs[1]),
)
