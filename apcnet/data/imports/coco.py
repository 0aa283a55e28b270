"""Reads COCO's annotations: polygons and run lengths, one JSON file for each split.

Categories become classes in the order of their ids, after a background of all pixels without annotation.
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

from apcnet.data.imports.regions import Size, coco_run_lengths
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

KIND = "annotations of COCO"
KEYS = ("images", "annotations", "categories")


def files(root: Path) -> list[Path]:
    """Finds the annotations of COCO in a folder."""
    return [path for path in sorted(files_below(root)) if path.suffix == ".json" and _is_coco(path)]


def _is_coco(path: Path) -> bool:
    content = read_json_with(path, *KEYS)
    return isinstance(content, dict) and content.keys() >= set(KEYS)


def read(root: Path, paths: list[Path]) -> Source:
    """Reads annotations, whose images lie anywhere below the root."""
    contents = {path: json.loads(path.read_bytes()) for path in paths}
    names = {}
    for path, content in contents.items():
        for category in content["categories"]:
            if names.setdefault(category["id"], category["name"]) != category["name"]:
                raise ValueError(
                    f"{path}: expected category {category['id']} to be {names[category['id']]!r}, as in the other "
                    f"files, got {category['name']!r}; import the files one by one"
                )
    used = {one["category_id"] for content in contents.values() for one in content["annotations"]}
    # Roboflow lists a parent of all categories, with id 0, that no annotation uses
    listed = [names[key] for key in sorted(names) if key in used or key != 0]
    classes = with_background(listed)
    images, items, missing = Images(root), [], []
    for path, content in contents.items():
        annotations = defaultdict(list)
        for one in content["annotations"]:
            annotations[one["image_id"]].append(one)
        split = split_in(path, root)
        for image in content["images"]:
            file = images.find(image["file_name"], path.parent, split)
            if file is None:
                missing.append(image["file_name"])
                continue
            regions = [(classes.index(names[one["category_id"]]), one) for one in annotations[image["id"]]]
            items.append(Item(name_of(file, root), file, split or split_in(file, root), partial(_mask, path, regions)))
    notes = ["pixels without annotation became the class background; where regions overlap, the smaller one is on top"]
    return Source("annotations of COCO", classes, None, items, notes + missing_note(missing))


def _mask(path: Path, regions: list[tuple[int, dict]], size: Size) -> np.ndarray:
    def shape(one: dict) -> np.ndarray | list[np.ndarray]:
        try:
            code = one["segmentation"]
            if isinstance(code, dict):
                return coco_run_lengths(code, size)
            return [np.array(ring, np.float64).reshape(-1, 2) for ring in code]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: annotation {one.get('id')}: {error}") from error

    return paint(((label, shape(one)) for label, one in regions), size, by_area=True)
