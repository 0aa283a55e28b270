"""Measures operations, heads and whole models; prints rows as they come.

    python -m benchmarks.run                       what is telling, twenty minutes; --all: all sizes, layouts, scaling
    python -m benchmarks.run pyramid_pool model    some of it
    make bench                                     the same into a file of results, and the reports made from it

pytest does the work, and takes its own options here as well. Results are checked before they are timed: no figure
stands behind a wrong one.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

import apc_kernels
from apc_kernels import dispatch
from benchmarks import ROOT, heads, models, setting
from benchmarks.memory import kept, peak_here, peaks
from benchmarks.operation import BOTH, Call, Operation, Point, Sides
from benchmarks.operations import OPERATIONS as TABLE
from benchmarks.setting import COMPILED, DEVICE, DTYPE, LAYOUTS, ON_GPU, USUAL, here, name_of
from benchmarks.timing import paired, rates

OPERATIONS = TABLE | {entry.name: entry for entry in (*heads.ENTRIES, models.ENTRY)}


@dataclass(frozen=True)
class Row:
    """What is measured, and beside what; of scaling, what it is a point of."""

    operation: Operation
    case: Any
    layout: str
    direction: str
    backend: str
    other: str
    point: Point | None = None

    def __str__(self) -> str:
        operation, point = self.operation, self.point
        scaled, threads = "", ""
        if point is not None:
            scaled = f"scaling by {point.axis}"
            threads = f"{point.value} threads" if point.axis == "threads" else ""
        layout, dtype = self.layout * operation.by_layout, name_of(operation.dtype) if operation.dtype else ""
        return ", ".join(filter(None, (scaled, self.direction, operation.title(self.case), layout, dtype, threads)))

    @property
    def backward(self) -> bool:
        return self.direction in (BOTH, "training step")

    @contextlib.contextmanager
    def threads(self) -> Iterator[None]:
        """As many threads as are asked for, if any are."""
        before, point = torch.get_num_threads(), self.point
        wanted = point.value if point and point.axis == "threads" else self.operation.threads
        torch.set_num_threads(wanted or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def rows(operation: Operation) -> Iterator[tuple[Row, bool]]:
    """All rows of an operation, and whether each takes long."""
    for case, ours, other, long in operation.pairs:
        yield Row(operation, case, USUAL.__name__, "", ours, other), long
    if operation.pairs:
        return
    first, *_ = operation.others
    backends, best = [operation.backend], operation.backend
    if operation.kernel:
        backends, best = here(["cpp"], operation.gpu_backends, ["triton"]), setting.best(operation.kernel)
    layouts = LAYOUTS if operation.by_layout else [USUAL.__name__]
    for case in operation.cases:
        for layout in layouts:
            for direction in operation.directions:
                long = not operation.telling(case, layout, direction)
                for other in operation.others:
                    for backend in backends:
                        yield Row(operation, case, layout, direction, backend, other), long
                if ON_GPU and operation.compiled and LAYOUTS[layout] is USUAL:
                    long = long or case is not operation.cases[0]  # the compiler takes its time
                    yield Row(operation, case, layout, direction, best, first + COMPILED), long
    for point in operation.scaling:
        last = operation.directions[-1]
        yield Row(operation, point.case, USUAL.__name__, last, best, first, point), True


def ready(row: Row, case: Any, side: str, wide: bool = False) -> tuple[Call, dict]:
    """A call of a side, a backend or another's name, and what it is given: in float64 if `wide`."""
    operation = row.operation
    tensors = operation.draw(case, LAYOUTS[row.layout])
    if wide:
        floats = {name: t.double() for name, t in tensors.items() if torch.is_tensor(t) and t.is_floating_point()}
        tensors |= floats
    name = side.removesuffix(COMPILED)
    function = operation.others.get(name, operation.ours)
    if name != side:
        function = operation.compile(function)
    call = operation.ready(function, case, tensors, row.backward)
    forced = operation.kernel and name not in operation.others
    return (on(side, call) if forced else call), tensors


def on(backend: str, call: Call) -> Call:
    """The call with a backend forced: around all of it, for a backward pass asks again."""

    def run() -> Sequence[Tensor]:
        with apc_kernels.backend(backend):
            return call()

    return run


def sides(row: Row) -> tuple[Sides, dict]:
    """Calls that have been checked, and what ours is given."""
    first, *_ = row.operation.others
    ours, tensors = ready(row, row.case, row.backend)
    others = (ready(row, row.case, side)[0] for side in (row.other, first))
    found = Sides(ours, *others, ready(row, row.case, first, wide=True)[0])
    row.operation.check(row.case, tensors, found)
    return found, tensors


def measure(row: Row) -> tuple[dict, Call]:
    """The row of a results file, and our call."""
    operation, point = row.operation, row.point
    found = {"operation": operation.name, "case": str(row), "other": row.other, "backend": row.backend}
    if point is not None:
        found |= {"scaling": point.axis, "value": point.value}
    elif operation.memory:
        given = operation.name, str(row.case), row.layout, row.direction
        found |= peaks(peak_of, *given, ours=row.backend, other=row.other)
        if operation.kept and row.backward:
            found |= {"kept_mib": kept_by(row, row.backend), "other_kept_mib": kept_by(row, row.other)}
    calls, tensors = sides(row)
    pair = paired(calls.ours, calls.theirs, rounds=operation.rounds, clock=operation.clock)
    if operation.images is not None:
        times = {"images_per_s": pair.ours, "other_images_per_s": pair.other}
        found |= {name: operation.images(row.case) / median(seconds) for name, seconds in times.items()}
    dtype = getattr(row.case, "dtype", operation.dtype) or DTYPE
    counts = operation.counts(row.case, tensors, row.backward)
    return found | pair.row() | rates(median(pair.ours), *counts, dtype), calls.ours


def peak_of(operation: str, case: str, layout: str, direction: str, side: str) -> int:
    """Bytes at the peak of a call, after a smaller one; what is compiled is compiled for one case alone."""
    entry = OPERATIONS[operation]
    case = next(each for each in entry.cases if str(each) == case)
    row = Row(entry, case, layout, direction, side, side)
    call, _ = ready(row, case, side)
    first = call if side.endswith(COMPILED) else ready(row, entry.small, side)[0]
    first()
    return peak_here(call)


def kept_by(row: Row, side: str) -> float:
    """MiB, parameters and arguments aside."""
    call, tensors = ready(row, row.case, side)
    return kept(call, {t.untyped_storage().data_ptr() for t in tensors.values()}) / 2**20


def _parameters() -> Iterator:
    for name, operation in OPERATIONS.items():
        if operation.on_gpu or not ON_GPU:
            for row, long in rows(operation):
                identity = f"{name}, {row}, {row.backend} beside {row.other}"
                yield pytest.param(row, marks=pytest.mark.slow if long else (), id=identity)


@pytest.mark.parametrize("row", list(_parameters()))
def bench_operations(benchmark, row):
    kernel = row.operation.kernel
    if kernel and (reason := dispatch.why_not(row.backend, kernel, DEVICE, DTYPE)):
        pytest.skip(f"needs {row.backend}: {reason}")
    with row.threads():
        found, ours = measure(row)
        benchmark.extra_info.update(found)
        benchmark.pedantic(ours, rounds=1)  # pytest-benchmark has to call something as well


def main() -> int:
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if unknown := set(names) - set(OPERATIONS):
        sys.exit(f"expected some of {', '.join(OPERATIONS)}; got {', '.join(sorted(unknown))}")
    only = [f"--only={name}" for name in names]
    options = ["-q", "-o", "python_functions=bench_*", "--benchmark-quiet", *only, *sys.argv[1 + len(names) :]]
    return pytest.main([str(ROOT / "benchmarks" / "run.py"), *options])


if __name__ == "__main__":
    sys.exit(main())
