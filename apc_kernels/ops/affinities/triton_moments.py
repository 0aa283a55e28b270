"""Computes affinity_moments in Triton.

A program takes a tile of positions of one image and one scale, and leaves the tile's own mean and the squares about it,
of numbers that are small because the mean is gone; a second kernel joins the tiles in float64. Beside float32 maps the
squares are float64 products: a batch norm's variance is what is left when they cancel.

Each kernel's least, every tensor moved once, for B images of N positions, C channels a scale, J = Σs² regions and
P = Σs⁴ pairs of them:

    moments_kernel  moves x, weight, bias, means, rests, squares; computes 2·B·N·J·C, 2·B·N·P more
    join_kernel     moves means, rests, squares, mean, covariance; computes B·P

What lies between them takes 8·J + 4·P bytes (8·P beside float32) for every tile of an image; with scales (1, 2, 3, 6)
and 512 channels, 2 % of x's bytes in bfloat16, 4 % in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.affinities.triton_tiles import (
    affinities,
    dot_in_halves,
    kernel,
    launch,
    offsets_of,
    operand_dtype,
    place_of_program,
    tiles_of,
)
from apc_kernels.ops.common import run

BLOCK = {"BLOCK_N": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 2}
# 16 warps: with 8, Triton 3.6 tries float64 products on sm_100's tensor memory, and fails.
FLOAT32_BLOCK = {"BLOCK_N": 32, "BLOCK_C": 32, "num_warps": 16, "num_stages": 2}


@kernel
def moments_kernel(
    x,  # (B, S*C, h, w)
    weight,  # (J, C)
    bias,  # (B, J)
    means,  # (B, tiles, J) float32
    rests,  # (B, tiles, J) float32: what rounding has taken from the means
    squares,  # (B, tiles, Σ s⁴): sums of products of the deviations from a tile's own means, float64 beside float32
    batch,
    channels,
    positions,
    width,
    rows,
    pairs,
    tiles,
    x_strides,
    SCALES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the moments of one tile of the positions of one image and one scale."""
    i_s, i_b, i_n, count, row, pair = place_of_program(batch, tiles, SCALES)
    x += i_b * x_strides[0] + i_s.to(tl.int64) * channels * x_strides[1]
    weight += row.to(tl.int64) * channels
    bias += i_b * rows + row
    means += (i_b * tiles + i_n) * rows + row
    rests += (i_b * tiles + i_n) * rows + row
    squares += (i_b * tiles + i_n) * pairs + pair

    position = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = position < positions
    o_n = offsets_of(position, width, x_strides, FLAT)
    size = tl.minimum(positions - i_n * BLOCK_N, BLOCK_N).to(tl.float32)
    for k in tl.static_range(1, len(BLOCKS)):
        if (count > BLOCKS[k - 1]) & (count <= BLOCKS[k]):
            region = tl.arange(0, BLOCKS[k])
            m_j = region < count
            m_nj = m_n[:, None] & m_j[None, :]
            b_affinity = affinities(x, weight, bias, o_n, m_n, count, channels, x_strides, BLOCK_N, BLOCK_C, BLOCKS[k])
            b_mean = tl.sum(tl.where(m_nj, b_affinity, 0.0), 0) / size
            b_centered = tl.where(m_nj, b_affinity - b_mean[None, :], 0.0)
            tl.store(means + region, b_mean, mask=m_j)
            tl.store(rests + region, tl.sum(b_centered, 0) / size, mask=m_j)
            o_jj = region[:, None] * count + region[None, :]
            if EXACT:
                b_wide = b_centered.to(tl.float64)
                b_squares = tl.dot(tl.trans(b_wide), b_wide)
            else:
                b_squares = dot_in_halves(b_centered, b_centered)
            tl.store(squares + o_jj, b_squares, mask=m_j[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=("positions", "rows", "pairs", "tiles"))
def join_kernel(
    means,  # (B, tiles, J) float32
    rests,  # (B, tiles, J) float32
    squares,  # (B, tiles, Σ s⁴)
    mean,  # (B, J) float64
    covariance,  # (B, Σ s⁴) float64
    positions,
    rows,
    pairs,
    tiles,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Joins one block of the covariances' entries of one image.

    It joins those of the tiles, and the two means that each is taken about.

    Chan et al.: the squares about the common mean are those about the tiles' own, and those of the tiles' distances.
    """
    i_b = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = entry < pairs
    row_a, row_b = entry * 0, entry * 0
    first_row, first_pair = 0, 0
    for k in tl.static_range(len(SCALES)):
        count = SCALES[k] * SCALES[k]
        mine = (entry >= first_pair) & (entry < first_pair + count * count)
        row_a = tl.where(mine, first_row + (entry - first_pair) // count, row_a)
        row_b = tl.where(mine, first_row + (entry - first_pair) % count, row_b)
        first_row += count
        first_pair += count * count
    means += i_b * tiles * rows
    rests += i_b * tiles * rows
    squares += i_b * tiles * pairs

    b_mean_a, b_mean_b = tl.zeros((BLOCK_P,), tl.float64), tl.zeros((BLOCK_P,), tl.float64)
    for t in range(0, tiles, BLOCK_T):
        tile = t + tl.arange(0, BLOCK_T)
        share = share_of(tile, positions, BLOCK_N)
        m_tp = (tile < tiles)[:, None] & m_p[None, :]
        b_mean_a += tl.sum(load_means(means, rests, tile, row_a, rows, m_tp) * share[:, None], 0)
        b_mean_b += tl.sum(load_means(means, rests, tile, row_b, rows, m_tp) * share[:, None], 0)
    b_covariance = tl.zeros((BLOCK_P,), tl.float64)
    for t in range(0, tiles, BLOCK_T):
        tile = t + tl.arange(0, BLOCK_T)
        share = share_of(tile, positions, BLOCK_N)
        m_tp = (tile < tiles)[:, None] & m_p[None, :]
        b_a = load_means(means, rests, tile, row_a, rows, m_tp) - b_mean_a[None, :]
        b_b = load_means(means, rests, tile, row_b, rows, m_tp) - b_mean_b[None, :]
        b_within = tl.load(squares + tile[:, None].to(tl.int64) * pairs + entry[None, :], mask=m_tp, other=0.0)
        b_both = b_within.to(tl.float64) / positions + b_a * b_b * share[:, None]
        b_covariance += tl.sum(tl.where(m_tp, b_both, 0.0), 0)
    tl.store(covariance + i_b * pairs + entry, b_covariance, mask=m_p)
    tl.store(mean + i_b * rows + row_a, b_mean_a, mask=m_p & (row_a == row_b))


@triton.jit
def share_of(tile, positions, BLOCK_N: tl.constexpr):
    """Returns the share of all positions that a tile has."""
    return tl.minimum(positions - tile * BLOCK_N, BLOCK_N).to(tl.float64) / positions


@triton.jit
def load_means(means, rests, tile, row, rows, mask):
    """Loads means as (BLOCK_T, BLOCK_P) float64."""
    o_tp = tile[:, None].to(tl.int64) * rows + row[None, :]
    b_mean = tl.load(means + o_tp, mask=mask, other=0.0).to(tl.float64)
    return b_mean + tl.load(rests + o_tp, mask=mask, other=0.0)


def affinity_moments(x: Tensor, *others) -> None:
    run(launches(x, *others), x)


def launches(x, weight, bias, scales, mean: Tensor, covariance: Tensor) -> list[tuple]:
    (batch, rows), pairs = bias.shape, covariance.shape[1]
    exact = x.dtype == torch.float32  # else rounding of the map hides what float64 would keep
    block = FLOAT32_BLOCK if exact else BLOCK
    tiles = tiles_of(x, block)
    parts = {
        "means": x.new_empty(batch, tiles, rows, dtype=torch.float32),
        "rests": x.new_empty(batch, tiles, rows, dtype=torch.float32),
        "squares": x.new_empty(batch, tiles, pairs, dtype=torch.float64 if exact else torch.float32),
    }
    arguments = {"weight": weight.to(operand_dtype(x)), "bias": bias, "EXACT": exact, **parts}
    moments = launch(moments_kernel, x, scales, block, arguments, x=x)
    join = {"mean": mean, "covariance": covariance, "BLOCK_T": 16, "BLOCK_P": 64, "BLOCK_N": block["BLOCK_N"]}
    join |= {name: moments[2][name] for name in ("positions", "rows", "pairs", "tiles", "SCALES")}
    return [moments, (join_kernel, (triton.cdiv(pairs, 64), batch), parts | join)]
