"""Reads ImageNet weights of ResNetV1c from mmsegmentation's files, from timm and from saved models.

timm's resnet50c and resnet101c are ResNetV1c; only the names in the stem differ.
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
    """Reads a backbone's weights and returns them by the names of `ResNetV1c`.

    Args:
        source: A file, or "timm:resnet50c" or "timm:resnet101c". A file may hold a whole model, of apcnet or of
            mmsegmentation, or a backbone with its ImageNet classifier.
    """
    if str(source).startswith("timm:"):
        return _from_timm(str(source).removeprefix("timm:"))
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"backbone_weights: expected a file or one of {', '.join(f'timm:{name}' for name in TIMM)}, "
            f"got {source}: there is no such file"
        )
    return _of_backbone(pickles.read(source))


def _from_timm(name: str) -> dict[str, Tensor]:
    check_choice(name, "backbone_weights: timm", TIMM)
    try:
        import timm
    except ImportError:
        raise ModuleNotFoundError(
            f"backbone_weights: timm:{name} needs the package timm; install it: pip install timm"
        ) from None
    with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
        try:
            return _of_backbone(timm.create_model(name, pretrained=True).state_dict())
        except Exception as error:  # a download raises the errors of several packages
            raise OSError(
                f"backbone_weights: timm could not load {name} ({type(error).__name__}: {error}); try again, or give a "
                "file: --backbone-weights FILE"
            ) from error


def _of_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects the backbone's tensors of a file and renames them."""
    tensors = tensors.get("state_dict", tensors)
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    inner = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    if not inner:
        inner = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    if "conv1.0.weight" in inner:  # timm's stem
        inner = {re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", name)): t for name, t in inner.items()}
    return inner
