"""Computes upsample_cross_entropy in Triton, forward; triton_cross_entropy_backward.py has the gradient.

Logits are taken relative to the largest of their source pixel (triton_relative.py), and their exponentials are summed
in one pass, with no maximum to follow. Where the source pixels around an output pixel disagree by so much that its
exponentials are all tiny, a second pass takes them relative to the pixel's own largest one.

Operations: an exponential and about 8 instructions for each of the N = B·K·H·W interpolated logits at a ratio of 8, and
2 more a logit, with 150 classes, for what a pixel takes once. At (8, 150, 64, 64) to 512×512, N is 315 million: 0.09 ms
at 3.6 T exponentials, 0.1 ms at 30 T instructions a second.

The kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    cross_entropy_kernel  moves logits, target, weight, total, peaks, taints, means, normalizer, losses, sums;
        computes 4·B·K·M

cross_entropy_kernel writes 4 bytes a pixel, its normalizer, for its backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run
from apc_kernels.ops.upsample.triton_relative import (
    ABSENT,
    NONE,
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
from apc_kernels.ops.upsample.triton_tiles import axis_of, exp, focal_of, geometry, kernel, lerp, tile_of_program

BLOCK_K = tl.constexpr(4)  # classes at a time
# The largest exponent of a sum of exponentials is at least this: what is flushed to 0 is below 1e-25 of the sum.
TINY = tl.constexpr(-28.0)


@kernel
def cross_entropy_kernel(
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    weight,  # (K,) or None
    total,  # (1,): the sum of weight, or None
    peaks,  # (B, h, w) float32, and
    taints,  # the same, and
    means,  # the same, or None without smoothing: see peaks_kernel
    normalizer,  # (B, H, W) float32
    losses,  # (B, H, W) float32 or None
    sums,  # (programs, 4) float64
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
):
    """Computes the losses of one tile, and their sums.

    Sums are float32 within a window of rows, float64 over windows and programs.
    """
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    o_corners = corners_of_maps(i_b, i_y, column, axis_y, axis_x)
    corners = relative_corners(corners, peaks, o_corners, 1.0)
    b_taints = load_map_rows(taints, o_corners)
    total_loss, total_weight = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    correct, wrong = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(begin, end, ROWS):
        w_y = row_weights(first, end, i_y, axis_y, ROWS)
        b_skip = None
        if FOCAL > 0:
            b_skip = ()
            for r in tl.static_range(ROWS):
                o_x, m_x = row_of_pixels(first + r, end, i_b, column, axis_y, axis_x)
                b_skip += (tl.load(target + o_x, mask=m_x, other=0).to(tl.int32),)
        b_max, b_sum, b_block = scan_relative(corners, w_y, b_skip, channels, stride_c, ROWS)
        b_losses, b_weights = tl.zeros((BLOCK_X,), tl.float32), tl.zeros((BLOCK_X,), tl.float32)
        b_corrects, b_wrongs = tl.zeros((BLOCK_X,), tl.int32), tl.zeros((BLOCK_X,), tl.int32)
        for r in tl.static_range(ROWS):
            o_x, m_x = row_of_pixels(first + r, end, i_b, column, axis_y, axis_x)
            b_label = tl.load(target + o_x, mask=m_x, other=0).to(tl.int64)
            m_kept = m_x & (b_label != ignore_index)
            m_valid = m_kept & (b_label >= 0) & (b_label < channels)
            m_wrong = m_kept & (m_valid == 0)
            b_class = tl.where(m_valid, b_label, 0).to(tl.int32)
            b_own, m_own = load_relative_label(corners, w_y[r], b_class, stride_c)
            b_most, b_total = b_max[r], b_sum[r]  # with focal so far of the other classes
            b_equals = b_total if FOCAL > 0 else b_total - 1.0
            m_best = is_first_best(
                corners, w_y[r], b_class, b_own, b_most, b_block[r], b_equals, m_valid, channels, stride_c
            )
            if FOCAL > 0:
                b_total *= exp(tl.minimum(b_most - b_own, 0.0))
                b_most = tl.maximum(b_most, b_own)
            m_tainted = is_tainted(b_taints, w_y[r], b_most)
            b_total = tl.where(m_tainted, float("nan"), b_total)
            tl.store(normalizer + o_x, b_total, mask=m_x)
            b_weight = m_valid.to(tl.float32)
            if weight is not None:
                b_weight = tl.load(weight + b_label, mask=m_valid, other=0.0)
            b_gap = tl.where(m_own, tl.where(m_best, 0.0, b_most - b_own), float("inf"))
            if FOCAL > 0:
                b_loss = b_weight * focal_of(b_gap, b_total, FOCAL)[2]
            else:
                b_loss = (1.0 - LABEL_SMOOTHING) * b_weight * (b_gap + tl.log(b_total))
            if LABEL_SMOOTHING > 0:
                of_all = tl.load(total) if total is not None else channels * 1.0
                b_means = load_map_rows(means, o_corners)
                b_mean = lerp(b_means[0], b_means[1], w_y[r][0], w_y[r][1])
                b_smooth = of_all * (b_most + tl.log(b_total)) - b_mean
                b_loss += LABEL_SMOOTHING / channels * b_smooth
            b_loss = tl.where(m_wrong, float("nan"), tl.where(m_valid, b_loss, 0.0))
            if losses is not None:
                tl.store(losses + o_x, b_loss, mask=m_x)
            b_losses += b_loss
            b_weights += b_weight
            b_corrects += m_best.to(tl.int32)
            b_wrongs += m_wrong.to(tl.int32)
        total_loss += tl.sum(b_losses, 0).to(tl.float64)
        total_weight += tl.sum(b_weights, 0).to(tl.float64)
        correct += tl.sum(b_corrects, 0)
        wrong += tl.sum(b_wrongs, 0)
    sums += tl.program_id(0).to(tl.int64) * 4
    tl.store(sums, total_loss)
    tl.store(sums + 1, total_weight)
    tl.store(sums + 2, correct.to(tl.float64))
    tl.store(sums + 3, wrong.to(tl.float64))


@triton.jit
def scan_relative(corners, w_y, b_skip, channels, stride_c, ROWS: tl.constexpr):
    """Computes maximum, sum of exponentials and first best block of classes of each pixel, for each of ROWS rows.

    The sum is relative to the maximum. Of each pixel the class b_skip, if given, is left out everywhere.
    """
    like = corners[1][0]
    b_max, b_sum, b_block = (), (), ()
    for _ in tl.static_range(ROWS):
        b_max += (tl.full(like.shape, -3e38, tl.float32),)
        b_sum += (tl.zeros(like.shape, tl.float32),)
        b_block += (tl.zeros(like.shape, tl.int32),)
    whole = channels // BLOCK_K * BLOCK_K
    for first in range(0, whole, BLOCK_K):
        b_lines = load_lines(corners, first, channels, stride_c, False)
        b_max, b_sum, b_block = add_classes(b_lines, w_y, b_skip, first, b_max, b_sum, b_block)
    if whole < channels:
        b_lines = load_lines(corners, whole, channels, stride_c, True)
        b_max, b_sum, b_block = add_classes(b_lines, w_y, b_skip, whole, b_max, b_sum, b_block)

    b_least, b_relative = b_max[0], ()
    for r in tl.static_range(ROWS):  # 1 for the largest, exactly, and what the others add
        b_others = tl.maximum(b_sum[r] - exp(b_max[r]), 0.0)
        b_relative += (tl.fma(b_others, exp(-tl.maximum(b_max[r], TINY)), 1.0),)
        b_least = tl.minimum(b_least, b_max[r])
    if tl.min(b_least, 0) < TINY:
        b_sum = ()
        for _ in tl.static_range(ROWS):
            b_sum += (tl.zeros(like.shape, tl.float32),)
        for channel in range(channels):
            b_lines = load_lines(corners, channel, channel + 1, stride_c, True)
            b_new_sum = ()
            for r in tl.static_range(ROWS):
                b = logit_of(b_lines[0], w_y[r], b_skip[r] if b_skip is not None else None, channel)
                b_new_sum += (b_sum[r] + exp(b - tl.maximum(b_max[r], ABSENT)),)
            b_sum = b_new_sum
        b_new_sum = ()
        for r in tl.static_range(ROWS):  # other pixels keep their bits, whatever their neighbours are
            b_new_sum += (tl.where(b_max[r] < TINY, b_sum[r], b_relative[r]),)
        b_relative = b_new_sum
    return b_max, b_relative, b_block


@triton.jit
def load_lines(corners, first, channels, stride_c, MASKED: tl.constexpr):
    """Loads the lines (see lines_of) of a block of classes; those from `channels` on are NONE."""
    b_lines = ()
    for k in tl.static_range(BLOCK_K):
        if MASKED:
            o_k = tl.cast(tl.minimum(first + k, channels - 1), tl.int64) * stride_c
        else:
            o_k = tl.cast(first + k, tl.int64) * stride_c
        b_top, b_bottom = load_relative(corners, o_k)
        if MASKED:
            b_top = tl.where(first + k < channels, b_top, NONE)
            b_bottom = tl.where(first + k < channels, b_bottom, NONE)
        b_lines += (lines_of(b_top, b_bottom),)
    return b_lines


@triton.jit
def add_classes(b_lines, w_y, b_skip, first, b_max, b_sum, b_block):
    """Takes a block of classes into the maxima, sums and first best blocks of pixels."""
    b_new_max, b_new_sum, b_new_block = (), (), ()
    for r in tl.static_range(len(b_max)):
        b = ()
        for k in tl.static_range(BLOCK_K):
            b += (logit_of(b_lines[k], w_y[r], b_skip[r] if b_skip is not None else None, first + k),)
        b_most = tl.maximum(tl.maximum(b[0], b[1]), tl.maximum(b[2], b[3]))
        b_new_block += (tl.where(b_most > b_max[r], first, b_block[r]),)
        b_new_max += (tl.maximum(b_most, b_max[r]),)
        b_new_sum += (b_sum[r] + ((exp(b[0]) + exp(b[1])) + (exp(b[2]) + exp(b[3]))),)
    return b_new_max, b_new_sum, b_new_block


@triton.jit
def logit_of(b_line, w_y, b_skip, channel):
    b = tl.fma(b_line[1], w_y[1], b_line[0])
    if b_skip is not None:
        b = tl.where(b_skip == channel, NONE, b)
    return b


@triton.jit
def is_first_best(corners, w_y, b_label, b_own, b_most, b_block, b_equals, m_valid, channels, stride_c):
    """Tells for which pixels of a row no class before the label, and none after it, has a larger logit or the same.

    `b_equals` is below 1 where no other class can have the same logit: few pixels have to look at their block again.
    """
    b_first = b_label // BLOCK_K * BLOCK_K
    m_best = m_valid & (b_own == b_most) & (b_block >= b_first)
    m_unsure = m_best & (b_label > b_first) & (b_equals > 0.99)
    if tl.max(m_unsure.to(tl.int32), 0) > 0:
        for k in tl.static_range(BLOCK_K - 1):
            b_class = tl.minimum(b_first + k, channels - 1)
            b, _ = load_relative_label(corners, w_y, b_class, stride_c)
            m_best = m_best & ((b_class >= b_label) | (b != b_own))
    return m_best | (m_valid & (b_own > b_most))


def upsample_cross_entropy(*arguments) -> None:
    logits, target, *settings, per_pixel, normalizer, losses, sums = arguments
    parts = logits.new_empty(loss_programs(logits, target.shape[1:]), 4, dtype=torch.float64)
    losses = losses if per_pixel else None
    run(cross_entropy_launches(logits, target, *settings, normalizer, losses, parts), logits)
    sums.copy_(parts.sum(0))


def cross_entropy_launches(
    logits, target, weight, ignore_index, label_smoothing, focal, align_corners, normalizer, losses, parts: Tensor
) -> list[tuple]:
    size = target.shape[1:]
    maps, launch = peaks_launch(logits, weight, label_smoothing)
    arguments = {
        "logits": logits,
        "target": target,
        "weight": weight,
        "total": sum_of(weight, label_smoothing),
        "normalizer": normalizer,
        "losses": losses,
        "sums": parts,
        "ignore_index": ignore_index,
        "LABEL_SMOOTHING": label_smoothing,
        "FOCAL": focal,
        **maps,
        **geometry(logits, size, align_corners),
        **loss_blocks(logits, size),
    }
    return [launch, (cross_entropy_kernel, (loss_programs(logits, size),), arguments)]


def sum_of(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return weight.sum()[None] if weight is not None and label_smoothing else None
