"""Sizes of resized images: to the pixel those that mmsegmentation and mmcv compute."""

import math

import pytest

from apcnet.data.augment import TEST_RATIOS, keep_ratio_size, view_sizes


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((94, 125), (512, 128), (128, 170)),
        ((225, 301), (512, 128), (128, 171)),
        ((70, 125), (512, 128), (128, 229)),
        ((83, 63), (130, 130), (130, 99)),
        ((1024, 2048), (2048, 1024), (1024, 2048)),
        ((375, 500), (2048, 512), (512, 683)),
        ((512, 2048), (2048, 512), (512, 2048)),
        ((100, 1000), (2048, 512), (205, 2048)),  # the long side decides
        ((333, 500), 0.75, (250, 375)),
    ],
    ids=str,
)
def test_keep_ratio_size(size, scale, expected):
    assert keep_ratio_size(size, scale) == expected
    assert keep_ratio_size(size[::-1], scale) == expected[::-1]
    if isinstance(scale, tuple):
        assert keep_ratio_size(size, list(scale[::-1])) == expected


def test_views_of_the_test_scale():
    """mmsegmentation 0.x: (2048, 512)·ratio, rounded down, holds the view."""
    assert view_sizes((375, 500), test_scale=(2048, 512)) == [
        (256, 341),
        (384, 512),
        (512, 683),
        (640, 853),
        (768, 1024),
        (896, 1195),
    ]


def test_views_of_the_image():
    """mmsegmentation 1.x: the view fits into the image's size·ratio, rounded: not always that size itself."""
    assert view_sizes((375, 500), (0.5, 1.0, 1.75)) == [(188, 250), (375, 500), (656, 875)]
    assert view_sizes((334, 501), (1.25,)) == [(417, 626)]  # (418, 626) is what its sides give, each rounded


def test_the_bases_agree_on_cityscapes():
    of_image, of_scale = view_sizes((1024, 2048)), view_sizes((1024, 2048), test_scale=(2048, 1024))
    assert of_image == of_scale == [(int(1024 * ratio), int(2048 * ratio)) for ratio in TEST_RATIOS]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: keep_ratio_size((0, 4), (4, 4)), ValueError, r"size: expected two positive integers, got \(0, 4\)"),
        (lambda: keep_ratio_size(4, (4, 4)), TypeError, "size: expected two integers, got 4"),
        (lambda: keep_ratio_size((4, 4), (4.5, 4)), TypeError, r"scale: expected two integers, got \(4.5, 4\)"),
        (lambda: keep_ratio_size((4, 4), -1.0), ValueError, "scale: expected a positive factor, or two bounds, got -1"),
        (lambda: keep_ratio_size((4, 4), math.nan), ValueError, "scale: expected a positive factor"),
        (lambda: keep_ratio_size((1, 900), (90, 90)), ValueError, r"scale: nothing is left of an image of \(1, 900\)"),
        (lambda: view_sizes((4, 4), ()), ValueError, r"ratios: expected positive numbers, at least one, got \(\)"),
        (lambda: view_sizes((4, 4), (1.0, 0)), ValueError, "ratios: expected positive numbers"),
    ],
)
def test_wrong_sizes(call, error, message):
    with pytest.raises(error, match=message):
        call()
