"""Models by name and from files: `create` and `load`."""

import json
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from apcnet.interop import backbones
from apcnet.models import Segmentor, build
from apcnet.models.weights import assign, listed

DECIDES = ("head.classifier.conv.", "auxiliary.classifier.conv.", "head.presence.")  # whose shapes go with the classes


def create(
    model: str,
    backbone: str = "resnet50",
    num_classes: int = 150,
    backbone_weights: str | Path | None = None,
    **options,
) -> Segmentor:
    """A model with fresh weights, and those of a backbone that was trained on images if one is named.

    Args:
        model: apcnet, pspnet, encnet, semantic_fpn or fcn.
        backbone: resnet18, resnet34, resnet50 or resnet101 (ResNetV1c), or tiny.
        num_classes: how many there are to tell apart.
        backbone_weights: a file (mmsegmentation's resnet50_v1c .pth, or any model saved here), or "timm:resnet50c".
        options: of the model, as in `apcnet.models.build`.
    """
    segmentor = build(model, backbone, num_classes, **options)
    if backbone_weights is not None:
        tensors = backbones.read(backbone_weights)
        assign(segmentor.backbone.state_dict(), tensors, f"backbone_weights: {backbone_weights}")
    return segmentor


def load(path: str | Path, num_classes: int | None = None) -> Segmentor:
    """The model that `model.save(path)` wrote, in evaluation mode.

    With another number of classes everything but the classifiers is kept, which a warning says.
    """
    about, tensors = read(path)
    architecture = about["architecture"]
    trained = architecture["num_classes"]
    model = build(**{**architecture, "num_classes": num_classes or trained})
    model.mean, model.std = tuple(about["mean"]), tuple(about["std"])
    if model.num_classes == trained:
        model.classes = about["classes"] and tuple(about["classes"])
        model.palette = about["palette"] and tuple(map(tuple, about["palette"]))
    else:
        fresh = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(DECIDES)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(DECIDES)} | fresh
        warnings.warn(
            f"{path}: trained for {trained} classes; for {num_classes} everything is kept but {listed(list(fresh))}, "
            "which are fresh",
            stacklevel=2,
        )
    assign(model.state_dict(), tensors, str(path))
    return model.eval()


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """What `Segmentor.save` wrote: about the model, and its tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("apcnet", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); checkpoints of other packages come in by `apcnet convert`"
        ) from None
    if about is None:
        raise ValueError(f"{path}: expected a file that model.save wrote, found no architecture in it")
    return about, tensors
