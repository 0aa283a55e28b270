"""Reads mask images of any kind: exports of Roboflow and CVAT, VOC's and Cityscapes' folders, and folders of one's own.

`pairing` finds the image of each mask, a list of classes is read from whatever file a tool writes it to, and `encoding`
finds out what the pixels stand for:

    classes.txt       a name for each class, with or without its colour
    labelmap.txt      CVAT: name:red,green,blue:parts:actions
    _classes.csv      Roboflow: the value in masks, the name
    class_dict.csv    name, red, green, blue
"""

import csv
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.data.classes import Color, read_classes
from apcnet.data.imports.encoding import Encoding, Legend, count, infer, palette_of, read_stored
from apcnet.data.imports.regions import Size
from apcnet.data.imports.source import Item, Source, missing_note
from apcnet.data.layout import files_below
from apcnet.data.pairing import Pairing, find_pairs

KIND = "mask images"

LISTS = ("classes.txt", "labelmap.txt", "_classes.csv", "class_dict.csv", "labels.txt", "label_colors.txt", "codes.txt")
_COLORS = re.compile(r"(.*\S)[\s,]+\d+[\s,]+\d+[\s,]+\d+")


def files(root: Path) -> Pairing:
    """Pairs the images and masks of a folder."""
    return find_pairs(root)


def read(root: Path, pairing: Pairing, classes: Path | None, progress: Callable[[int, int], None]) -> Source:
    """Reads masks as their encoding and the list of classes say; `classes` replaces the source's own list."""
    pairs = pairing.pairs
    masks = [pairing.masks[name] for name in pairs]
    listed = classes or _find_list(root)
    legend = read_legend(listed) if listed else Legend()
    by_color = legend.colors is not None and _palette_shows(masks[0], legend.colors)
    with ThreadPoolExecutor() as pool:
        counted = []
        for each in pool.map(partial(count, by_color=by_color), masks):
            counted.append(each)
            progress(len(counted), len(masks))
    encoding = infer(masks, legend, counted, str(root))
    items = [
        Item(name.name, pairing.images[name], name.split, partial(_mask, encoding, pairing.masks[name]))
        for name in pairs
    ]
    notes = [note for note in encoding.notes if note]
    notes += missing_note([name.name for name in pairing.masks if name not in pairing.images])
    bare = len(pairing.images.keys() - pairing.masks.keys())
    notes += [f"{bare} images have no mask and were left out"] if bare else []
    tool = {"labelmap.txt": " of CVAT", "_classes.csv": " of Roboflow"}.get(listed.name if listed else "", "")
    where = f", with classes from {listed.name}" if listed else ""
    return Source(f"mask images{tool}, {encoding.words}{where}", encoding.classes, encoding.palette, items, notes)


def _mask(encoding: Encoding, path: Path, size: Size) -> np.ndarray:
    labels = encoding.labels(path)
    if labels.shape != size:
        raise ValueError(f"{path}: expected the size of its image, {size[1]}×{size[0]}, got {labels.shape[::-1]}")
    return labels


def _find_list(root: Path) -> Path | None:
    """Returns the list of classes that lies highest in the source; of several, the one that names values or colours."""
    found = [path for path in files_below(root) if path.name in LISTS]
    return min(found, key=lambda path: (len(path.parts), LISTS.index(path.name), path), default=None)


def read_legend(path: Path) -> Legend:
    """Reads a list of classes in the form that its name tells."""
    text = path.read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if path.name == "labelmap.txt":
        fields = [line.split(":") for line in lines]
        return Legend([each[0] for each in fields], [_color(each[1].split(","), path) for each in fields])
    if path.suffix == ".csv":
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines)][1:]
        if path.name == "_classes.csv" or all(len(row) == 2 for row in rows):
            return Legend([row[1] for row in rows], None, [int(row[0]) for row in rows])
        return Legend([row[0] for row in rows], [_color(row[1:4], path) for row in rows])
    if path.name == "label_colors.txt":
        fields = [line.split() for line in lines]
        return Legend([" ".join(each[3:]) for each in fields], [_color(each[:3], path) for each in fields])
    names, colors = read_classes(path)
    return Legend(list(names), list(colors) if any(map(_COLORS.fullmatch, lines)) else None)


def _color(parts: list[str], path: Path) -> Color:
    try:
        red, green, blue = map(int, parts)
    except ValueError:
        raise ValueError(f"{path}: expected red, green and blue for each class, got {parts}") from None
    return red, green, blue


def _palette_shows(mask: Path, colors: list[Color]) -> bool:
    """Returns True if a palette image shows classes by its colours, with indices of its own."""
    palette = palette_of(mask)
    if palette is None:
        return False
    used = {value: palette[value] for value in set(read_stored(mask).flat) if value < len(palette)}
    return set(used.values()) <= set(colors) and any(colors.index(color) != value for value, color in used.items())
