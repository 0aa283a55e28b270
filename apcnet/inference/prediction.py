"""Predicts the labels of images of any kind and size, one or several: `predict`. `apcnet.bulk` predicts folders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from apcnet import draw, inference
from apcnet.config import Precision, Protocol
from apcnet.data.levels import visible
from apcnet.inference.levels import model_levels
from apcnet.inference.protocol import WHOLE, Keep
from apcnet.inference.tiles import MAX_PIXELS, label_images
from apcnet.models.segmentor import Segmentor, count_labels
from apcnet.zoo import load

WORTH_PREPARING = 4  # images, see inference.prepare

Source = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """Holds the labels that a model predicts for an image.

    Attributes:
        labels: Class indices (H, W), on the CPU.
        image: The image (3, H, W), uint8.
        classes: Names of the classes.
        palette: RGB colours of the classes.
        confidence: Probability (H, W) of each pixel's label, on the CPU; None unless it was asked for.

    Example:
        >>> seen = apcnet.predict(model, "photo.jpg")
        >>> seen.overlay().save("overlay.png")
    """

    labels: Tensor
    image: Tensor
    classes: tuple[str, ...]
    palette: tuple[draw.Color, ...]
    confidence: Tensor | None = None

    def colours(self) -> Image.Image:
        """Draws the labels in the colours of their classes."""
        return draw.colourise(self.labels, self.palette)

    def overlay(self, opacity: float = 0.5, legend: bool = True) -> Image.Image:
        """Draws the labels' colours over the image, with a legend below it; the background stays clear."""
        clear = draw.backgrounds(self.classes, self.palette)
        picture = draw.overlay(self.image, self.labels, self.palette, opacity, clear)
        return draw.with_legend(picture, self.labels, self.classes, self.palette, clear) if legend else picture

    def shares(self) -> dict[str, float]:
        """Returns the share of pixels of each class that occurs, in descending order."""
        counts = torch.bincount(self.labels.flatten().long()).tolist()
        present = sorted(filter(counts.__getitem__, range(len(counts))), key=lambda label: -counts[label])
        return {self.classes[label]: counts[label] / self.labels.numel() for label in present}

    def indices(self) -> Image.Image:
        """Returns the labels as a picture: palette indices, or 16-bit grey levels for more than 256 classes."""
        if self.labels.dtype != torch.uint8:
            return Image.fromarray(self.labels.numpy().astype(np.uint16))
        picture = Image.fromarray(self.labels.numpy())
        picture.putpalette(np.array(self.palette, np.uint8).tobytes())
        return picture

    def save(self, path: str | Path) -> None:
        """Writes the labels to a PNG, as `indices` returns them."""
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"path: expected NAME.png, which keeps labels as they are, got {path}")
        draw.save(self.indices(), path)

    def confidence_levels(self) -> Image.Image:
        """Draws the confidence in grey levels, black for 0 and white for 1."""
        if self.confidence is None:
            raise ValueError("confidence: expected a prediction of predict(…, confidence=True), got one without")
        return Image.fromarray((self.confidence * 255).round().to(torch.uint8).numpy())

    def save_confidence(self, path: str | Path) -> None:
        """Writes the confidence to a PNG or JPEG, as `confidence_levels` returns it."""
        draw.save(self.confidence_levels(), path)


@overload
def predict(
    model: Segmentor | str | Path,
    images: str | Path | Image.Image,
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> Prediction: ...
@overload
def predict(
    model: Segmentor | str | Path,
    images: Sequence[Source],
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> list[Prediction]: ...
@overload
def predict(  # a batch, (B, H, W, 3) or (B, 3, H, W), gives a list
    model: Segmentor | str | Path,
    images: np.ndarray | Tensor,
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> Prediction | list[Prediction]: ...
def predict(
    model: Segmentor | str | Path,
    images: Source | Sequence[Source],
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    confidence: bool = False,
) -> Prediction | list[Prediction]:
    """Predicts the class of every pixel of one or several images, at the size of each image.

    Args:
        model: A model of `apcnet.create` or `apcnet.load` on any device, or the path of its file. Its mode is restored
            afterwards.
        images: A path; a PIL image of any mode, rotated by its EXIF orientation like a file; an array (H, W, 3) or a
            tensor (3, H, W) of RGB levels, or grey levels (H, W), uint8; or a list, tuple or batch of these, of any
            sizes. A model of other images takes their levels: (H, W, C), (C, H, W) or (H, W), of any type. For
            normalised images in floating point, use `apcnet.inference.labels`.
        protocol: Scales, windows and flips. The protocol of the model's evaluation gives the best labels.
        max_pixels: Largest number of pixels that the network sees at once. A larger view is cut into tiles unless the
            protocol has a window. A pixel costs about 0.7 KiB with a ResNet-50 in float32. If only the image is
            larger than this, probabilities are averaged at the largest view's size and then enlarged.
        precision: Precision of the matrix products: "float32", "bfloat16" or "float16" (autocast).
        confidence: Also compute the probability of every pixel's label.

    Returns:
        One Prediction for one image; a list of them for a list, a tuple or a batch.

    Example:
        >>> seen = predict(apcnet.load("model.safetensors"), "photo.jpg")
        >>> seen.save("labels.png")
    """
    several = isinstance(images, list | tuple) and len(images) >= WORTH_PREPARING
    with prepared_model(model, max_pixels, precision, several) as prepared:

        def one(image: object, name: str) -> Prediction:
            levels = model_levels(prepared, image, name)
            try:
                return predict_levels(prepared, [levels], protocol, max_pixels, confidence)[0]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        if isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4):
            return [one(image, f"images[{i}]") for i, image in enumerate(images)]
        return one(images, "images")


@contextmanager
def prepared_model(
    model: Segmentor | str | Path, max_pixels: int, precision: Precision, several: bool
) -> Iterator[Segmentor]:
    """Loads the model if needed, and puts it in evaluation mode and the given precision until the end.

    For several images in float32 on a CPU it takes a copy that is laid out for speed, which costs as much as an image.
    """
    if not isinstance(max_pixels, int) or max_pixels < 1:
        raise ValueError(f"max_pixels: expected a positive integer, got {max_pixels!r}")
    model = load(model) if isinstance(model, (str, Path)) else model
    for name in ("mean", "std", "num_classes", "align_corners"):
        if not isinstance(model, nn.Module) or not hasattr(model, name):
            raise TypeError(
                f"model: expected one of apcnet.create or apcnet.load, or its file, got {type(model).__name__}"
            )
    with inference.in_evaluation(model, precision):
        yield inference.prepare(model) if several and precision == "float32" else model


def predict_levels(
    model: Segmentor,
    images: Sequence[Tensor],
    protocol: Protocol,
    max_pixels: int,
    confidence: bool,
    keep: Keep | None = None,
) -> list[Prediction]:
    """Predicts images of one size, of the levels (C, H, W) that `model_levels` returns, as `label_images` does."""
    labels, sure = label_images(model, images, protocol, max_pixels, confidence, keep)
    colors = getattr(model, "palette", None) or draw.palette(count_labels(model))
    colors = tuple((red, green, blue) for red, green, blue in colors)
    shown = [visible(levels, getattr(model, "range", None)) for levels in images]
    sures = [None] * len(images) if sure is None else sure.cpu()
    return [
        Prediction(found, image, class_names(model), colors, sure)
        for found, image, sure in zip(labels.cpu(), shown, sures, strict=True)
    ]


def class_names(model: Segmentor) -> tuple[str, ...]:
    """Returns the names of a model's classes, or numbered ones if it has none."""
    return tuple(getattr(model, "classes", None) or (f"class {i}" for i in range(count_labels(model))))
