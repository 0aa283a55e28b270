"""Computes upsample_cross_entropy in Triton, forward; triton_cross_entropy_backward.py has the gradient.

A first kernel finds the largest logit of each source pixel. All that follows is relative to it: interpolation is
linear, so all logits of an output pixel lose the same number, the interpolated largest one, and probabilities do not
change. What is left is 0 at most, and its exponentials are summed in one pass, with no maximum to follow. Where the
source pixels around an output pixel disagree by so much that its exponentials are all tiny, a second pass takes them
relative to the pixel's own largest one. Logits are multiplied by log2 e once, and exponentials are powers of 2.

A program takes a block of output columns, one for each thread, and the output rows between two source rows of one
image. Class by class, a thread interpolates both source rows at its column, and every output row is one more step from
there: no value passes from one thread to another before all classes have been seen.

Operations: an exponential and about 8 instructions for each of the N = B·K·H·W interpolated logits at a ratio of 8, and
2 more a logit, with 150 classes, for what a pixel takes once. At (8, 150, 64, 64) to 512×512, N is 315 million: 0.09 ms
at 3.6 T exponentials, 0.1 ms at 30 T instructions a second.

Each kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    peaks_kernel          moves logits, weight, peaks, taints, means
    cross_entropy_kernel  moves logits, target, weight, total, peaks, taints, means, normalizer, losses, sums; computes
        4·B·K·M

cross_entropy_kernel writes 4 bytes a pixel, its normalizer, for its backward.
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
    focal_of,
    geometry,
    index_of,
    kernel,
    lerp,
    strides_of,
    tile_of_program,
    weights_of,
)

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# A logit of −∞, relative to the largest. It is finite, for ∞ − ∞ is NaN; interpolated, it is still below ABSENT.
NONE, ABSENT = tl.constexpr(-1e30), tl.constexpr(-1e20)
BLOCK_K = tl.constexpr(4)  # classes at a time
# The largest exponent of a sum of powers of 2 is at least this: what is flushed to 0 is below 2^-80 of the sum.
TINY = tl.constexpr(-40.0)


@kernel
def peaks_kernel(
    logits,  # (B, K, h, w)
    weight,  # (K,) or None
    peaks,  # (B, h, w) float32: the largest logit, or ∞ where there is a NaN or ∞, or nothing but −∞
    taints,  # (B, h, w) float32: NaN where peaks is ∞, −∞ where some logit is, and else 0
    means,  # (B, h, w) float32: Σ weight·(logit − largest), or None
    channels,
    height,
    width,
    stride_b,
    stride_c,
    stride_y,
    stride_x,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes what BLOCK_N source pixels of one image need to be compared with others."""
    positions = height * width
    blocks = tl.cdiv(positions, BLOCK_N)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    position = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = position < positions
    logits += i_b * stride_b
    o_n = (position // width).to(tl.int64) * stride_y + (position % width).to(tl.int64) * stride_x
    b_max = tl.full((BLOCK_N, BLOCK_K), float("-inf"), tl.float32)
    b_min = tl.full((BLOCK_N, BLOCK_K), float("inf"), tl.float32)
    b_odd = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    for first in range(0, channels, BLOCK_K):
        channel = first + tl.arange(0, BLOCK_K)
        m_nk = m_n[:, None] & (channel < channels)[None, :]
        o_nk = o_n[:, None] + channel.to(tl.int64)[None, :] * stride_c
        b = tl.load(logits + o_nk, mask=m_nk, other=float("-inf")).to(tl.float32)
        b_max = tl.maximum(b_max, b)
        b_min = tl.minimum(b_min, tl.where(m_nk, b, float("inf")))
        b_odd = tl.maximum(b_odd, b.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # a NaN's bits are above those of ∞
    b_largest, b_least = tl.max(b_max, 1), tl.min(b_min, 1)
    m_bad = (tl.max(b_odd, 1) > 0x7F800000) | (tl.abs(b_largest) == float("inf"))
    o_out = i_b * positions + position
    tl.store(peaks + o_out, tl.where(m_bad, float("inf"), b_largest), mask=m_n)
    b_taint = tl.where(b_least == float("-inf"), float("-inf"), 0.0)
    tl.store(taints + o_out, tl.where(m_bad, float("nan"), b_taint), mask=m_n)
    if means is not None:
        b_sum = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first in range(0, channels, BLOCK_K):
            channel = first + tl.arange(0, BLOCK_K)
            m_k = channel < channels
            m_nk = m_n[:, None] & m_k[None, :]
            o_nk = o_n[:, None] + channel.to(tl.int64)[None, :] * stride_c
            b = tl.load(logits + o_nk, mask=m_nk, other=0.0).to(tl.float32) - b_largest[:, None]
            if weight is not None:
                b *= tl.load(weight + channel, mask=m_k, other=0.0)[None, :]
            b_sum += tl.where(m_nk, b, 0.0)
        tl.store(means + o_out, tl.sum(b_sum, 1), mask=m_n)


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
    corners = relative_corners(corners, peaks, o_corners)
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
                b_total *= tl.exp2(tl.minimum(b_most - b_own, 0.0))
                b_most = tl.maximum(b_most, b_own)
            m_tainted = is_tainted(b_taints, w_y[r], b_most)
            b_total = tl.where(m_tainted, float("nan"), b_total)
            tl.store(normalizer + o_x, b_total, mask=m_x)
            b_weight = m_valid.to(tl.float32)
            if weight is not None:
                b_weight = tl.load(weight + b_label, mask=m_valid, other=0.0)
            b_gap = tl.where(m_own, tl.where(m_best, 0.0, b_most - b_own) * LN2, float("inf"))
            if FOCAL > 0:
                b_loss = b_weight * focal_of(b_gap, b_total, FOCAL)[2]
            else:
                b_loss = (1.0 - LABEL_SMOOTHING) * b_weight * (b_gap + tl.log(b_total))
            if LABEL_SMOOTHING > 0:
                of_all = tl.load(total) if total is not None else channels * 1.0
                b_means = load_map_rows(means, o_corners)
                b_mean = lerp(b_means[0], b_means[1], w_y[r][0], w_y[r][1])
                b_smooth = of_all * (b_most * LN2 + tl.log(b_total)) - b_mean
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
def corners_of_maps(i_b, i_y, column, axis_y, axis_x):
    """Returns the offsets of columns' four corners in (B, h, w) maps, the upper ones first, and weights of columns."""
    position = tl.minimum(column, axis_x[1] - 1)
    i_x = index_of(position, axis_x)
    i_next = tl.minimum(i_x + 1, axis_x[0] - 1)
    o_top = (i_b * axis_y[0] + i_y) * axis_x[0]
    o_bottom = (i_b * axis_y[0] + tl.minimum(i_y + 1, axis_y[0] - 1)) * axis_x[0]
    return (o_top + i_x, o_top + i_next, o_bottom + i_x, o_bottom + i_next), weights_of(position, i_x, axis_x)


@triton.jit
def load_map_rows(of_pixels, o_corners):
    """Loads a (B, h, w) map, interpolated at columns of the source rows above and below."""
    (o_0, o_1, o_2, o_3), (w_left, w_right) = o_corners
    b_top = lerp(tl.load(of_pixels + o_0), tl.load(of_pixels + o_1), w_left, w_right)
    b_bottom = lerp(tl.load(of_pixels + o_2), tl.load(of_pixels + o_3), w_left, w_right)
    return b_top, b_bottom


@triton.jit
def relative_corners(corners, peaks, o_corners):
    """Returns pointers to the four corners of columns, their largest logits, and weights for powers of 2."""
    top, bottom, left, right, w_x = corners
    o_0, o_1, o_2, o_3 = o_corners[0]
    b_peaks = (tl.load(peaks + o_0), tl.load(peaks + o_1), tl.load(peaks + o_2), tl.load(peaks + o_3))
    w_right = tl.where(o_0 == o_1, 0.0, w_x[1])  # with the bits of cells_kernel
    w_x = (1.0 - w_right) * LOG2E, w_right * LOG2E
    return (top + left, top + right, bottom + left, bottom + right), b_peaks, w_x


@triton.jit
def load_relative(corners, o_k):
    """Loads logits of columns in the source rows above and below, relative to the largest ones, for powers of 2.

    −∞ stays −∞ or becomes NaN, as does all that is in a source pixel with NaN or ∞.
    """
    (top_left, top_right, bottom_left, bottom_right), (p_0, p_1, p_2, p_3), (w_left, w_right) = corners
    b_0, b_1 = tl.load(top_left + o_k).to(tl.float32) - p_0, tl.load(top_right + o_k).to(tl.float32) - p_1
    b_2, b_3 = tl.load(bottom_left + o_k).to(tl.float32) - p_2, tl.load(bottom_right + o_k).to(tl.float32) - p_3
    return lerp(b_0, b_1, w_left, w_right), lerp(b_2, b_3, w_left, w_right)


@triton.jit
def lines_of(b_top, b_bottom):
    """Returns the logits above and their change to those below, both finite: a row is one step from there."""
    b_top, b_bottom = tl.maximum(b_top, NONE), tl.maximum(b_bottom, NONE)  # of NaN and a number, the number
    return b_top, b_bottom - b_top


@triton.jit
def load_relative_label(corners, w_y, b_label, stride_c):
    """Loads the logit of one class for each pixel of a row, with the bits of a scan, and whether there is one."""
    b_top, b_bottom = load_relative(corners, b_label.to(tl.int64) * stride_c)
    b_start, b_change = lines_of(b_top, b_bottom)
    b_own = tl.fma(b_change, w_y[1], b_start)
    return b_own, b_own > ABSENT


@triton.jit
def is_tainted(b_taints, w_y, b_max):
    """Tells which pixels of a row are NaN: as 0·∞ is, and a pixel whose logits are all −∞."""
    b_taint = lerp(b_taints[0], b_taints[1], w_y[0], w_y[1])
    return (b_taint != b_taint) | (b_max < ABSENT)


@triton.jit
def row_weights(first, end, i_y, axis_y, ROWS: tl.constexpr):
    """Returns the weights of source rows i and i + 1 for each of ROWS output rows."""
    w_y = ()
    for r in tl.static_range(ROWS):
        w_y += (weights_of(tl.minimum(first + r, end - 1), i_y, axis_y),)
    return w_y


@triton.jit
def row_of_pixels(row, end, i_b, column, axis_y, axis_x):
    """Returns offsets and mask of the columns of an output row in a (B, H, W) tensor."""
    return (i_b * axis_y[1] + row) * axis_x[1] + column, column < tl.where(row < end, axis_x[1], 0)


@triton.jit
def scan_relative(corners, w_y, b_skip, channels, stride_c, ROWS: tl.constexpr):
    """Computes maximum, sum of powers of 2 and first best block of classes of each pixel, for each of ROWS rows.

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
        b_others = tl.maximum(b_sum[r] - tl.exp2(b_max[r]), 0.0)
        b_relative += (tl.fma(b_others, tl.exp2(-tl.maximum(b_max[r], TINY)), 1.0),)
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
                b_new_sum += (b_sum[r] + tl.exp2(b - tl.maximum(b_max[r], ABSENT)),)
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
        b_new_sum += (b_sum[r] + ((tl.exp2(b[0]) + tl.exp2(b[1])) + (tl.exp2(b[2]) + tl.exp2(b[3]))),)
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


def peaks_launch(logits: Tensor, weight: Tensor | None, label_smoothing: float) -> tuple[dict, tuple]:
    """Returns what is known of each source pixel (see peaks_kernel), and the launch that computes it."""
    batch, channels, height, width = logits.shape
    maps = {name: logits.new_empty(batch, height, width, dtype=torch.float32) for name in ("peaks", "taints")}
    maps["means"] = torch.empty_like(maps["peaks"]) if label_smoothing else None
    blocks = {"BLOCK_N": 32, "BLOCK_K": min(32, triton.next_power_of_2(channels)), **OPTIONS}
    arguments = {"logits": logits, "weight": weight if label_smoothing else None, **maps, **blocks}
    arguments |= {"channels": channels, "height": height, "width": width, **strides_of(logits, "")}
    return maps, (peaks_kernel, (batch * triton.cdiv(height * width, blocks["BLOCK_N"]),), arguments)


def sum_of(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return weight.sum()[None] if weight is not None and label_smoothing else None


def loss_blocks(logits: Tensor, size: Sequence[int]) -> dict:
    """Returns the tiles of kernels that go over all classes: a column for each thread, and rows that share source rows.

    More than 8 rows would not fit into the registers.
    """
    columns = min(128, triton.next_power_of_2(size[1]))
    rows = min(8, triton.next_power_of_2(triton.cdiv(size[0], logits.shape[2])))
    return {"ROWS": rows, "BLOCK_X": columns, **OPTIONS, "num_warps": max(1, columns // 32)}


def loss_programs(logits: Tensor, size: Sequence[int]) -> int:
    return logits.shape[0] * logits.shape[2] * triton.cdiv(size[1], loss_blocks(logits, size)["BLOCK_X"])
