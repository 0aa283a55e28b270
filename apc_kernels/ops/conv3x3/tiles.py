"""Computes conv3x3 by Winograd's F(m×m, 3×3): for m = 2, 16 products instead of 36 for four numbers of the result.

The CPU library (csrc/conv3x3) transforms maps, weights and results, and multiplies between. A dilated convolution is
d×d interleaved ones, whose tiles read positions d apart. The work is done block by block: transformed maps are four
times as large, and never exist as a whole. Blocks depend on shapes alone.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS, PANEL = 512, 32  # channels of a block, columns of a panel of the right side of a product
COLUMNS = 256  # channels of a block that is the right side of a product: more take more memory and no less time
NUMBERS = 21 << 19  # of transformed maps in a block: 42 MiB in float32, of 512 channels for 64×64 positions or more
LEAST, MOST = 52 << 20, 64 << 20  # bytes of scratch memory: of a block in float32 and its weight, and kept at most
LARGE = 32 << 20  # bytes of a weight's gradient after which scratch memory returns to the system
APART = 16  # padding of rows and planes: those a power of two apart share a few places of the cache


class Grid(NamedTuple):
    """Describes the tiles of maps of one size: m×m results in each, every one of d×d interleaved maps on its own."""

    side: int  # m
    dilation: int
    batch: int
    height: int
    width: int

    @property
    def planes(self) -> int:
        return (self.side + 2) ** 2

    @property
    def columns(self) -> int:
        return self.dilation * -(-self.width // (self.side * self.dilation))

    @property
    def rows(self) -> int:
        return self.batch * self.dilation * -(-self.height // (self.side * self.dilation))

    def blocks(self, channels: int) -> Iterator[range]:
        """Yields blocks of the rows of tiles of all images; `channels`: of the sources and results of a block."""
        most = max(1, NUMBERS // (self.planes * channels * self.columns))
        count = -(-self.rows // most)
        step = -(-self.rows // count) if count else 1
        return (range(first, min(first + step, self.rows)) for first in range(0, self.rows, step))


class Part(NamedTuple):
    """Holds some channels of a map, and their place among the channels of all maps."""

    map: Tensor
    place: slice

    @property
    def channels(self) -> int:
        return self.map.shape[1]


def convolve(maps: Sequence[Tensor], weight: Tensor, dilation: int, result: Tensor) -> None:
    """Convolves maps (B, Cᵢ, h, w) as if they were concatenated: weight (O, Σ Cᵢ, 3, 3) -> (B, O, h, w)."""
    sources, targets = _parts(maps), _parts([result])
    _convolve(sources, targets, _Transforms(weight, 2, backwards=False), dilation)


def convolve_prepared(
    maps: Sequence[Tensor],
    transformed: Tensor,
    dilation: int,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    result: Tensor,
) -> None:
    """Convolves maps with a weight that was transformed before, and adds bias and another map, then applies ReLU."""
    _convolve(_parts(maps), _parts([result]), _Prepared(transformed), dilation, bias, other, relu)


def gradient_of_maps(grad: Tensor, weight: Tensor, dilation: int, grads: Sequence[Tensor]) -> None:
    """Computes the gradients of maps: grad convolved with the flipped weight."""
    _convolve(_parts([grad]), _parts(grads), _Transforms(weight, 2, backwards=True), dilation)


def gradient_of_weight(grad: Tensor, maps: Sequence[Tensor], dilation: int, grad_weight: Tensor) -> None:
    """Computes the gradient of the weight, which may be a part of the gradient of a wider one."""
    if not grad.numel():
        grad_weight.zero_()
        return
    # A training step has its peak of memory here, at the head's bottleneck, where no other memory may lie about.
    large = grad_weight.nbytes >= LARGE
    if large:
        _free.clear()
    grid, results, sources = _grid(grad, dilation, 2), _parts([grad]), _parts(maps)
    widest = _widest(results), _widest(sources)
    blocks = list(grid.blocks(sum(map(_padded, widest))))
    if len(blocks) == 1:  # all tiles of a result stay, so that less memory costs nothing
        sources = _parts(maps, COLUMNS)
        widest = _widest(results), _widest(sources)
    sizes = *(_size(grid, blocks[0], channels) for channels in widest), grid.planes * _size_of_rows(*widest)
    with _scratch(grad, *sizes, keep=not large) as (of_results, of_sources, of_products):
        for result in results:
            for source in sources:
                products = _matrices(of_products, grid.planes, result.channels, source.channels)
                for rows in blocks:
                    if len(blocks) > 1 or source is sources[0]:
                        left = _tiles(result.map, grid, rows, of_results, of_result=True)
                    right = _tiles(source.map, grid, rows, of_sources)
                    multiply(left.mT, as_panels(right), products, add=rows.start > 0)
                torch.ops.apc_kernels_cpp.conv3x3_weight_gradient(products, grad_weight[result.place, source.place])


def transformed(weight: Tensor, side: int) -> Tensor:
    """Returns the transform of a weight in panels, (planes, O / 32, C, 32), for convolve_prepared."""
    panels = weight.new_empty((side + 2) ** 2, -(-weight.shape[0] // PANEL), weight.shape[1], PANEL)
    torch.ops.apc_kernels_cpp.conv3x3_weight(weight, side, False, panels)
    return panels


class _Transforms:
    """Transforms a weight block by block, each for a few columns of a product."""

    def __init__(self, weight: Tensor, side: int, backwards: bool):
        self.weight, self.side, self.backwards = weight, side, backwards
        self.buffer: Tensor

    def size(self, source: int, target: int) -> int:
        """Returns the number of elements in the largest block, between so many channels."""
        return (self.side + 2) ** 2 * source * -(-min(target, COLUMNS) // PANEL) * PANEL

    def blocks(self, source: Part, target: Part) -> Iterator[tuple[slice, Tensor]]:
        """Yields some of the target's channels, and the weight between them and the source."""
        for first in range(0, target.channels, COLUMNS):
            columns = slice(first, min(first + COLUMNS, target.channels))
            place = slice(target.place.start + columns.start, target.place.start + columns.stop)
            outputs, inputs = (source.place, place) if self.backwards else (place, source.place)
            shape = (self.side + 2) ** 2, -(-(columns.stop - first) // PANEL), source.channels, PANEL
            panels = self.buffer[: math.prod(shape)].view(shape)
            torch.ops.apc_kernels_cpp.conv3x3_weight(self.weight[outputs, inputs], self.side, self.backwards, panels)
            yield columns, panels


class _Prepared:
    """Slices a weight that was transformed before."""

    def __init__(self, transformed: Tensor):
        self.transformed, self.side = transformed, math.isqrt(transformed.shape[0]) - 2
        self.buffer: Tensor

    def size(self, source: int, target: int) -> int:
        return 0

    def blocks(self, source: Part, target: Part) -> Iterator[tuple[slice, Tensor]]:
        panels = slice(target.place.start // PANEL, -(-target.place.stop // PANEL))
        yield slice(None), self.transformed[:, panels, source.place]


def _convolve(
    sources: list[Part],
    targets: list[Part],
    weights: _Transforms | _Prepared,
    dilation: int,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    relu: bool = False,
) -> None:
    grid = _grid(targets[0].map, dilation, weights.side)
    widest = _widest(sources), _widest(targets)
    blocks = list(grid.blocks(sum(map(_padded, widest))))
    if not blocks:
        return
    sizes = *(_size(grid, blocks[0], channels) for channels in widest), weights.size(*widest)
    with _scratch(targets[0].map, *sizes) as (of_sources, of_targets, weights.buffer):
        for rows in blocks:
            for target in targets:
                products = _view(of_targets, grid, rows, target.channels)
                for source in sources:
                    if len(sources) > 1 or target is targets[0]:
                        tiles = _tiles(source.map, grid, rows, of_sources)
                    for columns, panels in weights.blocks(source, target):
                        multiply(tiles, panels, products[:, :, columns], add=source is not sources[0])
                torch.ops.apc_kernels_cpp.conv3x3(
                    products,
                    grid.side,
                    grid.dilation,
                    rows.start,
                    None if bias is None else bias[target.place],
                    None if other is None else other[:, target.place],
                    relu,
                    target.map,
                )


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """Computes left · right for every plane, or adds it to out; right is in panels."""
    torch.ops.apc_kernels_cpp.products(left, right, None, None, False, add, out)


def panels(matrix: Tensor) -> Tensor:
    """Lays out the transpose of a matrix (O, C) as the right side of a product: (1, O / 32, C, 32)."""
    matrix = matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
    laid_out = matrix.new_empty(-(-matrix.shape[0] // PANEL), matrix.shape[1], PANEL)
    torch.ops.apc_kernels_cpp.product_panels(matrix, laid_out)
    return laid_out[None]


def as_panels(matrices: Tensor) -> Tensor:
    """Returns a view of matrices as the right side of a product, (planes, panels, rows, 32); rows hold whole panels."""
    planes, count, columns = matrices.shape
    plane, row, _ = matrices.stride()
    shape, strides = (planes, -(-columns // PANEL), count, PANEL), (plane, PANEL, row, 1)
    return matrices.as_strided(shape, strides, matrices.storage_offset())


def padded(matrix: Tensor) -> Tensor:
    """Returns a matrix whose rows hold whole panels: itself, or a copy if its columns are no multiple of 32."""
    rows, columns = matrix.shape
    if columns % PANEL == 0 and matrix.stride(1) == 1:
        return matrix
    copy = matrix.new_zeros(rows, -(-columns // PANEL) * PANEL)
    copy[:, :columns] = matrix
    return copy[:, :columns]


def as_rows(x: Tensor) -> Tensor:
    """Returns a map whose channels are adjacent as a matrix, (1, B·h·w, C)."""
    return x.permute(0, 2, 3, 1).reshape(1, -1, x.shape[1])


def _grid(x: Tensor, dilation: int, side: int) -> Grid:
    # From the map's extent on, only the weight's centre meets the map: a larger dilation changes nothing.
    return Grid(side, max(1, min(dilation, max(x.shape[2:]))), x.shape[0], *x.shape[2:])


def _parts(maps: Sequence[Tensor], most: int = CHANNELS) -> list[Part]:
    """Cuts maps into blocks of channels; no block spans two maps."""
    parts, first = [], 0
    for x in maps:
        for block in x.split(most, dim=1):
            parts.append(Part(block, slice(first, first + block.shape[1])))
            first += block.shape[1]
    return parts


def _widest(parts: Sequence[Part]) -> int:
    return max(part.channels for part in parts)


def _tiles(x: Tensor, grid: Grid, rows: range, buffer: Tensor, of_result: bool = False) -> Tensor:
    """Returns the transformed tiles of a map, (planes, tiles, channels)."""
    tiles = _view(buffer, grid, rows, x.shape[1])
    torch.ops.apc_kernels_cpp.conv3x3_tiles(x, grid.side, grid.dilation, rows.start, of_result, tiles)
    return tiles


# Scratch memory. Every call takes the memory of the last one: fresh memory costs a page fault for each 4 KiB, together
# as much time as the transforms, and in training it would come to lie between maps that are kept.

_free: list[Tensor] = []


@contextmanager
def _scratch(like: Tensor, *sizes: int, keep: bool = True) -> Iterator[Sequence[Tensor]]:
    """Lends buffers of these numbers of elements, in the dtype of a tensor; `keep`: for later calls too."""
    needed = sum(sizes) * like.itemsize
    try:
        memory = _free.pop()
    except IndexError:  # the first call, or one beside a call of another thread
        memory = None
    if memory is None or memory.nbytes < needed:
        with torch.inference_mode(False):  # later calls may be in another mode
            memory = torch.empty(max(needed, LEAST * keep), dtype=torch.uint8, device=like.device)
    try:
        yield memory[:needed].view(like.dtype).split(sizes)
    finally:
        if keep and memory.nbytes <= MOST and not _free:
            _free.append(memory)


def _padded(channels: int) -> int:
    return -(-channels // PANEL) * PANEL + APART


def _size_of_rows(rows: int, channels: int) -> int:
    return rows * _padded(channels) + APART


def _size(grid: Grid, rows: range, channels: int) -> int:
    return grid.planes * _size_of_rows(len(rows) * grid.columns, channels)


def _matrices(buffer: Tensor, planes: int, rows: int, columns: int) -> Tensor:
    """Returns a view of a buffer as matrices whose rows are padded to whole panels."""
    row = _padded(columns)
    return buffer.as_strided((planes, rows, columns), (rows * row + APART, row, 1), buffer.storage_offset())


def _view(buffer: Tensor, grid: Grid, rows: range, channels: int) -> Tensor:
    return _matrices(buffer, grid.planes, len(rows) * grid.columns, channels)
