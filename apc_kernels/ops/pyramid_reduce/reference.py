"""Computes pyramid_reduce in plain PyTorch: a convolution, a batch norm and a ReLU for each scale."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apc_kernels.ops.affinities.algebra import BatchNorm


def pyramid_reduce(
    regions: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], scales: Sequence[int], training: bool
) -> Tensor:
    reduced = []
    parts = regions.unsqueeze(3).split([s * s for s in scales], 2)
    for part, weight, norm in zip(parts, weights, norms, strict=True):
        product = F.conv2d(part, weight)
        given = norm.running_mean, norm.running_var, norm.weight, norm.bias, training, norm.momentum, norm.eps
        reduced.append(F.batch_norm(product, *given))
    return F.relu(torch.cat(reduced, 2), inplace=True).squeeze(3)  # one ReLU for all scales
