"""Selects the backend that serves a call, explains the choice, and lets a user force one.

    reference   plain PyTorch, every device and dtype
    cpp         the CPU library
    cuda        the CUDA library
    triton      Triton kernels (on CPU tensors only in Triton's interpreter, TRITON_INTERPRET=1)

Each family of operations declares which of these it has (Kernels). `auto` takes the first of PREFERENCE (of the
operations in TRITON_FIRST, beside float32 maps, Triton before CUDA) that can serve the given tensor.
`APC_KERNELS_BACKEND=name`, or `with apc_kernels.backend("name"):`, forces one; a forced backend that cannot serve a
call raises an error with the reason. Forcing a GPU backend does not affect operations that have kernels for CPUs alone:
a data loader's images are on the CPU. Nor does forcing cpp affect those without kernels in C++. No other file decides
by the hardware.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import torch

from apc_kernels import library

BACKENDS = ("reference", "cpp", "triton", "cuda")
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
# Of these, beside float32 maps, Triton's kernels come before the CUDA ones, which stage them in shared memory. Beside
# bfloat16 and float16 maps, by count of the compiled code (docs/ptx.md), the CUDA kernels issue their instructions in
# 0.5 to 0.6 of the time that memory takes to move their tensors. Not yet measured on a GPU, as nothing here.
TRITON_FIRST = ("adaptive_context", "affinity_moments")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_LIMITS: Mapping[str, str] = MappingProxyType({})


class SlowPathWarning(UserWarning):
    """Warns that the slower PyTorch reference serves a call because the compiled library is missing."""


def _checked(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source}: expected one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


# The requested backends; the last one counts. Process-wide like torch.backends, not a context variable: autograd runs
# backward in threads of its own.
_requested: list[tuple[object, str]] = [
    (None, _checked(os.environ.get("APC_KERNELS_BACKEND") or "auto", "APC_KERNELS_BACKEND"))
]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces one backend for every operation called inside the `with` block, in all threads.

        with apc_kernels.backend("reference"):
            y = apc_kernels.pyramid_pool(x)

    A forced backend that cannot serve a call raises a RuntimeError with the reason. The environment variable
    `APC_KERNELS_BACKEND` does the same for a whole process. Under torch.compile put the block around the call of the
    compiled function, not inside it: the graph runs long after the block was traced.

    Args:
        name: "auto" (the default: the fastest backend that can serve the call), "reference" (PyTorch), "cpp" (CPU),
            "triton" or "cuda" (GPU).
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("apc_kernels.backend: put it around the compiled function, not inside it")
    mine = (object(), _checked(name, "backend"))
    _requested.append(mine)
    try:
        yield
    finally:
        _requested.remove(mine)  # not pop(): another thread may have entered since


@dataclass(frozen=True)
class Kernels:
    """Describes the kernels of a family of operations: the backends that have them, and their dtypes.

    The functions of an operation have its name and take the same arguments in every backend.
    """

    reference: ModuleType
    triton: Callable[[], ModuleType] | None = None  # imports the module: Triton is slow to import, and optional
    cpp: bool = True
    cuda: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def function(self, backend: str, operation: str) -> Callable[..., Any]:
        """Returns the function that computes an operation in a backend."""
        if backend == "cpp":
            return getattr(torch.ops.apc_kernels_cpp, operation)
        if backend == "cuda":
            return getattr(torch.ops.apc_kernels_cuda, operation)
        if backend == "triton":
            assert self.triton, "select() takes no backend without kernels"
            return getattr(self.triton(), operation)
        return getattr(self.reference, operation)

    def computes_in(self, backend: str) -> tuple[torch.dtype, ...]:
        """Returns the dtypes that a backend computes in: none without kernels there, and no float64 on GPUs."""
        if backend == "reference" or (backend == "cpp" and self.cpp):
            return self.dtypes
        has = self.cuda if backend == "cuda" else backend == "triton" and self.triton is not None
        return tuple(dtype for dtype in self.dtypes if has and dtype != torch.float64)

    def select(self, operation: str, x: torch.Tensor, limits: Mapping[str, str] = NO_LIMITS) -> str:
        """Returns the backend that serves an operation on a tensor like x; `limits` holds reasons why some cannot."""
        _, forced = _requested[-1]
        dtype, on_cpu = x.dtype, x.is_cpu and self.cpp and "cpp" not in limits
        if forced == "auto" and on_cpu and dtype in self.dtypes and library.cpu().loaded:
            return PREFERENCE["cpu"][0]  # as explain does, which takes longer
        device, on_gpu = x.device.type, forced in ("triton", "cuda") and (self.triton or self.cuda)
        if forced == "reference" or (forced == "cpp" and self.cpp) or on_gpu:
            if reason := limits.get(forced) or self.why_not(forced, operation, device, dtype):
                raise RuntimeError(f"{operation}: the backend {forced!r} was asked for, but {reason}")
            return forced
        name, passed_over = self.explain(operation, device, dtype, limits)
        missing = [other for other in passed_over if other not in limits and dtype in self.computes_in(other)]
        if name == "reference" and missing:
            _warn_once("; ".join(passed_over.values()))
        return name

    def explain(
        self, operation: str, device: str, dtype: torch.dtype, limits: Mapping[str, str] = NO_LIMITS
    ) -> tuple[str, dict[str, str]]:
        """Returns the backend that `auto` takes, and for each preferred one the reason why it cannot serve."""
        passed_over = {}
        order = PREFERENCE.get(device, ("reference",))
        if device == "cuda" and dtype == torch.float32 and operation.startswith(TRITON_FIRST):
            order = ("triton", "cuda", "reference")
        for name in order:
            reason = limits.get(name) or self.why_not(name, operation, device, dtype)
            if reason is None:
                return name, passed_over
            passed_over[name] = reason
        return "reference", passed_over

    def why_not(self, name: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
        """Returns the reason why a backend cannot serve an operation on a device, or None if it can."""
        dtypes = self.computes_in(name)
        if not dtypes:
            return f"{name} has no {operation}"
        if dtype not in dtypes:
            return f"{name} does not compute in {str(dtype).removeprefix('torch.')}"
        return None if name == "reference" else _reason_unavailable(name, device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_version() -> tuple[int, int]:
    """Returns major and minor version of the installed Triton, and (0, 0) without one."""
    name = "pytorch-triton-rocm" if torch.version.hip else "triton"
    for distribution in (name, "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            major, minor, *_ = importlib.metadata.version(distribution).split(".")
            return int(major), int(minor)
    return 0, 0


def _reason_unavailable(name: str, device: str) -> str | None:
    """Returns the reason why a backend is unavailable on a device, or None if it is available."""
    if name == "triton":
        if not _has_triton():
            return "triton is not installed"
        if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
            return None
        return f"triton does not run on {device} tensors (TRITON_INTERPRET=1 lets its interpreter run on cpu)"
    serves = "cpu" if name == "cpp" else "cuda"
    if device != serves:
        return f"{name} does not run on {device} tensors"
    native = library.cpu() if name == "cpp" else library.cuda()
    if not native.loaded:
        return f"the {serves} library is missing: {native.reason}"
    return _reason_no_code(native.record["cuda"]["architectures"]) if name == "cuda" else None


def _reason_no_code(architectures: str) -> str | None:
    """Returns the reason why the CUDA library does not run on the current GPU, or None if it runs."""
    return _reason_no_code_for(torch.cuda.current_device(), architectures) if torch.cuda.is_available() else None


@functools.cache
def _reason_no_code_for(device: int, architectures: str) -> str | None:
    from apc_kernels import build  # not above: `python -m apc_kernels.build` would find itself imported already

    major, minor = torch.cuda.get_device_capability(device)
    if build.has_code(architectures.split(";"), (major, minor)):
        return None
    how = f"set TORCH_CUDA_ARCH_LIST and run {library.HOW_TO_BUILD}"
    return f"the cuda library has code for {architectures}, this GPU is {major}.{minor} ({how})"


@functools.cache
def _warn_once(reason: str) -> None:
    frame, level = sys._getframe(), 1  # pyright: ignore[reportPrivateUsage]  # documented in spite of its name
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "apc_kernels"):
        frame, level = frame.f_back, level + 1
    message = f"apc_kernels runs on the slower PyTorch reference: {reason}"
    warnings.warn(message, SlowPathWarning, stacklevel=level)
