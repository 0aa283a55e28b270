"""From the names of a model and a backbone to a segmentor with fresh weights."""

import functools
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
from apcnet.models.tiny import Tiny

HEADS = {"apcnet": APCHead, "pspnet": PSPHead, "encnet": EncHead, "semantic_fpn": FPNHead, "fcn": FCNHead}
BACKBONES = {f"resnet{depth}": functools.partial(ResNetV1c, depth) for depth in BLOCKS} | {"tiny": Tiny}


def build(model: str, backbone: str = "resnet50", num_classes: int = 150, **options) -> Segmentor:
    """A segmentor with fresh weights, of one of HEADS on one of BACKBONES; its `architecture` are these arguments.

    Options are those of the backbone (see ResNetV1c, Tiny), of the neck and the auxiliary head (see assemble), and of
    the head (see APCHead, PSPHead, EncHead, FPNHead, FCNHead).
    """
    check_choice(model, "model", HEADS)
    check_choice(backbone, "backbone", BACKBONES)
    if num_classes < 1:
        raise ValueError(f"num_classes: expected one at least, got {num_classes}")
    parts = HEADS[model], BACKBONES[backbone]
    of_head = set(_options(parts[0])) - {"index", "strides"}  # these follow from the backbone
    of_backbone = set(_options(parts[1]))
    known = sorted({*_options(assemble), *_options(Segmentor), *of_head, *of_backbone})
    for name in options:
        check_choice(name, f"option of {model} on {backbone}", known)
    head_options, backbone_options, others = (
        {name: value for name, value in options.items() if name in names}
        for names in (of_head, of_backbone, options.keys() - of_head - of_backbone)
    )
    segmentor = assemble(*parts, num_classes, head_options, backbone_options, **others)
    segmentor.architecture = {"model": model, "backbone": backbone, "num_classes": num_classes, **options}
    return segmentor


def assemble(
    head: type[nn.Module],
    make_backbone: Callable[..., nn.Module],
    num_classes: int,
    head_options: dict,
    backbone_options: dict,
    *,
    neck_channels: int = 256,
    neck_norm: bool = False,
    auxiliary_channels: int | None = None,
    **losses,
) -> Segmentor:
    """
    Args:
        neck_channels, neck_norm: of Semantic FPN's neck.
        auxiliary_channels: of the auxiliary head, 0 for none; where nothing is said 256, and none for Semantic FPN.
        losses: auxiliary_weight and presence_weight of the two beside the main one; and the reduction of the cross
            entropies where none is asked for, as in Segmentor.forward.
    """
    pyramid = head is FPNHead
    if pyramid:
        backbone_options = {"output_stride": 32, **backbone_options}
    backbone = make_backbone(**backbone_options)
    channels, neck = backbone.channels, None
    if pyramid:
        neck = FPN(channels, neck_channels, norm=neck_norm)
        channels = [neck_channels] * len(channels)
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
    return Segmentor(backbone, head(in_channels, num_classes, **head_options), neck, auxiliary, **losses)


def _options(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
