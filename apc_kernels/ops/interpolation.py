"""Computes bilinear interpolation along one axis in exact integers, as torch.nn.functional.interpolate defines it.

Output position d reads the source at n / denominator, n = max(0, d·step + start). The quotient is the index of the
first of two elements, remainder / denominator the weight of the second. At the last element both are the same.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apc_kernels.ops.common import working_dtype

MAX_SIZE = 2**30  # largest length of an axis, in source or result


class Mapping(NamedTuple):
    """Maps positions of an output axis to positions of a source axis."""

    step: int
    start: int
    denominator: int


def mapping(source: int, size: int, align_corners: bool) -> Mapping:
    if align_corners:
        return Mapping(source - 1 if size > 1 else 0, 0, max(size - 1, 1))
    return Mapping(2 * source, source - size, 2 * size)


def matrix(source: int, size: int, align_corners: bool, like: Tensor) -> Tensor:
    """Returns the (size, source) matrix that interpolates an axis, in float32 (float64 if `like` is float64)."""
    step, start, denominator = mapping(source, size, align_corners)
    position = (torch.arange(size, device=like.device) * step + start).clamp(min=0)[:, None]
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        position = position.double()  # as exact; Inductor of PyTorch 2.13 fails on the division of integers in a cat
    index = position // denominator
    rest = position - index * denominator  # not %: ONNX has none by a symbolic size
    column = torch.arange(source, device=like.device)
    own = (column == index) * (denominator - rest)
    following = (column == (index + 1).clamp(max=source - 1)) * rest
    return (own + following).to(working_dtype(like)) / denominator


def as_size(size: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = size
        if not torch.compiler.is_compiling():
            height, width = operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise TypeError(f"size: expected two integers (H, W), got {size!r}") from None
    return height, width


def check_extent(size: Sequence[int], name: str, given: Sequence[int]) -> None:
    if not (len(size) == 2 and 1 <= size[0] < MAX_SIZE and 1 <= size[1] < MAX_SIZE):
        raise ValueError(f"{name}: expected a height and width of 1 to {MAX_SIZE - 1}, got {tuple(given)}")
