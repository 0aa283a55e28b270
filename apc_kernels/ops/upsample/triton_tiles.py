"""Provides parts of the Triton kernels on upsampled logits: a pixel's source values, and a pass over classes.

The output pixels between two source rows i and i + 1 are interpolated from those two rows alone. A program takes such
pixels: their columns are interpolated once, class by class, and every output row is one more step from there.

An axis is (source size, output size, step, start, denominator), as in apc_kernels/ops/interpolation.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4e38)  # the logit of a class that is not there: finite, for 0 · −∞ is NaN
START = tl.constexpr(-3.3e38)  # what a maximum starts from: exp(LOWEST − START) is 0, and −∞ − START no NaN
# Unless it is told that it may use all registers, ptxas spills some to fit one more block on a multiprocessor.
OPTIONS = {"num_warps": 4} | ({} if torch.version.hip else {"maxnreg": 255})

# Decorates a kernel: its sizes do not make Triton compile it anew, and strides only where one of them is 1.
kernel = triton.jit(
    do_not_specialize=("height", "width", "rows", "columns"),
    do_not_specialize_on_alignment=[f"{of}stride_{axis}" for of in ("", "out_") for axis in "bcyx"],
)


@triton.jit
def axis_of(source, size, ALIGN_CORNERS: tl.constexpr):
    """Returns an axis: source size, output size, step, start, denominator (apc_kernels/ops/interpolation.py)."""
    if ALIGN_CORNERS:
        axis = (source, size, tl.where(size > 1, source - 1, 0), 0, tl.maximum(size - 1, 1))
    else:
        axis = (source, size, 2 * source, source - size, 2 * size)
    return axis


@triton.jit
def index_of(position, axis):
    """Returns the source index of an output position; it reads the next one too."""
    return tl.maximum(position * axis[2] + axis[3], 0) // axis[4]


@triton.jit
def weights_of(position, index, axis):
    """Returns the weights of a position's source index and of the next one."""
    _, _, step, start, denominator = axis
    rest = tl.maximum(position * step + start, 0) - index * denominator
    w_next = rest.to(tl.float32) / denominator
    return 1.0 - w_next, w_next


@triton.jit
def first_of(index, axis):
    """Returns the first output position with this source index or a larger one, which may be the output's end."""
    source, size, step, start, denominator = axis
    step = tl.maximum(step, 1)  # with 0 every position has index 0
    first = tl.minimum((tl.maximum(index * denominator - start, 0) + step - 1) // step, size)
    return tl.where(index <= 0, 0, tl.where(index >= source, size, first))


@triton.jit
def lerp(b_a, b_b, w_a, w_b):
    """Interpolates, spelt out so that the same values give the same bits wherever they are interpolated."""
    return tl.fma(b_b, w_b, b_a * w_a)


@triton.jit
def exp(b):
    """Computes exp; tl.exp takes three instructions more, for results below 1e-38."""
    return tl.exp2(b * 1.4426950408889634)


@triton.jit
def focal_of(b_gap, b_others, GAMMA: tl.constexpr):
    """Computes Σ, 1 − p, the focal loss, and its gradient as a multiple of that of −log p, where p = exp(−gap) / Σ.

    `b_gap` is the largest logit minus the label's; `b_others` are the exponentials of the others, relative to the
    largest.
    """
    b_own = exp(-b_gap)
    b_sum = b_own + b_others
    b_rest, b_p = b_others / b_sum, b_own / b_sum
    # −log p / (1 − p): near p = 1 its series, for there the logarithm is a rounding error.
    b_ratio = (((b_rest * (1 / 6) + 1 / 5) * b_rest + 1 / 4) * b_rest + 1 / 3) * b_rest + 1 / 2
    b_ratio = tl.where(b_rest < 1 / 16, b_ratio * b_rest + 1, (b_gap + tl.log(b_sum)) / b_rest)
    b_power = tl.where(b_rest == 0, 0.0, exp(GAMMA * tl.log(b_rest)))
    b_gradient = b_power * (1 + GAMMA * tl.where(b_p == 0, 0.0, b_p * b_ratio))
    return b_sum, b_rest, b_power * (b_rest * b_ratio), b_gradient


@triton.jit
def load_row(logits, o_left, o_right, w_left, w_right, mask):
    """Loads a source row, interpolated at the output columns."""
    b_left = tl.load(logits + o_left, mask=mask, other=0.0).to(tl.float32)
    b_right = tl.load(logits + o_right, mask=mask, other=0.0).to(tl.float32)
    return lerp(b_left, b_right, w_left, w_right)


@triton.jit
def tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X: tl.constexpr):
    """Returns the image, the source row i, the output rows from `begin` to `end` that it has, and output columns.

    With them the corners: pointers to rows i and i + 1, and, of the two source columns that each output column lies
    between, offsets and weights.
    """
    stride_b, _, stride_y, stride_x = strides
    source_rows, columns = axis_y[0], axis_x[1]
    blocks = tl.cdiv(columns, BLOCK_X)
    i_b = (tl.program_id(0) // blocks // source_rows).to(tl.int64)
    i_y = tl.program_id(0) // blocks % source_rows
    column = tl.program_id(0) % blocks * BLOCK_X + tl.arange(0, BLOCK_X)

    logits += i_b * stride_b
    top = logits + i_y.to(tl.int64) * stride_y
    bottom = logits + tl.minimum(i_y + 1, source_rows - 1).to(tl.int64) * stride_y
    position = tl.minimum(column, columns - 1)
    i_x = index_of(position, axis_x)
    w_x = weights_of(position, i_x, axis_x)
    left = i_x.to(tl.int64) * stride_x
    right = tl.minimum(i_x + 1, axis_x[0] - 1).to(tl.int64) * stride_x
    return i_b, i_y, first_of(i_y, axis_y), first_of(i_y + 1, axis_y), column, (top, bottom, left, right, w_x)


@triton.jit
def window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS: tl.constexpr):
    """Returns the pixels' offsets in a (B, H, W) tensor, their mask, and the weights of source rows i and i + 1.

    Offsets and mask are (ROWS, BLOCK_X).
    """
    row = first + tl.arange(0, ROWS)
    o_yx = (i_b * axis_y[1] + row[:, None]) * axis_x[1] + column[None, :]
    m_yx = (row < end)[:, None] & (column < axis_x[1])[None, :]
    return o_yx, m_yx, weights_of(tl.minimum(row, end - 1), i_y, axis_y)


@triton.jit
def load_classes(corners, w_y, first, channels, stride_c, BLOCK_K: tl.constexpr):
    """Loads classes (BLOCK_K,) from `first` on, and their interpolated logits, (ROWS, BLOCK_K, BLOCK_X) float32."""
    top, bottom, left, right, w_x = corners
    channel = first + tl.arange(0, BLOCK_K)
    m_k = (channel < channels)[:, None]
    o_k = channel[:, None].to(tl.int64) * stride_c
    o_left, o_right = o_k + left[None, :], o_k + right[None, :]
    b_top = load_row(top, o_left, o_right, w_x[0][None, :], w_x[1][None, :], m_k)
    b_bottom = load_row(bottom, o_left, o_right, w_x[0][None, :], w_x[1][None, :], m_k)
    b_top, b_bottom = tl.where(m_k, b_top, LOWEST), tl.where(m_k, b_bottom, LOWEST)
    return channel, lerp(b_top[None, :, :], b_bottom[None, :, :], w_y[0][:, None, None], w_y[1][:, None, None])


@triton.jit
def scan_classes(corners, w_y, channels, stride_c, ROWS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr):
    """Computes maximum, sum of exponentials and first best class of each pixel's logits, all (ROWS, BLOCK_X).

    The compiler leaves out what a caller does not use. Every BLOCK_K-th class shares a maximum and a sum until all
    classes have been seen, rather than all of them: in channels_last a block of classes lies in as many threads.
    """
    b_max = tl.full((ROWS, BLOCK_K, BLOCK_X), START, tl.float32)
    b_sum = tl.zeros((ROWS, BLOCK_K, BLOCK_X), tl.float32)
    b_class = tl.zeros((ROWS, BLOCK_K, BLOCK_X), tl.int32) + tl.arange(0, BLOCK_K)[None, :, None]
    for first in range(0, channels, BLOCK_K):
        channel, b_logits = load_classes(corners, w_y, first, channels, stride_c, BLOCK_K)
        better = b_logits > b_max
        b_small = exp(-tl.abs(b_logits - b_max))  # of the smaller of the two, relative to the larger
        b_sum = tl.where(better, b_sum * b_small + 1.0, b_sum + b_small)
        b_max = tl.where(better, b_logits, b_max)
        b_class = tl.where(better, channel[None, :, None], b_class)

    b_most = tl.max(b_max, 1)
    b_share = b_sum * exp(b_max - b_most[:, None, :])
    # Fused into the first addition of the sum, the product would be exact in one thread and rounded in the other, and
    # threads that share a sum would hold different bits of it. A choice between the two keeps them apart.
    b_total = tl.sum(tl.where(b_sum != 0, b_share, 0.0), 1)
    b_first = tl.min(tl.where(b_max == b_most[:, None, :], b_class, channels), 1)
    return b_most, b_total, b_first


def geometry(logits: Tensor, size: Sequence[int], align_corners: bool) -> dict:
    """Returns the arguments that say how large everything is, how positions map, and where the logits lie."""
    _, channels, height, width = logits.shape
    sizes = {"channels": channels, "height": height, "width": width, "rows": size[0], "columns": size[1]}
    return {**sizes, "ALIGN_CORNERS": align_corners, **strides_of(logits, "")}


def strides_of(tensor: Tensor, prefix: str = "out_") -> dict:
    names = ("stride_b", "stride_c", "stride_y", "stride_x")
    return {prefix + name: stride for name, stride in zip(names, tensor.stride(), strict=True)}


def blocks(logits: Tensor, size: Sequence[int]) -> dict:
    """Returns the tiles of kernels that go over all classes: as many rows as share two source rows, 256 pixels at most.

    Few classes at a time: each of a block has a maximum and a sum of its own, and they are joined at the end.
    """
    rows = min(8, triton.next_power_of_2(triton.cdiv(size[0], logits.shape[2])))
    return {
        "ROWS": rows,
        "BLOCK_X": min(256 // rows, triton.next_power_of_2(size[1])),
        "BLOCK_K": min(4, triton.next_power_of_2(logits.shape[1])),
        **OPTIONS,
    }


def programs(logits: Tensor, size: Sequence[int]) -> int:
    return logits.shape[0] * logits.shape[2] * triton.cdiv(size[1], blocks(logits, size)["BLOCK_X"])
