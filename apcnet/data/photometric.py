"""mmsegmentation's photometric distortion: brightness, contrast, saturation and hue, each cut to 8 bits as there.

Saturation and hue pass through OpenCV's 8-bit HSV, whose hue counts steps of two degrees. A pixel of value v,
saturation s (0–255) and hue h (0–179) is, in each channel,

    v − v·s·w / (255·30),   w = min(max(||h − o| − 90|, 30), 60) − 30,   o = 90, 150, 30 for R, G, B

and OpenCV's vector code cuts that off, as everything here is cut off, instead of rounding it.

The steps work in place on (3, n) levels, in NumPy: its conversions from and to bytes cost a fifth of PyTorch's. They
are fastest on as many pixels as a cache holds: PIXELS. NumPy's minimum and maximum are slow beside a number, so they
are given arrays.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

PIXELS = 32768  # at a time: a dozen planes of them, bytes to float32, stay near the second-level cache
UNIT = 1 << 30  # draws are integers below it
DRAWS = 9  # that distortion takes
BRIGHTNESS, HUE = 32, 18  # turned up or down by as much
FACTORS = 0.5, 1.5  # of contrast and of saturation

Step = Callable[[np.ndarray], None]


def brightness(image: Tensor, delta: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with delta added to every level."""
    return _changed(image, _linear(1.0, _checked(delta, "delta", -255, 255)))


def contrast(image: Tensor, factor: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every level multiplied by the factor."""
    return _changed(image, _linear(_checked(factor, "factor", 0, 255), 0.0))


def saturation(image: Tensor, factor: float) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every pixel's saturation multiplied by the factor."""
    return _changed(image, _hsv(0, _checked(factor, "factor", 0, 255)))


def hue(image: Tensor, delta: int) -> Tensor:
    """The image, (3, H, W) uint8 RGB, with every pixel's hue turned by delta steps of two degrees."""
    if _checked(delta, "delta", -180, 180) != int(delta):
        raise ValueError(f"delta: hue is turned by whole steps of two degrees, got {delta}")
    return _changed(image, _hsv(int(delta), 1.0))


def distortion(draws: Sequence[int]) -> list[Step]:
    """mmsegmentation's steps, each of the four with probability ½, contrast before or after the colours.

    The draws, DRAWS integers below UNIT, decide: whether brightness, by how much; contrast early or late, whether,
    by how much; whether saturation, by how much; whether hue, by how much.
    """
    chance = [2 * draw >= UNIT for draw in draws]
    share = [draw / UNIT for draw in draws]
    low, high = FACTORS
    brighter = [_linear(1.0, BRIGHTNESS * (2 * share[1] - 1))] if chance[0] else []
    contrasted = [_linear(low + (high - low) * share[4], 0.0)] if chance[3] else []
    saturated = [_hsv(0, low + (high - low) * share[6])] if chance[5] else []
    turned = [_hsv(2 * HUE * draws[8] // UNIT - HUE, 1.0)] if chance[7] else []  # never by +HUE, as numpy's randint
    if chance[2]:
        return brighter + contrasted + saturated + turned
    return brighter + saturated + turned + contrasted


def _linear(factor: float, delta: float) -> Step:
    return functools.partial(_multiply_add, factor=factor, delta=delta)


def _hsv(turn: int, factor: float) -> Step:
    return functools.partial(_through_hsv, turn=turn, factor=factor)


def _multiply_add(levels: np.ndarray, factor: float, delta: float) -> None:
    """levels·factor + delta in float32, clamped and cut off."""
    plane = np.empty(levels.shape[1:], np.float32)
    for channel in levels:
        np.multiply(channel, np.float32(factor), out=plane)
        plane += np.float32(delta)
        if 255 * factor + delta > 255:
            np.minimum(plane, np.full_like(plane, 255), out=plane)
        if delta < 0:
            np.maximum(plane, np.zeros_like(plane), out=plane)
        np.copyto(channel, plane, casting="unsafe")


def _through_hsv(levels: np.ndarray, turn: int, factor: float) -> None:
    """Turns hues and multiplies saturations."""
    red, green, blue = levels
    value = np.maximum(red, green)
    np.maximum(value, blue, out=value)
    chroma = np.minimum(red, green)
    np.minimum(chroma, blue, out=chroma)
    np.subtract(value, chroma, out=chroma)
    sixths, rest = divmod(turn + 30, 60)  # whole sixths of a turn exchange the channels
    hues = _hue(levels, value, chroma, rest + 30)

    start = value.astype(np.float32)
    depth = _saturation(value, chroma, factor)
    depth *= start
    depth *= np.float32(1 / (255 * 30))  # v·s / (255·30)
    start += np.float32(6e-5)  # less than half of 1 / (255·30): what is whole stays whole
    plane = depth * np.float32(30)
    start += plane  # w comes with its 30 on top

    steps = np.empty_like(hues)
    low, high = np.full_like(hues, 30), np.full_like(hues, 60)
    for channel, opposite in zip(levels, (90, 150, 30), strict=True):
        np.subtract(hues, (opposite - 60 * sixths) % 180 + 60, out=steps)
        np.abs(steps, out=steps)
        steps -= 90
        np.abs(steps, out=steps)
        np.maximum(steps, low, out=steps)
        np.minimum(steps, high, out=steps)
        np.copyto(plane, steps)
        plane *= depth
        np.subtract(start, plane, out=plane)
        np.copyto(channel, plane, casting="unsafe")


def _hue(levels: np.ndarray, value: np.ndarray, chroma: np.ndarray, more: int) -> np.ndarray:
    """OpenCV's hue, from −30 to 150 (it adds 180 below 0), plus something that leaves none of them negative."""
    red, green, blue = levels.astype(np.int16)
    double = chroma.astype(np.int16)
    double += double
    sixths = red - green  # where blue is largest: R − G + 4·chroma
    sixths += double
    sixths += double
    np.subtract(blue, red, out=red)  # where green is: B − R + 2·chroma
    red += double
    np.subtract(green, blue, out=green)  # where red is: G − B
    _choose(levels[1] == value, red, sixths)
    _choose(levels[0] == value, green, sixths)
    hues = sixths.astype(np.float32)
    hues *= _ratio(30, chroma)
    hues += np.float32(more + 0.5)
    return hues.astype(np.int16)


def _saturation(value: np.ndarray, chroma: np.ndarray, factor: float) -> np.ndarray:
    """OpenCV's saturation, 0 to 255, multiplied, clamped and cut off."""
    saturations = _ratio(255, value)
    saturations *= chroma.astype(np.float32)
    saturations += np.float32(0.5)
    np.floor(saturations, out=saturations)
    if factor != 1:
        saturations *= np.float32(factor)
        np.floor(saturations, out=saturations)
    if factor > 1:
        np.minimum(saturations, np.full_like(saturations, 255), out=saturations)
    return saturations


def _ratio(number: int, levels: np.ndarray) -> np.ndarray:
    """number / levels, to the 12 binary places of OpenCV's tables; beside level 0 stands a finite number."""
    ratio = np.maximum(levels, np.full_like(levels, 1)).astype(np.float32)
    np.divide(np.float32(number * 4096), ratio, out=ratio)
    np.rint(ratio, out=ratio)
    ratio *= np.float32(1 / 4096)
    return ratio


def _choose(where: np.ndarray, given: np.ndarray, into: np.ndarray) -> None:
    """into[where] = given[where], without branches; `given` is spent."""
    mask = np.negative(where.view(np.int8)).astype(np.int16)
    given ^= into
    given &= mask
    into ^= given


def _changed(image: Tensor, step: Step) -> Tensor:
    check_image(image)
    changed = image.clone(memory_format=torch.contiguous_format)
    levels = changed.flatten(1).numpy()
    for start in range(0, levels.shape[1], PIXELS):
        step(levels[:, start : start + PIXELS])
    return changed


def check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.device.type != "cpu":
        given = f"{image.dtype} on {image.device}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: expected a uint8 tensor on the CPU, got {given}")
    if image.ndim != 3 or len(image) != 3 or not image.numel():
        raise ValueError(f"image: expected the shape (3, H, W), none of them 0, got {tuple(image.shape)}")


def _checked(number: float, name: str, low: int, high: int) -> float:
    if not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {number!r}")
    if math.isnan(number) or not low <= number <= high:
        raise ValueError(f"{name}: expected a number from {low} to {high}, got {number}")
    return number
