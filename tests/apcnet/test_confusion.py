"""Tests confusion matrices against pixel-by-pixel counts, and scores against mmsegmentation's."""

import os

import numpy as np
import parity
import pytest
import torch

from apcnet import confusion
from apcnet.confusion import ConfusionMatrix

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def draw(shape=(2, 13, 17), classes=5, ignored=100):
    generator = torch.Generator().manual_seed(classes)
    prediction, target = (torch.randint(classes, shape, generator=generator) for _ in range(2))
    target[torch.rand(shape, generator=generator) < 0.2] = ignored
    return prediction, target


def counted(prediction, target, classes=5, ignored=100):
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for guess, label in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if label != ignored:
            matrix[label, guess] += 1
    return matrix


# Counts


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_integers_of_any_width(dtype, device):
    prediction, target = draw()
    matrix = ConfusionMatrix(5, ignore_index=100, device=device)
    matrix.update(prediction.to(dtype).to(device), target.to(dtype).to(device))
    assert matrix.matrix.device.type == device and torch.equal(matrix.matrix.cpu(), counted(prediction, target))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (40,), (4, 5, 6, 7)], ids=str)
def test_any_shape(shape):
    prediction, target = draw(shape)
    matrix = ConfusionMatrix(5, 100).update(prediction.to(torch.uint8), target).matrix
    assert matrix.dtype == torch.int64 and torch.equal(matrix, counted(prediction, target))


def test_pixels_that_lie_apart():
    prediction, target = draw((30, 40))
    matrix = ConfusionMatrix(5, 100).update(prediction[::2, ::3], target.mT[::3, ::2].mT).matrix
    assert torch.equal(matrix, counted(prediction[::2, ::3], target[::2, ::3]))


@devices
def test_pieces_are_the_whole(monkeypatch, device):
    prediction, target = draw((40, 41))
    monkeypatch.setattr(confusion, "PIECE", 7)
    matrix = ConfusionMatrix(5, 100).update(prediction.to(device), target.to(device)).matrix
    assert matrix.device.type == "cpu" and torch.equal(matrix, counted(prediction, target))


def test_updates_add_up():
    parts = [draw((n, 9)) for n in (3, 1, 8)]
    matrix, other = ConfusionMatrix(5, 100), ConfusionMatrix(5, 100)
    for part in parts[:2]:
        assert matrix.update(*part) is matrix
    assert matrix.add(other.update(*parts[2]).matrix) is matrix
    assert torch.equal(matrix.matrix, sum(counted(*part) for part in parts))
    assert torch.equal(other.matrix, counted(*parts[2]))


def test_a_label_that_is_ignored_may_be_a_class():
    """Tests that predictions may be the ignored label, and that ignored pixels do not count."""
    prediction, target = torch.tensor([0, 1, 1, 2, 99]), torch.tensor([0, 2, 0, 1, 1])
    expected = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0]])
    assert torch.equal(ConfusionMatrix(3, ignore_index=1).update(prediction, target).matrix, expected)


def test_alone_there_is_nothing_to_reduce():
    matrix = ConfusionMatrix(5, 100).update(*draw())
    assert torch.equal(matrix.reduce().matrix, counted(*draw()))


# Scores


def test_scores_are_those_of_mmsegmentation():
    """Tests scores, rounded to float32 as mmsegmentation's, for equal bits."""
    case = parity.load("metric_iou")
    matrix = ConfusionMatrix(case.about["num_classes"], case.about["ignore_index"])
    for prediction, target in zip(case.listed("prediction."), case.listed("target."), strict=True):
        matrix.update(prediction, target)
    scores, expected = matrix.scores(), case.under("metric/")
    assert scores.iou.dtype == scores.acc.dtype == torch.float64 and expected["IoU"].isnan().any()
    np.testing.assert_array_equal(scores.iou.float().double(), expected["IoU"])
    np.testing.assert_array_equal(scores.acc.float().double(), expected["Acc"])
    assert torch.tensor(scores.aacc).double() == expected["aAcc"]
    assert scores.miou == pytest.approx(expected["IoU"].nanmean().item(), rel=1e-7)
    assert scores.macc == pytest.approx(expected["Acc"].nanmean().item(), rel=1e-7)
    np.testing.assert_array_equal(scores.precision.float().double(), expected["Precision"])
    np.testing.assert_array_equal(scores.dice.float().double(), expected["Dice"])
    np.testing.assert_allclose(scores.dice.where(~expected["Fscore"].isnan(), np.nan), expected["Fscore"], rtol=1e-6)
    assert (scores.dice[expected["Fscore"].isnan()].nan_to_num() == 0).all()  # without a hit F is 0 / 0, and Dice is 0


def test_which_classes_count():
    """Tests absent classes (in no mean), predicted-only (IoU 0) and never-found ones (0 and 0)."""
    prediction = torch.tensor([0, 0, 0, 1, 1, 3])
    target = torch.tensor([0, 0, 1, 1, 4, 255])
    scores = ConfusionMatrix(5).update(prediction, target).scores()
    nan = float("nan")
    np.testing.assert_array_equal(scores.iou, [2 / 3, 1 / 3, nan, nan, 0])
    np.testing.assert_array_equal(scores.acc, [1, 1 / 2, nan, nan, 0])
    np.testing.assert_array_equal(scores.dice, [4 / 5, 1 / 2, nan, nan, 0])
    np.testing.assert_array_equal(scores.precision, [2 / 3, 1 / 2, nan, nan, nan])
    assert scores.miou == pytest.approx(1 / 3) and scores.macc == 0.5 and scores.aacc == 3 / 5
    assert scores.fwiou == pytest.approx((2 * 2 / 3 + 2 * 1 / 3) / 5)
    predicted_alone = ConfusionMatrix(5).update(torch.tensor([0, 3]), torch.tensor([0, 0])).scores()
    np.testing.assert_array_equal(predicted_alone.iou, [1 / 2, nan, nan, 0, nan])
    np.testing.assert_array_equal(predicted_alone.acc, [1 / 2, nan, nan, nan, nan])
    assert predicted_alone.miou == 0.25 and predicted_alone.macc == 0.5


def test_counts_stay_exact():
    """Tests counts beyond float32, in which mmsegmentation sums."""
    matrix = ConfusionMatrix(2).add(torch.tensor([[2**24 + 1, 0], [1, 2**40 + 1]]))
    scores = matrix.scores()
    assert scores.iou.tolist() == [(2**24 + 1) / (2**24 + 2), (2**40 + 1) / (2**40 + 2)] and scores.iou.max() < 1


def test_of_no_pixel_there_is_no_score():
    scores = ConfusionMatrix(3).scores()
    values = [scores.miou, scores.macc, scores.aacc, scores.fwiou, *scores.iou, *scores.acc]
    assert np.isnan([*values, *scores.dice, *scores.precision]).all()


def test_the_table():
    scores = ConfusionMatrix(3).update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])).scores()
    assert scores.rows(["road", "sky", "pole"]) == [
        ("road", "50.00", "66.67", "100.00", "50.00"),  # IoU, Dice, precision, recall
        ("sky", "50.00", "66.67", "50.00", "100.00"),
        ("pole", "–", "–", "–", "–"),
        ("mean", "50.00", "66.67", "75.00", "75.00"),
    ]
    with pytest.raises(ValueError, match="classes: expected 3 names, got 2"):
        scores.rows(["road", "sky"])


def test_the_record():
    class Scenes:
        classes, context_classes = ("road", "sky", "pole"), (1,)

    scores = ConfusionMatrix(3).update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])).scores()
    third = pytest.approx(2 / 3)
    assert scores.record(Scenes()) == {
        "miou": 0.5,
        "macc": 0.75,
        "aacc": third,
        "context_miou": 0.5,
        "mean_dice": third,
        "mean_precision": 0.75,
        "fwiou": 0.5,
        "iou": {"road": 0.5, "sky": 0.5, "pole": None},
        "dice": {"road": third, "sky": third, "pole": None},
        "precision": {"road": 1.0, "sky": 0.5, "pole": None},
        "recall": {"road": 0.5, "sky": 1.0, "pole": None},
    }


def test_the_file(tmp_path):
    matrix = ConfusionMatrix(5, 100).update(*draw())
    matrix.save(tmp_path / "confusion.npy")
    assert os.listdir(tmp_path) == ["confusion.npy"]
    read = np.load(tmp_path / "confusion.npy")
    assert read.dtype == np.int64 and np.array_equal(read, matrix.matrix)


# Errors

LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        ([0, 1, 9], [0, 1, 2], ValueError, "prediction: expected 0 to 2, got 9"),
        ([0, 1, 2], [7, 5, 7], ValueError, "target: expected 0 to 2, or 255 for pixels to ignore, got 5, 7"),
        ([0, -1, 1], [0, 1, 2], ValueError, "prediction: expected 0 to 2, got -1"),
        ([0, 1], [0, 1, 2], ValueError, r"prediction: expected the shape of target, \(3,\), got \(2,\)"),
        ([[0, 1, 2]], [0, 1, 2], ValueError, r"prediction: expected the shape of target, \(3,\), got \(1, 3\)"),
        ([0.0, 1.0, 2.0], [0, 1, 2], TypeError, "prediction: expected integers, got float32"),
    ],
)
def test_wrong_labels(prediction, target, error, message):
    matrix = ConfusionMatrix(3).update(LABELS, LABELS)
    with pytest.raises(error, match=message):
        matrix.update(torch.tensor(prediction), torch.tensor(target))
    assert torch.equal(matrix.matrix, torch.eye(3, dtype=torch.int64))


def test_an_error_in_a_later_piece_leaves_the_counts_alone(monkeypatch):
    monkeypatch.setattr(confusion, "PIECE", 2)
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="prediction: expected 0 to 2, got 3"):
        matrix.update(torch.tensor([0, 1, 2, 2, 3]), torch.tensor([0, 1, 2, 2, 2]))
    assert not matrix.matrix.any()


def test_wrong_kinds():
    with pytest.raises(TypeError, match="target: expected a tensor of integers, got list"):
        ConfusionMatrix(3).update(LABELS, [0, 1, 2])
    with pytest.raises(ValueError, match="num_classes: expected 1 or more, got 0"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match=r"matrix: expected torch.int64 \(3, 3\), got torch.float32 \(3, 3\)"):
        ConfusionMatrix(3).add(torch.zeros(3, 3))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ConfusionMatrix(3).save("no such folder/confusion.npy")
