"""Measures operations, heads and whole models, and prints each row when it is measured.

    python -m benchmarks.run                       the main rows, in twenty minutes; --all: all sizes, layouts, scaling
    python -m benchmarks.run pyramid_pool model    only these operations
    make bench                                     the main rows into a file of results, and the reports from it

pytest does the work, and its options work here as well. Results are checked before they are timed, so that no figure
comes from a wrong result.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from kept import kept_bytes
from torch import Tensor

import apc_kernels
from apc_kernels import info
from benchmarks import ROOT, heads, models
from benchmarks.memory import peak_here, peaks
from benchmarks.operation import BOTH, Call, Operation, Point, Sides
from benchmarks.operations import OPERATIONS as TABLE
from benchmarks.setting import COMPILED, DEVICE, DTYPE, FASTEST_LAYOUT, LAYOUTS, ON_GPU, REHEARSAL, here, name_of
from benchmarks.timing import paired, rates

BACKENDS = here(["cpp"], ["cuda", "triton"])
OPERATIONS = TABLE | {entry.name: entry for entry in (*heads.ENTRIES, models.ENTRY)}


@dataclass(frozen=True)
class Row:
    """Describes a measurement: our side, the other side, and the point of scaling if it is one."""

    operation: Operation
    case: Any
    layout: str
    direction: str
    backend: str
    other: str
    point: Point | None = None

    def __str__(self) -> str:
        operation, point = self.operation, self.point
        scaled = f"scaling by {point.axis}" if point else ""
        threads = f"{point.value} threads" if point and point.axis == "threads" else ""
        layout, dtype = self.layout * operation.by_layout, name_of(operation.dtype) if operation.dtype else ""
        return ", ".join(filter(None, (scaled, self.direction, operation.title(self.case), layout, dtype, threads)))

    @property
    def named(self) -> dict[str, str]:
        """Returns the columns that identify its row in a file of results."""
        return {"operation": self.operation.name, "case": str(self), "other": self.other, "backend": self.backend}

    def joined(self) -> str:
        return ", ".join(self.named.values())

    @property
    def backward(self) -> bool:
        return self.direction in (BOTH, "training step")

    @property
    def threads(self) -> int:
        """Returns the number of threads to measure with: the point's, the operation's, or the current one."""
        if self.point is not None and self.point.axis == "threads":
            return self.point.value
        return self.operation.threads or torch.get_num_threads()


def rows(operation: Operation) -> Iterator[tuple[Row, bool]]:
    """Yields all rows of an operation, each with True if it takes long."""
    for case, ours, other, long in operation.pairs:
        yield Row(operation, case, FASTEST_LAYOUT.__name__, "", ours, other), long
    if operation.pairs:
        return
    first, *_ = operation.others
    backends, best = [operation.backend], operation.backend
    if operation.kernel:
        # torch.compile is compared with the default backend; in a rehearsal with Triton's interpreter.
        backends, (best, *_) = BACKENDS, info.explain(operation.kernel, DEVICE, DTYPE)
        best = "triton" if REHEARSAL else best
    layouts = LAYOUTS if operation.by_layout else [FASTEST_LAYOUT.__name__]
    for case in operation.cases:
        for layout in layouts:
            for direction in operation.directions:
                long = not operation.by_default(case, layout, direction)
                for other in operation.others:
                    for backend in backends:
                        yield Row(operation, case, layout, direction, backend, other), long
                if ON_GPU and operation.compiled and LAYOUTS[layout] is FASTEST_LAYOUT:
                    long = long or case is not operation.cases[0]  # the compiler takes its time
                    yield Row(operation, case, layout, direction, best, first + COMPILED), long
    for point in operation.scaling:
        last = operation.directions[-1]
        yield Row(operation, point.case, FASTEST_LAYOUT.__name__, last, best, first, point), True


def ready(row: Row, case: Any, side: str, wide: bool = False) -> tuple[Call, dict]:
    """Makes a call of a side (a backend, or the name of another side) and its arguments, in float64 if `wide`."""
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
    """Forces a backend around a whole call, because the backward pass chooses one again."""

    def run() -> Sequence[Tensor]:
        with apc_kernels.backend(backend):
            return call()

    return run


def sides(row: Row) -> tuple[Sides, dict]:
    """Makes the calls of all sides, checks our results, and returns the calls and our arguments."""
    first, *_ = row.operation.others
    ours, tensors = ready(row, row.case, row.backend)
    theirs, stock = (ready(row, row.case, side)[0] for side in (row.other, first))
    found = Sides(ours, theirs, stock, ready(row, row.case, first, wide=True)[0])
    row.operation.check(row.case, tensors, found)
    return found, tensors


def measure(row: Row) -> tuple[dict, Call]:
    """Measures a row of a results file, and returns it with our call."""
    operation, point, found = row.operation, row.point, row.named
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
    """Returns the bytes at the peak of a call, after a smaller call; a compiled one is called for one case alone."""
    entry = OPERATIONS[operation]
    case = next(each for each in entry.cases if str(each) == case)
    row = Row(entry, case, layout, direction, side, side)
    call, _ = ready(row, case, side)
    first = call if side.endswith(COMPILED) else ready(row, entry.small, side)[0]
    first()
    return peak_here(call)


def kept_by(row: Row, side: str) -> float:
    """Returns the MiB that the forward pass keeps for the backward one, without parameters and arguments."""
    call, tensors = ready(row, row.case, side)
    return kept_bytes(call, tensors.values()) / 2**20


HERE = [entry for entry in OPERATIONS.values() if entry.on_gpu or not ON_GPU]
ROWS = [pytest.param(row, marks=[pytest.mark.slow] * long) for entry in HERE for row, long in rows(entry)]
SMALL = [
    Row(entry, entry.small, layout, direction, backend, next(iter(entry.others)))
    for backend, layout, entry in itertools.product(BACKENDS, LAYOUTS, HERE)
    if entry.kernel
    for direction in entry.directions
]


def skip_where_missing(row: Row) -> None:
    kernel = row.operation.kernel
    if kernel and (reason := info.why_not(row.backend, kernel, DEVICE, DTYPE)):
        pytest.skip(f"needs {row.backend}: {reason}")


@pytest.mark.parametrize("row", SMALL, ids=Row.joined)
def check_kernels(row):
    """Runs every kernel once, on maps small enough for compute-sanitizer, under which gpu.py runs this."""
    skip_where_missing(row)
    sides(row)


@pytest.mark.parametrize("row", ROWS, ids=Row.joined)
def bench_operations(benchmark, row):
    skip_where_missing(row)
    before = torch.get_num_threads()
    torch.set_num_threads(row.threads)
    try:
        found, ours = measure(row)
        benchmark.extra_info.update(found)
        benchmark.pedantic(ours, rounds=1)  # pytest-benchmark requires a call
    finally:
        torch.set_num_threads(before)


def main() -> int:
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if unknown := set(names) - set(OPERATIONS):
        sys.exit(f"NAME: expected some of {', '.join(OPERATIONS)}; got {', '.join(sorted(unknown))}")
    only = [f"--only={name}" for name in names]
    options = ["-q", "-o", "python_functions=bench_*", "--benchmark-quiet", *only, *sys.argv[1 + len(names) :]]
    return pytest.main([str(ROOT / "benchmarks" / "run.py"), *options])


if __name__ == "__main__":
    sys.exit(main())
