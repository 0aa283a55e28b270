"""Computes the small products of adaptive_context_norm: all tensors with a row for each region and none for positions.

Forward functions are plain differentiable PyTorch. Each is followed by its gradient, because the training path computes
the gradients of one autograd node in two phases, and needs some before others. They use float64: a variance is a
quadratic form in the covariance, and loses digits in float32 that the unfused path would keep.

V (B, J, C) are the region vectors after the residual convolution, V = Y·Pᵀ for each scale; S scales, C channels each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apc_kernels.ops.affinities.reference import Block, blocks


class BatchNorm(NamedTuple):
    """Holds the parameters and running statistics of the batch norms of all scales, concatenated: (S·C,) each.

    `momentum` and `eps` are numbers, as in torch.nn.BatchNorm2d.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float = 0.1
    eps: float = 1e-5


class Statistics(NamedTuple):
    """Holds the statistics of a batch norm over positions, images and ranks: per channel, and the number of values."""

    mean: Tensor
    variance: Tensor
    count: Tensor


class _SumOverRanks(torch.autograd.Function):
    """Sums a tensor over a process group; so does its backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: str) -> Tensor:
        ctx.group = group
        value = value.clone()
        # torch has no public function that finds a group by its name.
        resolve = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        dist.all_reduce(value, group=resolve(group))  # pyright: ignore[reportArgumentType]  # GroupName is a str
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None


def sum_over_ranks(value: Tensor, group: str) -> Tensor:
    """Returns the sum over a process group, given by name; "" stands for this process alone."""
    return _SumOverRanks.apply(value, group) if group else value


def _count(like: Tensor, number: int) -> Tensor:
    """Returns a number as a tensor: an exported program may know it only when it runs."""
    return like.new_full((), number)


# The guide. x + g is never formed, because W·(x + g) = W·x + W·g.


def guide_features(pooled: Tensor, guide: Tensor, scales: Sequence[int]) -> Tensor:
    """Computes the global convolution of every scale: pooled (B, S·C), guide (S·C, C) -> (B, S·C)."""
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
    """Computes the statistics of features (B, channels) over images and ranks."""
    count = sum_over_ranks(_count(features, features.shape[0]), group)
    mean = sum_over_ranks(features.sum(0), group) / count
    return Statistics(mean, sum_over_ranks((features - mean).square().sum(0), group) / count, count)


def guided_bias(
    features: Tensor, statistics: Statistics, norm: BatchNorm, weight: Tensor, bias: Tensor, scales: Sequence[int]
) -> Tensor:
    """Computes bias + W·g for every image, (B, J), with g = relu(batch norm of the features)."""
    scale = (statistics.variance + norm.eps).rsqrt()
    guide = torch.relu(norm.weight * (features - statistics.mean) * scale + norm.bias)
    rows = [guide[:, block.channels] @ weight[block.rows].double().mT for block in blocks(scales, weight.shape[1])]
    return (bias.double() + torch.cat(rows, 1)).to(bias.dtype)


def guided_bias_backward(
    grad: Tensor,
    features: Tensor,
    statistics: Statistics,
    norm: BatchNorm,
    weight: Tensor,
    scales: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of features, gamma, beta and weight, through the statistics of a training batch."""
    scale, parts = (statistics.variance + norm.eps).rsqrt(), list(blocks(scales, weight.shape[1]))
    normal = (features - statistics.mean) * scale
    guide = norm.weight * normal + norm.bias
    through = torch.cat([grad[:, part.rows] @ weight[part.rows].double() for part in parts], 1)
    grad_weight = [grad[:, part.rows].mT @ guide[:, part.channels].relu() for part in parts]
    through = through.masked_fill(guide <= 0, 0)
    grad_gamma, grad_beta = (through * normal).sum(0), through.sum(0)
    mean_beta, mean_gamma = sum_over_ranks(torch.stack([grad_beta, grad_gamma]), group) / statistics.count
    grad_features = norm.weight * scale * (through - mean_beta - normal * mean_gamma)
    return grad_features, grad_gamma, grad_beta, torch.cat(grad_weight)


# The residual convolution and its batch norm: residual_conv(A·Y) = A·(Y·Pᵀ), and the statistics of A·V follow from the
# moments of A.


def projected(regions: Tensor, projection: Tensor, scales: Sequence[int]) -> Tensor:
    """Computes V = Y·Pᵀ of every scale: regions (B, J, C), projection (S·C, C) -> (B, J, C)."""
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
    """Computes the statistics of A·V over positions, images and ranks: mean Vᵀ·ā, variance diag(Vᵀ·Cov(A)·V)."""
    image_means = _sum_rows(mean[..., None] * vectors, scales)  # (B, S·C)
    image_variances = _sum_rows(vectors * _times(covariance, vectors, scales), scales)
    count = sum_over_ranks(_count(image_means, image_means.shape[0] * positions), group)
    mean = sum_over_ranks(image_means.sum(0) * positions, group) / count
    squares = (image_variances + (image_means - mean).square()).sum(0) * positions
    return Statistics(mean, sum_over_ranks(squares, group) / count, count)


def map_statistics(products: Tensor, group: str) -> Statistics:
    """Computes the same statistics from a map of products, (B, S·C, h, w)."""
    wide = products.double()
    count = sum_over_ranks(_count(wide, wide.shape[0] * wide.shape[2] * wide.shape[3]), group)
    mean = sum_over_ranks(wide.sum((0, 2, 3)), group) / count
    squares = (wide - mean[:, None, None]).square().sum((0, 2, 3))
    return Statistics(mean, sum_over_ranks(squares, group) / count, count)


def normalized(
    vectors: Tensor, statistics: Statistics, norm: BatchNorm, center: Tensor | None, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Returns the regions (B, J, C) and the shift (B, S·C) that make adaptive_context the batch norm of A·V.

    The shift adds back the center that adaptive_context subtracts from the affinities.
    """
    factor, offset = norm.weight * (statistics.variance + norm.eps).rsqrt(), -statistics.mean
    if center is not None:
        offset = _sum_rows(center[..., None] * vectors, scales) + offset
    rows, shift = vectors * _to_rows(factor, scales), norm.bias + factor * offset
    return rows.to(norm.weight.dtype), shift.to(norm.weight.dtype)


class NormalizedGradients(NamedTuple):
    """Holds the gradients that normalized_backward returns."""

    vectors: Tensor
    mean: Tensor
    covariance: Tensor
    gamma: Tensor
    beta: Tensor


def normalized_backward(
    grad_regions: Tensor,
    grad_shift: Tensor,
    vectors: Tensor,
    mean: Tensor,
    covariance: Tensor,
    statistics: Statistics,
    norm: BatchNorm,
    center: Tensor,
    positions: int,
    scales: Sequence[int],
    group: str,
) -> NormalizedGradients:
    """Computes gradients through `normalized` and `product_statistics`. The center is constant: it cancels out."""
    grad_regions, grad_shift, gamma, center = (t.double() for t in (grad_regions, grad_shift, norm.weight, center))
    scale = (statistics.variance + norm.eps).rsqrt()
    factor = gamma * scale
    mean, center = mean[..., None], center[..., None]
    image_means, image_centers = _sum_rows(mean * vectors, scales), _sum_rows(center * vectors, scales)
    grad_factor = _sum_rows(grad_regions * vectors, scales) + grad_shift * (image_centers - statistics.mean)
    grad_factor = grad_factor.sum(0)
    grad_statistics = torch.stack([-factor * grad_shift.sum(0), -0.5 * grad_factor * gamma * scale**3])
    grad_mean, grad_variance = sum_over_ranks(grad_statistics, group) * (positions / statistics.count)
    grad_means = grad_mean + 2 * grad_variance * (image_means - statistics.mean)  # (B, S·C)

    grad_means, grad_variance = _to_rows(grad_means, scales), _to_rows(grad_variance, scales)
    grad_vectors = grad_regions * _to_rows(factor, scales) + center * _to_rows(grad_shift * factor, scales)
    grad_vectors = grad_vectors + mean * grad_means + 2 * grad_variance * _times(covariance, vectors, scales)
    weighted = vectors * grad_variance
    squares = [(weighted[:, b.rows] @ vectors[:, b.rows].mT).flatten(1) for b in blocks(scales, vectors.shape[2])]
    grad_mean, grad_covariance = (vectors * grad_means).sum(2), torch.cat(squares, 1)
    return NormalizedGradients(grad_vectors, grad_mean, grad_covariance, grad_factor * scale, grad_shift.sum(0))


# Conversions between one number for each channel of a scale, and one for each of its regions too. They take few
# operators, since each is a launch on a GPU, and no product with zeros and ones, so that a NaN stays in its scale.


def _to_rows(values: Tensor, scales: Sequence[int]) -> Tensor:
    """Repeats the values of each scale for its regions: (..., S·C) -> (..., J, C)."""
    values = values.unflatten(-1, (len(scales), -1))
    return torch.cat([v.expand(*v.shape[:-2], s * s, -1) for v, s in zip(values.split(1, -2), scales, strict=True)], -2)


def _sum_rows(rows: Tensor, scales: Sequence[int]) -> Tensor:
    """Sums over the regions of every scale: (B, J, C) -> (B, S·C)."""
    return torch.cat([part.sum(1) for part in rows.split([s * s for s in scales], 1)], 1)


def _times(covariance: Tensor, vectors: Tensor, scales: Sequence[int]) -> Tensor:
    """Computes Cov·V of every scale, (B, J, C)."""
    return torch.cat([_matrix(covariance, b) @ vectors[:, b.rows] for b in blocks(scales, vectors.shape[2])], 1)


def _matrix(flat: Tensor, block: Block) -> Tensor:
    return flat[:, block.pairs].unflatten(1, (block.regions, block.regions))
