"""Computes conv3x3 by Winograd's F(2×2, 3×3): 16 products instead of 36 for four numbers of the result.

The CPU library (csrc/conv3x3) transforms maps, weights and results; between them, PyTorch computes 16 matrix products.
The work is done block by block: a transformed map is four times as large, and never exists as a whole. Blocks depend on
shapes alone.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PLANES = 16
CHANNELS, TILES = 512, 512  # a block is 17 MB of transformed map in float32, and its products are still large


class Part(NamedTuple):
    """Holds some channels of a map, and their place among the channels of all maps."""

    map: Tensor
    place: slice


def convolve(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Convolves maps (B, Cᵢ, h, w) as if they were concatenated: weight (O, Σ Cᵢ, 3, 3) -> (B, O, h, w)."""
    result = maps[0].new_empty(maps[0].shape[0], weight.shape[0], *maps[0].shape[2:])
    _convolve(_parts(maps), _parts([result]), weight, backwards=False)
    return result


def gradient_of_maps(grad: Tensor, weight: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Computes the gradients of maps with these numbers of channels: grad convolved with the flipped weight."""
    grads = [grad.new_empty(grad.shape[0], count, *grad.shape[2:]) for count in channels]
    _convolve(_parts([grad]), _parts(grads), weight, backwards=True)
    return grads


def gradient_of_weight(grad: Tensor, maps: Sequence[Tensor]) -> Tensor:
    grad_weight = grad.new_zeros(grad.shape[1], sum(x.shape[1] for x in maps), 3, 3)
    if not grad.numel():
        return grad_weight
    back = _taps_to_planes(grad).mT
    results, sources = _parts([grad]), _parts(maps)
    of_results, of_sources, of_products, of_taps = _buffers(
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
    of_sources, of_targets, of_weights = _buffers(weight, *sizes)
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
    """Cuts maps into blocks of channels; no block spans two maps."""
    parts, first = [], 0
    for x in maps:
        for block in x.split(CHANNELS, dim=1):
            parts.append(Part(block, slice(first, first + block.shape[1])))
            first += block.shape[1]
    return parts


def _tile_rows(x: Tensor) -> Iterator[range]:
    """Yields blocks of the rows of tiles of all images."""
    rows, columns = x.shape[0] * ((x.shape[2] + 1) // 2), (x.shape[3] + 1) // 2
    step = max(1, TILES // columns)
    return (range(first, min(first + step, rows)) for first in range(0, rows, step))


def _tiles(x: Tensor, rows: range, buffer: Tensor, of_result: bool = False) -> Tensor:
    tiles = _view(buffer, *_shape(x, rows))
    torch.ops.apc_kernels_cpp.conv3x3_tiles(x, rows.start, of_result, tiles)
    return tiles


def _transformed(weight: Tensor, backwards: bool, buffer: Tensor) -> Tensor:
    """Returns the transformed weight, (16, outputs, inputs)."""
    transformed = _view(buffer, PLANES, *weight.shape[:2])
    torch.ops.apc_kernels_cpp.conv3x3_weight(weight, backwards, transformed)
    return transformed


def _shape(x: Tensor, rows: range) -> tuple[int, int, int]:
    """Returns the shape of the tiles in some rows of tiles, (16, channels, tiles)."""
    return PLANES, x.shape[1], len(rows) * ((x.shape[3] + 1) // 2)


# Buffers that all blocks reuse. They are one allocation, so large that it returns to the system at once.


def _buffers(like: Tensor, *sizes: int) -> Sequence[Tensor]:
    return like.new_empty(sum(sizes)).split(sizes)


def _most_tiles(parts: list[Part]) -> int:
    """Returns the largest number of elements in the tiles of a block of rows of one part."""
    rows = max(_tile_rows(parts[0].map), key=len, default=range(0))
    return max(math.prod(_shape(part.map, rows)) for part in parts)


def _most_weights(parts: list[Part], others: list[Part]) -> int:
    return PLANES * max(part.map.shape[1] for part in parts) * max(part.map.shape[1] for part in others)


def _view(buffer: Tensor, *shape: int) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


def _taps_to_planes(like: Tensor) -> Tensor:
    """Returns the (16, 9) matrix that transforms the taps of a weight."""
    one_axis = like.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return torch.kron(one_axis, one_axis)
