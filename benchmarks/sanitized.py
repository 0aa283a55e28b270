"""Every GPU kernel once, forward and backward, on maps so small that compute-sanitizer gets through: what it watches.

    compute-sanitizer --tool=memcheck python -m benchmarks.sanitized [OPERATION …]

Results are checked as in the benchmarks. Kernels that cannot be run here are named, with the reason, and those that
fail: the others are run all the same.
"""

import sys
from collections.abc import Iterator, Sequence

from apc_kernels import dispatch
from benchmarks.operations import OPERATIONS
from benchmarks.run import Row, sides
from benchmarks.setting import DEVICE, DTYPE, LAYOUTS, here

BACKENDS = here((), ("cuda", "triton"), ("triton",))


def calls(names: Sequence[str]) -> Iterator[Row]:
    """Of these operations, or of all."""
    for backend in BACKENDS:
        for layout in LAYOUTS:
            for entry in OPERATIONS.values():
                if entry.kernel and entry.on_gpu and (not names or entry.name in names):
                    for direction in entry.directions:
                        yield Row(entry, entry.small, layout, direction, backend, next(iter(entry.others)))


def outcome(row: Row) -> str:
    if reason := dispatch.why_not(row.backend, row.operation.kernel, DEVICE, DTYPE):
        return f"not run: {reason}"
    try:
        sides(row)
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "as it should be"


def main() -> int:
    outcomes = []
    for row in calls(sys.argv[1:]):
        outcomes.append(outcome(row))
        print(f"{row.operation.name}, {row}, {row.backend}: {outcomes[-1]}", flush=True)
    return int(any(found.startswith("FAILED") for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
