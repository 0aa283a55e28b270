"""Sets up every test: Triton's interpreter if there is no GPU, and NaN in unwritten memory."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, and a kernel decorated

os.environ.pop("PYTEST_XDIST_WORKER", None)  # what a test starts is no worker, as pytest-benchmark would have it

from apc_kernels import build, info
from apc_kernels.ops.conv3x3 import tiles

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import interpreter

    interpreter.patch_language_once()


def pytest_configure(config) -> None:
    """Gives each worker (-n), and the processes it starts, one core and one thread.

    They read it when they import PyTorch, which is before this file: for a filter of warnings in pyproject.toml.
    """
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_report_header(config) -> str:
    return info.report()


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """Makes torch.empty and its kin return NaN inside the package, so that an unwritten result shows."""
    monkeypatch.setattr(tiles, "_free", [])  # scratch memory of earlier tests

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if type(tensor) is torch.Tensor and caller.startswith("apc_kernels.") and tensor.device.type != "meta":
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
            return tensor

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def threads():
    """Sets torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Lets PyTorch use one thread: products as small as a test's are no work for more."""
    threads(1)


@pytest.fixture(scope="session")
def cuda_emulation():
    """Returns the CUDA kernels compiled to run on the CPU (tests/emulation)."""
    import native_modules

    return native_modules.cuda_kernels("cuda_emulation")


@pytest.fixture(scope="session", params=["emulation", pytest.param("ptx", marks=pytest.mark.slow)])
def cuda_kernels(request):
    """Returns the CUDA kernels for the CPU: by g++ for the emulation, or by nvcc for the machine of tests/ptx."""
    if request.param == "emulation":
        return request.getfixturevalue("cuda_emulation")
    if build.find_nvcc() is None:
        pytest.skip("needs nvcc")
    import ptx_cuda

    return ptx_cuda.Kernels()


PTX_TARGETS = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 90)]


@pytest.fixture(params=["interpreter", *PTX_TARGETS], ids=lambda p: p if isinstance(p, str) else f"sm_{p}")
def triton_machine(request, monkeypatch):
    """Chooses what runs Triton's kernels: Triton's interpreter, or the machine of tests/ptx what they compile to."""
    if request.param != "interpreter":
        import ptx_triton

        ptx_triton.serve(monkeypatch, request.param)
    return request.param


@pytest.fixture
def forbid_copies(monkeypatch):
    """Returns a function after whose call copying a tensor fails the test."""

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"a copy was made of a tensor of {tuple(self.shape)} with strides {self.stride()}")

    contiguous = torch.Tensor.contiguous

    def start():
        monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: contiguous(x) if x.is_contiguous() else refuse(x))
        monkeypatch.setattr(torch.Tensor, "clone", refuse)
        monkeypatch.setattr(torch.Tensor, "copy_", refuse)

    return start
