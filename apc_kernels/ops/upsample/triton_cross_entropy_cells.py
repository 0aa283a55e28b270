"""Sums the gradients of upsample_cross_entropy for the logits in Triton: one program writes each source value.

Source rows i and i + 1 and source columns j and j + 1 enclose a cell: the output pixels that are interpolated from its
four corners. Pixels before the first source row are of row −1, those before the first column of column −1.

What the classes of a pixel share lies in a record, 20 bytes a pixel, 24 with smoothing. Records lie as they are read:
for each row of pixels and each slot of a cell, those of neighbouring cells side by side.

A thread takes a few classes and the cells of a column, and walks down BLOCK_I + 1 rows of cells. It interpolates the
rows above and below at the columns of a cell's pixels, and sums the gradients of a row of pixels for the left and the
right, before it adds them to the corners above and below; what belongs below is carried along. What belongs to the
right is handed to the next thread when a source row is complete. One row of cells belongs to the tile before and is
computed twice, and one column too, unless a block of threads holds all columns: they close to a RING then, in which
the pixels of column −1 share the cell of the last column. No value leaves its thread in between.

Operations: an exponential and, as compiled, about 10 instructions for each of the B·K·H·W logits at a ratio of 8, and
1.1 times these for 64×64 source values. At (8, 150, 64, 64) to 512×512 these are 350 million: 0.1 ms at 3.6 T
exponentials, 0.12 ms at 30 T instructions a second.

The kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    cells_kernel  moves logits, weight, peaks, records, classes, scales, grad_logits; computes 7·B·K·M

It reads records again for each block of 20 classes or so, from the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.interpolation import mapping
from apc_kernels.ops.upsample.triton_relative import LOG2E, NONE
from apc_kernels.ops.upsample.triton_tiles import OPTIONS, axis_of, index_of, kernel, lerp

CHUNK, RECORD = tl.constexpr(16), tl.constexpr(4)  # cells side by side, numbers of a record
ROWS_SUMMED = tl.constexpr(32)  # at once: a cell may have thousands, too many for one sum in float32


@kernel
def cells_kernel(
    logits,  # (B, K, h, w)
    weight,  # (K,) or None, also without smoothing
    peaks,  # (B, h, w) float32: see peaks_kernel
    records,  # see pixels_kernel: the largest logit, the label's own gradient, and the factors to the left and right
    classes,  # the same: labels
    scales,  # the same, or None
    grad_logits,  # (B, K, h, w)
    slots,
    channels,
    height,  # of the logits
    width,
    rows,  # of the result
    columns,
    stride_b,  # of the logits: image, class, row, column
    stride_c,
    stride_y,
    stride_x,
    out_stride_b,  # the same of the result
    out_stride_c,
    out_stride_y,
    out_stride_x,
    ALIGN_CORNERS: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    RING: tl.constexpr,
    TALL: tl.constexpr,  # whether cells may have more than ROWS_SUMMED rows
    WIDE: tl.constexpr,  # whether cells have more than BLOCK_S slots
    CLASSES: tl.constexpr,  # of a thread
    BLOCK_K: tl.constexpr,  # threads with other classes
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Computes CLASSES·BLOCK_K classes, BLOCK_I source rows and BLOCK_J − 1 source columns of one image, or all."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    blocks_k = tl.cdiv(channels, CLASSES * BLOCK_K)
    blocks_j = 1 if RING else tl.cdiv(width, BLOCK_J - 1)
    tile = tl.program_id(0) // blocks_k
    i_b = (tile // blocks_j // tl.cdiv(height, BLOCK_I)).to(tl.int64)
    first_row = tile // blocks_j % tl.cdiv(height, BLOCK_I) * BLOCK_I
    lane = tl.arange(0, BLOCK_J)[:, None] + tl.zeros((BLOCK_J, BLOCK_K), tl.int32)
    column = lane if RING else tile % blocks_j * (BLOCK_J - 1) - 1 + lane
    left = tl.minimum(tl.maximum(column, 0), width - 1)
    right = tl.where(column + 1 < width, column + 1, 0 if RING else width - 1)
    previous = tl.where(lane > 0, lane - 1, width - 1 if RING else 0)
    m_out = (column < width) & (RING | (lane > 0))

    # The last block of classes ends with the last class, and leaves those of the block before to that block.
    first_new = tl.program_id(0) % blocks_k * (CLASSES * BLOCK_K)
    first_class = tl.maximum(tl.minimum(first_new, channels - CLASSES * BLOCK_K), 0)
    channel = first_class + tl.arange(0, BLOCK_K)[None, :] + tl.zeros((BLOCK_J, BLOCK_K), tl.int32)
    logits += i_b * stride_b
    b_classes = ()
    for _ in tl.static_range(CLASSES):
        b_weight = tl.full((BLOCK_J, BLOCK_K), 1.0, tl.float32)
        if LABEL_SMOOTHING > 0 and weight is not None:
            b_weight = tl.load(weight + tl.minimum(channel, channels - 1))
        o_k = tl.minimum(channel, channels - 1).to(tl.int64) * stride_c
        o_out = i_b * out_stride_b + channel.to(tl.int64) * out_stride_c + column.to(tl.int64) * out_stride_x
        m_k = m_out & (channel >= first_new) & (channel < channels)
        b_classes += ((channel, o_k, o_out, m_k, b_weight * (LABEL_SMOOTHING / channels)),)
        channel += BLOCK_K
    lefts, rights = logits + left.to(tl.int64) * stride_x, logits + right.to(tl.int64) * stride_x
    peaks += i_b * height * width
    row_size, o_cell = cells_of_row(tl.minimum(column, width - 1), slots, width, RING)
    pixels = (records, classes, scales, i_b * rows, row_size)

    sources = (lefts, rights, peaks, left, right, width, stride_y)
    b_corners = load_corners(sources, b_classes, tl.maximum(first_row - 1, 0))
    b_zeros = zeros_of(left, 2 * CLASSES)
    b_above = b_zeros
    w_x = side_weights(column, 0, axis_x, RING, BLOCK_S)
    for i_y in range(first_row - 1, tl.minimum(first_row + BLOCK_I, height)):
        b_next = load_corners(sources, b_classes, tl.minimum(i_y + 1, height - 1))
        begin_y, end_y = first_between(i_y, axis_y), first_between(i_y + 1, axis_y)
        b_below = b_zeros
        for slot in range(0, slots if WIDE else 1, BLOCK_S):
            if WIDE:
                w_x = side_weights(column, slot, axis_x, RING, BLOCK_S)
            b_lines = lines_between(b_corners, b_next, w_x)
            window = (o_cell + slot * CHUNK, i_y, axis_y)
            if TALL:
                for first in range(begin_y, end_y, ROWS_SUMMED):
                    last = tl.minimum(first + ROWS_SUMMED, end_y)
                    b_sums = sum_rows(pixels, window, b_lines, b_classes, first, last, b_zeros, b_zeros)
                    b_above, b_below = added(b_above, b_sums[0]), added(b_below, b_sums[1])
            else:
                b_above, b_below = sum_rows(pixels, window, b_lines, b_classes, begin_y, end_y, b_above, b_below)
        if i_y >= first_row:
            for c in tl.static_range(CLASSES):
                b_out = b_above[2 * c] + tl.gather(b_above[2 * c + 1], previous, 0)
                o_out = b_classes[c][2] + tl.cast(i_y, tl.int64) * out_stride_y
                tl.store(grad_logits + o_out, b_out.to(grad_logits.dtype.element_ty), mask=b_classes[c][3])
        b_corners, b_above = b_next, b_below


@triton.jit
def first_between(index, axis):
    """Returns the first output position at this source index or after it; those before the first index are at −1."""
    source, size, step, start, denominator = axis
    step = tl.maximum(step, 1)  # with 0 every position has index 0
    first = tl.minimum((tl.maximum(index * denominator - start, 0) + step - 1) // step, size)
    return tl.where(index < 0, 0, tl.where(index >= source, size, first))


@triton.jit
def weight_between(position, index, axis):
    """Returns the weight of the source after `index`: 1 if `index` is −1, 0 if it is the last."""
    source, _, step, start, denominator = axis
    rest = position * step + start - index * denominator
    return tl.where(index < 0, 1.0, tl.where(index >= source - 1, 0.0, rest.to(tl.float32) / denominator))


@triton.jit
def cells_of_row(column, slots, width, RING: tl.constexpr):
    """Returns the number of records of a row of pixels, and where those of cells of a column begin."""
    cell = column if RING else column + 1
    chunks = tl.cdiv(width if RING else width + 1, CHUNK)
    return chunks.to(tl.int64) * slots * CHUNK, (cell // CHUNK * slots * CHUNK + cell % CHUNK).to(tl.int64)


@triton.jit
def place_in_cells(x, slots, axis, RING: tl.constexpr):
    """Returns the number of records of a row, where output columns have theirs, and weights of the source columns."""
    source, size, step, start, _ = axis
    x = tl.minimum(x, size - 1)
    column = tl.where(x * step + start < 0, -1, index_of(x, axis))
    w_right = weight_between(x, column, axis)
    slot = x - first_between(column, axis)
    if RING:  # the pixels of column −1 follow those of the last one
        slot = tl.where(column < 0, slot + size - first_between(source - 1, axis), slot)
        column = tl.where(column < 0, source - 1, column)
    row_size, o_cell = cells_of_row(column, slots, source, RING)
    return row_size, o_cell + slot * CHUNK, 1.0 - w_right, w_right


@triton.jit
def side_weights(column, slot, axis, RING: tl.constexpr, BLOCK_S: tl.constexpr):
    """Returns weights for powers of 2 of the source columns beside the pixels in slots of cells: of none, anything."""
    begin, end = first_between(column, axis), first_between(column + 1, axis)
    w_x = ()
    for s in tl.static_range(BLOCK_S):
        x = begin + slot + s
        w_right = tl.where(x < end, weight_between(x, column, axis), 0.0)
        if RING:
            w_right = tl.where((column == axis[0] - 1) & (x >= end), 1.0, w_right)
        w_x += (((1.0 - w_right) * LOG2E, w_right * LOG2E),)
    return w_x


@triton.jit
def load_corners(sources, b_classes, row):
    """Loads the logits of classes in a source row to the left and right of cells, relative to the largest, finite."""
    lefts, rights, peaks, left, right, width, stride_y = sources
    o_row = tl.cast(row, tl.int64) * stride_y
    b_peak_left, b_peak_right = tl.load(peaks + row * width + left), tl.load(peaks + row * width + right)
    b_corners = ()
    for c in tl.static_range(len(b_classes)):
        b_left = tl.load(lefts + o_row + b_classes[c][1]).to(tl.float32) - b_peak_left
        b_right = tl.load(rights + o_row + b_classes[c][1]).to(tl.float32) - b_peak_right
        b_corners += ((tl.maximum(b_left, NONE), tl.maximum(b_right, NONE)),)
    return b_corners


@triton.jit
def lines_between(b_corners, b_next, w_x):
    """Interpolates along the row above, and subtracts it from the row below, for each class and pixel."""
    b_lines = ()
    for c in tl.static_range(len(b_corners)):
        b_line = ()
        for s in tl.static_range(len(w_x)):
            b_top = lerp(b_corners[c][0], b_corners[c][1], w_x[s][0], w_x[s][1])
            b_line += ((b_top, lerp(b_next[c][0], b_next[c][1], w_x[s][0], w_x[s][1]) - b_top),)
        b_lines += (b_line,)
    return b_lines


@triton.jit
def sum_rows(pixels, window, b_lines, b_classes, begin, end, b_above, b_below):
    """Adds the gradients of rows of pixels to those of the corners, class by class: left and right, above and below."""
    records, classes, scales, first_row, row_size = pixels
    o_cell, i_y, axis_y = window
    o_cell += (first_row + begin) * row_size
    for y in range(begin, end):
        w_below = weight_between(y, i_y, axis_y)
        b_pixels = ()
        for s in tl.static_range(len(b_lines[0])):
            o_record = o_cell + s * CHUNK
            b_record = tl.load(records + (o_record[:, :, None] * RECORD + tl.arange(0, RECORD)[None, None, :]))
            b_even, b_odd = tl.split(tl.reshape(b_record, (o_cell.shape[0], o_cell.shape[1], 2, 2)))
            b_scale = 1.0
            if scales is not None:
                b_scale = tl.load(scales + o_record)
            b_largest, b_to_left = tl.split(b_even)
            b_own, b_to_right = tl.split(b_odd)
            b_pixels += ((b_largest, b_to_left, b_own, b_to_right, tl.load(classes + o_record), b_scale),)
        b_new_above, b_new_below = (), ()
        for c in tl.static_range(len(b_lines)):
            channel, b_smooth = b_classes[c][0], b_classes[c][4]
            b_left, b_right = tl.zeros(o_cell.shape, tl.float32), tl.zeros(o_cell.shape, tl.float32)
            for s in tl.static_range(len(b_lines[0])):
                b_largest, b_to_left, b_own, b_to_right, b_class, b_scale = b_pixels[s]
                b = tl.exp2(tl.fma(b_lines[c][s][1], w_below, b_lines[c][s][0]) - b_largest)
                if scales is not None:
                    b *= b_scale
                b = tl.where(b_class == channel, b_own, b)
                if scales is not None:
                    b -= b_smooth
                b_left, b_right = tl.fma(b, b_to_left, b_left), tl.fma(b, b_to_right, b_right)
            w_above = 1.0 - w_below
            b_new_above += (tl.fma(b_left, w_above, b_above[2 * c]), tl.fma(b_right, w_above, b_above[2 * c + 1]))
            b_new_below += (tl.fma(b_left, w_below, b_below[2 * c]), tl.fma(b_right, w_below, b_below[2 * c + 1]))
        b_above, b_below = b_new_above, b_new_below
        o_cell += row_size
    return b_above, b_below


@triton.jit
def zeros_of(like, COUNT: tl.constexpr):
    """Returns a tuple of zeros."""
    b_zeros = ()
    for _ in tl.static_range(COUNT):
        b_zeros += (tl.zeros(like.shape, tl.float32),)
    return b_zeros


@triton.jit
def added(b_first, b_second):
    """Adds tuples element by element."""
    b_sums = ()
    for k in tl.static_range(len(b_first)):
        b_sums += (b_first[k] + b_second[k],)
    return b_sums


def cell_programs(logits: Tensor, blocks: dict) -> int:
    batch, channels, height, width = logits.shape
    tiles = 1 if blocks["RING"] else triton.cdiv(width, blocks["BLOCK_J"] - 1)
    of_classes = triton.cdiv(channels, blocks["CLASSES"] * blocks["BLOCK_K"])
    return batch * triton.cdiv(height, blocks["BLOCK_I"]) * tiles * of_classes


def cell_blocks(logits: Tensor, size: Sequence[int], align_corners: bool, smooth: bool) -> tuple[dict, int, torch.Size]:
    """Returns the tile sizes, the slots for pixels in a row of a cell, and the shape of the records.

    A thread has 32 lines (class, column of pixels) at most, 24 with smoothing; more would leave no register to spare.
    """
    batch, channels, height, width = logits.shape
    tallest, widest = (
        min(pixels, triton.cdiv(axis.denominator, axis.step)) if axis.step else pixels
        for pixels, axis in ((n, mapping(m, n, align_corners)) for m, n in ((height, size[0]), (width, size[1])))
    )
    ring = 48 < width <= 64
    columns = min(8, widest)
    slots = columns * triton.cdiv(widest, columns)
    threads = min(4 if ring else 8, triton.next_power_of_2(channels))
    most = min(6, (24 if smooth else 32) // columns)
    blocks = {
        "RING": ring,
        "TALL": tallest > ROWS_SUMMED.value,
        "WIDE": slots > columns,
        "CLASSES": triton.cdiv(channels, threads * triton.cdiv(channels, threads * most)),
        "BLOCK_K": threads,
        "BLOCK_I": 16,
        "BLOCK_J": 64 if ring else min(128 // threads, max(2, triton.next_power_of_2(width + 1))),
        "BLOCK_S": columns,
        **OPTIONS,
    }
    blocks["num_warps"] = max(1, blocks["BLOCK_J"] * threads // 32)
    chunks = triton.cdiv(width if ring else width + 1, CHUNK.value)
    return blocks, slots, torch.Size((batch * size[0], chunks, slots, CHUNK.value))
