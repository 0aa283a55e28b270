"""Evaluates the model of a run on its validation images, and writes pictures of what it predicts."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from apcnet import draw
from apcnet.config import Config
from apcnet.confusion import ConfusionMatrix
from apcnet.data.levels import visible
from apcnet.data.sample import Dataset
from apcnet.distributed import gather, rank, world_size
from apcnet.files import remove_leftovers
from apcnet.inference.evaluation import evaluate
from apcnet.inference.prediction import predict
from apcnet.models import Segmentor

PREVIEW_IMAGES = 4


class Validation:
    """Holds a model, the images to evaluate it on, and the folder for the pictures."""

    def __init__(self, model: Segmentor, data: Dataset, config: Config, out: Path, workers: int):
        self.model, self.data, self.config, self.out, self.workers = model, data, config, out, workers
        self.is_main = rank() == 0

    def measure(self, progress: Callable[[int, int], None]) -> tuple[ConfusionMatrix, list[float]]:
        """Returns the confusion matrix of all images, and the share of wrong pixels of each image, by its index."""
        wrong: list[float] = []
        matrix = evaluate(
            self.model,
            self.data,
            self.config.evaluation,
            workers=self.workers,
            precision=self.config.precision,
            channels_last=self.config.channels_last,
            progress=progress,
            each=lambda _, counts: wrong.append(wrong_share(counts)),
        )
        if math.isnan(matrix.scores().miou):
            split = self.config.data.val_split
            raise ValueError(f"val_split: expected labelled pixels, found none in {split}")
        shares = gather(wrong)
        return matrix, [shares[i % world_size()][i // world_size()] for i in range(len(self.data))]

    def save_preview(self, step: int) -> None:
        """Saves a picture of the first images with their labels, predictions and errors."""
        if not self.is_main:
            return
        (self.out / "preview").mkdir(exist_ok=True)
        remove_leftovers(self.out / "preview")
        first = range(min(PREVIEW_IMAGES, len(self.data)))
        self._save_pictures(first, self.out / "preview" / f"{step:06}.png")

    def save_results(self, matrix: ConfusionMatrix, wrong: list[float]) -> None:
        """Saves pictures of the final model's confusion matrix, and of the images that it gets most wrong."""
        if not self.is_main:
            return
        draw.save(draw.confusion(matrix.matrix, self.data.classes), self.out / "confusion.png")
        by_share = sorted(range(len(wrong)), key=lambda index: (wrong[index], index), reverse=True)
        self._save_pictures(by_share[:PREVIEW_IMAGES], self.out / "worst.png")

    def _save_pictures(self, indices: Iterable[int], path: Path) -> None:
        samples = [self.data[index] for index in indices]
        images = [sample.image for sample in samples]
        predictions = predict(self.model, images, self.config.evaluation, precision=self.config.precision)
        rows = [
            (visible(sample.image, self.model.range), sample.mask, prediction.labels)
            for sample, prediction in zip(samples, predictions, strict=True)
        ]
        draw.save(draw.preview(rows, self.data.classes, self.data.palette), path)


def wrong_share(counts: Tensor) -> float:
    """Returns the share of an image's pixels that are predicted wrong; 0 if none is labelled."""
    total = int(counts.sum())
    return 1 - int(counts.diagonal().sum()) / total if total else 0.0
