"""Implements pyramid_conv: a convolution of the bilinearly upsampled pyramid, without upsampling it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.autograd import EagerFunction
from apc_kernels.ops.common import (
    PLAIN,
    as_scales,
    check_dtype,
    check_flag,
    check_scales,
    check_tensor,
    name_of,
    runs_eagerly,
)
from apc_kernels.ops.interpolation import as_size, check_extent
from apc_kernels.ops.operator import reads_in_place
from apc_kernels.ops.pyramid_conv import reference

MAX_SCALES, MAX_SCALE = 64, 32768


def pyramid_conv(
    regions: Tensor,
    weight: Tensor,
    size: Sequence[int],
    scales: Sequence[int],
    *,
    align_corners: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Convolves the upsampled and concatenated grids of regions of several scales, without upsampling them.

    The convolution is linear in the few region vectors, and bilinear interpolation is one matrix for each axis:

        out = Σ_scales M_y · (regions · taps) · M_xᵀ        M_y: (h, s·k), M_x: (w, s·k)

    Equivalent to:

        grids = [r.unflatten(2, (s, s)) for r, s in zip(regions.split([s * s for s in scales], 2), scales)]
        maps = [F.interpolate(grid, size, mode="bilinear", align_corners=align_corners) for grid in grids]
        F.conv2d(torch.cat(maps, 1), weight, padding="same")

    The bottleneck of PSPNet is a convolution of the features plus pyramid_conv of the pooled regions. Neither the
    upsampled pyramid nor its concatenation with the features is stored.

    Args:
        regions: (B, C, J), J = Σ s², in the order of pyramid_pool's result; float32, bfloat16, float16 or float64.
        weight: (O, S·C, k, k) in the dtype of regions, k odd; channel block i belongs to scale i.
        size: (h, w) of the result.
        scales: S numbers, 1 to 64 of up to 32768 each, in the order of regions and weight.
        align_corners: interpolates as F.interpolate does with this option.
        memory_format: the result's, torch.contiguous_format or torch.channels_last. Choose that of the map it is added
            to.

    Returns:
        (B, O, h, w) in the dtype of regions and weight; under autocast in autocast's dtype, as of a convolution.

    On a CPU, kernels compute float32 and float64 in eager use. PyTorch's matrix products serve everything else, under
    torch.compile and torch.export too. The operation is differentiable any number of times.
    """
    check_flag(align_corners, "align_corners")
    if not _in_kernels(regions, weight):
        size, scales = _check(regions, weight, size, scales, memory_format)
        return reference.pyramid_conv(regions, weight, size, tuple(scales), align_corners, memory_format)
    try:
        settings = tuple(size), tuple(as_scales(scales)), align_corners, memory_format
        if torch.is_grad_enabled() and (regions.requires_grad or weight.requires_grad):
            return _Convolution.apply(regions, weight, *settings)  # pyright: ignore[reportAttributeAccessIssue]
        return _convolve(regions, weight, settings, _matrices(regions, weight, settings))
    except (RuntimeError, TypeError, ValueError, IndexError):  # the library has checked the arguments
        _check(regions, weight, size, scales, memory_format)
        raise


KERNELS = Kernels(reference)


def _in_kernels(regions: Tensor, weight: Tensor) -> bool:
    """Tells whether the library's kernels compute a call."""
    return (
        PLAIN.issuperset((type(regions), type(weight)))
        and regions.dtype in (torch.float32, torch.float64)
        and weight.dtype == regions.dtype
        and not regions.is_meta
        and runs_eagerly()
        and KERNELS.select("pyramid_conv", regions) == "cpp"
        and not torch.is_autocast_enabled("cpu")
        and regions.numel() * weight.numel() > 0
    )


def _matrices(regions: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    size, scales, align_corners, _ = settings
    return reference.matrices(scales, size, weight.shape[2], align_corners, regions)


def _convolve(regions: Tensor, weight: Tensor, settings: tuple[Any, ...], matrices: tuple[Tensor, Tensor]) -> Tensor:
    size, scales, _, memory_format = settings
    shape = (regions.shape[0], weight.shape[0], *size)
    result = torch.empty(shape, dtype=regions.dtype, device=regions.device, memory_format=memory_format)
    torch.ops.apc_kernels_cpp.pyramid_conv(regions.contiguous(), _readable(weight), scales, *matrices, result)
    return result


class _Convolution(EagerFunction):
    """Computes pyramid_conv in the library's kernels, and gradients of its gradients in PyTorch."""

    @staticmethod
    def forward(ctx: Any, regions: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(regions, weight)
        ctx.settings, ctx.matrices = settings, _matrices(regions, weight, settings)
        return _convolve(regions, weight, settings, ctx.matrices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            result = reference.pyramid_conv(*tensors, *ctx.settings)
            inputs = [tensor for tensor, needed in zip(tensors, wanted, strict=True) if needed]
            grads = iter(torch.autograd.grad(result, inputs, grad, create_graph=True))
            return *(next(grads) if needed else None for needed in wanted), *(None for _ in ctx.settings)
        regions, weight = tensors
        _, scales, *_ = ctx.settings
        grads = [t.new_empty(t.shape) if needed else None for t, needed in zip(tensors, wanted, strict=True)]
        grad = grad if reads_in_place(grad) else grad.contiguous()
        given = grad, regions.contiguous(), _readable(weight)
        torch.ops.apc_kernels_cpp.pyramid_conv_backward(*given, scales, *ctx.matrices, *grads)
        return *grads, *(None for _ in ctx.settings)


def _readable(weight: Tensor) -> Tensor:
    """Returns a weight whose taps or channels are adjacent: itself, or a copy."""
    _, channel, row, column = weight.stride()
    in_order = row == weight.shape[3] * column or weight.shape[2] == 1
    return weight if in_order and (column == 1 or channel == 1) else weight.contiguous()


def _check(
    regions: Tensor, weight: Tensor, size: Sequence[int], scales: Sequence[int], memory_format: torch.memory_format
) -> tuple[tuple[int, int], list[int]]:
    for tensor, name, shape in ((regions, "regions", "(B, C, J)"), (weight, "weight", "(O, S*C, k, k)")):
        check_tensor(tensor, name)
        if tensor.dim() != shape.count(",") + 1:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
        check_dtype(tensor, name)
    scales = check_scales(scales, MAX_SCALES, MAX_SCALE)
    channels, rows = regions.shape[1], sum(s * s for s in scales)
    if regions.shape[2] != rows:
        raise ValueError(f"regions: expected (B, C, {rows}) for scales {tuple(scales)}, got {tuple(regions.shape)}")
    _, inputs, kernel, width = weight.shape
    if inputs != len(scales) * channels:
        expected = f"{len(scales)} scales of {channels} channels, {len(scales) * channels}"
        raise ValueError(f"weight: expected (O, S*C, k, k) for {expected}; got {tuple(weight.shape)}")
    if kernel != width or kernel % 2 == 0:
        raise ValueError(f"weight: expected an odd, square kernel, got {tuple(weight.shape)}")
    if weight.device != regions.device:
        raise ValueError(f"weight: expected a tensor on the regions' device, {regions.device}, got {weight.device}")
    if weight.dtype != regions.dtype and not torch.is_autocast_enabled(regions.device.type):
        expected, given = name_of(regions.dtype), name_of(weight.dtype)
        raise ValueError(f"weight: expected the dtype of regions, {expected}, got {given}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: expected contiguous_format or channels_last, got {memory_format}")
    size = as_size(size)
    check_extent(size, "size", size)
    return size, scales
