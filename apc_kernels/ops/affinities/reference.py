"""Computes the operations on affinities in plain PyTorch, as the specification of all kernels and their gradients.

    A = sigmoid(x·wᵀ + b)                   affinities of every position to the regions of a scale
    z = relu((A − center)·regions + shift) + x      where center, shift with the relu, and + x are optional
    mean = 1/N · Σ A    covariance = 1/N · Σ (A − mean)(A − mean)ᵀ      over the N positions of an image

Positions are the last dimension here, as in an NCHW map: x (B, C, N), A (B, s*s, N), regions (B, s*s, C), w (s*s, C).
The gradients come in two phases because batch normalisation sits between them (adaptive_context_norm): those of the
regions and the shift first; then, with the gradients of its statistics, those of x, weight and bias.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apc_kernels.ops.common import without_autocast, working


class Block(NamedTuple):
    """Describes one scale: its channels of the map, and its rows of tensors with a row for each region."""

    rows: slice
    channels: slice
    pairs: slice  # its s*s × s*s entries in a flat list of all scales' matrices
    regions: int  # s*s


def blocks(scales: Sequence[int], channels: int) -> Iterator[Block]:
    """Yields the block of every scale, with `channels` channels each."""
    row, pair = 0, 0
    for i, s in enumerate(scales):
        n = s * s
        yield Block(slice(row, row + n), slice(i * channels, (i + 1) * channels), slice(pair, pair + n * n), n)
        row, pair = row + n, pair + n * n


def affinities(x: Tensor, weight: Tensor, bias: Tensor, block: Block) -> Tensor:
    """Computes the affinities (B, s*s, N) from a map in the working precision, (B, S*C, N)."""
    return torch.sigmoid(weight[block.rows] @ x[:, block.channels] + bias[:, block.rows, None])


def adaptive_context(
    x: Tensor,  # (B, S*C, h, w)
    regions: Tensor,  # (B, J, C)
    weight: Tensor,  # (J, C)
    bias: Tensor,  # (B, J)
    scales: Sequence[int],
    shift: Tensor | None,  # (B, S*C)
    residual: bool,
    center: Tensor | None,  # (B, J)
) -> Tensor:
    with without_autocast(x):
        maps, result = working(x).flatten(2), []
        for block in blocks(scales, x.shape[1] // len(scales)):
            z = _products(maps, regions, weight, bias, shift, center, block)[1]
            z = z if shift is None else z.relu()
            result.append(z + maps[:, block.channels] if residual else z)
        return torch.cat(result, 1).view(x.shape).to(x.dtype)


def adaptive_context_backward_regions(
    grad: Tensor,  # (B, S*C, h, w), of z
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None,
    center: Tensor | None,
) -> tuple[Tensor, ...]:
    """Computes the gradients of regions (B, J, C) and shift (B, S*C), and three sums that make up the bias's gradient.

    With A' = A(1 − A), the slope of the affinities, and dA their gradient through z, the sums are Σ A'·dA (B, J),
    Σ A' (B, J), and Σ A'ⱼ(Aₖ − centerₖ) for every two regions of a scale, flat (B, Σ s⁴). A function of the affinities'
    mean and covariance adds a linear function of A to dA; its part of the bias's gradient follows from the last two.
    """
    with without_autocast(x):
        maps, grads, parts = working(x).flatten(2), working(grad).flatten(2), []
        for block in blocks(scales, x.shape[1] // len(scales)):
            affinity, z = _products(maps, regions, weight, bias, shift, center, block)
            passed = _through_relu(grads[:, block.channels], z, shift)
            slope, centered = affinity * (1 - affinity), _centered(affinity, center, block)
            parts.append(
                (
                    centered @ passed.mT,
                    passed.sum(2),
                    (slope * (regions[:, block.rows] @ passed)).sum(2),
                    slope.sum(2),
                    (slope @ centered.mT).flatten(1),
                )
            )
        return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def adaptive_context_backward_x(
    grad: Tensor | None,  # (B, S*C, h, w), of z; None if only the moments have a gradient
    x: Tensor,
    regions: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None,
    residual: bool,
    center: Tensor | None,
    linear: Tensor | None,  # (B, J) and
    quadratic: Tensor | None,  # flat (B, Σ s⁴): linear + quadratic·(A − center) is added to the affinities' gradient
    constant: Tensor | None,  # (B, S*C), added to the gradient of x at every position
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of x, weight (J, C) and bias (B, J)."""
    with without_autocast(x):
        maps, parts = working(x).flatten(2), []
        grads = None if grad is None else working(grad).flatten(2)
        for block in blocks(scales, x.shape[1] // len(scales)):
            affinity = affinities(maps, weight, bias, block)
            grad_affinity = torch.zeros_like(affinity)
            if grads is not None and regions is not None:
                affinity, z = _products(maps, regions, weight, bias, shift, center, block)
                grad_affinity = regions[:, block.rows] @ _through_relu(grads[:, block.channels], z, shift)
            if linear is not None and quadratic is not None:
                matrix = quadratic[:, block.pairs].unflatten(1, (block.regions, block.regions))
                grad_affinity = grad_affinity + linear[:, block.rows, None]
                grad_affinity = grad_affinity + matrix @ _centered(affinity, center, block)
            grad_logits = affinity * (1 - affinity) * grad_affinity
            grad_x = weight[block.rows].mT @ grad_logits
            if residual and grads is not None:
                grad_x = grad_x + grads[:, block.channels]
            if constant is not None:
                grad_x = grad_x + constant[:, block.channels, None]
            grad_weight = (grad_logits @ maps[:, block.channels].mT).sum(0)
            parts.append((grad_x, grad_weight, grad_logits.sum(2)))
        grad_x, grad_weight, grad_bias = zip(*parts, strict=True)
        return torch.cat(grad_x, 1).view(x.shape).to(x.dtype), torch.cat(grad_weight), torch.cat(grad_bias, 1)


def affinity_moments(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Computes the mean (B, J) and, flat, the covariances of all scales (B, Σ s⁴), in float64.

    A batch norm's variance is a quadratic form in the covariance, whose terms can cancel.
    """
    with without_autocast(x):
        maps, means, covariances = working(x).flatten(2), [], []
        for block in blocks(scales, x.shape[1] // len(scales)):
            affinity = affinities(maps, weight, bias, block).double()
            mean = affinity.mean(2)
            centered = affinity - mean[..., None]
            means.append(mean)
            covariances.append((centered @ centered.mT / affinity.shape[2]).flatten(1))
        return torch.cat(means, 1), torch.cat(covariances, 1)


def _products(
    maps: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    center: Tensor | None,
    block: Block,
) -> tuple[Tensor, Tensor]:
    """Computes the affinities, and z before the relu, (B, C, N)."""
    affinity = affinities(maps, weight, bias, block)
    z = regions[:, block.rows].mT @ _centered(affinity, center, block)
    return affinity, z if shift is None else z + shift[:, block.channels, None]


def _centered(affinity: Tensor, center: Tensor | None, block: Block) -> Tensor:
    return affinity if center is None else affinity - center[:, block.rows, None]


def _through_relu(grad: Tensor, z: Tensor, shift: Tensor | None) -> Tensor:
    return grad if shift is None else grad.masked_fill(z <= 0, 0)
