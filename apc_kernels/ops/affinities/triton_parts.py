"""Provides parts of the Triton kernels of adaptive_context_norm's phases: places, loads, stores, products.

A program takes a part of one scale's channels, of one image or of all of them one after the other, since a sum over
images has to be in order. All sums are float64.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.affinities.triton_tiles import place_of_program

# 16 warps: with 8, Triton 3.6 tries float64 products on sm_100's tensor memory, and fails. No fused multiply-add: in a
# sum of products a lane would fuse its own and not its neighbour's, so that lanes hold different bits of one sum.
PRODUCTS = {"BLOCK_C": 16, "num_warps": 16, "num_stages": 2, "enable_fp_fusion": False}
SUMS = {"BLOCK_C": 16, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
STEP = tl.constexpr(16)  # of what a product sums over


# Decorates a kernel of these sizes: whether they are 1 or divisible by 16 does not make Triton compile it anew.
kernel = triton.jit(do_not_specialize=("batch", "positions", "rows", "pairs", "parts"))


@triton.jit
def part_of_program(batch, channels, parts, SCALES: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns image, first channel of the scale, channels of the part, regions, and place_of_program's three counts."""
    i_s, i_b, i_c, count, row, pair = place_of_program(batch, parts, SCALES)
    channel, region = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    return i_b, i_s.to(tl.int64) * channels, channel, region, count, row, pair


@triton.jit
def load_row(numbers, index, count, other=0.0):
    return tl.load(numbers + index, mask=index < count, other=other).to(tl.float64)


@triton.jit
def load_tile(numbers, row, rows, column, columns, stride):
    offsets = row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(numbers + offsets, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0).to(
        tl.float64
    )


@triton.jit
def store_row(numbers, index, count, value):
    tl.store(numbers + index, value.to(numbers.dtype.element_ty), mask=index < count)


@triton.jit
def store_tile(numbers, row, rows, column, columns, stride, value):
    offsets = row[:, None].to(tl.int64) * stride + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(numbers + offsets, value.to(numbers.dtype.element_ty), mask=mask)


@triton.jit
def load_norm(statistics, gamma, channel, channels, stacked, EPS: tl.constexpr):
    """Returns mean, scale and gamma of a batch norm's channels."""
    b_variance = load_row(statistics + stacked, channel, channels, 1.0)
    return load_row(statistics, channel, channels), 1.0 / tl.sqrt(b_variance + EPS), load_row(gamma, channel, channels)


@triton.jit
def covariance_times(
    covariance, vectors, region, count, channel, channels, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Computes Cov·V of one image and scale, (BLOCK_J, BLOCK_C)."""
    b_products = tl.zeros((BLOCK_J, BLOCK_C), tl.float64)
    for k in range(0, count, STEP):
        other = k + tl.arange(0, STEP)
        b_covariance = load_tile(covariance, region, count, other, count, count)
        b_products = tl.dot(b_covariance, load_tile(vectors, other, count, channel, channels, channels), b_products)
    return b_products


def launch(
    function,
    images: Tensor,
    weight: Tensor,
    scales: Sequence[int],
    block: dict,
    arguments: dict,
    parts: int | None = None,
    positions: int = 0,
    together: bool = False,
    square: bool = False,
) -> tuple:
    """Returns a launch with a program for each scale, part of its channels, and image; images `together` share one.

    `weight` has the channels of a scale as columns. Kernels that walk through all channels have one part; those whose
    results are `square`, outputs by inputs, have a program for each two parts.
    """
    channels, rows, pairs = weight.shape[1], sum(s * s for s in scales), sum(s**4 for s in scales)
    parts = triton.cdiv(channels, block["BLOCK_C"]) if parts is None else parts
    sizes = {"batch": images.shape[0], "channels": channels, "positions": positions, "rows": rows, "pairs": pairs}
    arguments |= {name: size for name, size in sizes.items() if name in function.arg_names}
    programs = 1 if together else images.shape[0]
    arguments |= {"parts": parts, "SCALES": tuple(scales)}
    arguments |= {"BLOCK_J": max(16, triton.next_power_of_2(max(scales) ** 2))} | block
    return function, (programs * len(scales) * parts, parts if square else 1), arguments
