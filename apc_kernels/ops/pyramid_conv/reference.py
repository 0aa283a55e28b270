"""Computes pyramid_conv in plain PyTorch, by matrix products: the specification, and what exported models contain."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from apc_kernels.ops.autograd import under_transforms
from apc_kernels.ops.interpolation import matrix


def pyramid_conv(
    regions: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    scales: tuple[int, ...],
    align_corners: bool,
    memory_format: torch.memory_format,
) -> Tensor:
    kernel = weight.shape[2]
    last = memory_format == torch.channels_last
    (batch, channels), outputs = regions.shape[:2], weight.shape[0]
    products = []
    for rows, taps in zip(regions.split([s * s for s in scales], 2), weight.split(channels, 1), strict=True):
        products.append(_products(taps, rows.transpose(0, 1).flatten(1)))  # (O·k², B·s²)
    rows, joined = matrices(scales, size, kernel, align_corners, products[0])
    columns = joined.split([s * kernel for s in scales], 1)
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


def matrices(
    scales: tuple[int, ...], size: tuple[int, int], kernel: int, align_corners: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the matrices of rows, (h, Σ s·k), and of columns, (w, Σ s·k): all scales side by side.

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
) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.cat([_taps_of_axis(s, n, kernel, align_corners, like) for s in scales], 1) for n in size)
    return rows, columns


@functools.lru_cache(maxsize=32)
def _kept_matrices(
    scales: tuple[int, ...],
    size: tuple[int, int],
    kernel: int,
    align_corners: bool,
    dtype: torch.dtype,
    device: torch.device,
    stream: int,
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # a later call may save them for its backward
        return _make_matrices(scales, size, kernel, align_corners, torch.empty(0, dtype=dtype, device=device))


def _taps_of_axis(s: int, size: int, kernel: int, align_corners: bool, like: Tensor) -> Tensor:
    """Returns the (size, s·k) weights of region i in what tap t sees of each position; zero past the ends."""
    weights = F.pad(matrix(s, size, align_corners, like), (0, 0, kernel // 2, kernel // 2))
    return weights.unfold(0, kernel, 1).flatten(1).to(like.dtype)
