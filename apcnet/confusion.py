"""Counts confusion matrices exactly and computes mmsegmentation's scores from them.

For each class, over all pixels of all images that are not ignored:

    IoU = hits / (labelled + predicted − hits)            recall = hits / labelled, which mmsegmentation calls Acc
    Dice = 2 · hits / (labelled + predicted), or F1       precision = hits / predicted

mIoU, mAcc and the other means are over the classes where a score is not 0 / 0: a class that is neither labelled nor
predicted has no score; one that is predicted but never labelled has an IoU of 0 and no recall. aAcc is the share of
hits, and the frequency-weighted IoU weights every class by its labelled pixels.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apcnet import distributed
from apcnet.data.sample import IGNORE
from apcnet.files import replacing

PIECE = 1 << 18  # pixels to convert to int64 at a time


class Scores(NamedTuple):
    """Holds the scores of a segmentation as fractions of 1.

    Attributes:
        miou: Mean IoU over the classes.
        macc: Mean accuracy, or recall, over the classes.
        aacc: Share of all pixels that are predicted correctly.
        iou: (K,) float64 IoU of each class; NaN for a class that does not count.
        acc: (K,) float64 accuracy, or recall, of each class; NaN for a class that does not count.
        dice: (K,) float64 Dice, or F1, of each class; NaN for a class that does not count.
        precision: (K,) float64 precision of each class; NaN for a class that is never predicted.
        fwiou: Mean IoU with every class weighted by its share of the labelled pixels.
    """

    miou: float
    macc: float
    aacc: float
    iou: Tensor
    acc: Tensor
    dice: Tensor
    precision: Tensor
    fwiou: float

    def by_class(self) -> dict[str, Tensor]:
        """Returns the scores that every class has: iou, dice, precision and recall."""
        return {"iou": self.iou, "dice": self.dice, "precision": self.precision, "recall": self.acc}

    def rows(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the rows of a table: the name and the scores of each class in percent, and the means last."""
        if len(classes) != len(self.iou):
            raise ValueError(f"classes: expected {len(self.iou)} names, got {len(classes)}")
        columns = self.by_class().values()
        scores = zip(*(column.tolist() for column in columns), strict=True)
        means = [column.nanmean().item() for column in columns]
        named = (*zip(classes, scores, strict=True), ("mean", means))
        return [(name, *map(percent, values)) for name, values in named]

    def record(self, dataset) -> dict:
        """Returns the scores as a dict for JSON: fractions, by class name; None for a class that does not count."""
        values = {"miou": self.miou, "macc": self.macc, "aacc": self.aacc}
        context = getattr(dataset, "context_classes", ())
        if context:
            values["context_miou"] = self.iou[list(context)].nanmean().item()
        values |= {"mean_dice": self.dice.nanmean().item(), "mean_precision": self.precision.nanmean().item()}
        values["fwiou"] = self.fwiou
        return values | {name: named(dataset.classes, column) for name, column in self.by_class().items()}


def named(classes: Sequence[str], column: Tensor) -> dict[str, float | None]:
    """Returns a score of every class by name, for JSON; None for NaN."""
    values = zip(classes, column.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in values}


class ConfusionMatrix:
    """Counts pixels by label and prediction, and computes scores.

    Args:
        num_classes: Number of classes K.
        ignore_index: Label of pixels that are not counted; the default is 255.
        device: Device of the matrix. Tensors on another device are counted there, and only the counts are moved.

    Attributes:
        matrix: (K, K) int64 counts; rows are targets, columns are predictions.

    Example:
        >>> confusion = ConfusionMatrix(19)
        >>> for prediction, target in batches:
        ...     confusion.update(prediction, target)
        >>> confusion.scores().miou
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE, device: torch.device | str | None = None):
        if num_classes < 1:
            raise ValueError(f"num_classes: expected 1 or more, got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> "ConfusionMatrix":
        """Counts the pixels of one or more images and returns the matrix object itself.

        If a label or prediction is out of range, it raises an error and counts nothing.

        Args:
            prediction: Integers 0…K−1, any shape and integer dtype; values at ignored pixels are not read.
            target: Integers 0…K−1 or ignore_index, same shape and device as prediction.
        """
        _check_labels(prediction, "prediction")
        _check_labels(target, "target")
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction: expected the shape of target, {tuple(target.shape)}, got {tuple(prediction.shape)}"
            )
        if prediction.device != target.device:
            raise ValueError(f"prediction: expected target's device {target.device}, got {prediction.device}")
        counts = torch.zeros(self.num_classes**2, dtype=torch.int64, device=target.device)
        pieces = (tensor.reshape(-1).split(PIECE) for tensor in (prediction, target))
        for guess, label in zip(*pieces, strict=True):
            guess, label = guess.long(), label.long()
            counted = label != self.ignore_index
            guess, label = guess[counted], label[counted]
            self._check_range(label, "target", f", or {self.ignore_index} for pixels to ignore")
            self._check_range(guess, "prediction")
            counts += torch.bincount(label * self.num_classes + guess, minlength=len(counts))
        return self.add(counts.view_as(self.matrix))

    def add(self, matrix: Tensor) -> "ConfusionMatrix":
        """Adds (K, K) int64 counts, such as another matrix or a result of `apc_kernels.upsample_confusion`."""
        if not isinstance(matrix, Tensor) or matrix.shape != self.matrix.shape or matrix.dtype != torch.int64:
            given = f"{matrix.dtype} {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"matrix: expected torch.int64 {tuple(self.matrix.shape)}, got {given}")
        self.matrix += matrix.to(self.matrix.device)
        return self

    def reduce(self) -> "ConfusionMatrix":
        """Replaces the matrix by the sum over all processes. Every process must call it, once."""
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(self.matrix)
        return self

    def scores(self) -> Scores:
        """Computes the scores of every class, and their means, from the counts."""
        counts = self.matrix.cpu()
        hits, labelled, predicted = counts.diagonal().double(), counts.sum(1), counts.sum(0)
        iou = hits / (labelled + predicted - counts.diagonal())
        acc = hits / labelled
        aacc = counts.diagonal().sum().double() / labelled.sum()
        fwiou = (labelled * iou.nan_to_num()).sum() / labelled.sum()
        return Scores(
            iou.nanmean().item(),
            acc.nanmean().item(),
            aacc.item(),
            iou,
            acc,
            2 * hits / (labelled + predicted),
            hits / predicted,
            fwiou.item(),
        )

    def save(self, path: str | Path) -> None:
        """Writes the matrix to a file that `numpy.load` reads."""
        content = io.BytesIO()  # NumPy writes to files without saying why a write fails
        np.save(content, self.matrix.cpu().numpy())
        with replacing(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def _check_range(self, labels: Tensor, name: str, more: str = "") -> None:
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            values = ", ".join(map(str, wrong.unique()[:5].tolist()))
            raise ValueError(f"{name}: expected 0 to {self.num_classes - 1}{more}, got {values}")


def _check_labels(labels: Tensor, name: str) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a tensor of integers, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: expected integers, got {str(labels.dtype).removeprefix('torch.')}")


def percent(share: float | None) -> str:
    """Formats a fraction as percent with two decimals, and None or NaN as a dash."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.2f}"
