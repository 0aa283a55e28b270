"""Tests brightness, contrast, saturation and hue against mmsegmentation and against OpenCV's 8-bit HSV."""

import colorsys
import itertools

import parity
import pytest
import torch

import apc_kernels
from apcnet.data import augment
from apcnet.data.augment import BRIGHTNESS, DISTORTION_DRAWS, HUE, UNIT, distortion

STEPS = ("brightness", "contrast", "saturation", "hue")
NEVER, ALWAYS = 0, UNIT - 1


def colors(count=5000, seed=0):
    levels = torch.randint(256, (3, 1, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    corners = torch.tensor(list(itertools.product((0, 1, 127, 254, 255), repeat=3)), dtype=torch.uint8).T[:, None]
    return torch.cat([levels, levels // 16 + 90, corners], 2)


@pytest.mark.parametrize("step", STEPS)
def test_as_mmsegmentation(step):
    case = parity.load("pixels")
    image = case.tensors["photometric.input"].permute(2, 0, 1)
    checked = [given for given in case.about["photometric"] if given["step"] == step]
    assert checked
    for given in checked:
        changed = getattr(augment, step)(image, given["value"]).permute(1, 2, 0)
        apart = (changed.int() - case.tensors[given["tensor"]].int()).abs()
        assert apart.max() <= (step in ("saturation", "hue")), given  # of the 10 allowed
        assert (apart > 0).float().mean() <= 0.02, given


@pytest.mark.parametrize(
    ("factor", "delta"), [(1.0, -32.0), (1.0, 31.9), (1.0, -0.001), (0.5, 0.0), (1 / 3, 0), (1.5, 0)]
)
def test_levels_are_clamped_and_cut_off(factor, delta):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    changed = augment.brightness(levels, delta) if delta else augment.contrast(levels, factor)
    expected = (levels.float() * factor + delta).clamp(0, 255).to(torch.uint8)
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("turn", [-180, -77, -30, -18, -1, 0, 17, 31, 90, 180])
def test_hue_of_the_color_circle(turn):
    """Tests the definition color by color: hue rounded to two degrees, saturation to 1/255, levels cut off."""
    image = colors(200)
    turned = augment.hue(image, turn)
    for given, found in zip(image.flatten(1).T.tolist(), turned.flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in given))
        degrees = {(round(hue * 180 + side) + turn) % 180 for side in (-0.16, 0.16)}  # OpenCV divides by tables
        near = [colorsys.hsv_to_rgb(h / 180, round(saturation * 255) / 255, value) for h in degrees]
        assert min(max(abs(255 * e - f - 0.5) for e, f in zip(each, found, strict=True)) for each in near) <= 1.6, given


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.5, 9.0])
def test_saturation_keeps_the_largest_level_and_grey(factor):
    image = colors()
    changed = augment.saturation(image, factor)
    assert torch.equal(changed.amax(0), image.amax(0))
    grey = image.amax(0) == image.amin(0)
    assert grey.any() and torch.equal(changed[:, grey], image[:, grey])
    if factor == 0:
        assert torch.equal(changed, image.amax(0, keepdim=True).expand_as(image))


def test_whole_turns_change_nothing_more_than_none():
    image = colors()
    assert torch.equal(augment.hue(image, 180), augment.hue(image, 0))
    assert torch.equal(augment.hue(image, -180), augment.hue(image, 0))


@pytest.mark.parametrize("step", STEPS)
def test_the_image_stays_as_it_is(step):
    image = colors(100)
    before = image.clone()
    changed = getattr(augment, step)(image, {"brightness": 7.5, "hue": -11}.get(step, 1.2))
    assert torch.equal(image, before) and not torch.equal(changed, image)


def test_distortion_is_the_steps_in_order():
    """Tests that the draws choose the steps and their order, and that each step equals the public function."""
    image = colors(300)
    for chosen in itertools.product((NEVER, ALWAYS), repeat=5):
        bright, early, contrasted, saturated, turned = chosen
        draws = [bright, UNIT // 4, early, contrasted, UNIT // 8, saturated, UNIT // 2 + 77, turned, UNIT // 3 + 1]
        expected = image
        contrast = (lambda x: augment.contrast(x, 0.625)) if contrasted else (lambda x: x)
        if bright:
            expected = augment.brightness(expected, -16.0)
        if early:
            expected = contrast(expected)
        if saturated:
            expected = augment.saturation(expected, 0.5 + draws[6] / UNIT)
        if turned:
            expected = augment.hue(expected, -6)
        if not early:
            expected = contrast(expected)
        assert torch.equal(apc_kernels.augment(image, steps=distortion(draws)), expected), chosen


@pytest.mark.parametrize(("draw", "turn", "delta"), [(0, -HUE, -BRIGHTNESS), (UNIT - 1, HUE - 1, BRIGHTNESS)])
def test_ends_of_the_draws(draw, turn, delta):
    """Tests that hue never reaches its upper end, like NumPy's randint(-18, 18)."""
    draws = [NEVER] * DISTORTION_DRAWS
    draws[7:] = ALWAYS, draw
    assert distortion(draws) == [("hue", turn)]
    draws = [ALWAYS, draw] + [NEVER] * (DISTORTION_DRAWS - 2)
    assert distortion(draws) == [("brightness", pytest.approx(delta, abs=1e-6))]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: augment.brightness(x.float(), 1), TypeError, "image: expected a uint8 tensor"),
        (lambda x: augment.hue(x[:1], 1), ValueError, r"image: expected the shape \(3, H, W\), got \(1, 2, 4\)"),
        (lambda x: augment.hue(x, 1.5), ValueError, "hue: expected whole steps of two degrees, got 1.5"),
        (lambda x: augment.saturation(x, -0.1), ValueError, "saturation: expected a number from 0 to 255, got -0.1"),
        (lambda x: augment.brightness(x, "a"), TypeError, "brightness: expected a number, got 'a'"),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 2, 4, dtype=torch.uint8))
