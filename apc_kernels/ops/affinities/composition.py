"""adaptive_context_norm as a composition under autograd: the specification of the training path.

Also what evaluation, exported models and scales with more regions than channels are served by.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.affinities import algebra
from apc_kernels.ops.affinities.algebra import Statistics
from apc_kernels.ops.affinities.context import adaptive_context
from apc_kernels.ops.affinities.moments import affinity_moments
from apc_kernels.ops.common import without_autocast


def adaptive_context_norm(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: tuple,
    guide: Tensor | None,
    guide_norm: tuple | None,
    training: bool,
    group: str,
) -> tuple[Tensor, Statistics, Statistics | None]:
    """z, and the statistics that the two batch norms have used."""
    with without_autocast(x):
        biases, of_guide = bias, None
        if guide is not None:
            features = algebra.guide_features(x.mean((2, 3), dtype=bias.dtype), guide, scales)
            of_guide = algebra.image_statistics(features, group) if training else running(guide_norm)
            gamma, beta, eps = guide_norm.weight, guide_norm.bias, guide_norm.eps
            biases = algebra.guided_bias(features, of_guide, gamma, beta, eps, weight, bias, scales).to(bias.dtype)
        vectors = algebra.projected(regions, projection, scales)
        statistics, center = running(norm), None
        if training:
            if forms_products(scales, regions.shape[2]):
                products = adaptive_context(x, vectors.to(regions.dtype), weight, biases, scales)
                statistics = algebra.map_statistics(products, group)
            else:
                mean, covariances = affinity_moments(x, weight, biases, scales, dtype=torch.float64)
                flat = torch.cat([c.flatten(1) for c in covariances], 1)
                positions = x.shape[2] * x.shape[3]
                statistics = algebra.product_statistics(vectors, mean, flat, positions, scales, group)
                center = mean.detach().to(bias.dtype)
        rows, shift = algebra.normalized(vectors, statistics, norm.weight, norm.bias, norm.eps, center, scales)
        rows, shift = rows.to(regions.dtype), shift.to(regions.dtype)
        z = adaptive_context(x, rows, weight, biases, scales, shift=shift, residual=True, center=center)
        return z, statistics, of_guide


def forms_products(scales: Sequence[int], channels: int) -> bool:
    """Whether a covariance would be larger than what it describes."""
    return max(scales) ** 2 > max(channels, 64)


def running(norm: tuple) -> Statistics:
    return Statistics(norm.running_mean.double(), norm.running_var.double(), None)
