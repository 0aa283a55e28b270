"""adaptive_context_norm as a composition under autograd: the specification of the training path.

Also what evaluation, exported models and scales with more regions than channels are served by.
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
    z: Tensor
    statistics: Statistics  # that the two batch norms have used
    of_guide: Statistics | None
    biases: Tensor
    pooled: Tensor | None
    mean: Tensor | None
    covariance: Tensor | None
    vectors: Tensor


def adaptive_context_norm(
    x, regions, weight, bias, scales, projection, norm, guide, guide_norm, training: bool, group: str
) -> Composed:
    with without_autocast(x):
        biases, of_guide, pooled = bias, None, None
        if guide is not None:
            pooled = x.mean((2, 3), dtype=bias.dtype)
            features = algebra.guide_features(pooled, guide, scales)
            of_guide = algebra.image_statistics(features, group) if training else running(guide_norm)
            biases = algebra.guided_bias(features, of_guide, guide_norm, weight, bias, scales)
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
        return Composed(z, statistics, of_guide, biases, pooled, mean, covariance, vectors)


def forms_products(scales: Sequence[int], channels: int) -> bool:
    """Whether a covariance would be larger than what it describes."""
    return max(scales) ** 2 > max(channels, 64)


def running(norm: BatchNorm) -> Statistics:
    return Statistics(norm.running_mean.double(), norm.running_var.double(), None)
