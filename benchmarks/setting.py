"""Where and in what numbers benchmarks run.

On a GPU in bfloat16, on a CPU in float32. APC_REHEARSAL=1 runs the GPU's benchmarks on a CPU, to find out whether they
run at all: tiny maps, float16, Triton's interpreter (TRITON_INTERPRET=1 goes with it), graphs that are not compiled.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from cases import channels_last, nchw

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


def here(cpu: Anything, gpu: Anything) -> Anything:
    """The one of two that belongs to where this runs."""
    return gpu if ON_GPU else cpu


# Along which a case is scaled, one at a time:
BATCHES = here((1, 2, 4, 8), (1, 4, 8, 16))
SIDES = here((32, 64, 96, 128), (32, 64, 128))
CHANNELS = (128, 256, 512, 1024)
COUNTS = (1, 2, 3, 4)  # of scales
THREADS = () if ON_GPU else tuple(2**i for i in range((os.cpu_count() or 1).bit_length()))  # up to the cores there are


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
