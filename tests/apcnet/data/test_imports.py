"""Tests that the exports of annotation tools become folders with the same masks."""

from functools import partial
from pathlib import Path

import annotation_trees as trees
import fake_trees
import numpy as np
import pytest
from PIL import Image

import apcnet.data
from apcnet.data.imports.convert import convert
from apcnet.data.imports.regions import coco_run_lengths, counting, fill, from_lengths, polygon

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
    "two-suffixes": (partial(trees.masks, encode=np.copy, ending=".jpg"), "mask images, class indices", 1),
    "camvid": (trees.camvid, "mask images, the colours", 1),
    "flat": (trees.flat, "mask images, class indices", 1),
    "mmsegmentation": (trees.mmsegmentation, "mask images, class indices", 1),
}
BINARY = {
    "0-255": (lambda mask: (mask > 0) * np.uint8(255), "png", None),
    "0-255-names": (lambda mask: (mask > 0) * np.uint8(255), "png", ("ground", "thing")),
    "0-255-rgb": (lambda mask: np.stack([(mask > 0) * np.uint8(255)] * 3, -1), "png", None),
    "one-bit": (lambda mask: mask > 0, "png", None),
    "grey-colours": (lambda mask: (mask == 0) * np.uint8(255), "png", ("thing 0 0 0", "ground 255 255 255")),
    "smooth": (lambda mask: smoothed((mask > 0) * np.uint8(255)), "png", ("ground", "thing")),
    "jpeg": (lambda mask: (mask > 0) * np.uint8(255), "jpg", None),
    "jpeg-rgb": (lambda mask: np.stack([(mask > 0) * np.uint8(255)] * 3, -1), "jpg", None),
}


def smoothed(mask: np.ndarray) -> np.ndarray:
    """Scales a mask up and down again, as a drawing program does: borders get values in between."""
    picture = Image.fromarray(mask)
    size = picture.size[0] * 3 // 2, picture.size[1] * 3 // 2
    return np.array(picture.resize(size, Image.Resampling.BILINEAR).resize(picture.size, Image.Resampling.BILINEAR))


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
    assert made.classes == tuple(name.split()[0] for name in classes or ("background", "object"))
    thing = 0 if form == "grey-colours" else 1
    for original, imported in matched(samples, imported_masks(tmp_path / "out")):
        assert ((original > 0) == (imported == thing)).mean() >= (0.97 if suffix == "jpg" or form == "smooth" else 1)
        assert set(np.unique(imported)) <= {0, 1}
    assert any("JPEG" in note for note in made.notes) == (suffix == "jpg")
    assert any("values between" in note for note in made.notes) == (form == "smooth")


def test_polygons_mark_the_pixels_whose_centres_they_enclose():
    rng, size = np.random.default_rng(1), (40, 50)
    for _ in range(20):
        points = rng.uniform(-5, 55, (7, 2))
        marked = polygon(points, size)
        for i, j in rng.integers(0, 40, (60, 2)):
            x, y, inside = j + 0.5, i + 0.5, False
            for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
                if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                    inside = not inside
            assert marked[i, j] == inside


def test_contours_of_programs_count_pixels_in_their_own_way():
    """Tests a rhombus of pixels from its outline, as OpenCV, as scikit-image, and along the edges of pixels."""
    v, u = np.ogrid[:40, :50]
    region = abs(u - 20) + abs(v - 15) <= 8
    corners = np.array([(28, 15), (20, 23), (12, 15), (20, 7)], float)
    around = [(12 + i, 15.5 + i) if half else (11.5 + i, 15 + i) for i in range(9) for half in (0, 1)]
    skimage = around + [(40 - x, 30 - y) for x, y in around]
    skimage += [(x, 30 - y) for x, y in around] + [(40 - x, y) for x, y in around]
    center = np.array((20, 15))
    skimage = np.array(sorted(set(skimage), key=lambda point: np.arctan2(*(np.array(point) - center)[::-1])))
    edges = trees.outlines(region)
    for rings, kind in (([corners], "opencv"), ([skimage], "skimage"), (edges, "corners")):
        assert counting(rings) == kind
        mask = np.zeros(region.shape, np.uint8)
        fill(rings, region.shape, kind).paint(mask, 1)
        assert np.array_equal(mask, region), kind
    hole = abs(u - 20) + abs(v - 15) <= 3
    inner = {"opencv": corners * 0.5 + (10, 7.5), "corners": trees.outlines(hole)[0]}
    for rings, kind in (([corners], "opencv"), (edges, "corners")):
        mask = np.zeros(region.shape, np.uint8)
        fill([inner[kind], *rings], region.shape, kind).paint(mask, 1)
        assert np.array_equal(mask, region & ~hole), kind
    for moved in (0, -16, 40):  # partly outside of the image, and outside of it
        mask = np.zeros(region.shape, np.uint8)
        fill([corners + np.array((moved, moved / 2))], region.shape, "opencv").paint(mask, 1)
        assert np.array_equal(mask, abs(u - 20 - moved) + abs(v - 15 - moved / 2) <= 8), moved
    assert counting([corners + 0.3]) == "corners" and counting([]) == "corners"


@pytest.mark.parametrize("counts", [[3, 5], [-1, 21], "zz"])
def test_run_lengths_that_are_wrong_are_refused(counts):
    with pytest.raises(ValueError, match=r"expected (a )?run"):
        coco_run_lengths({"size": [4, 5], "counts": counts}, (4, 5))
    assert from_lengths([2, 3], 5).tolist() == [False, False, True, True, True]


def test_an_export_that_names_several_images_alike_is_refused(tmp_path):
    trees.coco(trees.draw_samples(2), tmp_path / "mine")
    images = tmp_path / "mine" / "images"
    for folder in ("a", "b"):
        fake_trees.save(np.zeros((60, 84, 3), np.uint8), images / folder / "photo 00.jpg")
    (images / "photo 00.jpg").unlink()
    with pytest.raises(ValueError, match=r"expected one image photo 00\.jpg, found .*; remove one"):
        convert(tmp_path / "mine", tmp_path / "out")


def test_a_file_of_annotations_finds_its_images_above(tmp_path):
    samples = trees.draw_samples(2)
    trees.coco(samples, tmp_path / "mine")
    made = convert(tmp_path / "mine" / "annotations" / "instances_default.json", tmp_path / "out")
    assert made.format == "annotations of COCO" and made.written == 2


def test_images_of_many_bands_are_imported_as_they_are(tmp_path):
    samples = trees.draw_samples(3)
    for name, (image, mask) in samples.items():
        levels = np.concatenate([image * np.uint16(9)] * 2, 2)
        trees.bands(tmp_path / "mine" / "images" / f"{name}.tif", levels)
        fake_trees.save((mask > 0) * np.uint8(255), tmp_path / "mine" / "masks" / f"{name}.png")
    convert(tmp_path / "mine", tmp_path / "out")
    for image, _, name in apcnet.data.open("folder", tmp_path / "out", "train"):
        assert image.shape[0] == 6 and np.array_equal(image[:3].numpy(), samples[name][0].transpose(2, 0, 1) * 9.0)
    assert Image.open(tmp_path / "out" / "examples.png").width > 600
