"""Tests that the exports of annotation tools become folders with the same masks."""

from functools import partial
from pathlib import Path

import annotation_trees as trees
import numpy as np
import pytest
from PIL import Image

import apcnet.data
from apcnet.data.imports.convert import convert

COLORS, VOC = np.array(trees.COLORS, np.uint8), np.array(trees.VOC, np.uint8)
COLORED = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(trees.CLASSES, trees.COLORS, strict=True)]
FORMS = {  # how a source is written, what it is taken for, and the share of equal pixels
    "coco": (trees.coco, "annotations of COCO", 1),
    "coco-rle": (partial(trees.coco, rle="text"), "annotations of COCO", 1),
    "coco-lengths": (partial(trees.coco, rle="list"), "annotations of COCO", 1),
    "yolo": (trees.yolo, "polygons of YOLO", 1),
    "labelme": (trees.labelme, "annotations of LabelMe", 1),
    "cvat": (trees.cvat_images, "annotations of CVAT", 1),
    "cvat-masks": (trees.cvat_masks, "mask images of CVAT, the colours", 1),
    "voc": (partial(trees.voc, palette=False), "mask images, 4 colours", 1),
    "voc-palette": (partial(trees.voc, palette=True), "mask images, class indices", 1),
    "roboflow": (trees.roboflow, "mask images of Roboflow, the values", 1),
    "label-studio": (partial(trees.label_studio, export="json"), "an export of Label Studio", 1),
    "label-studio-brush": (partial(trees.label_studio, export="brush"), "brush labels of Label Studio", 1),
    "cityscapes": (trees.cityscapes, "mask images, class indices", 1),
    "rgb": (partial(trees.masks, encode=lambda m: COLORS[m], classes=COLORED), "mask images, the colours", 1),
    "rgb-found": (partial(trees.masks, encode=lambda m: COLORS[m], classes=None), "mask images, 4 colours", 1),
    "grey-rgb": (partial(trees.masks, encode=lambda m: np.stack([m] * 3, -1)), "mask images, class indices", 1),
    "stretched": (partial(trees.masks, encode=lambda m: m * 85), "mask images, 4 values", 1),
    "jpeg": (partial(trees.masks, encode=lambda m: COLORS[m], suffix="jpg", classes=COLORED), "mask images", 0.93),
    "jpeg-found": (
        partial(trees.masks, encode=lambda m: COLORS[m], suffix="jpg", classes=None),
        "mask images, 4",
        0.93,
    ),
    "jpeg-grey": (partial(trees.masks, encode=lambda m: m * 85, suffix="jpg"), "mask images, 4 values", 0.93),
    "suffixes": (partial(trees.masks, encode=np.copy, ending="_segmentation"), "mask images, class indices", 1),
    "flat": (trees.flat, "mask images, class indices", 1),
    "mmsegmentation": (trees.mmsegmentation, "mask images, class indices", 1),
}
BINARY = {
    "0-255": (lambda mask: (mask > 0) * np.uint8(255), "png", None),
    "0-255-names": (lambda mask: (mask > 0) * np.uint8(255), "png", ("ground", "thing")),
    "0-255-rgb": (lambda mask: np.stack([(mask > 0) * np.uint8(255)] * 3, -1), "png", None),
    "one-bit": (lambda mask: mask > 0, "png", None),
    "jpeg": (lambda mask: (mask > 0) * np.uint8(255), "jpg", None),
    "jpeg-rgb": (lambda mask: np.stack([(mask > 0) * np.uint8(255)] * 3, -1), "jpg", None),
}


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def imported_masks(out: Path) -> dict[str, np.ndarray]:
    """Returns all imported masks by the name of their image, and checks that the images are those of the source."""
    return {path.stem: np.array(Image.open(path)) for path in (out / "masks").rglob("*.png")}


def matched(samples, masks) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs the original masks with the imported ones; both are sorted by name."""
    assert len(masks) == len(samples)
    return [(samples[name][1], masks[key]) for name, key in zip(sorted(samples), sorted(masks), strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_masks_are_those_of_the_source(form, tmp_path):
    write, taken_for, share = FORMS[form]
    samples, source, out = trees.draw_samples(), tmp_path / "source", tmp_path / "out"
    write(samples, source)
    before = everything_in(source)
    made = convert(source, out)
    assert made.format.startswith(taken_for) and made.written == len(samples)
    assert everything_in(source) == before
    order = [0, 1, 2, 3]
    if set(made.classes) == set(trees.CLASSES):
        order = [trees.CLASSES.index(name) for name in made.classes]
    elif made.classes[1].startswith("colour"):
        near = [
            np.abs((VOC if form == "voc" else COLORS) - np.array(color_in(name), int)).sum(1) for name in made.classes
        ]
        order = [int(distances.argmin()) for distances in near]
        assert max(distances.min() for distances in near) <= (6 if "jpeg" in form else 0)
    assert len(made.classes) == 4
    for original, imported in matched(samples, imported_masks(out)):
        assert (np.array(order)[imported] == original).mean() >= share
    for split in ("train", "val"):
        data = apcnet.data.open("folder", out, split)
        assert len(data) >= 1 and data.classes == made.classes
        list(data)
    assert Image.open(out / "examples.png").width > 600


def color_in(name: str) -> tuple[int, ...]:
    return (0, 0, 0) if name == "background" else tuple(map(int, name.split()[1:]))


@pytest.mark.parametrize("form", BINARY)
def test_masks_of_two_values_keep_the_object(form, tmp_path):
    encode, suffix, classes = BINARY[form]
    samples = trees.draw_samples()
    trees.masks(samples, tmp_path / "source", encode, suffix, classes)
    made = convert(tmp_path / "source", tmp_path / "out")
    assert made.classes == (classes or ("background", "object"))
    for original, imported in matched(samples, imported_masks(tmp_path / "out")):
        assert ((original > 0) == (imported == 1)).mean() >= (0.97 if suffix == "jpg" else 1)
        assert set(np.unique(imported)) <= {0, 1}
    assert any("JPEG" in note for note in made.notes) == (suffix == "jpg")
