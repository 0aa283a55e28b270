"""Computes upsample_* in Triton, forward; triton_backward.py has the gradient.

A program takes a block of output columns and the output rows between two source rows of one image (triton_tiles.py),
and goes over the classes in blocks, once; softmax a second time. One set of kernels serves NCHW and channels_last:
Triton lays a tile out by its strides.

Operations, for N = B·K·H·W interpolated logits at a ratio of 8: N exponentials (argmax and confusion none, softmax
2·N); about 20 instructions a logit, as compiled for cross_entropy; a read of 16 or 32 bits, mostly from the cache, for
every second one. At (8, 150, 64, 64) to 512×512, N is 315 million: 0.09 ms at 3.6 T exponentials, 0.22 ms at 29 T
instructions a second.

Each kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    cross_entropy_kernel  moves logits, target, weight, total, normalizer, losses, sums; computes 4·B·K·M
    softmax_kernel        moves logits, out; computes 6·B·K·M

cross_entropy writes 4 bytes a pixel, its normalizer, for its backward.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run
from apc_kernels.ops.upsample.triton_backward import upsample_cross_entropy_backward
from apc_kernels.ops.upsample.triton_labels import upsample_argmax, upsample_confusion
from apc_kernels.ops.upsample.triton_regions import upsample_region_sums, upsample_region_sums_backward
from apc_kernels.ops.upsample.triton_tiles import (
    axis_of,
    blocks,
    exp,
    focal_of,
    geometry,
    kernel,
    load_classes,
    load_label,
    programs,
    scan_classes,
    strides_of,
    tile_of_program,
    window_of,
)

__all__ = [
    "upsample_argmax",
    "upsample_confusion",
    "upsample_cross_entropy",
    "upsample_cross_entropy_backward",
    "upsample_region_sums",
    "upsample_region_sums_backward",
    "upsample_softmax",
]


@kernel
def cross_entropy_kernel(
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    weight,  # (K,) or None
    total,  # (1,): the sum of weight, or None
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
    BLOCK_K: tl.constexpr,
):
    """Computes the losses of one tile, and their sums.

    Sums are float32 within a window of rows, float64 over windows and programs.
    """
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    total_loss, total_weight = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    correct, wrong = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for first in range(begin, end, ROWS):
        o_yx, m_yx, w_y = window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS)
        b_label = tl.load(target + o_yx, mask=m_yx, other=0).to(tl.int64)
        m_kept = m_yx & (b_label != ignore_index)
        m_valid = m_kept & (b_label >= 0) & (b_label < channels)
        m_wrong = m_kept & (m_valid == 0)
        b_own = load_label(corners, w_y, b_label, m_valid, strides[1])
        b_shift = tl.where(tl.abs(b_own) < float("inf"), b_own, 0.0)
        b_skip = b_label.to(tl.int32) if FOCAL > 0 else None
        b_max, b_sum, b_class, b_smooth = scan_classes(
            corners, w_y, weight, b_shift, b_skip, channels, strides[1], LABEL_SMOOTHING, ROWS, BLOCK_X, BLOCK_K
        )
        m_correct = m_valid & (b_class == b_label)
        if FOCAL > 0:  # so far of the other classes
            m_correct = m_valid & ((b_own > b_max) | ((b_own == b_max) & (b_label < b_class)))
            b_most = tl.where(b_own > b_max, b_own, b_max)
            b_sum *= exp(b_max - b_most)
            b_max = b_most
        tl.store(normalizer + o_yx, b_sum, mask=m_yx)
        b_weight = m_valid.to(tl.float32)
        if weight is not None:
            b_weight = tl.load(weight + b_label, mask=m_valid, other=0.0)
        if FOCAL > 0:
            b_loss = b_weight * focal_of(b_max - b_own, b_sum, FOCAL)[2]
        else:
            b_loss = (1.0 - LABEL_SMOOTHING) * b_weight * ((b_max - b_own) + tl.log(b_sum))
        if LABEL_SMOOTHING > 0:
            # Σ weight·(lse − l), both taken from the shift: they may be large and close together.
            of_all = tl.load(total) if total is not None else channels * 1.0
            b_smooth = of_all * ((b_max - b_shift) + tl.log(b_sum)) - b_smooth
            b_loss += LABEL_SMOOTHING / channels * b_smooth
        b_loss = tl.where(m_wrong, float("nan"), tl.where(m_valid, b_loss, 0.0))
        if losses is not None:
            tl.store(losses + o_yx, b_loss, mask=m_yx)
        total_loss += tl.sum(tl.sum(b_loss, 1), 0).to(tl.float64)
        total_weight += tl.sum(tl.sum(b_weight, 1), 0).to(tl.float64)
        correct += tl.sum(tl.sum(m_correct.to(tl.int32), 1), 0)
        wrong += tl.sum(tl.sum(m_wrong.to(tl.int32), 1), 0)
    sums += tl.program_id(0).to(tl.int64) * 4
    tl.store(sums, total_loss)
    tl.store(sums + 1, total_weight)
    tl.store(sums + 2, correct.to(tl.float64))
    tl.store(sums + 3, wrong.to(tl.float64))


@kernel
def softmax_kernel(
    logits,  # (B, K, h, w)
    out,  # (B, K, H, W) float32
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
    FLIP: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes the probabilities of one tile."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    out_strides = (out_stride_b, out_stride_c, out_stride_y, out_stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    out += i_b * out_strides[0]
    o_x = (columns - 1 - column if FLIP else column).to(tl.int64) * out_strides[3]
    for first in range(begin, end, ROWS):
        _, m_yx, w_y = window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS)
        b_max, b_sum, _, _ = scan_classes(
            corners, w_y, None, None, None, channels, strides[1], 0.0, ROWS, BLOCK_X, BLOCK_K
        )
        b_inverse = 1.0 / b_sum
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        o_yx = (row * out_strides[2])[:, None] + o_x[None, :]
        for first_class in range(0, channels, BLOCK_K):
            channel, b_logits = load_classes(corners, w_y, first_class, channels, strides[1], BLOCK_K)
            b_probability = exp(b_logits - b_max[:, None, :]) * b_inverse[:, None, :]
            o_ykx = (channel.to(tl.int64) * out_strides[1])[None, :, None] + o_yx[:, None, :]
            m_ykx = (channel < channels)[None, :, None] & m_yx[:, None, :]
            if ADD:
                b_probability += tl.load(out + o_ykx, mask=m_ykx, other=0.0)
            tl.store(out + o_ykx, b_probability, mask=m_ykx)


def upsample_cross_entropy(*arguments) -> None:
    logits, target, *settings, per_pixel, normalizer, losses, sums = arguments
    parts = logits.new_empty(programs(logits, target.shape[1:]), 4, dtype=torch.float64)
    losses = losses if per_pixel else None
    run(cross_entropy_launches(logits, target, *settings, normalizer, losses, parts), logits)
    sums.copy_(parts.sum(0))


def upsample_softmax(logits: Tensor, flip: bool, align_corners: bool, add: bool, out: Tensor) -> None:
    run(softmax_launches(logits, flip, align_corners, add, out), logits)


def cross_entropy_launches(
    logits, target, weight, ignore_index, label_smoothing, focal, align_corners, normalizer, losses, parts: Tensor
) -> list[tuple]:
    arguments = {
        "target": target,
        "weight": weight,
        "total": weight.sum()[None] if weight is not None and label_smoothing else None,
        "normalizer": normalizer,
        "losses": losses,
        "sums": parts,
        "ignore_index": ignore_index,
        "LABEL_SMOOTHING": label_smoothing,
        "FOCAL": focal,
    }
    return _launches(cross_entropy_kernel, logits, target.shape[1:], align_corners, arguments)


def softmax_launches(logits: Tensor, flip: bool, align_corners: bool, add: bool, out: Tensor) -> list[tuple]:
    arguments = {"out": out, **strides_of(out), "FLIP": flip, "ADD": add}
    return _launches(softmax_kernel, logits, out.shape[2:], align_corners, arguments)


def _launches(function, logits: Tensor, size: Sequence[int], align_corners: bool, arguments: dict) -> list[tuple]:
    arguments |= {"logits": logits, **geometry(logits, size, align_corners), **blocks(logits, size)}
    return [(function, (programs(logits, size),), arguments)]
