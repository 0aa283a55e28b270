"""Reads CVAT's annotations "for images 1.1": one XML file with polygons, boxes, ellipses and masks.

Labels become classes in the order of the task, after the background, in the task's colours. Shapes of a higher z_order
cover others, as in CVAT's own export of masks. Exports of masks are read by `masks`.
"""

import re
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from apcnet.data.imports.regions import Size, ellipse, from_lengths, rectangle
from apcnet.data.imports.source import (
    Images,
    Item,
    Source,
    missing_note,
    name_of,
    paint,
    read_xml,
    split_in,
    with_background,
)
from apcnet.data.layout import files_below
from apcnet.data.pairing import SPLITS

KIND = "annotations of CVAT"

SHAPES = ("polygon", "box", "ellipse", "mask")


def files(root: Path) -> list[Path]:
    """Finds CVAT's files in a folder."""
    paths = [path for path in sorted(files_below(root)) if path.suffix == ".xml"]
    return [path for path in paths if re.search(rb"<annotations[\s>]", path.read_bytes()[:2000])]


def read(root: Path, paths: list[Path]) -> Source:
    """Reads annotations, whose images lie anywhere below the root."""
    trees = {path: read_xml(path) for path in paths}
    colors = {}
    for tree in trees.values():
        for label in tree.iter("label"):
            if (name := label.findtext("name")) is not None:
                colors.setdefault(name, label.findtext("color") or "")
    drawn = [shape.get("label", "") for tree in trees.values() for kind in SHAPES for shape in tree.iter(kind)]
    classes = with_background([*colors, *sorted(set(drawn) - colors.keys())])
    images, items, missing = Images(root), [], []
    for path, tree in trees.items():
        for image in tree.iter("image"):
            name = image.get("name", "")
            split = SPLITS.get((image.get("subset") or "").lower()) or split_in(path, root)
            file = images.find(name, path.parent, split)
            if file is None:
                missing.append(name)
                continue
            shapes = sorted((e for e in image if e.tag in SHAPES), key=lambda e: int(e.get("z_order", 0)))
            mask = partial(_mask, path, name, shapes, classes)
            items.append(Item(name_of(file, root), file, split or split_in(file, root), mask))
    notes = ["pixels outside all shapes became the class background"]
    return Source("annotations of CVAT", classes, _palette(classes, colors), items, notes + missing_note(missing))


def _palette(classes: list[str], colors: dict[str, str]) -> list[tuple[int, int, int]] | None:
    found = {}
    for name in classes:
        if match := re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", colors.get(name, "")):
            red, green, blue = (int(part, 16) for part in match.groups())
            found[name] = red, green, blue
    found.setdefault(classes[0], (0, 0, 0))
    whole = len(found) == len(classes) == len(set(found.values()))
    return [found[name] for name in classes] if whole else None


def _mask(path: Path, name: str, shapes: list[Element], classes: list[str], size: Size) -> np.ndarray:
    try:
        regions = [(classes.index(shape.get("label", "")), _pixels(shape, size)) for shape in shapes]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: image {name}: {error}") from error
    return paint(regions, size, by_area=False)


def _pixels(shape: Element, size: Size) -> np.ndarray | list[np.ndarray]:
    def number(attribute: str) -> float:
        return float(shape.get(attribute, ""))

    if shape.tag == "polygon":
        return [np.array([point.split(",") for point in shape.get("points", "").split(";")], np.float64)]
    if shape.tag == "box":
        return rectangle(number("xtl"), number("ytl"), number("xbr"), number("ybr"), size)
    if shape.tag == "ellipse":
        return ellipse(number("cx"), number("cy"), number("rx"), number("ry"), size)
    left, top, width, height = (int(number(each)) for each in ("left", "top", "width", "height"))
    lengths = [int(part) for part in shape.get("rle", "").split(",")]
    pixels = np.zeros(size, bool)
    pixels[top : top + height, left : left + width] = from_lengths(lengths, width * height).reshape(height, width)
    return pixels
