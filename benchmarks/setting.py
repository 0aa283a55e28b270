"""Where and in what numbers benchmarks run.

On a GPU in bfloat16, on a CPU in float32. APC_REHEARSAL=1 runs the GPU's benchmarks on a CPU, to find out whether they
run at all: tiny maps, float16, Triton's interpreter (TRITON_INTERPRET=1 goes with it), graphs that are not compiled.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from cases import channels_last, nchw

from apc_kernels import dispatch

Anything = TypeVar("Anything")

REHEARSAL = os.environ.get("APC_REHEARSAL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not REHEARSAL else "cpu"
ON_GPU = DEVICE == "cuda" or REHEARSAL  # what is measured on a GPU is measured
DTYPE = torch.float16 if REHEARSAL else torch.bfloat16 if ON_GPU else torch.float32
USUAL = channels_last if ON_GPU else nchw  # what operations are fastest in
LAYOUTS = {layout.__name__: layout for layout in ((channels_last,) if REHEARSAL else (nchw, channels_last))}
SECONDS = 0.0 if REHEARSAL else 0.5 if ON_GPU else 2.0  # that a pair is timed for, if it can be in so many
MODE = "max-autotune-no-cudagraphs"  # of torch.compile; launches are queued ahead anyway (timing.py)
COMPILED = ", torch.compile"  # ends the name of a side


def here(cpu: Anything, gpu: Anything, rehearsal: Anything) -> Anything:
    """The one of three that belongs to where this runs."""
    return rehearsal if REHEARSAL else gpu if ON_GPU else cpu


def best(operation: str) -> str:
    """The backend that serves an operation here where none is asked for; in a rehearsal the interpreter."""
    return "triton" if REHEARSAL else dispatch.explain(operation, DEVICE, DTYPE)[0]


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
