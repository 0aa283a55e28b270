"""conv3x3 by tiles, Winograd's F(2×2, 3×3): 16 products for 4 numbers of the result, which take 36 otherwise.

Maps, weights and results are transformed by the CPU library (csrc/conv3x3), which leaves 16 matrix products to
PyTorch's. They are taken block by block: a transformed map has four times its size, and never exists as a whole.
Blocks depend on shapes alone.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PLANES = 16
CHANNELS, TILES = 512, 512  # of a block: 17 MB of transformed map in float32, and products that are still large


class Part(NamedTuple):
    """Some channels of a map, and where these are among the channels of all maps."""

    map: Tensor
    place: slice


def convolve(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The convolution of maps as if they were concatenated: (B, Cᵢ, h, w), weight (O, Σ Cᵢ, 3, 3) -> (B, O, h, w)"""
    result = maps[0].new_empty(maps[0].shape[0], weight.shape[0], *maps[0].shape[2:])
    _convolve(_parts(maps), _parts([result]), weight, backwards=False)
    return result


def gradient_of_maps(grad: Tensor, weight: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """The gradients of maps of these numbers of channels: convolutions of grad with the weight read backwards."""
    grads = [grad.new_empty(grad.shape[0], count, *grad.shape[2:]) for count in channels]
    _convolve(_parts([grad]), _parts(grads), weight, backwards=True)
    return grads


def gradient_of_weight(grad: Tensor, maps: Sequence[Tensor]) -> Tensor:
    grad_weight = grad.new_zeros(grad.shape[1], sum(x.shape[1] for x in maps), 3, 3)
    if not grad.numel():
        return grad_weight
    back = _taps_to_planes(grad).mT
    results, sources = _parts([grad]), _parts(maps)
    of_results, of_sources, of_products, of_taps = _rooms(
        grad,
        _most_tiles(results),
        _most_tiles(sources),
        _most_weights(results, sources),
        _most_weights(results, sources),
    )
    for result in results:
        for source in sources:
            pairs = result.map.shape[1], source.map.shape[1]
            products, taps = _view(of_products, PLANES, *pairs), _view(of_taps, 9, pairs[0] * pairs[1])
            for rows in _tile_rows(grad):
                of_result = _tiles(result.map, rows, of_results, of_result=True)
                tiles = _tiles(source.map, rows, of_sources).mT
                _multiply(of_result, tiles, products, first=rows.start == 0)
            torch.mm(back, products.flatten(1), out=taps)
            grad_weight[result.place, source.place] = taps.view(3, 3, *pairs).permute(2, 3, 0, 1)
    return grad_weight


def _convolve(sources: list[Part], targets: list[Part], weight: Tensor, backwards: bool) -> None:
    sizes = _most_tiles(sources), _most_tiles(targets), _most_weights(sources, targets)
    of_sources, of_targets, of_weights = _rooms(weight, *sizes)
    for rows in _tile_rows(targets[0].map):
        for target in targets:
            products = _view(of_targets, *_shape(target.map, rows))
            for source in sources:
                if len(sources) > 1 or target is targets[0]:
                    tiles = _tiles(source.map, rows, of_sources)
                outputs, inputs = (source, target) if backwards else (target, source)
                transformed = _transformed(weight[outputs.place, inputs.place], backwards, of_weights)
                transformed = transformed.mT if backwards else transformed
                _multiply(transformed, tiles, products, first=source is sources[0])
            torch.ops.apc_kernels_cpp.conv3x3(products, rows.start, target.map)


def _multiply(left: Tensor, right: Tensor, out: Tensor, first: bool) -> None:
    if first:
        torch.bmm(left, right, out=out)
    else:
        out.baddbmm_(left, right)


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


def _tiles(x: Tensor, rows: range, room: Tensor, of_result: bool = False) -> Tensor:
    tiles = _view(room, *_shape(x, rows))
    torch.ops.apc_kernels_cpp.conv3x3_tiles(x, rows.start, of_result, tiles)
    return tiles


def _transformed(weight: Tensor, backwards: bool, room: Tensor) -> Tensor:
    """(16, outputs, inputs)"""
    transformed = _view(room, PLANES, *weight.shape[:2])
    torch.ops.apc_kernels_cpp.conv3x3_weight(weight, backwards, transformed)
    return transformed


def _shape(x: Tensor, rows: range) -> tuple[int, int, int]:
    """Of the tiles of some rows of them."""
    return PLANES, x.shape[1], len(rows) * ((x.shape[3] + 1) // 2)


# Where blocks are put, one after the other. One allocation for all: so large, it goes back to the system at once.


def _rooms(like: Tensor, *sizes: int) -> Sequence[Tensor]:
    return like.new_empty(sum(sizes)).split(sizes)


def _most_tiles(parts: list[Part]) -> int:
    """Numbers in the tiles of any block of rows of any part."""
    rows = max(_tile_rows(parts[0].map), key=len, default=range(0))
    return max(math.prod(_shape(part.map, rows)) for part in parts)


def _most_weights(parts: list[Part], others: list[Part]) -> int:
    return PLANES * max(part.map.shape[1] for part in parts) * max(part.map.shape[1] for part in others)


def _view(room: Tensor, *shape: int) -> Tensor:
    return room[: math.prod(shape)].view(shape)


def _taps_to_planes(like: Tensor) -> Tensor:
    """(16, 9): what transforms a weight, as a matrix."""
    one_axis = like.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.kron(one_axis, one_axis)
