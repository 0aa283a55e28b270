"""Computes adaptive_context_norm's statistics and their gradients in plain PyTorch, the specification of its kernels.

The training path works on x four times; between lie these phases on small tensors, each one kernel call. A sum over
images ends a phase, because other processes may have images of the same batch.

    guide_statistics         the guide's convolution of x's mean, and its statistics over images
    guide_biases             bias + W·g, g being relu(batch norm)
    project                  V = Y·Pᵀ
    product_statistics       the statistics of A·V from the moments of A
    product_norm             regions, shift and center that make adaptive_context the batch norm of A·V
    product_norm_sums        gradients of the statistics, and of gamma and beta
    product_norm_gradients   gradients of Y, P, and of A through its moments
    guide_sums               gradients of beta and gamma of the guide, and of W
    guide_gradients          gradients of the guide's convolution and of x's mean

Statistics are (2, S·C): means and variances over this process. Sums are (2, S·C), divided by the number of images: what
one image's share of the statistics gets. Both are float64, as what is called wide in algebra.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.affinities import algebra
from apc_kernels.ops.affinities.algebra import BatchNorm, Statistics
from apc_kernels.ops.affinities.moments import through_moments
from apc_kernels.ops.affinities.reference import blocks


def guide_statistics(pooled: Tensor, guide: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    features = algebra.guide_features(pooled, guide, scales)
    return features, _packed(algebra.image_statistics(features, ""))


def guide_biases(
    features: Tensor,
    statistics: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
) -> tuple[Tensor, ...]:
    return (algebra.guided_bias(features, _unpacked(statistics), _norm(gamma, beta, eps), weight, bias, scales),)


def project(regions: Tensor, projection: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    return (algebra.projected(regions, projection, scales),)


def product_statistics(
    vectors: Tensor, mean: Tensor, covariance: Tensor, weight: Tensor, scales: Sequence[int]
) -> tuple[Tensor, ...]:
    return (_packed(algebra.product_statistics(vectors, mean, covariance, 1, scales, "")),)


def product_norm(
    vectors: Tensor,
    statistics: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    mean: Tensor,
    weight: Tensor,
    scales: Sequence[int],
) -> tuple[Tensor, ...]:
    center = mean.to(weight.dtype)
    return *algebra.normalized(vectors, _unpacked(statistics), _norm(gamma, beta, eps), center, scales), center


def product_norm_sums(
    grad_rows: Tensor,
    grad_shift: Tensor,
    vectors: Tensor,
    statistics: Tensor,
    gamma: Tensor,
    eps: float,
    mean: Tensor,
    weight: Tensor,
    scales: Sequence[int],
) -> tuple[Tensor, ...]:
    (means, variances), gamma = statistics, gamma.double()
    scale, center = (variances + eps).rsqrt(), mean.to(weight.dtype).double()
    image_centers = algebra.sum_rows(center[..., None] * vectors, scales)
    grad_factor = algebra.sum_rows(grad_rows.double() * vectors, scales) + grad_shift * (image_centers - means)
    grad_factor, grad_beta = grad_factor.sum(0), grad_shift.double().sum(0)
    sums = torch.stack([-gamma * scale * grad_beta, -0.5 * grad_factor * gamma * scale**3]) / vectors.shape[0]
    return sums, (grad_factor * scale).to(weight.dtype), grad_beta.to(weight.dtype)


def product_norm_gradients(
    grad_rows: Tensor,
    grad_shift: Tensor,
    vectors: Tensor,
    statistics: Tensor,
    sums: Tensor,
    gamma: Tensor,
    eps: float,
    mean: Tensor,
    covariance: Tensor,
    regions: Tensor,
    projection: Tensor,
    positions: int,
    scales: Sequence[int],
) -> tuple[Tensor, ...]:
    (means, variances), (grad_mean, grad_variance), parts = statistics, sums, list(blocks(scales, vectors.shape[2]))
    factor, center = gamma * (variances + eps).rsqrt(), mean.to(projection.dtype).double()[..., None]
    mean = mean[..., None]
    grad_means = grad_mean + 2 * grad_variance * (algebra.sum_rows(mean * vectors, scales) - means)  # (B, S·C)

    grad_means, grad_variance = algebra.to_rows(grad_means, scales), algebra.to_rows(grad_variance, scales)
    grad_vectors = grad_rows * algebra.to_rows(factor, scales) + center * algebra.to_rows(grad_shift * factor, scales)
    grad_vectors = grad_vectors + mean * grad_means
    grad_vectors = grad_vectors + 2 * grad_variance * algebra.times(covariance, vectors, scales)
    grad_regions = [grad_vectors[:, b.rows] @ projection[b.channels].double() for b in parts]
    grad_projection = [torch.einsum("bjd,bjc->dc", grad_vectors[:, b.rows], regions[:, b.rows].double()) for b in parts]
    weighted = vectors * grad_variance
    squares = [(weighted[:, b.rows] @ vectors[:, b.rows].mT).flatten(1) for b in parts]
    moments = through_moments((vectors * grad_means).sum(2), torch.cat(squares, 1), positions, scales)
    return tuple(t.to(projection.dtype) for t in (torch.cat(grad_regions, 1), torch.cat(grad_projection), *moments))


def guide_sums(
    grad_bias: Tensor,
    slope: Tensor,
    slope_moments: Tensor,
    linear: Tensor,
    quadratic: Tensor,
    features: Tensor,
    statistics: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    weight: Tensor,
    scales: Sequence[int],
) -> tuple[Tensor, ...]:
    parts, (means, variances) = list(blocks(scales, weight.shape[1])), statistics
    # The gradient of the biases, which backward_x finds too late: through the guide it reaches every pixel of x.
    curved = [
        (quadratic[:, b.pairs].double() * slope_moments[:, b.pairs]).unflatten(1, (b.regions, b.regions)).sum(2)
        for b in parts
    ]
    grad = grad_bias.double() + linear.double() * slope + torch.cat(curved, 1)
    normal = (features - means) * (variances + eps).rsqrt()
    guide = gamma * normal + beta
    through = torch.cat([grad[:, b.rows] @ weight[b.rows].double() for b in parts], 1).masked_fill(guide <= 0, 0)
    grad_weight = torch.cat([grad[:, b.rows].mT @ guide[:, b.channels].relu() for b in parts])
    sums = torch.stack([through.sum(0), (through * normal).sum(0)])
    small = (grad_weight, sums[1], sums[0])
    return through, sums / features.shape[0], *(t.to(weight.dtype) for t in small)


def guide_gradients(
    through: Tensor,
    features: Tensor,
    statistics: Tensor,
    sums: Tensor,
    gamma: Tensor,
    eps: float,
    pooled: Tensor,
    guide: Tensor,
    positions: int,
    scales: Sequence[int],
) -> tuple[Tensor, ...]:
    (means, variances), (of_beta, of_gamma) = statistics, sums
    scale = (variances + eps).rsqrt()
    grad_features = gamma * scale * (through - of_beta - (features - means) * scale * of_gamma)
    grad, pooled = (t.unflatten(1, (len(scales), -1)).double() for t in (grad_features, pooled))
    grad_pooled = torch.einsum("bsd,sdc->bsc", grad, guide.unflatten(0, (len(scales), -1)).double()).flatten(1)
    grad_guide = torch.einsum("bsd,bsc->sdc", grad, pooled).flatten(0, 1)
    return (grad_pooled / positions).to(guide.dtype), grad_guide.to(guide.dtype)


def _packed(statistics: Statistics) -> Tensor:
    return torch.stack(statistics[:2])


def _unpacked(statistics: Tensor) -> Statistics:
    return Statistics(statistics[0], statistics[1], None)  # pyright: ignore[reportArgumentType]  # the number of values is never read


def _norm(gamma: Tensor, beta: Tensor, eps: float) -> BatchNorm:
    """Returns a batch norm without running statistics, which training does not read."""
    return BatchNorm(gamma, beta, None, None, eps=eps)  # pyright: ignore[reportArgumentType]
