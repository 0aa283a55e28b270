"""Creates models by name and loads them from files."""

import json
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from apcnet.interop import backbones
from apcnet.models import Segmentor, build
from apcnet.models.weights import assign, listed

CLASS_LAYERS = ("head.classifier.conv.", "auxiliary.classifier.conv.", "head.presence.")  # sized by num_classes


def create(
    model: str,
    backbone: str = "resnet50",
    num_classes: int = 150,
    backbone_weights: str | Path | None = None,
    **options,
) -> Segmentor:
    """Creates a segmentation model with new weights, in training mode.

    Args:
        model: "apcnet", "pspnet", "encnet", "semantic_fpn" or "fcn".
        backbone: "resnet18", "resnet34", "resnet50" or "resnet101" (ResNetV1c), or "tiny".
        num_classes: Number of classes.
        backbone_weights: Pretrained weights of the backbone: a file (mmsegmentation's resnet50_v1c .pth, or any saved
            model), or "timm:resnet50c" or "timm:resnet101c". The default is None: random weights.
        options: Further options of the backbone, the head and the losses, see `apcnet.models.build`; for example
            output_stride, in_channels, channels, scales, dropout, align_corners.

    Returns:
        The model: `model(images)` returns logits, `model(images, target)` the training losses.

    Example:
        >>> model = apcnet.create("apcnet", "resnet50", num_classes=21, backbone_weights="timm:resnet50c")
    """
    segmentor = build(model, backbone, num_classes, **options)
    if backbone_weights is not None:
        tensors = backbones.read(backbone_weights)
        assign(segmentor.backbone.state_dict(), tensors, f"backbone_weights: {backbone_weights}")
    return segmentor


def load(path: str | Path, num_classes: int | None = None) -> Segmentor:
    """Loads a model that `model.save(path)` wrote, in evaluation mode.

    Args:
        path: A safetensors file of `model.save`, `apcnet train` or `apcnet convert`.
        num_classes: Number of classes. If it is not the file's, the classifiers get new weights and a warning names
            them. The default is the file's.

    Returns:
        The model on the CPU, with its class names, palette, mean and std.

    Example:
        >>> model = apcnet.load("best.safetensors")
    """
    about, tensors = read(path)
    architecture = about["architecture"]
    trained = architecture["num_classes"]
    model = build(**{**architecture, "num_classes": num_classes or trained})
    model.mean, model.std = tuple(about["mean"]), tuple(about["std"])
    if about.get("range"):
        model.range = tuple((low, high) for low, high in about["range"])
    if model.num_classes == trained:
        model.classes = about["classes"] and tuple(about["classes"])
        model.palette = about["palette"] and tuple(map(tuple, about["palette"]))
    else:
        new = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(CLASS_LAYERS)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASS_LAYERS)} | new
        warnings.warn(
            f"{path}: trained for {trained} classes, not {num_classes}: these layers start with new weights: "
            f"{listed(list(new))}",
            stacklevel=2,
        )
    assign(model.state_dict(), tensors, str(path))
    return model.eval()


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Reads a file of `Segmentor.save` and returns its description of the model and its tensors."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file that model.save wrote, got {path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("apcnet", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got another or a damaged one ({error}); for checkpoints of "
            f"other packages: apcnet convert {path} NAME.safetensors"
        ) from None
    if about is None:
        raise ValueError(f"{path}: expected a file that model.save wrote, got safetensors without an architecture")
    return about, tensors
