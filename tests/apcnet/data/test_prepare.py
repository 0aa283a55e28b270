"""Tests that missing files are made from the downloads, to the bit and only once, and that existing files stay."""

import hashlib
import json
import time
from pathlib import Path

import fake_trees
import numpy as np
import pytest
import torch

import apcnet.data
from apcnet.data import prepare as preparing
from apcnet.data.files import read_mask
from apcnet.data.imports.regions import from_text
from apcnet.data.matlab import read_field
from apcnet.data.pascal_context import CATEGORIES, CLASS_OF
from apcnet.data.prepare import prepare

DATA = Path(__file__).resolve().parents[2] / "data" / "prepare"
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
TRAIN_IDS |= {28: 15, 31: 16, 32: 17, 33: 18}


def everything_in(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def unprepared(name, tmp_path):
    if name == "cityscapes":
        fake_trees.cityscapes(tmp_path, prepared=False)
        return tmp_path, 5
    if name == "voc2012":
        fake_trees.voc2012(tmp_path / "VOCdevkit" / "VOC2012", prepared=False)
        fake_trees.sbd(tmp_path / "benchmark_RELEASE" / "dataset")
        return tmp_path / "VOCdevkit" / "VOC2012", 4 + 2
    fake_trees.pascal_in_detail(tmp_path, CATEGORIES)
    return tmp_path, 3 + 2


every = pytest.mark.parametrize("name", ["cityscapes", "voc2012", "pascal_context"])


def test_cityscapes(tmp_path):
    stored = fake_trees.cityscapes(tmp_path, prepared=False)
    assert prepare("cityscapes", tmp_path) == (5, 0)
    for split, masks in stored.items():
        data = apcnet.data.open("cityscapes", tmp_path, split)
        assert data.names == sorted(masks)
        for sample in data:
            expected = [[TRAIN_IDS.get(value, 255) for value in row] for row in masks[sample.name].tolist()]
            assert sample.mask.tolist() == expected


def test_voc2012(tmp_path):
    """Tests that all of SBD is converted, but that its names of val and its masks of VOC's train are not used."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    stored, masks = fake_trees.voc2012(root, prepared=False), fake_trees.sbd(tmp_path / "benchmark_RELEASE" / "dataset")
    assert prepare("voc2012", tmp_path) == (6, 0)
    for name, mask in masks.items():
        assert torch.equal(read_mask(root / "SegmentationClassAug" / f"{name}.png"), torch.from_numpy(mask))
    lists = root / "ImageSets" / "Segmentation"
    assert (lists / "aug.txt").read_text() == "2008_000002\n2011_003271\n"
    assert (lists / "trainaug.txt").read_text() == "2007_000032\n2007_000042\n2008_000002\n2011_003271\n"
    for sample in apcnet.data.open("voc2012", root, "trainaug"):
        expected = stored["train"].get(sample.name, masks.get(sample.name))
        assert torch.equal(sample.mask, torch.from_numpy(expected))


def test_pascal_context(tmp_path):
    stored = fake_trees.pascal_in_detail(tmp_path, CATEGORIES)
    assert prepare("pascal_context", tmp_path) == (5, 0)
    for split, masks in stored.items():
        data = apcnet.data.open("pascal_context", tmp_path, split)
        assert data.names == sorted(masks)
        for sample in data:
            expected = np.searchsorted([0, *CATEGORIES], masks[sample.name])
            assert torch.equal(sample.mask, torch.from_numpy(expected.astype(np.uint8)))


def test_categories_stand_for_the_classes_of_their_names():
    """Tests some categories by the numbers that PASCAL in Detail gives them."""
    classes = apcnet.data.pascal_context.CLASSES
    known = {"aeroplane": 2, "bag": 9, "bedclothes": 19, "bicycle": 23, "curtain": 105, "person": 284, "table": 397}
    known |= {"tvmonitor": 427, "window": 454, "wood": 458, "background": 0}
    assert {name: CLASS_OF[category] for name, category in known.items()} == {
        name: classes.index(name) for name in known
    }
    assert len(CATEGORIES) == 59 and list(CATEGORIES) == sorted(CATEGORIES)


@every
def test_a_second_run_writes_nothing(tmp_path, name):
    root, files = unprepared(name, tmp_path)
    assert prepare(name, root) == (files, 0)
    before = everything_in(tmp_path)
    steps = []
    assert prepare(name, root, progress=lambda *step: steps.append(step)) == (0, files)
    assert everything_in(tmp_path) == before and steps == [(files, files)]


@every
def test_preparation_goes_on_where_it_was_interrupted(tmp_path, name, monkeypatch):
    root, files = unprepared(name, tmp_path)
    write, written = preparing._write, []

    def interrupted(out, make):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(out)
        write(out, make)

    monkeypatch.setattr(preparing.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(preparing, "_write", interrupted)
    before = everything_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare(name, root)
    assert everything_in(tmp_path).keys() - before.keys() == set(written)
    monkeypatch.setattr(preparing, "_write", write)
    written[0].write_bytes(b"somebody's own")
    steps = []
    assert prepare(name, root, progress=lambda *step: steps.append(step)) == (files - 2, 2)
    assert steps == [(done, files) for done in range(2, files + 1)]
    assert written[0].read_bytes() == b"somebody's own"


def test_an_error_ends_it(tmp_path, monkeypatch):
    made = []

    def make():
        made.append(len(made))
        time.sleep(0.001)
        raise ValueError("this one is broken")

    monkeypatch.setattr(preparing.os, "cpu_count", lambda: 1)
    jobs = [(tmp_path / f"{i}.png", make) for i in range(500)]
    monkeypatch.setitem(preparing.PLANS, "voc2012", lambda root, source: jobs)
    with pytest.raises(ValueError, match="this one is broken"):
        prepare("voc2012", tmp_path)
    assert len(made) < 250 and not list(tmp_path.iterdir())


def test_nothing_half_is_left_of_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    root, _ = unprepared("cityscapes", tmp_path)
    before = everything_in(tmp_path)

    def fail(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(preparing.Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        prepare("cityscapes", root)
    assert everything_in(tmp_path) == before


def test_cityscapes_that_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: expected the folder that holds gtFine, but there is none"):
        prepare("cityscapes", tmp_path)
    (tmp_path / "gtFine").mkdir()
    with pytest.raises(FileNotFoundError, match=r"root: expected \*_gtFine_labelIds\.png in .*gtFine, found none"):
        prepare("cityscapes", tmp_path)
    fake_trees.save(np.full((4, 4), 34, np.uint8), tmp_path / "gtFine" / "val" / "c" / "c_0_0_gtFine_labelIds.png")
    with pytest.raises(ValueError, match=r"c_0_0_gtFine_labelIds\.png: expected labels from 0 to 33"):
        prepare("cityscapes", tmp_path)
    with pytest.raises(ValueError, match="source: expected None"):
        prepare("cityscapes", tmp_path, source=tmp_path)


def test_sbd_that_is_wrong(tmp_path):
    fake_trees.voc2012(tmp_path / "VOC2012", prepared=False)
    with pytest.raises(
        FileNotFoundError, match=r"source: expected SBD's masks in .*, found none; run `apcnet prepare voc2012 "
    ):
        prepare("voc2012", tmp_path)
    fake_trees.sbd(tmp_path / "sbd")
    file = tmp_path / "sbd" / "cls" / "2008_000002.mat"
    good = file.read_bytes()
    file.write_bytes(fake_trees.mat_file(np.full((4, 4), 21, np.uint8)))
    with pytest.raises(ValueError, match=r"2008_000002\.mat: expected a mask of labels from 0 to 20"):
        prepare("voc2012", tmp_path, tmp_path / "sbd")
    for damaged in (good[:150], good[:200], b"MATLAB 7.3 MAT-file", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"2008_000002\.mat: "):
            prepare("voc2012", tmp_path, tmp_path / "sbd")
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected 4 masks in .*cls, but 1 of them are missing: 2008_000002\.mat"
    ):
        prepare("voc2012", tmp_path, tmp_path / "sbd")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("images"), "expected the format of PASCAL in Detail's"),
        (
            lambda data: data["annos_segmentation"][0].update(category_id=3),
            "expected categories of the 59 classes, got category 3",
        ),
        (
            lambda data: data["annos_segmentation"][0]["segmentation"].update(counts="0"),
            "code of 560 pixels, got one of 0",
        ),
        (
            lambda data: data["annos_segmentation"][0]["segmentation"].update(counts="Q"),
            "expected a run-length code, got other characters",
        ),
        (
            lambda data: data["annos_segmentation"][0].update(segmentation=[[0, 0, 5, 5, 5, 0]]),
            "region 0 of 2008_000008",
        ),
        (
            lambda data: data["annos_segmentation"][0]["segmentation"].update(size=[28, 20]),
            r"expected the size .*, got \[28, 20\]",
        ),
    ],
)
def test_annotations_that_are_wrong(tmp_path, change, message):
    fake_trees.pascal_in_detail(tmp_path, CATEGORIES)
    file = tmp_path / "trainval_merged.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"trainval_merged\.json.*{message}"):
        prepare("pascal_context", tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"source: expected .*trainval_merged\.json, .* there is no such file"):
        prepare("pascal_context", tmp_path)


def test_a_name_is_helped_with(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'voc2012'"):
        prepare("voc12", tmp_path)


@pytest.mark.parametrize("name", ["compressed", "plain"])
def test_files_of_matlab(name):
    """Reads files that scipy.io.savemat wrote like SBD's, with sparse boundaries in cells before the masks."""
    mask = np.zeros((13, 9), np.uint8)
    mask[2:9, 3:8], mask[5:, 1:4], mask[0, 0] = 5, 20, 15
    labels = read_field(DATA / f"{name}.mat", "GTcls", "Segmentation")
    assert labels.dtype == np.uint8 and np.array_equal(labels, mask)
    assert read_field(DATA / f"{name}.mat", "GTcls", "CategoriesPresent").tolist() == [[5, 15, 20]]
    for variable, field in (("GTseg", "Segmentation"), ("GTcls", "Nothing"), ("GTcls", "Boundaries"), ("other", "x")):
        with pytest.raises(ValueError, match=rf"{name}\.mat: .*{variable}"):
            read_field(DATA / f"{name}.mat", variable, field)


@pytest.mark.parametrize(
    "case", json.loads((DATA / "run_lengths.json").read_text()), ids=lambda case: str(case["area"])
)
def test_run_length_codes(case):
    """Decodes codes that pycocotools wrote."""
    height, width = case["size"]
    mask = from_text(case["counts"], height * width).reshape(width, height).T
    assert mask.sum() == case["area"]
    assert hashlib.sha256(np.ascontiguousarray(mask, dtype=np.uint8).tobytes()).hexdigest() == case["sha256"]
    assert fake_trees.run_lengths(mask) == case["counts"]
