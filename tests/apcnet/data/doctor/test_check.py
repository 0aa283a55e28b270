"""Tests that the doctor finds, names and explains every planted defect, and finds none in intact data."""

import json
import math
import os
from pathlib import Path

import fake_trees
import numpy as np
import pytest
from fake_trees import draw, save, save_lines
from PIL import Image

from apcnet import data
from apcnet.data.doctor.check import check
from apcnet.data.doctor.report import ERROR, weights_of

NAMES = {"train": ("a photo", "b", "ç"), "val": ("d", "e")}
CLASSES = ("road", "car", "sky")
PALETTE = ((128, 64, 128), (0, 0, 142), (70, 130, 180))

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00"


def image_of(root: Path, split: str = "train", name: str = "b") -> Path:
    return root / "images" / split / f"{name}.png"


def mask_of(root: Path, split: str = "train", name: str = "b") -> Path:
    return root / "masks" / split / f"{name}.png"


@pytest.fixture
def root(tmp_path):
    """Makes a folder without defects, with every class in every mask."""
    for split, names in NAMES.items():
        for name in names:
            image, mask = draw(name, (0, 1, 2, 255))
            mask[0, :3] = 0, 1, 2
            save(image, image_of(tmp_path, split, name))
            save(mask, mask_of(tmp_path, split, name))
    colored = (f"{name} {r} {g} {b}" for name, (r, g, b) in zip(CLASSES, PALETTE, strict=True))
    save_lines(colored, tmp_path / "classes.txt")
    return tmp_path


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def redo(path: Path, change, **options) -> None:
    """Rewrites a file with changed pixels."""
    save(change(read(path)), path, **options)


def redo_masks(root: Path, change) -> None:
    for split, names in NAMES.items():
        for name in names:
            redo(mask_of(root, split, name), change)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.png")


def table(*values: int) -> np.ndarray:
    """Maps 0, 1 and 2 to other values, and all others to 255, which is stored as the last of them."""
    change = np.full(256, values[-1], dtype=np.uint8)
    change[: len(values) - 1] = values[:-1]
    return change


def save_colored(mask: np.ndarray, path: Path, palette) -> None:
    """Saves a palette image, which gives each value a colour."""
    image = Image.fromarray(mask)
    image.putpalette([part for color in palette for part in color] + [0] * (768 - 3 * len(palette)))
    image.save(path)


def turned_by_exif(root: Path, orientation: int, mask_too: bool) -> None:
    """Saves a photograph as cameras do, with the tag that says how the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, mask = draw("upright", (0, 1, 2))
    quarters = {3: 2, 6: 1, 8: 3}[orientation]
    save(np.rot90(image, quarters).copy(), image_of(root), exif=exif)
    save(mask if mask_too else np.rot90(mask, quarters).copy(), mask_of(root))


DEFECTS = {  # what is done; the kind of the finding, how many there are, what its cause and its first example say
    "no mask": (lambda r: mask_of(r).unlink(), "mask missing", 1, "masks/train", "b"),
    "no image": (lambda r: image_of(r).unlink(), "image missing", 1, "images/train", "b"),
    "cut image": (lambda r: cut(image_of(r)), "unreadable image", 1, "ends too early", "b: "),
    "empty image": (lambda r: overwrite(image_of(r), b""), "unreadable image", 1, "empty", "b: "),
    "noise": (lambda r: overwrite(image_of(r), b"\x03" * 99), "unreadable image", 1, "damaged", "b: "),
    "web page": (lambda r: overwrite(image_of(r), b"\n<!DOCTYPE html>"), "unreadable image", 1, "web page", "b: "),
    "Git LFS": (lambda r: overwrite(mask_of(r), LFS_POINTER), "unreadable mask", 1, "git lfs pull", "b: "),
    "cut mask": (lambda r: cut(mask_of(r)), "unreadable mask", 1, "ends too early", "b: "),
    "link": (lambda r: link_to_nowhere(mask_of(r)), "unreadable mask", 1, "a link to a missing file", "b: "),
    "half a mask": (lambda r: redo(mask_of(r), lambda m: m[:5, :7]), "sizes differ", 1, "resized", "28×20, mask 7×5"),
    "cropped": (lambda r: redo(mask_of(r), lambda m: m[:-1]), "sizes differ", 1, "cropped", "image 28×20, mask 28×19"),
    "turned mask": (lambda r: redo(mask_of(r), np.rot90), "sizes differ", 1, "by 90°", "mask 20×28"),
    "EXIF": (lambda r: turned_by_exif(r, 6, False), "sizes differ", 1, "EXIF tag, its mask is not", "mask 20×28"),
    "colours": (
        lambda r: redo_masks(r, lambda m: np.array(PALETTE, np.uint8)[m % 3]),
        "mask without indices",
        3,
        "colours of the classes",
        "3 colours, such as (0, 0, 142)",
    ),
    "grey as RGB": (
        lambda r: redo(mask_of(r), lambda m: np.stack([m] * 3, -1)),
        "mask without indices",
        1,
        "the same value in red, green and blue",
        "b: 4 colours",
    ),
    "other colours": (
        lambda r: redo(mask_of(r), lambda m: np.stack([m, m * 9, m * 5], -1)),
        "mask without indices",
        1,
        "belong to no class",
        "b: 4 colours",
    ),
    "picture": (
        lambda r: save(np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8), mask_of(r)),
        "mask without indices",
        1,
        "more colours than a mask has",
        "b: more than 256",
    ),
    "JPEG": (lambda r: redo(mask_of(r), np.copy, format="JPEG"), "mask without indices", 1, "a JPEG", "b"),
    "mostly ignored": (
        lambda r: redo_masks(r, lambda m: np.where(np.arange(20)[:, None] > 4, 255, m).astype(np.uint8)),
        "most pixels ignored",
        1,
        "the value 255 is ignored; if it is a class",
        "% of all pixels",
    ),
    "32 bits": (
        lambda r: save(read(mask_of(r)).astype(np.float32), mask_of(r), format="TIFF"),
        "mask without indices",
        1,
        "neither grey nor palette",
        "b: Pillow's mode F",
    ),
    "background": (
        lambda r: redo_masks(r, table(1, 2, 3, 0).take),
        "labels out of range",
        3,
        "off by one, 4 values for 3 classes",
        "a photo: 3 at ",
    ),
    "from 1": (
        lambda r: redo_masks(r, table(1, 2, 3, 255).take),
        "labels out of range",
        3,
        "counted from 1 (reduce_zero_label): give labels={0: 255, 1: 0, …, 3: 2}",
        "a photo: 3 at ",
    ),
    "stretched": (
        lambda r: redo_masks(r, table(0, 100, 200, 0).take),
        "labels out of range",
        3,
        "multiple of 100",
        "a photo: 100 at ",
    ),
    "brightness": (
        lambda r: redo_masks(r, lambda m: np.array(Image.fromarray(np.array(PALETTE, np.uint8)[m % 3]).convert("L"))),
        "labels out of range",
        3,
        "brightness of the classes' colours",
        "a photo: 16 at ",
    ),
    "other data": (
        lambda r: redo(mask_of(r), table(0, 1, 77, 255).take),
        "labels out of range",
        1,
        "values from 0 to 77 for 3 classes",
        "b: 77 at ",
    ),
    "16 bits": (
        lambda r: redo(mask_of(r), lambda m: m.astype(np.uint16) * 300),
        "labels out of range",
        1,
        "for 3 classes",
        "b: 300 at ",
    ),
    "0 and 255": (
        lambda r: redo_masks(r, table(0, 255, 0, 255).take),
        "nothing to learn",
        3,
        "255 is ignored: save 1 in its place, or give labels={0: 0, 255: 1}",
        "a photo",
    ),
    "all ignored": (lambda r: redo_masks(r, table(255).take), "nothing to learn", 3, "every pixel of every", "a photo"),
    "one ignored": (
        lambda r: redo(mask_of(r), table(255).take),
        "mask ignored as a whole",
        1,
        "no pixel has a class",
        "b",
    ),
    "palette": (
        lambda r: save_colored(read(mask_of(r)), mask_of(r), PALETTE[::-1]),
        "palette disagrees",
        1,
        "with other indices",
        "b: 0 has the colour of class 2",
    ),
    "rare class": (lambda r: redo_masks(r, table(0, 1, 0, 255).take), "class never trained", 1, "cannot learn", "sky"),
    "upside down": (lambda r: turned_by_exif(r, 3, False), "turned image", 1, "sizes do not show", "b: orientation 3"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found_named_and_explained(root, defect):
    plant, kind, count, cause, example = DEFECTS[defect]
    plant(root)
    report = check("folder", root, workers=0)
    found = {finding.kind: finding for finding in report.findings if finding.split == "train"}
    assert found[kind].count == count
    assert cause in found[kind].cause and example in found[kind].examples[0]
    assert report.ok == (found[kind].severity != ERROR)
    text = report.text()
    assert found[kind].cause in text and found[kind].examples[0] in text
    # a defect that is in one pair leaves nothing else to say about the others
    others = {finding.kind for finding in report.findings} - {kind, "class never trained", "class never tested"}
    assert not others


@pytest.mark.parametrize("defect", DEFECTS)
def test_an_error_is_what_training_would_run_into(root, defect):
    plant, kind, *_ = DEFECTS[defect]
    plant(root)

    def read_all():
        for split in NAMES:
            list(data.open("folder", root, split))

    report = check("folder", root, workers=0)
    if report.ok or kind == "nothing to learn":  # which only shows in what was learnt
        read_all()
    else:
        with pytest.raises((ValueError, FileNotFoundError)):
            read_all()


def test_a_whole_folder_has_no_findings(root):
    turned_by_exif(root, 8, mask_too=True)
    save_colored(read(mask_of(root, name="ç")), mask_of(root, name="ç"), PALETTE)
    fake_trees.save_palette(read(mask_of(root, "val", "d")), mask_of(root, "val", "d"))  # in colours of its own
    done = []
    report = check("folder", root, workers=0, progress=lambda *counts: done.append(counts))
    assert report.findings == () and report.ok and report.text().endswith("\nNo problems found.\n")
    assert done == [(i, 5) for i in range(6)]


def test_pixels_and_images_are_counted(root):
    report = check("folder", root, workers=0)
    for split, names in NAMES.items():
        masks = [read(mask_of(root, split, name)) for name in names]
        counted = report.splits[split]
        assert counted.pixels == tuple(sum(int((mask == label).sum()) for mask in masks) for label in range(3))
        assert counted.images == tuple(sum(bool((mask == label).any()) for mask in masks) for label in range(3))
        assert counted.ignored_pixels == sum(int((mask == 255).sum()) for mask in masks)
        assert counted.stored_values == dict(
            zip((0, 1, 2, 255), (*counted.pixels, counted.ignored_pixels), strict=True)
        )


def test_workers_do_not_change_the_report(root):
    cut(image_of(root))
    redo(mask_of(root, name="ç"), lambda mask: mask + 1)
    save(read(image_of(root, "val", "d")), image_of(root, "train", "a photo"))
    alone, together = (check("folder", root, workers=workers) for workers in (0, 2))
    assert alone == together and alone.text() == together.text() and len(alone.findings) >= 3


def test_the_report_is_json(root):
    redo_masks(root, lambda mask: mask + 1)
    report = json.loads(json.dumps(check("folder", root, workers=0).json()))
    finding = report["findings"][0]
    assert not report["ok"] and (finding["severity"], finding["count"], finding["split"]) == ("error", 3, "train")
    assert finding["stored_values"] == report["splits"]["train"]["stored_values"]
    assert set(finding["stored_values"]) == {"0", "1", "2", "3"}
    weights = report["class_weights"]
    assert weights["split"] == "train" and weights["weights"] == weights_of(report["splits"]["train"]["pixels"])
    assert report["classes"] == list(CLASSES)


def test_weights_are_bounded_and_have_a_mean_of_one():
    pixels = (9_000_000, 999_000, 1000, 0)
    weights = weights_of(pixels)
    assert sum(map(math.prod, zip(pixels, weights, strict=True))) / sum(pixels) == pytest.approx(1, abs=1e-5)
    assert weights == sorted(weights) and weights[3] / weights[0] < 50.5 / 1.42


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_images_that_are_in_two_splits(root, suffix):
    """Tests that images are compared by their pixels: another name or format does not hide them."""
    image_of(root, "val", "e").unlink()
    save(read(image_of(root)), root / "images" / "val" / f"e.{suffix}")
    (finding,) = check("folder", root, workers=0).findings
    assert (finding.kind, finding.split, finding.severity) == ("image in two splits", "train and val", "warning")
    assert finding.examples == ["b of train: the same as e of val"] and "seen in training" in finding.cause


def test_images_that_are_twice_in_a_split(root):
    save(read(image_of(root)), image_of(root, name="ç"))
    (finding,) = check("folder", root, workers=0).findings
    assert (finding.kind, finding.split, finding.examples) == ("image twice in a split", "train", ["ç: the same as b"])


def test_a_turned_square_cannot_be_judged(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, mask = draw("square", (0, 1, 2), (20, 20))
    save(image, image_of(root), exif=exif)
    save(mask, mask_of(root))
    report = check("folder", root, workers=0)
    (finding,) = report.findings
    assert report.ok and (finding.kind, finding.examples) == ("turned image", ["b: orientation 6"])


@pytest.mark.parametrize(
    ("limit", "kind", "cause"),
    [(500, "warning of the decoder", "DecompressionBombWarning"), (200, "unreadable image", "cut it into tiles")],
)
def test_images_that_pillow_finds_too_large(root, monkeypatch, limit, kind, cause):
    """Tests that a warning of Pillow becomes a note and appears nowhere else."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    finding = check("folder", root, workers=0).findings[0]
    assert (finding.kind, finding.count) == (kind, 3) and cause in finding.cause
    assert f"({28 * 20} pixels) exceeds limit of " in finding.examples[0]


def test_labels_that_are_told_are_used(root):
    redo_masks(root, table(0, 255, 0, 255).take)
    report = check("folder", root, workers=0, classes=("ground", "thing"), labels={0: 0, 255: 1})
    assert report.findings == () and report.splits["train"].ignored_pixels == 0


def test_splits_that_are_named_are_looked_at(root):
    for kind in ("images", "masks"):
        (root / kind / "val").rename(root / kind / "test")
    assert list(check("folder", root, workers=0).splits) == ["train"]
    assert list(check("folder", root, splits=("test", "train"), workers=0).splits) == ["test", "train"]


def test_a_folder_without_splits(root):
    for kind in ("images", "masks"):
        (root / kind / "val").rename(root / kind / "second")
        (root / kind / "train").rename(root / kind / "first")
    report = check("folder", root, workers=0)
    assert list(report.splits) == ["train", "val"] and report.findings == ()
    assert [split.samples for split in report.splits.values()] == [4, 1] and report.class_weights()[0] == "train"
    whole = check("folder", root, splits=("all",), workers=0)
    assert list(whole.splits) == ["all"] and whole.splits["all"].samples == 5 and whole.findings == ()
    assert whole.class_weights()[0] == "all"


def test_names_that_are_no_utf8_can_be_printed(root):
    try:
        image_of(root).rename(image_of(root, name=os.fsdecode(b"caf\xe9")))
    except OSError:
        pytest.skip("needs a file system that takes any bytes as a name")
    findings = check("folder", root, workers=0).findings
    assert {(finding.kind, *finding.examples) for finding in findings} == {
        ("image missing", "b"),
        ("mask missing", "caf\\udce9"),
    }


def test_examples_are_few_and_counts_are_whole(root):
    redo_masks(root, lambda mask: mask + 1)
    report = check("folder", root, examples=1, workers=0)
    assert [(finding.count, len(finding.examples)) for finding in report.findings] == [(3, 1), (2, 1)]
    assert "\n    and 2 more\n" in report.text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cityscape"}, "name: expected one of .*did you mean 'cityscapes'"),
        ({"name": "synthetic"}, "name: expected one of "),
        ({"root": "nowhere"}, "root: expected an existing folder, got nowhere"),
        ({"name": "cityscapes"}, "root: expected the folder that holds leftImg8bit"),
        ({"splits": ("tran",)}, "split: expected a folder images/tran or a list"),
        ({"labels": {0: 7}}, "labels: expected"),
        ({"examples": 0}, "examples: expected 1 or more, got 0"),
        ({"workers": -1}, "workers: expected 0 or more, got -1"),
    ],
)
def test_wrong_use_is_an_error(root, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(**{"name": "folder", "root": root, "workers": 0} | arguments)
