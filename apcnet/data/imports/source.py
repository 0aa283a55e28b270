"""Defines what every reader returns: the classes of a source, and a name, an image and a mask for each sample."""

import json
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from apcnet.data.classes import Color
from apcnet.data.imports.regions import Size, counting, cropped, fill
from apcnet.data.layout import SUFFIXES, files_below
from apcnet.data.pairing import SPLITS

BACKGROUND = "background"
Region = tuple[int, np.ndarray | list[np.ndarray]]  # the index of a class, and its pixels (H, W) or its rings (N, 2)


class Item(NamedTuple):
    """Describes a sample of a source."""

    name: str  # a relative path without suffix, different for every sample of a split
    image: Path
    split: str | None  # train, val or test; None if the source does not say
    mask: Callable[[Size], np.ndarray]  # makes the mask (H, W) uint8 for an image of a size (H, W)


@dataclass
class Source:
    """Describes a source in the words of a reader, and how to make its masks."""

    format: str  # completes "SOURCE holds …"
    classes: Sequence[str]
    palette: Sequence[Color] | None
    items: list[Item]
    notes: list[str] = field(default_factory=list)  # what a user has to know about the conversion


def with_background(names: Iterable[str]) -> list[str]:
    """Returns the classes of a tool that stores regions: those names, and before them the pixels of no region."""
    names = list(dict.fromkeys(names))
    first = next((name for name in names if name.strip("_").lower() == BACKGROUND), BACKGROUND)
    return [first, *(name for name in names if name != first)]


def paint(regions: Iterable[Region], size: Size, by_area: bool) -> np.ndarray:
    """Draws regions on a mask of class 0, in order or from the largest to the smallest; later ones cover others."""
    shapes = [(label, shape if isinstance(shape, list) else cropped(shape)) for label, shape in regions]
    counted = counting(ring for _, shape in shapes if isinstance(shape, list) for ring in shape)
    patches = [(label, fill(shape, size, counted) if isinstance(shape, list) else shape) for label, shape in shapes]
    if by_area:
        patches.sort(key=lambda region: -int(region[1].pixels.sum()))
    mask = np.zeros(size, np.uint8)
    for label, patch in patches:
        patch.paint(mask, label)
    return mask


def split_in(path: Path, root: Path) -> str | None:
    """Returns the split that a folder on the way to a file, or the file itself, is named after."""
    parts = [*path.relative_to(root).parts[:-1], *path.stem.replace("-", "_").split("_")]
    return next((SPLITS[part.lower()] for part in parts if part.lower() in SPLITS), None)


class Images:
    """Finds the image files of a source by the names that annotations give them."""

    def __init__(self, root: Path):
        self.root = root
        self.files = {path for path in files_below(root) if path.suffix.lower() in SUFFIXES}
        self.by_name, self.by_stem = defaultdict(list), defaultdict(list)
        for path in sorted(self.files):
            self.by_name[path.name].append(path)
            self.by_stem[path.stem].append(path)

    def find(self, name: str, near: Path | None = None, split: str | None = None) -> Path | None:
        """Returns the image of a name, relative to a folder or to the root, wherever it lies; None if there is none."""
        relative = PurePosixPath(name.replace("\\", "/"))
        for folder in filter(None, (near, near and near / "images", self.root, self.root / "images")):
            if (path := folder / relative) in self.files:
                return path
        found = self.by_name[relative.name] or self.by_stem[relative.stem if relative.suffix else relative.name]
        if len(found) > 1:
            ends = [path for path in found if path.as_posix().endswith(f"/{relative.as_posix()}")]
            found = ends or [path for path in found if split_in(path, self.root) == split] or found
        if len(found) > 1:
            raise ValueError(f"{self.root}: expected one image {name}, found {found[0]} and {found[1]}; remove one")
        return found[0] if found else None


def name_of(image: Path, root: Path) -> str:
    """Returns the name of a sample: the path of its image without suffix and without folders of kinds and splits."""
    skipped = SPLITS.keys() | {"images", "image", "imgs", "img", "img_dir", "jpegimages", "leftimg8bit", "data", "obj"}
    parts = image.relative_to(root).with_suffix("").parts
    return "/".join([*(part for part in parts[:-1] if part.lower() not in skipped), parts[-1]])


def missing_note(missing: Sequence[str]) -> list[str]:
    """Returns a note on annotations without an image, if there are any."""
    if not missing:
        return []
    return [f"{len(missing)} annotated images are not in the source and were left out: {', '.join(missing[:3])} …"]


def read_json_with(path: Path, *keys: str) -> Any:
    """Reads a JSON file that holds these words as keys, or returns None; files of gigabytes without them are fast."""
    content = path.read_bytes()
    if not all(f'"{key}"'.encode() in content for key in keys):
        return None
    try:
        return json.loads(content)
    except ValueError:
        return None


def read_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: expected XML, found something else ({error})") from None
