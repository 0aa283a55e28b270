"""Where and in what numbers benchmarks run, and how they print what they found.

On a GPU in bfloat16, on a CPU in float32. APC_REHEARSAL=1 runs the GPU's benchmarks on a CPU, to find out whether they
run at all: tiny maps, float16, Triton's interpreter (TRITON_INTERPRET=1 goes with it), graphs that are not compiled.
"""

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest
import torch
from cases import channels_last, nchw

import apc_kernels
from apc_kernels import info

Anything = TypeVar("Anything")

REHEARSAL = os.environ.get("APC_REHEARSAL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not REHEARSAL else "cpu"
ON_GPU = DEVICE == "cuda" or REHEARSAL  # what is measured on a GPU is measured
DTYPE = torch.float16 if REHEARSAL else torch.bfloat16 if ON_GPU else torch.float32
USUAL = channels_last if ON_GPU else nchw  # what operations are fastest in
LAYOUTS = {layout.__name__: layout for layout in ((channels_last,) if REHEARSAL else (nchw, channels_last))}
DIRECTIONS = ("forward", "forward+backward")
COMPILED = (False, True) if ON_GPU else (False,)  # PyTorch's side, in torch.compile as well
SECONDS = 0.0 if REHEARSAL else 0.5 if ON_GPU else 2.0  # that a pair is timed for, if it can be in so many
MODE = "max-autotune-no-cudagraphs"  # of torch.compile; launches are queued ahead anyway (timing.py)

where_compiled = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: torch.compile is measured there")
long = pytest.mark.slow  # left out where not asked for (see conftest.py)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
usual_layout_first = pytest.mark.parametrize(  # the other one takes long
    "layout", [pytest.param(each, marks=() if each is USUAL else long, id=name) for name, each in LAYOUTS.items()]
)
directions = pytest.mark.parametrize("direction", DIRECTIONS)
compiled = pytest.mark.parametrize("compiled", COMPILED, ids=("eager", "compile")[: len(COMPILED)])


def here(cpu: Anything, gpu: Anything, rehearsal: Anything) -> Anything:
    """The one of three that belongs to where this runs."""
    return rehearsal if REHEARSAL else gpu if ON_GPU else cpu


def backends(*of_gpu: str):
    """Parametrises by what serves an operation here: of a GPU's backends the interpreter runs one."""
    return pytest.mark.parametrize("backend", here(("cpp",), of_gpu, ("triton",)))


def best(operation: str) -> str:
    """The backend that serves an operation here where none is asked for; in a rehearsal the interpreter."""
    return "triton" if REHEARSAL else info.explain(operation, DEVICE, DTYPE)[0]


def on(backend: str, function: Callable) -> Callable:
    """The function with a backend forced: around all of it, for a backward pass asks again."""

    def run():
        with apc_kernels.backend(backend):
            return function()

    return run


def need(backend: str, operation: str) -> None:
    """Skips a benchmark whose backend is not there, with the reason."""
    if reason := info.why_not(backend, operation, DEVICE, DTYPE):
        pytest.skip(f"needs {backend}: {reason}")


def record(benchmark, row: dict, ours: Callable) -> None:
    """Hands a row to pytest-benchmark, which has to call something as well."""
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=1)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_anew(function: Callable, mode: str | None = MODE) -> Callable:
    """torch.compile for the sizes at hand, as if nothing had been compiled before.

    Dynamo keeps graphs by code: the second size would get one for sizes of all kinds, and after the eighth it would
    run eagerly and say nothing. That is an error.

    Args:
        mode: as good as it gets, for operations; on a whole model the search would take minutes (None).
    """
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    how = {"backend": "eager"} if REHEARSAL else {"mode": mode}
    return torch.compile(function, dynamic=False, **how)


def place() -> str:
    return info.gpu() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"


def print_rows(title: str, rows: Iterable[dict]) -> None:
    """Rows of results as they come, each with what it was measured beside."""
    print(f"{title}, {name_of(DTYPE)}, {place()}\n")
    print(f"{'':<96}{'ours ms':>10}{'other ms':>10}{'times':>7}{'ours MiB':>10}{'other MiB':>11}")
    for row in rows:
        name = f"{row['operation']}, {row['case']} | {row['other']}"
        line = f"{name:<96}{row['ours_ms']:>10.2f}{row['other_ms']:>10.2f}{row['ratio']:>7.1f}"
        if "memory_mib" in row:
            line += f"{row['memory_mib']:>10.1f}{row['other_memory_mib']:>11.1f}"
        print(line, flush=True)
