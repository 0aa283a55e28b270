"""Computes upsample_argmax and upsample_confusion in Triton: the best class of every pixel.

A program is one warp. It takes 32 output columns and, at a ratio of 8, the eight output rows between two source rows of
one image (triton_tiles.py); a thread has one column. No warp waits for others, so branches may depend on logits.

All classes: of a block of four classes a pixel keeps the largest logit, which takes three instructions a logit (two to
interpolate, a maximum), and afterwards the number of the block if the maximum has grown. The blocks that have won are
interpolated again, to the same bits, and the first class that equals the maximum is the label. The last block begins
early enough to be full: what two blocks share cannot make the maximum grow again.

Some classes: an interpolated logit lies between the smallest and the largest of its four source logits. Where the best
classes at the tile's four outermost source pixels are two at most, both are interpolated, and the larger of the two is
a bound at every pixel: in the cell of four source pixels around it, a class whose largest source logit lies below the
smallest bound of the cell's pixels cannot win. The others are interpolated one by one, in ascending order. Bounds are
widened by more than rounding can do, so labels have the bits of a search of all classes.

Each kernel's least, every tensor moved once; how much it computes depends on the logits:

    argmax_kernel     moves logits, labels
    confusion_kernel  moves logits, target, counts, invalid

At (8, 150, 64, 64) to 512×512 in bfloat16 and channels_last, each random logit takes 7.6 instructions of PTX, 0.079 ms
of an H200's schedulers, and 2.3 where one class is ahead in patches. 3 % of the first are the search (docs/ptx.md).
A logit is interpolated by a product and a fused sum. `top + w·(bottom − top)` would save one instruction in seven, but
two equal infinities would become NaN, and a pixel's logit other bits than in the other operations.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run
from apc_kernels.ops.interpolation import mapping
from apc_kernels.ops.upsample.triton_tiles import (
    OPTIONS,
    START,
    axis_of,
    geometry,
    index_of,
    kernel,
    lerp,
    tile_of_program,
    window_of,
)

BLOCK_X = tl.constexpr(32)  # output columns: a warp's threads
GROUP = tl.constexpr(32)  # classes that the search looks at together
# An interpolated logit takes six roundings of half a unit each, and below the smallest normal number no more than that.
MARGIN, LEAST = tl.constexpr(2.0**-20), tl.constexpr(2.0**-120)

# Twelve warps of argmax fit on a multiprocessor. Counting takes more registers.
FEW_REGISTERS = {} if torch.version.hip else {"maxnreg": 168}


@kernel
def argmax_kernel(
    logits,  # (B, K, h, w)
    labels,  # (B, H, W) uint8, int16 or int32
    channels,
    height,  # of the logits
    width,
    rows,  # of the result
    columns,
    stride_b,  # of the logits: image, class, row, column
    stride_c,
    stride_y,
    stride_x,
    ALIGN_CORNERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Computes the labels of one tile."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    leaders = None
    if CELLS > 0:
        leaders = leaders_of(corners, axis_y, axis_x, i_y, column, channels, strides)
    for first in range(begin, end, ROWS):
        o_yx, m_yx, w_y = window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS)
        b_class = best_classes(
            corners, w_y, leaders, first, axis_x, column, channels, strides, ROWS, BLOCK_K, BLOCKS, CELLS
        )
        tl.store(labels + o_yx, b_class.to(labels.dtype.element_ty), mask=m_yx)


@kernel
def confusion_kernel(
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    counts,  # (K, K) int64, zeros
    invalid,  # (1,) int64, zero
    ignore_index,
    channels,
    height,  # of the logits
    width,
    rows,  # of the result
    columns,
    stride_b,  # of the logits: image, class, row, column
    stride_c,
    stride_y,
    stride_x,
    ALIGN_CORNERS: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Adds the pixels of one tile to the counts. Integers: in whatever order, their sum is the same.

    Most pixels of a tile are of few cells of the matrix, the same few as all over the image. ROUNDS of these are
    counted here and added as one each; pixel by pixel they would queue at the same addresses.
    """
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    leaders = None
    if CELLS > 0:
        leaders = leaders_of(corners, axis_y, axis_x, i_y, column, channels, strides)
    for first in range(begin, end, ROWS):
        o_yx, m_yx, w_y = window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS)
        b_class = best_classes(
            corners, w_y, leaders, first, axis_x, column, channels, strides, ROWS, BLOCK_K, BLOCKS, CELLS
        )
        b_label = tl.load(target + o_yx, mask=m_yx, other=0).to(tl.int64)
        m_kept = m_yx & (b_label != ignore_index)
        m_left = m_kept & (b_label >= 0) & (b_label < channels)
        wrong = tl.sum(tl.sum((m_kept & (m_left == 0)).to(tl.int32), 1), 0).to(tl.int64)
        tl.atomic_add(invalid, wrong, mask=wrong > 0, sem="relaxed")

        b_cell = b_label.to(tl.int32) * channels + b_class  # 32 bits hold it: the operation limits the classes
        for _ in range(ROUNDS):
            cell = tl.min(tl.min(tl.where(m_left, b_cell, 2**31 - 1), 1), 0)
            m_cell = m_left & (b_cell == cell)
            count = tl.sum(tl.sum(m_cell.to(tl.int32), 1), 0).to(tl.int64)
            tl.atomic_add(counts + cell, count, mask=count > 0, sem="relaxed")
            m_left = m_left & (b_cell != cell)
        tl.atomic_add(counts + b_cell, tl.full((ROWS, BLOCK_X), 1, tl.int64), mask=m_left, sem="relaxed")


@triton.jit
def best_classes(
    corners,
    w_y,
    leaders,
    row,
    axis_x,
    column,
    channels,
    strides,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Returns the first best class of each pixel, (ROWS, BLOCK_X)."""
    if CELLS > 0:
        one, other, agree = leaders
        if agree:
            b_class = best_of_some(corners, w_y, one, other, row, axis_x, column, channels, strides, ROWS, CELLS)
        else:
            b_class = best_of_all(corners, w_y, channels, strides[1], ROWS, BLOCK_K, BLOCKS)
    else:
        b_class = best_of_all(corners, w_y, channels, strides[1], ROWS, BLOCK_K, BLOCKS)
    return b_class


@triton.jit
def best_of_all(corners, w_y, channels, stride_c, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr):
    """Goes over all classes, of which there are BLOCKS blocks at least."""
    b_max = tl.full((ROWS, BLOCK_X), START, tl.float32)
    b_block = tl.zeros((ROWS, BLOCK_X), tl.int32)
    for start in range(0, channels, BLOCKS * BLOCK_K):
        first = tl.minimum(start, channels - BLOCKS * BLOCK_K)
        o_first = first.to(tl.int64) * stride_c
        for block in tl.static_range(BLOCKS):
            b_most = b_max
            for k in tl.static_range(BLOCK_K):
                b_most = tl.maximum(b_most, logits_at(corners, w_y, o_first, (block * BLOCK_K + k) * stride_c))
            b_block = tl.where(b_most > b_max, first + block * BLOCK_K, b_block)
            b_max = b_most

    b_class = tl.zeros((ROWS, BLOCK_X), tl.int32)
    b_left = tl.where(b_max > START, b_block, channels)  # blocks of pixels whose class is not known
    b_first = tl.min(b_left, 0)  # of each column
    while tl.min(b_first, 0) < channels:
        b_here = tl.minimum(b_first, channels - BLOCK_K)
        o_block = b_here.to(tl.int64) * stride_c
        b_found = tl.full((ROWS, BLOCK_X), BLOCK_K - 1, tl.int32)
        for i in tl.static_range(1, BLOCK_K):
            b_logits = logits_at(corners, w_y, o_block, (BLOCK_K - 1 - i) * stride_c)
            b_found = tl.where(b_logits == b_max, BLOCK_K - 1 - i, b_found)
        here = b_left == b_here[None, :]
        b_class = tl.where(here, b_here[None, :] + b_found, b_class)
        b_left = tl.where(here, channels, b_left)
        b_first = tl.min(b_left, 0)
    return b_class


@triton.jit
def leaders_of(corners, axis_y, axis_x, i_y, column, channels, strides):
    """Returns the smallest and the largest of the best classes at the tile's four outermost source pixels.

    With them whether these are all that there are.
    """
    top = corners[0]
    i_x = index_of(tl.minimum(column, axis_x[1] - 1), axis_x)
    last = tl.minimum(tl.max(i_x, 0) + 1, axis_x[0] - 1).to(tl.int64) * strides[3]
    # The row after the last one would be the last one again: then it is the row before.
    apart = tl.where(i_y + 1 < axis_y[0], 1, tl.where(i_y > 0, -1, 0)).to(tl.int64) * strides[2]
    pixel = tl.arange(0, 4)
    o_pixel = tl.where(pixel % 2 == 0, tl.min(i_x, 0).to(tl.int64) * strides[3], last) + tl.where(pixel < 2, 0, apart)
    b_max = tl.full((4, GROUP), START, tl.float32)
    b_class = tl.zeros((4, GROUP), tl.int32)
    for first in range(0, channels, GROUP):
        channel = first + tl.arange(0, GROUP)
        o_k = channel.to(tl.int64) * strides[1]
        m_k = (channel < channels)[None, :]
        b_logits = tl.load(top + (o_pixel[:, None] + o_k[None, :]), mask=m_k, other=-float("inf")).to(tl.float32)
        better = b_logits > b_max
        b_max = tl.where(better, b_logits, b_max)
        b_class = tl.where(better, channel[None, :], b_class)
    b_best = tl.min(tl.where(b_max == tl.max(b_max, 1)[:, None], b_class, channels), 1)
    one, other = tl.min(b_best, 0), tl.max(b_best, 0)
    agree = tl.sum(((b_best == one) | (b_best == other)).to(tl.int32), 0) == 4
    return one, other, agree & ((axis_y[0] > 1) | (one == other))


@triton.jit
def best_of_some(
    corners, w_y, one, other, row, axis_x, column, channels, strides, ROWS: tl.constexpr, CELLS: tl.constexpr
):
    """Goes over the classes that two of them do not exclude."""
    top, bottom, _, _, _ = corners
    stride_c = strides[1]
    b_bound = tl.maximum(logits_of(corners, w_y, one, stride_c), logits_of(corners, w_y, other, stride_c))
    b_bound = tl.min(tl.maximum(b_bound, START), 0)
    i_x = index_of(tl.minimum(column, axis_x[1] - 1), axis_x)
    # 0 is added: pointers that do not depend on the rows would stay in registers while the other pass runs.
    x = tl.min(i_x, 0) + tl.minimum(row, 0)
    bounds = ()
    for cell in tl.static_range(CELLS):
        bounds += (tl.min(tl.where(i_x == x + cell, b_bound, float("inf")), 0),)

    b_max = tl.full((ROWS, BLOCK_X), START, tl.float32)
    b_class = tl.zeros((ROWS, BLOCK_X), tl.int32)
    for first in range(0, channels, GROUP):
        channel = first + tl.arange(0, GROUP)
        m_k = channel < channels
        b_left = column_of(top, bottom, x, axis_x, channel, m_k, strides)
        m_can = m_k & (channel < 0)
        for cell in tl.static_range(CELLS):
            b_right = column_of(top, bottom, x + (cell + 1), axis_x, channel, m_k, strides)
            b_most = tl.maximum(b_left, b_right)
            m_can = m_can | (b_most + (tl.abs(b_most) * MARGIN + LEAST) >= bounds[cell])
            b_left = b_right
        m_can = m_can & m_k
        k = tl.min(tl.where(m_can, channel, channels), 0)
        while k < channels:
            b_logits = logits_of(corners, w_y, k, stride_c)
            better = b_logits > b_max
            b_max = tl.where(better, b_logits, b_max)
            b_class = tl.where(better, k, b_class)
            m_can = m_can & (channel > k)
            k = tl.min(tl.where(m_can, channel, channels), 0)
    return b_class


@triton.jit
def column_of(top, bottom, x, axis_x, channel, mask, strides):
    """Loads the larger of two source pixels, one above the other, for each class."""
    o_x = tl.minimum(x, axis_x[0] - 1).to(tl.int64) * strides[3]
    o_k = channel.to(tl.int64) * strides[1]
    b_top = tl.load(top + o_x + o_k, mask=mask, other=0.0).to(tl.float32)
    b_bottom = tl.load(bottom + o_x + o_k, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(b_top, b_bottom)


@triton.jit
def logits_of(corners, w_y, k, stride_c):
    """Computes the interpolated logits of one class, (ROWS, BLOCK_X)."""
    return logits_at(corners, w_y, k.to(tl.int64) * stride_c, 0)


@triton.jit
def logits_at(corners, w_y, o_block, o_k):
    """Computes the interpolated logits of the class at an offset, which may be another one for each column."""
    top, bottom, left, right, w_x = corners
    b_top = row_at(top + o_block + left, top + o_block + right, o_k, w_x)
    b_bottom = row_at(bottom + o_block + left, bottom + o_block + right, o_k, w_x)
    return lerp(b_top[None, :], b_bottom[None, :], w_y[0][:, None], w_y[1][:, None])


@triton.jit
def row_at(left, right, o_k, w_x):
    """Loads a source row, interpolated at the output columns."""
    b_left, b_right = tl.load(left + o_k).to(tl.float32), tl.load(right + o_k).to(tl.float32)
    return lerp(b_left, b_right, w_x[0], w_x[1])


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool, labels: Tensor) -> None:
    run(argmax_launches(logits, size, align_corners, labels), logits)


def upsample_confusion(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, counts: Tensor, invalid: Tensor
) -> None:
    counts.zero_()
    invalid.zero_()
    run(confusion_launches(logits, target, ignore_index, align_corners, counts, invalid), logits)


def argmax_launches(logits: Tensor, size: Sequence[int], align_corners: bool, labels: Tensor) -> list[tuple]:
    return _launches(argmax_kernel, logits, size, align_corners, {"labels": labels, **FEW_REGISTERS})


def confusion_launches(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, counts: Tensor, invalid: Tensor
) -> list[tuple]:
    arguments = {"target": target, "counts": counts, "invalid": invalid, "ignore_index": ignore_index, "ROUNDS": 4}
    return _launches(confusion_kernel, logits, target.shape[1:], align_corners, arguments)


def _launches(function, logits: Tensor, size: Sequence[int], align_corners: bool, arguments: dict) -> list[tuple]:
    batch, classes, height, width = logits.shape
    arguments = {"logits": logits, **geometry(logits, size, align_corners), **OPTIONS, "num_warps": 1, **arguments}
    arguments["ROWS"] = min(8, triton.next_power_of_2(triton.cdiv(size[0], height)))
    arguments["BLOCK_K"] = 4 if classes >= 4 else 2 if classes >= 2 else 1
    arguments["BLOCKS"] = 2 if classes >= 8 else 1
    arguments["CELLS"] = _cells(classes, width, size[1], align_corners)
    return [(function, (batch * height * triton.cdiv(size[1], BLOCK_X.value),), arguments)]


def _cells(classes: int, width: int, columns: int, align_corners: bool) -> int:
    """Returns how many source columns a tile's columns can lie behind; 0 where too many for a search to pay."""
    step, _, denominator = mapping(width, columns, align_corners)
    cells = (step * (BLOCK_X.value - 1) + denominator - 1) // denominator + 1
    return next((n for n in (3, 5, 9) if cells <= n and classes >= 16), 0)
