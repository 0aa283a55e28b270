"""Tests that a folder of one's own trains after at most two commands, and that every refusal names the next one."""

import json
import re
import shlex
from functools import partial

import annotation_trees as trees
import fake_trees
import numpy as np
import pytest
import small_runs
from PIL import Image

from apcnet.data import open as open_data
from apcnet.data.imports.convert import convert

COLORS = np.array(trees.COLORS, np.uint8)
COLORED = [f"{name} {r} {g} {b}" for name, (r, g, b) in zip(trees.CLASSES, trees.COLORS, strict=True)]
TINY = ("--backbone", "tiny", "--width", 8, "--channels", 8, "--auxiliary-channels", 0, "--batch-size", 2)
TINY += ("--crop", 48, 48, "--scale", 84, 60, "--test-scale", "None", "--steps", 2, "--workers", 0, "--log-every", 1)


def mostly_void(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == 0, 255, mask).astype(np.uint8)


DIRECT = {  # forms that train as they are, and the number of classes
    "flat": (trees.flat, 4),
    "flat-by-suffix": (partial(trees.flat, ending=""), 4),
    "suffixes": (partial(trees.masks, encode=np.copy, ending="_mask"), 4),
    "0-255": (partial(trees.masks, encode=lambda m: (m > 0) * np.uint8(255), classes=("ground", "thing")), 2),
    "one-bit": (partial(trees.masks, encode=lambda m: m > 0, classes=("ground", "thing")), 2),
    "voc-palette": (partial(trees.voc, palette=True), 4),
    "mmsegmentation": (trees.mmsegmentation, 4),
    "cityscapes": (trees.cityscapes, 4),
}
IMPORTED = {
    "coco": trees.coco,
    "yolo": trees.yolo,
    "labelme": trees.labelme,
    "cvat": trees.cvat_images,
    "cvat-masks": trees.cvat_masks,
    "voc": partial(trees.voc, palette=False),
    "roboflow": trees.roboflow,
    "label-studio": partial(trees.label_studio, export="json"),
    "label-studio-brush": partial(trees.label_studio, export="brush"),
    "rgb": partial(trees.masks, encode=lambda m: COLORS[m], classes=COLORED),
    "grey-rgb": partial(trees.masks, encode=lambda m: np.stack([m] * 3, -1)),
    "0-255-rgb": partial(trees.masks, encode=lambda m: np.stack([(m > 0) * np.uint8(255)] * 3, -1), classes=("a", "b")),
    "jpeg": partial(trees.masks, encode=lambda m: m * 85, suffix="jpg"),
    "stretched": partial(trees.masks, encode=lambda m: m * 60),
    "no-names": partial(trees.masks, encode=np.copy, classes=None),
    "three-names-of-0-255": partial(trees.masks, encode=lambda m: (m > 0) * np.uint8(255), classes=("ground",)),
}


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Runs a command in a folder of its own, and returns its exit status, output and errors."""
    small_runs.without_pictures(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def in_folder(*arguments):
        status, out, err = run(*arguments)
        assert "Traceback" not in err
        return status, out, err

    return in_folder


@pytest.mark.parametrize("form", DIRECT)
def test_a_form_trains_as_it_is(run, tmp_path, form):
    write, classes = DIRECT[form]
    samples, root = trees.draw_samples(), tmp_path / "mine"
    write(samples, root)
    if form in ("voc-palette", "mmsegmentation"):
        fake_trees.save_lines(trees.CLASSES, root / "classes.txt")
    status, out, _ = run("check", "folder", "mine", "--workers", 0)
    assert status == 0 and "error" not in out
    status, out, err = run("train", "folder", "--root", "mine", *TINY)
    assert status == 0 and "step 2 of 2" in out, err
    train, val = (open_data("folder", root, split) for split in ("train", "val"))
    assert len(train.classes) == classes and len(train) + len(val) == len(samples) and len(val) >= 1
    masks = {name: samples[name][1] for name in samples}
    if form == "cityscapes":
        masks = {f"town/town_{number:06}_000019": mask for number, mask in enumerate(masks.values())}
    for image, mask, name in [*train, *val]:
        original = masks[name] if classes == 4 else masks[name] > 0
        assert np.array_equal(mask.numpy(), original) and image.shape[1:] == mask.shape


@pytest.mark.parametrize("form", IMPORTED)
def test_a_form_is_refused_with_the_command_that_imports_it(run, tmp_path, form):
    """Tests that both `check` and `train` refuse, that the command they name works, and that the result trains."""
    IMPORTED[form](trees.draw_samples(), tmp_path / "mine")
    status, out, err = run("train", "folder", "--root", "mine", *TINY)
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "runs" / "folder").exists()
    command = shlex.split(re.search(r"apcnet import mine mine-imported", err)[0])
    status, out, err = run("check", "folder", "mine", "--workers", 0)
    assert status in (1, 2) and "apcnet import mine mine-imported" in out + err
    status, out, err = run(*command[1:])
    assert (status, err) == (0, ""), out
    following = shlex.split(re.search(r"^apcnet train .*(?= trains on it$)", out, re.MULTILINE)[0])
    status, out, err = run(*following[1:], *TINY)
    assert status == 0 and "step 2 of 2" in out, err


KINDS = ("images", "masks")
BROKEN = {  # what makes a folder unfit, and what both commands say
    "no val": (
        lambda r: [(r / kind / "val").rename(r / kind / "test") for kind in ("images", "masks")],
        "--val-split test",
    ),
    "no classes": (lambda r: (r / "classes.txt").unlink(), "apcnet import"),
    "no mask": (lambda r: next((r / "masks" / "val").iterdir()).unlink(), "no mask|mask missing"),
    "cut": (lambda r: next((r / "masks" / "val").iterdir()).write_bytes(b"\x89PNG"), "apcnet check folder|damaged"),
    "too few classes": (lambda r: (r / "classes.txt").write_text("a\nb\n"), "apcnet import"),
}


@pytest.mark.parametrize("form", BROKEN)
def test_check_and_train_refuse_the_same(run, tmp_path, form):
    plant, expected = BROKEN[form]
    config = small_runs.small(small_runs.write_images(tmp_path / "mine"))
    flags = small_runs.flags(config)
    plant(tmp_path / "mine")
    status, out, err = run("check", "folder", "mine", "--workers", 0)
    assert status in (1, 2) and re.search(expected, out + err), out + err
    status, _, err = run(*flags, "--workers", 0)
    assert status == 2 and err.count("\n") == 1 and re.search(expected, err), err
    assert not (tmp_path / "runs" / "folder").exists()


def test_a_warning_before_the_first_step_names_the_remedy(run, tmp_path):
    samples = trees.draw_samples()
    trees.masks(samples, tmp_path / "mine", mostly_void)
    status, _, err = run("train", "folder", "--root", "mine", *TINY)
    assert status == 0 and re.search(r"most pixels ignored.*--labels VALUE INDEX", err)
    assert re.search(r"class never trained, 1 in train: .*\(background\)", err)
    assert run("check", "folder", "mine", "--workers", 0)[0] == 0


def test_a_start_on_few_photographs_says_what_it_means(run, tmp_path):
    trees.flat(trees.draw_samples(), tmp_path / "mine")
    status, _, err = run("train", "folder", "--root", "mine", *TINY, "--from-scratch")
    assert status == 0 and "images teach a network with random weights little" in err


def test_an_import_goes_on_where_it_was_stopped(run, tmp_path):
    samples = trees.draw_samples()
    trees.coco(samples, tmp_path / "mine")
    assert run("import", "mine", "out")[0] == 0
    mask = next((tmp_path / "out" / "masks" / "train").iterdir())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png") if path != mask}
    content = mask.read_bytes()
    mask.unlink()
    (tmp_path / "out" / "classes.txt").unlink()
    status, _, err = run("train", "folder", "--root", "out", *TINY)
    assert status == 2 and "an import that was stopped; run `apcnet import` again" in err
    status, out, _ = run("import", "mine", "out")
    assert status == 0 and "1 images written, 5 already there" in out and mask.read_bytes() == content
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.name != "examples.png")
    status, _, err = run("import", "mine", "out", "--seed", 1)
    assert status == 2 and "out: out holds another import: seed was 0 and is 1; name another folder" in err


def test_a_split_is_stratified_and_keeps_groups(tmp_path):
    samples = {f"site{number % 5}_{number:02}": pair for number, pair in enumerate(trees.draw_samples(20).values())}
    trees.masks(samples, tmp_path / "mine", np.copy)
    convert(tmp_path / "mine", tmp_path / "free")
    splits = {split: {p.stem for p in (tmp_path / "free" / "masks" / split).iterdir()} for split in ("train", "val")}
    stones = {name for name, (_, mask) in samples.items() if (mask == 3).any()}
    assert len(splits["val"]) == 4 and len(stones & splits["val"]) == 1 and splits["train"].isdisjoint(splits["val"])
    convert(tmp_path / "mine", tmp_path / "grouped", groups=r"site\d")
    val = {p.stem.split("_")[0] for p in (tmp_path / "grouped" / "masks" / "val").iterdir()}
    train = {p.stem.split("_")[0] for p in (tmp_path / "grouped" / "masks" / "train").iterdir()}
    assert val and train and val.isdisjoint(train) and len(val | train) == 5
    convert(tmp_path / "mine", tmp_path / "other", seed=1)
    assert {p.stem for p in (tmp_path / "other" / "masks" / "val").iterdir()} != splits["val"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "out"), "source: expected a folder or a file of annotations, got nowhere"),
        (("empty", "out"), "source: expected COCO, YOLO, .* found nothing of these in empty"),
        (("mine", "mine/out"), "out: expected a folder outside the source"),
        (("mine", "taken"), "out: expected a new or empty folder, got taken"),
        (("mine", "out", "--val-share", "1"), "val_share: expected a share between 0 and 1, got 1"),
        (("mine", "out", "--groups", "("), "groups: expected a regular expression"),
        (("mine", "out", "--groups", "zzz"), "groups: expected a pattern that matches every name, but 'zzz'"),
        (("mine", "out", "--groups", "photo"), "groups: expected two groups or more"),
        (("mine", "out", "--classes", "none.txt"), "classes: expected a file with one class on each line"),
        (("a.zip", "out"), "source: expected a folder, got a.zip; unpack it first"),
        (("broken", "out"), "annotation 1: "),
    ],
)
def test_wrong_use_of_import_is_one_line(run, tmp_path, arguments, message):
    trees.coco(trees.draw_samples(), tmp_path / "broken")
    path = tmp_path / "broken" / "annotations" / "instances_default.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [["x"] * 6]
    path.write_text(json.dumps(content))
    trees.masks(trees.draw_samples(), tmp_path / "mine", np.copy)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "a.zip").write_bytes(b"PK")
    status, out, err = run("import", *arguments)
    assert (status, out) == (2, "") and re.search(message, err) and err.count("\n") == 1, err


def test_images_turned_by_their_exif_tag_fit_upright_annotations(tmp_path):
    samples = trees.draw_samples(2)
    trees.coco(samples, tmp_path / "mine")
    for name, (image, _) in samples.items():
        exif = Image.Exif()
        exif[0x0112] = 6
        fake_trees.save(np.rot90(image).copy(), tmp_path / "mine" / "images" / f"{name}.jpg", exif=exif)
    convert(tmp_path / "mine", tmp_path / "out")
    (sample,) = open_data("folder", tmp_path / "out", "val")
    assert np.array_equal(sample.mask.numpy(), samples[sample.name][1])
