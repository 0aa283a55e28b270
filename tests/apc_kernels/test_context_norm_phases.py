"""Tests the kernels of adaptive_context_norm's phases beside their reference."""

import pytest
import torch
from cases import ContextCase
from phase_cases import run

from apc_kernels.ops.affinities import phases
from apc_kernels.ops.affinities.phase_backends import PHASES

CASES = [
    ContextCase(3, 13, (9, 23), (1, 2, 6)),
    ContextCase(2, 70, (3, 5), (5,)),
    ContextCase(17, 33, (2, 3), (3, 1, 2, 1)),
]
slow_cases = [pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def reference(name, arguments, results):
    return getattr(phases, name)(*arguments)


def in_backend(backend):
    def function(name, arguments, results):
        PHASES.function(backend, name)(*arguments, *results)
        return results

    return function


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_kernels_are_the_reference(case, dtype):
    """Sums are float64: float32 results may differ by a rounding."""
    check(case, dtype, "cpp")


def check(case, dtype, backend):
    assert PHASES.why_not(backend, "guide_statistics", "cpu", dtype) is None
    expected, actual = run(case, dtype, reference), run(case, dtype, in_backend(backend))
    for name, results in expected.items():
        for place, (ours, theirs) in enumerate(zip(actual[name], results, strict=True)):
            assert ours.dtype == theirs.dtype
            tolerance = 1e-11 if ours.dtype == torch.float64 else 1e-6
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error <= tolerance, f"{name}, result {place}: {error:.1e}"


@pytest.mark.parametrize("case", [ContextCase(3, 17, (2, 3), (2, 5)), *slow_cases], ids=str)
def test_triton_kernels_are_the_reference(case):
    pytest.importorskip("triton", reason="needs triton")
    check(case, torch.float32, "triton")
