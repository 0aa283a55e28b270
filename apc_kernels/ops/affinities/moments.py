"""Implements affinity_moments: the mean and covariance of affinities, without storing an affinity."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apc_kernels.ops.affinities.checks import KERNELS, check_affinities, check_for_images, limits, wide_limits
from apc_kernels.ops.affinities.context import backward_x
from apc_kernels.ops.common import as_scales, check_tensor, name_of, widened, working_dtype
from apc_kernels.ops.operator import Operator


def affinity_moments(
    x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int], *, dtype: torch.dtype | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Computes the mean and the covariance of the affinities over the positions of every image.

        A = sigmoid(x·weightᵀ + bias)                       (N, s²) for each scale s, N = h·w
        mean = 1/N · Σ A                                    (s²)
        covariance = 1/N · Σ (A − mean)(A − mean)ᵀ          (s², s²)

    Equivalent to, for one scale:

        affinities = torch.sigmoid(F.conv2d(x, weight[:, :, None, None], bias)).flatten(2)    # (B, s², N)
        centered = affinities - affinities.mean(2, keepdim=True)
        affinities.mean(2), [centered @ centered.mT / centered.shape[2]]

    A batch norm of adaptive_context's products follows from them: for region vectors R (s², C), the products A·R have
    the mean Rᵀ·mean and the variance diag(Rᵀ·covariance·R). No affinity is stored; x, weight, bias and the mean are
    saved for backward.

    Args:
        x, weight, bias, scales: as in adaptive_context.
        dtype: dtype of the results: float32 (float64 if x is float64), or float64. Sums are always kept in float64.
            Choose float64 if R is large and of mixed sign: the variance is then a small difference of large numbers.

    Returns:
        The mean, (B, J), and a list with the covariance of each scale, (B, s², s²).

    The operation is differentiable once, and deterministic to the bit. Autocast leaves x's dtype alone.
    """
    check_tensor(x, "x")
    weight, bias, scales = widened(weight, "weight", x), widened(bias, "bias", x), as_scales(scales)
    own = working_dtype(x)
    if dtype not in (None, own, torch.float64):
        raise ValueError(f"dtype: expected {name_of(own)} or float64 for this map, got {name_of(dtype)}")
    mean, covariance = moments(x, weight, bias, scales)
    covariances = covariance.to(dtype or own).split([s**4 for s in scales], 1)
    return mean.to(dtype or own), [
        c.unflatten(1, (s * s, s * s)).clone() for c, s in zip(covariances, scales, strict=True)
    ]


def _check(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> tuple[Any, ...]:
    weight, scales = check_affinities(x, weight, scales)
    return x, weight, check_for_images(bias, "bias", weight.shape[0], x), scales


def _empty(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> tuple[Tensor, ...]:
    sizes = sum(s * s for s in scales), sum(s**4 for s in scales)
    return tuple(x.new_empty(x.shape[0], size, dtype=torch.float64) for size in sizes)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.scales = inputs
    ctx.save_for_backward(x, weight, bias, output[0])


def _backward(ctx: Any, grad_mean: Tensor | None, grad_covariance: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean = ctx.saved_tensors
    if grad_mean is None:
        grad_mean = torch.zeros_like(mean)
    if grad_covariance is None:
        pairs = sum(s**4 for s in ctx.scales)
        grad_covariance = torch.zeros(mean.shape[0], pairs, dtype=mean.dtype, device=mean.device)
    linear, quadratic = through_moments(grad_mean, grad_covariance, x.shape[2] * x.shape[3], ctx.scales)
    center, linear, quadratic = (t.to(weight.dtype) for t in (mean, linear, quadratic))
    options = (None, False, center, linear, quadratic, None)
    grad_x, grad_weight, grad_bias = backward_x(None, x, None, weight, bias, ctx.scales, *options)
    return grad_x, grad_weight, grad_bias.sum_to_size(bias.shape), None


def _limits(x: Tensor, scales: Sequence[int]) -> dict[str, str]:
    """Returns the reasons why GPU kernels cannot take a call, by backend."""
    return wide_limits(x, scales) if x.dtype == torch.float32 else limits(x, scales)


# Computes the mean (B, J) and, flat, the covariances of all scales (B, Σ s⁴), in float64.
moments = Operator(
    "affinity_moments(Tensor x, Tensor weight, Tensor bias, SymInt[] scales) -> (Tensor, Tensor)",
    KERNELS,
    _check,
    on=lambda x, weight, bias, scales: (x, _limits(x, scales)),
    empty=_empty,
    backward=_backward,
    remember=_remember,
)


def through_moments(
    grad_mean: Tensor, grad_covariance: Tensor, positions: int, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of an affinity vector A through mean and covariance, as linear + quadratic·(A − mean)."""
    squares = [
        g.unflatten(1, (s * s, s * s))
        for g, s in zip(grad_covariance.split([s**4 for s in scales], 1), scales, strict=True)
    ]
    quadratic = torch.cat([(square + square.mT).flatten(1) for square in squares], 1)
    return grad_mean / positions, quadratic / positions
