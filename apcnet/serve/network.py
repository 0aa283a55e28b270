"""Runs the images of several requests through a model at once, with the labels of `apcnet.predict`."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from apcnet import draw, inference
from apcnet.config import Precision, Protocol
from apcnet.data.augment import view, view_sizes
from apcnet.inference.prediction import Prediction, predict
from apcnet.inference.protocol import WHOLE
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.models.segmentor import count_labels
from apcnet.serve.images import ImageError


class Served:
    """Holds a model that is served, and the protocol and precision in which it sees images.

    Args:
        model: A model of RGB images, of `apcnet.load` or `apcnet.create`, on its device.
        protocol: Scales, windows and flips.
        precision: Precision of the matrix products: "float32", "bfloat16" or "float16" (autocast).

    Attributes:
        model: The model in evaluation mode.
        prepared: The copy that predicts: on a CPU, the one of `apcnet.inference.prepare`.
        classes, palette: Name and RGB colour of each class.
    """

    def __init__(self, model: nn.Module, protocol: Protocol = WHOLE, precision: Precision = "float32"):
        if getattr(model, "range", None) is not None or len(model.mean) != 3:
            raise ValueError(
                f"model: expected one of 8-bit RGB images, got one of {len(model.mean)} channels of its own levels; "
                "apcnet predict takes such images"
            )
        self.model, self.protocol, self.precision = model.eval(), protocol, precision
        self.prepared = inference.prepare(model) if precision == "float32" else model
        labels = count_labels(model)
        self.classes: tuple[str, ...] = tuple(model.classes or (f"class {i}" for i in range(labels)))
        self.palette: tuple[draw.Color, ...] = tuple(map(tuple, model.palette or draw.palette(labels)))

    def most(self, size: Sequence[int], protocol: Protocol) -> int:
        """Returns how many images of this size (H, W) may go through the network together."""
        with self._refusing():
            largest = max(map(math.prod, (size, *view_sizes(size, protocol.ratios, protocol.test_scale))))
        return max(1, MAX_PIXELS // largest)

    def predict(self, images: Sequence[Tensor], protocol: Protocol, confidence: bool) -> list[Prediction]:
        """Predicts the labels of images (3, H, W) uint8 of one size, as `apcnet.predict` does one after the other.

        What the model cannot take, such as another size than that of an exported file, is an ImageError.
        """
        with self._refusing():
            return self._predict(images, protocol, confidence)

    def _predict(self, images: Sequence[Tensor], protocol: Protocol, confidence: bool) -> list[Prediction]:
        if len(images) == 1:
            options = {"precision": self.precision, "confidence": confidence}
            return [predict(self.prepared, images[0], protocol, **options)]
        size = images[0].shape[1], images[0].shape[2]
        parameter = next(self.model.parameters(), torch.empty(0))
        views = (
            torch.stack([view(image, shape, self.model.mean, self.model.std) for image in images]).to(parameter)
            for shape in view_sizes(size, protocol.ratios, protocol.test_scale)
        )
        with inference.in_evaluation(self.prepared, self.precision):
            if confidence:
                labels, sure = (
                    found.cpu() for found in inference.confidence(self.prepared, views, protocol, size=size)
                )
            else:
                labels, sure = inference.labels(self.prepared, views, protocol, size=size).cpu(), [None] * len(images)
        return [
            Prediction(label, image, self.classes, self.palette, share)
            for label, image, share in zip(labels, images, sure, strict=True)
        ]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turns an error about an image into an ImageError."""
        try:
            yield
        except ValueError as error:
            path = getattr(self.model, "path", None)  # of an exported file; clients need not know where it lies
            raise ImageError(422, str(error).replace(str(path), "the model") if path else str(error)) from None
