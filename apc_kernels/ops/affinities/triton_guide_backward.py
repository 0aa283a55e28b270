"""Computes the gradients of the guide and its batch norm in Triton: guide_sums and guide_gradients of phases.py.

Each kernel's least, every tensor moved once, for B images of S scales of C channels and J = Σs² regions:

    guide_sums_kernel        moves grad_bias, slope, slope_moments, linear, quadratic, features, statistics, gamma,
                             beta, weight, through, sums, grad_weight, grad_gamma, grad_beta; computes 4·B·J·C
    guide_gradients_kernel   moves through, features, statistics, sums, gamma, pooled, grad_guide; computes 0
    constant_kernel          moves through, features, statistics, sums, gamma, guide, constant; computes 0
"""

import triton
import triton.language as tl

from apc_kernels.ops.affinities.triton_parts import (
    SUMS,
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
    i_b, first, channel, region, count, row, pair = part_of_program(1, channels, parts, SCALES, BLOCK_J, BLOCK_C)
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
def feature_gradients(
    through, features, statistics, sums, gamma, own, first, channel, channels, stacked, EPS: tl.constexpr
):
    """Returns the gradients of some of one image's features before their batch norm.

    The image's features of the scale begin at `own`, the scale's channels at `first`.
    """
    b_mean, b_scale, b_gamma = load_norm(statistics + first, gamma + first, channel, channels, stacked, EPS)
    b_normal = (load_row(features + own, channel, channels) - b_mean) * b_scale
    b_squares = load_row(sums + stacked + first, channel, channels)
    b_sums = load_row(sums + first, channel, channels) + b_normal * b_squares
    return b_gamma * b_scale * (load_row(through + own, channel, channels) - b_sums)


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
    i_b, first, source, _, _, _, _ = part_of_program(1, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    output = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_grad = tl.zeros((BLOCK_C, BLOCK_C), tl.float64)
    for _ in range(batch):
        own = i_b * stacked + first
        b_features = feature_gradients(
            through, features, statistics, sums, gamma, own, first, output, channels, stacked, EPS
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
    i_b, first, source, _, _, _, _ = part_of_program(batch, channels, parts, SCALES, BLOCK_J, BLOCK_C)
    own = i_b * stacked + first
    b_constant = tl.zeros((BLOCK_C,), tl.float64)
    for d in range(0, channels, 128):
        output = d + tl.arange(0, 128)
        b_features = feature_gradients(
            through, features, statistics, sums, gamma, own, first, output, channels, stacked, EPS
        )
        b_guide = load_tile(guide + first * channels, output, channels, source, channels, channels)
        b_constant += tl.sum(b_features[:, None] * b_guide, 0)
    store_row(constant + own, source, channels, b_constant / (tl.zeros((), tl.float64) + positions))


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
