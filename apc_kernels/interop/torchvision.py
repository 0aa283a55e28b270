"""Speeds up live segmentation models of torchvision: DeepLabV3, FCN and LRASPP."""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from apc_kernels.interop.report import Report
from apc_kernels.interop.swap import fused_class, package_of, plain_class
from apc_kernels.interop.upsampled import Deferred, can_defer


def accelerate(model: nn.Module) -> Report:
    """Speeds up DeepLabV3, FCN and LRASPP in place: their outputs are upsampled when something reads them.

    F.cross_entropy and argmax of the outputs run on the logits before upsampling.
    """
    report = Report()
    segmentation = sys.modules["torchvision.models.segmentation"]
    known = (segmentation.DeepLabV3, segmentation.FCN, segmentation.LRASPP)
    for name, module in model.named_modules():
        plain = plain_class(type(module))
        if isinstance(module, known):
            obstacle = None
            if package_of(plain) != "torchvision":
                obstacle = f"{plain.__name__} is not a class of torchvision, and may compute something else"
            elif "forward" in vars(module):
                obstacle = "forward is overridden on the instance"
            else:
                module.__class__ = fused_class(plain, deferring_methods)
            report.add(name, "forward", plain, obstacle)
    return report


def deferring_methods(plain: type) -> dict[str, Callable[..., Any]]:
    """Makes the forward method that defers the upsampling to the size of the images."""

    @functools.wraps(plain.forward)
    def forward(self: Any, images: Any) -> Any:
        if type(images) is not Tensor or not can_defer():
            return plain.forward(self, images)
        with Deferred(images.shape[-2:]):
            return plain.forward(self, images)

    def prepare_scriptable(self: Any) -> Any:
        twin = copy.copy(self)
        twin.__class__ = plain
        return twin

    return {"forward": forward, "__prepare_scriptable__": prepare_scriptable}
