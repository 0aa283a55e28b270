"""Provides logits relative to the largest of their source pixel, to the Triton kernels of upsample_cross_entropy.

A first kernel finds the largest logit of each source pixel. All that follows is relative to it: interpolation is
linear, so all logits of an output pixel lose the same number, the interpolated largest one, and probabilities do not
change. What is left is 0 at most, and exponentials need no maximum of the output pixel.

Kernels that go over all classes take a block of output columns, one for each thread, and the output rows between two
source rows of one image. Class by class, a thread interpolates both source rows at its column, and every output row is
one more step from there: no value passes from one thread to another before all classes have been seen.

The kernel's least, every tensor moved once:

    peaks_kernel  moves logits, weight, peaks, taints, means
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.upsample.triton_tiles import OPTIONS, index_of, kernel, lerp, strides_of, weights_of

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# A logit of −∞, relative to the largest. It is finite, for ∞ − ∞ is NaN; interpolated, it is still below ABSENT.
NONE, ABSENT = tl.constexpr(-1e30), tl.constexpr(-1e20)


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
    o_0, o_1, o_2, o_3 = o_corners[0]
    w_left, w_right = o_corners[1]
    b_top = lerp(tl.load(of_pixels + o_0), tl.load(of_pixels + o_1), w_left, w_right)
    b_bottom = lerp(tl.load(of_pixels + o_2), tl.load(of_pixels + o_3), w_left, w_right)
    return b_top, b_bottom


@triton.jit
def relative_corners(corners, peaks, o_corners, SCALE: tl.constexpr):
    """Returns pointers to the four corners of columns, their largest logits, and weights of columns, times SCALE."""
    top, bottom, left, right, w_x = corners
    o_0, o_1, o_2, o_3 = o_corners[0]
    b_peaks = (tl.load(peaks + o_0), tl.load(peaks + o_1), tl.load(peaks + o_2), tl.load(peaks + o_3))
    w_right = tl.where(o_0 == o_1, 0.0, w_x[1])  # with the bits of cells_kernel
    w_x = (1.0 - w_right) * SCALE, w_right * SCALE
    return (top + left, top + right, bottom + left, bottom + right), b_peaks, w_x


@triton.jit
def load_relative(corners, o_k):
    """Loads logits of columns in the source rows above and below, relative to the largest ones, times SCALE.

    −∞ stays −∞ or becomes NaN, as does all that is in a source pixel with NaN or ∞.
    """
    top_left, top_right, bottom_left, bottom_right = corners[0]
    p_0, p_1, p_2, p_3 = corners[1]
    w_left, w_right = corners[2]
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


def peaks_launch(logits: Tensor, weight: Tensor | None, label_smoothing: float) -> tuple[dict, tuple]:
    """Returns what is known of each source pixel (see peaks_kernel), and the launch that computes it."""
    batch, channels, height, width = logits.shape
    maps = {name: logits.new_empty(batch, height, width, dtype=torch.float32) for name in ("peaks", "taints")}
    maps["means"] = torch.empty_like(maps["peaks"]) if label_smoothing else None
    blocks = {"BLOCK_N": 32, "BLOCK_K": min(32, triton.next_power_of_2(channels)), **OPTIONS}
    arguments = {"logits": logits, "weight": weight if label_smoothing else None, **maps, **blocks}
    arguments |= {"channels": channels, "height": height, "width": width, **strides_of(logits, "")}
    return maps, (peaks_kernel, (batch * triton.cdiv(height * width, blocks["BLOCK_N"]),), arguments)


def loss_blocks(logits: Tensor, size: Sequence[int]) -> dict:
    """Returns the tiles of kernels that go over all classes: a column for each thread, and rows that share source rows.

    More than 8 rows would not fit into the registers.
    """
    columns = 128 if size[1] > 32 else triton.next_power_of_2(size[1])
    rows = min(8, triton.next_power_of_2(triton.cdiv(size[0], logits.shape[2])))
    return {"ROWS": rows, "BLOCK_X": columns, **OPTIONS, "num_warps": max(1, columns // 32)}


def loss_programs(logits: Tensor, size: Sequence[int]) -> int:
    return logits.shape[0] * logits.shape[2] * triton.cdiv(size[1], loss_blocks(logits, size)["BLOCK_X"])
