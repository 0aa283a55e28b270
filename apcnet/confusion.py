"""Confusion matrices and the scores of segmentation, by mmsegmentation's definition, from exact counts.

Of each class, over all pixels that count, of all images together:

    IoU = hits / (labelled + predicted − hits)        acc = hits / labelled

mIoU and mAcc are the means over the classes for which that is no 0 / 0: a class that is neither labelled nor predicted
has neither, one that is predicted alone has an IoU of 0 and no accuracy. aAcc is the share of all pixels that are hits.
"""

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

PIECE = 1 << 18  # pixels that are widened to int64 at a time


class Scores(NamedTuple):
    """Fractions of 1."""

    miou: float
    macc: float
    aacc: float
    iou: Tensor  # (K,) float64, NaN where a class does not count
    acc: Tensor

    def rows(self, classes: Sequence[str]) -> list[tuple[str, str, str]]:
        """A table: each class, its IoU and its accuracy in percent, and below them the means."""
        if len(classes) != len(self.iou):
            raise ValueError(f"classes: expected {len(self.iou)} names, got {len(classes)}")
        scores = zip(classes, self.iou.tolist(), self.acc.tolist(), strict=True)
        return [(name, percent(iou), percent(acc)) for name, iou, acc in (*scores, ("mean", self.miou, self.macc))]

    def record(self, dataset) -> dict:
        """For JSON: fractions, by the names of classes, None where a class does not count."""
        values = {"miou": self.miou, "macc": self.macc, "aacc": self.aacc}
        context = getattr(dataset, "context_classes", ())
        if context:  # of generated scenes
            values["context_miou"] = self.iou[list(context)].nanmean().item()
        iou = zip(dataset.classes, self.iou.tolist(), strict=True)
        return {**values, "iou": {name: None if math.isnan(value) else value for name, value in iou}}


class ConfusionMatrix:
    """Counts pixels by label and prediction; `matrix` is (K, K) int64, rows: target, columns: prediction.

    Args:
        num_classes: K.
        ignore_index: the label of pixels that are not counted.
        device: where the matrix lies; what lies elsewhere is counted there, and only its counts are moved.
    """

    def __init__(self, num_classes: int, ignore_index: int = IGNORE, device: torch.device | str | None = None):
        if num_classes < 1:
            raise ValueError(f"num_classes: expected one at least, got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> "ConfusionMatrix":
        """Counts some pixels: two tensors of one shape, of integers; what is predicted where none is due is not read.

        Either all of them are counted or, if one is out of range, none.
        """
        _check_labels(prediction, "prediction")
        _check_labels(target, "target")
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction: expected the shape of target, {tuple(target.shape)}, got {tuple(prediction.shape)}"
            )
        if prediction.device != target.device:
            raise ValueError(f"prediction: expected on {target.device}, beside target, got on {prediction.device}")
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
        """Adds counts, (K, K) int64: another matrix, or what `apc_kernels.upsample_confusion` returns."""
        if not isinstance(matrix, Tensor) or matrix.shape != self.matrix.shape or matrix.dtype != torch.int64:
            given = f"{matrix.dtype} {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"matrix: expected torch.int64 {tuple(self.matrix.shape)}, got {given}")
        self.matrix += matrix.to(self.matrix.device)
        return self

    def reduce(self) -> "ConfusionMatrix":
        """Adds the matrices of all processes; each has the sum then. To be called once, by every one of them."""
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(self.matrix)
        return self

    def scores(self) -> Scores:
        counts = self.matrix.cpu()
        hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou = hits.double() / (labelled + predicted - hits)
        acc = hits.double() / labelled
        aacc = hits.sum().double() / labelled.sum()
        return Scores(iou.nanmean().item(), acc.nanmean().item(), aacc.item(), iou, acc)

    def save(self, path: str | Path) -> None:
        """Writes the matrix for numpy.load."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, self.matrix.cpu().numpy())

    def _check_range(self, labels: Tensor, name: str, besides: str = "") -> None:
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            values = ", ".join(map(str, wrong.unique()[:5].tolist()))
            raise ValueError(f"{name}: expected labels of 0 to {self.num_classes - 1}{besides}, got {values}")


def _check_labels(labels: Tensor, name: str) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected a tensor of integers, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: expected integers, got {str(labels.dtype).removeprefix('torch.')}")


def percent(share: float | None) -> str:
    """A share as people read it, and a dash where there is none."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.2f}"
