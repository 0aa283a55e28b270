"""timm's resnet50c and resnet101c, which are ResNetV1c by other names."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from apcnet.choices import check_choice

NAMES = ("resnet50c", "resnet101c")


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to ours: only the stem differs. Without the classifier; others' names are left as they are."""
    if "conv1.0.weight" not in tensors:
        return dict(tensors)
    names = {name: re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", name)) for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}


def weights(name: str) -> dict[str, Tensor]:
    """The ImageNet weights that timm has under this name, by our names."""
    check_choice(name, "backbone_weights, timm:", NAMES)
    try:
        import timm
    except ImportError:
        raise ImportError(
            f"backbone_weights: timm:{name} needs timm, which is not installed: pip install timm"
        ) from None
    with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
        return renamed(timm.create_model(name, pretrained=True).state_dict())
