"""Tests that predictions are written with the values of the benchmarks' masks, and read back unchanged."""

import os

import fake_trees
import numpy as np
import pytest
import torch
from PIL import Image

from apcnet import data
from apcnet.data.files import Files, read_mask
from apcnet.data.prepare import prepare
from apcnet.inference.submission import writer

BENCHMARKS = {
    "cityscapes": (fake_trees.cityscapes, {}),
    "ade20k": (fake_trees.ade20k, {}),
    "voc2012": (fake_trees.voc2012, {}),
    "pascal_context": (fake_trees.pascal_context, {}),
    "pascal_context of 59": (fake_trees.pascal_context, {"classes": 59}),
    "folder": (fake_trees.folder, {}),
    "folder of other values": (fake_trees.folder, {"labels": {0: 2, 1: 0, 2: 0, 255: 1}}),
}


def opened(kind, root):
    """Opens a dataset as evaluation does."""
    tree, options = BENCHMARKS[kind]
    tree(root)
    return data.open(kind.split()[0], root, split="val", **options)


def predictions(dataset):
    """Draws labels of all classes for each sample from its name; the first classes occur in every one."""
    count = len(dataset.classes)
    found = {name: torch.from_numpy(fake_trees.draw(name, range(count))[1]) for name in dataset.names}
    for labels in found.values():
        labels.flatten()[:count] = torch.arange(count)
    return found


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_read_as_masks_they_are_the_labels(kind, tmp_path):
    """Tests predictions that replace the masks of a dataset, and are read by it."""
    dataset = opened(kind, tmp_path / "tree")
    labels, write = predictions(dataset), writer(kind.split()[0], dataset, tmp_path / "out")
    for name in dataset.names:
        write(name, labels[name])
    written = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert written == sorted(f"{name}.png" for name in dataset.names)
    pairs = [pair._replace(mask=tmp_path / "out" / f"{pair.name}.png") for pair in dataset.pairs]
    if kind == "cityscapes":
        for pair in pairs:  # as the download has them: labelIds, of which prepare makes labelTrainIds
            stored = tmp_path / "tree" / "gtFine" / "val" / f"{pair.name}_gtFine_labelTrainIds.png"
            stored.unlink()
            pair.mask.rename(stored.with_name(stored.name.replace("TrainIds", "Ids")))
        prepare("cityscapes", tmp_path / "tree")
        again = data.open("cityscapes", tmp_path / "tree", split="val")
    else:
        again = Files(pairs, dataset.classes, dataset.palette, dataset.labels)
    for _, mask, name in map(again.__getitem__, range(len(again))):
        assert torch.equal(mask, labels[name])


def written_by(kind, tmp_path):
    """Returns the values in the file of a prediction with class i at pixel i."""
    dataset = opened(kind, tmp_path / "tree")
    labels = torch.arange(len(dataset.classes), dtype=torch.uint8)[None]
    writer(kind.split()[0], dataset, tmp_path / "out")("a", labels)
    return tmp_path / "out" / "a.png"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("cityscapes", [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]),
        ("ade20k", range(1, 151)),
        ("voc2012", range(21)),
        ("pascal_context", range(60)),
        ("pascal_context of 59", range(1, 60)),
        ("folder", [0, 1, 2]),
        ("folder of other values", [1, 255, 0]),
    ],
)
def test_what_the_values_stand_for(kind, values, tmp_path):
    image = Image.open(written_by(kind, tmp_path))
    assert image.format == "PNG" and image.mode == ("P" if kind == "voc2012" else "L")
    assert np.asarray(image)[0].tolist() == list(values)


def test_colours_of_voc(tmp_path):
    image = Image.open(written_by("voc2012", tmp_path)).convert("RGB")
    colours = [image.getpixel((index, 0)) for index in (0, 1, 2, 15, 20)]
    assert colours == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (192, 128, 128), (0, 64, 128)]


def test_generated_scenes(tmp_path):
    dataset = data.open("synthetic", size=(48, 48), length=1)
    _, mask, name = dataset[0]
    mask[mask == 255] = 0
    writer("synthetic", dataset, tmp_path)(name, mask)
    assert torch.equal(read_mask(tmp_path / "whole-val-000000.png"), mask)


def test_labels_of_any_integers_and_folders_that_are_not_there(tmp_path):
    dataset = data.open("synthetic", size=(48, 48), length=1)
    labels = torch.tensor([[0, 8], [3, 2]])
    write = writer("synthetic", dataset, tmp_path / "a" / "b")
    for name, dtype in (("x/y.1", torch.int64), ("x/y.2", torch.int16), ("z/y.1", torch.uint8)):
        write(name, labels.to(dtype))
    read = {path.relative_to(tmp_path).as_posix(): read_mask(path) for path in tmp_path.rglob("*.png")}
    assert read.keys() == {"a/b/x/y.1.png", "a/b/x/y.2.png", "a/b/z/y.1.png"}
    assert all(torch.equal(mask, labels.byte()) for mask in read.values())


def test_a_file_is_whole_or_it_is_not_there(tmp_path, monkeypatch):
    dataset = data.open("synthetic", size=(48, 48), length=1)
    write = writer("synthetic", dataset, tmp_path)
    write("x", torch.zeros(4, 4).byte())
    before = (tmp_path / "x.png").read_bytes()

    def save(self, path, format):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        write("x", torch.ones(4, 4).byte())
    assert os.listdir(tmp_path) == ["x.png"] and (tmp_path / "x.png").read_bytes() == before


def test_wrong_arguments(tmp_path):
    dataset = data.open("synthetic", size=(48, 48), length=1)
    with pytest.raises(ValueError, match=r"benchmark: expected one of .*; did you mean 'cityscapes'"):
        writer("cityscape", dataset, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder: expected a folder, .* is a file"):
        writer("synthetic", dataset, tmp_path / "file")
    write = writer("synthetic", dataset, tmp_path)
    for wrong in (9, -1):
        with pytest.raises(ValueError, match="labels: 'x': expected 0 to 8, got "):
            write("x", torch.tensor([[1, wrong]]))
    assert os.listdir(tmp_path) == ["file"]


def test_a_class_that_no_value_stands_for(tmp_path):
    fake_trees.folder(tmp_path)
    dataset = data.open("folder", tmp_path, split="val", labels={0: 0, 1: 1, 2: 1})
    with pytest.raises(ValueError, match="dataset: expected a mask value for every class, there is none for 'sky'"):
        writer("folder", dataset, tmp_path / "out")
