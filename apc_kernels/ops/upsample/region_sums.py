"""Implements upsample_region_sums: sums of class probabilities and targets, without the upsampled logits."""

from typing import Any

import torch
from torch import Tensor

from apc_kernels import labels
from apc_kernels.ops.common import check_flag, check_small, check_tensor, name_of, widened, working_dtype
from apc_kernels.ops.interpolation import check_extent
from apc_kernels.ops.operator import Operator
from apc_kernels.ops.upsample.checks import KERNELS, LABELS, as_ignored, check_logits, check_target, limits

ALL_SUMS = 4  # Σp, Σt, Σp·t, Σp²


def upsample_region_sums(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    sigmoid: bool = False,
    squares: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """Computes what region losses (Dice, Jaccard, Tversky) need of bilinearly upsampled logits: Σp, Σt and Σp·t.

        p = softmax (or sigmoid) of the interpolated logits of a pixel
        t = 1 for the class of its label, 0 for all others; or its mask
        sums = Σ w·p, Σ w·t, Σ w·p·t, Σ w·p²    for every image and class, over pixels that are not ignored

    Equivalent to:

        p = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=align_corners).softmax(1)
        valid = target != ignore_index
        label = torch.where(valid, target, 0)
        w = (valid if weight is None else valid * weight[label])[:, None]
        t = F.one_hot(label, p.shape[1]).permute(0, 3, 1, 2)
        torch.stack([(w * each).sum((2, 3)) for each in ([p, t, p * t, p * p] if squares else [p, t, p * t])])

    Neither the upsampled logits nor the probabilities are stored. Saved for backward are logits and target.
    `apcnet.losses` has the losses.

    Args:
        logits: (B, K, h, w), as in upsample_cross_entropy; 2 classes at least, unless `sigmoid`.
        target: (B, H, W) labels, uint8, int16, int32 or int64; H and W may have any ratio to h and w. With `sigmoid`
            also masks (B, K, H, W) of 0 and 1, bool too, in which classes overlap as they like. The labels of a single
            class are its mask: 0 and 1.
        weight: (K,), with which the pixels of each label count, as in upsample_cross_entropy; not for masks.
        ignore_index: the label of pixels that are left out everywhere; in masks, for the class in question.
        sigmoid: takes each class for itself, instead of the softmax over all.
        squares: returns Σ w·p², too.
        align_corners: interpolates as F.interpolate does with this option.

    Returns:
        (3, B, K), or (4, B, K) with squares, in float32 (float64 for float64 logits); `p, t, pt = sums` unpacks them.

    A label out of range raises on a CPU. On a GPU it makes the sums of its image (with masks, of its class there) and
    its pixel's gradient NaN; inside `with apc_kernels.checked_labels():` it raises there too.

    The operation is differentiable once, with respect to logits and in reverse mode, and deterministic to the bit.
    Autocast leaves the dtype of logits alone.
    """
    check_tensor(logits, "logits")
    check_tensor(target, "target")
    if weight is not None:
        weight = widened(weight, "weight", logits)
        if weight.requires_grad:
            raise ValueError("weight: expected a tensor without gradient, got one that requires it")
    for flag, name in ((sigmoid, "sigmoid"), (squares, "squares"), (align_corners, "align_corners")):
        check_flag(flag, name)
    ignore_index = as_ignored(ignore_index)
    if sigmoid and target.dim() == 3 and logits.dim() == 4 and logits.shape[1] == 1:
        target = target[:, None]
    if sigmoid and target.dim() == 4 and target.dtype == torch.bool:
        target = target.view(torch.uint8)
    sums = _sums(logits, target, weight, ignore_index, sigmoid, align_corners)[0]
    return sums if squares else sums[: ALL_SUMS - 1]


def _check(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, sigmoid: bool, align_corners: bool
) -> tuple[Any, ...]:
    check_logits(logits)
    if target.dim() == 4 and sigmoid:
        _check_masks(target, logits)
        if weight is not None:
            raise ValueError(f"weight: expected None for masks, which have no labels, got {tuple(weight.shape)}")
        target = target.contiguous()
    else:
        check_target(target, logits)
    if logits.shape[1] == 1 and not sigmoid:
        raise ValueError("logits: expected 2 classes or more for a softmax, got 1; one logit is for sigmoid=True")
    if weight is not None:
        weight = check_small(weight, "weight", [(logits.shape[1],)], logits)
    return logits, target, weight, ignore_index, sigmoid, align_corners


def _check_masks(target: Tensor, logits: Tensor) -> None:
    if target.dtype not in LABELS:
        raise ValueError(f"target: expected masks in bool, uint8, int16, int32 or int64, got {name_of(target.dtype)}")
    if target.device != logits.device:
        raise ValueError(f"target: expected a tensor on the logits' device, {logits.device}, got {target.device}")
    if target.shape[:2] != logits.shape[:2]:
        expected = f"({logits.shape[0]}, {logits.shape[1]}, H, W)"
        raise ValueError(f"target: expected masks {expected} for these logits, got {tuple(target.shape)}")
    check_extent(target.shape[2:], "target", target.shape)


def _refuse_wrong(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, sigmoid: bool, *others: Any
) -> None:
    wrong = others[-1][1]
    if labels.are_checked(target) and wrong.item():
        labels.refuse(target, 2 if target.dim() == 4 else logits.shape[1], ignore_index)


def _empty(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    sums = logits.new_empty(ALL_SUMS, *logits.shape[:2], dtype=working_dtype(logits))
    return sums, logits.new_empty(1, dtype=torch.int64)


def _check_backward(grad: Tensor, logits: Tensor, *others: Any) -> tuple[Any, ...]:
    checked = _check(logits, *others)
    expected = (ALL_SUMS, *logits.shape[:2])
    if tuple(grad.shape) != expected or grad.dtype != working_dtype(logits) or grad.device != logits.device:
        wanted = f"{expected} in {name_of(working_dtype(logits))} on {logits.device}"
        raise ValueError(f"grad: expected {wanted}, got {tuple(grad.shape)} in {name_of(grad.dtype)} on {grad.device}")
    return grad, *checked


# Computes the gradient of the logits from that of the sums.
_backward = Operator(
    "upsample_region_sums_backward(Tensor grad, Tensor logits, Tensor target, Tensor? weight, SymInt ignore_index, "
    "bool sigmoid, bool align_corners) -> Tensor",
    KERNELS,
    _check_backward,
    on=lambda grad, logits, target, *_: (logits, limits(logits, target.shape[-2:])),
    empty=lambda grad, logits, *_: torch.empty_like(logits),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, target, weight, *ctx.settings = inputs
    ctx.save_for_backward(logits, target, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _through(ctx: Any, grad: Tensor | None, grad_wrong: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return _backward(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 5


# Computes the sums, (4, B, K), and the number of labels out of range, (1,).
_sums = Operator(
    "upsample_region_sums(Tensor logits, Tensor target, Tensor? weight, SymInt ignore_index, bool sigmoid, "
    "bool align_corners) -> (Tensor, Tensor)",
    KERNELS,
    _check,
    on=lambda logits, target, *_: (logits, limits(logits, target.shape[-2:])),
    empty=_empty,
    verify=_refuse_wrong,
    backward=_through,
    remember=_remember,
)
