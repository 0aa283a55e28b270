"""Reads segmentation labels of YOLO: a text file for each image, with a class and a polygon in each line.

    images/train/a.jpg
    labels/train/a.txt      0 0.25 0.25 0.75 0.25 0.5 0.75     the index of a class; x and y as shares of the size
    data.yaml               names: [cat, dog], or a line "0: cat" for each

Images without a file of labels show background only, as YOLO's own training takes them.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.data.imports.regions import Size
from apcnet.data.imports.source import Images, Item, Source, name_of, paint, split_in, with_background
from apcnet.data.layout import files_below

KIND = "polygons of YOLO"

_LINE = re.compile(r"\d+(\s+-?[\d.]+(e-?\d+)?){6,}\s*")


def files(root: Path) -> list[Path]:
    """Finds text files whose lines are polygons of YOLO, and empty ones beside them."""
    texts = [path for path in sorted(files_below(root)) if path.suffix == ".txt"]
    labels = [path for path in texts if _is_label(path)]
    folders = {path.parent for path in labels}
    return labels + [path for path in texts if path.parent in folders and not path.stat().st_size]


def _is_label(path: Path) -> bool:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return False
    lines = [line for line in lines if line.strip()]
    return bool(lines) and any(_LINE.fullmatch(line) for line in lines)


def read(root: Path, paths: list[Path]) -> Source:
    """Reads labels, whose images have the same names."""
    names = _names(root, paths)
    classes = with_background(names)
    by_place = {_place(path, root, "labels"): path for path in paths}
    by_stem = {path.stem: path for path in paths}
    items, bare = [], 0
    for image in sorted(Images(root).files):
        path = by_place.get(_place(image, root, "images")) or by_stem.get(image.stem)
        bare += path is None
        mask = partial(_mask, path, [classes.index(name) for name in names])
        items.append(Item(name_of(image, root), image, split_in(image, root), mask))
    notes = ["pixels of no polygon became the class background; where polygons overlap, the smaller one is on top"]
    notes += [f"{bare} images have no file of labels: they became background as a whole"] if bare else []
    return Source("polygons of YOLO", classes, None, items, notes)


def _place(path: Path, root: Path, kind: str) -> tuple[str, ...]:
    """Returns the path of a file without suffix and without the folder that tells its kind."""
    return tuple(part for part in path.relative_to(root).with_suffix("").parts if part.lower() != kind)


def _names(root: Path, paths: list[Path]) -> list[str]:
    """Reads the names of the classes from the first file of YAML or text that lists them."""
    labels = set(paths)
    for path in sorted(files_below(root), key=lambda path: (path.name not in ("data.yaml", "dataset.yaml"), path)):
        if path.suffix in (".yaml", ".yml") and (found := _names_in_yaml(path.read_text(encoding="utf-8"))):
            return found
    for path in sorted(files_below(root)):
        if path.name in ("classes.txt", "obj.names", "names.txt") and path not in labels:
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    indices = {int(line.split()[0]) for path in paths for line in path.read_text().splitlines() if line.strip()}
    return [f"class {index}" for index in range(max(indices, default=-1) + 1)]


def _names_in_yaml(text: str) -> list[str]:
    """Reads the entry `names` in one of its three forms: [a, b], lines of "- a", or lines of "0: a"."""
    match = re.search(r"^names:[ \t]*(\[[^\]]*\]|\{[^}]*\}|(?:\n[ \t]*(?:-|\d+:)[^\n]*)+)", text, re.MULTILINE)
    if match is None:
        return []
    entry = match[1]
    if entry[0] in "[{":
        parts = re.findall(r"""(?:(\d+)\s*:\s*)?("[^"]*"|'[^']*'|[^,\[\]{}]+)""", entry)
        found = [(index, name.strip().strip("'\"")) for index, name in parts if name.strip()]
    else:
        lines = re.findall(r"^[ \t]*(?:-|(\d+):)[ \t]*(.*?)[ \t]*(?:#.*)?$", entry, re.MULTILINE)
        found = [(index, name.strip("'\"")) for index, name in lines]
    numbered = {int(index) if index else i: name for i, (index, name) in enumerate(found)}
    return [numbered.get(i, f"class {i}") for i in range(max(numbered) + 1)]


def _mask(path: Path | None, labels: list[int], size: Size) -> np.ndarray:
    regions, (height, width) = [], size
    for number, line in enumerate(path.read_text().splitlines() if path else (), 1):
        if not line.strip():
            continue
        index, *numbers = map(float, line.split())
        if not 0 <= index < len(labels) or len(numbers) < 6 or len(numbers) % 2:
            raise ValueError(
                f"{path}: line {number}: expected a class from 0 to {len(labels) - 1} and a polygon of x and y, got "
                f"{line[:40]!r}"
            )
        points = np.array(numbers).reshape(-1, 2) * (width, height)
        regions.append((labels[int(index)], [points]))
    return paint(regions, size, by_area=True)
