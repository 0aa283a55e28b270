"""ImageNet weights of ResNetV1c from wherever they are: mmsegmentation's files, timm, models saved here."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from apcnet.interop import pickles, timm


def read(source: str | Path) -> dict[str, Tensor]:
    """A backbone's tensors by our names, from a file or from "timm:resnet50c".

    A file may hold a whole model, ours or mmsegmentation's, or a backbone with its ImageNet classifier.
    """
    if str(source).startswith("timm:"):
        return timm.weights(str(source).removeprefix("timm:"))
    if not Path(source).is_file():
        raise FileNotFoundError(f"backbone_weights: there is no file {source}")
    return of_backbone(pickles.read(source))


def of_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a file's tensors is the backbone's, by our names."""
    tensors = tensors.get("state_dict", tensors)
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    inner = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    if not inner:
        inner = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    return timm.renamed(inner)
