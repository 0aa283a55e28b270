"""Tests that the machine notices what is taken away from the project's kernels, one thing at a time (mutations.py).

Every barrier of the CUDA kernels is needed, or it would go. Triton sets its own barriers, some of them in front of a
shuffle or of code that is not reached: those that nothing needs are counted.
"""

import mutations
import ptx_cuda
import ptx_triton
import pytest
import torch
from cases import channels_last, nchw, sliced
from cuda_calls import cuda_calls
from workloads import WORKLOADS, context

import apc_kernels
from apc_kernels import build

cuda = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
triton = pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels decorated for the interpreter")
slow = pytest.mark.slow
REDUNDANT_IN_TRITON = 0.25  # of the barriers, waits and fences that a workload executes
BLIND = 0.02  # of the addresses: an access goes elsewhere, and finds the same numbers there


def name(value) -> str:
    return getattr(value, "__name__", str(value).removeprefix("torch."))


def of_cuda(monkeypatch, dtype, *layouts) -> dict:
    return mutations.record(monkeypatch, lambda: [cuda_calls(ptx_cuda.Kernels(), each, dtype) for each in layouts])


def of_triton(monkeypatch, workload, arch, dtype) -> dict:
    pytest.importorskip("triton", reason="needs triton")
    with monkeypatch.context() as patch, apc_kernels.backend("triton"):
        ptx_triton.serve(patch, arch)
        return mutations.record(monkeypatch, lambda: workload(channels_last, dtype))


def assert_noticed(outcome: mutations.Outcome, redundant: float, least: int) -> None:
    print(outcome)
    assert outcome.tried >= least
    assert outcome.left <= redundant * outcome.tried, dict(outcome.unnoticed)


@cuda
@slow
def test_a_sample_of_the_cuda_kernels(monkeypatch):
    launches = of_cuda(monkeypatch, torch.bfloat16, channels_last)
    assert_noticed(mutations.try_all(launches, mutations.removals, every=4), 0, 10)
    assert_noticed(mutations.try_all(launches, mutations.changed_addresses, every=40), BLIND, 15)


@triton
def test_a_sample_of_the_triton_kernels(monkeypatch):
    launches = of_triton(monkeypatch, context, 80, torch.bfloat16)
    assert_noticed(mutations.try_all(launches, mutations.removals, every=10), REDUNDANT_IN_TRITON, 10)
    assert_noticed(mutations.try_all(launches, mutations.changed_addresses, every=60), BLIND, 12)


@cuda
@slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=name)
def test_every_barrier_of_the_cuda_kernels(monkeypatch, dtype):
    """Takes each out of the launches in all layouts: most kernels serve several, and wait for copies in one alone."""
    outcome = mutations.try_all(of_cuda(monkeypatch, dtype, channels_last, nchw, sliced), mutations.removals)
    assert_noticed(outcome, 0, 20)
    assert not outcome.unreached, outcome.unreached


@cuda
@slow
@pytest.mark.parametrize(("layout", "dtype"), [(channels_last, torch.bfloat16), (nchw, torch.float32)], ids=name)
def test_addresses_of_the_cuda_kernels(monkeypatch, layout, dtype):
    launches = of_cuda(monkeypatch, dtype, layout)
    assert_noticed(mutations.try_all(launches, mutations.changed_addresses), BLIND, 500)


@triton
@slow
@pytest.mark.parametrize("workload", WORKLOADS, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize("arch", [80, 90])
def test_barriers_waits_and_fences_of_the_triton_kernels(monkeypatch, workload, arch, dtype):
    outcome = mutations.try_all(of_triton(monkeypatch, workload, arch, dtype), mutations.removals)
    assert_noticed(outcome, REDUNDANT_IN_TRITON, 5)
    # wgmma.wait_group is redundant where the next product goes on with the same sum.
    left = [instruction for of_kernel in outcome.unnoticed.values() for instruction in of_kernel]
    assert not [instruction for instruction in left if "cp.async" in instruction or "wgmma.fence" in instruction]


@triton
@slow
@pytest.mark.parametrize("workload", WORKLOADS, ids=name)
@pytest.mark.parametrize("arch", [80, 90])
def test_addresses_of_the_triton_kernels(monkeypatch, workload, arch):
    launches = of_triton(monkeypatch, workload, arch, torch.bfloat16)
    assert_noticed(mutations.try_all(launches, mutations.changed_addresses), BLIND, 100)
