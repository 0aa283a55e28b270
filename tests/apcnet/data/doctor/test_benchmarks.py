"""Tests the doctor on trees laid out as the benchmarks are, with the defects that each of them has in practice."""

import fake_trees
import numpy as np
import pytest
from fake_trees import draw, save
from PIL import Image

from apcnet.data.doctor.check import check


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "voc2012", "pascal_context", "folder"])
def test_whole_benchmarks_have_only_classes_that_do_not_occur(tmp_path, name):
    stored = getattr(fake_trees, name)(tmp_path)
    report = check(name, tmp_path, workers=0)
    assert report.ok
    assert {finding.kind for finding in report.findings} <= {"class never trained", "class never tested"}
    assert set(report.splits) == set(stored) - ({"train"} if name == "voc2012" else set())
    for split, counted in report.splits.items():
        assert counted.samples == counted.masks_read == len(stored[split])


def test_trainaug_has_the_images_of_train(tmp_path):
    fake_trees.voc2012(tmp_path)
    done = []
    report = check(
        "voc2012", tmp_path, splits=("train", "trainaug"), workers=0, progress=lambda *counts: done.append(counts)
    )
    assert not [finding for finding in report.findings if "image" in finding.kind]
    assert done[-1] == (4, 4)  # each file once, although two splits have it
    list_of_val = tmp_path / "ImageSets" / "Segmentation" / "val.txt"
    list_of_val.write_text(list_of_val.read_text() + "2007_000042\n")
    report = check("voc2012", tmp_path, workers=0)
    assert "image in two splits" in {finding.kind for finding in report.findings}


def test_a_list_that_names_an_image_twice(tmp_path):
    """Tests that this split does not open, and that the other one is still checked."""
    fake_trees.folder(tmp_path, listed=True)
    lines = (tmp_path / "train.txt").read_text()
    (tmp_path / "train.txt").write_text(lines + "a photo\n")
    report = check("folder", tmp_path, workers=0)
    (finding,) = report.findings
    assert (finding.kind, finding.split) == ("split not opened", "train") and "a photo" in finding.examples[0]
    assert list(report.splits) == ["val"] and not report.ok


def test_cityscapes_that_was_not_prepared(tmp_path):
    fake_trees.cityscapes(tmp_path, prepared=False)
    report = check("cityscapes", tmp_path, workers=0)
    assert [(finding.kind, finding.count) for finding in report.findings] == [("mask missing", 3), ("mask missing", 2)]
    assert "apcnet prepare cityscapes" in report.findings[0].cause
    assert report.findings[0].examples[0] == "aachen/aachen_000000_000019"


def test_cityscapes_with_label_ids_under_the_name_of_train_ids(tmp_path):
    fake_trees.cityscapes(tmp_path, prepared=False)
    for path in tmp_path.rglob("*_gtFine_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    finding = check("cityscapes", tmp_path, workers=0).findings[0]
    assert finding.kind == "labels out of range" and finding.count == 3
    assert finding.cause.startswith("labelIds instead of labelTrainIds")
    assert set(finding.stored_values) <= {*fake_trees.CITYSCAPES_IDS, 1}


def test_a_mask_of_no_image_is_a_warning(tmp_path):
    fake_trees.cityscapes(tmp_path)
    save(draw("x", (0,))[1], tmp_path / "gtFine" / "val" / "ulm" / "ulm_000001_gtFine_labelTrainIds.png")
    report = check("cityscapes", tmp_path, splits=("val",), workers=0)
    finding = report.findings[0]
    assert report.ok and (finding.kind, finding.examples) == ("mask of no image", ["ulm/ulm_000001"])


def test_a_mask_of_no_image_is_told_once(tmp_path):
    fake_trees.voc2012(tmp_path)
    save(draw("x", (0,))[1], tmp_path / "SegmentationClass" / "x.png")
    report = check("voc2012", tmp_path, splits=("train", "val"), workers=0)
    (finding,) = (finding for finding in report.findings if finding.kind == "mask of no image")
    assert (finding.split, finding.count, finding.examples) == ("train", 1, ["x"])


def test_ade20k_that_was_reduced_already(tmp_path):
    """Tests masks with every class index and never 150, whose labels reduce_zero_label would shift by one."""
    for folder, split in (("training", "train"), ("validation", "val")):
        image, mask = draw(split, range(150))
        mask.flat[:150] = range(150)
        save(image, tmp_path / "images" / folder / "a.png")
        save(mask, tmp_path / "annotations" / folder / "a.png")
    finding = check("ade20k", tmp_path, workers=0).findings[0]
    assert (finding.kind, finding.severity) == ("labels shifted", "warning") and "reduce_zero_label" in finding.cause


def test_pascal_context_with_all_labels(tmp_path):
    fake_trees.pascal_context(tmp_path)
    mask = tmp_path / "SegmentationClassContext" / "2008_000002.png"
    save(np.array(Image.open(mask)).astype(np.uint16) * 7, mask)
    finding = check("pascal_context", tmp_path, workers=0).findings[0]
    assert finding.kind == "labels out of range" and finding.count == 1 and "459" in finding.cause
