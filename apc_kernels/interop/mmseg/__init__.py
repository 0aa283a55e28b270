"""Speeds up a live mmsegmentation model in place."""

import sys

from torch import nn

from apc_kernels.interop.report import Report


def accelerate(model: nn.Module, *, labels_only: bool = False) -> Report:
    """Speeds up a live mmsegmentation model in place, with the same outputs, losses, gradients and statistics.

    APCHead, PSPHead, EncHead and its parts, FCNHead, FPNHead and UPerHead get a class that runs on apc_kernels, if
    their layers allow it, and so do the convolutions of backbone and neck. Other modules stay as they are. Parameters,
    buffers, their names, the names of losses, deepcopy and pickle are unchanged (reading such a pickle needs this
    package). Later changes to the model, such as a hook or a replaced layer, take effect: every call checks for them.

    The function can be called again; the last call sets labels_only.

    Args:
        model: An mmsegmentation 1.x EncoderDecoder, a decode head, or a module that holds them (test-time augmentation,
            DDP).
        labels_only: Predict pred_sem_seg without seg_logits, which saves their upsampling. Not possible with test-time
            augmentation, which averages the logits. The default is False.

    Returns:
        A report of the replaced methods, and of those that were left with the reason.

    Example:
        >>> model = mmseg.apis.init_model("config.py", "checkpoint.pth")
        >>> print(apc_kernels.accelerate(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an mmsegmentation model, got {type(model).__name__}")
    mmseg = sys.modules.get("mmseg")  # building the model imported it
    if mmseg is None:
        raise ValueError(f"model: expected an mmsegmentation model, got {type(model).__name__}; mmseg is not imported")
    if int(mmseg.__version__.split(".")[0]) < 1:
        raise ValueError(f"model: expected a model of mmsegmentation 1.x, got {mmseg.__version__}")

    from mmengine.model import BaseTTAModel
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.models.segmentors import BaseSegmentor

    from apc_kernels.interop.mmseg import fused, obstacles

    augmented = any(isinstance(module, BaseTTAModel) for module in model.modules())
    needs_logits = "test-time augmentation reads the logits" if augmented else None
    if not labels_only:
        needs_logits = "labels_only is False"
    report = Report()
    for name, module in model.named_modules():
        plain = fused.PLAIN.get(type(module), type(module))
        if plain in fused.CLASSES:
            module.__class__ = plain  # an earlier call may have found other obstacles
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
            report.left[name or "model"] = f"{plain.__name__} has no fused version"
        if isinstance(module, BaseSegmentor):
            for part in ("backbone", "neck"):
                convolutions = _convolutions(getattr(module, part, None), fused.FusedConvolution)
                for convolution in convolutions:
                    convolution.__class__ = fused.FusedConvolution
                if convolutions:
                    report.swapped[_place(name, part)] = f"FusedConvolution, {len(convolutions)} times"
                elif hasattr(module, part):
                    report.left[_place(name, part)] = "it has no plain convolutions"
    if not (report.swapped or report.left):
        raise ValueError(f"model: expected an mmsegmentation model, got {type(model).__name__}")
    return report


def _convolutions(part: nn.Module | None, fused: type[nn.Module]) -> list[nn.Module]:
    """Returns the convolutions of a part whose forward is PyTorch's, or was replaced before."""
    return [m for m in part.modules() if type(m) in (nn.Conv2d, fused)] if part is not None else []


def _place(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
