"""Builds a segmentor with new weights from the names of a model and a backbone."""

import functools
import inspect
from collections.abc import Callable

from torch import nn

from apcnet.choices import check_choice
from apcnet.data.sample import MEAN, STD
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
    """Builds a segmentor with new weights. Its `architecture` attribute holds these arguments.

    Args:
        model: Name of the head: "apcnet", "pspnet", "encnet", "semantic_fpn" or "fcn".
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "tiny".
        num_classes: Number of classes.
        options: Keyword arguments of the backbone (`ResNetV1c`, `Tiny`), of the head (`APCHead`, `PSPHead`, `EncHead`,
            `FPNHead`, `FCNHead`), and of the neck, the auxiliary head and the losses (`assemble`).
    """
    check_choice(model, "model", HEADS)
    check_choice(backbone, "backbone", BACKBONES)
    if num_classes < 1:
        raise ValueError(f"num_classes: expected 1 or more, got {num_classes}")
    parts = HEADS[model], BACKBONES[backbone]
    head_names = set(_options(parts[0])) - {"index", "strides"}  # these two follow from the backbone
    backbone_names = set(_options(parts[1]))
    known = sorted({*_options(assemble), *_options(Segmentor), *head_names, *backbone_names})
    for name in options:
        check_choice(name, f"option of {model} on {backbone}", known)
    head_options, backbone_options, others = (
        {name: value for name, value in options.items() if name in names}
        for names in (head_names, backbone_names, options.keys() - head_names - backbone_names)
    )
    segmentor = assemble(*parts, num_classes, head_options, backbone_options, **others)
    channels = segmentor.in_channels
    segmentor.mean, segmentor.std = (_for_channels(values, channels) for values in (MEAN, STD))
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
    """Joins a head, a backbone, the neck and the auxiliary head to a segmentor.

    Args:
        head: Class of the head.
        make_backbone: Function that builds the backbone from `backbone_options`.
        num_classes: Number of classes.
        head_options: Keyword arguments of the head.
        backbone_options: Keyword arguments of the backbone.
        neck_channels: Number of channels of Semantic FPN's neck.
        neck_norm: Use batch norm and ReLU in Semantic FPN's neck.
        auxiliary_channels: Number of channels of the auxiliary head; 0 builds none. The default is 256, or 0 for
            Semantic FPN.
        losses: Keyword arguments of `Segmentor`: auxiliary_weight, presence_weight and reduction.
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
        raise ValueError("neck_channels, neck_norm: expected only with model semantic_fpn; other models have no neck")
    index = inspect.signature(head).parameters["index"].default
    in_channels = channels[index] if isinstance(index, int) else [channels[i] for i in index]
    if auxiliary_channels is None:
        auxiliary_channels = 0 if pyramid else 256
    auxiliary = None
    if auxiliary_channels:
        shared_options = {name: head_options[name] for name in ("dropout", "align_corners") if name in head_options}
        auxiliary = FCNHead(
            channels[2], num_classes, channels=auxiliary_channels, convs=1, concat=False, index=2, **shared_options
        )
    return Segmentor(backbone, head(in_channels, num_classes, **head_options), neck, auxiliary, **losses)


def _for_channels(rgb: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Returns values for images of this number of channels: grey images take the mean, others repeat the RGB values."""
    return (sum(rgb) / len(rgb),) if channels == 1 else tuple(rgb[i % len(rgb)] for i in range(channels))


def _options(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
