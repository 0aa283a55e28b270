"""Speeds up live models of other packages in place; importing it imports none of them."""

import importlib
from typing import Any

from torch import nn

from apc_kernels.interop.report import Report
from apc_kernels.interop.swap import package_of

__all__ = ["Report", "accelerate"]


def accelerate(model: Any, *, labels_only: bool = False) -> Report:
    """Speeds up a live model of another package in place, with the same outputs, losses and gradients.

    - transformers: the loss of models for semantic segmentation (SegFormer, DPT, BEiT, Data2VecVision, MobileViT,
      MobileNetV2, UperNet and others whose `forward` upsamples logits to the size of `labels`), and the pyramid pooling
      of UPerNet's heads. Of image processors, post_process_semantic_segmentation.
    - torchvision: DeepLabV3, FCN and LRASPP, whose outputs are upsampled when something reads them. F.cross_entropy and
      argmax of these outputs do without.
    - mmsegmentation 1.x: APCHead, PSPHead, EncHead, FCNHead, FPNHead and UPerHead, and their losses.
    - segmentation_models_pytorch: left alone; `apc_kernels.interop.smp.accelerate` is for its models and losses.

    Objects get a class of the same name. Parameters, buffers, their names, deepcopy, pickle and save_pretrained are
    unchanged (reading such a pickle needs this package). Modules that were altered, subclasses of other packages and
    modules with a `forward` of their own stay as they are. Compiled and exported models compute as before.

    The function can be called again; for mmsegmentation the last call sets labels_only.

    Args:
        model: A model, a module that holds one, or an image processor of transformers.
        labels_only: mmsegmentation only: predict pred_sem_seg without seg_logits, which saves their upsampling. Not
            possible with test-time augmentation, which averages the logits. The default is False.

    Returns:
        A report of the replaced methods, and of those that were left with the reason.

    Example:
        >>> model = transformers.SegformerForSemanticSegmentation.from_pretrained("folder")
        >>> print(apc_kernels.accelerate(model))
    """
    modules = model.modules() if isinstance(model, nn.Module) else [model]
    packages = {package_of(base) for cls in {type(module) for module in modules} for base in cls.__mro__}
    report = Report()
    if "mmseg" in packages:
        _extend(report, _file_for("mmseg").accelerate(model, labels_only=labels_only))
    elif labels_only:
        raise ValueError(f"labels_only: expected False without a model of mmsegmentation, got {labels_only}")
    if "transformers" in packages:
        _extend(report, _file_for("transformers").accelerate(model))
    if "torchvision" in packages:
        _extend(report, _file_for("torchvision").accelerate(model))
    if "segmentation_models_pytorch" in packages:
        _extend(report, _file_for("smp").leave(model))
    if not (report.swapped or report.left):
        raise ValueError(
            "model: expected parts of mmsegmentation, transformers, torchvision or segmentation_models_pytorch that "
            f"segment images, got {type(model).__name__}"
        )
    return report


def _file_for(name: str) -> Any:
    """Imports the file for a package. Its models are live, so that package is imported already."""
    return importlib.import_module(f"apc_kernels.interop.{name}")


def _extend(report: Report, found: Report) -> None:
    report.swapped.update(found.swapped)
    report.left.update(found.left)
