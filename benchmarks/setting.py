"""Chooses the device, the dtype and the sizes of all benchmarks: bfloat16 on a GPU, float32 on a CPU.

APC_REHEARSAL=1 runs the GPU's benchmarks on a CPU, to find out if they run at all: tiny maps, float16, Triton's
interpreter (set TRITON_INTERPRET=1 as well), and graphs that are not compiled.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from cases import channels_last, nchw

Anything = TypeVar("Anything")

REHEARSAL = os.environ.get("APC_REHEARSAL") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not REHEARSAL else "cpu"
ON_GPU = DEVICE == "cuda" or REHEARSAL  # a rehearsal measures the GPU's rows
DTYPE = torch.float16 if REHEARSAL else torch.bfloat16 if ON_GPU else torch.float32
FASTEST_LAYOUT = channels_last if ON_GPU else nchw  # the layout in which operations are fastest
LAYOUTS = {layout.__name__: layout for layout in ((channels_last,) if REHEARSAL else (nchw, channels_last))}
SECONDS = 0.0 if REHEARSAL else 0.5 if ON_GPU else 2.0  # the time to spend on a pair, if its calls are short enough
MODE = "max-autotune-no-cudagraphs"  # of torch.compile; launches are queued ahead anyway (timing.py)
COMPILED = ", torch.compile"  # the suffix of a compiled side's name


def here(cpu: Anything, gpu: Anything) -> Anything:
    """Returns the value for the device of this run."""
    return gpu if ON_GPU else cpu


# The axes along which a case is scaled, one at a time:
BATCHES = here((1, 2, 4, 8), (1, 4, 8, 16))
SIDES = here((32, 64, 96, 128), (32, 64, 128))
CHANNELS = (128, 256, 512, 1024)
COUNTS = (1, 2, 3, 4)  # of scales
THREADS = () if ON_GPU else tuple(2**i for i in range((os.cpu_count() or 1).bit_length()))  # up to the cores there are


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_anew(function: Callable, mode: str | None = MODE) -> Callable:
    """Compiles a function for the current sizes with torch.compile, as if nothing had been compiled before.

    Dynamo keeps graphs by code: the second size would get a graph for dynamic sizes, and after the eighth it would
    silently run eagerly. Here that is an error.

    Args:
        function: The function or model to compile.
        mode: The mode of torch.compile; None for whole models, where a search would take minutes.
    """
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    how = {"backend": "eager"} if REHEARSAL else {"mode": mode}
    return torch.compile(function, dynamic=False, **how)
