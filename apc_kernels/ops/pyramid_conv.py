"""Implements pyramid_conv: a convolution of the bilinearly upsampled pyramid, without upsampling it."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from apc_kernels.ops.autograd import under_transforms
from apc_kernels.ops.common import check_dtype, check_flag, check_scales, check_tensor, name_of
from apc_kernels.ops.interpolation import as_size, check_extent, matrix

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

    Every backend is PyTorch's matrix products: differentiable any number of times, and the same under torch.compile and
    torch.export.
    """
    check_flag(align_corners, "align_corners")
    size, scales, kernel = _check(regions, weight, size, scales, memory_format)
    last = memory_format == torch.channels_last
    (batch, channels), outputs = regions.shape[:2], weight.shape[0]
    products = []
    for rows, taps in zip(regions.split([s * s for s in scales], 2), weight.split(channels, 1), strict=True):
        products.append(_products(taps, rows.transpose(0, 1).flatten(1)))  # (O·k², B·s²)
    rows, columns = _matrices(tuple(scales), size, kernel, align_corners, products[0])
    for i, s in enumerate(scales):
        product = products[i].view(outputs, kernel, kernel, batch, s, s)  # (O, ky, kx, B, sy, sx)
        if last:
            product = product.permute(3, 4, 1, 5, 2, 0).flatten(3, 4).flatten(1, 2)  # (B, s·k, s·k, O)
            products[i] = (columns[i] @ product).flatten(2)  # (B, s·k, w·O)
        else:
            product = product.permute(3, 0, 4, 1, 5, 2).flatten(4).flatten(2, 3)  # (B, O, s·k, s·k)
            products[i] = product @ columns[i].mT  # (B, O, s·k, w)
    if last:
        return (rows @ torch.cat(products, 1)).unflatten(2, (size[1], outputs)).permute(0, 3, 1, 2)
    return rows @ torch.cat(products, 2)


def _products(taps: Tensor, vectors: Tensor) -> Tensor:
    """Multiplies the taps of a scale (O, C, k, k) with its vectors (C, n): (O·k², n)."""
    differentiated = torch.is_grad_enabled() and (taps.requires_grad or vectors.requires_grad)
    casts = torch.is_autocast_enabled(taps.device.type)
    transformed = torch.compiler.is_compiling() or under_transforms() or forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    if not differentiated or casts or transformed or _channels_adjacent(taps):
        return _as_matrix(taps) @ vectors
    return _Products.apply(taps, vectors)  # pyright: ignore[reportReturnType]


def _as_matrix(taps: Tensor) -> Tensor:
    """Returns taps (O, C, k, k) as (O·k², C): a view if the channels are adjacent, else a copy."""
    return taps.permute(0, 2, 3, 1).reshape(-1, taps.shape[1])


def _channels_adjacent(taps: Tensor) -> bool:
    kernel, step = taps.shape[2], taps.stride(3)
    return taps.stride() == (kernel * kernel * step, 1, kernel * step, step)


class _Products(torch.autograd.Function):
    """Multiplies taps with vectors, and saves no copy of the taps: backward makes it again."""

    @staticmethod
    def forward(ctx: Any, taps: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(taps, vectors)
        return _as_matrix(taps) @ vectors

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        taps, vectors = ctx.saved_tensors
        outputs, channels, kernel, _ = taps.shape
        of_taps, of_vectors = ctx.needs_input_grad
        grad_taps = grad_vectors = None
        if of_taps:
            grad_taps = (grad @ vectors.mT).reshape(outputs, kernel, kernel, channels).permute(0, 3, 1, 2)
        if of_vectors:
            grad_vectors = _as_matrix(taps).mT @ grad
        return grad_taps, grad_vectors


def _matrices(
    scales: tuple[int, ...], size: tuple[int, int], kernel: int, align_corners: bool, like: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Returns the matrices of rows, of all scales side by side, and of columns, one of each scale.

    Making them takes 160 small operations, so that eager calls keep the last ones. A graph makes its own.
    """
    if type(like) is not Tensor or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return _make_matrices(scales, size, kernel, align_corners, like)
    stream = 0
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # they would hold nothing until the graph runs
            return _make_matrices(scales, size, kernel, align_corners, like)
        stream = torch.cuda.current_stream(like.device).cuda_stream
    return _kept_matrices(scales, size, kernel, align_corners, like.dtype, like.device, stream)


def _make_matrices(
    scales: tuple[int, ...], size: tuple[int, int], kernel: int, align_corners: bool, like: Tensor
) -> tuple[Tensor, list[Tensor]]:
    rows, columns = ([_taps_of_axis(s, n, kernel, align_corners, like) for s in scales] for n in size)
    return torch.cat(rows, 1), columns


@functools.lru_cache(maxsize=32)
def _kept_matrices(
    scales: tuple[int, ...],
    size: tuple[int, int],
    kernel: int,
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, list[Tensor]]:
    with torch.inference_mode(False), torch.no_grad():  # a later call may save them for its backward
        return _make_matrices(scales, size, kernel, align_corners, torch.empty(0, dtype=dtype, device=device))


def _taps_of_axis(s: int, size: int, kernel: int, align_corners: bool, like: Tensor) -> Tensor:
    """Returns the (size, s·k) weights of region i in what tap t sees of each position; zero past the ends."""
    weights = F.pad(matrix(s, size, align_corners, like), (0, 0, kernel // 2, kernel // 2))
    return weights.unfold(0, kernel, 1).flatten(1).to(like.dtype)


def _check(
    regions: Tensor, weight: Tensor, size: Sequence[int], scales: Sequence[int], memory_format: torch.memory_format
) -> tuple[tuple[int, int], list[int], int]:
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
    return size, scales, kernel
