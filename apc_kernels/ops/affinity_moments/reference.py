"""affinity_moments in plain PyTorch: the specification.

    mean = 1/N · Σ A                covariance = 1/N · Σ (A − mean)(A − mean)ᵀ        over the N positions of an image

Accumulated in float64: a batch norm's variance is a quadratic form in the covariance, and one that can cancel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.adaptive_context.reference import affinities, blocks
from apc_kernels.ops.common import without_autocast, working


def affinity_moments(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean (B, J) and, flat, the covariances of all scales (B, Σ s⁴), in float64."""
    with without_autocast(x):
        maps, means, covariances = working(x).flatten(2), [], []
        for block in blocks(scales, x.shape[1] // len(scales)):
            affinity = affinities(maps, weight, bias, block).double()
            mean = affinity.mean(2)
            centered = affinity - mean[..., None]
            means.append(mean)
            covariances.append((centered @ centered.mT / affinity.shape[2]).flatten(1))
        return torch.cat(means, 1), torch.cat(covariances, 1)
