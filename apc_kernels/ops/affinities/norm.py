"""Implements adaptive_context_norm: APCNet's adaptive context with its guide, residual convolution and batch norms."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apc_kernels.ops.affinities import algebra, composition
from apc_kernels.ops.affinities.algebra import BatchNorm, Statistics
from apc_kernels.ops.affinities.checks import check_affinities
from apc_kernels.ops.affinities.context import backward_regions, backward_x
from apc_kernels.ops.affinities.moments import through_moments
from apc_kernels.ops.affinities.reference import blocks
from apc_kernels.ops.autograd import under_transforms
from apc_kernels.ops.common import check_flag, check_small
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
    bits from run to run with the same number of threads (the small products are PyTorch's own).

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

    composed = not training or torch.compiler.is_exporting() or composition.forms_products(scales, channels)
    path = composition.adaptive_context_norm if composed else _one_node
    arguments = (x, regions, weight, bias, scales, projection, norm, guide, guide_norm, training, group)
    z, statistics, guide_statistics, *_ = path(*arguments)
    if training:
        _update(norm, statistics)
        if guide_norm is not None and guide_statistics is not None:
            _update(guide_norm, guide_statistics)
    return z


def _check_norm(norm: BatchNorm, name: str, x: Tensor, values: int) -> BatchNorm:
    if not isinstance(norm, tuple) or len(norm) != len(BatchNorm._fields):
        raise TypeError(f"{name}: expected an apc_kernels.BatchNorm, got {type(norm).__name__}")
    for field, number in zip(BatchNorm._fields[4:], norm[4:], strict=True):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name}.{field}: expected a number, got {number!r}")
    if values < 2:
        raise ValueError(f"{name}: expected more than one value per channel in training, got a map of {tuple(x.shape)}")
    tensors = [
        check_small(tensor, f"{name}.{field}", [(x.shape[1],)], x)
        for field, tensor in zip(BatchNorm._fields[:4], norm[:4], strict=True)
    ]
    if tensors[2] is not norm[2] or tensors[3] is not norm[3]:  # an update of a widened copy would be lost
        raise ValueError(f"{name}: expected running statistics in {tensors[2].dtype}, got {norm[2].dtype}")
    return BatchNorm(tensors[0], tensors[1], tensors[2], tensors[3], norm[4], norm[5])


def _update(norm: BatchNorm, batch: Statistics) -> None:
    """Updates running statistics as torch.nn.BatchNorm does: the variance by its unbiased estimate."""
    with torch.no_grad():
        unbiased = batch.variance * (
            batch.count / (batch.count - 1).clamp_min(1)
        )  # 0, not NaN, for one value in a group
        norm.running_mean.lerp_(batch.mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


# The training path: one node.


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
) -> tuple[Tensor, Statistics, Statistics]:
    with_guide = (None, None, None, 0.0) if guide_norm is None else (guide, *guide_norm[:2], guide_norm.eps)
    results = _forward(x, regions, weight, bias, scales, projection, *norm[:2], norm.eps, *with_guide, group)
    return results[0], Statistics(*results[1:4]), Statistics(*results[4:7])


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
    """Returns z, three statistics of each batch norm, and for the backward: biases, pooled, moments, vectors."""
    guide_norm = None if guide_gamma is None or guide_beta is None else _norm(guide_gamma, guide_beta, guide_eps)
    arguments = (x, regions, weight, bias, scales, projection, _norm(gamma, beta, eps), guide, guide_norm, True, group)
    z, statistics, guide_statistics, biases, pooled, *others, vectors = composition.adaptive_context_norm(*arguments)
    moments = [t for t in others if t is not None]  # both: this path does not form products
    if guide_statistics is None or pooled is None:  # an operator must not return its arguments
        guide_results = [x.new_empty(0), x.new_empty(0), x.new_empty(0), bias.repeat(x.shape[0], 1), x.new_empty(0)]
    else:
        guide_results = [*guide_statistics, biases, pooled]
    return [z, *statistics, *guide_results, *moments, vectors]


def _norm(gamma: Tensor, beta: Tensor, eps: float) -> BatchNorm:
    """Returns a batch norm without running statistics, which training does not read."""
    return BatchNorm(gamma, beta, None, None, eps=eps)  # pyright: ignore[reportArgumentType]


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
    (batch, channels, *_), rows = x.shape, weight.shape[0]
    wide = functools.partial(x.new_empty, dtype=torch.float64)
    of_norm = [wide((channels,)), wide((channels,)), wide(())]
    if guide is None:
        of_guide, pooled = [x.new_empty(0) for _ in range(3)], x.new_empty(0)
    else:
        of_guide, pooled = [torch.empty_like(t) for t in of_norm], weight.new_empty(batch, channels)
    pairs = sum(s**4 for s in scales)
    saved = [weight.new_empty(batch, rows), pooled, wide((batch, rows)), wide((batch, pairs))]
    return [torch.empty_like(x), *of_norm, *of_guide, *saved, wide(regions.shape)]


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
    *others: Any,
) -> list[Tensor]:
    """Returns the gradients of x, regions, weight, bias, projection, gamma, beta, and of the guide's three if given."""
    *guide_norm, group, saved = others  # saved: the forward's results without z
    statistics, (biases, pooled, mean, covariance, vectors) = Statistics(*saved[:3]), saved[6:]
    norm, center, positions = _norm(gamma, beta, eps), mean.to(weight.dtype), x.shape[2] * x.shape[3]
    rows, shift = algebra.normalized(vectors, statistics, norm, center, scales)

    grad_rows, grad_shift, *of_bias = backward_regions(grad, x, rows, weight, biases, scales, shift, center)
    through = algebra.normalized_backward(
        grad_rows, grad_shift, vectors, mean, covariance, statistics, norm, center, positions, scales, group
    )
    grad_regions, grad_projection = algebra.projected_backward(through.vectors, regions, projection, scales)
    linear, quadratic = through_moments(through.mean, through.covariance, positions, scales)

    constant, of_guide = None, []
    if guide is not None:
        # The gradient of the biases, which backward_x finds too late: through the guide it reaches every pixel of x.
        grad_biases, slope, slope_moments = (t.double() for t in of_bias)
        curved = [
            (quadratic[:, b.pairs] * slope_moments[:, b.pairs]).unflatten(1, (b.regions, b.regions)).sum(2)
            for b in blocks(scales, weight.shape[1])
        ]
        grad_biases = grad_biases + linear * slope + torch.cat(curved, 1)
        features, of_images = algebra.guide_features(pooled, guide, scales), Statistics(*saved[3:6])
        grad_features, grad_guide_gamma, grad_guide_beta, grad_weight_of_guide = algebra.guided_bias_backward(
            grad_biases, features, of_images, _norm(*guide_norm), weight, scales, group
        )
        grad_pooled, grad_guide = algebra.guide_features_backward(grad_features, pooled, guide, scales)
        constant = (grad_pooled / positions).to(weight.dtype)
        of_guide = [grad_guide, grad_guide_gamma, grad_guide_beta]

    linear, quadratic = linear.to(weight.dtype), quadratic.to(weight.dtype)
    grad_x, grad_weight, grad_bias = backward_x(
        grad, x, rows, weight, biases, scales, shift, True, center, linear, quadratic, constant
    )
    if guide is not None:
        grad_weight = grad_weight + grad_weight_of_guide
    small = [grad_regions, grad_weight, grad_bias.sum(0), grad_projection, through.gamma, through.beta, *of_guide]
    return [grad_x, *(t.to(weight.dtype) for t in small)]


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


def _gradients(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, regions, weight, projection, gamma, beta, *of_guide = ctx.saved_tensors[:9]
    parameters = (projection, gamma, beta, ctx.eps, *of_guide, ctx.guide_eps, ctx.group)
    computed = _backward(grad, x, regions, weight, ctx.scales, *parameters, list(ctx.saved_tensors[9:]))
    of_guide = computed[7:] or [None] * 3
    return *computed[:4], None, *computed[4:7], None, *of_guide, None, None


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
