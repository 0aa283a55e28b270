"""Computes the small products of adaptive_context_norm: all tensors with a row for each region and none for positions.

The functions are plain differentiable PyTorch. They use float64: a variance is a quadratic form in the covariance, and
loses digits in float32 that the unfused path would keep. phases.py has the gradients that the training path needs.

V (B, J, C) are the region vectors after the residual convolution, V = Y·Pᵀ for each scale; S scales, C channels each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from apc_kernels.ops.affinities.reference import Block, blocks


class BatchNorm(NamedTuple):
    """Holds parameters and running statistics: (S·C,) each, those of the batch norms of all scales concatenated.

    pyramid_reduce takes one for each scale, (O,).

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
    count: Tensor | int


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


# The residual convolution and its batch norm: residual_conv(A·Y) = A·(Y·Pᵀ), and the statistics of A·V follow from the
# moments of A.


def projected(regions: Tensor, projection: Tensor, scales: Sequence[int]) -> Tensor:
    """Computes V = Y·Pᵀ of every scale: regions (B, J, C), projection (S·C, C) -> (B, J, C)."""
    parts = blocks(scales, regions.shape[2])
    return torch.cat([regions[:, b.rows].double() @ projection[b.channels].double().mT for b in parts], 1)


def product_statistics(
    vectors: Tensor, mean: Tensor, covariance: Tensor, positions: int, scales: Sequence[int], group: str
) -> Statistics:
    """Computes the statistics of A·V over positions, images and ranks: mean Vᵀ·ā, variance diag(Vᵀ·Cov(A)·V)."""
    image_means = sum_rows(mean[..., None] * vectors, scales)  # (B, S·C)
    image_variances = sum_rows(vectors * times(covariance, vectors, scales), scales)
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
        offset = sum_rows(center[..., None] * vectors, scales) + offset
    rows, shift = vectors * to_rows(factor, scales), norm.bias + factor * offset
    return rows.to(norm.weight.dtype), shift.to(norm.weight.dtype)


# Conversions between one number for each channel of a scale, and one for each of its regions too. They take few
# operators, since each is a launch on a GPU, and no product with zeros and ones, so that a NaN stays in its scale.


def to_rows(values: Tensor, scales: Sequence[int]) -> Tensor:
    """Repeats the values of each scale for its regions: (..., S·C) -> (..., J, C)."""
    values = values.unflatten(-1, (len(scales), -1))
    return torch.cat([v.expand(*v.shape[:-2], s * s, -1) for v, s in zip(values.split(1, -2), scales, strict=True)], -2)


def sum_rows(rows: Tensor, scales: Sequence[int]) -> Tensor:
    """Sums over the regions of every scale: (B, J, C) -> (B, S·C)."""
    return torch.cat([part.sum(1) for part in rows.split([s * s for s in scales], 1)], 1)


def times(covariance: Tensor, vectors: Tensor, scales: Sequence[int]) -> Tensor:
    """Computes Cov·V of every scale, (B, J, C)."""
    return torch.cat([_matrix(covariance, b) @ vectors[:, b.rows] for b in blocks(scales, vectors.shape[2])], 1)


def _matrix(flat: Tensor, block: Block) -> Tensor:
    return flat[:, block.pairs].unflatten(1, (block.regions, block.regions))
