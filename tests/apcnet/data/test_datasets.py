"""Tests that every data set is read from its official layout, with the labels that its benchmark counts."""

import os
import shutil

import fake_trees
import numpy as np
import pytest
import torch

import apcnet.data
from apcnet.data.files import read_image

LAYOUTS = {  # where a tree is put, and the folders above it that will do as root as well
    "cityscapes": ("cityscapes", ("",)),
    "ade20k": ("ade/ADEChallengeData2016", ("ade", "")),
    "voc2012": ("VOCdevkit/VOC2012", ("VOCdevkit", "")),
    "pascal_context": ("VOCdevkit/VOC2010", ("VOCdevkit", "")),
}
COUNTS = {"cityscapes": 19, "ade20k": 150, "voc2012": 21, "pascal_context": 60}
every = pytest.mark.parametrize("name", LAYOUTS)


def expected_labels(name, stored, classes=None):
    if name == "ade20k" or classes == 59:  # mmsegmentation's reduce_zero_label, in its own words
        stored = stored.copy()
        stored[stored == 0] = 255
        stored = stored - 1
        stored[stored == 254] = 255
    return torch.from_numpy(stored)


def assert_holds(data, name, stored, classes=None):
    assert data.names == sorted(stored) and len(data) == len(stored)
    for sample in data:
        assert sample.image.dtype == sample.mask.dtype == torch.uint8
        assert sample.image.shape == (3, *sample.mask.shape)
        assert torch.equal(sample.mask, expected_labels(name, stored[sample.name], classes)), sample.name
        assert set(sample.mask.unique().tolist()) <= {*range(len(data.classes)), 255}


@every
def test_benchmarks(tmp_path, name):
    place, above = LAYOUTS[name]
    stored = getattr(fake_trees, name)(tmp_path / place)
    for split in stored:
        data = apcnet.data.open(name, tmp_path / place, split)
        assert len(data.classes) == len(data.palette) == len(set(data.classes)) == COUNTS[name]
        assert_holds(data, name, stored[split])
        for folder in above:
            assert apcnet.data.open(name, str(tmp_path / folder), split).pairs == data.pairs
    assert apcnet.data.open(name, tmp_path / place).names == sorted(stored["val"])


def test_classes_and_colours_are_those_published():
    from apcnet.data import ade20k, cityscapes, voc2012
    from apcnet.data import pascal_context as context

    def at(module, index):
        return module.CLASSES[index], module.PALETTE[index]

    assert at(cityscapes, 0) == ("road", (128, 64, 128)) and at(cityscapes, 18) == ("bicycle", (119, 11, 32))
    assert at(ade20k, 7) == ("bed", (204, 5, 255)) and at(ade20k, 149) == ("flag", (92, 0, 255))
    assert at(voc2012, 15) == ("person", (192, 128, 128)) and at(voc2012, 20) == ("tvmonitor", (0, 64, 128))
    assert at(context, 1) == ("aeroplane", (180, 120, 120)) and at(context, 59) == ("wood", (31, 0, 255))
    assert list(context.CLASSES[1:]) == sorted(context.CLASSES[1:]) and ade20k.PALETTE[:60] == context.PALETTE
    for module in (ade20k, cityscapes, voc2012, context):
        assert all(name == name.strip() for name in module.CLASSES)


def test_trainaug_is_vocs_masks_and_those_of_sbd_that_voc_has_not(tmp_path):
    stored = fake_trees.voc2012(tmp_path)
    aug, lists = tmp_path / "SegmentationClassAug", tmp_path / "ImageSets" / "Segmentation"
    fake_trees.save(np.full(fake_trees.SIZE, 3, np.uint8), aug / "2007_000032.png")  # SBD's mask of a name of train
    fake_trees.save_lines([*(lists / "aug.txt").read_text().split(), "2007_000032"], lists / "aug.txt")
    data = apcnet.data.open("voc2012", tmp_path, "trainaug")
    assert_holds(data, "voc2012", stored["trainaug"])
    fake_trees.save_lines([*stored["train"], "2011_003271"], lists / "trainaug.txt")
    assert apcnet.data.open("voc2012", tmp_path, "trainaug").names == ["2007_000032", "2007_000042", "2011_003271"]
    (lists / "aug.txt").unlink()
    for path in aug.iterdir():  # one folder for both sorts of masks
        if path.stem not in stored["train"]:
            shutil.move(path, tmp_path / "SegmentationClass")
    shutil.rmtree(aug)
    fake_trees.save_lines(stored["trainaug"], lists / "trainaug.txt")
    assert_holds(apcnet.data.open("voc2012", tmp_path, "trainaug"), "voc2012", stored["trainaug"])


def test_context_without_background(tmp_path):
    stored = fake_trees.pascal_context(tmp_path)
    data = apcnet.data.open("pascal_context", tmp_path, "train", classes=59)
    assert (data.classes[0], data.palette[0], len(data.classes)) == ("aeroplane", (180, 120, 120), 59)
    assert_holds(data, "pascal_context", stored["train"], classes=59)
    with pytest.raises(ValueError, match=r"classes: expected 60.* or 59.*, got 58"):
        apcnet.data.open("pascal_context", tmp_path, classes=58)


@pytest.mark.parametrize("listed", [False, True], ids=["folders", "lists"])
def test_a_folder_of_ones_own(tmp_path, listed):
    stored = fake_trees.folder(tmp_path, listed)
    for split in ("train", "val"):
        data = apcnet.data.open("folder", tmp_path, split)
        assert (data.classes, data.palette[1]) == (("road", "traffic light", "sky"), (250, 170, 30))
        assert_holds(data, "folder", stored[split])
    names = [name if listed else f"{split}/{name}" for split in stored for name in stored[split]]
    assert apcnet.data.open("folder", tmp_path, None).names == sorted(names)


def test_classes_of_a_folder_can_be_given(tmp_path):
    fake_trees.folder(tmp_path)
    data = apcnet.data.open("folder", tmp_path, classes=["x", "y", "z"])
    assert (data.classes, data.palette[1]) == (("x", "y", "z"), (128, 0, 0))
    assert apcnet.data.open("folder", tmp_path, palette=[(9, 9, 9)] * 3).palette[2] == (9, 9, 9)
    with pytest.raises(ValueError, match="palette: expected a colour for each of 3 classes, got 1"):
        apcnet.data.open("folder", tmp_path, palette=[(9, 9, 9)])
    with pytest.raises(TypeError, match="classes: expected a sequence of names, got 'road'"):
        apcnet.data.open("folder", tmp_path, classes="road")
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"classes: expected names in .*classes\.txt, but there is no such file; .* or give classes=",
    ):
        apcnet.data.open("folder", tmp_path)


def test_masks_of_a_folder_may_hold_other_values(tmp_path):
    fake_trees.save(np.zeros((3, 4, 3), np.uint8), tmp_path / "images" / "i.png")
    fake_trees.save(np.array([[0, 255, 0, 255]] * 3, np.uint8), tmp_path / "masks" / "i.png")
    data = apcnet.data.open("folder", tmp_path, None, classes=("no", "yes"), labels={0: 0, 255: 1})
    assert data[0].mask.tolist() == [[0, 1, 0, 1]] * 3


def test_splits_of_a_folder(tmp_path):
    fake_trees.folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"split: .*images/test or a list test\.txt .*which has train, val"):
        apcnet.data.open("folder", tmp_path, "test")
    fake_trees.save_lines(["d"], tmp_path / "val.txt")
    with pytest.raises(ValueError, match=r"both a folder images/val and a list val\.txt"):
        apcnet.data.open("folder", tmp_path, "val")


def test_synthetic_is_opened_like_the_others():
    data = apcnet.data.open("synthetic", split="val", size=(48, 64), length=3)
    assert len(data) == 3 and data[0].image.shape == (3, 48, 64)
    with pytest.raises(ValueError, match="root: expected None"):
        apcnet.data.open("synthetic", "somewhere")


def test_names_are_helped_with(tmp_path):
    with pytest.raises(ValueError, match=r"name: expected one of .*, got 'cityscape'; did you mean 'cityscapes'\?"):
        apcnet.data.open("cityscape", tmp_path)
    fake_trees.cityscapes(tmp_path)
    with pytest.raises(ValueError, match="split: expected one of train, val, got 'trian'; did you mean 'train'"):
        apcnet.data.open("cityscapes", tmp_path, "trian")
    with pytest.raises(TypeError, match="clases"):
        apcnet.data.open("cityscapes", tmp_path, clases=19)


@every
def test_roots_that_are_wrong(tmp_path, name):
    with pytest.raises(TypeError, match=r"root: expected the folder that holds .*, got None"):
        apcnet.data.open(name)
    with pytest.raises(FileNotFoundError, match=r"root: expected an existing folder, got .*nowhere"):
        apcnet.data.open(name, tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError,
        match=rf"root: expected the folder that holds \w+, but there is none in {tmp_path} nor in its \w+",
    ):
        apcnet.data.open(name, tmp_path)


@every
def test_missing_files_are_named(tmp_path, name):
    getattr(fake_trees, name)(tmp_path)
    train, val = apcnet.data.open(name, tmp_path, "train"), apcnet.data.open(name, tmp_path, "val")
    val.pairs[0].mask.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of {len(val)} samples have no mask in .*: {val.names[0]}"):
        apcnet.data.open(name, tmp_path, "val")
    train.pairs[0].image.unlink()
    if name != "cityscapes":  # whose samples are what there are images of
        with pytest.raises(
            FileNotFoundError, match=rf"1 of {len(train)} samples have no image in .*: {train.names[0]}"
        ):
            apcnet.data.open(name, tmp_path, "train")


def test_empty_splits_are_errors(tmp_path):
    for folder in ("leftImg8bit/val", "gtFine/val", "images/validation", "annotations/validation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("cityscapes", "ade20k"):
        with pytest.raises(FileNotFoundError, match=f"expected images in {tmp_path}.*, found none"):
            apcnet.data.open(name, tmp_path)
        with pytest.raises(FileNotFoundError, match=r"expected the folder .*train"):
            apcnet.data.open(name, tmp_path, "train")


def test_what_is_not_prepared_says_how(tmp_path):
    fake_trees.cityscapes(tmp_path / "c", prepared=False)
    with pytest.raises(FileNotFoundError, match=r"2 of 2 .*_gtFine_labelTrainIds.*apcnet prepare cityscapes .*/c`"):
        apcnet.data.open("cityscapes", tmp_path / "c")
    fake_trees.voc2012(tmp_path / "v", prepared=False)
    assert len(apcnet.data.open("voc2012", tmp_path / "v", "train")) == 2
    with pytest.raises(FileNotFoundError, match=r"expected trainaug\.txt or aug\.txt .*apcnet prepare voc2012 .*/v`"):
        apcnet.data.open("voc2012", tmp_path / "v", "trainaug")
    (tmp_path / "p" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"expected .*val\.txt, but there is none; run `apcnet prepare pascal_context .*/p`"
    ):
        apcnet.data.open("pascal_context", tmp_path / "p")


def test_the_order_is_that_of_the_names(tmp_path, monkeypatch):
    fake_trees.ade20k(tmp_path)
    names = apcnet.data.open("ade20k", tmp_path, "train").names
    assert names == ["ADE_train_00000002", "ADE_train_00000010"]
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listed(path), reverse=True))
    assert apcnet.data.open("ade20k", tmp_path, "train").names == names


def test_a_tree_of_links(tmp_path):
    """Tests links, because data sets are often linked together from several disks."""
    stored = fake_trees.cityscapes(tmp_path / "disk")
    (tmp_path / "data").mkdir()
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / "data" / folder).symlink_to(tmp_path / "disk" / folder)
    data = apcnet.data.open("cityscapes", tmp_path / "data", "train")
    assert_holds(data, "cityscapes", stored["train"])
    assert torch.equal(data[0].image, read_image(data.pairs[0].image))
