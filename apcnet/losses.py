"""Computes region losses (Dice, Jaccard, Tversky, focal Tversky, generalised Dice) of low-resolution logits.

Formulas and options are those of segmentation_models_pytorch, and the values and gradients those of its losses on
upsampled logits; full-size logits are never stored. Each loss is a function of three sums for every image and class,
p: of probabilities, t: of pixels of the class, pt: of probabilities on these pixels. Losses that are added share them:

    sums = losses.region_sums(logits, target, mode="multiclass")
    loss = losses.dice_of_sums(sums) + losses.jaccard_of_sums(sums)

A class without pixels (in the batch, or per image in that image) has the loss 0, as in segmentation_models_pytorch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels

__all__ = ["dice", "focal_tversky", "generalised_dice", "jaccard", "region_sums", "tversky"]
__all__ += ["dice_of_sums", "focal_tversky_of_sums", "generalised_dice_of_sums", "jaccard_of_sums", "tversky_of_sums"]
MODES = ("binary", "multiclass", "multilabel")
NEVER = -(2**63)  # an ignore_index that no label has


def dice(logits: Tensor, target: Tensor, *, mode: str = "multiclass", **options: Any) -> Tensor:
    """Computes the Dice loss: 1 − (2·pt + 2·smooth) / (p + t + 2·smooth), the mean over classes.

    Args:
        logits: (B, K, h, w), K = 1 if binary; at the model's own resolution.
        target: (B, H, W) labels at full size, 0 and 1 if binary; (B, K, H, W) masks of 0 and 1 if multilabel.
        mode: "binary" and "multilabel" take sigmoids, "multiclass" takes the softmax.
        options: those of `region_sums` (from_logits, ignore_index, align_corners) and of `dice_of_sums`.
    """
    return dice_of_sums(*_split(logits, target, mode, options), **options)


def jaccard(logits: Tensor, target: Tensor, *, mode: str = "multiclass", **options: Any) -> Tensor:
    """Computes the Jaccard (IoU) loss: 1 − (pt + smooth) / (p + t − pt + smooth), the mean over classes.

    The arguments are those of `dice`.
    """
    return jaccard_of_sums(*_split(logits, target, mode, options), **options)


def tversky(logits: Tensor, target: Tensor, *, mode: str = "multiclass", **options: Any) -> Tensor:
    """Computes the Tversky loss, in which false positives weigh alpha and false negatives beta.

        1 − (pt + smooth) / (pt + alpha·(p − pt) + beta·(t − pt) + smooth)

    The arguments are those of `dice`; the options also those of `tversky_of_sums`.
    """
    return tversky_of_sums(*_split(logits, target, mode, options), **options)


def focal_tversky(logits: Tensor, target: Tensor, *, mode: str = "multiclass", **options: Any) -> Tensor:
    """Computes the focal Tversky loss: the mean Tversky loss over classes, to the power of gamma.

    The arguments are those of `dice`; the options also those of `focal_tversky_of_sums`.
    """
    return focal_tversky_of_sums(*_split(logits, target, mode, options), **options)


def generalised_dice(logits: Tensor, target: Tensor, *, mode: str = "multiclass", **options: Any) -> Tensor:
    """Computes the generalised Dice loss, in which a class weighs the less the more pixels it has: w = 1 / t².

        1 − (2·Σ w·pt + 2·smooth) / (Σ w·(p + t) + 2·smooth)      Σ over classes

    The arguments are those of `dice`; the options those of `generalised_dice_of_sums`.
    """
    return generalised_dice_of_sums(*_split(logits, target, mode, options), **options)


def region_sums(
    logits: Tensor,
    target: Tensor,
    *,
    mode: str = "multiclass",
    from_logits: bool = True,
    ignore_index: int | None = 255,
    align_corners: bool = False,
) -> Tensor:
    """Computes the sums p, t and pt that the losses are functions of, (3, B, K).

    Args:
        logits: As in `dice`.
        target: As in `dice`.
        mode: As in `dice`.
        from_logits: False for probabilities instead of logits. These are upsampled in full, which takes memory.
        ignore_index: The label of pixels that do not count, or None; in masks, for the class in question.
        align_corners: Interpolates as F.interpolate does with this option.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}; got {mode!r}")
    if mode == "binary" and logits.dim() == 4 and logits.shape[1] != 1:
        raise ValueError(f"logits: expected one channel for mode='binary', got {tuple(logits.shape)}")
    if mode == "binary" and target.dim() == 3:
        target = target[:, None]
    if target.dim() != (3 if mode == "multiclass" else 4):
        expected = {"binary": "(B, H, W)", "multiclass": "(B, H, W)", "multilabel": "(B, K, H, W)"}[mode]
        raise ValueError(f"target: expected {expected} for mode={mode!r}, got {tuple(target.shape)}")
    ignored = NEVER if ignore_index is None else ignore_index
    if from_logits:
        return apc_kernels.upsample_region_sums(
            logits, target, ignore_index=ignored, sigmoid=mode != "multiclass", align_corners=align_corners
        )
    p = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)
    label = target if target.dim() == 4 else target[:, None]
    own = label == (1 if target.dim() == 4 else torch.arange(p.shape[1], device=p.device)[:, None, None])
    p = torch.where(label != ignored, p, 0.0)
    return torch.stack([term.sum((2, 3)) for term in (p, own.to(p.dtype), torch.where(own, p, 0.0))])


def _split(logits: Tensor, target: Tensor, mode: str, options: dict[str, Any]) -> tuple[Tensor]:
    """Returns the sums, and leaves the options of the loss."""
    of_sums = {name: options.pop(name) for name in ("from_logits", "ignore_index", "align_corners") if name in options}
    return (region_sums(logits, target, mode=mode, **of_sums),)


def dice_of_sums(sums: Tensor, **options: Any) -> Tensor:
    """Computes the Dice loss from sums; the options are those of `tversky_of_sums` but alpha and beta."""
    return tversky_of_sums(sums, alpha=0.5, beta=0.5, **options)


def jaccard_of_sums(sums: Tensor, **options: Any) -> Tensor:
    """Computes the Jaccard loss from sums; the options are those of `tversky_of_sums` but alpha and beta."""
    return tversky_of_sums(sums, alpha=1.0, beta=1.0, **options)


def focal_tversky_of_sums(
    sums: Tensor, *, alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, **options: Any
) -> Tensor:
    """Computes the focal Tversky loss from sums; the options are those of `tversky_of_sums`.

    The defaults are those of its paper, whose gamma is 4/3, and whose power is 1/gamma.
    """
    return tversky_of_sums(sums, alpha=alpha, beta=beta, gamma=gamma, **options)


def tversky_of_sums(
    sums: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    smooth: float = 0.0,
    eps: float = 1e-7,
    log_loss: bool = False,
    classes: Sequence[int] | None = None,
    class_weights: Sequence[float] | Tensor | None = None,
    per_image: bool = False,
) -> Tensor:
    """Computes the Tversky loss from sums (3, B, K).

    Args:
        sums: Those of `region_sums`, or of apc_kernels.upsample_region_sums.
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        gamma: Power of the mean over classes.
        smooth: Number that is added to both sides of the quotient, in pixels.
        eps: Least value of the denominator, and of the score in its logarithm.
        log_loss: Takes −log(score) instead of 1 − score.
        classes: Classes that count; all by default.
        class_weights: (K,), weights in the mean over classes.
        per_image: Computes a loss for each image, and the mean of these, instead of one for the whole batch.
    """
    p, t, pt = sums[:3] if per_image else sums[:3].sum(1, keepdim=True)
    score = (pt + smooth) / (pt + alpha * (p - pt) + beta * (t - pt) + smooth).clamp_min(eps)
    loss = -score.clamp_min(eps).log() if log_loss else 1 - score
    loss = torch.where(t > 0, loss, 0.0)
    weights = torch.ones(loss.shape[1], dtype=loss.dtype, device=loss.device)
    if class_weights is not None:
        weights = torch.as_tensor(class_weights, dtype=loss.dtype, device=loss.device)
    if classes is not None:
        loss, weights = loss[:, list(classes)], weights[list(classes)]
    loss = (loss * weights).sum(1) / weights.sum()
    if gamma != 1:  # a power below 1 has no finite slope at 0
        loss = torch.where(loss > 0, torch.where(loss > 0, loss, 1.0).pow(gamma), 0.0)
    return loss.mean()


def generalised_dice_of_sums(
    sums: Tensor,
    *,
    smooth: float = 0.0,
    eps: float = 1e-7,
    log_loss: bool = False,
    classes: Sequence[int] | None = None,
    per_image: bool = False,
) -> Tensor:
    """Computes the generalised Dice loss from sums; a class without pixels weighs 0.

    The options are those of `tversky_of_sums`. Weights are relative to that of the rarest class: 1.
    """
    sums = sums[:3] if per_image else sums[:3].sum(1, keepdim=True)
    p, t, pt = sums if classes is None else sums[:, :, list(classes)]
    rarest = torch.where(t > 0, t, torch.inf).amin(1, keepdim=True)
    weights = torch.where(t > 0, (rarest / t).square(), 0.0)
    pt, either = (weights * pt).sum(1), (weights * (p + t)).sum(1)
    score = (2 * pt + 2 * smooth) / (either + 2 * smooth).clamp_min(eps)
    loss = -score.clamp_min(eps).log() if log_loss else 1 - score
    return torch.where(rarest[:, 0].isfinite(), loss, 0.0).mean()


def ohem(
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float | None = None,
    share: float | None = None,
    min_kept: int | None = None,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
    align_corners: bool = False,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Computes the cross entropy of the hardest pixels only: online hard example mining.

    It keeps every pixel whose label has a probability below the threshold, and at least a share of the pixels that are
    not ignored and `min_kept` pixels for each image of the batch: the hardest of the batch, by the probability of the
    label if a threshold is given, otherwise by the loss. Pixels that are exactly as hard as the last one kept are kept
    too, so that the choice does not depend on an order.
    mmsegmentation's OHEMPixelSampler(thresh, min_kept) chooses the same pixels if no losses are equal and more than
    `min_kept` pixels for each image are not ignored; its loss is that of reduction="mean_all".

    Args:
        logits: (B, K, h, w), as in apc_kernels.upsample_cross_entropy, which computes the loss of every pixel.
        target: (B, H, W) labels.
        threshold: A probability, from 0 to 1.
        share: A share, from 0 to 1; the number of pixels is rounded up.
        min_kept: A number of pixels.
        weight: (K,) weights of the classes; they count in losses, not in probabilities.
        ignore_index: Label of pixels that are left out everywhere.
        reduction: "mean" divides by the weights of the pixels that are kept, "mean_all" by B·H·W; "sum" does not
            divide; "none" returns the loss of every pixel, 0 where it is not kept. If no pixel is kept, all are 0.
        align_corners: Interpolates as F.interpolate does with this option.
        denominator: Replaces the denominator of "mean" and "mean_all".

    Example:
        >>> loss = ohem(logits, target, threshold=0.7, min_kept=100_000)  # mmsegmentation's setting
        >>> loss = ohem(logits, target, share=0.25)  # the hardest quarter
    """
    if threshold is None and share is None and min_kept is None:
        raise ValueError("threshold, share, min_kept: expected one of them at least, got none")
    for name, value in (("threshold", threshold), ("share", share)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: expected 0 to 1, got {value}")
    if min_kept is not None and min_kept < 0:
        raise ValueError(f"min_kept: expected 0 or more, got {min_kept}")
    if reduction not in ("mean", "mean_all", "sum", "none"):
        raise ValueError(f"reduction: expected one of mean, mean_all, sum, none; got {reduction!r}")
    options: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners, "reduction": "none"}
    pixels = apc_kernels.upsample_cross_entropy(logits, target, weight=weight, **options)
    with torch.no_grad():
        valid = target.long() != ignore_index  # a comparison in a narrow dtype would wrap
        hardness = pixels  # −log of the probability, or this times the weight
        if threshold is not None and weight is not None:
            hardness = apc_kernels.upsample_cross_entropy(logits, target, **options)
        kept = ~(hardness <= -math.log(threshold)) if threshold else torch.zeros_like(valid)  # a NaN is kept
        fewest = max((min_kept or 0) * len(target), math.ceil(share * int(valid.sum())) if share else 0)
        if fewest:
            hardest = hardness.where(valid, -torch.inf).flatten().topk(min(fewest, pixels.numel()), sorted=False)
            kept = kept | ~(hardness < hardest.values.min())
        kept = kept & valid
    pixels = pixels.where(kept, 0.0)
    if reduction == "none":
        return pixels
    if denominator is None:
        denominator = {"mean": _weights(kept, target, weight), "mean_all": target.numel(), "sum": 1}[reduction]
    return (pixels.sum(dtype=torch.float64) / denominator).to(pixels.dtype)


def _weights(kept: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Returns the sum of the weights of the pixels that are kept, or 1 if there is none."""
    total = kept.sum()
    if weight is not None:
        total = weight[target.long().where(kept, 0)].where(kept, 0.0).sum(dtype=torch.float64)
    return torch.where(total > 0, total, 1)
