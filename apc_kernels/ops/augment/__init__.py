"""Implements augment: resizes, crops, flips, distorts and normalises an image in one pass."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.augment import reference
from apc_kernels.ops.common import name_of
from apc_kernels.ops.operator import define

KERNELS = Kernels(reference, dtypes=(torch.uint8,))

MAX_SIZE = 2**29  # of an axis, exclusive

# The smallest and largest value of each step, in the order in which the kernels number the steps.
STEPS = {"brightness": (-255, 255), "contrast": (0, 255), "saturation": (0, 255), "hue": (-180, 180)}


def augment(
    image: Tensor,
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    *,
    flip: bool = False,
    steps: Sequence[tuple[str, float]] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Resizes an image, cuts out a window, mirrors it, distorts its colours and normalises it, in one pass.

        result = (steps(flip(resize(image, size)[window])) − mean) / std

    Resizing is bilinear with half-pixel centres and weights of 8 binary places, as in OpenCV; only its result is
    rounded, to 8 bits. Only the window of the resized image is computed, with the same values as in the whole image.
    Each step changes the levels, and truncates them to 8 bits:

        ("brightness", d)   level + d,  −255 ≤ d ≤ 255
        ("contrast", f)     level · f,  0 ≤ f ≤ 255
        ("saturation", f)   saturation · f in OpenCV's 8-bit HSV,  0 ≤ f ≤ 255
        ("hue", n)          hue + n steps of two degrees there,  −180 ≤ n ≤ 180, an integer

    The images between the steps are never stored.

    Args:
        image: (3, H, W) uint8, RGB, read in place in any layout; adjacent columns, or adjacent channels as from a
            decoder, are fastest.
        size: (h, w) to resize the image to; None keeps its size.
        window: (top, left, height, width) of the resized image; None takes all of it.
        flip: mirrors the window, with columns in reverse order.
        steps: pairs of name and value, applied in this order.
        mean, std: three numbers each, one for each channel; both or neither.

    Returns:
        (3, height, width), contiguous: uint8 levels, or float32 if mean and std are given.

    Every level is exact, so results are the same bits on every backend, with any instruction set and number of threads.
    The operation is not differentiable.
    """
    _check_dtype(image)
    size = tuple(image.shape[1:]) if size is None else _integers(size, "size", "(h, w)", 2)
    window = (0, 0, *size) if window is None else _integers(window, "window", "(top, left, height, width)", 4)
    arguments = image, size, window, bool(flip), *_checked_steps(steps), *_checked_moments(mean, std)
    if torch.compiler.is_exporting():
        _empty(*arguments)  # checks
        return reference.augment(*arguments)
    return _augment(*arguments)


def _compute(image: Tensor, *others: Any) -> Tensor:
    out = _empty(image, *others)
    backend = KERNELS.select("augment", image)
    function = KERNELS.function(backend, "augment")
    if backend == "reference":
        return function(image, *others).contiguous()
    function(image, *others, out)
    return out


def _empty(
    image: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    flip: bool,
    kinds: Sequence[int],
    values: Sequence[float],
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    _check_dtype(image)
    if image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected the shape (3, H, W), got {tuple(image.shape)}")
    _check_places(image, size, window)
    return torch.empty(3, *window[2:], dtype=torch.float32 if mean else torch.uint8, device=image.device)


# Not an Operator, because the kernel reads an image in any layout.
_augment = define(
    "augment(Tensor image, SymInt[] size, SymInt[] window, bool flip, SymInt[] kinds, float[] values, float[] mean, "
    "float[] std) -> Tensor",
    _compute,
    _empty,
)


def _check_dtype(image: Tensor) -> None:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        given = name_of(image.dtype) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image: expected a uint8 tensor, got {given}")


def _check_places(image: Tensor, size: Sequence[int], window: Sequence[int]) -> None:
    for name, sizes in (("image", image.shape[1:]), ("size", size)):
        if not all(1 <= length < MAX_SIZE for length in sizes):
            raise ValueError(f"{name}: expected a height and width of 1 to {MAX_SIZE - 1}, got {tuple(sizes)}")
    for start, count, length in zip(window[:2], window[2:], size, strict=True):
        if not (start >= 0 and count >= 1 and start + count <= length):
            raise ValueError(f"window: expected a window inside the resized image {tuple(size)}, got {tuple(window)}")


def _integers(given: Sequence[int], name: str, expected: str, count: int) -> tuple[int, ...]:
    try:
        integers = tuple(given)
        if not torch.compiler.is_compiling():
            integers = tuple(map(operator.index, integers))
    except TypeError:
        raise TypeError(f"{name}: expected integers {expected}, got {given!r}") from None
    if len(integers) != count:
        raise ValueError(f"{name}: expected {expected}, got {given!r}")
    return integers


def _checked_steps(steps: Sequence[tuple[str, float]]) -> tuple[list[int], list[float]]:
    kinds, values = [], []
    for step in steps:
        if not isinstance(step, (tuple, list)) or len(step) != 2:
            raise TypeError(f"steps: expected pairs of name and value, got {step!r}")
        name, value = step
        if name not in STEPS:
            raise ValueError(f"steps: expected {', '.join(STEPS)}; got {name!r}")
        low, high = STEPS[name]
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if math.isnan(value) or not low <= value <= high:
            raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")
        if name == "hue" and value != int(value):
            raise ValueError(f"hue: expected whole steps of two degrees, got {value}")
        kinds.append(list(STEPS).index(name))
        values.append(float(value))
    return kinds, values


def _checked_moments(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[list[float], list[float]]:
    if mean is None and std is None:
        return [], []
    if mean is None or std is None or len(mean) != 3 or len(std) != 3 or not all(deviation > 0 for deviation in std):
        raise ValueError(f"mean, std: expected three numbers each, std positive, got {mean!r} and {std!r}")
    return [float(number) for number in mean], [float(number) for number in std]
