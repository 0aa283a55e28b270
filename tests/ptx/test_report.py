"""Tests what the kernels' files state of bytes and operations against what their compiled code does."""

import re
from collections import Counter

import least
import ptx_triton
import pytest
import report
import stock
import torch
from accuracy import assert_accurate
from cases import channels_last, nchw
from upsample_cases import UpsampleCase, draw_upsample, loss_and_gradient
from workloads import WORKLOADS, pooling

import apc_kernels
from apc_kernels import build

slow = pytest.mark.slow
# Launches of all operations on a batch: aggregate for z of the map's layout and of another; weight and regions are
# packed for each function.
KERNELS_OF_APCNET = Counter(
    pool_rows=1,
    pool_bins=1,
    spread_rows=1,
    aggregate_mma=2,
    sum_region_gradients_mma=1,
    write_x_gradients_mma=1,
    sum_moments_mma=1,
    pack_fragments=3,
    merge_slices=2,
    merge_moments=1,
)


# Accessed only where there is such a label: none in the workloads.
RARE = {("confusion_kernel", "invalid")}


def assert_stated(launches) -> None:
    """Checks that each kernel accesses the tensors that its file names, and no others."""
    left = set()  # those that no launch has accessed yet
    for kernel, result, _ in launches:
        names = {part for name in result["tensors"] for part in name.split("/")}
        left |= {(least.plain(kernel), name) for name in names & set(least.least()[least.plain(kernel)].moves)}
    for kernel, result, letters in launches:
        stated = least.least()[least.plain(kernel)]
        accessed = {part for name in report.touched(result) for part in name.split("/")}
        assert accessed and accessed <= set(stated.moves), kernel
        left -= {(least.plain(kernel), name) for name in accessed}
        operations = stated.operations(letters, accessed)
        assert operations <= least.operations(result["opcodes"]), kernel
        numbers = dict(zip(report.COLUMNS, report.row(kernel, result, letters), strict=True))
        assert numbers["issue ns"] > 0 and numbers["memory ns"] > 0 and numbers["operations"] == operations
    assert left <= RARE


@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
def test_cuda_kernels_do_what_their_files_state():
    assert_stated(report.cuda_launches(channels_last, torch.bfloat16))


@slow
@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("layout", [channels_last, nchw], ids=lambda layout: layout.__name__)
def test_cuda_kernels_of_apcnet_wait_for_memory(layout):
    """Every kernel issues its instructions in less time than memory takes to move its tensors, by count."""
    launches = report.head_launches(layout, torch.bfloat16)
    names = Counter(least.plain(launch.kernel) for launch in launches)
    assert names == KERNELS_OF_APCNET
    for launch in launches:
        issue, memory = launch.floors()
        assert 0 < issue <= memory, (launch.kernel, issue, memory)
    if layout is channels_last:
        ratios = [
            issue / memory for launch in launches if "_mma" in launch.kernel for issue, memory in [launch.floors()]
        ]
        *in_vectors, _ = sorted(ratios)  # all but aggregate for z of another layout
        assert len(in_vectors) == 4 and max(in_vectors) <= 0.6, ratios


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels decorated for the interpreter")
@pytest.mark.parametrize("workload", [w if w is pooling else pytest.param(w, marks=slow) for w in WORKLOADS])
def test_triton_kernels_do_what_their_files_state(monkeypatch, workload):
    pytest.importorskip("triton", reason="needs triton")
    monkeypatch.setattr(report.Patch, "setattr", monkeypatch.setattr)
    assert_stated(report.triton_launches(workload, 80, channels_last, torch.bfloat16))


@slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels decorated for the interpreter")
def test_cross_entropy_takes_half_a_millisecond(monkeypatch):
    """Forward and backward issue their instructions in 0.5 ms for (8, 150, 64, 64) logits to 512×512, on an H200.

    Counted on 17 source rows of one image, which like 64 rows end in a tile that repeats one row of cells.
    """
    pytest.importorskip("triton", reason="needs triton")
    counts, case = [], UpsampleCase(1, 150, (17, 64), (136, 512))
    ptx_triton.serve(monkeypatch, 90, counts=counts)
    t = draw_upsample(case, channels_last, torch.bfloat16)
    with apc_kernels.backend("triton"):
        results = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, case)
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in t.items()}
    exact = loss_and_gradient(stock.upsample_cross_entropy, wide, case)
    own = loss_and_gradient(stock.upsample_cross_entropy, t, case)
    for name, ours, true, pytorch in zip(("loss", "gradient"), results, exact, own, strict=True):
        assert_accurate(ours, true, pytorch.to(ours.dtype), name)
    instructions = {}
    for kernel, result in counts:
        warps = sum(warps for warps, _ in result["opcodes"].values())
        instructions[kernel] = instructions.get(kernel, 0) + warps * 8 * 64 / 17
    assert set(instructions) == {"peaks_kernel", "cross_entropy_kernel", "pixels_kernel", "cells_kernel"}
    logits = 8 * 150 * 512 * 512
    of_a_logit = {kernel: 32 * n / logits for kernel, n in instructions.items()}
    assert of_a_logit["cells_kernel"] > 7, of_a_logit  # an exponential, its power, and four sums
    assert sum(instructions.values()) / report.ISSUED_PER_SECOND <= 0.5e-3, of_a_logit


def test_every_kernel_states_its_least():
    text = "".join(file.read_text() for file in least.files())
    names = re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)
    names += re.findall(r"__global__ void (?:__launch_bounds__\(.*\)\s+)?(\w+)\(const", text)
    assert sorted(names) == sorted(least.least())


def test_operations_of_products():
    opcodes = {
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (3, 96),
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16": (4, 128),
        "fma.rn.f32": (1, 32),
        "add.s32": (9, 288),
    }
    assert least.operations(opcodes) == 3 * 2 * 16 * 8 * 16 + 2 * 64 * 32 * 16 + 64
