"""Implements conv1x1: a 1×1 convolution of several maps; on a CPU, channels_last maps are matrices to multiply."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apc_kernels.ops.common import without_autocast
from apc_kernels.ops.conv3x3 import KERNELS, check_maps, check_tensors, is_large, tiles
from apc_kernels.ops.operator import define

LEAST_CHANNELS, LEAST_POSITIONS = 64, 256  # from these sizes on the library's products are faster


def conv1x1(maps: Tensor | Sequence[Tensor], weight: Tensor) -> Tensor:
    """Convolves several maps with one 1×1 weight as if they were concatenated.

        out[b, o, y, x] = Σ_c weight[o, c] · maps[b, c, y, x]

    Equivalent to:

        F.conv2d(torch.cat(maps, 1), weight)

    The concatenation is not stored. On a CPU, channels_last maps are matrices of positions and channels, and the
    library multiplies them at the rate of the processor's multipliers, forward and backward. PyTorch's convolution, map
    by map, serves GPUs, low precision, autocast, export, contiguous maps, and maps of fewer than 64 channels or 256
    positions.

    Args:
        maps: One (B, C, h, w) map or several, in float32, float64, bfloat16 or float16. They may differ in C, and under
            autocast in dtype.
        weight: (O, Σ C, 1, 1) in the maps' dtype.

    Returns:
        (B, O, h, w) in the maps' dtype. From the library's products it is channels_last, and differentiable once in
        maps and weight.
    """
    if not isinstance(maps, (Tensor, list, tuple)):
        raise TypeError(f"maps: expected a tensor or a sequence of them, got {type(maps).__name__}")
    maps = [maps] if isinstance(maps, Tensor) else list(maps)
    check_tensors(maps, weight)
    if torch.compiler.is_exporting() or not _by_products(maps, weight):
        check_maps(maps, weight, (1, 1))
        return reference(maps, weight)
    return _forward(weight, maps)


def reference(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Computes conv1x1 in plain PyTorch."""
    if len(maps) == 1:  # a split of the weight would copy its gradient
        return F.conv2d(maps[0], weight)
    weights = weight.split([x.shape[1] for x in maps], dim=1)
    products = [F.conv2d(x, w) for x, w in zip(maps, weights, strict=True)]
    return sum(products[1:], start=products[0])


def _by_products(maps: Sequence[Tensor], weight: Tensor) -> bool:
    """Tells whether the library's products serve these maps, before they are checked against each other."""
    return (
        is_large(maps, weight, LEAST_CHANNELS, LEAST_POSITIONS)
        and maps[0].device.type == "cpu"
        and maps[0].dtype in (torch.float32, torch.float64)
        and weight.dtype == maps[0].dtype
        and not torch.is_autocast_enabled("cpu")
        and all(x.stride(1) == 1 for x in maps)
    )


def _convolve(weight: Tensor, maps: Sequence[Tensor]) -> Tensor:
    result = _empty(weight, maps)
    with without_autocast(weight):
        if not result.numel():
            return result
        if KERNELS.select("conv3x3", weight) == "reference":
            return result.copy_(reference(maps, weight))
        out, first = tiles.as_rows(result), 0
        for x in maps:
            part = weight[:, first : first + x.shape[1], 0, 0]
            tiles.multiply(tiles.as_rows(x), tiles.panels(part), out, add=first > 0)
            first += x.shape[1]
    return result


def _empty(weight: Tensor, maps: Sequence[Tensor]) -> Tensor:
    check_maps(maps, weight, (1, 1))
    return _empty_like(maps[0], weight.shape[0])


def _gradient_of_maps(grad: Tensor, weight: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Computes the gradients of maps with these numbers of channels."""
    grads = _empty_maps(grad, weight, channels)
    with without_autocast(weight):
        if not grad.numel():
            return grads
        parts = weight[:, :, 0, 0].split(list(channels), dim=1)
        if KERNELS.select("conv3x3", weight) == "reference":
            return [x.copy_(F.conv2d(grad, w.mT[:, :, None, None])) for x, w in zip(grads, parts, strict=True)]
        rows = tiles.as_rows(grad)
        for x, part in zip(grads, parts, strict=True):
            tiles.multiply(rows, tiles.as_panels(tiles.padded(part)[None]), tiles.as_rows(x), add=False)
    return grads


def _empty_maps(grad: Tensor, weight: Tensor, channels: Sequence[int]) -> list[Tensor]:
    return [_empty_like(grad, count) for count in channels]


def _gradient_of_weight(grad: Tensor, maps: Sequence[Tensor]) -> Tensor:
    result = _empty_weight(grad, maps)
    with without_autocast(grad):
        if not grad.numel():
            return result.zero_()
        rows, first = tiles.as_rows(grad), 0
        for x in maps:
            part = result[None, :, first : first + x.shape[1], 0, 0]
            first += x.shape[1]
            if KERNELS.select("conv3x3", grad) == "reference":
                part.copy_(rows.mT @ tiles.as_rows(x))
            else:
                right = tiles.as_panels(tiles.padded(tiles.as_rows(x)[0])[None])
                tiles.multiply(rows.mT, right, part, add=False)
    return result


def _empty_weight(grad: Tensor, maps: Sequence[Tensor]) -> Tensor:
    return grad.new_empty(grad.shape[1], sum(x.shape[1] for x in maps), 1, 1)


def _empty_like(x: Tensor, channels: int) -> Tensor:
    shape = x.shape[0], channels, *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, maps = inputs
    ctx.save_for_backward(weight, *maps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    weight, *maps = ctx.saved_tensors
    of_weight, *of_maps = ctx.needs_input_grad
    if grad is None:
        return None, [None] * len(maps)
    grad = grad.contiguous(memory_format=torch.channels_last)
    grad_weight = _backward_weight(grad, maps) if of_weight else None
    grads = [None] * len(maps)
    if any(of_maps):
        computed = _backward_maps(grad, weight, [x.shape[1] for x in maps])
        grads = [g if wanted else None for g, wanted in zip(computed, of_maps, strict=True)]
    return grad_weight, grads


_forward = define(
    "conv1x1(Tensor weight, Tensor[] maps) -> Tensor", _convolve, _empty, backward=_backward, remember=_remember
)
_backward_maps = define(
    "conv1x1_backward_maps(Tensor grad, Tensor weight, SymInt[] channels) -> Tensor[]", _gradient_of_maps, _empty_maps
)
_backward_weight = define(
    "conv1x1_backward_weight(Tensor grad, Tensor[] maps) -> Tensor", _gradient_of_weight, _empty_weight
)
