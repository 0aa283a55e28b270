"""Tests the files of class probabilities: their numbers, and that memory holds some rows of them at a time."""

import numpy as np
import pytest
import torch
from stand_in import Network, draw_image, picture, view

from apcnet import inference
from apcnet.bulk import predict_files, probabilities
from apcnet.data.augment import view_sizes
from apcnet.data.files import read_mask
from apcnet.inference import Protocol, protocol

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photo(tmp_path):
    picture(draw_image(61, 45)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def check(out, expected) -> None:
    found = np.load(out / "a_probabilities.npy", mmap_mode="r")
    assert found.dtype == np.float16 and found.shape == (5, 61, 45)
    assert np.abs(found - expected.numpy()).max() < 1e-3
    labels = read_mask(out / "a.png").long()
    top = torch.from_numpy(np.array(found)).float()
    assert (top.gather(0, labels[None])[0] >= top.amax(0) - 1e-3).all()


@pytest.mark.parametrize(
    "seen",
    [
        Protocol(),
        Protocol(flip=True, ratios=(0.5, 1.0)),
        Protocol(window=(32, 32), stride=(20, 20)),
        Protocol(test_scale=(40, 40)),
    ],
)
def test_they_are_those_of_the_protocol(tmp_path, photo, seen, monkeypatch):
    monkeypatch.setattr(protocol, "BAND", 5 * 45 * 7)
    tops, write = [], probabilities.ProbabilityFile.write

    def noted(self, top, band):
        tops.append((top, band.shape))
        write(self, top, band)

    monkeypatch.setattr(probabilities.ProbabilityFile, "write", noted)
    predict_files(Network(), photo, tmp_path / "out", seen, probabilities=True)
    views = [view(draw_image(61, 45), size) for size in view_sizes((61, 45), seen.ratios, seen.test_scale)]
    check(tmp_path / "out", inference.probabilities(Network(), views, seen, size=(61, 45))[0])
    assert max(shape[1] for _, shape in tops) <= 7 and sum(shape[1] for _, shape in tops) == 61


def test_of_tiles_and_of_images_that_are_predicted_together(tmp_path, photo):
    predict_files(Network(), photo, tmp_path / "tiles", probabilities=True, confidence=True, max_pixels=900)
    found = np.load(tmp_path / "tiles" / "a_probabilities.npy")
    labels = read_mask(tmp_path / "tiles" / "a.png").numpy()
    own = np.take_along_axis(found, labels[None].astype(int), 0)[0]
    assert np.abs(read_mask(tmp_path / "tiles" / "a_confidence.png").numpy() / 255 - own).max() < 1 / 255
    for name in "bc":
        picture(draw_image(61, 45).flip(ord(name) % 2)).save(tmp_path / f"{name}.png")
    sources = [tmp_path / f"{name}.png" for name in "abc"]
    predict_files(Network(), sources, tmp_path / "one", probabilities=True)
    predict_files(Network(), sources, tmp_path / "three", probabilities=True, batch_size=3)
    for name in "abc":
        one, three = (np.load(tmp_path / out / f"{name}_probabilities.npy") for out in ("one", "three"))
        assert np.abs(one - three).max() < 1e-3


def test_a_failure_leaves_no_file(tmp_path, photo):
    picture(draw_image(1, 90)).save(tmp_path / "thin.png")
    report = predict_files(
        Network(), [photo, tmp_path / "thin.png"], tmp_path / "out", Protocol(test_scale=(16, 16)), probabilities=True
    )
    assert report.done == 1 and "nothing is left" in report.failures[0]
    expected = ["a.png", "a_overlay.jpg", "a_probabilities.npy", "manifest.jsonl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
