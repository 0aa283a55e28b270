"""Implements upsample_cross_entropy: the loss of bilinearly upsampled logits, without the upsampled logits."""

import math
from typing import Any

import torch
from torch import Tensor

from apc_kernels import labels
from apc_kernels.ops.autograd import EagerFunction
from apc_kernels.ops.common import (
    are_plain,
    check_flag,
    check_small,
    check_tensor,
    name_of,
    runs_eagerly,
    widened,
    working_dtype,
)
from apc_kernels.ops.operator import Operator, define, fill
from apc_kernels.ops.upsample import reference
from apc_kernels.ops.upsample.checks import KERNELS, as_ignored, check_logits, check_target, limits

REDUCTIONS = ("mean", "mean_all", "sum", "none")
MAX_FOCAL = 1e6  # far above any use, and float32 computes with it


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    focal: float | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
    denominator: float | Tensor | None = None,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes the cross entropy of logits that are bilinearly upsampled to the size of the target.

        l = interpolated logits of a pixel, y = its label, w = weight (1 for every class by default)
        loss = (1 − ε)·w[y]·(logΣexp(l) − l[y]) + ε/K·Σ_c w[c]·(logΣexp(l) − l[c])       ε = label_smoothing

    With focal = γ it is the focal loss, where p = softmax(l)[y]:

        loss = (1 − p)^γ·w[y]·(logΣexp(l) − l[y])

    Equivalent to:

        upsampled = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=align_corners)
        F.cross_entropy(upsampled, target.long(), weight, ignore_index=ignore_index, label_smoothing=label_smoothing)

    The upsampled logits are never stored. Saved for backward are logits, target and one float for each pixel.

    Args:
        logits: (B, K, h, w), float32, bfloat16, float16 or float64. NCHW and channels_last logits, and slices of them,
            are read in place; any other layout is copied, once forward and once backward.
        target: (B, H, W), uint8, int16, int32 or int64; H and W may have any ratio to h and w.
        weight: (K,), a weight for each class, float32 (float64 if logits are float64); not differentiated.
        ignore_index: the label of pixels that are left out everywhere.
        label_smoothing: from 0 to 1.
        focal: γ, from 0 to 1e6; 0 and None stand for the cross entropy. Focal loss takes no label_smoothing: with it a
            pixel has no one label whose probability p would be.
        reduction: "mean" divides by the weights of all pixels that are not ignored, as PyTorch does; "mean_all" divides
            by B·H·W, as mmsegmentation does; "sum" does not divide; "none" returns the loss of every pixel. The factor
            of focal loss is no weight: it leaves the denominator alone.
        denominator: replaces the denominator of "mean" and "mean_all": a number that is not negative, or a tensor with
            one element, whose value is not read. With the count over all ranks, data-parallel training computes the
            same loss as one process.
        return_correct: returns the number of pixels whose label is the argmax, too, from the same pass.

    Returns:
        The loss, a scalar or (B, H, W), in float32 (float64 for float64 logits); with return_correct, the loss and the
        number of correct pixels, int64.

    A label out of range raises on a CPU. On a GPU it makes the loss and its pixel's gradient NaN; inside `with
    apc_kernels.checked_labels():` it raises there too. The loss is NaN if nothing is divided by nothing, as in PyTorch
    (no pixel that counts in "mean", no image in "mean_all"); if no pixel counts, the gradient is zero. Infinite and NaN
    logits spread as in F.interpolate: 0 · ∞ is NaN, at borders too.

    The operation is differentiable once, with respect to logits and in reverse mode, and deterministic to the bit.
    Autocast leaves the dtype of logits alone. The kernels take logits relative to the largest of their source pixel, so
    that a large common offset costs no accuracy.
    """
    check_tensor(logits, "logits")
    check_tensor(target, "target")
    if weight is not None:
        weight = widened(weight, "weight", logits)
        if weight.requires_grad:
            raise ValueError("weight: expected a tensor without gradient, got one that requires it")
    check_flag(align_corners, "align_corners")
    ignore_index, label_smoothing = as_ignored(ignore_index), _as_number(label_smoothing, "label_smoothing")
    focal = 0.0 if focal is None else _as_number(focal, "focal")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if denominator is not None:
        denominator = _check_denominator(denominator, reduction, logits)
    tensor, number = (denominator, None) if isinstance(denominator, Tensor) else (None, denominator)
    others = target, weight, ignore_index, label_smoothing, focal, align_corners, reduction, tensor, number
    if torch.is_grad_enabled() and logits.requires_grad and runs_eagerly() and are_plain((logits, *others)):
        loss, sums = _Loss.apply(logits, others, return_correct)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        compute = _compute if torch.compiler.is_exporting() else _losses
        _, loss, sums = compute(logits, *others)
    return (loss, sums[2].to(torch.int64)) if return_correct else loss


def _as_number(given: float, name: str) -> float:
    try:
        return float(given)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {given!r}") from None


def _check_denominator(denominator: float | Tensor, reduction: str, logits: Tensor) -> float | Tensor:
    if reduction not in ("mean", "mean_all"):
        raise ValueError(
            f"denominator: expected None for reduction={reduction!r}, which does not divide, got {denominator!r}"
        )
    if isinstance(denominator, Tensor):
        unlike = denominator.device != logits.device or denominator.requires_grad or denominator.is_complex()
        if denominator.numel() != 1 or unlike:
            raise ValueError(
                "denominator: expected one real element on the logits' device, without gradient; got "
                f"{tuple(denominator.shape)} in {name_of(denominator.dtype)} on {denominator.device}, "
                f"requires_grad={denominator.requires_grad}"
            )
        return denominator.reshape(()).to(torch.float64)
    try:
        denominator = float(denominator)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"denominator: expected a number or a tensor, got {denominator!r}") from None
    if not (denominator >= 0 and math.isfinite(denominator)):
        raise ValueError(f"denominator: expected a number that is not negative, got {denominator}")
    return denominator


def _check(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal: float,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Any, ...]:
    check_logits(logits)
    check_target(target, logits)
    if weight is not None:
        weight = check_small(weight, "weight", [(logits.shape[1],)], logits)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    if not 0 <= focal <= MAX_FOCAL:
        raise ValueError(f"focal: expected 0 to {MAX_FOCAL:g}, got {focal}")
    if focal and label_smoothing:
        raise ValueError(f"label_smoothing: expected 0 with focal={focal:g}, got {label_smoothing}")
    return logits, target, weight, ignore_index, label_smoothing, focal, align_corners, per_pixel


def _compute(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal: float,
    align_corners: bool,
    reduction: str,
    denominator: Tensor | None,
    number: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes each pixel's normalizer, the loss, and the sums of losses, weights, correct and wrong pixels.

    The normalizer is Σ exp(l − max l), over all classes; with focal over those that are not the label.
    """
    per_pixel = reduction == "none"
    arguments = _check(logits, target, weight, ignore_index, label_smoothing, focal, align_corners, per_pixel)
    if torch.compiler.is_exporting():
        results = reference.upsample_cross_entropy(*arguments)
    else:
        results = _empty_results(logits, target, per_pixel)
        fill(KERNELS, "upsample_cross_entropy", (logits, limits(logits, target.shape[1:])), arguments, results)
        if labels.are_checked(target) and results[2].tolist()[3]:
            labels.refuse(target, logits.shape[1], ignore_index)
    normalizer, _, sums = results
    if per_pixel:
        return results
    return normalizer, _mean(None, (), target, normalizer, sums, reduction, denominator, number), sums


def _mean(
    grad: Tensor | None,
    shape: tuple[int, ...],
    target: Tensor,
    normalizer: Tensor,
    sums: Tensor,
    reduction: str,
    denominator: Tensor | None,
    number: float | None,
) -> Tensor:
    """Divides the sum of losses, or a gradient, as the reduction says; returns one number of this shape."""
    divisor = number if denominator is None else denominator
    if not sums.is_cpu or not runs_eagerly():
        if divisor is None:
            divisor = {"mean": sums[1], "mean_all": target.numel(), "sum": 1}[reduction]
        dividend = sums[0] if grad is None else grad.to(torch.float64)
        return (dividend / divisor).to(normalizer.dtype).reshape(shape)
    # On a CPU the numbers are at hand, and Python divides them in less time than PyTorch takes to begin.
    total, weights, *_ = sums.tolist()
    if divisor is None:
        divisor = {"mean": weights, "mean_all": target.numel(), "sum": 1}[reduction]
    dividend, divisor = (total if grad is None else grad.item()), float(divisor)
    quotient = dividend / divisor if divisor else dividend * math.inf
    return torch.tensor([quotient] if shape else quotient, dtype=normalizer.dtype)


def _empty_results(logits: Tensor, target: Tensor, per_pixel: bool) -> tuple[Tensor, Tensor, Tensor]:
    normalizer = logits.new_empty(target.shape, dtype=working_dtype(logits))
    losses = normalizer.new_empty(target.shape if per_pixel else (0,))
    return normalizer, losses, logits.new_empty(4, dtype=torch.float64)


def _empty(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal: float,
    align_corners: bool,
    reduction: str,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    per_pixel = reduction == "none"
    _check(logits, target, weight, ignore_index, label_smoothing, focal, align_corners, per_pixel)
    normalizer, losses, sums = _empty_results(logits, target, per_pixel)
    return normalizer, losses if per_pixel else losses.new_empty(()), sums


def _check_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal: float,
    align_corners: bool,
    normalizer: Tensor,
) -> tuple[Any, ...]:
    *checked, _ = _check(logits, target, weight, ignore_index, label_smoothing, focal, align_corners, False)
    return grad, *checked, normalizer


# Computes the gradient of the logits from that of every pixel's loss, (B, H, W), or (1,) if it is the same for all.
_backward = Operator(
    "upsample_cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, SymInt ignore_index, "
    "float label_smoothing, float focal, bool align_corners, Tensor normalizer) -> Tensor",
    KERNELS,
    _check_backward,
    on=lambda grad, logits, target, *_: (logits, limits(logits, target.shape[1:])),
    empty=lambda grad, logits, *_: torch.empty_like(logits),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, target, weight, *ctx.settings, ctx.reduction, denominator, ctx.number = inputs
    normalizer, _, sums = output
    ctx.save_for_backward(logits, target, weight, normalizer, sums, denominator)
    ctx.mark_non_differentiable(normalizer, sums)
    ctx.set_materialize_grads(False)


def _through(ctx: Any, grad_normalizer: None, grad: Tensor | None, grad_sums: None) -> tuple[Tensor | None, ...]:
    logits, target, weight, normalizer, sums, denominator = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    if ctx.reduction != "none":
        grad = _mean(grad, (1,), target, normalizer, sums, ctx.reduction, denominator, ctx.number)
    return _backward.in_backward(grad, logits, target, weight, *ctx.settings, normalizer), *[None] * 9


class _Loss(EagerFunction):
    """Is the node of a loss in autograd's graph, with fewer inputs and results than the operator's, for less time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, others: tuple[Any, ...], with_sums: bool) -> tuple[Tensor, Tensor | None]:
        _, loss, sums = results = _compute(logits, *others)
        _remember(ctx, (logits, *others), results)
        return loss, sums if with_sums else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _through(ctx, None, grad, None)[0], None, None


# Not an Operator: the reduction is part of it, so that autograd sees one node instead of five.
_losses = define(
    "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, SymInt ignore_index, float label_smoothing, "
    "float focal, bool align_corners, str reduction, Tensor? denominator, float? number) -> (Tensor, Tensor, Tensor)",
    _compute,
    _empty,
    backward=_through,
    remember=_remember,
)
