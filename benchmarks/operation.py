"""What an entry of the table of operations is (operations.py), and what most entries are made with."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accuracy import assert_accurate
from torch import Tensor

from benchmarks.setting import DTYPE, compile_anew

FORWARD, BOTH = "forward", "forward+backward"
SCALES = (1, 2, 3, 6)

Tensors = dict[str, Tensor]
Call = Callable[[], Sequence[Tensor]]


class Point(NamedTuple):
    """A case, and the one thing in which it differs from the others of its axis."""

    axis: str
    value: int
    case: Any


class Sides(NamedTuple):
    """Calls on the same numbers: ours, the other that is timed, the first of the others, and that one in float64."""

    ours: Call
    theirs: Call
    stock: Call
    exact: Call


def accurate(case: Any, t: Tensors, sides: Sides) -> None:
    """Raises where the tests' rule does not hold."""
    for i, found in enumerate(zip(sides.ours(), sides.exact(), sides.stock(), strict=True)):
        assert_accurate(*(tensor.detach() for tensor in found), f"{case}, result {i}")


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An entry of the table."""

    name: str
    cases: Sequence[Any]  # the most telling one first
    small: Any  # a case that is soon through, for what has only to be run
    draw: Callable[[Any, Callable], Tensors]  # the arguments of a case in a layout, the same numbers every time
    ready: Callable[[Callable, Any, Tensors, bool], Call]  # a call of a function in a case, with its backward pass?
    ours: Callable
    others: dict[str, Callable]  # what stands beside it, by name; results are checked by the first
    counts: Callable[[Any, Tensors, bool], tuple[int, int]]  # bytes and operations, with the backward pass?
    check: Callable[[Any, Tensors, Sides], None] = accurate
    directions: Sequence[str] = (FORWARD, BOTH)
    kernel: str = ""  # whose backends serve it; where there are none it is what `backend` says
    backend: str = "PyTorch"
    gpu_backends: Sequence[str] = ("cuda", "triton")
    on_gpu: bool = True  # whether a GPU has anything to do with it
    by_layout: bool = True
    compiled: bool = True  # whether a GPU measures it beside torch.compile too
    compile: Callable[[Callable], Callable] = compile_anew
    pairs: Sequence[tuple[Any, str, str, bool]] = ()  # case, ours, other, takes long? In the place of all combinations
    images: Callable[[Any], int] | None = None  # of a call, where images are counted by the second
    dtype: torch.dtype | None = DTYPE
    title: Callable[[Any], str] = str  # of a case, in rows
    scaling: Sequence[Point] = ()  # measured forward and backward
    telling: Callable[[Any, str, str], bool] = lambda case, layout, direction: True  # measured without being asked for
    memory: bool = True
    kept: bool = False  # whether to say what the forward pass keeps for the backward one
    rounds: int = 7
    threads: int | None = None
    clock: Callable[[], float] = time.perf_counter


def calls(apply: Callable, *names: str) -> Callable[[Callable, Any, Tensors, bool], Call]:
    """An operation's `ready`, from apply(function, case, tensors, *leaves).

    A call gives the results, or the gradients of the leaves: of these names, or of all tensors but `grad`.
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
    """A case with one field changed at a time; sizes are squares, scales the first few of SCALES."""

    def changed(axis: str, value: int) -> Any:
        if axis == "threads":
            return case
        return replace(case, **{axis: {"size": (value, value), "scales": SCALES[:value]}.get(axis, value)})

    return [Point(axis, value, changed(axis, value)) for axis, values in axes.items() for value in values]
