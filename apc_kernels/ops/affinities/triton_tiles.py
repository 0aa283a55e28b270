"""Provides parts of the Triton kernels on affinities: the tile of a program, and the affinities of a tile.

A program serves one image, one scale and a run of positions. Scales differ in how many regions they have, so a kernel
holds its body once for every size of block that the scales at hand need (BLOCKS), and a program takes the smallest.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Decorates a kernel of these sizes: whether they are 1 or divisible by 16 does not make Triton compile it anew.
kernel = triton.jit(do_not_specialize=("batch", "width", "rows", "pairs", "tiles"))


@triton.jit
def place_of_program(batch, tiles, SCALES: tl.constexpr):
    """Returns scale, image and tile of positions, and three counts.

    The counts are the regions of the scale, and the regions, and pairs of one scale's regions, that lie before it.
    The last scale, as a rule the largest, goes first: it takes longest.
    """
    i = tl.program_id(0)
    i_s = len(SCALES) - 1 - i // tiles // batch
    count, row, pair = i_s * 0, i_s * 0, i_s * 0
    rows, pairs = 0, 0
    for k in tl.static_range(len(SCALES)):
        count = tl.where(i_s == k, SCALES[k] * SCALES[k], count)
        row = tl.where(i_s == k, rows, row)
        pair = tl.where(i_s == k, pairs, pair)
        rows += SCALES[k] * SCALES[k]
        pairs += SCALES[k] * SCALES[k] * SCALES[k] * SCALES[k]
    return i_s, (i // tiles % batch).to(tl.int64), i % tiles, count, row, pair


@triton.jit
def offsets_of(position, width, strides, FLAT: tl.constexpr):
    """Returns the offsets of positions in memory.

    A division would hide from Triton that they are neighbours: FLAT needs none.
    """
    if FLAT:
        offsets = position.to(tl.int64) * strides[3]
    else:
        offsets = (position // width).to(tl.int64) * strides[2] + (position % width).to(tl.int64) * strides[3]
    return offsets


@triton.jit
def load_map(x, o_n, m_n, channel, channels, strides):
    """Loads the channels of a map at the positions of a tile, (BLOCK_N, BLOCK_C)."""
    o_nc = o_n[:, None] + channel[None, :].to(tl.int64) * strides[1]
    return tl.load(x + o_nc, mask=m_n[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def load_rows(rows, region, count, channel, channels):
    """Loads the channels of a scale's rows of weight or regions, (BLOCK_J, BLOCK_C)."""
    o_jc = region[:, None].to(tl.int64) * channels + channel[None, :]
    return tl.load(rows + o_jc, mask=(region < count)[:, None] & (channel < channels)[None, :], other=0.0)


@triton.jit
def affinities(
    x,
    weight,
    bias,
    o_n,
    m_n,
    count,
    channels,
    strides,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Computes A of a tile, (BLOCK_N, BLOCK_J) float32.

    Values of positions past the end and of missing regions are not defined.
    """
    region = tl.arange(0, BLOCK_J)
    b_logits = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    for c in range(0, channels, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        b_x = load_map(x, o_n, m_n, channel, channels, strides)
        b_weight = load_rows(weight, region, count, channel, channels)
        b_logits = tl.dot(b_x.to(b_weight.dtype), tl.trans(b_weight), b_logits, input_precision="ieee")
    return tl.sigmoid(b_logits + tl.load(bias + region, mask=region < count, other=0.0)[None, :])


@triton.jit
def centered(b_affinity, center, m_nj, count, BLOCK_J: tl.constexpr):
    """Returns A − center, and 0 where there is no position or no region: sums over either may include those."""
    if center is not None:
        region = tl.arange(0, BLOCK_J)
        b_affinity -= tl.load(center + region, mask=region < count, other=0.0)[None, :]
    return tl.where(m_nj, b_affinity, 0.0)


@triton.jit
def products(b_centered, b_regions, shift, channel, channels):
    """Computes z before the relu, (BLOCK_N, BLOCK_C) float32: the same bits in forward and backward."""
    b_z = tl.dot(b_centered, b_regions, input_precision="ieee")
    if shift is not None:
        b_z += tl.load(shift + channel, mask=channel < channels, other=0.0)[None, :]
    return b_z


@triton.jit
def dot_in_halves(b_a, b_b):
    """Computes aᵀ·b, (BLOCK_J, BLOCK_J) float32, on tensor cores in nearly float32's precision, for |a|, |b| < 65504.

    A number is the sum of two in float16, to 2⁻²⁵ of 1; products of those are exact in float32, and low·low is too
    small to count. Ordinary units would take factors as long as BLOCK_N out of registers, and spill.
    """
    b_a_high, b_b_high = b_a.to(tl.float16), b_b.to(tl.float16)
    b_a_low = (b_a - b_a_high.to(tl.float32)).to(tl.float16)
    b_b_low = (b_b - b_b_high.to(tl.float32)).to(tl.float16)
    b_sum = tl.dot(tl.trans(b_a_low), b_b_high)
    b_sum = tl.dot(tl.trans(b_a_high), b_b_low, b_sum)
    return tl.dot(tl.trans(b_a_high), b_b_high, b_sum)


def operand_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of a map and its partner in a product. The interpreter's bfloat16 products are wrong."""
    interpreted = not isinstance(affinities, triton.JITFunction)
    return torch.float32 if interpreted and x.dtype == torch.bfloat16 else x.dtype


def tiles_of(x: Tensor, block: dict) -> int:
    """Returns the number of tiles of positions of an image."""
    return triton.cdiv(x.shape[2] * x.shape[3], block["BLOCK_N"])


def launch(function, x: Tensor, scales: Sequence[int], block: dict, arguments: dict, /, **maps: Tensor) -> tuple:
    """Returns a launch with a program for each scale, image and tile.

    The maps, all of x's size, are arguments by their names.

    Besides those it takes sizes (images, channels of a scale, positions, width, rows and pairs of all scales, tiles),
    the maps' strides (image, channel, row, column), and what they are compiled for.
    """
    batch, channels, height, width = x.shape
    rows, pairs, tiles = sum(s * s for s in scales), sum(s**4 for s in scales), tiles_of(x, block)
    flat = True
    for name, tensor in maps.items():
        stride_b, stride_c, stride_y, stride_x = tensor.stride()
        stride_x = stride_y if width == 1 else stride_x
        flat = flat and (height == 1 or stride_y == width * stride_x)
        arguments[f"{name}_strides"] = (stride_b, stride_c, stride_y, stride_x)
    arguments |= {"batch": batch, "channels": channels // len(scales), "positions": height * width, "width": width}
    arguments |= {"rows": rows, "pairs": pairs, "tiles": tiles}
    blocks = sorted({max(16, triton.next_power_of_2(s * s)) for s in scales})
    arguments |= {"SCALES": tuple(scales), "BLOCKS": (0, *blocks), "FLAT": flat}
    return function, (batch * len(scales) * tiles,), arguments | maps | block
