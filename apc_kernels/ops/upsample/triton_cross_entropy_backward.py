"""Computes the gradient of upsample_cross_entropy in Triton.

A first kernel finds the largest logit of each source pixel, as forward; a second one goes over the classes for the
largest logit of each output pixel, and leaves a record of what its classes share; a third one sums the gradients of
logits (triton_cross_entropy_cells.py). Logits are multiplied by log2 e once, with the weights of columns, and
exponentials are powers of 2.

Operations of the second one: about 6 instructions for each of the B·K·H·W logits at a ratio of 8. At (8, 150, 64, 64)
to 512×512, these are 315 million: 0.07 ms at 30 T instructions a second.

The kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    pixels_kernel  moves grad, logits, target, weight, total, peaks, taints, normalizer, records, classes, scales;
        computes 2·B·K·M
"""

import torch
import triton
import triton.language as tl

from apc_kernels.ops.common import run
from apc_kernels.ops.upsample.triton_cross_entropy import sum_of
from apc_kernels.ops.upsample.triton_cross_entropy_cells import (
    RECORD,
    cell_blocks,
    cell_programs,
    cells_kernel,
    place_in_cells,
)
from apc_kernels.ops.upsample.triton_relative import (
    LN2,
    LOG2E,
    corners_of_maps,
    is_tainted,
    lines_of,
    load_map_rows,
    load_relative,
    load_relative_label,
    loss_blocks,
    loss_programs,
    peaks_launch,
    relative_corners,
    row_of_pixels,
    row_weights,
)
from apc_kernels.ops.upsample.triton_tiles import axis_of, focal_of, geometry, kernel, strides_of, tile_of_program


@kernel
def pixels_kernel(
    grad,  # (B, H, W) or (1,) float32
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    weight,  # (K,) or None
    total,  # (1,): the sum of weight, or None
    peaks,  # (B, h, w) float32, and
    taints,  # the same: see peaks_kernel
    normalizer,  # (B, H, W) float32
    records,  # (B·H, chunks, slots, CHUNK, RECORD) float32: see write_record; the last CHUNK are cells
    classes,  # the same without RECORD, int32: labels
    scales,  # the same, float32, or None without smoothing: of 2^(logit − largest) in the gradients
    grad_stride,
    ignore_index,
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
    ALIGN_CORNERS: tl.constexpr,
    LABEL_SMOOTHING: tl.constexpr,
    FOCAL: tl.constexpr,
    RING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Computes what all classes of a pixel share, and stores it by cells: NaN for a label out of range."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    o_corners = corners_of_maps(i_b, i_y, column, axis_y, axis_x)
    corners = relative_corners(corners, peaks, o_corners, LOG2E)
    b_taints = load_map_rows(taints, o_corners)
    row_size, o_column, w_left, w_right = place_in_cells(column, slots, axis_x, RING)
    for first in range(begin, end, ROWS):
        w_y = row_weights(first, end, i_y, axis_y, ROWS)
        b_max = largest_relative(corners, w_y, channels, stride_c, ROWS)
        for r in tl.static_range(ROWS):
            o_x, m_x = row_of_pixels(first + r, end, i_b, column, axis_y, axis_x)
            b_label = tl.load(target + o_x, mask=m_x, other=0).to(tl.int64)
            m_kept = m_x & (b_label != ignore_index)
            m_valid = m_kept & (b_label >= 0) & (b_label < channels)
            b_own_logit, _ = load_relative_label(corners, w_y[r], tl.where(m_valid, b_label, 0), stride_c)
            m_finite = m_valid & (is_tainted(b_taints, w_y[r], b_max[r]) == 0)
            b_grad = tl.load(grad + o_x * grad_stride, mask=m_finite, other=float("nan"))
            b_grad = tl.where(m_kept, b_grad, 0.0)
            b_weight = tl.full((BLOCK_X,), 1.0, tl.float32)
            if weight is not None:
                b_weight = tl.load(weight + b_label, mask=m_valid, other=0.0)
            b_sum = tl.load(normalizer + o_x, mask=m_finite, other=1.0)
            o_record = (i_b * rows + first + r) * row_size + o_column
            if FOCAL > 0:
                b_own = -b_sum
                b_sum, _, _, b_gradient = focal_of((b_max[r] - b_own_logit) * LN2, b_sum, FOCAL)
                b_grad *= b_weight * b_gradient / b_sum
            elif LABEL_SMOOTHING > 0:
                of_all = tl.load(total) if total is not None else channels * 1.0
                b_hard = (1.0 - LABEL_SMOOTHING) * b_weight
                b_scale = (b_hard + LABEL_SMOOTHING / channels * of_all) / b_sum
                b_own = b_scale * tl.exp2(b_own_logit - b_max[r]) - b_hard
                tl.store(scales + o_record, tl.where(m_finite, b_scale, 0.0), mask=m_x)
            else:
                b_own = tl.exp2(b_own_logit - b_max[r]) - b_sum
                b_grad *= b_weight / b_sum
            tl.store(classes + o_record, b_label.to(tl.int32), mask=m_x)
            # A side without weight gets none, though it be NaN: it may belong to the other end of the row.
            b_left = tl.where(w_left > 0, b_grad * w_left, 0.0)
            b_right = tl.where(w_right > 0, b_grad * w_right, 0.0)
            b_largest, b_own = tl.where(m_finite, b_max[r], 0.0), tl.where(m_finite, b_own, 0.0)
            b_record = tl.reshape(tl.join(tl.join(b_largest, b_left), tl.join(b_own, b_right)), (BLOCK_X, RECORD))
            o_record = o_record[:, None] * RECORD + tl.arange(0, RECORD)[None, :]
            tl.store(records + o_record, b_record, mask=m_x[:, None])


@triton.jit
def largest_relative(corners, w_y, channels, stride_c, ROWS: tl.constexpr):
    """Computes the largest logit of each pixel, for each of ROWS rows, with the bits of scan_relative."""
    b_max = ()
    for _ in tl.static_range(ROWS):
        b_max += (tl.full(corners[1][0].shape, -3e38, tl.float32),)
    for channel in range(channels):
        b_top, b_bottom = load_relative(corners, tl.cast(channel, tl.int64) * stride_c)
        b_top, b_change = lines_of(b_top, b_bottom)
        b_new_max = ()
        for r in tl.static_range(ROWS):
            b_new_max += (tl.maximum(tl.fma(b_change, w_y[r][1], b_top), b_max[r]),)
        b_max = b_new_max
    return b_max


def upsample_cross_entropy_backward(*arguments) -> None:
    run(backward_launches(*arguments), arguments[-1])


def backward_launches(
    grad, logits, target, weight, ignore_index, label_smoothing, focal, align_corners, normalizer, grad_logits
) -> list[tuple]:
    size = target.shape[1:]
    maps, launch = peaks_launch(logits, None, 0.0)
    blocks, slots, records = cell_blocks(logits, size, align_corners, bool(label_smoothing))
    # All slots hold a pixel, or there may be some that hold none.
    new = logits.new_empty if records.numel() == target.numel() else logits.new_zeros
    shared = {"logits": logits, "weight": weight, "peaks": maps["peaks"], "slots": slots}
    shared |= {"records": new(*records, RECORD.value, dtype=torch.float32), "classes": new(records, dtype=torch.int32)}
    shared |= {"scales": new(records, dtype=torch.float32) if label_smoothing else None}
    shared |= {"LABEL_SMOOTHING": label_smoothing, "RING": blocks["RING"], **geometry(logits, size, align_corners)}
    pixels = {"grad": grad, "grad_stride": 1 if grad.dim() == 3 else 0, "total": sum_of(weight, label_smoothing)}
    pixels |= {"target": target, "taints": maps["taints"], "normalizer": normalizer, "ignore_index": ignore_index}
    pixels |= {"FOCAL": focal, **loss_blocks(logits, size)}
    cells = {"grad_logits": grad_logits, **strides_of(grad_logits), **blocks}
    return [
        launch,
        (pixels_kernel, (loss_programs(logits, size),), shared | pixels),
        (cells_kernel, (cell_programs(logits, blocks),), shared | cells),
    ]
