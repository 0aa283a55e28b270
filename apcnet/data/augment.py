"""What is done to images and masks before a network sees them: mmsegmentation's pipelines, to the pixel.

Training: a random scale, a crop that no class fills, a flip, photometric distortion, normalisation, padding. Only the
crop is ever resized: of the resized image, whatever its size, the crop's window alone is computed, and equals the
crop of the whole, bit for bit. The distortion is of brightness, contrast, saturation and hue, each cut to 8 bits;
saturation and hue pass through OpenCV's 8-bit HSV, whose hue counts steps of two degrees. What is drawn are integers of
the generator that is given, always as many, and everything before the normalisation is exact arithmetic, so that a seed
means the same on every machine.
"""

import math
import operator
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import apc_kernels
from apcnet.data.sample import IGNORE, MEAN, STD, Sample

Window = tuple[int, int, int, int]  # of a resized image: top, left, height, width

UNIT = 1 << 30  # draws are integers below it
DRAWS = 9  # that distortion takes
BRIGHTNESS, HUE = 32, 18  # turned up or down by as much
FACTORS = 0.5, 1.5  # of contrast and of saturation
CROPS = 11  # drawn at most until one is varied enough; the last is taken as it is
TEST_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of every published multi-scale result


def keep_ratio_size(size: Sequence[int], scale: Sequence[int] | float) -> tuple[int, int]:
    """The largest (h, w) of a size's proportions whose long and short side fit into those of a scale.

    A scale is two bounds, of the long and of the short side in either order; or the factor itself.
    """
    height, width = checked_pair(size, "size")
    if not isinstance(scale, (int, float)):
        bounds = checked_pair(scale, "scale")
        scale = min(max(bounds) / max(height, width), min(bounds) / min(height, width))
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive factor, or two bounds, got {scale}")
    resized = _times((height, width), scale)
    if 0 in resized:
        raise ValueError(f"scale: nothing is left of an image of {(height, width)} at {scale:.3g} of its size")
    return resized


def view_sizes(
    original: Sequence[int], ratios: Sequence[float] = TEST_RATIOS, test_scale: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """The sizes (h, w) of an image at every scale of a multi-scale test.

    The published results come from mmsegmentation 0.x, which multiplies the test scale that the image is fitted into;
    1.x multiplies the image's own size. On Cityscapes that is the same, on smaller images it is not.

    Args:
        ratios: of the scales; 1 is the single-scale test.
        test_scale: two bounds, as in keep_ratio_size: 0.x, (2048, 512) for ADE20K say; None: 1.x.
    """
    if test_scale is None:
        return [keep_ratio_size(original, _times(original, ratio)) for ratio in ratios]
    long, short = test_scale
    return [keep_ratio_size(original, (int(long * ratio), int(short * ratio))) for ratio in ratios]


def resize(image: Tensor, size: Sequence[int], *, antialias: bool = False) -> Tensor:
    """An image, (3, H, W) uint8, resized bilinearly to (h, w), or a mask, (H, W) uint8, to its nearest labels.

    As OpenCV: half-pixel centres, and a shrinking image is not smoothed, unless `antialias` says so (Pillow's and
    PyTorch's way, up to dozens of grey levels away). Bilinear weights have 8 binary places, so that nothing is rounded
    but the result: within 1 of OpenCV's. Nearest is OpenCV's INTER_NEAREST, which rounds down.
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
    """An image, (3, H, W) uint8 RGB, as the float32 that networks are fed: (image − mean) / std in each channel."""
    return apc_kernels.augment(image, mean=mean, std=std)


def brightness(image: Tensor, delta: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with delta added to every level."""
    return apc_kernels.augment(image, steps=[("brightness", delta)])


def contrast(image: Tensor, factor: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every level multiplied by the factor."""
    return apc_kernels.augment(image, steps=[("contrast", factor)])


def saturation(image: Tensor, factor: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every pixel's saturation multiplied by the factor."""
    return apc_kernels.augment(image, steps=[("saturation", factor)])


def hue(image: Tensor, delta: int) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every pixel's hue turned by delta steps of two degrees."""
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
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> tuple[Tensor, Tensor]:
    """A sample as it is trained on.

    Draws from the generator, whatever becomes of them: the ratio, the flip, distortion's, and (row, column)
    of up to 11 crops.

    Args:
        generator: the only source of chance.
        crop_size: (h, w) of the result; less is padded at the right and the bottom, after the normalisation.
        scale: two bounds, as in keep_ratio_size, that the image is fitted into at ratio 1.
        ratio_range: of the factors on both bounds.
        cat_max_ratio: a crop is drawn again, 10 times at most, unless it holds two classes or more and none has this
            share or more of the pixels that count; 1: any crop will do.
        antialias: smooth images that shrink, which mmsegmentation does not, for about 4 ms more.
        mean, std: of the RGB levels, 0–255.

    Returns:
        the image, (3, h, w) float32, 0 where padded, and the mask, (h, w) uint8, 255 where padded.
    """
    check_sample(sample)
    height, width = checked_pair(crop_size, "crop_size")
    scale = checked_pair(scale, "scale")
    ratio, flip, *draws = torch.randint(UNIT, (2 + DRAWS + 2 * CROPS,), generator=generator).tolist()
    ratio = ratio_range[0] + (ratio_range[1] - ratio_range[0]) * (ratio / UNIT)
    flip = 2 * flip >= UNIT
    size = keep_ratio_size(sample.image.shape[1:], (int(scale[0] * ratio), int(scale[1] * ratio)))
    window, labels = _varied_crop(sample.mask, size, (height, width), draws[DRAWS:], cat_max_ratio, flip)

    source = resize(sample.image, size, antialias=True) if antialias else sample.image
    steps = distortion(draws[:DRAWS])
    image = apc_kernels.augment(source, size, window, flip=flip, steps=steps, mean=mean, std=std)
    outside = (0, width - labels.shape[1], 0, height - labels.shape[0])
    if any(outside):
        image, labels = F.pad(image, outside), F.pad(labels, outside, value=IGNORE)
    return image, labels


def distortion(draws: Sequence[int]) -> list[tuple[str, float]]:
    """mmsegmentation's steps, each of the four with probability ½, contrast before or after the colours.

    The draws, DRAWS integers below UNIT, decide: whether brightness, by how much; contrast early or late, whether,
    by how much; whether saturation, by how much; whether hue, by how much.
    """
    chance = [2 * draw >= UNIT for draw in draws]
    share = [draw / UNIT for draw in draws]
    low, high = FACTORS
    brighter = [("brightness", BRIGHTNESS * (2 * share[1] - 1))] if chance[0] else []
    contrasted = [("contrast", low + (high - low) * share[4])] if chance[3] else []
    saturated = [("saturation", low + (high - low) * share[6])] if chance[5] else []
    turned = [("hue", 2 * HUE * draws[8] // UNIT - HUE)] if chance[7] else []  # never by +HUE, as numpy's randint
    if chance[2]:
        return brighter + contrasted + saturated + turned
    return brighter + saturated + turned + contrasted


def _varied_crop(
    mask: Tensor, size: tuple[int, int], crop_size: tuple[int, int], draws: list[int], max_ratio: float, flip: bool
) -> tuple[Window, Tensor]:
    """The first window whose classes are varied, or the last, and its labels."""
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
    """A window of a resized mask."""
    top, left, height, width = window
    rows = _nearest_places(mask.shape[0], size[0], top, height)
    columns = _nearest_places(mask.shape[1], size[1], left, width)
    if flip:
        columns = columns[::-1]
    return torch.from_numpy(mask.numpy()[rows].take(columns, axis=1))


def _nearest_places(length: int, resized: int, start: int, count: int) -> np.ndarray:
    places = np.arange(start, start + count) * (1 / (resized / length))  # OpenCV's two divisions, rounded as there
    return np.minimum(places.astype(np.int64), length - 1)


def _times(size: Sequence[int], factor: float) -> tuple[int, int]:
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def checked_pair(given: Sequence[int], name: str) -> tuple[int, int]:
    """Two positive integers: heights and widths."""
    try:
        first, second = map(operator.index, given)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected two integers, got {given!r}") from None
    if first < 1 or second < 1:
        raise ValueError(f"{name}: expected two positive integers, got {(first, second)}")
    return first, second


def _check(tensor: Tensor, name: str) -> None:
    """Whether it is fit to be an image or a mask."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.device.type != "cpu":
        given = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a uint8 tensor on the CPU, got {given}")
    planes, shape = ((3,), "(3, H, W)") if name == "image" else ((), "(H, W)")
    if tensor.ndim < 2 or tensor.shape[:-2] != planes or not tensor.numel():
        raise ValueError(f"{name}: expected the shape {shape}, none of them 0, got {tuple(tensor.shape)}")


def check_sample(sample: Sample) -> None:
    _check(sample.image, "image")
    _check(sample.mask, "mask")
    if sample.image.shape[1:] != sample.mask.shape:
        sizes = f"{tuple(sample.image.shape[1:])} and {tuple(sample.mask.shape)}"
        raise ValueError(f"image and mask differ in size: {sizes}")
