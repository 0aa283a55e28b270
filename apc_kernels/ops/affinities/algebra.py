"""The tiny algebra of adaptive_context_norm: everything that has a row for a region and none for a position.

Forward functions are plain differentiable PyTorch; each has its gradient written out beside it, because the training
path computes the gradients of one autograd node in two phases, and needs some before others. In float64: a variance
is a quadratic form in the covariance, and loses in float32 what the unfused path would keep.

V (B, J, C) are the region vectors behind the residual convolution, V = Y·Pᵀ for each scale; S scales, C channels each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apc_kernels.ops.affinities.reference import blocks


class BatchNorm(NamedTuple):
    """A batch norm's parameters and running statistics, each (S·C,): of all scales, one after the other."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float = 0.1
    eps: float = 1e-5


class Statistics(NamedTuple):
    """Of a batch norm over positions, images and ranks: a number for each channel, and how many values it is of."""

    mean: Tensor
    variance: Tensor
    count: Tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        value = value.clone()
        dist.all_reduce(value, group=dist.distributed_c10d._resolve_process_group(group))
        return value

    @staticmethod
    def backward(ctx, grad):
        return _SumOverRanks.apply(grad, ctx.group), None


def sum_over_ranks(value: Tensor, group: str) -> Tensor:
    """The sum over a process group, given by name; "" stands for this process alone."""
    return _SumOverRanks.apply(value, group) if group else value


def _count(like: Tensor, number: int) -> Tensor:
    """A number that an exported program may only know when it runs."""
    return like.new_full((), number)


# The guide: x + g is never formed, for gla(x + g) = gla(x) + W·g.


def guide_features(pooled: Tensor, guide: Tensor, scales: Sequence[int]) -> Tensor:
    """The global convolution of every scale: pooled (B, S·C), guide (S·C, C) -> (B, S·C)."""
    split = pooled.unflatten(1, (len(scales), -1)).double()
    return torch.einsum("bsc,sdc->bsd", split, guide.unflatten(0, (len(scales), -1)).double()).flatten(1)


def guide_features_backward(
    grad: Tensor, pooled: Tensor, guide: Tensor, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    grad, pooled = (t.unflatten(1, (len(scales), -1)).double() for t in (grad, pooled))
    split = guide.unflatten(0, (len(scales), -1)).double()
    grad_pooled = torch.einsum("bsd,sdc->bsc", grad, split).flatten(1)
    return grad_pooled, torch.einsum("bsd,bsc->sdc", grad, pooled).flatten(0, 1)


def image_statistics(features: Tensor, group: str) -> Statistics:
    """Of (B, channels) over images and ranks."""
    count = sum_over_ranks(_count(features, features.shape[0]), group)
    mean = sum_over_ranks(features.sum(0), group) / count
    return Statistics(mean, sum_over_ranks((features - mean).square().sum(0), group) / count, count)


def guided_bias(
    features: Tensor, statistics: Statistics, norm: BatchNorm, weight: Tensor, bias: Tensor, scales: Sequence[int]
) -> Tensor:
    """bias + W·g for every image, (B, J), with g = relu(batch norm of the features)."""
    scale = (statistics.variance + norm.eps).rsqrt()
    guide = torch.relu(norm.weight * (features - statistics.mean) * scale + norm.bias)
    rows = [guide[:, block.channels] @ weight[block.rows].double().mT for block in blocks(scales, weight.shape[1])]
    return (bias.double() + torch.cat(rows, 1)).to(bias.dtype)


def guided_bias_backward(
    grad: Tensor, features: Tensor, statistics: Statistics, norm: BatchNorm, weight: Tensor, scales, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of features, gamma, beta and weight, through the statistics of a training batch."""
    scale, parts = (statistics.variance + norm.eps).rsqrt(), list(blocks(scales, weight.shape[1]))
    normal = (features - statistics.mean) * scale
    guide = norm.weight * normal + norm.bias
    through = torch.cat([grad[:, part.rows] @ weight[part.rows].double() for part in parts], 1)
    grad_weight = [grad[:, part.rows].mT @ guide[:, part.channels].relu() for part in parts]
    through = through.masked_fill(guide <= 0, 0)
    grad_gamma, grad_beta = (through * normal).sum(0), through.sum(0)
    means = sum_over_ranks(torch.stack([grad_beta, grad_gamma]), group) / statistics.count
    return norm.weight * scale * (through - means[0] - normal * means[1]), grad_gamma, grad_beta, torch.cat(grad_weight)


# The residual convolution and its batch norm: residual_conv(A·Y) = A·(Y·Pᵀ), and the statistics of A·V follow from the
# moments of A.


def projected(regions: Tensor, projection: Tensor, scales: Sequence[int]) -> Tensor:
    """V = Y·Pᵀ of every scale: regions (B, J, C), projection (S·C, C) -> (B, J, C)."""
    parts = blocks(scales, regions.shape[2])
    return torch.cat([regions[:, b.rows].double() @ projection[b.channels].double().mT for b in parts], 1)


def projected_backward(
    grad: Tensor, regions: Tensor, projection: Tensor, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    grad_regions, grad_projection = [], []
    for b in blocks(scales, regions.shape[2]):
        grad_regions.append(torch.matmul(grad[:, b.rows], projection[b.channels].double()))
        grad_projection.append(torch.einsum("bjd,bjc->dc", grad[:, b.rows], regions[:, b.rows].double()))
    return torch.cat(grad_regions, 1), torch.cat(grad_projection)


def product_statistics(
    vectors: Tensor, mean: Tensor, covariance: Tensor, positions: int, scales: Sequence[int], group: str
) -> Statistics:
    """Of A·V over positions, images and ranks: mean V·ā and variance diag(Vᵀ·Cov(A)·V), images merged."""
    means = _sum_rows(mean[..., None] * vectors, scales)  # of A·V over the positions of each image, (B, S·C)
    variances = _sum_rows(vectors * _times(covariance, vectors, scales), scales)
    count = sum_over_ranks(_count(means, means.shape[0] * positions), group)
    mean = sum_over_ranks(means.sum(0) * positions, group) / count
    squares = (variances + (means - mean).square()).sum(0) * positions
    return Statistics(mean, sum_over_ranks(squares, group) / count, count)


def map_statistics(products: Tensor, group: str) -> Statistics:
    """The same, of a map of products (B, S·C, h, w)."""
    wide = products.double()
    count = sum_over_ranks(_count(wide, wide.shape[0] * wide.shape[2] * wide.shape[3]), group)
    mean = sum_over_ranks(wide.sum((0, 2, 3)), group) / count
    squares = (wide - mean[:, None, None]).square().sum((0, 2, 3))
    return Statistics(mean, sum_over_ranks(squares, group) / count, count)


def normalized(
    vectors: Tensor, statistics: Statistics, norm: BatchNorm, center: Tensor | None, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The regions (B, J, C) and the shift (B, S·C) with which adaptive_context is the batch norm of A·V.

    The center that adaptive_context subtracts from the affinities comes back through the shift.
    """
    factor, offset = norm.weight * (statistics.variance + norm.eps).rsqrt(), -statistics.mean
    if center is not None:
        offset = _sum_rows(center[..., None] * vectors, scales) + offset
    rows, shift = vectors * _to_rows(factor, scales), norm.bias + factor * offset
    return rows.to(norm.weight.dtype), shift.to(norm.weight.dtype)


class NormalizedGradients(NamedTuple):
    vectors: Tensor
    mean: Tensor
    covariance: Tensor
    gamma: Tensor
    beta: Tensor


def normalized_backward(
    grad_regions, grad_shift, vectors, mean, covariance, statistics, norm, center, positions, scales, group
) -> NormalizedGradients:
    """Through `normalized` and `product_statistics`; the center is a constant: it cancels out of the result."""
    grad_regions, grad_shift, gamma, center = (t.double() for t in (grad_regions, grad_shift, norm.weight, center))
    scale = (statistics.variance + norm.eps).rsqrt()
    factor = gamma * scale
    mean, center = mean[..., None], center[..., None]
    means, centers = _sum_rows(mean * vectors, scales), _sum_rows(center * vectors, scales)
    grad_factor = _sum_rows(grad_regions * vectors, scales) + grad_shift * (centers - statistics.mean)
    grad_factor = grad_factor.sum(0)
    of_statistics = torch.stack([-factor * grad_shift.sum(0), -0.5 * grad_factor * gamma * scale**3])
    of_mean, of_variance = sum_over_ranks(of_statistics, group) * (positions / statistics.count)
    of_means = of_mean + 2 * of_variance * (means - statistics.mean)  # (B, S·C), of each image's mean

    of_means, of_variance = _to_rows(of_means, scales), _to_rows(of_variance, scales)
    grad_vectors = grad_regions * _to_rows(factor, scales) + center * _to_rows(grad_shift * factor, scales)
    grad_vectors = grad_vectors + mean * of_means + 2 * of_variance * _times(covariance, vectors, scales)
    weighted = vectors * of_variance
    squares = [(weighted[:, b.rows] @ vectors[:, b.rows].mT).flatten(1) for b in blocks(scales, vectors.shape[2])]
    grad_mean, grad_covariance = (vectors * of_means).sum(2), torch.cat(squares, 1)
    return NormalizedGradients(grad_vectors, grad_mean, grad_covariance, grad_factor * scale, grad_shift.sum(0))


# Between one number for each channel of a scale and one for each of its regions too. In few operators, for each is a
# launch on a GPU; by no product with zeros and ones, for a NaN is to stay in its scale.


def _to_rows(values: Tensor, scales: Sequence[int]) -> Tensor:
    """(..., S·C) -> (..., J, C): every region gets its scale's."""
    values = values.unflatten(-1, (len(scales), -1))
    return torch.cat([v.expand(*v.shape[:-2], s * s, -1) for v, s in zip(values.split(1, -2), scales, strict=True)], -2)


def _sum_rows(rows: Tensor, scales: Sequence[int]) -> Tensor:
    """(B, J, C) -> (B, S·C): over the regions of every scale."""
    return torch.cat([part.sum(1) for part in rows.split([s * s for s in scales], 1)], 1)


def _times(covariance: Tensor, vectors: Tensor, scales: Sequence[int]) -> Tensor:
    """Cov·V of every scale, (B, J, C)."""
    return torch.cat([_matrix(covariance, b) @ vectors[:, b.rows] for b in blocks(scales, vectors.shape[2])], 1)


def _matrix(flat: Tensor, block) -> Tensor:
    return flat[:, block.pairs].unflatten(1, (block.regions, block.regions))
