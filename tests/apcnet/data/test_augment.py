"""Tests sizes, resizes and the pipelines of training and evaluation against mmsegmentation's definitions."""

import math

import parity
import pytest
import torch

from apcnet.data import augment
from apcnet.data.augment import (
    DISTORTION_DRAWS,
    TEST_RATIOS,
    UNIT,
    keep_ratio_size,
    normalise,
    resize,
    train,
    view_sizes,
)
from apcnet.data.sample import Sample


def generator(seed):
    return torch.Generator().manual_seed(seed)


def sample(height, width, seed=0, classes=4, block=8):
    """Makes a picture of blocks with a color for every class, a little noise and a few ignored pixels."""
    random = generator(seed)
    grid = torch.randint(classes, (-(-height // block), -(-width // block)), generator=random)
    mask = grid.repeat_interleave(block, 0).repeat_interleave(block, 1)[:height, :width]
    colors = torch.randint(30, 220, (classes, 3), generator=random)
    image = colors[mask].permute(2, 0, 1) + torch.randint(-20, 20, (3, height, width), generator=random)
    mask = mask.masked_fill(torch.rand(height, width, generator=random) < 0.02, 255)
    return Sample(image.to(torch.uint8), mask.to(torch.uint8), f"blocks {seed}")


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
    """Tests mmsegmentation 0.x: the view fits into (2048, 512)·ratio, rounded down."""
    assert view_sizes((375, 500), test_scale=(2048, 512)) == [
        (256, 341),
        (384, 512),
        (512, 683),
        (640, 853),
        (768, 1024),
        (896, 1195),
    ]


def test_views_of_the_image():
    """Tests mmsegmentation 1.x: the view fits into the rounded size·ratio, and may differ from that size."""
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
        (lambda: keep_ratio_size((4, 4), -1.0), ValueError, "scale: expected a positive factor or two bounds, got -1"),
        (lambda: keep_ratio_size((4, 4), math.nan), ValueError, "scale: expected a positive factor"),
        (lambda: keep_ratio_size((1, 900), (90, 90)), ValueError, r"scale: nothing is left of an image of \(1, 900\)"),
    ],
)
def test_wrong_sizes(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("index", range(4))
def test_resize_as_opencv(index):
    case = parity.load("pixels")
    image, expected = (case.tensors[f"resize.{index}.{name}"] for name in ("input", "output"))
    about = case.about["resize"][index]
    size = keep_ratio_size(image.shape[:2], about["scale"])
    assert list(size) == about["size"]
    apart = (resize(image.permute(2, 0, 1), size).permute(1, 2, 0).int() - expected.int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() <= 0.15


@pytest.mark.parametrize("size", [(2, 60), (7, 90), (13, 40), (40, 13), (26, 38), (57, 91)], ids=str)
def test_resize_is_bilinear_between_pixel_centres(size):
    """Compares with PyTorch in float64: rounding, and weights of 8 binary places, off by half of 1/256 on each axis."""
    image = sample(26, 38).image
    exact = torch.nn.functional.interpolate(image[None].double(), size, mode="bilinear")[0]
    assert (resize(image, size).double() - exact).abs().max() <= 0.5 + 2 * 255 / 512
    assert (resize(image, size).double() - exact).mean().abs() <= 0.06  # rounded, not cut off
    assert torch.equal(resize(image, (26, 38)), image)


def test_nearest_rounds_down():
    mask = torch.arange(10, dtype=torch.uint8).repeat(3, 1)
    assert resize(mask, (2, 4)).tolist() == [[0, 2, 5, 7]] * 2
    assert resize(mask, (3, 20))[0].tolist() == [i // 2 for i in range(20)]


def test_antialias_smooths_what_shrinks_and_nothing_else():
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(3, 64, 64)
    assert resize(stripes, (16, 16), antialias=True)[..., 1:-1].float().std() < 1
    assert torch.equal(resize(stripes, (80, 90), antialias=True), resize(stripes, (80, 90)))


def as_mmsegmentation(given, seed, crop_size, scale, max_ratio):
    """Runs mmsegmentation's steps in their order, on whole images, with the numbers that `train` draws."""
    numbers = torch.randint(UNIT, (2 + DISTORTION_DRAWS + 22,), generator=generator(seed)).tolist()
    share = [number / UNIT for number in numbers]

    # one ratio multiplies both bounds, which are cut off; the image keeps its proportions
    ratio = 0.5 + 1.5 * share[0]
    size = keep_ratio_size(given.mask.shape, tuple(int(bound * ratio) for bound in scale))
    image, mask = resize(given.image, size), resize(given.mask, size)

    # a crop is taken if two classes are in it and the larger has less than its share of what counts, ten redraws
    corners = zip(numbers[2 + DISTORTION_DRAWS :: 2], numbers[3 + DISTORTION_DRAWS :: 2], strict=True)
    for row, column in corners:
        top = row * (max(size[0] - crop_size[0], 0) + 1) // UNIT
        left = column * (max(size[1] - crop_size[1], 0) + 1) // UNIT
        crop = (..., slice(top, top + crop_size[0]), slice(left, left + crop_size[1]))
        labels = mask[crop]
        counted = [int((labels == label).sum()) for label in range(255)]
        if sum(count > 0 for count in counted) > 1 and max(counted) / sum(counted) < max_ratio:
            break
    image, mask = image[crop], mask[crop]

    if share[1] >= 0.5:
        image, mask = image.flip(-1), mask.flip(-1)

    brighter, by, early, contrasted, times, saturated, factor, turned, turn = share[2 : 2 + DISTORTION_DRAWS]
    if brighter >= 0.5:
        image = augment.brightness(image, -32 + 64 * by)
    if early >= 0.5 and contrasted >= 0.5:
        image = augment.contrast(image, 0.5 + times)
    if saturated >= 0.5:
        image = augment.saturation(image, 0.5 + factor)
    if turned >= 0.5:
        image = augment.hue(image, math.floor(turn * 36) - 18)
    if early < 0.5 and contrasted >= 0.5:
        image = augment.contrast(image, 0.5 + times)

    # padded after the normalisation: with the mean color, that is
    below, right = crop_size[0] - mask.shape[0], crop_size[1] - mask.shape[1]
    image = torch.nn.functional.pad(normalise(image), (0, right, 0, below), value=0.0)
    return image, torch.nn.functional.pad(mask, (0, right, 0, below), value=255)


@pytest.mark.parametrize(
    ("size", "crop_size", "scale"),
    [((64, 128), (32, 64), (128, 64)), ((50, 75), (64, 64), (128, 64)), ((47, 31), (60, 20), (70, 70))],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_train_is_mmsegmentation_bit_for_bit(size, crop_size, scale, channels_last):
    """Tests that computing the crop's window alone, in one pass, changes no bit."""
    for seed in range(25):
        given = sample(*size, seed=seed, classes=2, block=16)
        if channels_last:
            given = given._replace(image=given.image.permute(1, 2, 0).contiguous().permute(2, 0, 1))
        image, mask = train(given, generator(seed), crop_size, scale)
        expected_image, expected_mask = as_mmsegmentation(given, seed, crop_size, scale, 0.75)
        assert torch.equal(mask, expected_mask), seed
        assert torch.equal(image, expected_image), seed
        assert image.is_contiguous() and mask.is_contiguous()


def test_image_and_mask_move_together():
    """Tests that pixels of a checkerboard of two classes, away from its edges, still look like their labels."""
    board = (torch.arange(96)[:, None] // 12 + torch.arange(160) // 12) % 2
    given = Sample((board * 180 + 30).to(torch.uint8).expand(3, -1, -1), board.to(torch.uint8), "checkerboard")
    for seed in range(20):
        image, mask = train(given, generator(seed), (64, 96), (160, 96))
        labels, around = mask[None].float(), torch.nn.functional.max_pool2d
        inside = (around(labels, 5, 1, 2) == -around(-labels, 5, 1, 2))[0] & (mask != 255)
        inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = False  # an edge may lie just outside the crop
        level = image.mean(0)
        light = level > (level[inside].min() + level[inside].max()) / 2
        assert inside.float().mean() > 0.05
        assert torch.equal(light[inside], mask[inside] == 1), seed


def test_padding():
    image, mask = train(sample(20, 30), generator(0), (90, 100), (30, 20))
    height, width = (int((mask != 255).any(axis).nonzero().max()) + 1 for axis in (1, 0))
    assert 10 <= height <= 40 and 15 <= width <= 60
    for outside in (image[:, height:], image[..., width:]):
        assert not outside.any()
    assert (mask[height:] == 255).all() and (mask[:, width:] == 255).all()


def test_crops_avoid_what_one_class_fills():
    """Tests that the rule avoids crops of the half that one class fills, and that they are frequent without it."""
    mask = torch.zeros(64, 256, dtype=torch.uint8)
    mask[:, 160:] = sample(64, 96, block=4).mask
    given = Sample(torch.zeros(3, 64, 256, dtype=torch.uint8), mask, "half empty")

    def filled(max_ratio):
        masks = (train(given, generator(i), (32, 32), (256, 64), cat_max_ratio=max_ratio)[1] for i in range(60))
        return sum(bool((mask == 0).float().mean() >= 0.75) for mask in masks)

    assert filled(0.75) < 5
    assert filled(1.0) > 20


def test_a_picture_of_one_class_or_of_none_is_taken_as_it_is():
    for label in (3, 255):
        given = Sample(
            torch.zeros(3, 40, 40, dtype=torch.uint8), torch.full((40, 40), label, dtype=torch.uint8), "flat"
        )
        mask = train(given, generator(0), (16, 16), (40, 40), ratio_range=(1, 1))[1]
        assert (mask == label).all()


def test_chance_is_the_generators_and_always_as_many_draws():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    used = set()
    for seed, given in enumerate([sample(40, 60), sample(33, 21, classes=1)]):
        random = generator(7)
        first = train(given, random, (24, 24), (60, 40), cat_max_ratio=[0.75, 1.0][seed])
        used.add(random.get_state().numpy().tobytes())
        again = train(given, generator(7), (24, 24), (60, 40), cat_max_ratio=[0.75, 1.0][seed])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(used) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_train_antialiases_where_it_is_asked_to():
    stripes = (torch.arange(128) % 2 * 255).to(torch.uint8).expand(3, 128, 128)
    given = Sample(stripes, torch.zeros(128, 128, dtype=torch.uint8), "stripes")
    for antialias, smooth in ((True, True), (False, False)):
        image, _ = train(given, generator(1), (32, 32), (128, 128), ratio_range=(0.4, 0.4), antialias=antialias)
        assert (image[..., 2:-2].std(-1).max() < 0.3) == smooth


def test_normalise():
    image = sample(9, 11).image
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (augment.MEAN, augment.STD))
    torch.testing.assert_close(normalise(image), (image - mean) / std, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: resize(s.image, (0, 4)), ValueError, r"size: expected two positive integers, got \(0, 4\)"),
        (
            lambda s: resize(s.image.int(), (4, 4)),
            TypeError,
            "image: expected a uint8 tensor on the CPU, got torch.int32",
        ),
        (
            lambda s: resize(s.mask.long(), (4, 4)),
            TypeError,
            "mask: expected a uint8 tensor on the CPU, got torch.int64",
        ),
        (lambda s: resize(s.image[None], (4, 4)), ValueError, r"image: expected the shape \(3, H, W\)"),
        (
            lambda s: normalise(s.image, std=(1, 1, 0)),
            ValueError,
            "mean, std: expected three numbers each, std positive",
        ),
        (
            lambda s: train(s._replace(mask=s.mask[1:]), generator(0), (4, 4), (9, 9)),
            ValueError,
            r"image, mask: expected one size for both, got \(8, 9\) and \(7, 9\)",
        ),
        (lambda s: train(s, generator(0), (4, 0), (9, 9)), ValueError, r"crop_size: .* got \(4, 0\)"),
        (lambda s: train(s, generator(0), (4, 4), (4,)), TypeError, r"scale: expected two integers, got \(4,\)"),
    ],
)
def test_wrong_samples_and_options(call, error, message):
    with pytest.raises(error, match=message):
        call(sample(8, 9))


def transformed(kept, seed, **options):
    return train(kept, generator(seed), (40, 56), (64, 64), cat_max_ratio=1.0, **options)


def test_flips_and_rotations_move_image_and_mask_together():
    """Tests that crops are those without flips and rotations, turned: all eight ways occur, and none else."""
    kept, seen = sample(64, 64), set()
    options = {"ratio_range": (1.0, 1.0), "distort": False, "mean": (0, 0, 0), "std": (1, 1, 1)}
    for seed in range(60):
        image, mask = train(kept, generator(seed), (64, 64), (64, 64), flips="both", rotate=True, **options)
        ways = [(k, flip) for k in range(4) for flip in (False, True)]
        fits = [(k, f) for k, f in ways if torch.equal(kept.mask.flip(1).rot90(k) if f else kept.mask.rot90(k), mask)]
        (way,) = fits
        turned = kept.image.flip(2) if way[1] else kept.image
        assert torch.equal(turned.rot90(way[0], (1, 2)).float(), image)
        seen.add(way)
    assert len(seen) == 8


def test_crops_of_any_shape_are_rotated():
    kept = sample(90, 70)
    shapes = {transformed(kept, seed, rotate=True)[0].shape for seed in range(8)}
    assert shapes == {(3, 40, 56)}
    for seed in range(8):
        image, mask = transformed(kept, seed, rotate=True, distort=False, mean=(0, 0, 0), std=(1, 1, 1))
        assert mask.shape == (40, 56) and image.is_contiguous() and mask.is_contiguous()


def test_no_flips_and_no_distortion_leave_a_crop():
    kept = sample(64, 64)
    options = {"ratio_range": (1.0, 1.0), "mean": (0, 0, 0), "std": (1, 1, 1)}
    for seed in range(5):
        image, mask = transformed(kept, seed, flips="none", distort=False, **options)
        crops = kept.image.float().unfold(1, 40, 1).unfold(2, 56, 1)
        assert (crops == image[:, None, None]).all(dim=(0, 3, 4)).any()
        assert (kept.mask.unfold(0, 40, 1).unfold(1, 56, 1) == mask).all(dim=(2, 3)).any()


def test_the_options_change_nothing_else_of_a_crop():
    """Tests that each option leaves the other draws alone, so that runs without it keep their bits."""
    kept = sample(90, 70)
    for seed in range(6):
        plain, both = transformed(kept, seed), transformed(kept, seed, flips="both")
        assert any(torch.equal(plain[0], image) for image in (both[0], both[0].flip(1)))


def test_levels_of_floats_are_flipped_and_rotated_too():
    kept = sample(64, 64)
    floats = kept._replace(image=kept.image.float())
    options = {"ratio_range": (1.0, 1.0), "flips": "both", "rotate": True, "distort": False}
    for seed in range(6):
        one, other = transformed(kept, seed, **options), transformed(floats, seed, **options)
        assert torch.allclose(one[0], other[0], atol=1e-5) and torch.equal(one[1], other[1])
