"""Defines an entry of the table of operations (operations.py), and helpers that most entries use."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accuracy import assert_accurate
from torch import Tensor

from benchmarks.setting import DTYPE, FASTEST_LAYOUT, LAYOUTS, compile_anew

FORWARD, BOTH = "forward", "forward+backward"
SCALES = (1, 2, 3, 6)

Tensors = dict[str, Tensor]
Call = Callable[[], Sequence[Tensor]]


class Point(NamedTuple):
    """Holds a case of a scaling axis, and its value on that axis."""

    axis: str
    value: int
    case: Any


class Sides(NamedTuple):
    """Holds calls on the same numbers: ours, the timed other side, the first other side, and that one in float64."""

    ours: Call
    theirs: Call
    stock: Call
    exact: Call


def accurate(case: Any, t: Tensors, sides: Sides) -> None:
    """Checks our results by the accuracy rule of the tests."""
    for i, found in enumerate(zip(sides.ours(), sides.exact(), sides.stock(), strict=True)):
        assert_accurate(*(tensor.detach() for tensor in found), f"{case}, result {i}")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Describes how to measure an operation: an entry of the table."""

    name: str
    cases: Sequence[Any]  # the most important one first
    small: Any  # a quick case, for runs that only check
    draw: Callable[[Any, Callable], Tensors]  # makes the arguments of a case in a layout, the same numbers every time
    ready: Callable[
        [Any, Any, Tensors, bool], Callable
    ]  # makes a call from a side, a case, tensors, and backward or not
    ours: Any  # our side, as `ready` takes it: usually a function
    others: dict[str, Any]  # the other sides by name; the first one checks the results
    counts: Callable[
        [Any, Tensors, bool], tuple[int, int]
    ]  # counts bytes and operations, with the backward pass or not
    check: Callable[[Any, Tensors, Sides], None] = accurate
    directions: Sequence[str] = (FORWARD, BOTH)
    kernel: str = ""  # the operation whose backends are measured; without one, `backend` names the only one
    backend: str = "PyTorch"
    on_gpu: bool = True  # False: it never runs on a GPU
    by_layout: bool = True
    compiled: bool = True  # on a GPU, measure it beside torch.compile too
    compile: Callable[[Any], Any] = compile_anew
    pairs: Sequence[tuple[Any, str, str, bool]] = ()  # case, ours, other, long or not; replaces all combinations
    images: Callable[[Any], int] | None = None  # the images of a call, to report images a second
    dtype: torch.dtype | None = DTYPE
    title: Callable[[Any], str] = str  # names a case in rows
    scaling: Sequence[Point] = ()  # measured forward and backward
    by_default: Callable[[Any, str, str], bool] = lambda case, layout, direction: True  # selects rows without --all
    memory: bool = True
    kept: bool = False  # report the memory that the forward pass keeps for the backward one
    rounds: int = 7
    threads: int | None = None
    clock: Callable[[], float] = time.perf_counter


def calls(apply: Callable, *names: str) -> Callable[[Callable, Any, Tensors, bool], Call]:
    """Makes an operation's `ready` from apply(function, case, tensors, *leaves).

    A call returns the results, or the gradients of the leaves: the tensors of these names, or all but `grad`.
    """

    def ready(function: Callable, case: Any, t: Tensors, backward: bool) -> Call:
        leaves = [t[name].detach().requires_grad_(backward) for name in names or t if name != "grad"]

        def run() -> Sequence[Tensor]:
            found = apply(function, case, t, *leaves)
            results = [found] if torch.is_tensor(found) else found
            if not backward:
                return results
            grads = [t["grad"]] if "grad" in t else [torch.ones_like(result) for result in results]
            return torch.autograd.grad(results, leaves, grads)

        return run

    return ready


def points(case: Any, **axes: Iterable[int]) -> list[Point]:
    """Varies a case along one axis at a time; sizes are squares, scales the first few of SCALES."""

    def changed(axis: str, value: int) -> Any:
        if axis == "threads":
            return case
        return replace(case, **{axis: {"size": (value, value), "scales": SCALES[:value]}.get(axis, value)})

    return [Point(axis, value, changed(axis, value)) for axis, values in axes.items() for value in values]


def fastest_only(case: Any, layout: str, direction: str) -> bool:
    """Selects the rows in the fastest layout: the `by_default` of an operation for which one layout is enough."""
    return LAYOUTS[layout] is FASTEST_LAYOUT


def rehearsed(operation: Operation) -> Operation:
    """Reduces an operation to its small case and one point of scaling."""
    scaling = [point._replace(case=operation.small) for point in operation.scaling[:1]]
    return replace(operation, cases=[operation.small], scaling=scaling)
