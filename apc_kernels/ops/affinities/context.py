"""Implements adaptive_context: sigmoid affinities times region vectors, without storing an affinity."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apc_kernels.ops.affinities.checks import KERNELS, check_affinities, check_for_images, limits
from apc_kernels.ops.affinities.reference import blocks
from apc_kernels.ops.common import as_scales, check_flag, check_small, check_tensor, widened
from apc_kernels.ops.operator import On, Operator


def adaptive_context(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    *,
    shift: Tensor | None = None,
    residual: bool = False,
    center: Tensor | None = None,
) -> Tensor:
    """Multiplies the affinities of every position to the regions of a scale with the region vectors.

        A = sigmoid(x·weightᵀ + bias)                       (N, s²) for each scale s, N = h·w
        z = (A − center)·regions                            (N, C)
        z = relu(z + shift)      if shift is given
        z = z + x                if residual is true

    Equivalent to, for one scale, with all options:

        affinities = torch.sigmoid(F.conv2d(x, weight[:, :, None, None], bias)).flatten(2)    # (B, s², N)
        z = (regions.mT @ (affinities - center[..., None])).view(x.shape)
        F.relu(z + shift[:, None, None]) + x

    The (B, s², N) affinities are never stored. Only the arguments are saved for backward, which computes the affinities
    again.

    Args:
        x: (B, S·C, h, w), float32, bfloat16, float16 or float64; channel block i belongs to scale i. Dense NCHW and
            channels_last maps, and slices of them with adjacent columns or channels, are read in place; any other
            layout is copied once.
        regions: (B, J, C), J = Σ s², in the order of pyramid_pool's result: scale by scale, each row-major.
        weight: (J, C), the 1×1 convolutions that compute the affinities.
        bias: (J,), or (B, J) with one for each image. A global guide g adds weight·g to it, so x + g need not exist.
        scales: S numbers, 1 to 64 of 1 to 32. On a GPU the reference, which stores affinities, serves scales above 8
            and more than 16 scales.
        shift: (S·C,), or (B, S·C) with one for each image.
        residual: adds x to the result.
        center: (B, J), subtracted from the affinities before they are rounded to low precision.

    The tensors other than x are float32 (float64 if x is float64); under autocast, low-precision ones are widened.

    Returns:
        z, (B, S·C, h, w), with x's dtype and the strides of torch.empty_like(x). Sums are kept in float32 (float64).

    The operation is differentiable once, with respect to all tensors, and deterministic to the bit. Autocast leaves x's
    dtype alone. NaN and infinities spread as in PyTorch's own operators.
    """
    check_tensor(x, "x")
    regions, weight, bias = widened(regions, "regions", x), widened(weight, "weight", x), widened(bias, "bias", x)
    shift = None if shift is None else widened(shift, "shift", x)
    center = None if center is None else widened(center, "center", x)
    check_flag(residual, "residual")
    return context(x, regions, weight, bias, as_scales(scales), shift, residual, center)


def _check(
    x: Tensor,
    regions: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None,
    residual: bool,
    center: Tensor | None,
) -> tuple[Any, ...]:
    weight, scales = check_affinities(x, weight, scales)
    batch, (rows, channels) = x.shape[0], weight.shape
    bias = check_for_images(bias, "bias", rows, x)
    if regions is not None:
        regions = check_small(regions, "regions", [(batch, rows, channels)], x)
    if shift is not None:
        shift = check_for_images(shift, "shift", x.shape[1], x)
    if center is not None:
        center = check_small(center, "center", [(batch, rows)], x)
    return x, regions, weight, bias, scales, shift, residual, center


def _check_backward_regions(
    grad: Tensor,
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None,
    center: Tensor | None,
) -> tuple[Any, ...]:
    *checked, _, center = _check(x, regions, weight, bias, scales, shift, False, center)
    _check_grad(grad, x)
    return grad, *checked, center


def _check_backward_x(
    grad: Tensor | None,
    x: Tensor,
    regions: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None,
    residual: bool,
    center: Tensor | None,
    linear: Tensor | None,
    quadratic: Tensor | None,
    constant: Tensor | None,
) -> tuple[Any, ...]:
    checked = _check(x, regions, weight, bias, scales, shift, residual, center)
    if grad is not None:
        _check_grad(grad, x)
    if (grad is None and (linear is None or residual)) or (grad is not None and regions is None):
        raise ValueError("grad: expected grad and regions, or neither of them, no residual, but linear and quadratic")
    if (linear is None) != (quadratic is None) or (linear is not None and center is None):
        raise ValueError("linear: expected linear, quadratic and center together")
    if linear is not None and quadratic is not None:
        linear = check_small(linear, "linear", [(x.shape[0], weight.shape[0])], x)
        quadratic = check_small(quadratic, "quadratic", [(x.shape[0], sum(s**4 for s in scales))], x)
    if constant is not None:
        constant = check_small(constant, "constant", [tuple(x.shape[:2])], x)
    return grad, *checked, linear, quadratic, constant


def _check_grad(grad: Tensor, x: Tensor) -> None:
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        expected, given = ((tuple(t.shape), t.dtype, t.device) for t in (x, grad))
        raise ValueError(f"grad: expected x's shape, dtype and device, {expected}, got {given}")


def _on_map(
    grad: Tensor | None, x: Tensor, regions: Tensor | None, weight: Tensor, bias: Tensor, scales: Sequence[int], *_: Any
) -> On:
    return x, limits(x, scales)


def _empty_region_gradients(
    grad: Tensor, x: Tensor, regions: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int], *_: Any
) -> tuple[Tensor, ...]:
    batch, rows = regions.shape[:2]
    sizes = (batch, x.shape[1]), (batch, rows), (batch, rows), (batch, sum(s**4 for s in scales))
    return regions.new_empty(regions.shape), *(regions.new_empty(size) for size in sizes)


# Computes the gradients of regions and shift, and the sums that the gradient of bias consists of (reference.py).
backward_regions = Operator(
    "adaptive_context_backward_regions(Tensor grad, Tensor x, Tensor regions, Tensor weight, Tensor bias, "
    "SymInt[] scales, Tensor? shift, Tensor? center) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    KERNELS,
    _check_backward_regions,
    on=_on_map,
    empty=_empty_region_gradients,
)

# Computes the gradients of x, weight and bias (reference.py).
backward_x = Operator(
    "adaptive_context_backward_x(Tensor? grad, Tensor x, Tensor? regions, Tensor weight, Tensor bias, "
    "SymInt[] scales, Tensor? shift, bool residual, Tensor? center, Tensor? linear, Tensor? quadratic, "
    "Tensor? constant) -> (Tensor, Tensor, Tensor)",
    KERNELS,
    _check_backward_x,
    on=_on_map,
    empty=lambda grad, x, regions, weight, bias, *_: (
        torch.empty_like(x),
        weight.new_empty(weight.shape),
        weight.new_empty(bias.shape),
    ),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, regions, weight, bias, ctx.scales, shift, ctx.residual, center = inputs
    ctx.save_for_backward(x, regions, weight, bias, shift, center)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, regions, weight, bias, shift, center = ctx.saved_tensors
    need_x, need_regions, need_weight, need_bias, _, need_shift, _, need_center = ctx.needs_input_grad
    grad_x = grad_regions = grad_weight = grad_bias = grad_shift = grad_center = None
    if need_regions or need_shift or need_center:
        grad_regions, sums, *_ = backward_regions(grad, x, regions, weight, bias, ctx.scales, shift, center)
        if need_center:
            parts = blocks(ctx.scales, regions.shape[2])
            products = [(regions[:, part.rows] * sums[:, None, part.channels]).sum(2) for part in parts]
            grad_center = torch.cat([-product for product in products], 1)
        grad_shift = sums.sum_to_size(shift.shape) if need_shift else None
    if need_x or need_weight or need_bias:
        options = (shift, ctx.residual, center, None, None, None)
        grad_x, grad_weight, grad_bias = backward_x(grad, x, regions, weight, bias, ctx.scales, *options)
        grad_bias = grad_bias.sum_to_size(bias.shape)
    return grad_x, grad_regions, grad_weight, grad_bias, None, grad_shift, None, grad_center


context = Operator(
    "adaptive_context(Tensor x, Tensor regions, Tensor weight, Tensor bias, SymInt[] scales, Tensor? shift, "
    "bool residual, Tensor? center) -> Tensor",
    KERNELS,
    _check,
    on=lambda x, regions, weight, bias, scales, *_: (x, limits(x, scales)),
    empty=lambda x, *_: torch.empty_like(x),
    backward=_backward,
    remember=_remember,
)
