"""Predicts batches of rows for an engine that spreads them over processes: Ray Data, Spark, or a pool of Python's.

A `Predictor` is a callable that can be pickled. It holds the path of a model, and each process loads the model at its
first batch. Every image goes through `apcnet.predict` alone, so its labels do not depend on the batch that it is in.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from apcnet.choices import check_choice
from apcnet.config import Precision, Protocol
from apcnet.inference.prediction import Prediction, predict
from apcnet.inference.protocol import WHOLE
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.models.segmentor import Segmentor
from apcnet.zoo import load

COLUMNS = ("image", "bytes", "path")  # of rows, the first of these that they have
Rows = Mapping[str, Sequence]


class Predictor:
    """Maps rows with images to the same rows with labels; a row whose image cannot be read gets an error instead.

    Rows are columns by name: a dict, as Ray Data passes it, or a DataFrame, as Spark does. One column holds the images:
    `path`, the path of a file; `bytes`, the content of a file; or `image`, an array (H, W, 3) of RGB levels. The
    result has two more columns: `labels`, and `error`, which is empty if the image was predicted.

    Args:
        model: The path of a model file, which every process can read.
        protocol, max_pixels, precision: As in `apcnet.predict`.
        device: cpu or cuda; by default cuda if there is a GPU.
        labels: "png" for the content of a PNG file of class indices, or empty content in a row with an error; "array"
            for an array (H, W), or one of no pixels.

    Example:
        >>> predictor = apcnet.Predictor("model.safetensors", labels="array")
        >>> predictor({"path": ["a.jpg", "b.jpg"]})["labels"][0].shape
        (480, 640)
        >>> ray.data.read_images("photos").map_batches(
        ...     apcnet.Predictor, fn_constructor_args=["model.safetensors"], batch_size=16, concurrency=2
        ... )
    """

    def __init__(
        self,
        model: str | Path,
        protocol: Protocol = WHOLE,
        *,
        max_pixels: int = MAX_PIXELS,
        precision: Precision = "float32",
        device: str | None = None,
        labels: Literal["png", "array"] = "png",
    ):
        check_choice(labels, "labels", ("png", "array"))
        if not isinstance(model, str | Path):
            raise TypeError(f"model: expected the path of a model file, got {type(model).__name__}")
        self.path, self.protocol, self.device, self.labels = str(model), protocol, device, labels
        self.options: dict[str, Any] = {"max_pixels": max_pixels, "precision": precision}
        self.model: Segmentor | None = None

    def __getstate__(self) -> dict:
        return vars(self) | {"model": None}  # each process loads its own

    def __call__(self, rows: Rows) -> Any:
        """Predicts a batch of rows; returns them, of the type they had, with the columns labels and error."""
        column = next((name for name in COLUMNS if name in rows), None)
        if column is None:
            raise ValueError(f"rows: expected a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}, got {list(rows)}")
        if self.model is None:
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.model = load(self.path).to(device).eval()
        labels, errors = np.empty(len(rows[column]), object), []
        for number, image in enumerate(rows[column]):
            try:
                labels[number], error = self._encoded(self._predict(column, image)), ""
            except (ValueError, OSError, TypeError, Image.DecompressionBombError) as failure:
                labels[number] = b"" if self.labels == "png" else np.empty((0, 0), np.uint8)
                error = f"{type(failure).__name__}: {failure}"
            errors.append(error)
        added = {"labels": labels, "error": np.array(errors, object)}
        return rows.assign(**added) if hasattr(rows, "assign") else {**rows, **added}  # pyright: ignore[reportAttributeAccessIssue]

    def _predict(self, column: str, image: Any) -> Prediction:
        assert self.model is not None  # loaded before the first row
        if column == "path":
            image = str(image)
        if column == "bytes":
            image = Image.open(io.BytesIO(image))
        return predict(self.model, image, self.protocol, **self.options)

    def _encoded(self, prediction: Prediction) -> bytes | np.ndarray:
        if self.labels == "array":
            return prediction.labels.numpy()
        content = io.BytesIO()
        prediction.indices().save(content, "PNG")
        return content.getvalue()
