"""Computes upsample_softmax in Triton, and names the operations of the other files.

A program takes a block of output columns and the output rows between two source rows of one image (triton_tiles.py),
and goes over the classes in blocks, twice. One kernel serves NCHW and channels_last: Triton lays a tile out by its
strides.

Operations, for N = B·K·H·W interpolated logits at a ratio of 8: 2·N exponentials; a read of 16 or 32 bits, mostly from
the cache, for every second logit and pass.

The kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    softmax_kernel  moves logits, out; computes 6·B·K·M
"""

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run
from apc_kernels.ops.upsample.triton_cross_entropy import upsample_cross_entropy
from apc_kernels.ops.upsample.triton_cross_entropy_backward import upsample_cross_entropy_backward
from apc_kernels.ops.upsample.triton_labels import upsample_argmax, upsample_confusion
from apc_kernels.ops.upsample.triton_regions import upsample_region_sums, upsample_region_sums_backward
from apc_kernels.ops.upsample.triton_tiles import (
    axis_of,
    blocks,
    exp,
    geometry,
    kernel,
    load_classes,
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
        b_max, b_sum, _ = scan_classes(corners, w_y, channels, strides[1], ROWS, BLOCK_X, BLOCK_K)
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


def upsample_softmax(logits: Tensor, flip: bool, align_corners: bool, add: bool, out: Tensor) -> None:
    run(softmax_launches(logits, flip, align_corners, add, out), logits)


def softmax_launches(logits: Tensor, flip: bool, align_corners: bool, add: bool, out: Tensor) -> list[tuple]:
    arguments = {"out": out, **strides_of(out), "FLIP": flip, "ADD": add}
    return _launches(softmax_kernel, logits, out.shape[2:], align_corners, arguments)


def _launches(function, logits: Tensor, size: Sequence[int], align_corners: bool, arguments: dict) -> list[tuple]:
    arguments |= {"logits": logits, **geometry(logits, size, align_corners), **blocks(logits, size)}
    return [(function, (programs(logits, size),), arguments)]
