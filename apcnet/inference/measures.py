"""Measures what a confusion matrix cannot tell: boundary IoU, calibration, the loss, and the scores of every image.

Each measure takes one image after the other and keeps counts only. The counts are integers, or exact sums, so a result
does not depend on the order of the images or on the number of processes.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apcnet.confusion import named
from apcnet.data.sample import IGNORE
from apcnet.distributed import gather, world_size
from apcnet.files import replacing

BOUNDARY = 0.02  # the width of a boundary as a share of the image's diagonal, as its authors chose it
BINS = 15  # of confidence, as in most papers on calibration
UNIT = 1 << 24  # confidences are summed as integers in units of 1 / UNIT: the steps of float32 below 1


class BoundaryIoU:
    """Counts the IoU of the boundaries of every class (Cheng et al., "Boundary IoU", 2021).

    The boundary of a class in an image are its pixels no further than 2 % of the diagonal from another class or from
    the edge of the image, by the larger of the distances along the two axes. Ignored pixels belong to no class, in the
    labels and in the prediction. Counts are summed over all images before IoU is computed.

    Args:
        num_classes: Number of classes K.
    """

    def __init__(self, num_classes: int):
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64)  # both, labelled, predicted

    def update(self, prediction: Tensor, target: Tensor, ignore_index: int = IGNORE) -> None:
        """Counts the pixels of one image: (H, W) integers each."""
        ignored = target == ignore_index
        labels = target.long().masked_fill(ignored, -1)
        guesses = prediction.long().masked_fill(ignored, -1)
        width = max(1, round(BOUNDARY * math.hypot(*target.shape)))
        labelled, predicted = (boundary(pixels, width) & ~ignored for pixels in (labels, guesses))
        both = labelled & predicted & (labels == guesses)
        classes = self.counts.shape[1]
        pairs = ((labels, both), (labels, labelled), (guesses, predicted))
        self.counts += torch.stack([torch.bincount(of[where], minlength=classes).cpu() for of, where in pairs])

    def reduce(self) -> None:
        """Replaces the counts by those of all processes; every process must call it, once."""
        self.counts = torch.stack(gather(self.counts)).sum(0)

    @property
    def iou(self) -> Tensor:
        """Returns the boundary IoU (K,) of each class in float64; NaN for a class without boundaries."""
        both, labelled, predicted = self.counts
        return both.double() / (labelled + predicted - both)

    def record(self, classes: Sequence[str]) -> dict:
        """Returns the scores for JSON: fractions, by class name."""
        return {"mean_boundary_iou": self.iou.nanmean().item(), "boundary_iou": named(classes, self.iou)}


class Calibration:
    """Counts how often predictions of a given confidence are right; confidence is the probability of the winning class.

    The expected calibration error (ECE) is the mean distance, over pixels, of confidence and accuracy in BINS bins of
    equal width; bin i holds confidences above i / BINS, up to (i + 1) / BINS.
    """

    def __init__(self):
        self.counts = torch.zeros(3, BINS, dtype=torch.int64)  # pixels, right ones, confidence in units of 1 / UNIT

    def update(self, confidence: Tensor, prediction: Tensor, target: Tensor, ignore_index: int = IGNORE) -> None:
        """Counts the pixels of one image: confidences, and two times integers, (H, W) each."""
        counted = target != ignore_index
        confidence, right = confidence[counted], (prediction == target)[counted]
        bins = (confidence * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
        units = (confidence.double() * UNIT).round().long()
        parts = torch.ones_like(bins), right.long(), units
        sums = torch.zeros(3, BINS, dtype=torch.int64, device=bins.device)
        for row, part in zip(sums, parts, strict=True):
            row.index_add_(0, bins, part)  # integers: exact in any order
        self.counts += sums.cpu()

    def reduce(self) -> None:
        """Replaces the counts by those of all processes; every process must call it, once."""
        self.counts = torch.stack(gather(self.counts)).sum(0)

    @property
    def ece(self) -> float:
        """Returns the expected calibration error, a fraction; NaN without any pixel."""
        pixels, right, units = self.counts
        return (
            (units.double() / UNIT - right).abs().sum().item() / total if (total := pixels.sum().item()) else math.nan
        )

    def record(self) -> dict:
        """Returns the error for JSON, and the bins: pixels, and the shares that confidence and accuracy come to."""
        pixels, right, units = self.counts.tolist()
        bins = [
            {"pixels": n, "confidence": units[i] / UNIT / n, "accuracy": right[i] / n} if n else {"pixels": 0}
            for i, n in enumerate(pixels)
        ]
        return {"ece": self.ece, "calibration": bins}


class MeanLoss:
    """Sums the cross entropy of all labelled pixels; `mean` divides it by their number."""

    def __init__(self):
        self.sums: list[float] = []  # of the images; math.fsum is exact, so that their order does not count
        self.pixels = 0

    def update(self, loss: float, pixels: int) -> None:
        """Adds the sum over the labelled pixels of an image, and their number."""
        self.sums.append(loss)
        self.pixels += pixels

    def reduce(self) -> None:
        """Replaces the sums by those of all processes; every process must call it, once."""
        parts = gather((self.sums, self.pixels))
        self.sums, self.pixels = [loss for sums, _ in parts for loss in sums], sum(pixels for _, pixels in parts)

    @property
    def mean(self) -> float:
        """Returns the mean cross entropy of the labelled pixels; NaN without any."""
        return math.fsum(self.sums) / self.pixels if self.pixels else math.nan


class ImageScores(NamedTuple):
    """Holds the scores of one image: its means are over the classes that are labelled or predicted in it."""

    name: str
    pixels: int
    aacc: float
    miou: float
    mean_dice: float
    iou: tuple[float, ...]


class PerImage:
    """Collects the scores of every image.

    Args:
        classes: Names of the classes.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = classes
        self.scores: list[ImageScores] = []

    def update(self, name: str, counts: Tensor) -> None:
        """Adds the scores of an image, from its confusion matrix."""
        counts = counts.cpu().double()
        hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou, dice = hits / (labelled + predicted - hits), 2 * hits / (labelled + predicted)
        pixels = int(labelled.sum())
        aacc = hits.sum().item() / pixels if pixels else math.nan
        means = iou.nanmean().item(), dice.nanmean().item()
        self.scores.append(ImageScores(name, pixels, aacc, *means, tuple(iou.tolist())))

    def reduce(self) -> None:
        """Replaces the scores by those of all processes, in the order of the images; every process must call it, once.

        Process r of N has taken images r, r + N, …
        """
        parts, count = gather(self.scores), world_size()
        total = sum(map(len, parts))
        self.scores = [parts[i % count][i // count] for i in range(total)]

    def worst(self, count: int) -> list[int]:
        """Returns the indices of the images with the largest shares of wrong pixels, the worst first."""
        labelled = [i for i, score in enumerate(self.scores) if score.pixels]
        return sorted(labelled, key=lambda i: self.scores[i].aacc)[:count]

    def save(self, path: Path) -> None:
        """Writes a table (CSV, UTF-8): a line for each image, a column for each score and for the IoU of each class."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "pixels", "aacc", "miou", "mean_dice", *(f"iou {name}" for name in self.classes)])
        for name, pixels, *means, iou in self.scores:
            writer.writerow([name, pixels, *map(_digits, (*means, *iou))])
        with replacing(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")


def boundary(labels: Tensor, width: int) -> Tensor:
    """Finds the pixels (H, W) that have another label, or the image's edge, within `width` along both axes.

    A window of one label has no two neighbours that differ. The number of those that do is a sum over a box, taken from
    a table of sums, so its cost does not depend on the width.
    """
    framed = F.pad(labels[None, None].float(), [width] * 4, value=-2)[0, 0]  # a label that no pixel has
    beside, below = (framed.diff(dim=axis) != 0 for axis in (1, 0))
    side = 2 * width + 1
    return (_box_sums(beside, side, side - 1) + _box_sums(below, side - 1, side)) > 0


def _box_sums(marked: Tensor, height: int, width: int) -> Tensor:
    """Counts the marked places in every box of this size."""
    sums = F.pad(marked.int().cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32), [1, 0, 1, 0])
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]


def _digits(score: float) -> str:
    """Writes a score with six digits, and nothing for NaN."""
    return "" if math.isnan(score) else f"{score:.6f}"
