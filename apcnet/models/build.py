"""Builds a segmentor with new weights from the names of a model and a backbone."""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apcnet.choices import check_choice
from apcnet.config import check_backbone
from apcnet.data.sample import MEAN, STD
from apcnet.files import printable
from apcnet.models.apc import APCHead
from apcnet.models.enc import EncHead
from apcnet.models.fcn import FCNHead
from apcnet.models.fpn import FPN, FPNHead
from apcnet.models.psp import PSPHead
from apcnet.models.resnet import BLOCKS, ResNetV1c
from apcnet.models.segmentor import Segmentor
from apcnet.models.timm_encoder import TimmEncoder
from apcnet.models.tiny import Tiny
from apcnet.models.uper import UPerHead
from apcnet.models.weights import assign, check

HEADS = {"apcnet": APCHead, "pspnet": PSPHead, "encnet": EncHead, "semantic_fpn": FPNHead, "fcn": FCNHead}
HEADS |= {"upernet": UPerHead}
INITIALISERS = ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_")
BACKBONES = {f"resnet{depth}": functools.partial(ResNetV1c, depth) for depth in BLOCKS} | {"tiny": Tiny}
BACKBONES |= {f"tv:resnet{depth}": functools.partial(ResNetV1c, depth, stem="7x7") for depth in BLOCKS}
PYRAMIDS = (FPNHead, UPerHead)  # heads that read every map of the backbone


def build(model: str, backbone: str = "resnet50", num_classes: int = 150, **options) -> Segmentor:
    """Builds a segmentor with new weights. Its `architecture` attribute holds these arguments.

    Args:
        model: Name of the head: "apcnet", "pspnet", "encnet", "semantic_fpn", "fcn" or "upernet".
        backbone: Name of the backbone: "resnet18", "resnet34", "resnet50", "resnet101" (ResNetV1c), the same with "tv:"
            before it (torchvision's ResNet), "tiny", or "timm:NAME" with the name of a model in timm.
        num_classes: Number of classes.
        options: Keyword arguments of the backbone (`ResNetV1c`, `TimmEncoder`, `Tiny`), of the head (`APCHead`,
            `PSPHead`, `EncHead`, `FPNHead`, `FCNHead`, `UPerHead`), and of the neck, the auxiliary head and the losses
            (`assemble`).
    """
    check_choice(model, "model", HEADS)
    if not _is_a(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes: expected 1 or more, got {printable(num_classes)}")
    if not isinstance(backbone, str):
        raise ValueError(f"backbone: expected the name of a backbone, got {printable(backbone)}")
    if backbone.startswith("timm:"):
        encoder = functools.partial(TimmEncoder, backbone.removeprefix("timm:"), HEADS[model] in PYRAMIDS)
    else:
        check_backbone(backbone)
        encoder = BACKBONES[backbone]
    parts = HEADS[model], encoder
    head_names = set(_options(parts[0])) - {"index", "strides"}  # these two follow from the backbone
    backbone_names = set(_options(parts[1]))
    known = sorted({*_options(assemble), *_options(Segmentor), *head_names, *backbone_names})
    kinds = {name: kind for part in (assemble, Segmentor, *parts) for name, kind in _kinds(part).items()}
    for name, value in options.items():
        check_choice(name, f"option of {model} on {backbone}", known)
        if not _is_a(value, kinds[name]):
            expected = getattr(kinds[name], "__name__", None) or str(kinds[name]).removeprefix("collections.abc.")
            raise ValueError(f"{name}: expected {expected}, got {printable(value)}")
    head_options, backbone_options, others = (
        {name: value for name, value in options.items() if name in names}
        for names in (head_names, backbone_names, options.keys() - head_names - backbone_names)
    )
    segmentor = assemble(*parts, num_classes, head_options, backbone_options, **others)
    channels = segmentor.in_channels
    segmentor.mean = _for_channels(getattr(segmentor.backbone, "mean", MEAN), channels)
    segmentor.std = _for_channels(getattr(segmentor.backbone, "std", STD), channels)
    segmentor.architecture = {"model": model, "backbone": backbone, "num_classes": num_classes, **options}
    return segmentor


def build_filled(
    architecture: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
    names: Callable[[nn.Module], Mapping[str, Tensor]] = nn.Module.state_dict,
) -> Segmentor:
    """Builds a segmentor with given weights, and takes memory for it only if their names and shapes match.

    Args:
        architecture: Arguments of `build`.
        tensors: All weights of the model.
        source: Where they come from, for the error message.
        names: Function that returns the model's tensors by the names that `tensors` has.
    """
    if str(architecture.get("backbone")).startswith("timm:"):  # computes buffers that no file holds
        model = build(**architecture)
        check(names(model), tensors, source)
    else:
        with torch.device("meta"), _Uninitialised():
            model = build(**architecture)
        check(names(model), tensors, source)
        model.to_empty(device="cpu")
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.zero_()
    assign(names(model), tensors, source)
    return model


class _Uninitialised(TorchFunctionMode):
    """Leaves out the random initialisation of weights, which on the meta device takes seconds to import."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


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
    if head in PYRAMIDS:
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


def _kinds(function: Callable) -> dict[str, Any]:
    """Returns the declared types of a part's options."""
    function = function.func if isinstance(function, functools.partial) else function
    return typing.get_type_hints(function.__init__ if isinstance(function, type) else function)


def _is_a(value: Any, kind: Any) -> bool:
    """Checks a value against a declared type, as far as the options of `build` have any."""
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is Sequence:
        return isinstance(value, list | tuple) and all(_is_a(one, *typing.get_args(kind)) for one in value)
    if kind is int:
        return hasattr(value, "__index__") and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)
