"""Implements pyramid_conv: a convolution of the bilinearly upsampled pyramid, without upsampling it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
from apc_kernels.ops.conv3x3 import by_tiles, conv3x3, empty_like, layout_of, tiles
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
    features: Tensor | None = None,
    align_corners: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """Convolves the upsampled and concatenated grids of regions of several scales, without upsampling them.

    The convolution is linear in the few region vectors, and bilinear interpolation is one matrix for each axis:

        out = Σ_scales M_y · (regions · taps) · M_xᵀ        M_y: (h, s·k), M_x: (w, s·k)

    Equivalent to:

        grids = [r.unflatten(2, (s, s)) for r, s in zip(regions.split([s * s for s in scales], 2), scales)]
        maps = [F.interpolate(grid, size, mode="bilinear", align_corners=align_corners) for grid in grids]
        F.conv2d(torch.cat(maps, 1), weight, padding="same")  # with features: torch.cat([features, *maps], 1)

    The bottleneck of PSPNet convolves its features beside the pooled regions. Neither the upsampled pyramid nor its
    concatenation with the features is stored.

    Args:
        regions: (B, C, J), J = Σ s², in the order of pyramid_pool's result; float32, bfloat16, float16 or float64.
        weight: (O, S·C, k, k) in the dtype of regions, k odd; channel block i belongs to scale i. With features
            (O, F + S·C, k, k), whose first F channels belong to them.
        size: (h, w) of the result.
        scales: S numbers, 1 to 64 of up to 32768 each, in the order of regions and weight.
        features: (B, F, h, w), a map to which the upsampled grids are concatenated, or None.
        align_corners: interpolates as F.interpolate does with this option.
        memory_format: the result's, torch.contiguous_format or torch.channels_last. By default it is that of a
            convolution of the features, and contiguous without them.

    Returns:
        (B, O, h, w) in the dtype of regions and weight; under autocast in autocast's dtype, as of a convolution.

    On a CPU, kernels compute float32 and float64 in eager use. PyTorch's matrix products serve everything else, under
    torch.compile and torch.export too. The operation is differentiable any number of times, but once in features and
    their weight where conv3x3 is; there, on a CPU in eager use, all of the weight has one gradient: its parts are not
    joined.
    """
    check_flag(align_corners, "align_corners")
    if features is not None:
        return _beside(features, regions, weight, size, scales, align_corners, memory_format)
    memory_format = torch.contiguous_format if memory_format is None else memory_format
    if not _in_kernels(regions, weight):
        size, scales = _check(regions, weight, size, scales, memory_format)
        return reference.pyramid_conv(regions, weight, size, tuple(scales), align_corners, memory_format)
    try:
        settings = tuple(size), tuple(as_scales(scales)), align_corners, memory_format
        if torch.is_grad_enabled() and (regions.requires_grad or weight.requires_grad):
            return _Convolution.apply(regions, weight, None, *settings)  # pyright: ignore[reportAttributeAccessIssue]
        return _convolve(regions, weight, settings, _matrices(regions, weight, settings))
    except (RuntimeError, TypeError, ValueError, IndexError):  # the library has checked the arguments
        _check(regions, weight, size, scales, memory_format)
        raise


KERNELS = Kernels(reference)


def _beside(
    features: Tensor,
    regions: Tensor,
    weight: Tensor,
    size: Sequence[int],
    scales: Sequence[int],
    align_corners: bool,
    memory_format: torch.memory_format | None,
) -> Tensor:
    """Computes pyramid_conv with features: in one node of autograd if the library's kernels serve both parts."""
    _check_features(features, regions, weight, size, scales)
    own, others = _parts(weight, features)
    eager = type(features) in PLAIN and weight.shape[2] == 3 and _in_kernels(regions, others)
    if eager and by_tiles([features], own):
        layout = layout_of(features) if memory_format is None else memory_format
        size, scales = _check(regions, others, size, scales, layout)
        settings = size, tuple(scales), align_corners, layout
        if torch.is_grad_enabled() and any(t.requires_grad for t in (features, regions, weight)):
            return _Convolution.apply(regions, weight, features, *settings)  # pyright: ignore[reportAttributeAccessIssue]
        return _convolve_both(regions, weight, features, settings, _matrices(regions, weight, settings))
    return _composed(regions, weight, features, size, scales, align_corners, memory_format)


def _composed(
    regions: Tensor,
    weight: Tensor,
    features: Tensor,
    size: Sequence[int],
    scales: Sequence[int],
    align_corners: bool,
    memory_format: torch.memory_format | None,
) -> Tensor:
    """Computes pyramid_conv with features as the sum of two convolutions."""
    own, others = _parts(weight, features)
    product = conv3x3(features, own) if weight.shape[2] == 3 else F.conv2d(features, own, padding=weight.shape[2] // 2)
    if memory_format is not None:
        product = product.contiguous(memory_format=memory_format)
    options = {"align_corners": align_corners, "memory_format": layout_of(product)}
    product += pyramid_conv(regions, others, size, scales, **options)
    return product


def _parts(weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a weight into that of the features and that of the pyramid."""
    count = features.shape[1]
    return weight.split([count, weight.shape[1] - count], 1)  # pyright: ignore[reportReturnType]


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


def _convolve_both(
    regions: Tensor, weight: Tensor, features: Tensor, settings: tuple[Any, ...], matrices: tuple[Tensor, Tensor]
) -> Tensor:
    own, others = _parts(weight, features)
    pyramid = _convolve(regions, others, settings, matrices)
    result = torch.empty_like(pyramid)
    tiles.convolve([features], own, 1, result)
    return result.add_(pyramid)


class _Convolution(EagerFunction):
    """Computes pyramid_conv in the library's kernels, and gradients of its gradients in PyTorch."""

    @staticmethod
    def forward(ctx: Any, regions: Tensor, weight: Tensor, features: Tensor | None, *settings: Any) -> Tensor:
        ctx.save_for_backward(regions, weight, features)
        ctx.settings, ctx.matrices = settings, _matrices(regions, weight, settings)
        if features is None:
            return _convolve(regions, weight, settings, ctx.matrices)
        return _convolve_both(regions, weight, features, settings, ctx.matrices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        regions, weight, features = ctx.saved_tensors
        of_regions, of_weight, of_features, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grads = _differentiable_gradients(ctx, grad)
            return *grads, *(None for _ in ctx.settings)
        grad = grad if reads_in_place(grad) else grad.contiguous()
        grad_regions = torch.empty_like(regions, memory_format=torch.contiguous_format) if of_regions else None
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else None
        grad_features, others, grad_others = None, weight, grad_weight
        if features is not None:
            own, others = _parts(weight, features)
            if of_features:
                grad_features = empty_like(grad, features.shape[1])
                tiles.gradient_of_maps(grad, own, 1, [grad_features])
            if grad_weight is not None:
                grad_own, grad_others = _parts(grad_weight, features)
                tiles.gradient_of_weight(grad, [features], 1, grad_own)
        _, scales, *_ = ctx.settings
        given = grad, regions.contiguous(), _readable(others)
        torch.ops.apc_kernels_cpp.pyramid_conv_backward(*given, scales, *ctx.matrices, grad_regions, grad_others)
        return grad_regions, grad_weight, grad_features, *(None for _ in ctx.settings)


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Computes the gradients by PyTorch's operators, so that they have gradients themselves."""
    regions, weight, features = tensors = ctx.saved_tensors
    if features is None:
        result = reference.pyramid_conv(regions, weight, *ctx.settings)
    else:
        result = _composed(regions, weight, features, *ctx.settings)
    wanted = ctx.needs_input_grad[:3]
    inputs = [tensor for tensor, needed in zip(tensors, wanted, strict=True) if needed]
    grads = iter(torch.autograd.grad(result, inputs, grad, create_graph=True))
    return [next(grads) if needed else None for needed in wanted]


def _readable(weight: Tensor) -> Tensor:
    """Returns a weight whose taps or channels are adjacent: itself, or a copy."""
    _, channel, row, column = weight.stride()
    in_order = row == weight.shape[3] * column or weight.shape[2] == 1
    return weight if in_order and (column == 1 or channel == 1) else weight.contiguous()


def _check_features(
    features: Tensor, regions: Tensor, weight: Tensor, size: Sequence[int], scales: Sequence[int]
) -> None:
    named = (features, "features", "(B, F, h, w)"), (regions, "regions", "(B, C, J)"), (weight, "weight", WITH_FEATURES)
    for tensor, name, shape in named:
        _check_dimensions(tensor, name, shape)
    own, channels, count = features.shape[1], regions.shape[1], len(as_scales(scales))
    if weight.shape[1] != own + count * channels:
        expected = f"{own} channels of features and {count} scales of {channels}, {own + count * channels}"
        raise ValueError(f"weight: expected {WITH_FEATURES} for {expected}; got {tuple(weight.shape)}")
    if features.shape[0] != regions.shape[0] or tuple(features.shape[2:]) != as_size(size):
        expected = f"({regions.shape[0]}, F, {', '.join(map(str, size))}) for these regions and size"
        raise ValueError(f"features: expected {expected}, got {tuple(features.shape)}")


WITH_FEATURES = "(O, F + S*C, k, k)"


def _check_dimensions(tensor: Tensor, name: str, shape: str) -> None:
    check_tensor(tensor, name)
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")


def _check(
    regions: Tensor, weight: Tensor, size: Sequence[int], scales: Sequence[int], memory_format: torch.memory_format
) -> tuple[tuple[int, int], list[int]]:
    for tensor, name, shape in ((regions, "regions", "(B, C, J)"), (weight, "weight", "(O, S*C, k, k)")):
        _check_dimensions(tensor, name, shape)
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
