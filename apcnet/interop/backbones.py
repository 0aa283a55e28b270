"""ImageNet weights of ResNetV1c from wherever they are: mmsegmentation's files, timm, models saved here.

timm's resnet50c and resnet101c are ResNetV1c by other names; only the stem differs.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from apcnet.choices import check_choice
from apcnet.interop import pickles

TIMM = ("resnet50c", "resnet101c")


def read(source: str | Path) -> dict[str, Tensor]:
    """A backbone's tensors by our names, from a file or from "timm:resnet50c".

    A file may hold a whole model, ours or mmsegmentation's, or a backbone with its ImageNet classifier.
    """
    if str(source).startswith("timm:"):
        return _from_timm(str(source).removeprefix("timm:"))
    if not Path(source).is_file():
        raise FileNotFoundError(f"backbone_weights: there is no file {source}")
    return _of_backbone(pickles.read(source))


def _from_timm(name: str) -> dict[str, Tensor]:
    check_choice(name, "backbone_weights, timm:", TIMM)
    try:
        import timm
    except ImportError:
        raise ImportError(
            f"backbone_weights: timm:{name} needs timm, which is not installed: pip install timm"
        ) from None
    with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
        return _of_backbone(timm.create_model(name, pretrained=True).state_dict())


def _of_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a file's tensors is the backbone's, by our names."""
    tensors = tensors.get("state_dict", tensors)
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    inner = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    if not inner:
        inner = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    if "conv1.0.weight" in inner:  # timm's stem
        inner = {re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", name)): t for name, t in inner.items()}
    return inner
