"""Computes pyramid_pool in Triton.

One set of kernels serves NCHW and channels_last: Triton lays a tile out by its strides.

Cut at every bin edge, the rows fall into segments (csrc/pyramid_pool/bins.h). A program sums the rows of one segment,
which is the one read of x, and then its columns into the bins of every scale; a second kernel adds up the segments of
each bin. The gradient is the same for all rows of a segment: a program works it out once and writes it to each of them.
Where segments start is an argument: to work it out took a program more instructions than its sums.

Each kernel's least, every tensor moved once, for B images of C channels and N positions in J = Σs² regions:

    pool_rows_kernel    moves x, starts, row_sums; computes B·C·N
    pool_bins_kernel    moves row_sums, starts, out; computes B·C·J
    spread_rows_kernel  moves grad, starts, grad_x; computes B·C·J

row_sums has segments · Σs / (h · w) of x's elements in float32: 3 % at 64×64.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run

BLOCK_X, BLOCK_C = 64, 64

# Decorates a kernel of these sizes: whether they are 1 or divisible by 16 does not make Triton compile it anew.
kernel = triton.jit(do_not_specialize=("height", "segments", "chunks", "overlap"))


@triton.jit
def begin_of(i, size, s):
    return i * size // s


@triton.jit
def end_of(i, size, s):
    return ((i + 1) * size + s - 1) // s


@triton.jit
def locate(bin, SCALES: tl.constexpr):
    """Returns the scale of a bin counted through all scales, its place in that scale, and the scale's first region."""
    s, place, first_region = bin * 0 + 1, bin * 0, bin * 0
    bins, regions = 0, 0
    for k in tl.static_range(len(SCALES)):
        mine = (bin >= bins) & (bin < bins + SCALES[k])
        s = tl.where(mine, SCALES[k], s)
        place = tl.where(mine, bin - bins, place)
        first_region = tl.where(mine, regions, first_region)
        bins += SCALES[k]
        regions += SCALES[k] * SCALES[k]
    return s, place, first_region


@kernel
def pool_rows_kernel(
    x,  # (B, C, h, w)
    row_sums,  # (B, segments, chunks, Σs, C) float32
    starts,  # (segments + 1,) int32: the first row of each segment
    channels,
    height,
    width,
    segments,
    chunks,
    strides,  # image, channel, row, column
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row segment, one chunk of its columns, one block of channels: rows first, then columns into bins."""
    stride_b, stride_c, stride_y, stride_x = strides
    i_b = (tl.program_id(0) // chunks // segments).to(tl.int64)
    i_e, i_x = tl.program_id(0) // chunks % segments, tl.program_id(0) % chunks
    i_c = tl.program_id(1).to(tl.int64)

    column = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    m_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C) < channels
    m_xc = (column < width)[:, None] & m_c[None, :]
    o_x, o_c = tl.arange(0, BLOCK_X).to(tl.int64) * stride_x, tl.arange(0, BLOCK_C).to(tl.int64) * stride_c
    o_xc = o_x[:, None] + o_c[None, :]
    x += i_b * stride_b + i_c * BLOCK_C * stride_c + i_x.to(tl.int64) * BLOCK_X * stride_x
    top, bottom = tl.load(starts + i_e), tl.load(starts + i_e + 1)
    x += top.to(tl.int64) * stride_y
    b_sum = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    for _ in range(top, bottom):
        b_sum += tl.load(x + o_xc, mask=m_xc, other=0.0).to(tl.float32)
        x += stride_y

    row_sums += tl.program_id(0).to(tl.int64) * COLUMNS * channels + i_c * BLOCK_C
    bin = i_x * 0
    for _ in range(COLUMNS):
        s, j, _ = locate(bin, SCALES)
        inside = (column >= begin_of(j, width, s)) & (column < end_of(j, width, s))
        b_bin = tl.sum(tl.where(inside[:, None], b_sum, 0.0), 0)  # no product with 0: an infinity stays in its bin
        tl.store(row_sums + tl.arange(0, BLOCK_C), b_bin, mask=m_c)
        row_sums += channels
        bin += 1


@kernel
def pool_bins_kernel(
    row_sums,  # (B, segments, chunks, Σs, C) float32
    out,  # (B, C, J)
    starts,  # (segments + 1,) int32: the first row of each segment
    channels,
    height,
    width,
    segments,
    chunks,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of regions and channels: adds up the row segments of every region and divides by its area."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    i_b = (tl.program_id(0) // channel_blocks).to(tl.int64)
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    region = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    s, i, j, bin = region * 0 + 1, region * 0, region * 0, region * 0  # (BLOCK_J,)
    bins, regions = 0, 0
    for k in tl.static_range(len(SCALES)):
        mine = (region >= regions) & (region < regions + SCALES[k] * SCALES[k])
        s = tl.where(mine, SCALES[k], s)
        i = tl.where(mine, (region - regions) // SCALES[k], i)
        j = tl.where(mine, (region - regions) % SCALES[k], j)
        bin = tl.where(mine, bins + j, bin)
        bins += SCALES[k]
        regions += SCALES[k] * SCALES[k]
    top, bottom = begin_of(i, height, s), end_of(i, height, s)
    area = (bottom - top) * (end_of(j, width, s) - begin_of(j, width, s))

    m_jc = (region < REGIONS)[:, None] & (channel < channels)[None, :]
    o_jc = bin[:, None].to(tl.int64) * channels + channel[None, :]
    row_sums += i_b * segments * chunks * COLUMNS * channels
    b_sum = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    for i_e in range(segments):
        start = tl.load(starts + i_e)
        inside = (start >= top) & (start < bottom)
        for _ in range(chunks):
            b_sum += tl.load(row_sums + o_jc, mask=inside[:, None] & m_jc, other=0.0)
            row_sums += COLUMNS * channels
    out += (i_b * channels + channel[None, :]) * REGIONS + region[:, None]
    tl.store(out, (b_sum / area[:, None].to(tl.float32)).to(out.dtype.element_ty), mask=m_jc)


@kernel
def spread_rows_kernel(
    grad,  # (B, C, J)
    grad_x,  # (B, C, h, w)
    starts,  # (segments + 1,) int32: the first row of each segment
    channels,
    height,
    width,
    segments,
    chunks,
    strides,  # image, channel, row, column
    overlap,
    SCALES: tl.constexpr,
    COLUMNS: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row segment, one chunk of its columns, one block of channels: the gradient once, written to every row."""
    stride_b, stride_c, stride_y, stride_x = strides
    i_b = (tl.program_id(0) // chunks // segments).to(tl.int64)
    i_e, i_x = tl.program_id(0) // chunks % segments, tl.program_id(0) % chunks
    i_c = tl.program_id(1).to(tl.int64)
    top, bottom = tl.load(starts + i_e), tl.load(starts + i_e + 1)

    column = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    channel = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = channel < channels
    grad += (i_b * channels + channel)[None, :] * REGIONS
    b_grad = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    for first in range(0, COLUMNS, BLOCK_N):
        bin = first + tl.arange(0, BLOCK_N)
        s, j, first_region = locate(bin, SCALES)
        left, right = begin_of(j, width, s), end_of(j, width, s)
        b_bins = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)  # this segment's share of each column bin
        for o in range(overlap):
            i = top * s // height + o  # the bins that hold row `top` start here
            holds = (bin < COLUMNS) & (i < s) & (begin_of(i, height, s) <= top)
            area = (end_of(i, height, s) - begin_of(i, height, s)) * (right - left)
            b_region = tl.load(
                grad + (first_region + i * s + j)[:, None], mask=holds[:, None] & m_c[None, :], other=0.0
            )
            b_bins += b_region.to(tl.float32) / area[:, None].to(tl.float32)
        for n in range(min(BLOCK_N, COLUMNS)):
            this = tl.arange(0, BLOCK_N) == n
            b_bin = tl.sum(tl.where(this[:, None], b_bins, 0.0), 0)
            inside = (column >= tl.sum(tl.where(this, left, 0), 0)) & (column < tl.sum(tl.where(this, right, 0), 0))
            b_grad += tl.where(inside[:, None], b_bin[None, :], 0.0)

    m_xc = (column < width)[:, None] & m_c[None, :]
    o_x, o_c = tl.arange(0, BLOCK_X).to(tl.int64) * stride_x, tl.arange(0, BLOCK_C).to(tl.int64) * stride_c
    o_xc = o_x[:, None] + o_c[None, :]
    grad_x += i_b * stride_b + i_c * BLOCK_C * stride_c + i_x.to(tl.int64) * BLOCK_X * stride_x
    grad_x += top.to(tl.int64) * stride_y
    for _ in range(top, bottom):
        tl.store(grad_x + o_xc, b_grad.to(grad_x.dtype.element_ty), mask=m_xc)
        grad_x += stride_y


def pyramid_pool(x: Tensor, scales: Sequence[int], out: Tensor) -> None:
    run(forward_launches(x, scales, out), x)


def pyramid_pool_backward(grad: Tensor, scales: Sequence[int], grad_x: Tensor) -> None:
    run(backward_launches(grad, scales, grad_x), grad_x)


def forward_launches(x: Tensor, scales: Sequence[int], out: Tensor) -> list[tuple]:
    batch, channels, _, _ = x.shape
    shared = _shared(x, scales)
    programs = batch * shared["segments"] * shared["chunks"]
    shared["row_sums"] = x.new_empty(programs, sum(scales), channels, dtype=torch.float32)
    rows = {"x": x, "strides": x.stride(), "BLOCK_X": BLOCK_X, "BLOCK_C": BLOCK_C}
    bins = {"out": out, "REGIONS": out.shape[2], "BLOCK_J": 64, "BLOCK_C": 32}
    return [
        (pool_rows_kernel, (programs, triton.cdiv(channels, BLOCK_C)), shared | rows),
        (pool_bins_kernel, (batch * triton.cdiv(channels, 32), triton.cdiv(out.shape[2], 64)), shared | bins),
    ]


def backward_launches(grad: Tensor, scales: Sequence[int], grad_x: Tensor) -> list[tuple]:
    batch, channels, height, _ = grad_x.shape
    shared = _shared(grad_x, scales)
    programs = batch * shared["segments"] * shared["chunks"]
    rows = {"grad": grad, "grad_x": grad_x, "strides": grad_x.stride(), "BLOCK_X": BLOCK_X, "BLOCK_C": BLOCK_C}
    rows |= {"REGIONS": grad.shape[2], "BLOCK_N": 16, "overlap": max(triton.cdiv(s, height) for s in scales) + 1}
    return [(spread_rows_kernel, (programs, triton.cdiv(channels, BLOCK_C)), shared | rows)]


@functools.cache
def starts_of(size: int, scales: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the first row of every segment, and the end of the last; sent to a device once, for it is tiny."""
    begins = {i * size // s for s in scales for i in range(s)}
    ends = {-(-i * size // s) for s in scales for i in range(1, s + 1)}
    return torch.tensor(sorted(begins | ends), dtype=torch.int32, device=device)


def _shared(x: Tensor, scales: Sequence[int]) -> dict:
    _, channels, height, width = x.shape
    starts = starts_of(height, tuple(scales), x.device)
    return {
        "starts": starts,
        "channels": channels,
        "height": height,
        "width": width,
        "segments": len(starts) - 1,
        "chunks": triton.cdiv(width, BLOCK_X),
        "SCALES": tuple(scales),
        "COLUMNS": sum(scales),
    }
