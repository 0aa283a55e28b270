"""Computes augment in plain PyTorch, with integers, and products and quotients that are rounded to integers.

Saturation and hue pass through OpenCV's 8-bit HSV, whose hue counts steps of two degrees, 0 to 179. Its tables of
30 / chroma and 255 / value have 12 binary places. A pixel of value v, saturation s (0 to 255) and hue h becomes, in
each channel,

    v − v·s·w / (255·30),   w = min(max(||h − o| − 90|, 30), 60) − 30,   o = 90, 150, 30 for red, green and blue.

OpenCV's vector code truncates this, and so does everything here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apc_kernels.ops.interpolation import mapping


def augment(
    image: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    flip: bool,
    kinds: Sequence[int],
    values: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Computes augment; `kinds` are indices into STEPS, mean and std are empty for uint8 levels."""
    levels = resized(image, size, window, flip)
    for kind, value in zip(kinds, values, strict=True):
        levels = STEPS[kind](levels, value)
    if not mean:
        return levels.to(torch.uint8)
    offset, scale = (
        torch.tensor(numbers, dtype=torch.float32, device=image.device).view(3, 1, 1)
        for numbers in (mean, [1 / deviation for deviation in std])
    )
    return (levels - offset) * scale


def resized(image: Tensor, size: Sequence[int], window: Sequence[int], flip: bool) -> Tensor:
    """Returns the levels in a window of the resized image, (3, h, w) int32."""
    top, left, height, width = window
    above, below, down = _places(image.shape[1], size[0], top, height, image)
    before, after, right = _places(image.shape[2], size[1], left, width, image)
    if flip:
        before, after, right = before.flip(0), after.flip(0), right.flip(0)
    upper, lower = (image[:, rows].to(torch.int32, memory_format=torch.contiguous_format) for rows in (above, below))
    lines = _between(upper, lower, down[:, None])
    levels = _between(lines[:, :, before], lines[:, :, after], right)
    return (levels + (1 << 15)) >> 16


def _places(source: int, size: int, start: int, count: int, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the two elements around each position of a window, and the weight of the second in 256ths."""
    step, first, denominator = mapping(source, size, align_corners=False)
    places = ((torch.arange(count, device=image.device) + start) * step + first).clamp(min=0)
    index = places // denominator
    weight = ((places - index * denominator) * 256 + size) // denominator
    return index, (index + 1).clamp(max=source - 1), weight.int()


def _between(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    return first * 256 + (second - first) * weight


def brightness(levels: Tensor, delta: float) -> Tensor:
    return (levels.float() + delta).clamp(0, 255).int()


def contrast(levels: Tensor, factor: float) -> Tensor:
    return (levels.float() * factor).clamp(0, 255).int()


def saturation(levels: Tensor, factor: float) -> Tensor:
    return _through_hsv(levels, 0, factor)


def hue(levels: Tensor, turn: float) -> Tensor:
    return _through_hsv(levels, int(turn), 1.0)


STEPS = (brightness, contrast, saturation, hue)


def _through_hsv(levels: Tensor, turn: int, factor: float) -> Tensor:
    red, green, blue = levels
    value = levels.amax(0)
    chroma = value - levels.amin(0)
    of_red, of_green, of_blue = green - blue, blue - red + 2 * chroma, red - green + 4 * chroma
    sixths = torch.where(red == value, of_red, torch.where(green == value, of_green, of_blue))
    hues = (((sixths * _ratio(30, chroma) + 2048) >> 12) + turn) % 180
    saturations = (chroma * _ratio(255, value) + 2048) >> 12
    depth = value * (saturations.float() * factor).int().clamp(max=255)
    opposite = torch.tensor((90, 150, 30), dtype=torch.int32, device=levels.device).view(3, 1, 1)
    w = ((hues - opposite).abs() - 90).abs().clamp(30, 60) - 30
    return value - (depth * w + 255 * 30 - 1) // (255 * 30)


def _ratio(number: int, levels: Tensor) -> Tensor:
    """Returns number / level with 12 binary places; for level 0, which is multiplied by 0, any number will do."""
    return (number * 4096 / levels.clamp(min=1).float()).round().int()
