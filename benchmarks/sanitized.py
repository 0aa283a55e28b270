"""Every GPU kernel once, forward and backward, on maps so small that compute-sanitizer gets through: what it watches.

    compute-sanitizer --tool=memcheck python -m benchmarks.sanitized

Results are checked as in the benchmarks. Kernels that cannot be run here are named, with the reason.
"""

from collections.abc import Callable, Iterator

from cases import ContextCase, MapCase
from upsample_cases import UpsampleCase

from apc_kernels import dispatch
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
    yield "adaptive_context", lambda: adaptive_context_norm.functions(CONTEXT, layout, modules, backend)
    for task in upsample.TASKS:
        yield task.partition(",")[0], lambda task=task: upsample.functions(LOGITS, layout, task, backend)


def main() -> None:
    for backend in BACKENDS:
        for name, layout in LAYOUTS.items():
            for operation, call in calls(layout, backend):
                reason = dispatch.why_not(backend, operation, DEVICE, DTYPE)
                if reason is None:
                    call()
                outcome = "as it should be" if reason is None else f"not run: {reason}"
                print(f"{operation}, {name}, {backend}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
