"""Computes adaptive_context_norm as a composition under autograd, the specification of the training path.

It also serves evaluation, exported models, and scales with more regions than channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from apc_kernels.ops.affinities import algebra
from apc_kernels.ops.affinities.algebra import BatchNorm, Statistics
from apc_kernels.ops.affinities.context import context
from apc_kernels.ops.affinities.moments import moments
from apc_kernels.ops.common import without_autocast


class Composed(NamedTuple):
    """Holds the result z, the statistics that the two batch norms have used, and the intermediate results."""

    z: Tensor
    statistics: Statistics
    guide_statistics: Statistics | None
    biases: Tensor
    pooled: Tensor | None
    mean: Tensor | None
    covariance: Tensor | None
    vectors: Tensor


def adaptive_context_norm(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: BatchNorm,
    guide: Tensor | None,
    guide_norm: BatchNorm | None,
    training: bool,
    group: str,
) -> Composed:
    with without_autocast(x):
        biases, guide_statistics, pooled = bias, None, None
        if guide is not None and guide_norm is not None:
            pooled = x.mean((2, 3), dtype=bias.dtype)
            features = algebra.guide_features(pooled, guide, scales)
            guide_statistics = algebra.image_statistics(features, group) if training else running(guide_norm)
            biases = algebra.guided_bias(features, guide_statistics, guide_norm, weight, bias, scales)
        vectors = algebra.projected(regions, projection, scales)
        center = mean = covariance = None
        if not training:
            statistics = running(norm)
        elif forms_products(scales, regions.shape[2]):
            products = context(x, vectors.to(regions.dtype), weight, biases, scales, None, False, None)
            statistics = algebra.map_statistics(products, group)
        else:
            mean, covariance = moments(x, weight, biases, scales)
            positions = x.shape[2] * x.shape[3]
            statistics = algebra.product_statistics(vectors, mean, covariance, positions, scales, group)
            center = mean.detach().to(bias.dtype)
        rows, shift = algebra.normalized(vectors, statistics, norm, center, scales)
        z = context(x, rows, weight, biases, scales, shift, True, center)
        return Composed(z, statistics, guide_statistics, biases, pooled, mean, covariance, vectors)


def forms_products(scales: Sequence[int], channels: int) -> bool:
    """Tells whether a covariance would be larger than the products that it describes."""
    return max(scales) ** 2 > max(channels, 64)


def running(norm: BatchNorm) -> Statistics:
    """Returns the running statistics of a batch norm."""
    return Statistics(norm.running_mean.double(), norm.running_var.double(), None)  # pyright: ignore[reportArgumentType]  # never read
