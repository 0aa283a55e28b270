"""Computes losses of segmentation_models_pytorch from logits whose upsampling is deferred."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apc_kernels.interop.upsampled import UpsampledLogits
from apc_kernels.ops.upsample import upsample_binary_cross_entropy, upsample_cross_entropy, upsample_region_sums

NEVER = -(2**63)  # an ignore_index that no label has
IGNORED = 255  # in masks that are made here


def obstacle(loss: nn.Module, plain: type) -> str | None:
    """Returns the reason why a loss needs upsampled logits, or None."""
    if plain.__name__ not in FUSED:
        return f"{plain.__name__} reads every upsampled logit"
    if "forward" in vars(loss):
        return "forward is overridden on the instance"
    if not getattr(loss, "from_logits", True):
        return "from_logits is False: it reads every upsampled value"
    return None


def methods(plain: type) -> dict[str, Callable[..., Any]]:
    """Makes the forward method that takes UpsampledLogits as they are, and other logits as before."""
    compute = FUSED[plain.__name__]

    @functools.wraps(plain.forward)
    def forward(self: Any, y_pred: Tensor, y_true: Tensor) -> Tensor:
        fits = isinstance(y_pred, UpsampledLogits) and y_pred.is_untouched()
        loss = compute(self, y_pred, y_true) if fits else None
        return plain.forward(self, y_pred, y_true) if loss is None else loss

    return {"forward": forward}


def _soft_cross_entropy(self: Any, logits: UpsampledLogits, target: Tensor) -> Tensor | None:
    """Computes SoftCrossEntropyLoss, whose mean is over all pixels, ignored ones too."""
    usual = self.reduction in ("mean", "sum") and self.dim == 1 and self.smooth_factor is not None
    if not usual or target.shape != (logits.shape[0], *logits.shape[2:]):
        return None
    loss = upsample_cross_entropy(
        logits.source,
        target,
        ignore_index=_ignored(self),
        label_smoothing=self.smooth_factor,
        reduction="mean_all" if self.reduction == "mean" else "sum",
        align_corners=logits.align_corners,
    )
    return loss.to(logits.dtype)


def _region(self: Any, logits: UpsampledLogits, target: Tensor) -> Tensor | None:
    """Computes DiceLoss, JaccardLoss and TverskyLoss from three sums over the batch for every class."""
    masks = _labels(self.mode, logits, target, self.ignore_index)
    if masks is None or not self.from_logits:
        return None
    alpha, beta = WEIGHTS.get(self.__class__.__name__) or (self.alpha, self.beta)
    p, t, pt = upsample_region_sums(
        logits.source,
        masks,
        ignore_index=_ignored(self),
        sigmoid=self.mode != "multiclass",
        align_corners=logits.align_corners,
    ).sum(1)
    score = (pt + self.smooth) / (pt + alpha * (p - pt) + beta * (t - pt) + self.smooth).clamp_min(self.eps)
    loss = -score.clamp_min(self.eps).log() if self.log_loss else 1 - score
    loss = torch.where(t > 0, loss, 0.0)
    weights = getattr(self, "class_weights", None)
    weights = torch.ones_like(loss) if weights is None else weights.to(loss.device, loss.dtype)
    if self.classes is not None:
        loss, weights = loss[self.classes], weights[self.classes]
    mean = (loss * weights).sum() / weights.sum()
    return (mean ** getattr(self, "gamma", 1.0)).to(logits.dtype)


def _focal(self: Any, logits: UpsampledLogits, target: Tensor) -> Tensor | None:
    """Computes FocalLoss, which asks of every class whether a pixel has it."""
    options = self.focal_loss_fn.keywords
    alpha, plain = options["alpha"], not options["normalized"] and options["reduced_threshold"] is None
    if not plain or options["reduction"] != "mean" or alpha == 1 or not self.from_logits:
        return None
    if getattr(self, "class_weights", None) is not None or (
        self.mode == "multilabel" and self.ignore_index is not None
    ):
        return None
    masks = _labels(self.mode, logits, target, self.ignore_index)
    if masks is None:
        return None
    if self.mode == "multiclass":
        classes = torch.arange(logits.shape[1], device=masks.device)
        own = (masks[:, None] == classes[:, None, None]).to(torch.int16)
        masks = own if self.ignore_index is None else own.masked_fill_(masks[:, None] == self.ignore_index, IGNORED)
    elif self.ignore_index is not None:
        masks = masks.to(torch.int16).masked_fill(masks == self.ignore_index, IGNORED)
    loss = upsample_binary_cross_entropy(
        logits.source,
        masks,
        pos_weight=None if alpha is None else alpha / (1 - alpha),
        ignore_index=IGNORED,
        focal=options["gamma"],
        align_corners=logits.align_corners,
    )
    return (loss if alpha is None else loss * (1 - alpha)).to(logits.dtype)


def _soft_binary_cross_entropy(self: Any, logits: UpsampledLogits, target: Tensor) -> Tensor | None:
    """Computes SoftBCEWithLogitsLoss, whose mean is over all pixels, ignored ones too."""
    smoothing, weight = self.smooth_factor or 0.0, self.pos_weight
    if self.reduction not in ("mean", "sum") or self.weight is not None or not 0 <= smoothing <= 0.5:
        return None
    if weight is not None and weight.shape not in ((), (1,), (logits.shape[1], 1, 1)):
        return None
    masks = _labels("multilabel", logits, target, self.ignore_index)
    if masks is None:
        return None
    loss = upsample_binary_cross_entropy(
        logits.source,
        masks,
        pos_weight=None
        if weight is None
        else weight.flatten().to(torch.promote_types(logits.source.dtype, torch.float32)),
        ignore_index=_ignored(self),
        label_smoothing=2 * smoothing,  # theirs moves both labels by it
        reduction="mean_all" if self.reduction == "mean" else "sum",
        align_corners=logits.align_corners,
    )
    return loss.to(logits.dtype)


def _ignored(self: Any) -> int:
    return NEVER if self.ignore_index is None else self.ignore_index


def _labels(mode: str, logits: UpsampledLogits, target: Tensor, ignore_index: int | None) -> Tensor | None:
    """Returns (B, H, W) labels if multiclass, else masks (B, K, H, W) of integers; None for others and soft ones."""
    batch, classes, height, width = logits.shape
    fits = {"binary": classes == 1, "multiclass": classes > 1, "multilabel": True}[mode]
    if mode == "multiclass":
        usual = fits and target.shape == (batch, height, width) and not target.is_floating_point()
        return target if usual else None
    shapes = {(batch, classes, height, width), (batch, height, width) if mode == "binary" else ()}
    if not fits or tuple(target.shape) not in shapes:
        return None
    target = target.reshape(batch, classes, height, width)
    if target.is_floating_point():
        hard = (target == 0) | (target == 1)
        if ignore_index is not None:
            hard |= target == ignore_index
        return target.to(torch.int16) if hard.all() else None
    return target


WEIGHTS = {"DiceLoss": (0.5, 0.5), "JaccardLoss": (1.0, 1.0)}  # of false positives and false negatives
FUSED: dict[str, Callable[..., Tensor | None]] = {
    "DiceLoss": _region,
    "JaccardLoss": _region,
    "TverskyLoss": _region,
    "FocalLoss": _focal,
    "SoftBCEWithLogitsLoss": _soft_binary_cross_entropy,
    "SoftCrossEntropyLoss": _soft_cross_entropy,
}
