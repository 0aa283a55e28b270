"""Triton's kernels as compiled code: the right numbers, no finding, and the same bits in every schedule."""

import ptx_triton
import pytest
import torch
from accuracy import assert_accurate, same_bits
from cases import channels_last, nchw, sliced_channels_last
from workloads import WORKLOADS

import apc_kernels

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels decorated for the interpreter")
slow = pytest.mark.slow
SETTINGS = [
    (80, torch.bfloat16, channels_last),
    pytest.param(80, torch.float16, nchw, marks=slow),
    pytest.param(80, torch.float32, channels_last, marks=slow),
    pytest.param(80, torch.bfloat16, sliced_channels_last, marks=slow),
    pytest.param(90, torch.bfloat16, channels_last, marks=slow),
    pytest.param(90, torch.float16, nchw, marks=slow),
    pytest.param(90, torch.float32, channels_last, marks=slow),
]


def name(value) -> str:
    return getattr(value, "__name__", str(value).removeprefix("torch."))


@pytest.mark.parametrize(("arch", "dtype", "layout"), SETTINGS, ids=name)
@pytest.mark.parametrize("workload", WORKLOADS, ids=name)
def test_results(monkeypatch, workload, arch, dtype, layout):
    results = []
    for seed in range(3):
        with monkeypatch.context() as patch, apc_kernels.backend("triton"):
            ptx_triton.serve(patch, arch, seed=seed)
            results.append(workload(layout, dtype))
    for i, (ours, exact, own) in enumerate(results[0]):
        assert_accurate(ours, exact, own, f"result {i}")
    for other in results[1:]:
        assert all(same_bits(a, b) for (a, *_), (b, *_) in zip(results[0], other, strict=True))
