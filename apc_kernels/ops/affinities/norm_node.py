"""Trains adaptive_context_norm as one node of autograd's graph, in phases (phases.py).

The composition under autograd (composition.py) is its specification.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apc_kernels.ops.affinities import algebra
from apc_kernels.ops.affinities.algebra import BatchNorm, Statistics
from apc_kernels.ops.affinities.context import backward_regions, backward_x, context
from apc_kernels.ops.affinities.moments import moments
from apc_kernels.ops.affinities.phase_backends import phases_on
from apc_kernels.ops.autograd import EagerFunction
from apc_kernels.ops.common import is_plain, runs_eagerly
from apc_kernels.ops.operator import define


def one_node(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: BatchNorm,
    guide: Tensor | None,
    guide_norm: BatchNorm | None,
    training: bool,
    group: str,
) -> tuple[Tensor, Statistics, Statistics | None]:
    with_guide = (None, None, None, 0.0) if guide_norm is None else (guide, *guide_norm[:2], guide_norm.eps)
    tensors = x, regions, weight, bias, projection, *norm[:2], *with_guide[:3]
    if torch.is_grad_enabled() and runs_eagerly() and all(map(is_plain, tensors)):
        found: list[Tensor] = []
        z = _Node.apply((scales, norm.eps, with_guide[3], group), found, *tensors)  # pyright: ignore[reportAttributeAccessIssue]
        statistics, of_guide, counts = found
    else:
        results = _forward(x, regions, weight, bias, scales, projection, *norm[:2], norm.eps, *with_guide, group)
        z, statistics, of_guide, counts = results[:4]
    values, images = counts if group else (x.shape[0] * x.shape[2] * x.shape[3], x.shape[0])
    guide_statistics = None if guide is None else Statistics(of_guide[0], of_guide[1], images)
    return z, Statistics(statistics[0], statistics[1], values), guide_statistics


class _Saved(NamedTuple):
    """Holds what the forward leaves for the backward; that of the guide is empty without one."""

    statistics: Tensor  # (2, S·C), mean and variance
    guide_statistics: Tensor
    counts: Tensor  # of positions and images in a process group, else empty
    biases: Tensor  # (B, J)
    pooled: Tensor  # (B, S·C)
    features: Tensor  # (B, S·C)
    mean: Tensor  # (B, J)
    covariance: Tensor  # (B, Σ s⁴)
    vectors: Tensor  # (B, J, C), before the norm
    rows: Tensor  # (B, J, C), after it
    shift: Tensor  # (B, S·C)
    center: Tensor  # (B, J)


def _compute(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    guide: Tensor | None,
    guide_gamma: Tensor | None,
    guide_beta: Tensor | None,
    guide_eps: float,
    group: str,
) -> list[Tensor]:
    """Returns z and what the backward needs."""
    saved, phase = _empty_saved(x, regions, weight, scales, guide, group), phases_on(x, scales)
    if guide is None:
        saved.biases.copy_(bias)
    else:
        saved = saved._replace(pooled=x.mean((2, 3), dtype=weight.dtype))
        phase("guide_statistics", (saved.pooled, guide, scales), (saved.features, saved.guide_statistics))
        _merge(saved.guide_statistics, x.shape[0], group, saved.counts[1:])
        normalised = (saved.features, saved.guide_statistics, guide_gamma, guide_beta, guide_eps)
        phase("guide_biases", (*normalised, weight, bias, scales), (saved.biases,))
    mean, covariance = moments.compute(x, weight, saved.biases, scales)
    phase("project", (regions, projection, scales), (saved.vectors,))
    phase("product_statistics", (saved.vectors, mean, covariance, weight, scales), (saved.statistics,))
    _merge(saved.statistics, x.shape[0] * x.shape[2] * x.shape[3], group, saved.counts[:1])
    normalised = (saved.vectors, saved.statistics, gamma, beta, eps)
    phase("product_norm", (*normalised, mean, weight, scales), (saved.rows, saved.shift, saved.center))
    z = context.compute(x, saved.rows, weight, saved.biases, scales, saved.shift, True, saved.center)
    return [z, *saved._replace(mean=mean, covariance=covariance)]


def _merge(statistics: Tensor, count: int, group: str, total: Tensor) -> None:
    """Turns the statistics of this process's `count` values into the group's, and `total` into their number."""
    if not group:
        return
    mean, variance = statistics
    sums = algebra.sum_over_ranks(torch.cat([mean * count, mean.new_full((1,), count)]), group)
    total.copy_(sums[-1:])
    merged = sums[:-1] / total
    squares = algebra.sum_over_ranks((variance + (mean - merged).square()) * count, group)
    statistics.copy_(torch.stack([merged, squares / total]))


def _empty_saved(
    x: Tensor, regions: Tensor, weight: Tensor, scales: Sequence[int], guide: Tensor | None, group: str
) -> _Saved:
    (batch, channels, *_), rows, pairs = x.shape, weight.shape[0], sum(s**4 for s in scales)
    small, wide = weight.new_empty, functools.partial(weight.new_empty, dtype=torch.float64)
    of_guide = (batch, channels) if guide is not None else (0,)
    return _Saved(
        statistics=wide((2, channels)),
        guide_statistics=wide((2, channels) if guide is not None else (0,)),
        counts=wide((2,) if group else (0,)),
        biases=small((batch, rows)),
        pooled=small(of_guide),
        features=wide(of_guide),
        mean=wide((batch, rows)),
        covariance=wide((batch, pairs)),
        vectors=wide(regions.shape),
        rows=small(regions.shape),
        shift=small((batch, channels)),
        center=small((batch, rows)),
    )


def _empty(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    guide: Tensor | None,
    guide_gamma: Tensor | None,
    guide_beta: Tensor | None,
    guide_eps: float,
    group: str,
) -> list[Tensor]:
    return [torch.empty_like(x), *_empty_saved(x, regions, weight, scales, guide, group)]


def _compute_gradients(
    grad: Tensor,
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    guide: Tensor | None,
    guide_gamma: Tensor | None,
    guide_beta: Tensor | None,
    guide_eps: float,
    group: str,
    saved: list[Tensor],  # the fields of _Saved
) -> list[Tensor]:
    """Returns the gradients of x, regions, weight, bias, projection, gamma, beta, and of the guide's three if given."""
    given, phase, positions = _Saved(*saved), phases_on(x, scales), x.shape[2] * x.shape[3]
    arguments = (weight, given.biases, scales, given.shift, given.center)
    grad_rows, grad_shift, *of_bias = backward_regions.compute(grad, x, given.rows, *arguments)

    empty = [torch.empty_like(t) for t in (given.statistics, gamma, beta)]
    products = (grad_rows, grad_shift, given.vectors, given.statistics)
    phase("product_norm_sums", (*products, gamma, eps, given.mean, weight, scales), empty)
    sums, grad_gamma, grad_beta = empty
    sums = _merge_sums(sums, x.shape[0], group, positions, given.counts[:1])
    moments_of_a = [weight.new_empty(t.shape) for t in (given.mean, given.covariance)]
    grad_regions, grad_projection, linear, quadratic = results = [
        weight.new_empty(t.shape) for t in (regions, projection, *moments_of_a)
    ]
    others = (given.mean, given.covariance, regions, projection, positions, scales)
    phase("product_norm_gradients", (*products, sums, gamma, eps, *others), results)

    constant, grad_weight_of_guide, of_guide = None, None, []
    if guide is not None and guide_gamma is not None and guide_beta is not None:
        features = (given.features, given.guide_statistics)
        empty = [torch.empty_like(t) for t in (given.features, given.guide_statistics, weight, guide_gamma, guide_beta)]
        normalised = (*features, guide_gamma, guide_beta, guide_eps)
        phase("guide_sums", (*of_bias, linear, quadratic, *normalised, weight, scales), empty)
        through, sums, grad_weight_of_guide, *of_norm = empty
        sums = _merge_sums(sums, x.shape[0], group, 1, given.counts[1:])
        constant, grad_guide = torch.empty_like(given.pooled), torch.empty_like(guide)
        normalised = (through, *features, sums, guide_gamma, guide_eps)
        phase("guide_gradients", (*normalised, given.pooled, guide, positions, scales), (constant, grad_guide))
        of_guide = [grad_guide, *of_norm]

    arguments = (*arguments[:4], True, given.center, linear, quadratic, constant)
    grad_x, grad_weight, grad_bias = backward_x.compute(grad, x, given.rows, *arguments)
    if grad_weight_of_guide is not None:
        grad_weight += grad_weight_of_guide
    return [grad_x, grad_regions, grad_weight, grad_bias.sum(0), grad_projection, grad_gamma, grad_beta, *of_guide]


def _merge_sums(sums: Tensor, images: int, group: str, values: int, total: Tensor) -> Tensor:
    """Returns the gradients of a group's statistics, as the share of one image of `values` values."""
    return algebra.sum_over_ranks(sums * images, group) * (values / total) if group else sums


def _empty_gradients(
    grad: Tensor,
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    guide: Tensor | None,
    guide_gamma: Tensor | None,
    guide_beta: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    of_guide = [] if guide is None else [guide, guide_gamma, guide_beta]
    small = [regions, weight, weight.new_empty(weight.shape[0]), projection, gamma, beta, *of_guide]
    return [torch.empty_like(x), *(t.new_empty(t.shape) for t in small)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, regions, weight, _, ctx.scales, projection, gamma, beta, ctx.eps, *of_guide, ctx.guide_eps, ctx.group = inputs
    ctx.save_for_backward(x, regions, weight, projection, gamma, beta, *of_guide, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    x, regions, weight, projection, gamma, beta, *of_guide = ctx.saved_tensors[:9]
    parameters = (projection, gamma, beta, ctx.eps, *of_guide, ctx.guide_eps, ctx.group)
    computed = _backward(grad, x, regions, weight, ctx.scales, *parameters, list(ctx.saved_tensors[9:]))
    of_guide = computed[7:] or [None] * 3
    return *computed[:4], None, *computed[4:7], None, *of_guide, None, None


class _Node(EagerFunction):
    """Represents an eager call in autograd's graph: 10 tensors and one result instead of the operator's 13."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[Any, ...], found: list[Tensor], *tensors: Tensor) -> Tensor:
        x, regions, weight, bias, projection, gamma, beta, *of_guide = tensors
        scales, eps, guide_eps, group = ctx.settings = settings
        others: tuple[Any, ...] = (*of_guide, guide_eps, group)
        z, *saved = _compute(x, regions, weight, bias, scales, projection, gamma, beta, eps, *others)
        ctx.save_for_backward(x, regions, weight, projection, gamma, beta, *of_guide, *saved)
        found += saved[:3]  # statistics, those of the guide, and counts
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, regions, weight, projection, gamma, beta, *others = ctx.saved_tensors
        scales, eps, guide_eps, group = ctx.settings
        given: tuple[Any, ...] = (gamma, beta, eps, *others[:3], guide_eps, group, others[3:])
        # The operator refuses second derivatives.
        compute = _backward if torch.is_grad_enabled() else _compute_gradients
        computed = compute(grad, x, regions, weight, scales, projection, *given)
        return None, None, *computed, *[None] * (10 - len(computed))


_forward = define(
    "adaptive_context_norm(Tensor x, Tensor regions, Tensor weight, Tensor bias, SymInt[] scales, Tensor projection, "
    "Tensor gamma, Tensor beta, float eps, Tensor? guide, Tensor? guide_gamma, Tensor? guide_beta, float guide_eps, "
    "str group) -> Tensor[]",
    _compute,
    _empty,
    backward=_gradients,
    remember=_remember,
)
_backward = define(
    "adaptive_context_norm_backward(Tensor grad, Tensor x, Tensor regions, Tensor weight, SymInt[] scales, "
    "Tensor projection, Tensor gamma, Tensor beta, float eps, Tensor? guide, Tensor? guide_gamma, "
    "Tensor? guide_beta, float guide_eps, str group, Tensor[] saved) -> Tensor[]",
    _compute_gradients,
    _empty_gradients,
)
