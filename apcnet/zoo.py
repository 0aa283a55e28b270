"""Creates models by name and loads them from files."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from apcnet import exported
from apcnet.exported import Exported
from apcnet.files import printable
from apcnet.interop import backbones
from apcnet.interop.convert import published
from apcnet.models import Segmentor, build
from apcnet.models.build import build_filled
from apcnet.models.segmentor import count_labels
from apcnet.models.weights import assign, listed

CLASS_LAYERS = ("head.classifier.conv.", "auxiliary.classifier.conv.", "head.presence.")  # sized by num_classes
HEADER = 1 << 24  # bytes of a safetensors header; 10,000 tensors take a tenth


def create(
    model: str,
    backbone: str = "resnet50",
    num_classes: int = 150,
    backbone_weights: str | Path | None = None,
    **options,
) -> Segmentor:
    """Creates a segmentation model with new weights, in training mode.

    Args:
        model: "apcnet", "pspnet", "encnet", "semantic_fpn", "fcn" or "upernet".
        backbone: "resnet18", "resnet34", "resnet50" or "resnet101" (ResNetV1c), "tv:resnet50" and so on (torchvision's
            ResNet), "timm:NAME" (a model of timm), or "tiny".
        num_classes: Number of classes.
        backbone_weights: Pretrained weights of the backbone: a file (mmsegmentation's resnet50_v1c .pth, torchvision's
            or timm's weights, or any saved model), "timm" for those that timm has for the backbone, "timm:NAME" or
            "tv:resnet50". The default is None: random weights.
        options: Further options of the backbone, the head and the losses, see `apcnet.models.build`; for example
            output_stride, in_channels, channels, scales, dropout, align_corners.

    Returns:
        The model: `model(images)` returns logits, `model(images, target)` the training losses.

    Example:
        >>> model = apcnet.create("apcnet", "resnet50", num_classes=21, backbone_weights="timm:resnet50c")
    """
    segmentor = build(model, backbone, num_classes, **options)
    if backbone_weights is not None:
        backbones.load(segmentor.backbone, backbone_weights)
    return segmentor


def load(path: str | Path, num_classes: int | None = None) -> Segmentor | Exported:
    """Loads a model that `model.save(path)` wrote, or a file that `apcnet export` wrote, in evaluation mode.

    Args:
        path: A safetensors file of `model.save`, `apcnet train` or `apcnet convert`. Or a file of `apcnet export`: ONNX
            (.onnx), OpenVINO's IR (.xml) or an ExportedProgram (.pt2), which only predicts and evaluates; a .pt2 can
            run code, so load none that you do not trust. Or the name of published weights, such as
            "apcnet-r50-ade20k-160k", which are downloaded, converted and kept; or "hf:user/model" or
            "hf:user/model@revision", a model of the Hugging Face Hub.
        num_classes: Number of classes. If it is not the file's, the classifiers get new weights and a warning names
            them. The default is the file's.

    Returns:
        The model on the CPU, with its class names, palette, mean and std.

    Example:
        >>> model = apcnet.load("best.safetensors")
        >>> model = apcnet.load("apcnet-r50-ade20k-160k")
    """
    if Path(path).suffix in exported.PACKAGES:
        return _load_exported(path, num_classes)
    about, tensors = read(path)
    try:
        model = build_filled(about["architecture"], tensors, str(path))
        _describe(model, about)
    except ModuleNotFoundError:  # the file is right, and the error names the package that its encoder needs
        raise
    except Exception as error:  # an untrusted description can make PyTorch raise anything
        raise ValueError(
            str(error) if str(path) in str(error) else f"{path}: its architecture cannot be built: {printable(error)}"
        ) from None
    if num_classes not in (None, model.num_classes):
        model = _with_classes(model, num_classes, path)
    return model.eval()


def _load_exported(path: str | Path, num_classes: int | None) -> Exported:
    model, about = exported.read(path)
    try:
        _describe(model, about)
    except Exception as error:  # an untrusted description can hold anything
        raise ValueError(f"{path}: {printable(error)}") from None
    if num_classes not in (None, model.num_classes):
        raise ValueError(f"num_classes: expected {model.num_classes}, those of the exported {path}, got {num_classes}")
    return model


def _describe(model: Segmentor | Exported, about: dict) -> None:
    """Gives a model the classes, palette, mean and std in a file, or raises an error that names the wrong one."""
    channels, labels = model.in_channels, count_labels(model)
    for name in ("mean", "std"):
        values = about.get(name)
        if not _are(values, _is_finite, channels) or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name}: expected {channels} numbers, got {printable(values)}")
        setattr(model, name, tuple(values))
    if (levels := about.get("range")) is not None:
        if not _are(levels, lambda pair: _are(pair, _is_finite, 2), channels):
            raise ValueError(f"range: expected two numbers for each of {channels} channels, got {printable(levels)}")
        model.range = tuple((low, high) for low, high in levels)
    if (classes := about.get("classes")) is not None:
        if not _are(classes, lambda x: isinstance(x, str), labels):
            raise ValueError(f"classes: expected {labels} names, got {printable(classes)}")
        model.classes = tuple(classes)
    if (palette := about.get("palette")) is not None:
        if not _are(palette, lambda x: _are(x, lambda y: type(y) is int and 0 <= y < 256, 3), labels):
            raise ValueError(f"palette: expected {labels} RGB colours, got {printable(palette)}")
        model.palette = tuple(map(tuple, palette))


def _is_finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _are(values: object, is_valid: Callable[[Any], bool], count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(is_valid, values))


def _with_classes(trained: Segmentor, num_classes: int, path: str | Path) -> Segmentor:
    """Returns a copy of a model for another number of classes, whose classifiers have new weights."""
    model = build(**{**trained.architecture, "num_classes": num_classes})
    model.mean, model.std, model.range = trained.mean, trained.std, trained.range
    new = [name for name in model.state_dict() if name.startswith(CLASS_LAYERS)]
    kept = {name: tensor for name, tensor in trained.state_dict().items() if name not in new}
    assign({name: tensor for name, tensor in model.state_dict().items() if name not in new}, kept, str(path))
    warnings.warn(
        f"{path}: trained for {trained.num_classes} classes, not {num_classes}: these layers start with new weights: "
        f"{listed(new)}",
        stacklevel=3,
    )
    return model


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Reads a file of `Segmentor.save` and returns its description of the model and its tensors.

    The source is named as in `load`.
    """
    path = _local_file(str(path))
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file that model.save wrote, got {path}: there is no such file")
    data = path.read_bytes()  # safe_open cannot open names that are not UTF-8
    length = int.from_bytes(data[:8], "little")
    try:
        if length > HEADER:
            raise ValueError(f"it declares a header of {length:,} bytes")
        tensors = safetensors.torch.load(data)
        about = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("apcnet", "null"))
    except Exception as error:  # an untrusted file can make a library raise anything
        raise ValueError(
            f"{path}: expected a whole safetensors file, got another or a damaged one ({printable(error)}); for "
            f"checkpoints of other packages: apcnet convert {path} NAME.safetensors"
        ) from None
    if about is None:
        raise ValueError(f"{path}: expected a file that model.save wrote, got safetensors without an architecture")
    architecture = about.get("architecture") if isinstance(about, dict) else None
    if architecture is None and isinstance(about, dict) and about.get("own"):
        raise ValueError(
            f"{path}: expected a model with its architecture, got weights of your own {printable(about['own'])}; make "
            "it, and read them by network.load_state_dict(safetensors.torch.load_file(path))"
        )
    if not isinstance(architecture, dict):
        raise ValueError(f"{path}: expected an architecture in its metadata, got {printable(about)}")
    for name in ("scales", "convs"):  # each of them has tensors of its own: no more are built
        count = architecture.get(name, 0)
        count = len(count) if isinstance(count, list) else count
        if not isinstance(count, int) or count > len(tensors):
            raise ValueError(f"{path}: expected {name} of the {len(tensors)} tensors in it, got {printable(count)}")
    return about, tensors


def _local_file(source: str) -> Path:
    """Returns the path of a model file, and downloads a published one at its first use."""
    path = Path(source)
    if path.exists() or path.suffix == ".safetensors":
        return path
    if source.startswith("hf:"):
        from apcnet import huggingface  # the one module here that reads runs

        return huggingface.download(source)
    if path.name == source and not path.suffix:
        return published(source)
    return path
