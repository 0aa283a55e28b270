"""Augments and resizes images and masks as mmsegmentation's pipelines do, equal to the pixel.

Training takes a random scale, a crop that no class fills, flips, a rotation, photometric distortion, normalisation and
padding.
Only the crop's window of the resized image is computed, and equals the crop of the whole image bit for bit. The
distortion changes brightness, contrast, saturation and hue, each rounded to 8 bits; saturation and hue pass through
OpenCV's 8-bit HSV, whose hue counts steps of two degrees. A sample draws a fixed number of integers from the given
generator, and all arithmetic before the normalisation is exact, so that a seed gives the same pixels on every machine.

Images that are not 8-bit RGB, (C, H, W) float32, go through the same steps in PyTorch with the same draws, but without
distortion, which means colours: their levels are interpolated without rounding.
"""

import math
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels
from apcnet.data.sample import IGNORE, MEAN, STD, Sample

Window = tuple[int, int, int, int]  # top, left, height and width in the resized image

UNIT = 1 << 30  # random integers are below it
DISTORTION_DRAWS = 9  # the random integers that distortion takes
BRIGHTNESS, HUE = 32, 18  # the largest changes, up or down
FACTORS = 0.5, 1.5  # the range of the factors of contrast and saturation
CROPS = 11  # the most crops to try; the last one is taken whatever it holds
TEST_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # the scales of every published multi-scale result


def keep_ratio_size(size: Sequence[int], scale: Sequence[int] | float) -> tuple[int, int]:
    """Computes the largest (h, w) that keeps the proportions of `size` and fits into `scale`.

    Args:
        size: The (h, w) of an image.
        scale: Two bounds, for the long and the short side in either order; or the factor itself.

    Example:
        >>> apcnet.data.augment.keep_ratio_size((375, 500), (2048, 512))
        (512, 683)
    """
    height, width = checked_pair(size, "size")
    if not isinstance(scale, (int, float)):
        bounds = checked_pair(scale, "scale")
        scale = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive factor or two bounds, got {scale}")
    resized = _times((height, width), scale)
    if 0 in resized:
        raise ValueError(f"scale: nothing is left of an image of {(height, width)} at {scale:.3g} of its size")
    return resized


def view_sizes(
    original: Sequence[int], ratios: Sequence[float] = TEST_RATIOS, test_scale: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Computes the size (h, w) of an image at every scale of a multi-scale test.

    The published results come from mmsegmentation 0.x, which multiplies the bounds of the test scale; 1.x multiplies
    the image's own size. The two agree on Cityscapes, and differ on smaller images.

    Args:
        original: The (h, w) of the image.
        ratios: The scales of the test; 1 is the single-scale test.
        test_scale: The two bounds of 0.x, as in keep_ratio_size: (2048, 512) for ADE20K. None for 1.x.
    """
    if test_scale is None:
        return [keep_ratio_size(original, _times(original, ratio)) for ratio in ratios]
    long, short = test_scale
    return [keep_ratio_size(original, (int(long * ratio), int(short * ratio))) for ratio in ratios]


def resize(image: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    """Resizes an image, (3, H, W) uint8, bilinearly to (h, w), or a mask, (H, W) uint8, to the nearest labels.

    Images are within one level of OpenCV's INTER_LINEAR: half-pixel centres, and no smoothing of an image that shrinks.
    Bilinear weights have 8 binary places, so that only the result is rounded. Masks equal OpenCV's INTER_NEAREST, which
    rounds down.

    Args:
        image: An image or a mask, on the CPU.
        size: The (h, w) of the result.
        antialias: Smooth an image that shrinks, as Pillow and PyTorch do; it differs by up to dozens of levels.
    """
    size = checked_pair(size, "size")
    if isinstance(image, Tensor) and image.ndim == 2:
        _check(image, "mask")
        return _nearest(image, size, (0, 0, *size))
    _check(image, "image")
    if antialias and (size[0] < image.shape[1] or size[1] < image.shape[2]):
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    return apc_kernels.augment(image, size)


def normalise(image: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Normalises an image, (3, H, W) uint8 RGB, for a network: (image − mean) / std in each channel, in float32."""
    return apc_kernels.augment(image, mean=mean, std=std)


def view(image: Tensor, size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resizes an image, uint8 RGB or float32 levels (C, H, W), to (h, w), and normalises it for a network."""
    if image.dtype == torch.uint8:
        return apc_kernels.augment(image, size, mean=mean, std=std)
    return normalised(resized_levels(image, size, (0, 0, *size)), mean, std)


def resized_levels(levels: Tensor, size: Sequence[int], window: Sequence[int], flip: bool = False) -> Tensor:
    """Computes a window of resized levels (C, H, W) float32: bilinear, with half-pixel centres, without rounding."""
    top, left, height, width = window
    above, below, down = _neighbours(levels.shape[1], size[0], top, height)
    before, after, right = _neighbours(levels.shape[2], size[1], left, width)
    if flip:
        before, after, right = before.flip(0), after.flip(0), right.flip(0)
    rows = torch.lerp(levels[:, above], levels[:, below], down[:, None])
    return torch.lerp(rows[:, :, before], rows[:, :, after], right)


def normalised(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalises levels (C, H, W) float32."""
    center, scale = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (levels - center) / scale


def _neighbours(length: int, resized: int, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two elements around each position of a window, and the weight of the second."""
    places = ((torch.arange(start, start + count, dtype=torch.float64) + 0.5) * (length / resized) - 0.5).clamp(min=0)
    index = places.long().clamp(max=length - 1)
    return index, (index + 1).clamp(max=length - 1), (places - index).float()


def brightness(image: Tensor, delta: float) -> Tensor:
    """Adds delta to every level of an image, (3, H, W) uint8 RGB; results are cut to 0–255."""
    return apc_kernels.augment(image, steps=[("brightness", delta)])


def contrast(image: Tensor, factor: float) -> Tensor:
    """Multiplies every level of an image, (3, H, W) uint8 RGB, by the factor; results are cut to 0–255."""
    return apc_kernels.augment(image, steps=[("contrast", factor)])


def saturation(image: Tensor, factor: float) -> Tensor:
    """Multiplies the saturation of every pixel of an image, (3, H, W) uint8 RGB, by the factor."""
    return apc_kernels.augment(image, steps=[("saturation", factor)])


def hue(image: Tensor, delta: int) -> Tensor:
    """Turns the hue of every pixel of an image, (3, H, W) uint8 RGB, by delta steps of two degrees."""
    return apc_kernels.augment(image, steps=[("hue", delta)])


def train(
    sample: Sample,
    generator: torch.Generator,
    crop_size: Sequence[int],
    scale: Sequence[int],
    *,
    ratio_range: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    antialias: bool = False,
    flips: Literal["horizontal", "both", "none"] = "horizontal",
    rotate: bool = False,
    distort: bool = True,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> tuple[Tensor, Tensor]:
    """Augments a sample for training: random scale, crop, flips and distortion, then normalisation and padding.

    Every call draws the same number of integers from the generator: the ratio, the horizontal flip, those of the
    distortion, (row, column) of 11 crops, the vertical flip and the rotation.

    Args:
        sample: The sample, with image and mask of one size.
        generator: The only source of randomness.
        crop_size: The (h, w) of the result; a smaller image is padded at the right and the bottom.
        scale: Two bounds, as in keep_ratio_size, that the image is fitted into at ratio 1.
        ratio_range: The range of the factors that multiply both bounds.
        cat_max_ratio: Draw the crop again, up to 10 times, unless it holds at least two classes and each covers less
            than this share of the pixels that count; 1 takes the first crop.
        antialias: Smooth images that shrink, which mmsegmentation does not do; it takes about 4 ms more.
        flips: Mirror half of the crops horizontally; both: and half of them vertically.
        rotate: Rotate crops by a multiple of 90°, after the flips.
        distort: Change brightness, contrast, saturation and hue.
        mean: The mean of the levels of each channel, 0–255 for RGB.
        std: The standard deviation of the levels.

    Returns:
        The image, (C, h, w) float32, 0 where padded, and the mask, (h, w) uint8, 255 where padded.
    """
    check_sample(sample)
    height, width = checked_pair(crop_size, "crop_size")
    scale = checked_pair(scale, "scale")
    count = 2 + DISTORTION_DRAWS + 2 * CROPS + 2
    ratio, flip, *draws, upside_down, turns = torch.randint(UNIT, (count,), generator=generator).tolist()
    ratio = ratio_range[0] + (ratio_range[1] - ratio_range[0]) * (ratio / UNIT)
    flip, upside_down = flips != "none" and 2 * flip >= UNIT, flips == "both" and 2 * upside_down >= UNIT
    turns = 4 * turns // UNIT if rotate else 0
    size = keep_ratio_size(sample.image.shape[1:], (int(scale[0] * ratio), int(scale[1] * ratio)))
    cut = (width, height) if turns % 2 else (height, width)
    window, labels = _varied_crop(sample.mask, size, cut, draws[DISTORTION_DRAWS:], cat_max_ratio, flip)

    if sample.image.dtype == torch.uint8:
        source = resize(sample.image, size, antialias=True) if antialias else sample.image
        steps = distortion(draws[:DISTORTION_DRAWS]) if distort else []
        image = apc_kernels.augment(source, size, window, flip=flip, steps=steps, mean=mean, std=std)
    else:
        source = sample.image
        if antialias and (size[0] < source.shape[1] or size[1] < source.shape[2]):
            source = F.interpolate(source[None], size, mode="bilinear", antialias=True)[0]
        image = normalised(resized_levels(source, size, window, flip), mean, std)
    if upside_down:
        image, labels = image.flip(1), labels.flip(0)
    if turns:
        image, labels = (tensor.rot90(turns, (-2, -1)).contiguous() for tensor in (image, labels))
    outside = (0, width - labels.shape[1], 0, height - labels.shape[0])
    if any(outside):
        image, labels = F.pad(image, outside), F.pad(labels, outside, value=IGNORE)
    return image, labels


def distortion(draws: Sequence[int]) -> list[tuple[str, float]]:
    """Chooses mmsegmentation's distortion steps, each of the four with probability ½, contrast first or last.

    The draws are DISTORTION_DRAWS integers below UNIT. They decide, in this order: brightness or not, its change;
    contrast before or after the colours, contrast or not, its factor; saturation or not, its factor; hue or not, its
    change.
    """
    chance = [2 * draw >= UNIT for draw in draws]
    share = [draw / UNIT for draw in draws]
    low, high = FACTORS
    brighter = [("brightness", BRIGHTNESS * (2 * share[1] - 1))] if chance[0] else []
    contrasted = [("contrast", low + (high - low) * share[4])] if chance[3] else []
    saturated = [("saturation", low + (high - low) * share[6])] if chance[5] else []
    turned = [("hue", 2 * HUE * draws[8] // UNIT - HUE)] if chance[7] else []  # never +HUE, like numpy's randint
    if chance[2]:
        return brighter + contrasted + saturated + turned
    return brighter + saturated + turned + contrasted


def _varied_crop(
    mask: Tensor, size: tuple[int, int], crop_size: tuple[int, int], draws: list[int], max_ratio: float, flip: bool
) -> tuple[Window, Tensor]:
    """Returns the first crop window whose classes vary enough, or the last one, and its labels."""
    height, width = min(size[0], crop_size[0]), min(size[1], crop_size[1])
    for row, column in zip(draws[::2], draws[1::2], strict=True):
        top = row * (size[0] - height + 1) // UNIT
        left = column * (size[1] - width + 1) // UNIT
        window = top, left, height, width
        labels = _nearest(mask, size, window, flip)
        if max_ratio >= 1:
            break
        counts = torch.bincount(labels.flatten(), minlength=256)
        counts[IGNORE] = 0
        if counts.count_nonzero() > 1 and counts.max().item() / counts.sum().item() < max_ratio:
            break
    return window, labels


def _nearest(mask: Tensor, size: tuple[int, int], window: Window, flip: bool = False) -> Tensor:
    """Computes a window of a resized mask."""
    top, left, height, width = window
    rows = _nearest_indices(mask.shape[0], size[0], top, height)
    columns = _nearest_indices(mask.shape[1], size[1], left, width)
    if flip:
        columns = columns[::-1]
    return torch.from_numpy(mask.numpy()[rows].take(columns, axis=1))


def _nearest_indices(length: int, resized: int, start: int, count: int) -> np.ndarray:
    indices = np.arange(start, start + count) * (1 / (resized / length))  # two divisions, rounded as OpenCV's are
    return np.minimum(indices.astype(np.int64), length - 1)


def _times(size: Sequence[int], factor: float) -> tuple[int, int]:
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def checked_pair(given: Sequence[int], name: str) -> tuple[int, int]:
    """Returns a height and width as two positive integers, or raises an error that names the argument."""
    try:
        first, second = map(operator.index, given)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected two integers, got {given!r}") from None
    if first < 1 or second < 1:
        raise ValueError(f"{name}: expected two positive integers, got {(first, second)}")
    return first, second


def _check(tensor: Tensor, name: str) -> None:
    """Checks that a tensor has the type and shape of an image or a mask."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.device.type != "cpu":
        given = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a uint8 tensor on the CPU, got {given}")
    planes, shape = ((3,), "(3, H, W)") if name == "image" else ((), "(H, W)")
    if tensor.ndim < 2 or tensor.shape[:-2] != planes or not tensor.numel():
        raise ValueError(f"{name}: expected the shape {shape} without zeros, got {tuple(tensor.shape)}")


def check_channels(image: Tensor, channels: int, is_rgb: bool) -> None:
    """Checks that an image has the channels and the depth that a model was trained with."""
    if len(image) != channels or is_rgb != (image.dtype == torch.uint8):
        expected, given = (
            "8-bit RGB" if rgb else f"{count} channels of more levels"
            for rgb, count in ((is_rgb, channels), (image.dtype == torch.uint8, len(image)))
        )
        raise ValueError(f"image: expected {expected}, as the model was trained with, got {given}")


def check_sample(sample: Sample) -> None:
    """Checks that image and mask have the right types and one size."""
    if not isinstance(sample.image, Tensor) or sample.image.dtype != torch.float32 or sample.image.ndim != 3:
        _check(sample.image, "image")
    _check(sample.mask, "mask")
    if sample.image.shape[1:] != sample.mask.shape:
        sizes = f"{tuple(sample.image.shape[1:])} and {tuple(sample.mask.shape)}"
        raise ValueError(f"image, mask: expected one size for both, got {sizes}")
