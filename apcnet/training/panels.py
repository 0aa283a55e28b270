"""Keeps the images, labels and predictions that a run shows, so that its report can draw them at any size.

preview/samples.npz holds the images and their true labels, preview/000150.npz the predictions after a step, worst.npz
both for the images that the model gets most wrong. Arrays are reduced to LARGEST pixels a side.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from apcnet.files import replacing

LARGEST = 480  # pixels of the longer side
SAMPLES, WORST = "samples.npz", "worst.npz"


Palette = Sequence[tuple[int, int, int]]


class Sample(NamedTuple):
    """Holds an image (H, W, 3) uint8, its true labels (H, W), and its name."""

    image: np.ndarray
    truth: np.ndarray
    name: str


class Kept(NamedTuple):
    """Holds what a file keeps: samples, predictions (H, W), and the RGB colour of each class."""

    samples: list[Sample]
    predictions: list[np.ndarray]
    palette: list[tuple[int, int, int]]


def reduced(image: Tensor, truth: Tensor, name: str) -> Sample:
    """Returns an image (3, H, W) uint8 and its labels (H, W), reduced to LARGEST pixels a side if they are larger."""
    photo, (height, width) = image.permute(1, 2, 0).cpu().numpy(), _size(tuple(truth.shape))
    if (height, width) != tuple(truth.shape):
        photo = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.BOX))
    return Sample(photo, reduced_labels(truth), name)


def reduced_labels(labels: Tensor) -> np.ndarray:
    """Returns labels (H, W), reduced to LARGEST pixels a side if they are larger: those at the pixels' centres."""
    rows, columns = (
        (2 * np.arange(few) + 1) * many // (2 * few)
        for few, many in zip(_size(tuple(labels.shape)), labels.shape, strict=True)
    )
    return labels.cpu().numpy()[rows[:, None], columns]


def save(path: Path, samples: Sequence[Sample], predictions: Sequence[np.ndarray], palette: Palette) -> None:
    """Writes samples, predictions or both, and the colours of the classes."""
    arrays = {"palette": np.array(palette, np.uint8)}
    arrays |= {f"prediction{i}": labels for i, labels in enumerate(predictions)}
    for i, sample in enumerate(samples):
        arrays |= {f"image{i}": sample.image, f"truth{i}": sample.truth}
    content = io.BytesIO()
    names = np.array([sample.name.encode("utf-8", "backslashreplace").decode() for sample in samples], dtype=np.str_)
    np.savez_compressed(content, names=names, **arrays)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load(path: Path) -> Kept:
    """Reads what `save` has written."""
    with np.load(path, allow_pickle=False) as file:
        names = [str(name) for name in file["names"]]
        samples = [Sample(file[f"image{i}"], file[f"truth{i}"], name) for i, name in enumerate(names)]
        count = sum(key.startswith("prediction") for key in file.files)
        palette = [(red, green, blue) for red, green, blue in file["palette"].tolist()]
        return Kept(samples, [file[f"prediction{i}"] for i in range(count)], palette)


def _size(size: tuple[int, ...]) -> tuple[int, int]:
    """Returns the height and width that a picture of this size is reduced to."""
    height, width = size
    longest = max(size)
    if longest <= LARGEST:
        return height, width
    return max(1, round(height * LARGEST / longest)), max(1, round(width * LARGEST / longest))
