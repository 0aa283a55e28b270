"""Computes losses of segmentation_models_pytorch from logits whose upsampling is deferred."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from apc_kernels.interop.upsampled import UpsampledLogits
from apc_kernels.ops.upsample import upsample_cross_entropy

NEVER = -(2**63)  # an ignore_index that no label has


def obstacle(loss: nn.Module, plain: type) -> str | None:
    """Returns the reason why a loss needs upsampled logits, or None."""
    if plain.__name__ not in FUSED:
        return f"{plain.__name__} reads every upsampled logit"
    if "forward" in vars(loss):
        return "forward is overridden on the instance"
    return None


def methods(plain: type) -> dict[str, Callable[..., Any]]:
    """Makes the forward method that takes UpsampledLogits as they are, and other logits as before."""
    compute = FUSED[plain.__name__]

    @functools.wraps(plain.forward)
    def forward(self: Any, y_pred: Tensor, y_true: Tensor) -> Tensor:
        loss = compute(self, y_pred, y_true) if isinstance(y_pred, UpsampledLogits) else None
        return plain.forward(self, y_pred, y_true) if loss is None else loss

    return {"forward": forward}


def _soft_cross_entropy(self: Any, logits: UpsampledLogits, target: Tensor) -> Tensor | None:
    if (
        self.reduction not in ("mean", "sum")
        or self.smooth_factor is None
        or self.dim != 1
        or target.shape != (len(logits), *logits.shape[2:])
    ):
        return None
    return upsample_cross_entropy(
        logits.source,
        target,
        ignore_index=NEVER if self.ignore_index is None else self.ignore_index,
        label_smoothing=self.smooth_factor,
        reduction="mean_all" if self.reduction == "mean" else "sum",
        align_corners=logits.align_corners,
    )


FUSED: dict[str, Callable[..., Tensor | None]] = {"SoftCrossEntropyLoss": _soft_cross_entropy}
