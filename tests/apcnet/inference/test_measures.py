"""Tests boundary IoU, calibration, loss and scores of every image against loops over classes and pixels."""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_ranks import TESTS, Network, Pictures
from naive_inference import at_the_input

from apcnet import inference
from apcnet.confusion import ConfusionMatrix
from apcnet.data import augment
from apcnet.inference.evaluation import evaluate
from apcnet.inference.measures import BoundaryIoU, Calibration, MeanLoss, PerImage, boundary

pytestmark = pytest.mark.usefixtures("one_thread")


def labels(seed, size=(31, 40), classes=4, ignored=0.0):
    """Returns blocks of labels with some noise, and some ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(classes, (1, 1, 5, 6), generator=generator).float()
    mask = F.interpolate(blocks, size, mode="nearest")[0, 0].byte()
    noise = torch.rand(size, generator=generator)
    mask[noise < 0.02] = 1
    mask[noise > 1 - ignored] = 255
    return mask


def eroded(mask, width):
    """Erodes a mask as the authors of boundary IoU do: 3×3 so many times, with zeros outside the image."""
    for _ in range(width):
        mask = 1 - F.max_pool2d(1 - F.pad(mask.float(), [1] * 4)[None], 3, 1)[0]
    return mask.bool()


# Boundary IoU


@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_boundaries_are_what_erosion_takes_away(width):
    pixels = labels(0)
    expected = torch.zeros_like(pixels, dtype=torch.bool)
    for label in pixels.unique():
        expected |= (pixels == label) & ~eroded(pixels == label, width)
    found = boundary(pixels.long(), width)
    assert torch.equal(found, expected) and found.any()
    assert width > 2 or not found.all()


def test_boundary_iou_is_that_of_eroded_masks():
    measure = BoundaryIoU(4)
    both, either = torch.zeros(2, 4)
    sizes = [(31, 40), (120, 90), (200, 151)]
    for seed, size in enumerate(sizes):
        true, found = labels(seed, size, ignored=0.003), labels(seed + 50, size)
        measure.update(found, true)
        width = max(1, round(0.02 * (size[0] ** 2 + size[1] ** 2) ** 0.5))
        for label in range(4):
            masks = true == label, (found == label) & (true != 255)
            edges = [mask & ~eroded(mask, width) for mask in masks]
            both[label] += (edges[0] & edges[1]).sum()
            either[label] += (edges[0] | edges[1]).sum()
    assert width == 5 and torch.equal(measure.iou, both.double() / either.double())
    record = measure.record("abcd")
    assert list(record["boundary_iou"].values()) == measure.iou.tolist() and 0 < record["mean_boundary_iou"] < 1


def test_boundaries_that_fit_and_classes_without_any():
    measure = BoundaryIoU(3)
    measure.update(torch.zeros(20, 20).byte(), torch.zeros(20, 20).byte())
    assert measure.iou[0] == 1 and measure.iou[1:].isnan().all()
    assert measure.record("abc")["boundary_iou"] == {"a": 1.0, "b": None, "c": None}


# Calibration


def test_calibration_is_that_of_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(3)
    confidence = torch.rand(3, 30, 30, generator=generator)
    confidence[0, 0, :4] = torch.tensor([0.0, 1.0, 0.2, 1 / 3])
    prediction, target = (torch.randint(3, (3, 30, 30), generator=generator) for _ in range(2))
    target[:, :4] = 255
    target[0, 0, :4] = 1
    measure = Calibration()
    for image in range(3):
        measure.update(confidence[image], prediction[image], target[image])
    bins = [[] for _ in range(15)]
    for sure, guess, label in zip(confidence.flatten(), prediction.flatten(), target.flatten(), strict=True):
        if label != 255:
            bins[max(math.ceil(float(sure) * 15 - 1e-6) - 1, 0)].append((float(sure), float(guess == label)))
    total = sum(map(len, bins))
    expected = sum(abs(sum(s for s, _ in each) - sum(r for _, r in each)) for each in bins) / total
    assert measure.ece == pytest.approx(expected, abs=1e-6) and expected > 0.1
    assert [each["pixels"] for each in measure.record()["calibration"]] == list(map(len, bins))


def test_one_who_is_as_often_right_as_sure_is_calibrated():
    measure = Calibration()
    measure.update(torch.full((1, 4), 0.75), torch.tensor([[0, 0, 0, 1]]), torch.zeros(1, 4).long())
    assert measure.ece == 0
    measure.update(torch.full((1, 4), 0.25), torch.tensor([[0, 0, 0, 0]]), torch.zeros(1, 4).long())
    assert measure.ece == 0.375
    assert math.isnan(Calibration().ece)


# One pass of the network


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("test", TESTS, ids=["whole", "window", "averaged"])
def test_a_pass_gives_labels_confidence_and_loss(test, align_corners, monkeypatch):
    """Tests all of them against the probabilities of every class, which nothing here stores."""
    monkeypatch.setattr(inference.protocol, "BAND", 5 * 61 * 7)  # bands of a few rows
    model, dataset = Network(align_corners=align_corners), Pictures()
    for image, mask, _ in map(dataset.__getitem__, range(len(dataset))):
        sizes = augment.view_sizes(mask.shape, test.ratios, test.test_scale)
        views = [augment.view(image, size, model.mean, model.std)[None] for size in sizes]
        options = {"labels": True, "confidence": True, "loss": True}
        seen = inference.assess(model, list(views), mask[None], test, **options)
        if test.averages:
            shares = inference.probabilities(model, list(views), test, size=mask.shape)
        else:
            windows = (test.window, test.stride) if test.window else None
            logits = at_the_input(model, views[0], windows)
            logits = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=align_corners)
            shares = logits.softmax(1)
        assert torch.equal(seen.labels, inference.labels(model, list(views), test, size=mask.shape))
        assert torch.equal(seen.counts, ConfusionMatrix(5).update(seen.labels, mask[None]).matrix)
        expected = shares.gather(1, seen.labels[:, None].long())[:, 0]
        torch.testing.assert_close(seen.confidence, expected, rtol=1e-4, atol=1e-5)
        labelled = mask != 255
        loss = -shares[0].gather(0, mask.long().where(labelled, 0)[None])[0][labelled].log().double().sum().item()
        assert seen.loss == pytest.approx(loss, rel=1e-4)
        found, sure = inference.confidence(model, list(views), test, size=mask.shape)
        assert torch.equal(found, seen.labels) and torch.equal(sure, seen.confidence)


def test_the_scores_of_all_classes_are_never_stored(monkeypatch):
    """Tests that confidences need no tensor as large as an image for each class."""
    largest, softmax = [], inference.protocol.upsample_softmax

    def watched(scores, size, **options):
        largest.append(scores.shape[1] * size[0] * size[1])
        return softmax(scores, size, **options)

    monkeypatch.setattr(inference.protocol, "upsample_softmax", watched)
    monkeypatch.setattr(inference.protocol, "BAND", 10_000)
    inference.confidence(Network(), torch.randn(1, 3, 200, 300))
    assert max(largest) <= 10_000 and sum(largest) == 5 * 200 * 300


def test_measures_of_an_evaluation():
    """Tests that measures change no count, and that each holds what the images come to."""
    model, dataset = Network(), Pictures()
    images, loss, edges, calibration = PerImage(dataset.classes), MeanLoss(), BoundaryIoU(5), Calibration()
    measures = {"images": images, "loss": loss, "boundary": edges, "calibration": calibration}
    matrix = evaluate(model, dataset, TESTS[0], **measures).matrix
    assert torch.equal(matrix, evaluate(model, dataset, TESTS[0]).matrix)
    assert [score.name for score in images.scores] == dataset.names
    pixels = int(matrix.sum())
    assert sum(score.pixels for score in images.scores) == loss.pixels == calibration.counts[0].sum() == pixels
    right = int(matrix.trace())
    assert sum(score.pixels * score.aacc for score in images.scores) == pytest.approx(right)
    assert calibration.counts[1].sum() == right
    assert 0.5 < loss.mean < 5 and 0 < calibration.ece < 1 and 0 < edges.iou.nanmean() < 1


# Scores of every image


def test_scores_of_an_image():
    table = PerImage(("road", "sky, blue", "pole"))
    table.update("a", torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]]))
    table.update("b", torch.zeros(3, 3, dtype=torch.int64))
    first, second = table.scores
    assert first[:3] == ("a", 10, 0.8) and first.miou == (6 / 8 + 2 / 4) / 2
    assert first.mean_dice == pytest.approx((12 / 14 + 4 / 6) / 2)
    assert first.iou[:2] == (0.75, 0.5) and math.isnan(first.iou[2])
    assert second.pixels == 0 and math.isnan(second.aacc)


def test_worst_images_come_first_and_empty_ones_never():
    table = PerImage("ab")
    for name, right in (("a", 5), ("b", 1), ("c", 9), ("d", 1)):
        table.update(name, torch.tensor([[right, 10 - right], [0, 0]]))
    table.update("e", torch.zeros(2, 2, dtype=torch.int64))
    assert table.worst(3) == [1, 3, 0] and table.worst(9) == [1, 3, 0, 2]


def test_the_table_of_images(tmp_path):
    table = PerImage(("road", '背景, "x"'))
    table.update("street 1/\udcff", torch.tensor([[1, 2], [0, 0]]))
    table.save(tmp_path / "images.csv")
    with (tmp_path / "images.csv").open(newline="", encoding="utf-8") as file:
        head, line = csv.reader(file)
    assert head == ["image", "pixels", "aacc", "miou", "mean_dice", "iou road", 'iou 背景, "x"']
    assert line == ["street 1/\\udcff", "3", "0.333333", "0.166667", "0.250000", "0.333333", "0.000000"]
    assert np.isclose(float(line[3]), table.scores[0].miou, atol=1e-6)
