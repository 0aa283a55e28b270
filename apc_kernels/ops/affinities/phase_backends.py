"""Computes the phases of adaptive_context_norm in the backend that serves a map; phases.py is their specification."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.affinities import phases
from apc_kernels.ops.affinities.checks import KERNELS, limits, wide_limits
from apc_kernels.ops.common import without_autocast


def _triton() -> ModuleType:
    from apc_kernels.ops.affinities import triton_phases

    return triton_phases


PHASES = Kernels(phases, triton=_triton)

Phase = Callable[[str, Sequence[Any], Sequence[Tensor]], None]


def phases_on(x: Tensor, scales: Sequence[int]) -> Phase:
    """Returns phase(name, arguments, results), which computes a phase in the backend that serves x."""
    backend = KERNELS.select("adaptive_context_norm", x, limits(x, scales))
    if backend == "cuda":  # it has no kernels of the phases
        backend = "reference" if PHASES.why_not("triton", "adaptive_context_norm", x.device.type, x.dtype) else "triton"
    if backend in wide_limits(x, scales):
        backend = "reference"

    def phase(name: str, arguments: Sequence[Any], results: Sequence[Tensor]) -> None:
        function = PHASES.function(backend, name)
        if not x.numel():
            for result in results:
                result.zero_()
        elif backend == "reference":
            with without_autocast(x):
                for result, value in zip(results, function(*arguments), strict=True):
                    result.copy_(value)
        else:
            function(*(a.contiguous() if isinstance(a, Tensor) else a for a in arguments), *results)

    return phase
