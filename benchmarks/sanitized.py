"""Every GPU kernel once, forward and backward, on maps so small that compute-sanitizer gets through: what it watches.

    compute-sanitizer --tool=memcheck python -m benchmarks.sanitized

Results are checked as in the benchmarks. Kernels that cannot be run here are named, with the reason, and those that
fail: the others are run all the same.
"""

import sys
from collections.abc import Callable, Iterator

from cases import ContextCase, MapCase
from upsample_cases import UpsampleCase

from apc_kernels import info
from benchmarks import adaptive_context, adaptive_context_norm, affinity_moments, pyramid_pool, upsample
from benchmarks.setting import DEVICE, DTYPE, LAYOUTS, here

BACKENDS = here((), ("cuda", "triton"), ("triton",))
BOTH = "forward+backward"
MAP, CONTEXT, LOGITS = MapCase((1, 6, 9, 7)), ContextCase(2, 16, (5, 7)), UpsampleCase(1, 5, (4, 5), (9, 12))


def calls(layout, backend: str) -> Iterator[tuple[str, Callable]]:
    """Operations, and what runs and checks them."""
    yield "pyramid_pool", lambda: pyramid_pool.functions(MAP, layout, BOTH, backend)
    yield "adaptive_context", lambda: adaptive_context.functions(CONTEXT, layout, BOTH, backend)
    yield "affinity_moments", lambda: affinity_moments.functions(CONTEXT, layout, BOTH, backend)
    modules = adaptive_context_norm.MODULES
    yield "adaptive_context_norm", lambda: adaptive_context_norm.functions(CONTEXT, layout, modules, backend)
    for task in upsample.TASKS:
        yield task.partition(",")[0], lambda task=task: upsample.functions(LOGITS, layout, task, backend)


def outcome(operation: str, call: Callable, backend: str) -> str:
    kernel = "adaptive_context" if operation == "adaptive_context_norm" else operation  # which it is built on
    if reason := info.why_not(backend, kernel, DEVICE, DTYPE):
        return f"not run: {reason}"
    try:
        call()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "as it should be"


def main() -> int:
    outcomes = []
    for backend in BACKENDS:
        for name, layout in LAYOUTS.items():
            for operation, call in calls(layout, backend):
                outcomes.append(outcome(operation, call, backend))
                print(f"{operation}, {name}, {backend}: {outcomes[-1]}", flush=True)
    return int(any(found.startswith("FAILED") for found in outcomes))


if __name__ == "__main__":
    sys.exit(main())
