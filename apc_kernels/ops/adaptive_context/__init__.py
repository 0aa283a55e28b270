"""adaptive_context: sigmoid affinities times region vectors for every scale, without storing an affinity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.adaptive_context import reference
from apc_kernels.ops.common import call, check_dtype, check_scales, check_small

MAX_SCALES, MAX_SCALE = 64, 32
MAX_GPU_SCALES, MAX_GPU_SCALE = 16, 8  # beyond these the reference serves on a GPU


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
    """Gives every position, at every scale, the region vectors it has an affinity to.

        A = sigmoid(x·weightᵀ + bias)                       (N, s²) for each scale s, N = h·w
        z = (A − center)·regions                            (N, C)
        z = relu(z + shift)      where shift is given
        z = z + x                where residual is asked for

    Args:
        x: (B, S·C, h, w), float32, bfloat16, float16 or float64; channel block i belongs to scale i. Dense NCHW and
            channels_last maps are read where they lie, and slices of them that keep columns or channels side by side;
            any other layout is copied once.
        regions: (B, J, C), J = Σ s², scale-major, then row-major: the order of pyramid_pool's result.
        weight: (J, C), the 1×1 convolutions that make affinities.
        bias: (J,), or (B, J) for one of each image: a global guide g adds weight·g to the bias, and x + g is never
            formed.
        scales: 1 to 64 numbers from 1 to 32. On a GPU, scales above 8 or more than 16 of them are served by the
            reference, which stores affinities.
        shift: (S·C,), or (B, S·C) for one of each image.
        residual: whether x is added at the end.
        center: (B, J), subtracted from the affinities before they are rounded to low precision.

    regions, weight, bias, shift and center are float32 beside float32, bfloat16 and float16 maps, float64 beside
    float64; under autocast, and only there, low-precision ones are widened. x keeps its dtype.

    Returns:
        z, (B, S·C, h, w), with x's dtype and the strides of torch.empty_like(x). Sums are kept in float32 (float64).

    All that is saved for backward is what was given; the affinities are computed again. Differentiable once, in
    everything but the scales; deterministic to the bit. NaN and infinities go where PyTorch's own operators take them.
    """
    scales = check_affinities(x, weight, bias, scales)
    batch, channels, rows = x.shape[0], x.shape[1] // len(scales), weight.shape[0]
    regions = check_small(regions, "regions", [(batch, rows, channels)], x)
    weight = check_small(weight, "weight", [(rows, channels)], x)
    bias = check_small(bias, "bias", [(rows,), (batch, rows)], x).expand(batch, rows)
    if shift is not None:
        shift = check_small(shift, "shift", [(x.shape[1],), (batch, x.shape[1])], x).expand(batch, x.shape[1])
    if center is not None:
        center = check_small(center, "center", [(batch, rows)], x)
    if torch.compiler.is_exporting():
        return reference.adaptive_context(x, regions, weight, bias, scales, shift, bool(residual), center)
    return _forward(x, regions, weight, bias, scales, shift, bool(residual), center)


def check_affinities(x: Tensor, weight: Tensor, bias: Tensor, scales: Sequence[int]) -> list[int]:
    """Checks what all operations on affinities take: a map and the 1×1 convolutions on it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions (B, S·C, h, w), got {x.dim()}: {tuple(x.shape)}")
    check_dtype(x, "x")
    scales = check_scales(scales, MAX_SCALES, MAX_SCALE)
    if x.shape[1] == 0 or x.shape[1] % len(scales) != 0:
        expected = f"a multiple of {len(scales)} channels, a block for each scale"
        raise ValueError(f"x: expected {expected}, got {x.shape[1]}: {tuple(x.shape)}")
    if not (1 <= x.shape[2] * x.shape[3] < 2**31):
        raise ValueError(f"x: expected 1 to {2**31 - 1} positions, got {tuple(x.shape)}")
    rows = sum(s * s for s in scales)
    check_small(weight, "weight", [(rows, x.shape[1] // len(scales))], x)
    check_small(bias, "bias", [(rows,), (x.shape[0], rows)], x)
    return scales


def limits(x: Tensor, scales: Sequence[int]) -> dict[str, str]:
    """Why the GPU kernels cannot take a call, if they cannot."""
    if max(scales) <= MAX_GPU_SCALE and len(scales) <= MAX_GPU_SCALES and x.shape[2] * x.shape[3] < 2**30:
        return {}
    reason = (
        f"the kernels take up to {MAX_GPU_SCALES} scales of up to {MAX_GPU_SCALE} and 2^30 positions; the scales are "
        f"{tuple(scales)}, the map is {tuple(x.shape)}"
    )
    return {"triton": reason, "cuda": reason}


def _run(function: str, x: Tensor, scales: Sequence[int], arguments: tuple, results: Sequence[Tensor]) -> None:
    call("adaptive_context", function, x, limits(x, scales), arguments, results)


def _check(x, regions, weight, bias, scales, shift, center) -> list[int]:
    scales = check_affinities(x, weight, bias, scales)
    rows = weight.shape[0]
    shapes = {"bias": (x.shape[0], rows), "regions": (x.shape[0], rows, weight.shape[1])}
    shapes |= {"shift": x.shape[:2], "center": (x.shape[0], rows)}
    for name, tensor in (("bias", bias), ("regions", regions), ("shift", shift), ("center", center)):
        if tensor is not None:
            check_small(tensor, name, [tuple(shapes[name])], x)
    return scales


def _check_grad(grad: Tensor, x: Tensor) -> None:
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        expected, given = ((tuple(t.shape), t.dtype, t.device) for t in (x, grad))
        raise ValueError(f"grad: expected x's shape, dtype and device, {expected}, got {given}")


@torch.library.custom_op("apc_kernels::adaptive_context", mutates_args=())
def _forward(
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None,
    residual: bool,
    center: Tensor | None,
) -> Tensor:
    scales = _check(x, regions, weight, bias, scales, shift, center)
    z = torch.empty_like(x)
    _run("adaptive_context", x, scales, (x, regions, weight, bias, scales, shift, residual, center), [z])
    return z


@_forward.register_fake
def _(x, regions, weight, bias, scales, shift, residual, center):
    _check(x, regions, weight, bias, scales, shift, center)
    return torch.empty_like(x)


@torch.library.custom_op("apc_kernels::adaptive_context_backward_regions", mutates_args=())
def backward_regions(
    grad: Tensor,
    x: Tensor,
    regions: Tensor,
    weight: Tensor,
    bias: Tensor,
    scales: Sequence[int],
    shift: Tensor | None,
    center: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of regions and shift, and the sums that the bias's consists of (reference.py)."""
    scales = _check(x, regions, weight, bias, scales, shift, center)
    _check_grad(grad, x)
    results = _empty_region_gradients(x, regions, scales)
    arguments = (grad, x, regions, weight, bias, scales, shift, center)
    _run("adaptive_context_backward_regions", x, scales, arguments, results)
    return results


def _empty_region_gradients(x, regions, scales):
    batch, rows, _ = regions.shape
    sizes = [(batch, x.shape[1]), (batch, rows), (batch, rows), (batch, sum(s**4 for s in scales))]
    return regions.new_empty(regions.shape), *(regions.new_empty(size) for size in sizes)


@backward_regions.register_fake
def _(grad, x, regions, weight, bias, scales, shift, center):
    _check(x, regions, weight, bias, scales, shift, center)
    return _empty_region_gradients(x, regions, scales)


@torch.library.custom_op("apc_kernels::adaptive_context_backward_x", mutates_args=())
def backward_x(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (reference.py)."""
    scales = _check(x, regions, weight, bias, scales, shift, center)
    if grad is not None:
        _check_grad(grad, x)
    if (grad is None and (linear is None or residual)) or (grad is not None and regions is None):
        raise ValueError("grad: expected grad and regions, or neither of them, no residual, but linear and quadratic")
    if (linear is None) != (quadratic is None) or (linear is not None and center is None):
        raise ValueError("linear: expected linear, quadratic and center together")
    for name, tensor, columns in (
        ("linear", linear, weight.shape[0]),
        ("quadratic", quadratic, sum(s**4 for s in scales)),
        ("constant", constant, x.shape[1]),
    ):
        if tensor is not None:
            check_small(tensor, name, [(x.shape[0], columns)], x)
    results = torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(bias.shape)
    arguments = (grad, x, regions, weight, bias, scales, shift, residual, center, linear, quadratic, constant)
    _run("adaptive_context_backward_x", x, scales, arguments, results)
    return results


@backward_x.register_fake
def _(grad, x, regions, weight, bias, scales, shift, residual, center, linear, quadratic, constant):
    _check(x, regions, weight, bias, scales, shift, center)
    return torch.empty_like(x), weight.new_empty(weight.shape), weight.new_empty(bias.shape)


def _remember(ctx, inputs, output):
    x, regions, weight, bias, ctx.scales, shift, ctx.residual, center = inputs
    ctx.save_for_backward(x, regions, weight, bias, shift, center)


def _backward(ctx, grad):
    x, regions, weight, bias, shift, center = ctx.saved_tensors
    need_x, need_regions, need_weight, need_bias, _, need_shift, _, need_center = ctx.needs_input_grad
    grad_x = grad_regions = grad_weight = grad_bias = grad_shift = grad_center = None
    if need_regions or need_shift or need_center:
        arguments = (grad, x, regions, weight, bias, ctx.scales, shift, center)
        grad_regions, sums, *_ = backward_regions(*arguments)
        if need_center:
            grad_center = torch.cat(
                [
                    -(regions[:, block.rows] * sums[:, None, block.channels]).sum(2)
                    for block in reference.blocks(ctx.scales, regions.shape[2])
                ],
                1,
            )
        grad_shift = sums if need_shift else None
    if need_x or need_weight or need_bias:
        arguments = (grad, x, regions, weight, bias, ctx.scales, shift, ctx.residual, center, None, None, None)
        grad_x, grad_weight, grad_bias = backward_x(*arguments)
    return grad_x, grad_regions, grad_weight, grad_bias, None, grad_shift, None, grad_center


_forward.register_autograd(_backward, setup_context=_remember)
