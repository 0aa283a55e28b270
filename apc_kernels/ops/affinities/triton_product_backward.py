"""Computes the gradients of the batch norm of A·V in Triton: product_norm_sums and product_norm_gradients of phases.py.

Each kernel's least, every tensor moved once, for B images of S scales of C channels, J = Σs² regions and P = Σs⁴ pairs
of them:

    norm_sums_kernel         moves grad_rows, grad_shift, vectors, statistics, gamma, mean, sums, grad_gamma,
                             grad_beta; computes 2·B·J·C
    vector_gradients_kernel  moves grad_rows, grad_shift, vectors, statistics, sums, gamma, mean, covariance,
                             grad_vectors; computes 2·B·P·C
    region_gradients_kernel  moves grad_vectors, projection, grad_regions; computes 2·B·J·C·C
    projections_kernel       moves grad_vectors, regions, grad_projection; computes 2·B·J·C·C
    moment_gradients_kernel  moves vectors, statistics, sums, mean, linear, quadratic; computes 2·B·P·C
"""

import torch
import triton.language as tl

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
from apc_kernels.ops.common import run


@kernel
def norm_sums_kernel(
    grad_rows,  # (B, J, C)
    grad_shift,  # (B, S*C)
    vectors,  # (B, J, C) float64
    statistics,  # (2, S*C) float64
    gamma,  # (S*C,)
    mean,  # (B, J) float64
    sums,  # (2, S*C) float64
    grad_gamma,  # (S*C,)
    grad_beta,  # (S*C,)
    batch,
    channels,
    rows,
    parts,
    EPS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradients of statistics, gamma and beta of a part of the channels."""
    stacked = channels * len(SCALES)
    i_b, first, channel, region, count, row, _ = part_of_program(1, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    b_mean, b_scale, b_gamma = load_norm(statistics + first, gamma + first, channel, channels, stacked, EPS)
    b_of_factor, b_of_shift = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for _ in range(batch):
        b_vectors = load_tile(vectors + (i_b * rows + row) * channels, region, count, channel, channels, channels)
        b_grad = load_tile(grad_rows + (i_b * rows + row) * channels, region, count, channel, channels, channels)
        b_grad_shift = load_row(grad_shift + i_b * stacked + first, channel, channels)
        # The center, a mean rounded as adaptive_context takes it.
        b_center = load_row(mean + i_b * rows + row, region, count).to(gamma.dtype.element_ty).to(tl.float64)
        b_of_factor += tl.sum(b_grad * b_vectors, 0)
        b_of_factor += b_grad_shift * (tl.sum(b_center[:, None] * b_vectors, 0) - b_mean)
        b_of_shift += b_grad_shift
        i_b += 1
    store_row(sums + first, channel, channels, -b_gamma * b_scale * b_of_shift / i_b.to(tl.float64))
    b_of_variance = -0.5 * b_of_factor * b_gamma * (b_scale * b_scale * b_scale) / i_b.to(tl.float64)
    store_row(sums + stacked + first, channel, channels, b_of_variance)
    store_row(grad_gamma + first, channel, channels, b_of_factor * b_scale)
    store_row(grad_beta + first, channel, channels, b_of_shift)


@kernel
def vector_gradients_kernel(
    grad_rows,  # (B, J, C)
    grad_shift,  # (B, S*C)
    vectors,  # (B, J, C) float64
    statistics,  # (2, S*C) float64
    sums,  # (2, S*C) float64
    gamma,  # (S*C,)
    mean,  # (B, J) float64
    covariance,  # (B, Σ s⁴) float64
    grad_vectors,  # (B, J, C) float64
    batch,
    channels,
    rows,
    pairs,
    parts,
    EPS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradients of V of a part of the channels, one image and scale."""
    stacked = channels * len(SCALES)
    i_b, first, channel, region, count, row, pair = part_of_program(batch, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    row = i_b * rows + row
    own = vectors + row * channels
    b_products = covariance_times(
        covariance + i_b * pairs + pair, own, region, count, channel, channels, BLOCK_J, BLOCK_C
    )
    b_vectors = load_tile(own, region, count, channel, channels, channels)
    b_affinity = load_row(mean + row, region, count)
    b_center = b_affinity.to(gamma.dtype.element_ty).to(tl.float64)
    b_mean, b_scale, b_gamma = load_norm(statistics + first, gamma + first, channel, channels, stacked, EPS)
    b_of_variance = load_row(sums + stacked + first, channel, channels)
    b_distance = tl.sum(b_affinity[:, None] * b_vectors, 0) - b_mean
    b_of_mean = load_row(sums + first, channel, channels) + 2.0 * b_of_variance * b_distance
    b_factor = b_gamma * b_scale
    b_of_shift = load_row(grad_shift + i_b * stacked + first, channel, channels) * b_factor
    b_grad = load_tile(grad_rows + row * channels, region, count, channel, channels, channels) * b_factor[None, :]
    b_grad += b_center[:, None] * b_of_shift[None, :] + b_affinity[:, None] * b_of_mean[None, :]
    b_grad += 2.0 * b_of_variance[None, :] * b_products
    store_tile(grad_vectors + row * channels, region, count, channel, channels, channels, b_grad)


@kernel
def region_gradients_kernel(
    grad_vectors,  # (B, J, C) float64
    projection,  # (S*C, C)
    grad_regions,  # (B, J, C)
    batch,
    channels,
    rows,
    parts,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradients of Y of a part of the channels, one image and scale."""
    i_b, first, channel, region, count, row, _ = part_of_program(batch, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    grad_vectors += (i_b * rows + row) * channels
    projection += first * channels
    b_grad = tl.zeros((BLOCK_J, BLOCK_C), tl.float64)
    for k in range(0, channels, STEP):
        source = k + tl.arange(0, STEP)
        b_vectors = load_tile(grad_vectors, region, count, source, channels, channels)
        b_grad = tl.dot(b_vectors, load_tile(projection, source, channels, channel, channels, channels), b_grad)
    store_tile(grad_regions + (i_b * rows + row) * channels, region, count, channel, channels, channels, b_grad)


@kernel
def projections_kernel(
    grad_vectors,  # (B, J, C) float64
    regions,  # (B, J, C)
    grad_projection,  # (S*C, C)
    batch,
    channels,
    rows,
    parts,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradients of a part of one scale's projection: BLOCK_C outputs, of as many inputs."""
    i_b, first, output, _, count, row, _ = part_of_program(1, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    source = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_grad = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    for _ in range(batch):
        own = (i_b * rows + row) * channels
        for j in range(0, count, STEP):
            region = j + tl.arange(0, STEP)
            b_vectors = load_tile(grad_vectors + own, region, count, output, channels, channels)
            b_regions = load_tile(regions + own, region, count, source, channels, channels)
            b_grad = tl.dot(tl.trans(b_vectors), b_regions, b_grad)
        i_b += 1
    grad_projection += first * channels
    store_tile(grad_projection, output, channels, source, channels, channels, b_grad)


@kernel
def moment_gradients_kernel(
    vectors,  # (B, J, C) float64
    statistics,  # (2, S*C) float64
    sums,  # (2, S*C) float64
    mean,  # (B, J) float64
    linear,  # (B, J)
    quadratic,  # (B, Σ s⁴)
    batch,
    channels,
    positions,
    rows,
    pairs,
    parts,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradient of the affinities of one image and scale, as linear + quadratic·(A − mean)."""
    stacked = channels * len(SCALES)
    i_b, first, _, region, count, row, pair = part_of_program(batch, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    row = i_b * rows + row
    b_affinity = load_row(mean + row, region, count)
    b_linear, b_squares = tl.zeros((BLOCK_J,), tl.float64), tl.zeros((BLOCK_J, BLOCK_J), tl.float64)
    for c in range(0, channels, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        b_vectors = load_tile(vectors + row * channels, region, count, channel, channels, channels)
        b_distance = tl.sum(b_affinity[:, None] * b_vectors, 0) - load_row(statistics + first, channel, channels)
        b_of_variance = load_row(sums + stacked + first, channel, channels)
        b_of_mean = load_row(sums + first, channel, channels) + 2.0 * b_of_variance * b_distance
        b_linear += tl.sum(b_vectors * b_of_mean[None, :], 1)
        b_squares = tl.dot(b_vectors * b_of_variance[None, :], tl.trans(b_vectors), b_squares)
    share = 1.0 / (tl.zeros((), tl.float64) + positions)
    store_row(linear + row, region, count, b_linear * share)
    store_tile(quadratic + i_b * pairs + pair, region, count, region, count, count, 2.0 * b_squares * share)


def product_norm_sums(*arguments) -> None:
    run(product_norm_sums_launches(*arguments), arguments[0])


def product_norm_sums_launches(
    grad_rows, grad_shift, vectors, statistics, gamma, eps, mean, weight, scales, sums, grad_gamma, grad_beta
) -> list[tuple]:
    arguments = {"grad_rows": grad_rows, "grad_shift": grad_shift, "vectors": vectors, "statistics": statistics}
    arguments |= {"gamma": gamma, "EPS": eps, "mean": mean}
    arguments |= {"sums": sums, "grad_gamma": grad_gamma, "grad_beta": grad_beta}
    return [launch(norm_sums_kernel, vectors, weight, scales, SUMS, arguments, together=True)]


def product_norm_gradients(*arguments) -> None:
    run(product_norm_gradients_launches(*arguments), arguments[0])


def product_norm_gradients_launches(
    grad_rows,
    grad_shift,
    vectors,
    statistics,
    sums,
    gamma,
    eps,
    mean,
    covariance,
    regions,
    projection,
    positions,
    scales,
    grad_regions,
    grad_projection,
    linear,
    quadratic,
) -> list[tuple]:
    of_norm = {"vectors": vectors, "statistics": statistics, "sums": sums, "mean": mean}
    grads = {"grad_rows": grad_rows, "grad_shift": grad_shift, "gamma": gamma, "EPS": eps, "covariance": covariance}
    grad_vectors = {"grad_vectors": torch.empty_like(vectors)}
    of_regions = grad_vectors | {"projection": projection, "grad_regions": grad_regions}
    of_projection = grad_vectors | {"regions": regions, "grad_projection": grad_projection}
    of_moments = of_norm | {"linear": linear, "quadratic": quadratic}
    given = vectors, projection, scales
    return [
        launch(vector_gradients_kernel, *given, PRODUCTS, of_norm | grads | grad_vectors),
        launch(region_gradients_kernel, *given, PRODUCTS, of_regions),
        launch(projections_kernel, *given, PRODUCTS, of_projection, square=True, together=True),
        launch(moment_gradients_kernel, *given, PRODUCTS, of_moments, parts=1, positions=positions),
    ]
