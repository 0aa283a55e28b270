"""How times go with batch, size of the map, channels, classes, scales and threads: one of them changed at a time.

A benchmark that scales has `bench_scaling`, parametrised by points; their rows go by a case of their own and have two
more columns, the axis and the value on it, which the report draws curves from. They take long (see conftest.py).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from benchmarks.setting import ON_GPU, here, long

SCALES = (1, 2, 3, 6)
BATCHES = here((1, 2, 4, 8), (1, 4, 8, 16), (2,))
SIDES = here((32, 64, 96, 128), (32, 64, 128), ())
CHANNELS = here((128, 256, 512, 1024), (128, 256, 512, 1024), ())
COUNTS = here((1, 2, 3, 4), (1, 2, 3, 4), ())  # of scales
THREADS = () if ON_GPU else tuple(2**i for i in range((os.cpu_count() or 1).bit_length()))  # up to the cores there are


@dataclass(frozen=True)
class Point:
    """A case, and the one thing in which it differs from the others of its axis."""

    axis: str
    value: int
    case: Any

    def __str__(self) -> str:
        return f"{self.axis}-{self.value}"

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """As many threads as the axis says, if it is about threads."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.value if self.axis == "threads" else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def row(self, row: dict) -> dict:
        name = f"scaling by {self.axis}, {row['case']}" + (f", {self.value} threads" * (self.axis == "threads"))
        return {**row, "case": name, "scaling": self.axis, "value": self.value}


def points(case: Any, **axes: Iterable[int]) -> list[Point]:
    """A case with one field changed at a time; sizes are squares, scales the first few of SCALES."""
    return [Point(axis, value, _changed(case, axis, value)) for axis, values in axes.items() for value in values]


def scaled(points: list[Point]):
    """Marks bench_scaling."""
    return lambda bench: long(pytest.mark.parametrize("point", points, ids=str)(bench))


def _changed(case: Any, axis: str, value: int) -> Any:
    if axis == "threads":
        return case
    changes = {"size": (value, value), "scales": SCALES[:value]}
    return replace(case, **{axis: changes.get(axis, value)})
