"""Computes the gradient of upsample_cross_entropy in Triton, in gather form: one program writes each source value.

Source rows i and i + 1 and source columns j and j + 1 enclose a cell: the output pixels that are interpolated from its
four corners. A program takes a block of classes and walks down BLOCK_I rows of BLOCK_J cells, summing the gradients of
a cell's pixels with the weights of each corner. Sums of neighbouring cells meet in a source value: those of the cells
above are carried along, those of the cells to the left shifted over. One row and one column of cells belong to the
tiles before: they are computed twice. A first kernel goes over the classes for the largest logit of each pixel, and
leaves what its classes share, 12 bytes a pixel.

Operations: an exponential and, as compiled, about 22 instructions for each of the B·K·H·W logits at a ratio of 8; for
64×64 source values 1.3 times, since cells on edges are computed twice. At (8, 150, 64, 64) to 512×512, with the last
block of classes filled up, these are 440 million: 0.12 ms at 3.6 T exponentials, 0.34 ms at 29 T instructions a second.
The first kernel takes about 9 instructions a logit more, 0.1 ms.

Each kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    pixels_kernel  moves grad, logits, target, weight, total, normalizer, largest, factor, own; computes 2·B·K·M
    cells_kernel   moves grad, logits, target, weight, largest, factor, own, grad_logits; computes 8·B·K·M

cells_kernel reads what belongs to pixels again for each block of 16 classes, from the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run
from apc_kernels.ops.upsample.triton_tiles import (
    OPTIONS,
    axis_of,
    blocks,
    exp,
    first_of,
    focal_of,
    geometry,
    kernel,
    lerp,
    load_label,
    programs,
    scan_classes,
    strides_of,
    tile_of_program,
    weights_of,
    window_of,
)

ROWS_SUMMED = tl.constexpr(32)  # at once: a cell may have thousands, too many for one sum in float32


@kernel
def pixels_kernel(
    grad,  # (B, H, W) or (1,) float32
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    weight,  # (K,) or None
    total,  # (1,): the sum of weight, or None
    normalizer,  # (B, H, W) float32
    largest,  # (B, H, W) float32: logit
    factor,  # (B, H, W) float32: of exp(logit − largest)
    own,  # (B, H, W) float32: the gradient of the label's own logit
    grad_stride,
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
    LABEL_SMOOTHING: tl.constexpr,
    FOCAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes what all classes of a pixel share: NaN for a label out of range, anything for an ignored pixel."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    for first in range(begin, end, ROWS):
        o_yx, m_yx, w_y = window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS)
        b_label = tl.load(target + o_yx, mask=m_yx, other=0).to(tl.int64)
        m_valid = m_yx & (b_label >= 0) & (b_label < channels)
        b_grad = tl.load(grad + o_yx * grad_stride, mask=m_yx, other=0.0)
        b_grad = tl.where(m_valid, b_grad, float("nan"))
        b_weight = tl.full((ROWS, BLOCK_X), 1.0, tl.float32)
        if weight is not None:
            b_weight = tl.load(weight + b_label, mask=m_valid, other=0.0)
        b_own = (1.0 - LABEL_SMOOTHING) * b_weight * b_grad
        b_factor = b_own
        if LABEL_SMOOTHING > 0:
            of_all = tl.load(total) if total is not None else channels * 1.0
            b_factor += LABEL_SMOOTHING / channels * of_all * b_grad
        b_sum = tl.load(normalizer + o_yx, mask=m_yx, other=1.0)
        b_largest, _, _, _ = scan_classes(
            corners, w_y, None, None, None, channels, strides[1], 0.0, ROWS, BLOCK_X, BLOCK_K
        )
        b_label_logit = load_label(corners, w_y, b_label, m_valid, strides[1])
        if FOCAL > 0:
            b_sum, b_rest, _, b_gradient = focal_of(b_largest - b_label_logit, b_sum, FOCAL)
            b_own = -b_own * b_gradient * b_rest
            b_factor = b_factor * b_gradient / b_sum
        else:
            b_factor /= b_sum
            b_own = b_factor * exp(b_label_logit - b_largest) - b_own
        tl.store(largest + o_yx, b_largest, mask=m_yx)
        tl.store(factor + o_yx, b_factor, mask=m_yx)
        tl.store(own + o_yx, b_own, mask=m_yx)


@kernel
def cells_kernel(
    grad,  # (B, H, W) or (1,) float32, or None without smoothing
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    weight,  # (K,) or None
    largest,  # (B, H, W) float32
    factor,  # (B, H, W) float32
    own,  # (B, H, W) float32
    grad_logits,  # (B, K, h, w)
    grad_stride,
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
    out_stride_b,  # the same of the result
    out_stride_c,
    out_stride_y,
    out_stride_x,
    ALIGN_CORNERS: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Computes BLOCK_K classes, BLOCK_I source rows and BLOCK_J − 1 source columns of one image."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    out_strides = (out_stride_b, out_stride_c, out_stride_y, out_stride_x)
    tile = cells_of_program(channels, axis_y, axis_x, BLOCK_K, BLOCK_I, BLOCK_J)
    channel = tile[3]
    b_weight = tl.full((BLOCK_K,), 1.0, tl.float32)
    if weight is not None:
        b_weight = tl.load(weight + channel, mask=channel < channels, other=0.0)
    shared = (grad, target, b_weight, largest, factor, own, grad_stride, ignore_index, channels, LABEL_SMOOTHING)
    maps = (logits, grad_logits, axis_y, axis_x, strides, out_strides)
    gather_cells(maps, tile, channels, cross_entropy_gradient, shared, BLOCK_K, BLOCK_I, BLOCK_J, BLOCK_S)


@triton.jit
def cross_entropy_gradient(shared, i_b, channel, o_js, m_js, corners):
    """Computes the gradient of logits (BLOCK_K, J, S) of these classes at pixels (J, S).

    `corners` are the logits in the source rows above and below, and their weights: interpolated after everything else
    is loaded, they take the fewest registers.
    """
    grad, target, b_weight, largest, factor, own, grad_stride, ignore_index, channels, smoothing = shared
    b_label = tl.load(target + o_js, mask=m_js, other=0)
    kept = m_js & (b_label != ignore_index)
    b_largest = tl.load(largest + o_js, mask=kept, other=0.0)
    b_factor = tl.load(factor + o_js, mask=kept, other=0.0)
    b_own = tl.load(own + o_js, mask=kept, other=0.0)
    b_power = lerp(corners[0], corners[1], corners[2], corners[3]) - b_largest[None, :, :]
    b_grad = b_factor[None, :, :] * exp(b_power)
    # A label that 32 bits do not hold is out of range, and its pixel's own term NaN like all others.
    is_own = channel[:, None, None] == b_label.to(tl.int32)[None, :, :]
    b_grad = tl.where(is_own, b_own[None, :, :], b_grad)
    if grad is not None:
        b_smooth = tl.load(grad + o_js * grad_stride, mask=kept, other=0.0)
        b_smooth *= smoothing / channels
        b_grad -= b_weight[:, None, None] * b_smooth[None, :, :]
    return tl.where(kept[None, :, :], b_grad, 0.0)


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
    GRADIENT: tl.constexpr,  # a function like cross_entropy_gradient, and
    shared,  # its first argument
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sums the gradients of the pixels of a tile's cells for each source value, and stores them."""
    logits, grad_logits, axis_y, axis_x, strides, out_strides = maps
    (source_rows, rows, _, _, _), (source_columns, columns, _, _, _) = axis_y, axis_x
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


def upsample_cross_entropy_backward(*arguments) -> None:
    run(backward_launches(*arguments), arguments[-1])


def backward_launches(
    grad, logits, target, weight, ignore_index, label_smoothing, focal, align_corners, normalizer, grad_logits
) -> list[tuple]:
    size = target.shape[1:]
    shared = {"grad": grad, "logits": logits, "target": target, "weight": weight}
    shared |= {name: torch.empty_like(normalizer) for name in ("largest", "factor", "own")}
    shared |= {"grad_stride": 1 if grad.dim() == 3 else 0, "ignore_index": ignore_index}
    shared |= {"LABEL_SMOOTHING": label_smoothing, **geometry(logits, size, align_corners)}
    total = weight.sum()[None] if weight is not None and label_smoothing else None
    pixels = {"normalizer": normalizer, "total": total, "FOCAL": focal, **blocks(logits, size)}
    cells = {"grad_logits": grad_logits, **strides_of(grad_logits), **cell_blocks(logits, size)}
    cells |= {"grad": grad, "weight": weight} if label_smoothing else {"grad": None, "weight": None}
    return [
        (pixels_kernel, (programs(logits, size),), shared | pixels),
        (cells_kernel, (cell_programs(logits, cells),), shared | cells),
    ]


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
