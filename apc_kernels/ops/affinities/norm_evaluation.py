"""Evaluates adaptive_context_norm without gradients: phases on small tensors, then one pass over the map."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.affinities.algebra import BatchNorm
from apc_kernels.ops.affinities.context import context
from apc_kernels.ops.affinities.phase_backends import phases_on


def evaluate(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: BatchNorm,
    guide: Tensor | None,
    guide_norm: BatchNorm | None,
) -> Tensor:
    """Computes what the composition computes with running statistics, in a third of its calls and without gradients."""
    phase, bias = phases_on(x, scales), bias.expand(x.shape[0], -1)
    small, wide = weight.new_empty, functools.partial(weight.new_empty, dtype=torch.float64)
    if guide is not None and guide_norm is not None:
        pooled, features, biases = x.mean((2, 3), dtype=weight.dtype), wide(x.shape[:2]), small(bias.shape)
        phase("guide_statistics", (pooled, guide, scales), (features, wide((2, x.shape[1]))))
        normalised = (features, _running(guide_norm), *guide_norm[:2], guide_norm.eps)
        phase("guide_biases", (*normalised, weight, bias[0], scales), (biases,))
        bias = biases
    vectors, rows, shift, center = wide(regions.shape), small(regions.shape), small(x.shape[:2]), small(bias.shape)
    phase("project", (regions, projection, scales), (vectors,))
    zeros = torch.zeros_like(bias, dtype=torch.float64)
    normalised = (vectors, _running(norm), *norm[:2], norm.eps)
    phase("product_norm", (*normalised, zeros, weight, scales), (rows, shift, center))
    return context.compute(x, rows, weight, bias, scales, shift, True, None)


def _running(norm: BatchNorm) -> Tensor:
    return torch.stack((norm.running_mean, norm.running_var)).double()
