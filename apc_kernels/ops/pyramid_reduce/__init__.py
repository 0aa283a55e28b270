"""Implements pyramid_reduce: a 1×1 convolution, batch norm and ReLU of the regions of every scale, in one call."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.affinities.algebra import BatchNorm
from apc_kernels.ops.autograd import EagerFunction
from apc_kernels.ops.common import (
    PLAIN,
    as_scales,
    check_dtype,
    check_flag,
    check_scales,
    check_tensor,
    name_of,
    runs_eagerly,
    working_dtype,
)
from apc_kernels.ops.pyramid_reduce import reference

MAX_SCALES, MAX_SCALE = 64, 32768


def pyramid_reduce(
    regions: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[BatchNorm],
    scales: Sequence[int],
    *,
    training: bool = True,
) -> Tensor:
    """Applies to the regions of every scale a 1×1 convolution, batch norm and ReLU of its own.

        out[b, o, j] = relu(norm(Σ_c weight[o, c] · regions[b, c, j])), weight and norm of the scale that j belongs to

    Equivalent to:

        reduced = []
        for part, weight, norm in zip(regions.split([s * s for s in scales], 2), weights, norms):
            product = F.conv2d(part[:, :, :, None], weight)
            statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
            reduced.append(F.batch_norm(product, *statistics, *affine, training, norm.momentum, norm.eps).relu())
        torch.cat(reduced, 2).squeeze(3)

    The context modules of APCNet, PSPNet and UPerNet reduce the channels of their pooled regions so. These are few: a
    call of its own for each convolution, norm and ReLU takes longer than what it computes.

    Args:
        regions: (B, C, J), J = Σ s², in the order of pyramid_pool's result; float32, bfloat16, float16 or float64.
        weights: (O, C, 1, 1) for each scale, in the dtype of regions (under autocast in any).
        norms: a batch norm for each scale, in float32 (float64 if regions are float64).
        scales: S numbers, 1 to 64 of up to 32768 each.
        training: normalises by the statistics of this batch, and moves the running statistics towards them, in place;
            otherwise the operation normalises by the running statistics.

    Returns:
        (B, O, J) in the dtype of regions; under autocast in autocast's dtype.

    On a CPU, kernels compute float32 and float64 in eager use. PyTorch's operators serve everything else, under
    torch.compile and torch.export too. The operation is differentiable any number of times.
    """
    check_flag(training, "training")
    if not _in_kernels(regions, weights, norms):
        scales = _check(regions, weights, norms, scales, training)
        return reference.pyramid_reduce(regions, weights, norms, scales, training)
    gammas, betas, means, variances, momentum, eps = zip(*norms, strict=True)
    parameters = *weights, *gammas, *betas
    try:
        settings = (*means, *variances), as_scales(scales), eps, momentum, training
        if torch.is_grad_enabled() and torch._C._any_requires_grad(regions, *parameters):  # pyright: ignore[reportPrivateUsage]
            return _Reduction.apply(regions, settings, *parameters)  # pyright: ignore[reportAttributeAccessIssue]
        return _reduce(regions, settings, parameters, None, None)
    except (RuntimeError, TypeError):  # the library has checked the arguments
        _check(regions, weights, norms, scales, training)
        raise


KERNELS = Kernels(reference)


def _in_kernels(regions: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm]) -> bool:
    """Tells whether the library's kernels compute a call."""
    if not (isinstance(weights, list | tuple) and isinstance(norms, list | tuple) and weights and runs_eagerly()):
        return False
    if set(map(type, norms)) != {BatchNorm}:
        return False
    tensors = [regions, *weights]
    for norm in norms:
        tensors += norm[:4]
    return (
        PLAIN.issuperset(map(type, tensors))
        and {tensor.dtype for tensor in tensors} in ({torch.float32}, {torch.float64})
        and all(map(Tensor.is_contiguous, tensors[1:]))
        and regions.dim() == 3
        and not regions.is_meta
        and weights[0].dim() == 4
        and KERNELS.select("pyramid_reduce", regions) == "cpp"
        and not torch.is_autocast_enabled("cpu")
        and regions.numel() * weights[0].numel() > 0
    )


def _reduce(
    regions: Tensor,
    settings: tuple[Any, ...],
    parameters: Sequence[Tensor],
    products: Tensor | None,
    statistics: Tensor | None,
) -> Tensor:
    running, *others = settings
    result = regions.new_empty(regions.shape[0], parameters[0].shape[0], regions.shape[2])
    given = regions.contiguous(), [*parameters, *running]
    torch.ops.apc_kernels_cpp.pyramid_reduce(*given, *others, products, statistics, result)
    return result


class _Reduction(EagerFunction):
    """Computes pyramid_reduce in the library's kernels, and gradients of its gradients in PyTorch."""

    @staticmethod
    def forward(ctx: Any, regions: Tensor, settings: tuple[Any, ...], *parameters: Tensor) -> Tensor:
        (batch, _, rows), outputs = regions.shape, parameters[0].shape[0]
        products = regions.new_empty(outputs * batch * rows)
        statistics = regions.new_empty((2, len(settings[1]), outputs), dtype=torch.float64)
        result = _reduce(regions, settings, parameters, products, statistics)
        ctx.save_for_backward(regions, products, statistics, result, *parameters)
        ctx.running, ctx.scales, ctx.eps, _, ctx.training = settings
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        regions, *saved = ctx.saved_tensors
        parameters = saved[3:]
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, grad, regions, parameters)
        wanted = ctx.needs_input_grad
        grad_regions = regions.new_empty(regions.shape) if wanted[0] else None
        gradients = list(map(torch.empty_like, parameters))
        given = grad.contiguous(), regions.contiguous(), parameters, ctx.scales, ctx.training, *saved[:3]
        torch.ops.apc_kernels_cpp.pyramid_reduce_backward(*given, gradients, grad_regions)
        if not all(wanted[2:]):
            gradients = [g if needed else None for g, needed in zip(gradients, wanted[2:], strict=True)]
        return grad_regions, None, *gradients


def _differentiable_gradients(
    ctx: Any, grad: Tensor, regions: Tensor, parameters: list[Tensor]
) -> tuple[Tensor | None, ...]:
    count = len(ctx.scales)
    columns = zip(*(parameters[i * count : (i + 1) * count] for i in range(3)), strict=True)
    running = zip(ctx.running[:count], ctx.running[count:], ctx.eps, strict=True)
    weights, norms = [], []
    for (weight, gamma, beta), (mean, variance, eps) in zip(columns, running, strict=True):
        weights.append(weight)
        norms.append(BatchNorm(gamma, beta, mean, variance, 0.0, eps))  # the forward has moved the running statistics
    result = reference.pyramid_reduce(regions, weights, norms, ctx.scales, ctx.training)
    tensors, wanted = (regions, *parameters), (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
    inputs = [tensor for tensor, needed in zip(tensors, wanted, strict=True) if needed]
    grads = iter(torch.autograd.grad(result, inputs, grad, create_graph=True))
    of_regions, *others = (next(grads) if needed else None for needed in wanted)
    return of_regions, None, *others


def _check(
    regions: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], scales: Sequence[int], training: bool
) -> list[int]:
    check_tensor(regions, "regions")
    if regions.dim() != 3:
        raise ValueError(f"regions: expected (B, C, J), got {tuple(regions.shape)}")
    check_dtype(regions, "regions")
    scales = check_scales(scales, MAX_SCALES, MAX_SCALE)
    batch, channels, rows = regions.shape
    if rows != sum(s * s for s in scales):
        expected = f"(B, C, {sum(s * s for s in scales)}) for scales {tuple(scales)}"
        raise ValueError(f"regions: expected {expected}, got {tuple(regions.shape)}")
    for name, given in (("weights", weights), ("norms", norms)):
        if not isinstance(given, list | tuple) or len(given) != len(scales):
            found = len(given) if isinstance(given, list | tuple) else type(given).__name__
            raise ValueError(f"{name}: expected a list of {len(scales)}, one for each scale, got {found}")
    if training and batch * min(scales) ** 2 < 2:
        raise ValueError(
            f"regions: expected more than one value per channel in training, got {tuple(regions.shape)} at scale 1"
        )
    casts = torch.amp.is_autocast_available(regions.device.type) and torch.is_autocast_enabled(regions.device.type)
    check_tensor(weights[0], "weights[0]")
    expected = (weights[0].shape[0] if weights[0].dim() else 0, channels, 1, 1)
    for i, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            check_tensor(weight, f"weights[{i}]")
        if weight.shape != expected or weight.device != regions.device:
            given = f"{tuple(weight.shape)} on {weight.device}"
            raise ValueError(f"weights[{i}]: expected {expected} on {regions.device}, got {given}")
        if weight.dtype != regions.dtype and not casts:
            given = name_of(weight.dtype)
            raise ValueError(f"weights[{i}]: expected the dtype of regions, {name_of(regions.dtype)}, got {given}")
    shape, dtype, device = expected[:1], working_dtype(regions), regions.device
    for i, norm in enumerate(norms):
        if not isinstance(norm, BatchNorm):
            raise TypeError(f"norms[{i}]: expected an apc_kernels.BatchNorm, got {type(norm).__name__}")
        for at, tensor in enumerate(norm[:4]):
            if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != dtype:
                _refuse(tensor, f"norms[{i}].{BatchNorm._fields[at]}", shape, regions)
            if tensor.device != device:
                _refuse(tensor, f"norms[{i}].{BatchNorm._fields[at]}", shape, regions)
        for field, number in (("momentum", norm.momentum), ("eps", norm.eps)):
            if not isinstance(number, (int, float)):
                raise TypeError(f"norms[{i}].{field}: expected a number, got {number!r}")
    return scales


def _refuse(tensor: Tensor, name: str, shape: tuple[int, ...], regions: Tensor) -> NoReturn:
    check_tensor(tensor, name)
    given = f"{tuple(tensor.shape)} in {name_of(tensor.dtype)} on {tensor.device}"
    raise ValueError(f"{name}: expected {shape} in {name_of(working_dtype(regions))} on {regions.device}, got {given}")
