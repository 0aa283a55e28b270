"""Computes losses and predictions of single logits: the sigmoid of z is the softmax of the logits (0, z).

The identity costs a copy of the logits at their own, low resolution; the kernels are those of two classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apc_kernels.ops.common import check_small, check_tensor, working_dtype
from apc_kernels.ops.upsample.checks import as_ignored, check_logits
from apc_kernels.ops.upsample.cross_entropy import upsample_cross_entropy


def upsample_binary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    pos_weight: float | Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    focal: float | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Computes the binary cross entropy of logits that are bilinearly upsampled to the size of the target.

        z = interpolated logit of a pixel, y = its label, w = pos_weight (1 by default)
        loss = −w·y·log σ(z) − (1 − y)·log(1 − σ(z))

    With focal = γ it is the focal loss, where p = σ(z) if y is 1, and 1 − σ(z) if it is 0; with label_smoothing = ε,
    y is replaced by (1 − ε)·y + ε/2:

        loss = −(1 − p)^γ·(w if y is 1, else 1)·log p

    Equivalent to, for a target (B, C, H, W):

        z, valid = F.interpolate(logits.float(), target.shape[2:], mode="bilinear"), target != ignore_index
        F.binary_cross_entropy_with_logits(z[valid], target[valid].float(), pos_weight=pos_weight)

    It is upsample_cross_entropy of the logits (0, z): neither upsampled logits nor probabilities are stored.

    Args:
        logits: (B, C, h, w), as in upsample_cross_entropy; one logit for each of C independent questions, C = 1 for the
            segmentation of one class.
        target: labels 0 and 1: (B, C, H, W), or (B, H, W) if C = 1; uint8, int16, int32, int64 or bool.
        pos_weight: a number, or a tensor of one element or (C,): the weight of pixels whose label is 1; not
            differentiated. C weights take a pass for each channel.
        ignore_index: the label of pixels that are left out everywhere.
        label_smoothing: from 0 to 1.
        focal: γ, from 0 to 1e6; 0 and None stand for the cross entropy. It takes no label_smoothing.
        reduction: "mean" divides by the number of pixels that are not ignored, over all channels; "mean_all" divides by
            B·C·H·W; "sum" does not divide; "none" returns the loss of every pixel.
        denominator: replaces the denominator of "mean" and "mean_all", as in upsample_cross_entropy.

    Returns:
        The loss, a scalar or of the target's shape, in float32 (float64 for float64 logits).

    Wrong labels, differentiation and determinism are as in upsample_cross_entropy.
    """
    check_tensor(logits, "logits")
    check_tensor(target, "target")
    check_logits(logits)
    channels = logits.shape[1]
    labels = target[:, None] if target.dim() == 3 and channels == 1 else target
    if labels.dim() != 4 or labels.shape[1] != channels:
        expected = (
            "(B, H, W) or (B, 1, H, W) for 1 logit" if channels == 1 else f"(B, {channels}, H, W) for {channels} logits"
        )
        raise ValueError(f"target: expected {expected} a pixel, got {tuple(target.shape)}")
    if labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    weights = None if pos_weight is None else _weights(pos_weight, logits)
    if weights is not None and denominator is None and reduction in ("mean", "mean_all"):
        denominator = _valid(labels, ignore_index) if reduction == "mean" else labels.numel()

    def loss(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
        result = upsample_cross_entropy(
            as_pair(logits.flatten(0, 1)[:, None]),
            labels.flatten(0, 1),
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            focal=focal,
            reduction=reduction,
            align_corners=align_corners,
            denominator=denominator,
        )
        assert isinstance(result, Tensor)  # it is not asked for the correct pixels
        return result

    if weights is None or len(weights) == 1:
        result = loss(logits, labels, None if weights is None else weights[0])
        return result.view(target.shape) if result.dim() else result
    each = [loss(*part) for part in zip(logits.split(1, 1), labels.split(1, 1), weights, strict=True)]
    return torch.stack(each, 1) if reduction == "none" else torch.stack(each).sum()


def as_pair(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Returns the logits (0, z − log(t/(1 − t))) of two classes, of which the second wins where σ(z) > t."""
    if threshold != 0.5:
        logits = logits.to(working_dtype(logits)) - math.log(threshold / (1 - threshold))
    return F.pad(logits, (0, 0, 0, 0, 1, 0))


def check_threshold(threshold: float, logits: Tensor) -> float:
    check_tensor(logits, "logits")
    check_logits(logits)
    try:
        threshold = float(threshold)
    except (TypeError, ValueError):
        raise TypeError(f"threshold: expected a number, got {threshold!r}") from None
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a probability above 0 and below 1, got {threshold}")
    if logits.shape[1] != 1:
        raise ValueError(f"logits: expected one channel with a threshold, got {tuple(logits.shape)}")
    return threshold


def _weights(pos_weight: float | Tensor, logits: Tensor) -> Tensor:
    """Returns the weights of both labels, (1, 2), or (C, 2) if there is one for each channel."""
    if not isinstance(pos_weight, Tensor):
        try:
            pos_weight = torch.tensor([float(pos_weight)], dtype=working_dtype(logits), device=logits.device)
        except (TypeError, ValueError):
            raise TypeError(f"pos_weight: expected a number or a tensor, got {pos_weight!r}") from None
    if pos_weight.requires_grad:
        raise ValueError("pos_weight: expected a tensor without gradient, got one that requires it")
    pos_weight = check_small(pos_weight.reshape(-1), "pos_weight", [(1,), (logits.shape[1],)], logits)
    return torch.stack([torch.ones_like(pos_weight), pos_weight], 1)


def _valid(labels: Tensor, ignore_index: int) -> Tensor | int:
    """Counts the labels that are not ignored; a comparison would wrap what their dtype does not hold."""
    if labels.is_floating_point() or labels.is_complex():
        return labels.numel()  # upsample_cross_entropy raises for these
    kept, held = as_ignored(ignore_index), torch.iinfo(labels.dtype)
    return (labels != kept).sum() if held.min <= kept <= held.max else labels.numel()
