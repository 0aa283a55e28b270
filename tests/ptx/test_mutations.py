"""Takes something away from compiled kernels, one thing at a time: a barrier, the wait for a copy, an address's scale.

Every removal has to be found. Where a kernel does not need a barrier in one call it may in another: what is left over
by all calls of a group is redundant.
"""

import re
from collections import Counter, defaultdict

import ptx
import ptx_cuda
import ptx_triton
import pytest
import torch
from accuracy import same_bits
from cases import channels_last, nchw, sliced
from cuda_calls import cuda_calls
from workloads import WORKLOADS

import apc_kernels
from apc_kernels import build

CUDA = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
BARRIER = re.compile(r"^\t*bar\.sync[^;]*;", re.MULTILINE)
WAIT = re.compile(r"^\t*cp\.async\.wait_group\s+[1-9][^;]*;", re.MULTILINE)  # not the one that empties the queue
# Triton sets a barrier before every reuse of shared memory and some that nothing needs: in front of a shuffle, say.
REDUNDANT_IN_TRITON = 0.25


def without(text: str, match: re.Match, replacement: str = "") -> str:
    return text[: match.start()] + replacement + text[match.end() :]


def survivors(
    calls, pattern: re.Pattern, replacement=lambda match: "", is_executed=lambda kernel, line: True
) -> tuple[dict[str, list[str]], Counter]:
    """What can be taken from each kernel that `calls(changed)` runs without being found, and how much was tried.

    Found is what is reported, what never ends, and what changes a result.
    """
    texts: dict[str, str] = {}  # name by text: Triton gives one kernel several
    expected = calls(lambda kernel, text: (texts.setdefault(text, kernel), text)[1])
    left, tried = defaultdict(list), Counter()
    for text, kernel in texts.items():
        for match in pattern.finditer(text):
            line = text[: match.start()].count("\n") + 1
            if not is_executed(kernel, line):
                continue
            mutant = without(text, match, replacement(match))
            tried[kernel] += 1
            try:
                results = calls(lambda _, t, original=text, mutant=mutant: mutant if t == original else t)
            except (ptx.FaultError, RuntimeError):
                continue
            if all(same_bits(a, b) for a, b in zip(results, expected, strict=True)):
                left[kernel].append(f"line {line}: {match[0].strip()}")
    return dict(left), tried


def total(left: dict[str, list[str]]) -> int:
    return sum(map(len, left.values()))


@CUDA
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (channels_last, torch.bfloat16),
        (nchw, torch.bfloat16),
        (sliced, torch.bfloat16),
        (channels_last, torch.float32),
        (nchw, torch.float32),
        (sliced, torch.float32),
        (channels_last, torch.float16),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[6:]),
)
def test_every_barrier_of_the_cuda_kernels(layout, dtype):
    def calls(changed):
        return cuda_calls(ptx_cuda.Kernels(changed), layout, dtype)

    left, tried = survivors(calls, BARRIER)
    assert tried.total() > 20 and not left


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels decorated for the interpreter")
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.__name__)
@pytest.mark.parametrize("arch", [80, 90])
def test_barriers_and_waits_of_triton_kernels(monkeypatch, workload, arch):
    """Triton's barriers are not ours to remove: most have to be found, and every wait for a copy."""
    pytest.importorskip("triton", reason="needs triton")

    def calls(changed):
        with monkeypatch.context() as patch, apc_kernels.backend("triton"):
            ptx_triton.serve(patch, arch, changed=changed)
            return [ours for ours, *_ in workload(channels_last, torch.bfloat16)]

    left, tried = survivors(calls, BARRIER)
    print(f"{workload.__name__} sm_{arch}: {tried.total()} barriers, {total(left)} not needed")
    assert total(left) <= REDUNDANT_IN_TRITON * tried.total(), left
    left, _ = survivors(calls, WAIT)
    assert not left


@CUDA
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_addresses_of_the_cuda_kernels(dtype):
    """Doubles the sizes that indices are multiplied with, wherever a call comes by.

    Some have no effect: where the index is 0, or where nothing is loaded from the address, for regions past the last.
    """
    counts = []
    cuda_calls(ptx_cuda.Kernels(counts=counts), channels_last, dtype)
    executed = {(kernel, line) for kernel, result in counts for line in result["executed_lines"]}

    def calls(changed):
        return cuda_calls(ptx_cuda.Kernels(changed), channels_last, dtype)

    def double(match):
        return match[0].replace(f", {match[1]};", f", {2 * int(match[1])};")

    scale = re.compile(r"^\t*mul\.wide\.s32[^;]*, (2|4|8|16);", re.MULTILINE)
    left, tried = survivors(calls, scale, double, lambda *place: place in executed)
    print(f"{tried.total()} scales of addresses, {total(left)} without effect")
    blind = [kernel for kernel, n in tried.items() if len(left.get(kernel, ())) == n]
    assert tried.total() > 10 and not blind
