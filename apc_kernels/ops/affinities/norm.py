"""Implements adaptive_context_norm: APCNet's adaptive context with its guide, residual convolution and batch norms."""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.affinities import algebra, composition, phases
from apc_kernels.ops.affinities.algebra import BatchNorm, Statistics
from apc_kernels.ops.affinities.checks import KERNELS, check_affinities, limits, wide_limits
from apc_kernels.ops.affinities.context import backward_regions, backward_x, context
from apc_kernels.ops.affinities.moments import moments
from apc_kernels.ops.autograd import EagerFunction, under_transforms
from apc_kernels.ops.common import check_flag, check_small, is_plain, only_computes, runs_eagerly, without_autocast
from apc_kernels.ops.operator import define


def adaptive_context_norm(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    projection: Tensor,
    norm: BatchNorm,
    *,
    guide: Tensor | None = None,
    guide_norm: BatchNorm | None = None,
    training: bool = True,
    group: str = "",
) -> Tensor:
    """Computes APCNet's adaptive context modules of all scales, with their global guide and batch norms.

        g = relu(guide_norm(mean(x)·guideᵀ))                one vector for each image and scale
        A = sigmoid((x + g)·weightᵀ + bias)                 (N, s²) for each scale s
        z = relu(norm(A·regions·projectionᵀ)) + x           (N, C)

    Equivalent to, for one scale:

        batch_norm = lambda v, n: F.batch_norm(v, n[2], n[3], n[0], n[1], training, n.momentum, n.eps)
        g = batch_norm(x.mean((2, 3)) @ guide.mT, guide_norm).relu()[:, :, None, None]
        affinities = torch.sigmoid(F.conv2d(x + g, weight[:, :, None, None], bias)).flatten(2)    # (B, s², N)
        z = (projection @ regions.mT @ affinities).view(x.shape)
        batch_norm(z, norm).relu() + x

    Neither x + g nor A nor A·regions is ever stored, and x is the only map that is saved: g becomes a bias of J numbers
    for each image, the projection acts on the J region vectors, and the statistics of the batch norm follow from the
    mean and covariance of A (affinity_moments). Training is one autograd node. Its backward reads x and dz, reduces the
    gradients of the region vectors, takes them through the batch norm, reads x and dz again and writes dx once. Forward
    reads or writes 4 maps, backward 5.

    Args:
        x, regions, weight, bias, scales: as in adaptive_context, with bias (J,). x is the output of a ReLU. The last
            ReLU of the module acts on a sum that cannot be negative, and is left out. (It would stop the gradient where
            the sum is 0; so does the ReLU that x came from.) regions are the pooled and reduced features.
        projection: (S·C, C), the residual convolutions of all scales.
        norm: the batch norm after the projection.
        guide, guide_norm: (S·C, C), the global convolutions of all scales, and the batch norm after them; both or
            neither.
        training: normalises by the statistics of this batch, and moves the running statistics towards them, in place;
            otherwise the operation normalises by the running statistics.
        group: the name of the process group that shares batch statistics, or "" for this process alone.

    The tensors other than x are float32 (float64 if x is float64), as in adaptive_context. Running statistics are
    updated in place: copy them back if they are a concatenation. With a group, every rank calls forward and backward,
    and gets its own share of the gradients.

    Returns:
        z, (B, S·C, h, w), with x's dtype and the strides of torch.empty_like(x).

    The operation is differentiable once, with respect to all tensors but the running statistics. Results are the same
    bits from run to run with the same number of threads (the mean of x is PyTorch's own).

    If a scale has more regions than channels, and more than 64, its covariance costs more than the products it
    describes. Training then forms A·regions·projectionᵀ, takes its statistics, and saves three maps.
    """
    weight, scales = check_affinities(x, weight, scales)
    rows, channels = weight.shape
    bias = check_small(bias, "bias", [(rows,)], x)
    regions = check_small(regions, "regions", [(x.shape[0], rows, channels)], x)
    projection = check_small(projection, "projection", [(x.shape[1], channels)], x)
    check_flag(training, "training")
    if not isinstance(group, str):
        raise TypeError(f"group: expected the name of a process group (its group_name), got {type(group).__name__}")
    if (guide is None) != (guide_norm is None):
        raise ValueError("guide: expected guide and guide_norm, or neither of them")
    images = x.shape[0] if training and not group else 2  # other processes may hold more images
    norm = _check_norm(norm, "norm", x, values=images * x.shape[2] * x.shape[3])
    if guide is not None and guide_norm is not None:
        guide = check_small(guide, "guide", [(x.shape[1], channels)], x)
        guide_norm = _check_norm(guide_norm, "guide_norm", x, values=images)

    if training and under_transforms():
        raise RuntimeError("adaptive_context_norm: training updates running statistics in place, not under torch.func")

    tensors = (x, regions, weight, bias, projection, *norm[:4], guide, *(guide_norm or ())[:4])
    if not training and only_computes(*tensors):
        return _evaluate(x, regions, weight, bias, scales, projection, norm, guide, guide_norm)

    composed = not training or torch.compiler.is_exporting() or composition.forms_products(scales, channels)
    path = composition.adaptive_context_norm if composed else _one_node
    arguments = (x, regions, weight, bias, scales, projection, norm, guide, guide_norm, training, group)
    z, statistics, guide_statistics, *_ = path(*arguments)
    if training:
        _update(norm, statistics)
        if guide_norm is not None and guide_statistics is not None:
            _update(guide_norm, guide_statistics)
    return z


def _evaluate(
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
    phase, bias = _phases(x, scales), bias.expand(x.shape[0], -1)
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


def _check_norm(norm: BatchNorm, name: str, x: Tensor, values: int) -> BatchNorm:
    if not isinstance(norm, tuple) or len(norm) != len(BatchNorm._fields):
        raise TypeError(f"{name}: expected an apc_kernels.BatchNorm, got {type(norm).__name__}")
    *tensors, momentum, eps = norm
    for field, number in (("momentum", momentum), ("eps", eps)):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name}.{field}: expected a number, got {number!r}")
    if values < 2:
        raise ValueError(f"{name}: expected more than one value per channel in training, got a map of {tuple(x.shape)}")
    shapes = [(x.shape[1],)]
    weight, bias, mean, variance = (
        check_small(tensor, f"{name}.{field}", shapes, x)
        for field, tensor in zip(BatchNorm._fields[:4], tensors, strict=True)
    )
    if mean is not norm[2] or variance is not norm[3]:  # an update of a widened copy would be lost
        raise ValueError(f"{name}: expected running statistics in {mean.dtype}, got {norm[2].dtype}")
    return BatchNorm(weight, bias, mean, variance, momentum, eps)


def _update(norm: BatchNorm, batch: Statistics) -> None:
    """Updates running statistics as torch.nn.BatchNorm does: the variance by its unbiased estimate."""
    with torch.no_grad():
        count = batch.count
        dtype = norm.running_mean.dtype
        others = count - 1 if isinstance(count, int) else (count - 1).clamp_min(1)  # 0, not NaN, for one in a group
        norm.running_mean.lerp_(batch.mean.to(dtype), norm.momentum)
        norm.running_var.lerp_((batch.variance * (count / others)).to(dtype), norm.momentum)


# The training path: one node, in phases (phases.py).


def _triton() -> ModuleType:
    from apc_kernels.ops.affinities import triton_phases

    return triton_phases


PHASES = Kernels(phases, triton=_triton)


def _one_node(
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
    saved, phase = _empty_saved(x, regions, weight, scales, guide, group), _phases(x, scales)
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


Phase = Callable[[str, Sequence[Any], Sequence[Tensor]], None]


def _phases(x: Tensor, scales: Sequence[int]) -> Phase:
    """Returns phase(name, arguments, results), which computes a phase in the backend that serves x."""
    backend = KERNELS.select("adaptive_context_norm", x, limits(x, scales))
    if backend == "cuda":  # it has no kernels of the phases
        backend = "reference" if PHASES.why_not("triton", "adaptive_context_norm", x.device.type, x.dtype) else "triton"
    if backend in wide_limits(x, scales):
        backend = "reference"

    def phase(name: str, arguments: Sequence[Any], results: Sequence[Tensor]) -> None:
        function = PHASES.function(backend, name)
        if not x.numel():
            for result in results:
                result.zero_()
        elif backend == "reference":
            with without_autocast(x):
                for result, value in zip(results, function(*arguments), strict=True):
                    result.copy_(value)
        else:
            function(*(a.contiguous() if isinstance(a, Tensor) else a for a in arguments), *results)

    return phase


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
    given, phase, positions = _Saved(*saved), _phases(x, scales), x.shape[2] * x.shape[3]
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
    """Is the node of an eager call in autograd's graph: 10 tensors and one result instead of the operator's 13."""

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
