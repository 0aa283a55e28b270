"""Evaluates the model of a run on its validation images, and writes pictures of what it predicts."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from apcnet import draw
from apcnet.config import Config
from apcnet.confusion import ConfusionMatrix, Scores
from apcnet.data.levels import visible
from apcnet.data.sample import Dataset
from apcnet.distributed import rank
from apcnet.files import remove_leftovers
from apcnet.inference.evaluation import evaluate
from apcnet.inference.measures import MeanLoss, PerImage
from apcnet.inference.prediction import predict
from apcnet.models import Segmentor
from apcnet.training import panels
from apcnet.training.checkpoint import Best

PREVIEW_IMAGES, WORST_IMAGES = 4, 6


class Validation:
    """Holds a model, the images to evaluate it on, and the folder for the pictures."""

    def __init__(self, model: Segmentor, data: Dataset, config: Config, out: Path, workers: int):
        self.model, self.data, self.config, self.out, self.workers = model, data, config, out, workers
        self.is_main = rank() == 0

    def measure(
        self, progress: Callable[[int, int], None], loss: MeanLoss | None = None
    ) -> tuple[ConfusionMatrix, PerImage]:
        """Returns the confusion matrix of all images, and the scores of every image; fills `loss` if it is given."""
        images = PerImage(self.data.classes)
        matrix = evaluate(
            self.model,
            self.data,
            self.config.evaluation,
            workers=self.workers,
            precision=self.config.precision,
            channels_last=self.config.channels_last,
            progress=progress,
            images=images,
            loss=loss,
        )
        if math.isnan(matrix.scores().miou):
            split = self.config.data.val_split
            raise ValueError(f"val_split: expected labelled pixels, found none in {split}")
        return matrix, images

    def save_preview(self, step: int) -> None:
        """Saves a picture of the first images with their labels, predictions and errors."""
        if not self.is_main:
            return
        folder = self.out / "preview"
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        draw.save_names(self.out, self.data.classes)
        samples, predictions = self._save_pictures(
            range(min(PREVIEW_IMAGES, len(self.data))), folder / f"{step:06}.png"
        )
        panels.save(folder / panels.SAMPLES, samples, [], self.data.palette)
        panels.save(folder / f"{step:06}.npz", [], predictions, self.data.palette)

    def save_results(self, matrix: ConfusionMatrix, images: PerImage) -> None:
        """Saves the confusion matrix, the scores of every image, and pictures of those that are most wrong."""
        if not self.is_main:
            return
        matrix.save(self.out / "confusion.npy")
        draw.save(draw.confusion(matrix.matrix, self.data.classes), self.out / "confusion.png")
        images.save(self.out / "images.csv")
        shown = self._save_pictures(images.worst(WORST_IMAGES), self.out / "worst.png")
        panels.save(self.out / panels.WORST, *shown, self.data.palette)

    def pictures(self, step: int) -> dict[str, Path]:
        """Returns the files of the pictures that an evaluation has saved."""
        preview = self.out / "preview" / f"{step:06}.png"
        return {"preview": preview, "worst": self.out / "worst.png", "confusion": self.out / "confusion.png"}

    def _save_pictures(self, indices: Sequence[int], path: Path) -> tuple[list[panels.Sample], list]:
        """Saves a picture of some images, and returns what it shows, reduced."""
        samples = [self.data[index] for index in indices]
        images = [sample.image for sample in samples]
        predictions = predict(self.model, images, self.config.evaluation, precision=self.config.precision)
        shown = [visible(sample.image, self.model.range) for sample in samples]
        labels = [prediction.labels for prediction in predictions]
        trios = list(zip(shown, samples, labels, strict=True))
        rows = [(image, sample.mask, found) for image, sample, found in trios]
        draw.save(draw.preview(rows, self.data.classes, self.data.palette), path)
        reduced = [panels.reduced(image, sample.mask, sample.name) for image, sample, _ in trios]
        return reduced, [panels.reduced_labels(found) for found in labels]


def rated(scores: Scores, loss: MeanLoss | None, step: int) -> Best:
    """Describes an evaluation by the scores that can make it the best one."""
    best: Best = {"miou": scores.miou, "dice": scores.dice.nanmean().item(), "step": step}
    return best if loss is None else {**best, "loss": loss.mean}


def is_better(one: Best, other: Best | None, by: Literal["miou", "dice", "loss"]) -> bool:
    """Tells whether an evaluation is better than the best one before it."""
    if other is None:
        return True
    if by == "loss":
        return one.get("loss", math.inf) < other.get("loss", math.inf)
    return one[by] > other[by]
