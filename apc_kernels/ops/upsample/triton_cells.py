"""Provides the gather form of gradients of upsampled logits for Triton kernels: one program writes each source value.

Source rows i and i + 1 and source columns j and j + 1 enclose a cell: the output pixels that are interpolated from its
four corners. A program takes a block of classes and walks down BLOCK_I rows of BLOCK_J cells, summing the gradients of
a cell's pixels with the weights of each corner. Sums of neighbouring cells meet in a source value: those of the cells
above are carried along, those of the cells to the left shifted over. One row and one column of cells belong to the
tiles before: they are computed twice.

The cross entropy has a form of its own (triton_cross_entropy_cells.py), with fewer instructions.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.upsample.triton_tiles import OPTIONS, first_of, lerp, weights_of

ROWS_SUMMED = tl.constexpr(32)  # at once: a cell may have thousands, too many for one sum in float32


@triton.jit
def cells_of_program(channels, axis_y, axis_x, BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Returns the image, the first source row, the columns of cells (the first of them of the tile before), classes."""
    blocks_k, blocks_j = tl.cdiv(channels, BLOCK_K), tl.cdiv(axis_x[0], BLOCK_J - 1)
    tile = tl.program_id(0) // blocks_k
    i_b = (tile // blocks_j // tl.cdiv(axis_y[0], BLOCK_I)).to(tl.int64)
    first_row = tile // blocks_j % tl.cdiv(axis_y[0], BLOCK_I) * BLOCK_I
    column = tile % blocks_j * (BLOCK_J - 1) - 1 + tl.arange(0, BLOCK_J)
    channel = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    return i_b, first_row, column, channel


@triton.jit
def gather_cells(
    maps,
    tile,  # cells_of_program
    channels,
    GRADIENT: tl.constexpr,  # a function like region_gradient, and
    shared,  # its first argument
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums the gradients of the pixels of a tile's cells for each source value, and stores them."""
    logits, grad_logits, axis_y, axis_x, strides, out_strides = maps
    source_rows, rows, source_columns, columns = axis_y[0], axis_y[1], axis_x[0], axis_x[1]
    stride_b, stride_c, stride_y, stride_x = strides
    out_stride_b, out_stride_c, out_stride_y, out_stride_x = out_strides
    i_b, first_row, column, channel = tile
    inside = (column >= 0) & (column < source_columns)
    begin = first_of(column, axis_x)
    end = tl.where(inside, first_of(column + 1, axis_x), begin)
    m_kj = (channel < channels)[:, None] & inside[None, :]
    o_k, o_j = channel[:, None].to(tl.int64), column[None, :].to(tl.int64)
    o_left = o_k * stride_c + o_j * stride_x
    o_right = o_k * stride_c + tl.minimum(o_j + 1, source_columns - 1) * stride_x
    o_out = o_k * out_stride_c + o_j * out_stride_x
    m_out = m_kj & (tl.arange(0, BLOCK_J) > 0)[None, :]
    neighbour = tl.zeros((BLOCK_K, BLOCK_J), tl.int32) + tl.maximum(tl.arange(0, BLOCK_J) - 1, 0)[None, :]
    is_last = (column == source_columns - 1)[None, :]

    above = tl.maximum(first_row - 1, 0)
    logits += i_b * stride_b + above.to(tl.int64) * stride_y
    grad_logits += i_b * out_stride_b + above.to(tl.int64) * out_stride_y
    begin_y = first_of(above, axis_y)
    b_above_left = tl.zeros((BLOCK_K, BLOCK_J, BLOCK_S), tl.float32)
    b_above_right = tl.zeros((BLOCK_K, BLOCK_J, BLOCK_S), tl.float32)
    for i_y in range(above, tl.minimum(first_row + BLOCK_I, source_rows)):
        end_y = first_of(i_y + 1, axis_y)
        following = logits + tl.where(i_y + 1 < source_rows, stride_y, 0)
        b_left, b_right = b_above_left, b_above_right
        b_below_left = tl.zeros((BLOCK_K, BLOCK_J, BLOCK_S), tl.float32)
        b_below_right = tl.zeros((BLOCK_K, BLOCK_J, BLOCK_S), tl.float32)
        for slot in range(0, tl.max(end - begin, 0), BLOCK_S):
            x = begin[:, None] + slot + tl.arange(0, BLOCK_S)[None, :]  # (J, S)
            m_js = x < end[:, None]
            m_corners = m_kj & (begin + slot < end)[None, :]
            w_left, w_right = weights_of(tl.minimum(x, columns - 1), column[:, None], axis_x)
            w_left, w_right = w_left[None, :, :], w_right[None, :, :]
            b_top_left = tl.load(logits + o_left, mask=m_corners, other=0.0).to(tl.float32)
            b_top_right = tl.load(logits + o_right, mask=m_corners, other=0.0).to(tl.float32)
            b_bottom_left = tl.load(following + o_left, mask=m_corners, other=0.0).to(tl.float32)
            b_bottom_right = tl.load(following + o_right, mask=m_corners, other=0.0).to(tl.float32)
            b_top = lerp(b_top_left[:, :, None], b_top_right[:, :, None], w_left, w_right)
            b_bottom = lerp(b_bottom_left[:, :, None], b_bottom_right[:, :, None], w_left, w_right)
            for first_y in range(begin_y, end_y, ROWS_SUMMED):
                b_sum_top = tl.zeros((BLOCK_K, BLOCK_J, BLOCK_S), tl.float32)
                b_sum_bottom = tl.zeros((BLOCK_K, BLOCK_J, BLOCK_S), tl.float32)
                for y in range(first_y, tl.minimum(first_y + ROWS_SUMMED, end_y)):
                    w_top, w_bottom = weights_of(y, i_y, axis_y)
                    o_js = (i_b * rows + y) * columns + x
                    b_grad = GRADIENT(shared, i_b, channel, o_js, m_js, (b_top, b_bottom, w_top, w_bottom))
                    b_sum_top += b_grad * w_top
                    b_sum_bottom += b_grad * w_bottom
                b_left += b_sum_top * w_left
                b_right += b_sum_top * w_right
                b_below_left += b_sum_bottom * w_left
                b_below_right += b_sum_bottom * w_right

        if i_y == source_rows - 1:  # what is below the last row is the last row
            b_left += b_below_left
            b_right += b_below_right
        b_sum_right = tl.sum(b_right, 2)
        b_out = tl.sum(b_left, 2) + tl.gather(b_sum_right, neighbour, 1) + tl.where(is_last, b_sum_right, 0.0)
        if i_y >= first_row:
            tl.store(grad_logits + o_out, b_out.to(grad_logits.dtype.element_ty), mask=m_out)
        begin_y = end_y
        b_above_left, b_above_right = b_below_left, b_below_right
        logits += stride_y
        grad_logits += out_stride_y


def cell_programs(logits: Tensor, cells: dict) -> int:
    batch, channels, height, width = logits.shape
    tiles = batch * triton.cdiv(height, cells["BLOCK_I"]) * triton.cdiv(width, cells["BLOCK_J"] - 1)
    return tiles * triton.cdiv(channels, cells["BLOCK_K"])


def cell_blocks(logits: Tensor, size: Sequence[int]) -> dict:
    """Returns the tile sizes.

    Larger tiles spill; at a ratio of 8 a cell's row of pixels is one step, but on the edges.
    """
    _, channels, _, width = logits.shape
    return {
        "BLOCK_K": min(16, triton.next_power_of_2(channels)),
        "BLOCK_I": 16,
        "BLOCK_J": min(8, triton.next_power_of_2(width + 1)),
        "BLOCK_S": min(8, triton.next_power_of_2(triton.cdiv(size[1], width))),
        **OPTIONS,
    }
