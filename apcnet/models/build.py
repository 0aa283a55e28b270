"""From the names of a model and a backbone to a segmentor with fresh weights."""

import inspect
from collections.abc import Callable

from torch import nn

from apcnet.choices import check_choice
from apcnet.models.apc import APCHead
from apcnet.models.enc import EncHead
from apcnet.models.fcn import FCNHead
from apcnet.models.fpn import FPN, FPNHead
from apcnet.models.psp import PSPHead
from apcnet.models.resnet import BLOCKS, ResNetV1c
from apcnet.models.segmentor import Segmentor

HEADS = {"apcnet": APCHead, "pspnet": PSPHead, "encnet": EncHead, "semantic_fpn": FPNHead, "fcn": FCNHead}
BACKBONES = {f"resnet{depth}": depth for depth in BLOCKS}


def build(model: str, backbone: str = "resnet50", num_classes: int = 150, **options) -> Segmentor:
    """A segmentor with fresh weights; its `architecture` are these arguments.

    Args:
        model: apcnet, pspnet, encnet, semantic_fpn or fcn.
        backbone: resnet18, resnet34, resnet50 or resnet101, all of them ResNetV1c.
        num_classes: how many there are to tell apart.
        options: of the backbone (output_stride, width, stem_width: see ResNetV1c), of the neck and the auxiliary head
            (see assemble), and of the head (see APCHead, PSPHead, EncHead, FPNHead, FCNHead).
    """
    check_choice(model, "model", HEADS)
    check_choice(backbone, "backbone", BACKBONES)
    if num_classes < 1:
        raise ValueError(f"num_classes: expected one at least, got {num_classes}")
    head = HEADS[model]
    of_head = set(_options(head)) - {"index", "strides"}  # these follow from the backbone
    for name in options:
        check_choice(name, f"option of {model}", sorted({*_options(assemble), *of_head}))
    head_options = {name: value for name, value in options.items() if name in of_head}
    others = {name: value for name, value in options.items() if name not in of_head}
    segmentor = assemble(head, BACKBONES[backbone], num_classes, head_options, **others)
    segmentor.architecture = {"model": model, "backbone": backbone, "num_classes": num_classes, **options}
    return segmentor


def assemble(
    head: type[nn.Module],
    depth: int,
    num_classes: int,
    head_options: dict,
    *,
    output_stride: int | None = None,
    width: int = 64,
    stem_width: int = 64,
    neck_channels: int = 256,
    neck_norm: bool = False,
    auxiliary_channels: int | None = None,
    auxiliary_weight: float = 0.4,
    presence_weight: float = 0.2,
    reduction: str = "mean_all",
) -> Segmentor:
    """
    Args:
        output_stride: 8, 16 or 32; where nothing is said 8, and 32 for Semantic FPN.
        neck_channels, neck_norm: of Semantic FPN's neck.
        auxiliary_channels: of the auxiliary head, 0 for none; where nothing is said 256, and none for Semantic FPN.
        auxiliary_weight, presence_weight: of these two losses beside the main one.
        reduction: of the cross entropies where none is asked for, as in Segmentor.forward.
    """
    pyramid = head is FPNHead
    backbone = ResNetV1c(
        depth, output_stride=output_stride or (32 if pyramid else 8), width=width, stem_width=stem_width
    )
    channels, neck = backbone.channels, None
    if pyramid:
        neck = FPN(channels, neck_channels, norm=neck_norm)
        channels = neck.channels
        head_options = {"strides": backbone.strides, **head_options}
    elif neck_norm or neck_channels != 256:
        raise ValueError("neck_channels, neck_norm: expected with semantic_fpn alone, the others have no neck")
    index = inspect.signature(head).parameters["index"].default
    in_channels = channels[index] if isinstance(index, int) else [channels[i] for i in index]
    if auxiliary_channels is None:
        auxiliary_channels = 0 if pyramid else 256
    auxiliary = None
    if auxiliary_channels:
        like_head = {name: head_options[name] for name in ("dropout", "align_corners") if name in head_options}
        auxiliary = FCNHead(
            channels[2], num_classes, channels=auxiliary_channels, convs=1, concat=False, index=2, **like_head
        )
    return Segmentor(
        backbone,
        head(in_channels, num_classes, **head_options),
        neck=neck,
        auxiliary=auxiliary,
        auxiliary_weight=auxiliary_weight,
        presence_weight=presence_weight,
        reduction=reduction,
    )


def _options(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
