"""Speeds up live models and losses of segmentation_models_pytorch, which returns logits at the images' size on purpose.

A call of this file's `accelerate` says that the logits go to a loss or an argmax.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from apc_kernels.interop import smp_losses
from apc_kernels.interop.report import Report
from apc_kernels.interop.swap import fused_class, package_of, plain_class
from apc_kernels.interop.upsampled import Deferred, can_defer

PACKAGE = "segmentation_models_pytorch"


def accelerate(model: nn.Module) -> Report:
    """Speeds up a live model or loss of segmentation_models_pytorch in place, with the same values and gradients.

    Models: the logits are upsampled when something reads them. F.cross_entropy, their argmax over the classes and the
    losses below do without. Losses: DiceLoss, JaccardLoss, TverskyLoss, FocalLoss, SoftBCEWithLogitsLoss and
    SoftCrossEntropyLoss take such logits as they are; any other logits, and soft targets, as before.

    Args:
        model: A model or a loss, or a module that holds them.

    Returns:
        A report of the replaced methods, and of those that were left with the reason.

    Example:
        >>> model, loss = smp.FPN("resnet34", classes=19), smp.losses.DiceLoss("multiclass")
        >>> print(apc_kernels.interop.smp.accelerate(model), apc_kernels.interop.smp.accelerate(loss))
        >>> loss(model(images), target).backward()
    """
    report = Report()
    for name, module in model.named_modules():
        plain = plain_class(type(module))
        if hasattr(module, "segmentation_head") and any(package_of(base) == PACKAGE for base in plain.__mro__):
            head = module.segmentation_head
            obstacle = _obstacle(head)
            if obstacle is None:
                head.__class__ = fused_class(plain_class(type(head)), head_methods)
            place = f"{name}.segmentation_head" if name else "segmentation_head"
            report.add(place, "forward", plain_class(type(head)), obstacle)
        elif plain.__module__.startswith(f"{PACKAGE}.losses"):
            obstacle = smp_losses.obstacle(module, plain)
            if obstacle is None:
                module.__class__ = fused_class(plain, smp_losses.methods)
            report.add(name, "forward", plain, obstacle)
    if not (report.swapped or report.left):
        raise ValueError(f"model: expected a model or loss of {PACKAGE}, got {type(model).__name__}")
    return report


def leave(model: nn.Module) -> Report:
    """Reports that models of segmentation_models_pytorch are left alone without an explicit call."""
    report = Report()
    for name, module in model.named_modules():
        if hasattr(module, "segmentation_head"):
            place = f"{name}.segmentation_head" if name else "segmentation_head"
            report.left[place] = (
                "the logits are returned at the images' size on purpose; apc_kernels.interop.smp.accelerate(model) "
                "upsamples them when something reads them"
            )
    return report


def head_methods(plain: type) -> dict[str, Callable[..., Any]]:
    """Makes the forward method of a segmentation head that defers its upsampling."""

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not can_defer():
            return plain.forward(self, *args, **kwargs)
        with Deferred():
            return plain.forward(self, *args, **kwargs)

    return {"forward": forward}


def _obstacle(head: nn.Module) -> str | None:
    """Returns the reason why the upsampling of a head cannot be deferred, or None."""
    plain = plain_class(type(head))
    layers = [layer for layer in head.modules() if not list(layer.children())]
    if package_of(plain) != PACKAGE:
        return f"{plain.__name__} is not a class of {PACKAGE}, and may compute something else"
    if "forward" in vars(head):
        return "forward is overridden on the instance"
    upsamples = any(isinstance(layer, nn.Upsample) and layer.mode == "bilinear" for layer in layers)
    if not upsamples and "interpolate" not in plain.forward.__code__.co_names:
        return "it does not upsample"
    if not isinstance(layers[-1], nn.Identity):
        return f"an activation, {type(layers[-1]).__name__}, reads the upsampled logits"
    return None
