"""upsample_cross_entropy: the loss of bilinearly upsampled logits, without the upsampled logits."""

import math
from typing import Optional

import torch
from torch import Tensor

from apc_kernels import labels
from apc_kernels.ops.common import call, check_small
from apc_kernels.ops.upsample import reference
from apc_kernels.ops.upsample.checks import check_ignored, check_logits, check_target, limits

REDUCTIONS = ("mean", "mean_all", "sum", "none")


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    denominator: float | Tensor | None = None,
    return_correct: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """F.cross_entropy(F.interpolate(logits, target's size, mode="bilinear"), target), without the tensor in between.

        l = interpolated logits of a pixel, y = its label, w = weight (1 for every class if not given)
        loss = (1 − ε)·w[y]·(logΣexp(l) − l[y]) + ε/K·Σ_c w[c]·(logΣexp(l) − l[c])       ε = label_smoothing

    Args:
        logits: (B, K, h, w), float32, bfloat16, float16 or float64; NCHW and channels_last, and slices of them, are
            read where they lie, any other layout is copied (once forward, once backward).
        target: (B, H, W), uint8, int16, int32 or int64, of any size relative to h and w.
        weight: (K,) of classes, float32 (float64 beside float64 logits); not differentiated.
        ignore_index: the label of pixels that count nowhere.
        label_smoothing: 0 to 1.
        reduction: "mean" divides by the weights of all pixels that are not ignored (PyTorch's mean), "mean_all" by
            B·H·W (mmsegmentation's), "sum" by nothing; "none" returns the loss of every pixel.
        denominator: what the two means divide by instead: a number that is not negative, or a tensor with one element,
            whose value is not looked at. With the count over all ranks, data-parallel training computes what one
            process would.
        return_correct: returns the number of pixels whose label is the argmax as well, from the same pass.

    Returns:
        The loss, a scalar or (B, H, W), in float32 (float64 for float64 logits); or the loss and that number, int64.

    Where nothing is divided by nothing (no pixel that counts in "mean", no image in "mean_all") the loss is NaN, as in
    PyTorch; where no pixel counts, the gradient is zero. An infinite or NaN logit does what F.interpolate makes of it:
    0 · ∞ is NaN, at borders too. A label out of
    range is an error on a CPU. On a GPU it makes the loss, and its pixel's gradient, NaN; inside `with
    apc_kernels.checked_labels():` it is an error there too.

    Saves logits, target and one float for each pixel. Differentiable once, with respect to logits, and in reverse mode
    only; deterministic to the bit; logits keep their dtype under autocast. On a CPU logits are taken relative to the
    largest of their source pixel: what all of them have in common does not cost accuracy.
    """
    ignore_index, label_smoothing = _check(logits, target, ignore_index, label_smoothing)
    if weight is not None:
        weight = check_small(weight, "weight", [(logits.shape[1],)], logits)
        if weight.requires_grad:
            raise ValueError("weight: expected a tensor without gradient; it is not differentiated")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if denominator is not None:
        denominator = _check_denominator(denominator, reduction, logits)
    operator = reference.upsample_cross_entropy if torch.compiler.is_exporting() else _forward
    arguments = (logits, target, weight, ignore_index, label_smoothing, align_corners, reduction == "none")
    _, losses, sums = operator(*arguments)
    loss = losses
    if reduction != "none":
        if denominator is None:
            denominator = {"mean": sums[1].detach(), "mean_all": target.numel(), "sum": 1}[reduction]
        loss = (sums[0] / denominator).to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return (loss, sums[2].detach().to(torch.int64)) if return_correct else loss


def _check(logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float) -> tuple[int, float]:
    check_logits(logits)
    check_target(target, logits)
    ignore_index = check_ignored(ignore_index)
    try:
        label_smoothing = float(label_smoothing)
    except (TypeError, ValueError):
        raise TypeError(f"label_smoothing: expected a number, got {label_smoothing!r}") from None
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    return ignore_index, label_smoothing


def _check_denominator(denominator: float | Tensor, reduction: str, logits: Tensor) -> float | Tensor:
    if reduction not in ("mean", "mean_all"):
        raise ValueError(f"denominator: expected none beside reduction={reduction!r}, which divides by nothing")
    if isinstance(denominator, Tensor):
        unlike = denominator.device != logits.device or denominator.requires_grad or denominator.is_complex()
        if denominator.numel() != 1 or unlike:
            raise ValueError(
                "denominator: expected one real element on the logits' device, without gradient; got "
                f"{tuple(denominator.shape)} in {str(denominator.dtype)[6:]} on {denominator.device}, "
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


@torch.library.custom_op("apc_kernels::upsample_cross_entropy", mutates_args=())
def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],  # noqa: UP045, the schema is read from it
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    per_pixel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference's."""
    _check(logits, target, ignore_index, label_smoothing)
    results = _empty(logits, target, per_pixel)
    arguments = (logits, target, weight, ignore_index, label_smoothing, align_corners, per_pixel)
    name = "upsample_cross_entropy"
    call("upsample", name, logits, limits(logits, target.shape[1:]), arguments, results)
    if labels.are_checked(target) and results[2][3].item():
        labels.refuse(target, logits.shape[1], ignore_index)
    return results


def _empty(logits: Tensor, target: Tensor, per_pixel: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    normalizer = logits.new_empty(target.shape, dtype=dtype)
    losses = logits.new_empty(target.shape if per_pixel else (0,), dtype=dtype)
    return normalizer, losses, logits.new_empty(4, dtype=torch.float64)


@_forward.register_fake
def _(logits, target, weight, ignore_index, label_smoothing, align_corners, per_pixel):
    _check(logits, target, ignore_index, label_smoothing)
    return _empty(logits, target, per_pixel)


@torch.library.custom_op("apc_kernels::upsample_cross_entropy_backward", mutates_args=())
def _backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Optional[Tensor],  # noqa: UP045
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    normalizer: Tensor,
) -> Tensor:
    """The gradient of the logits from that of every pixel's loss, (B, H, W), or (1,) if it is the same for all."""
    _check(logits, target, ignore_index, label_smoothing)
    grad_logits = torch.empty_like(logits)
    name = "upsample_cross_entropy_backward"
    arguments = (grad, logits, target, weight, ignore_index, label_smoothing, align_corners, normalizer)
    call("upsample", name, logits, limits(logits, target.shape[1:]), arguments, (grad_logits,))
    return grad_logits


@_backward.register_fake
def _(grad, logits, target, weight, ignore_index, label_smoothing, align_corners, normalizer):
    return torch.empty_like(logits)


def _remember(ctx, inputs, output):
    logits, target, weight, *ctx.settings, ctx.per_pixel = inputs
    ctx.save_for_backward(logits, target, weight, output[0])


def _through(ctx, grad_plain, grad_losses, grad_sums):
    logits, target, weight, normalizer = ctx.saved_tensors
    grad = grad_losses if ctx.per_pixel else grad_sums[:1].to(normalizer.dtype)
    return _backward(grad, logits, target, weight, *ctx.settings, normalizer), *[None] * 6


_forward.register_autograd(_through, setup_context=_remember)
