"""Measures the operations of the table and the heads; models.py, whole models. Rows are printed as they come.

    python -m benchmarks.run                       what is telling, twenty minutes; --all: all sizes, layouts, scaling
    python -m benchmarks.run pyramid_pool models   some of it
    make bench                                     the same into a file of results, and the reports made from it

pytest does the work, and takes its own options here as well. Results are checked before they are timed: no figure
stands behind a wrong one.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from apc_kernels import dispatch
from benchmarks import ROOT, heads, setting
from benchmarks.memory import kept, peak_here, peaks
from benchmarks.operation import BOTH, STEP, Call, Operation, Point, Sides
from benchmarks.operations import OPERATIONS as TABLE
from benchmarks.setting import COMPILED, DEVICE, DTYPE, LAYOUTS, ON_GPU, USUAL, here, name_of
from benchmarks.timing import paired, result_row

FILES = ("run", "models")
OPERATIONS = TABLE | {entry.name: entry for entry in heads.ENTRIES}


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
        return self.direction in (BOTH, STEP)

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
    function = operation.others.get(side.removesuffix(COMPILED))
    if function is None:
        call = operation.ready(operation.ours, case, tensors, row.backward)
        return (setting.on(side, call) if operation.kernel else call), tensors
    if side.endswith(COMPILED):
        function = setting.compile_anew(function)
    return operation.ready(function, case, tensors, row.backward), tensors


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
    operation, more = row.operation, {}
    if row.point is not None:
        more = {"scaling": row.point.axis, "value": row.point.value}
    elif operation.memory:
        given = operation.name, str(row.case), row.layout, row.direction
        more = peaks(peak_of, *given, ours=row.backend, other=row.other)
        if operation.kept and row.backward:
            more |= {"kept_mib": kept_by(row, row.backend), "other_kept_mib": kept_by(row, row.other)}
    found, tensors = sides(row)
    pair = paired(found.ours, found.theirs, rounds=operation.rounds, clock=operation.clock)
    counts, about = operation.counts(row.case, tensors, row.backward), (row.backend, row.other)
    dtype = operation.dtype or DTYPE
    return result_row(operation.name, str(row), *about, pair, *counts, dtype=dtype, **more), found.ours


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
                yield pytest.param(row, marks=setting.long if long else (), id=identity)


@pytest.mark.parametrize("row", list(_parameters()))
def bench_operations(benchmark, row):
    kernel = row.operation.kernel
    if kernel and (reason := dispatch.why_not(row.backend, kernel, DEVICE, DTYPE)):
        pytest.skip(f"needs {row.backend}: {reason}")
    with row.threads():
        setting.record(benchmark, *measure(row))


def main() -> int:
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if unknown := set(names) - {*OPERATIONS, *FILES}:
        sys.exit(f"expected {', '.join((*OPERATIONS, *FILES))}; got {', '.join(sorted(unknown))}")
    files = [name for name in FILES if not names or name in names or (name == "run" and OPERATIONS.keys() & names)]
    options = ["-q", "-o", "python_functions=bench_*", "--benchmark-quiet", *(f"--only={name}" for name in names)]
    return pytest.main(
        [*(str(ROOT / "benchmarks" / f"{name}.py") for name in files), *options, *sys.argv[1 + len(names) :]]
    )


if __name__ == "__main__":
    sys.exit(main())
