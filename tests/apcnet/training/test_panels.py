"""Tests that what a report draws is kept as it was, and reduced without new colours."""

import numpy as np
import pytest
import torch

from apcnet.training import panels

PALETTE = [(1, 2, 3), (200, 100, 0)]


def test_samples_and_predictions_come_back(tmp_path):
    image = torch.arange(3 * 8 * 10).view(3, 8, 10).to(torch.uint8)
    truth, found = torch.arange(80).view(8, 10).byte(), torch.full((8, 10), 300, dtype=torch.int16)
    sample = panels.reduced(image, truth, "street 背景/\udcff")
    panels.save(tmp_path / "worst.npz", [sample], [panels.reduced_labels(found)], PALETTE)
    ((read,), (prediction,), palette) = panels.load(tmp_path / "worst.npz")
    assert palette == PALETTE
    assert np.array_equal(read.image, image.permute(1, 2, 0)) and np.array_equal(read.truth, truth)
    assert read.name == "street 背景/\\udcff" and np.array_equal(prediction, found)
    panels.save(tmp_path / "step.npz", [], [prediction, prediction], PALETTE)
    assert [len(part) for part in panels.load(tmp_path / "step.npz")] == [0, 2, 2]


@pytest.mark.parametrize(
    ("size", "shown"),
    [((480, 480), (480, 480)), ((1024, 2048), (240, 480)), ((2000, 500), (480, 120)), ((3, 5000), (1, 480))],
    ids=str,
)
def test_large_pictures_are_reduced(size, shown):
    """Tests that labels are those of a pixel, not means, and that both halves stay halves."""
    truth = torch.zeros(size, dtype=torch.uint8)
    truth[:, size[1] // 2 :] = 200
    sample = panels.reduced(truth.expand(3, *size), truth, "a")
    assert sample.truth.shape == shown and sample.image.shape == (*shown, 3)
    assert set(np.unique(sample.truth)) == {0, 200}
    assert (sample.truth == 200).mean() == pytest.approx(0.5)
    assert abs(sample.image[..., 0].astype(int) - sample.truth).mean() < 1


def test_files_are_the_same_bytes_each_time(tmp_path):
    sample = panels.reduced(torch.zeros(3, 9, 9).byte(), torch.zeros(9, 9).byte(), "a")
    for name in ("a", "b"):
        panels.save(tmp_path / name, [sample], [], PALETTE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
