"""Reads LabelMe's annotations: a JSON file beside each image, with polygons, rectangles, circles and masks.

Labels become classes in alphabetic order after the background, unless a labels.txt or classes.txt lists them. Later
shapes cover earlier ones, as in LabelMe's own export.
"""

import base64
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from apcnet.data.imports.regions import Size, ellipse, rectangle
from apcnet.data.imports.source import (
    Images,
    Item,
    Source,
    missing_note,
    name_of,
    paint,
    read_json_with,
    split_in,
    with_background,
)
from apcnet.data.layout import files_below

KIND = "annotations of LabelMe"

IGNORED = "__ignore__"  # LabelMe's own name of what does not count


def files(root: Path) -> list[Path]:
    """Finds LabelMe's files in a folder."""
    return [path for path in sorted(files_below(root)) if path.suffix == ".json" and _is_labelme(path)]


def _is_labelme(path: Path) -> bool:
    content = read_json_with(path, "shapes", "imagePath")
    return isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys()


def read(root: Path, paths: list[Path]) -> Source:
    """Reads annotations, whose images lie beside them or elsewhere below the root."""
    contents = {path: json.loads(path.read_bytes()) for path in paths}
    lists = [path for name in ("labels.txt", "classes.txt") for path in root.rglob(name)]
    if lists:
        labels = [line.strip() for line in lists[0].read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    else:
        labels = sorted({shape["label"] for content in contents.values() for shape in content["shapes"]})
    classes = with_background(name for name in labels if name != IGNORED)
    images, items, missing = Images(root), [], []
    for path, content in contents.items():
        image = images.find(content["imagePath"], path.parent, split_in(path, root)) or images.find(path.stem)
        if image is None:
            missing.append(content["imagePath"])
            continue
        mask = partial(_mask, path, content["shapes"], classes)
        items.append(Item(name_of(image, root), image, split_in(image, root), mask))
    notes = ["pixels outside all shapes became the class background; later shapes cover earlier ones"]
    bare = len(images.files) - len(items)
    notes += [f"{bare} images have no annotation and were left out"] if bare > 0 else []
    return Source("annotations of LabelMe", classes, None, items, notes + missing_note(missing))


def _mask(path: Path, shapes: list[dict], classes: list[str], size: Size) -> np.ndarray:
    regions = []
    for shape in shapes:
        label = shape["label"]
        if label not in classes and label != IGNORED:
            raise ValueError(f"{path}: expected labels of labels.txt, got {label!r}; add a line with it")
        pixels = _pixels(shape, size)
        if pixels is None:
            kind = shape.get("shape_type")
            raise ValueError(f"{path}: expected polygons, rectangles, circles and masks, got a {kind} ({label!r})")
        regions.append((255 if label == IGNORED else classes.index(label), pixels))
    return paint(regions, size, by_area=False)


def _pixels(shape: dict, size: Size) -> np.ndarray | list[np.ndarray] | None:
    points = np.array(shape["points"], np.float64)
    match shape.get("shape_type", "polygon"):
        case "polygon":
            return [points]
        case "rectangle":
            (left, top), (right, bottom) = points.min(0), points.max(0)
            return rectangle(left, top, right, bottom, size)
        case "circle":
            radius = float(np.linalg.norm(points[1] - points[0]))
            return ellipse(*points[0], radius, radius, size)
        case "mask":
            left, top = points.min(0).astype(int)
            part = np.array(Image.open(io.BytesIO(base64.b64decode(shape["mask"])))) > 0
            pixels = np.zeros(size, bool)
            place = pixels[top : top + part.shape[0], left : left + part.shape[1]]
            place |= part[: place.shape[0], : place.shape[1]]
            return pixels
    return None
