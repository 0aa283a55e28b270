"""Computes the forward phases of adaptive_context_norm in Triton; phases.py is their specification.

The gradients are in triton_guide_backward.py and triton_product_backward.py. The tensors are small: a launch takes
about as long as its kernel, and what counts is that there are few of either.

Each kernel's least, every tensor moved once, for B images of S scales of C channels, J = Σs² regions and P = Σs⁴ pairs
of them:

    guide_statistics_kernel  moves pooled, guide, features, statistics; computes 0
    guide_biases_kernel      moves features, statistics, gamma, beta, weight, bias, biases; computes 2·B·J·C
    vectors_kernel           moves regions, projection, vectors; computes 2·B·J·C·C
    products_kernel          moves vectors, mean, covariance, statistics; computes 2·B·P·C
    product_norm_kernel      moves vectors, statistics, gamma, beta, mean, norm_rows, shift, center; computes B·J·C
"""

import triton.language as tl

from apc_kernels.ops.affinities.triton_guide_backward import guide_gradients, guide_sums
from apc_kernels.ops.affinities.triton_parts import (
    PRODUCTS,
    STEP,
    SUMS,
    covariance_times,
    kernel,
    launch,
    load_norm,
    load_row,
    load_tile,
    part_of_program,
    store_row,
    store_tile,
)
from apc_kernels.ops.affinities.triton_product_backward import product_norm_gradients, product_norm_sums
from apc_kernels.ops.affinities.triton_tiles import place_of_program
from apc_kernels.ops.common import run

__all__ = [
    "guide_biases",
    "guide_gradients",
    "guide_statistics",
    "guide_sums",
    "product_norm",
    "product_norm_gradients",
    "product_norm_sums",
    "product_statistics",
    "project",
]


@kernel
def guide_statistics_kernel(
    pooled,  # (B, S*C)
    guide,  # (S*C, C)
    features,  # (B, S*C) float64
    statistics,  # (2, S*C) float64
    batch,
    channels,
    parts,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes a part of the guide's features of all images; their mean and squares by Welford's rule."""
    stacked = channels * len(SCALES)
    i_b, first, channel, _, _, _, _ = part_of_program(1, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    guide += first * channels
    b_mean, b_squares = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for _ in range(batch):
        b_features = tl.zeros((BLOCK_C,), tl.float64)
        for k in range(0, channels, 128):
            source = k + tl.arange(0, 128)
            b_pooled = load_row(pooled + i_b * stacked + first, source, channels)
            b_guide = load_tile(guide, channel, channels, source, channels, channels)
            b_features += tl.sum(b_guide * b_pooled[None, :], 1)
        store_row(features + i_b * stacked + first, channel, channels, b_features)
        b_distance = b_features - b_mean
        b_mean += b_distance / (i_b + 1).to(tl.float64)
        b_squares += b_distance * (b_features - b_mean)
        i_b += 1
    store_row(statistics + first, channel, channels, b_mean)
    store_row(statistics + stacked + first, channel, channels, b_squares / i_b.to(tl.float64))


@kernel
def guide_biases_kernel(
    features,  # (B, S*C) float64
    statistics,  # (2, S*C) float64
    gamma,  # (S*C,)
    beta,  # (S*C,)
    weight,  # (J, C)
    bias,  # (J,)
    biases,  # (B, J)
    batch,
    channels,
    rows,
    parts,
    EPS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the biases of one image and scale."""
    stacked = channels * len(SCALES)
    i_b, first, _, region, count, row, _ = part_of_program(batch, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    b_biases = load_row(bias + row, region, count)
    for c in range(0, channels, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        b_mean, b_scale, b_gamma = load_norm(statistics + first, gamma + first, channel, channels, stacked, EPS)
        b_normal = (load_row(features + i_b * stacked + first, channel, channels) - b_mean) * b_scale
        b_guide = b_gamma * b_normal + load_row(beta + first, channel, channels)
        b_guide = tl.where(b_guide <= 0, 0.0, b_guide)
        b_weight = load_tile(weight + row.to(tl.int64) * channels, region, count, channel, channels, channels)
        b_biases += tl.sum(b_weight * b_guide[None, :], 1)
    store_row(biases + i_b * rows + row, region, count, b_biases)


@kernel
def vectors_kernel(
    regions,  # (B, J, C)
    projection,  # (S*C, C)
    vectors,  # (B, J, C) float64
    batch,
    channels,
    rows,
    parts,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes V = Y·Pᵀ of a part of the channels, one image and scale."""
    i_b, first, channel, region, count, row, _ = part_of_program(batch, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    regions += (i_b * rows + row) * channels
    projection += first * channels
    b_vectors = tl.zeros((BLOCK_J, BLOCK_C), tl.float64)
    for k in range(0, channels, STEP):
        source = k + tl.arange(0, STEP)
        b_regions = load_tile(regions, region, count, source, channels, channels)
        b_projection = load_tile(projection, channel, channels, source, channels, channels)
        b_vectors = tl.dot(b_regions, tl.trans(b_projection), b_vectors)
    store_tile(vectors + (i_b * rows + row) * channels, region, count, channel, channels, channels, b_vectors)


@kernel
def products_kernel(
    vectors,  # (B, J, C) float64
    mean,  # (B, J) float64
    covariance,  # (B, Σ s⁴) float64
    statistics,  # (2, S*C) float64
    batch,
    channels,
    rows,
    pairs,
    parts,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the statistics of A·V of a part of the channels."""
    i_b, first, channel, region, count, row, pair = part_of_program(1, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    b_mean, b_squares = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for _ in range(batch):
        own = vectors + (i_b * rows + row) * channels
        b_vectors = load_tile(own, region, count, channel, channels, channels)
        b_products = covariance_times(
            covariance + i_b * pairs + pair, own, region, count, channel, channels, BLOCK_J, BLOCK_C
        )
        b_own = tl.sum(load_row(mean + i_b * rows + row, region, count)[:, None] * b_vectors, 0)
        b_distance = b_own - b_mean
        b_mean += b_distance / (i_b + 1).to(tl.float64)
        b_squares += b_distance * (b_own - b_mean) + tl.sum(b_vectors * b_products, 0)
        i_b += 1
    statistics += first
    store_row(statistics, channel, channels, b_mean)
    store_row(statistics + channels * len(SCALES), channel, channels, b_squares / i_b.to(tl.float64))


@kernel
def product_norm_kernel(
    vectors,  # (B, J, C) float64
    statistics,  # (2, S*C) float64
    gamma,  # (S*C,)
    beta,  # (S*C,)
    mean,  # (B, J) float64
    norm_rows,  # (B, J, C)
    shift,  # (B, S*C)
    center,  # (B, J)
    batch,
    channels,
    rows,
    parts,
    EPS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the normalised vectors of a part of the channels, one image and scale, and their shift."""
    stacked = channels * len(SCALES)
    i_s, i_b, i_c, count, row, _ = place_of_program(batch, parts, SCALES)
    channel, region = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    first, row = i_s.to(tl.int64) * channels, i_b * rows + row
    b_vectors = load_tile(vectors + row * channels, region, count, channel, channels, channels)
    b_center = load_row(mean + row, region, count).to(center.dtype.element_ty)
    b_mean, b_scale, b_gamma = load_norm(statistics + first, gamma + first, channel, channels, stacked, EPS)
    b_factor = b_gamma * b_scale
    b_offset = tl.sum(b_center.to(tl.float64)[:, None] * b_vectors, 0) - b_mean
    b_shift = load_row(beta + first, channel, channels) + b_factor * b_offset
    store_tile(norm_rows + row * channels, region, count, channel, channels, channels, b_vectors * b_factor[None, :])
    store_row(shift + i_b * stacked + first, channel, channels, b_shift)
    if i_c == 0:
        store_row(center + row, region, count, b_center)


def guide_statistics(*arguments) -> None:
    run(guide_statistics_launches(*arguments), arguments[0])


def guide_statistics_launches(pooled, guide, scales, features, statistics) -> list[tuple]:
    arguments = {"pooled": pooled, "guide": guide, "features": features, "statistics": statistics}
    return [launch(guide_statistics_kernel, pooled, guide, scales, SUMS, arguments, together=True)]


def guide_biases(*arguments) -> None:
    run(guide_biases_launches(*arguments), arguments[0])


def guide_biases_launches(features, statistics, gamma, beta, eps, weight, bias, scales, biases) -> list[tuple]:
    arguments = {"features": features, "statistics": statistics, "gamma": gamma, "beta": beta, "EPS": eps}
    arguments |= {"weight": weight, "bias": bias, "biases": biases}
    return [launch(guide_biases_kernel, features, weight, scales, SUMS, arguments, parts=1)]


def project(*arguments) -> None:
    run(project_launches(*arguments), arguments[0])


def project_launches(regions, projection, scales, vectors) -> list[tuple]:
    arguments = {"regions": regions, "projection": projection, "vectors": vectors}
    return [launch(vectors_kernel, regions, projection, scales, PRODUCTS, arguments)]


def product_statistics(*arguments) -> None:
    run(product_statistics_launches(*arguments), arguments[0])


def product_statistics_launches(vectors, mean, covariance, weight, scales, statistics) -> list[tuple]:
    arguments = {"vectors": vectors, "mean": mean, "covariance": covariance, "statistics": statistics}
    return [launch(products_kernel, vectors, weight, scales, PRODUCTS, arguments, together=True)]


def product_norm(*arguments) -> None:
    run(product_norm_launches(*arguments), arguments[0])


def product_norm_launches(
    vectors, statistics, gamma, beta, eps, mean, weight, scales, rows, shift, center
) -> list[tuple]:
    arguments = {"vectors": vectors, "statistics": statistics, "gamma": gamma, "beta": beta, "EPS": eps, "mean": mean}
    arguments |= {"norm_rows": rows, "shift": shift, "center": center}
    return [launch(product_norm_kernel, vectors, weight, scales, SUMS, arguments)]
