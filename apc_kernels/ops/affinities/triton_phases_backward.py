"""Computes the gradients of adaptive_context_norm's phases in Triton; phases.py is their specification.

Each kernel's least, every tensor moved once, for B images of S scales of C channels, J = Σs² regions and P = Σs⁴ pairs
of them:

    norm_sums_kernel         moves grad_rows, grad_shift, vectors, statistics, gamma, mean, sums, grad_gamma,
                             grad_beta; computes 2·B·J·C
    vector_gradients_kernel  moves grad_rows, grad_shift, vectors, statistics, sums, gamma, mean, covariance,
                             grad_vectors; computes 2·B·P·C
    region_gradients_kernel  moves grad_vectors, projection, grad_regions; computes 2·B·J·C·C
    projections_kernel       moves grad_vectors, regions, grad_projection; computes 2·B·J·C·C
    moment_gradients_kernel  moves vectors, statistics, sums, mean, linear, quadratic; computes 2·B·P·C
    guide_sums_kernel        moves grad_bias, slope, slope_moments, linear, quadratic, features, statistics, gamma,
                             beta, weight, through, sums, grad_weight, grad_gamma, grad_beta; computes 4·B·J·C
    guide_gradients_kernel   moves through, features, statistics, sums, gamma, pooled, grad_guide; computes 0
    constant_kernel          moves through, features, statistics, sums, gamma, guide, constant; computes 0
"""

import torch
import triton
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
    store_row,
    store_tile,
)
from apc_kernels.ops.affinities.triton_tiles import place_of_program
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
    i_s, i_b, i_c, count, row, _ = place_of_program(1, parts, SCALES)
    channel, region = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    first = i_s.to(tl.int64) * channels
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
    i_s, i_b, i_c, count, row, pair = place_of_program(batch, parts, SCALES)
    channel, region = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    first, row = i_s.to(tl.int64) * channels, i_b * rows + row
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
    i_s, i_b, i_c, count, row, _ = place_of_program(batch, parts, SCALES)
    channel, region = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    grad_vectors += (i_b * rows + row) * channels
    projection += i_s.to(tl.int64) * channels * channels
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
    i_s, i_b, i_c, count, row, _ = place_of_program(1, parts, SCALES)
    output, source = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_grad = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    for _ in range(batch):
        first = (i_b * rows + row) * channels
        for j in range(0, count, STEP):
            region = j + tl.arange(0, STEP)
            b_vectors = load_tile(grad_vectors + first, region, count, output, channels, channels)
            b_regions = load_tile(regions + first, region, count, source, channels, channels)
            b_grad = tl.dot(tl.trans(b_vectors), b_regions, b_grad)
        i_b += 1
    grad_projection += i_s.to(tl.int64) * channels * channels
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
    i_s, i_b, _, count, row, pair = place_of_program(batch, parts, SCALES)
    first, row, region = i_s.to(tl.int64) * channels, i_b * rows + row, tl.arange(0, BLOCK_J)
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


@kernel
def guide_sums_kernel(
    grad_bias,  # (B, J)
    slope,  # (B, J)
    slope_moments,  # (B, Σ s⁴)
    linear,  # (B, J)
    quadratic,  # (B, Σ s⁴)
    features,  # (B, S*C) float64
    statistics,  # (2, S*C) float64
    gamma,  # (S*C,)
    beta,  # (S*C,)
    weight,  # (J, C)
    through,  # (B, S*C) float64
    sums,  # (2, S*C) float64
    grad_weight,  # (J, C)
    grad_gamma,  # (S*C,)
    grad_beta,  # (S*C,)
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
    """Takes the gradient of the biases of a part of the channels on to the guide, and to the weight it multiplies."""
    stacked = channels * len(SCALES)
    i_s, i_b, i_c, count, row, pair = place_of_program(1, parts, SCALES)
    channel, region = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    first = i_s.to(tl.int64) * channels
    b_mean, b_scale, b_gamma = load_norm(statistics + first, gamma + first, channel, channels, stacked, EPS)
    b_beta = load_row(beta + first, channel, channels)
    b_weight = load_tile(weight + row.to(tl.int64) * channels, region, count, channel, channels, channels)
    b_of_weight = tl.zeros((BLOCK_J, BLOCK_C), tl.float64)
    b_of_beta, b_of_gamma = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for _ in range(batch):
        own, own_pair = i_b * rows + row, i_b * pairs + pair
        b_curved = load_tile(quadratic + own_pair, region, count, region, count, count)
        b_curved *= load_tile(slope_moments + own_pair, region, count, region, count, count)
        b_grad = load_row(grad_bias + own, region, count) + tl.sum(b_curved, 1)
        b_grad += load_row(linear + own, region, count) * load_row(slope + own, region, count)
        b_normal = (load_row(features + i_b * stacked + first, channel, channels) - b_mean) * b_scale
        b_guide = b_gamma * b_normal + b_beta
        b_through = tl.where(b_guide <= 0, 0.0, tl.sum(b_grad[:, None] * b_weight, 0))
        b_of_weight += b_grad[:, None] * tl.where(b_guide <= 0, 0.0, b_guide)[None, :]
        store_row(through + i_b * stacked + first, channel, channels, b_through)
        b_of_beta += b_through
        b_of_gamma += b_through * b_normal
        i_b += 1
    store_row(sums + first, channel, channels, b_of_beta / i_b.to(tl.float64))
    store_row(sums + stacked + first, channel, channels, b_of_gamma / i_b.to(tl.float64))
    store_row(grad_gamma + first, channel, channels, b_of_gamma)
    store_row(grad_beta + first, channel, channels, b_of_beta)
    store_tile(grad_weight + row.to(tl.int64) * channels, region, count, channel, channels, channels, b_of_weight)


@triton.jit
def feature_gradients(through, features, statistics, sums, gamma, channel, channels, stacked, EPS: tl.constexpr):
    """Returns the gradients of some of one image's features before their batch norm."""
    b_mean, b_scale, b_gamma = load_norm(statistics, gamma, channel, channels, stacked, EPS)
    b_normal = (load_row(features, channel, channels) - b_mean) * b_scale
    b_sums = load_row(sums, channel, channels) + b_normal * load_row(sums + stacked, channel, channels)
    return b_gamma * b_scale * (load_row(through, channel, channels) - b_sums)


@kernel
def guide_gradients_kernel(
    through,  # (B, S*C) float64
    features,  # (B, S*C) float64
    statistics,  # (2, S*C) float64
    sums,  # (2, S*C) float64
    gamma,  # (S*C,)
    pooled,  # (B, S*C)
    grad_guide,  # (S*C, C)
    batch,
    channels,
    parts,
    EPS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradients of a part of one scale's guide: BLOCK_C inputs, of as many outputs."""
    stacked = channels * len(SCALES)
    i_s, i_b, i_c, _, _, _ = place_of_program(1, parts, SCALES)
    source, output = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = i_s.to(tl.int64) * channels
    b_grad = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    for _ in range(batch):
        own = i_b * stacked + first
        b_features = feature_gradients(
            through + own,
            features + own,
            statistics + first,
            sums + first,
            gamma + first,
            output,
            channels,
            stacked,
            EPS,
        )
        b_grad += b_features[:, None] * load_row(pooled + own, source, channels)[None, :]
        i_b += 1
    store_tile(grad_guide + first * channels, output, channels, source, channels, channels, b_grad)


@kernel
def constant_kernel(
    through,  # (B, S*C) float64
    features,  # (B, S*C) float64
    statistics,  # (2, S*C) float64
    sums,  # (2, S*C) float64
    gamma,  # (S*C,)
    guide,  # (S*C, C)
    constant,  # (B, S*C)
    batch,
    channels,
    positions,
    parts,
    EPS: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the gradient of x through its mean, in a part of the channels of one image and scale."""
    stacked = channels * len(SCALES)
    i_s, i_b, i_c, _, _, _ = place_of_program(batch, parts, SCALES)
    source, first = i_c * BLOCK_C + tl.arange(0, BLOCK_C), i_s.to(tl.int64) * channels
    own = i_b * stacked + first
    b_constant = tl.zeros((BLOCK_C,), tl.float64)
    for d in range(0, channels, 128):
        output = d + tl.arange(0, 128)
        b_features = feature_gradients(
            through + own,
            features + own,
            statistics + first,
            sums + first,
            gamma + first,
            output,
            channels,
            stacked,
            EPS,
        )
        b_guide = load_tile(guide + first * channels, output, channels, source, channels, channels)
        b_constant += tl.sum(b_features[:, None] * b_guide, 0)
    store_row(constant + own, source, channels, b_constant / (tl.zeros((), tl.float64) + positions))


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


def guide_sums(*arguments) -> None:
    run(guide_sums_launches(*arguments), arguments[0])


def guide_sums_launches(
    grad_bias,
    slope,
    slope_moments,
    linear,
    quadratic,
    features,
    statistics,
    gamma,
    beta,
    eps,
    weight,
    scales,
    through,
    sums,
    grad_weight,
    grad_gamma,
    grad_beta,
) -> list[tuple]:
    arguments = {"grad_bias": grad_bias, "slope": slope, "slope_moments": slope_moments}
    arguments |= {"linear": linear, "quadratic": quadratic, "features": features, "statistics": statistics}
    arguments |= {"gamma": gamma, "beta": beta, "EPS": eps, "weight": weight, "through": through, "sums": sums}
    arguments |= {"grad_weight": grad_weight, "grad_gamma": grad_gamma, "grad_beta": grad_beta}
    return [launch(guide_sums_kernel, features, weight, scales, SUMS, arguments, together=True)]


def guide_gradients(*arguments) -> None:
    run(guide_gradients_launches(*arguments), arguments[0])


def guide_gradients_launches(
    through, features, statistics, sums, gamma, eps, pooled, guide, positions, scales, constant, grad_guide
) -> list[tuple]:
    arguments = {"through": through, "features": features, "statistics": statistics, "sums": sums, "gamma": gamma}
    arguments["EPS"] = eps
    of_guide, of_map = {"pooled": pooled, "grad_guide": grad_guide}, {"guide": guide, "constant": constant}
    return [
        launch(guide_gradients_kernel, features, guide, scales, SUMS, arguments | of_guide, square=True, together=True),
        launch(constant_kernel, features, guide, scales, SUMS, arguments | of_map, positions=positions),
    ]
