"""affinity_moments: mean and covariance of the affinities of every image and scale, without storing an affinity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.adaptive_context import backward_x, check_affinities, limits
from apc_kernels.ops.affinity_moments import reference
from apc_kernels.ops.common import call, check_small


def affinity_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """What a batch norm of adaptive_context's products needs to know of the affinities.

        A = sigmoid(x·weightᵀ + bias)                       (N, s²) for each scale s, N = h·w
        mean = 1/N · Σ A                                    (s²)
        covariance = 1/N · Σ (A − mean)(A − mean)ᵀ          (s², s²)       over the positions of an image

    For region vectors R (s², C), the products A·R have the mean Rᵀ·mean and the variance diag(Rᵀ·covariance·R).

    Args:
        x, weight, bias, scales: as in adaptive_context.
        dtype: of the results: float32, float64 for float64 maps, or float64 if asked for. Sums are kept in float64.
            Where R is large and of mixed sign the variance is a small difference of large numbers: ask for float64.

    Returns:
        The mean (B, J), and a list of covariances, (B, s², s²) for each scale.

    Saves x, weight, bias and the mean for backward. Differentiable once; deterministic to the bit; x keeps its dtype
    under autocast.
    """
    scales = check_affinities(x, weight, bias, scales)
    own = torch.float64 if x.dtype == torch.float64 else torch.float32
    if dtype not in (None, own, torch.float64):
        given, allowed = (str(d).removeprefix("torch.") for d in (dtype, own))
        raise ValueError(f"dtype: expected {allowed} or float64 for this map, got {given}")
    rows = weight.shape[0]
    weight = check_small(weight, "weight", [tuple(weight.shape)], x)
    bias = check_small(bias, "bias", [tuple(bias.shape)], x).expand(x.shape[0], rows)
    operator = reference.affinity_moments if torch.compiler.is_exporting() else _forward
    mean, covariance = operator(x, weight, bias, scales)
    covariances = covariance.to(dtype or own).split([s**4 for s in scales], 1)
    return mean.to(dtype or own), [
        c.unflatten(1, (s * s, s * s)).clone() for c, s in zip(covariances, scales, strict=True)
    ]


@torch.library.custom_op("apc_kernels::affinity_moments", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The mean (B, J) and, flat, the covariances of all scales (B, Σ s⁴), in float64."""
    scales = _check(x, weight, bias, scales)
    results = _empty(x, scales)
    call("affinity_moments", "affinity_moments", x, limits(x, scales), (x, weight, bias, scales), results)
    return results


def _check(x, weight, bias, scales):
    scales = check_affinities(x, weight, bias, scales)
    check_small(bias, "bias", [(x.shape[0], weight.shape[0])], x)
    return scales


def _empty(x, scales):
    sizes = sum(s * s for s in scales), sum(s**4 for s in scales)
    return tuple(x.new_empty(x.shape[0], size, dtype=torch.float64) for size in sizes)


@_forward.register_fake
def _(x, weight, bias, scales):
    _check(x, weight, bias, scales)
    return _empty(x, scales)


def _remember(ctx, inputs, output):
    x, weight, bias, ctx.scales = inputs
    ctx.save_for_backward(x, weight, bias, output[0])


def _backward(ctx, grad_mean, grad_covariance):
    x, weight, bias, mean = ctx.saved_tensors
    if grad_mean is None:
        grad_mean = torch.zeros_like(mean)
    if grad_covariance is None:
        grad_covariance = mean.new_zeros(mean.shape[0], sum(s**4 for s in ctx.scales))
    linear, quadratic = through_moments(grad_mean, grad_covariance, x.shape[2] * x.shape[3], ctx.scales)
    center, linear, quadratic = (t.to(weight.dtype) for t in (mean, linear, quadratic))
    arguments = (None, x, None, weight, bias, ctx.scales, None, False, center, linear, quadratic, None)
    return *backward_x(*arguments), None


def through_moments(
    grad_mean: Tensor, grad_covariance: Tensor, positions: int, scales: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The gradient of an affinity vector A through mean and covariance, as linear + quadratic·(A − mean)."""
    squares = [
        g.unflatten(1, (s * s, s * s))
        for g, s in zip(grad_covariance.split([s**4 for s in scales], 1), scales, strict=True)
    ]
    quadratic = torch.cat([(square + square.mT).flatten(1) for square in squares], 1)
    return grad_mean / positions, quadratic / positions


_forward.register_autograd(_backward, setup_context=_remember)
