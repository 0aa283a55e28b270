"""Loads pretrained weights into a backbone: from files of mmsegmentation, torchvision and timm, or by these packages.

timm's resnet50c and resnet101c are ResNetV1c, torchvision's ResNets are ours with a 7×7 stem; only names differ.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apcnet.choices import check_choice
from apcnet.interop import pickles
from apcnet.models.resnet import BLOCKS, ResNetV1c
from apcnet.models.timm_encoder import TimmEncoder, package
from apcnet.models.weights import assign

FROM_TIMM = ("resnet50c", "resnet101c")
FROM_TORCHVISION = tuple(f"resnet{depth}" for depth in BLOCKS)
RGB = 3


def load(backbone: nn.Module, source: str | Path) -> None:
    """Loads pretrained weights into a backbone.

    Args:
        backbone: A backbone of `apcnet.create`.
        source: A file, "timm:resnet50c", "timm:resnet101c" or "tv:resnet50" (and other depths). A file may hold a whole
            model, of apcnet or of mmsegmentation, or a backbone with its ImageNet classifier. An encoder of timm takes
            a file, "timm" for its own pretrained weights, or "timm:NAME" for others of the same architecture.
    """
    kind, _, name = str(source).partition(":")
    if isinstance(backbone, TimmEncoder):
        if kind == "timm":
            backbone.load_pretrained(name)
        else:
            _into_encoder(backbone, _of_backbone(_read(source, "timm, timm:NAME")), str(source))
        return
    if kind == "timm":
        tensors = _from_timm(name)
    elif kind == "tv":
        tensors = _from_torchvision(name)
    else:
        known = (f"{kind}:{name}" for kind, names in (("timm", FROM_TIMM), ("tv", FROM_TORCHVISION)) for name in names)
        tensors = _read(source, ", ".join(known))
    tensors = _of_resnet(_of_backbone(tensors)) if isinstance(backbone, ResNetV1c) else _of_backbone(tensors)
    _check_stem(backbone, tensors, source)
    stem = "stem.0.weight"
    if tensors.get(stem, torch.empty(0)).dim() == 4 and tensors[stem].shape[1] == RGB != backbone.in_channels:
        tensors[stem] = adapted(tensors[stem], backbone.in_channels)
    assign(backbone.state_dict(), tensors, f"backbone_weights: {source}")


def adapted(weight: Tensor, channels: int) -> Tensor:
    """Adapts the RGB weights (O, 3, k, k) of a first convolution to another number of channels, as timm does.

    One channel takes the sum of the three. More channels take them in turn, times 3 / channels, which keeps the size of
    the results.
    """
    if channels == 1:
        return weight.sum(1, keepdim=True)
    turns = [i % RGB for i in range(channels)]
    return weight[:, turns] * (RGB / channels)


def _read(source: str | Path, others: str) -> dict[str, Any]:
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"backbone_weights: expected a file or one of {others}, got {source}: there is no such file"
        )
    return pickles.weights(pickles.read(source), source)


def _from_timm(name: str) -> dict[str, Tensor]:
    check_choice(name, "backbone_weights: timm", FROM_TIMM)
    with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
        make = package().create_model
        try:
            return make(name, pretrained=True).state_dict()
        except Exception as error:  # a download raises the errors of several packages
            raise OSError(
                f"backbone_weights: timm could not load {name} ({type(error).__name__}: {error}); try again, or give a "
                "file: --backbone-weights FILE"
            ) from error


def _from_torchvision(name: str) -> dict[str, Tensor]:
    check_choice(name, "backbone_weights: tv", FROM_TORCHVISION)
    try:
        import torchvision
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"backbone_weights: tv:{name} needs the package torchvision; install it: pip install torchvision"
        ) from None
    return torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)


def _of_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects the backbone's tensors of a file."""
    inner = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    return inner or tensors


def _of_resnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a ResNet to the names of `ResNetV1c`, without the ImageNet classifier."""
    norm = 7 if "conv1.0.weight" in tensors else 1  # position of the batch norm after the stem's last convolution
    stem = r"stem." if norm == 7 else r"stem.0."
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    return {re.sub(r"^bn1\.", f"stem.{norm}.", re.sub(r"^conv1\.", stem, name)): t for name, t in tensors.items()}


def _check_stem(backbone: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises an error that tells the option to add, if weights are those of the other stem."""
    if isinstance(backbone, ResNetV1c) and "stem.0.weight" in tensors:
        deep = "stem.3.weight" in backbone.state_dict()
        if deep != ("stem.3.weight" in tensors):
            kinds = {True: "deep", False: "7x7"}
            raise ValueError(
                f"backbone_weights: expected weights of a ResNet with the stem {kinds[deep]}, got {source} with the "
                f"stem {kinds[not deep]}; add stem={kinds[not deep]!r} (--stem {kinds[not deep]})"
            )


def _into_encoder(encoder: TimmEncoder, tensors: dict[str, Tensor], source: str) -> None:
    """Loads a file of weights by the names of our encoder, of its body, or of timm's classifier."""
    for part in (encoder, encoder.body):
        if tensors.keys() == part.state_dict().keys():
            return assign(part.state_dict(), tensors, f"backbone_weights: {source}")
    try:
        return encoder.load_pretrained(tensors=tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"backbone_weights: expected weights of timm:{encoder.name}, got {source}: {reason}") from None
