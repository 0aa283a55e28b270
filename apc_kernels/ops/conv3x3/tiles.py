"""conv3x3 by tiles, Winograd's F(2×2, 3×3): 16 products for 4 numbers of the result, which take 36 otherwise.

Maps, weights and results are transformed by the CPU library (csrc/conv3x3), which leaves 16 matrix products to
PyTorch's. They are taken block by block: a transformed map has four times its size, and never exists as a whole.
Blocks depend on shapes alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PLANES = 16
CHANNELS, TILES = 512, 1024  # of a block: 34 MB of transformed map in float32, and products that are still large


class Part(NamedTuple):
    """Some channels of a map, and where these are among the channels of all maps."""

    map: Tensor
    place: slice


def convolve(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The convolution of maps as if they were concatenated: (B, Cᵢ, h, w), weight (O, Σ Cᵢ, 3, 3) -> (B, O, h, w)"""
    result = maps[0].new_empty(maps[0].shape[0], weight.shape[0], *maps[0].shape[2:])
    _convolve(_parts(maps), _parts([result]), lambda to, source: _transformed(weight[to, source], False))
    return result


def gradient_of_maps(grad: Tensor, weight: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """The gradients of maps of these numbers of channels: convolutions of grad with the weight read backwards."""
    grads = [grad.new_empty(grad.shape[0], count, *grad.shape[2:]) for count in channels]
    _convolve(_parts([grad]), _parts(grads), lambda to, source: _transformed(weight[source, to], True).mT)
    return grads


def gradient_of_weight(grad: Tensor, maps: Sequence[Tensor]) -> Tensor:
    grad_weight = grad.new_zeros(grad.shape[1], sum(x.shape[1] for x in maps), 3, 3)
    if not grad.numel():
        return grad_weight
    back = _taps_to_planes(grad).mT
    for result in _parts([grad]):
        for source in _parts(maps):
            products = None
            for rows in _tile_rows(grad):
                of_result = _tiles(result.map, rows, of_result=True)
                products = _multiplied(of_result, _tiles(source.map, rows).mT, products)
            taps = (back @ products.flatten(1)).view(3, 3, *products.shape[1:])
            grad_weight[result.place, source.place] = taps.permute(2, 3, 0, 1)
    return grad_weight


def _convolve(sources: list[Part], targets: list[Part], weight: Callable[[slice, slice], Tensor]) -> None:
    kernels = torch.ops.apc_kernels_cpp
    for rows in _tile_rows(targets[0].map):
        only = _tiles(sources[0].map, rows) if len(sources) == 1 else None
        for target in targets:
            products = None
            for source in sources:
                tiles = _tiles(source.map, rows) if only is None else only
                products = _multiplied(weight(target.place, source.place), tiles, products)
            kernels.conv3x3(products, rows.start, target.map)


def _parts(maps: Sequence[Tensor]) -> list[Part]:
    """Blocks of channels, none of them of two maps."""
    parts, first = [], 0
    for x in maps:
        for block in x.split(CHANNELS, dim=1):
            parts.append(Part(block, slice(first, first + block.shape[1])))
            first += block.shape[1]
    return parts


def _tile_rows(x: Tensor) -> Iterator[range]:
    """Blocks of the rows of tiles of all images."""
    rows, columns = x.shape[0] * ((x.shape[2] + 1) // 2), (x.shape[3] + 1) // 2
    step = max(1, TILES // columns)
    return (range(first, min(first + step, rows)) for first in range(0, rows, step))


def _tiles(x: Tensor, rows: range, of_result: bool = False) -> Tensor:
    """(16, C, tiles)"""
    tiles = x.new_empty(PLANES, x.shape[1], len(rows) * ((x.shape[3] + 1) // 2))
    torch.ops.apc_kernels_cpp.conv3x3_tiles(x, rows.start, of_result, tiles)
    return tiles


def _transformed(weight: Tensor, backwards: bool) -> Tensor:
    """(16, outputs, inputs)"""
    transformed = weight.new_empty(PLANES, *weight.shape[:2])
    torch.ops.apc_kernels_cpp.conv3x3_weight(weight, backwards, transformed)
    return transformed


def _multiplied(left: Tensor, right: Tensor, onto: Tensor | None) -> Tensor:
    return torch.bmm(left, right) if onto is None else onto.baddbmm_(left, right)


def _taps_to_planes(like: Tensor) -> Tensor:
    """(16, 9): what transforms a weight, as a matrix."""
    one_axis = like.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.kron(one_axis, one_axis)
