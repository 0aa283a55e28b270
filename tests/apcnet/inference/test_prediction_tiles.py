"""Tests that images too large for the network are predicted in tiles, from the mean of their scores."""

import pytest
import torch
import torch.nn.functional as F
from stand_in import Network, draw_image, view

from apcnet import inference
from apcnet.inference import Protocol, tiles
from apcnet.inference.prediction import predict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network():
    return Network()


def windows(size, crop, stride):
    """Returns (top, bottom, left, right) of each window."""

    def along(length, side, step):
        starts = range(0, max(length - side, 0) + step, step)
        return sorted({min(start, max(length - side, 0)) for start in starts})

    return [
        (top, min(top + crop[0], size[0]), left, min(left + crop[1], size[1]))
        for top in along(size[0], crop[0], stride[0])
        for left in along(size[1], crop[1], stride[1])
    ]


def averaged_over_windows(image, crop, stride, scores_of):
    """Averages the scores (1, K, h, w) that a function computes from the levels of each window."""
    size, total, hits = image.shape[1:], 0, 0
    for top, bottom, left, right in windows(size, crop, stride):
        around = (left, size[1] - right, top, size[0] - bottom)
        scores = scores_of(image[:, top:bottom, left:right])
        total, hits = total + F.pad(scores, around), hits + F.pad(torch.ones_like(scores[:1, :1]), around)
    return total / hits


def agree(labels, scores):
    """Checks that labels have the largest score, up to rounding."""
    assert labels.dtype == torch.uint8 and labels.device.type == "cpu" and labels.shape == scores.shape[2:]
    chosen = scores[0].gather(0, labels.long()[None])[0]
    return (scores[0].amax(0) - chosen).max() <= 1e-4 and len(labels.unique()) > 1


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(97, 140), (31, 200), (200, 3)], ids=str)
def test_large_images_go_in_tiles(size, align_corners):
    """Tests tiles of 32 × 32 pixels, the square root of the limit, that overlap by a third."""
    network, image = Network(align_corners=align_corners), draw_image(*size)
    labels = predict(network, image, max_pixels=1030 if min(size) > 3 else 599).labels
    side = 32 if min(size) > 3 else 24
    crop, stride = (side, side), (2 * side // 3,) * 2
    assert {shape[2:] for shape in network.seen} == {(min(side, size[0]), min(side, size[1]))}
    expected = inference.labels(network, view(image), Protocol(window=crop, stride=stride))[0]
    assert torch.equal(labels, expected)
    scores = averaged_over_windows(image, crop, stride, lambda tile: inference.whole_logits(network, view(tile)))
    assert agree(labels, scores)


def test_largest_image_in_one_piece(network):
    predict(network, draw_image(20, 30), max_pixels=600)
    assert network.seen == [(1, 3, 20, 30)]
    predict(network, draw_image(20, 30), max_pixels=599)
    assert len(network.seen) > 2


def test_published_sizes_are_one_piece():
    assert tiles.MAX_PIXELS >= 1025 * 2049


@pytest.mark.parametrize(("ratios", "flip"), [((1.0,), True), ((0.5, 1.0, 1.5), True), ((1.5,), False)])
def test_tiles_at_several_scales(network, ratios, flip):
    """Tests that each tile is predicted like an image, at all scales within the limit."""
    image, most = draw_image(70, 110), 2000
    protocol = Protocol(ratios=ratios, flip=flip)
    labels = predict(network, image, protocol, max_pixels=most).labels
    assert max(shape[2] * shape[3] for shape in network.seen) <= most * 1.05  # sides are whole numbers
    side = int((most / max(ratios) ** 2) ** 0.5)

    def scores_of(tile):
        views = [view(tile, [round(n * ratio) for n in tile.shape[1:]]) for ratio in ratios]
        if not flip:
            logits = inference.whole_logits(network, views[0])
            return F.interpolate(logits, tuple(tile.shape[1:]), mode="bilinear")
        return inference.probabilities(network, views, protocol, size=tile.shape[1:])

    assert agree(labels, averaged_over_windows(image, (side, side), (2 * side // 3,) * 2, scores_of))


def test_tiles_of_an_image_fitted_into_a_scale(network):
    image = draw_image(70, 110)
    labels = predict(network, image, Protocol(test_scale=(220, 140)), max_pixels=4000).labels
    assert {shape[2:] for shape in network.seen} == {(62, 62)}  # 31 × 31 pixels of the image

    def scores_of(tile, logits_of):
        logits = logits_of(view(tile, [2 * n for n in tile.shape[1:]]))
        return F.interpolate(logits, tuple(tile.shape[1:]), mode="bilinear")

    twice = averaged_over_windows(
        image, (31, 31), (20, 20), lambda tile: scores_of(tile, lambda x: inference.whole_logits(network, x))
    )
    once = averaged_over_windows(image, (31, 31), (20, 20), lambda tile: scores_of(tile, network))
    protocol = Protocol(test_scale=(220, 140), single_resize=True)
    straight = predict(network, image, protocol, max_pixels=4000).labels
    assert agree(labels, twice) and agree(straight, once) and not agree(straight, twice)


def test_tiles_are_lower_where_a_band_of_them_would_be_large(network, monkeypatch):
    monkeypatch.setattr(tiles, "BAND_SCORES", 5 * 400 * 20)
    monkeypatch.setattr(tiles, "MIN_TILE_ROWS", 12)
    predict(network, draw_image(60, 400), max_pixels=1600)
    assert {shape[2:] for shape in network.seen} == {(20, 40)}
    network.seen.clear()
    predict(network, draw_image(60, 4000), max_pixels=1600)
    assert {shape[2:] for shape in network.seen} == {(12, 40)}


def test_probabilities_of_large_images_at_a_small_scale(network, monkeypatch):
    """Tests that probabilities are not stored at the size of the image, and that labels are nearly the same."""
    image, sizes = draw_image(240, 360), []

    def remember(scores, size):
        sizes.append(tuple(scores.shape[2:]))
        return argmax(scores, size)

    argmax, protocol = tiles.upsample_argmax, Protocol(test_scale=(90, 60), ratios=(0.5, 1.0), flip=True)
    exact = predict(network, image, protocol).labels
    monkeypatch.setattr(tiles, "upsample_argmax", remember)
    labels = predict(network, image, protocol, max_pixels=6000).labels
    assert sizes == [(60, 90)] and {shape[2:] for shape in network.seen} == {(30, 45), (60, 90)}
    assert (labels == exact).float().mean() > 0.99


@pytest.mark.parametrize("most", [10**6, 1100], ids=["whole", "tiles"])
@pytest.mark.parametrize("protocol", [Protocol(), Protocol(flip=True)], ids=["logits", "probabilities"])
def test_confidence_is_the_probability_of_the_label(network, protocol, most):
    """Tests it with tiles too, whose scores are averaged as logits or, with several views, as probabilities."""
    image = draw_image(70, 110)
    seen = predict(network, image, protocol, max_pixels=most, confidence=True)
    assert torch.equal(seen.labels, predict(network, image, protocol, max_pixels=most).labels)

    def scores_of(tile):
        if protocol.flip:
            return inference.probabilities(network, view(tile), protocol)
        return inference.whole_logits(network, view(tile))

    side, step = (33, 22) if most == 1100 else (110, 110)
    scores = averaged_over_windows(image, (side, side), (step, step), scores_of)
    shares = scores[0] if protocol.flip else scores[0].softmax(0)
    expected = shares.gather(0, seen.labels.long()[None])[0]
    torch.testing.assert_close(seen.confidence, expected, rtol=1e-4, atol=1e-5)
    assert 0.2 <= seen.confidence.min() < seen.confidence.max() <= 1


def test_confidence_of_large_images_at_a_small_scale(network):
    image, protocol = draw_image(240, 360), Protocol(test_scale=(90, 60), ratios=(0.5, 1.0), flip=True)
    exact = predict(network, image, protocol, confidence=True)
    seen = predict(network, image, protocol, max_pixels=6000, confidence=True)
    assert (seen.confidence - exact.confidence).abs().mean() < 0.01 and seen.confidence.shape == (240, 360)
