"""Writes predictions as PNG files with the names and values of a benchmark's masks.

    cityscapes       labelIds (7 to 33), FOLDER/frankfurt/frankfurt_000001_000019.png: the server's script looks in all
                     folders for one file that begins with city, sequence and frame
    ade20k           class i as i + 1; 0 is no class
    voc2012          indices of classes and VOC's colours as their palette; for the server they belong into
                     results/VOC2012/Segmentation/comp6_test_cls
    pascal_context   class i as i with the background as class 0 (60 classes), else as i + 1 (59)
    folder           what the data set's own masks hold: where several values stand for a class, the smallest
    shards           indices of classes, which shards hold
    synthetic        indices of classes

Names keep their folders, so that no two are the same. Each file is written whole or not at all.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from apcnet import data
from apcnet.choices import check_choice
from apcnet.data.cityscapes import IDS
from apcnet.data.classes import label_table, voc_colors
from apcnet.data.sample import Dataset
from apcnet.files import replacing

VOC_PALETTE = [part for color in voc_colors(256) for part in color]


def writer(benchmark: str, dataset: Dataset, folder: str | Path) -> Callable[[str, Tensor], None]:
    """Returns a function that writes the file of a sample, from its name and labels (class indices (H, W) on the CPU).

    Args:
        benchmark: The name by which the data set was opened.
        dataset: The data set whose masks define the stored values.
        folder: The folder for the files; it is created when needed.
    """
    check_choice(benchmark, "benchmark", data.NAMES)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder, {folder} is a file")
    values = _stored_values(benchmark, dataset)
    palette = VOC_PALETTE if benchmark == "voc2012" else None

    def write(name: str, prediction: Tensor) -> None:
        labels = prediction.numpy()
        if labels.max(initial=0) >= len(values) or labels.min(initial=0) < 0:
            raise ValueError(f"labels: {name!r}: expected 0 to {len(values) - 1}, got {labels.min()} to {labels.max()}")
        image = Image.fromarray(values[labels])
        if palette:
            image.putpalette(palette)
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            image.save(temporary, "PNG")

    return write


def _stored_values(benchmark: str, dataset: Dataset) -> np.ndarray:
    """Returns the stored value of each class."""
    if benchmark == "cityscapes":
        return np.array(IDS, np.uint8)
    labels = getattr(dataset, "labels", None)
    if labels is None:  # masks of generated scenes hold class indices
        labels = label_table(len(dataset.classes))
    found = [np.flatnonzero(labels == index) for index in range(len(dataset.classes))]
    for name, values in zip(dataset.classes, found, strict=True):
        if not len(values):
            raise ValueError(f"dataset: expected a mask value for every class, there is none for {name!r}")
    return np.array([values[0] for values in found], np.uint8)
