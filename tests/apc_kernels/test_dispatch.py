"""Tests the choice of a backend: `auto`, forcing one, and the error if it cannot serve."""

import os
from types import SimpleNamespace

import forked
import pytest
import torch

import apc_kernels
from apc_kernels import dispatch, info, library
from apc_kernels.ops.affinities.checks import KERNELS as CONTEXT_KERNELS
from apc_kernels.ops.affinities.checks import limits as context_limits
from apc_kernels.ops.pyramid_pool import KERNELS


def run(program, **environment):
    """Runs a program in its own process, away from the checkout."""
    return forked.run(["-c", program], env=os.environ | environment)


def test_auto_takes_the_first_that_can():
    assert KERNELS.explain("pyramid_pool", "cpu", torch.float32) == ("cpp", {})
    assert KERNELS.explain("pyramid_pool", "mps", torch.float32) == ("reference", {})
    name, passed_over = KERNELS.explain("pyramid_pool", "cuda", torch.float64)
    assert name == "reference"
    assert passed_over == {other: f"{other} does not compute in float64" for other in ("cuda", "triton")}


def test_triton_comes_first_where_it_issues_fewer_instructions(monkeypatch):
    monkeypatch.setattr(dispatch, "_reason_unavailable", lambda name, device: None)
    assert KERNELS.explain("pyramid_pool", "cuda", torch.float32) == ("cuda", {})
    assert CONTEXT_KERNELS.explain("adaptive_context", "cuda", torch.float32) == ("triton", {})
    for dtype in (torch.bfloat16, torch.float16):
        assert CONTEXT_KERNELS.explain("adaptive_context", "cuda", dtype) == ("cuda", {})
    assert CONTEXT_KERNELS.explain("affinity_moments", "cpu", torch.float32) == ("cpp", {})
    missing = {"triton": "triton is not installed"}
    monkeypatch.setattr(dispatch, "_reason_unavailable", lambda name, device: missing.get(name))
    assert CONTEXT_KERNELS.explain("adaptive_context_backward_x", "cuda", torch.float32) == ("cuda", missing)


def test_what_a_missing_library_says(monkeypatch):
    monkeypatch.setattr(library, "cpu", lambda: library.Library(None, "never built"))
    name, passed_over = KERNELS.explain("pyramid_pool", "cpu", torch.float32)
    assert (name, passed_over) == ("reference", {"cpp": "the cpu library is missing: never built"})
    dispatch._warn_once.cache_clear()
    with pytest.warns(apc_kernels.SlowPathWarning, match="slower PyTorch reference: the cpu library") as warned:
        apc_kernels.pyramid_pool(torch.ones(1, 1, 2, 2))
    assert warned[0].filename == __file__
    with apc_kernels.backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was asked for, but the cpu library is"):
        apc_kernels.pyramid_pool(torch.ones(1, 1, 2, 2))


def test_forcing_one():
    x = torch.ones(1, 1, 2, 2)
    assert KERNELS.select("pyramid_pool", x) == "cpp"
    with apc_kernels.backend("reference"):
        assert KERNELS.select("pyramid_pool", x) == "reference"
        with apc_kernels.backend("auto"):
            assert KERNELS.select("pyramid_pool", x) == "cpp"
        assert KERNELS.select("pyramid_pool", x) == "reference"
    with apc_kernels.backend("cuda"), pytest.raises(RuntimeError, match=r"pyramid_pool: .* cuda does not run on cpu"):
        apc_kernels.pyramid_pool(x)
    with apc_kernels.backend("triton"), pytest.raises(RuntimeError, match="triton does not compute in float64"):
        apc_kernels.pyramid_pool(x.double())
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, cpp, triton, cuda; got 'cudnn'"):
        apc_kernels.backend("cudnn").__enter__()
    assert KERNELS.select("pyramid_pool", x) == "cpp"


def test_a_forced_backend_ends_with_an_error():
    with pytest.raises(KeyError), apc_kernels.backend("reference"):
        raise KeyError
    assert KERNELS.select("pyramid_pool", torch.ones(1)) == "cpp"


def test_two_threads_that_overlap_leave_nothing_forced():
    first, second = apc_kernels.backend("reference"), apc_kernels.backend("cpp")
    for step in (first.__enter__, second.__enter__):
        step()
    for manager in (first, second):
        manager.__exit__(None, None, None)
    assert len(dispatch._requested) == 1


def test_forcing_inside_a_compiled_function_is_refused():
    def function(x):
        with apc_kernels.backend("reference"):
            return apc_kernels.pyramid_pool(x)

    with pytest.raises(Exception, match="put it around the compiled function, not inside it"):
        torch.compile(function, fullgraph=True, backend="eager")(torch.ones(1, 1, 2, 2))


def test_limits_are_a_reason_too():
    limits = {"cpp": "the map is too large"}
    assert KERNELS.explain("pyramid_pool", "cpu", torch.float32, limits) == ("reference", limits)
    with apc_kernels.backend("cpp"), pytest.raises(RuntimeError, match="was asked for, but the map is too large"):
        KERNELS.select("pyramid_pool", torch.ones(1), limits)


def test_large_scales_of_low_precision_maps_are_left_to_triton(monkeypatch):
    monkeypatch.setattr(dispatch, "_reason_unavailable", lambda name, device: None)
    x, scales = torch.empty(1, 8, 4, 4, dtype=torch.bfloat16), (1, 7)
    name, passed_over = CONTEXT_KERNELS.explain("adaptive_context", "cuda", x.dtype, context_limits(x, scales))
    assert name == "triton"
    assert passed_over == {"cuda": "its kernels take scales of up to 6 beside bfloat16; the scales are (1, 7)"}
    assert context_limits(x, (1, 6)) == context_limits(x.float(), scales) == {}
    with apc_kernels.backend("cuda"), pytest.raises(RuntimeError, match="was asked for, but its kernels take scales"):
        CONTEXT_KERNELS.select("adaptive_context", x, context_limits(x, scales))


def test_a_missing_backend_is_reported_beside_one_with_limits(monkeypatch):
    """The slow reference serves because Triton is missing, whatever CUDA would not take."""
    missing = {"triton": "triton is not installed"}
    monkeypatch.setattr(dispatch, "_reason_unavailable", lambda name, device: missing.get(name))
    x = SimpleNamespace(device=torch.device("cuda"), is_cpu=False, dtype=torch.bfloat16)
    with pytest.warns(dispatch.SlowPathWarning, match="scales of up to 6; triton is not installed"):
        name = CONTEXT_KERNELS.select("adaptive_context", x, {"cuda": "it takes scales of up to 6"})
    assert name == "reference"


def test_the_environment_variable():
    program = """
import torch, apc_kernels
from apc_kernels.ops.affinities.checks import KERNELS as CONTEXT_KERNELS
from apc_kernels.ops.pyramid_pool import KERNELS
x = torch.ones(1, 1, 2, 2)
print(KERNELS.select("pyramid_pool", x), apc_kernels.pyramid_pool(x).shape)
"""
    assert run(program, APC_KERNELS_BACKEND="reference").stdout.startswith("reference torch.Size")
    assert run(program, APC_KERNELS_BACKEND="", APC_KERNELS_ISA="").stdout.startswith("cpp torch.Size")
    wrong = run(program, APC_KERNELS_BACKEND="fast")
    assert "APC_KERNELS_BACKEND: expected one of auto, reference, cpp, triton, cuda; got 'fast'" in wrong.stderr


def test_triton_without_the_interpreter_says_so():
    program = """
import torch, apc_kernels
with apc_kernels.backend("triton"):
    apc_kernels.pyramid_pool(torch.ones(1, 1, 2, 2))
"""
    assert "triton does not run on cpu tensors (TRITON_INTERPRET=1" in run(program, TRITON_INTERPRET="0").stderr


def test_a_wrong_instruction_set_says_what_there_is():
    program = """
import torch, apc_kernels.info
print(apc_kernels.info.report())
apc_kernels.pyramid_pool(torch.ones(1, 1, 2, 2))
"""
    refused = run(program, APC_KERNELS_ISA="sse9")
    assert "APC_KERNELS_ISA=sse9: this processor allows" in refused.stderr
    assert "none: APC_KERNELS_ISA=sse9" in refused.stdout


def test_importing_the_package_imports_no_compiler_and_no_command_line():
    program = """
import sys, apc_kernels
print([name for name in ("triton", "tyro", "rich", "numpy.testing", "apcnet", "setuptools") if name in sys.modules])
"""
    assert run(program).stdout.strip() == "[]"


@pytest.mark.parametrize("gpu", ["triton", "cuda"])
def test_forcing_a_gpus_backend_does_not_mean_what_runs_on_cpus_alone(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    with apc_kernels.backend(gpu):
        seen = apc_kernels.augment(image, (4, 6))  # as a loader does, beside a model on a GPU
        with pytest.raises(RuntimeError, match=f"'{gpu}' was asked for, but"):
            KERNELS.select("pyramid_pool", image.float())
    assert torch.equal(seen, apc_kernels.augment(image, (4, 6)))


@pytest.mark.parametrize(
    ("backend", "operation"),
    [("triton", "augment"), ("triton", "conv3x3"), ("cuda", "conv3x3"), ("cuda", "upsample_argmax")],
)
def test_what_a_backend_does_not_have_it_does_not_serve(backend, operation):
    assert info.why_not(backend, operation, "cuda", torch.float32) == f"{backend} has no {operation}"
    assert info.explain(operation, "cuda", torch.float32)[0] != backend
