"""A live mmsegmentation model sped up in place."""

import sys
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Report:
    """What accelerate() has done, by the names of methods in the model. Printed, one line each."""

    swapped: dict[str, str] = field(default_factory=dict)  # the method: the class it is now of
    left: dict[str, str] = field(default_factory=dict)  # the method or module: why it is as it was

    def __str__(self) -> str:
        lines = [f"swapped  {name}: now {cls}" for name, cls in self.swapped.items()]
        return "\n".join(lines + [f"left     {name}: {reason}" for name, reason in self.left.items()])


def accelerate(model: nn.Module, *, labels_only: bool = False) -> Report:
    """Speeds up a live mmsegmentation model, in place: same outputs, losses, gradients and running statistics.

    Modules of the types APCHead, PSPHead, EncHead (and its parts), FCNHead and FPNHead become of a class that runs on
    apc_kernels, where what they are made of allows it; all else is left alone, and the report says why. Parameters,
    buffers, their names, the names of losses, deepcopy and pickle are untouched (a pickle needs this package to be
    read). What is altered afterwards, by a hook or another layer say, takes effect: it is looked for in every call.

    Args:
        model: an EncoderDecoder, a decode head, or what holds them (test-time augmentation, DDP).
        labels_only: predictions hold pred_sem_seg and no seg_logits, whose upsampling is then left out. Not for
            test-time augmentation, which averages those logits.

    Accelerating again is harmless; the last call decides about labels_only.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an mmsegmentation model, got {type(model).__name__}")
    mmseg = sys.modules.get("mmseg")  # a live model has imported it
    if mmseg is None:
        raise ValueError(f"model: expected an mmsegmentation model, got {type(model).__name__}, and no mmseg is loaded")
    if int(mmseg.__version__.split(".")[0]) < 1:
        raise ValueError(f"model: expected a model of mmsegmentation 1.x, got one of {mmseg.__version__}")

    from mmengine.model import BaseTTAModel
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.models.segmentors import BaseSegmentor

    from apcnet.interop.mmseg import fused, obstacles

    augmented = any(isinstance(module, BaseTTAModel) for module in model.modules())
    needs_logits = "test-time augmentation reads the logits" if augmented else None
    if not labels_only:
        needs_logits = "labels_only is not asked for"
    report = Report()
    for name, module in model.named_modules():
        plain = fused.PLAIN.get(type(module), type(module))
        if plain in fused.CLASSES:
            module.__class__ = plain  # the obstacles of today, whatever an earlier call has found
            found = obstacles.of_module(module)
            if needs_logits and isinstance(module, BaseSegmentor):
                found = dict.fromkeys(found, needs_logits)
            if None in found.values():
                module.__class__ = fused.CLASSES[plain]
            for method, obstacle in found.items():
                if obstacle is None:
                    report.swapped[_place(name, method)] = type(module).__name__
                else:
                    report.left[_place(name, method)] = obstacle
        elif isinstance(module, BaseDecodeHead | BaseSegmentor):
            report.left[name or "model"] = f"a {plain.__name__} has no fused counterpart"
        if isinstance(module, BaseSegmentor):
            for part in ("backbone", "neck"):
                if hasattr(module, part):
                    report.left[_place(name, part)] = "only heads and their losses are fused"
    if not (report.swapped or report.left):
        raise ValueError(f"model: expected an mmsegmentation model, got {type(model).__name__}")
    return report


def _place(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
