"""Gathers what an evaluation has measured: as a table, as totals in one line, and as files."""

from pathlib import Path
from typing import NamedTuple

from apcnet import draw
from apcnet.confusion import ConfusionMatrix, percent
from apcnet.data.sample import Dataset
from apcnet.files import write_json
from apcnet.inference.measures import BoundaryIoU, Calibration, MeanLoss, PerImage


class Results(NamedTuple):
    """Holds a confusion matrix, the scores of every image, and the measures that were asked for."""

    dataset: Dataset
    matrix: ConfusionMatrix
    images: PerImage
    boundary: BoundaryIoU | None = None
    calibration: Calibration | None = None
    loss: MeanLoss | None = None

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the rows of a table: headings, the scores of each class in per cent, and the means."""
        scores = self.matrix.scores()
        rows = [("class", "IoU", "Dice", "precision", "recall"), *scores.rows(self.dataset.classes)]
        if self.boundary is None:
            return rows
        iou = self.boundary.iou
        cells = ["boundary IoU", *map(percent, [*iou.tolist(), iou.nanmean().item()])]
        return [(*row, cell) for row, cell in zip(rows, cells, strict=True)]

    def totals(self) -> str:
        """Returns the scores over all classes in one line."""
        scores = self.matrix.scores()
        shares = {"mIoU": scores.miou, "mAcc": scores.macc, "aAcc": scores.aacc, "fwIoU": scores.fwiou}
        if self.calibration is not None:
            shares["ECE"] = self.calibration.ece
        shown = [f"{name} {percent(share)}" for name, share in shares.items()]
        return "  ".join([*shown, f"loss {self.loss.mean:.4f}"] if self.loss is not None else shown)

    def record(self) -> dict:
        """Returns all scores as a dict for JSON."""
        record = self.matrix.scores().record(self.dataset)
        if self.boundary is not None:
            record |= self.boundary.record(self.dataset.classes)
        if self.calibration is not None:
            record |= self.calibration.record()
        return record if self.loss is None else record | {"loss": self.loss.mean}

    def save(self, folder: Path) -> None:
        """Writes metrics.json, images.csv, confusion.npy and confusion.png."""
        write_json(folder / "metrics.json", self.record())
        self.images.save(folder / "images.csv")
        self.matrix.save(folder / "confusion.npy")
        draw.save(draw.confusion(self.matrix.matrix, self.dataset.classes), folder / "confusion.png")
        draw.save_names(folder, self.dataset.classes)
