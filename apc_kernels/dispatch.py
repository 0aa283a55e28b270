"""Which backend serves a call, and why; how to force one.

    reference   plain PyTorch, every device and dtype
    cpp         the CPU library
    cuda        the CUDA library
    triton      Triton kernels (on CPU tensors only in Triton's interpreter, TRITON_INTERPRET=1)

Each family of operations says which of them it has (Kernels). `auto` takes the first of PREFERENCE that can serve the
tensor at hand. `APC_KERNELS_BACKEND=name`, or `with apc_kernels.backend("name"):`, forces one; a forced backend that
cannot serve a call raises and says why. What has kernels for CPUs alone is not meant by forcing a GPU's backend: a
loader's images are on the CPU. Nothing outside this file decides by what hardware there is.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

import torch

from apc_kernels import library

BACKENDS = ("reference", "cpp", "triton", "cuda")
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}  # not yet measured on a GPU
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_LIMITS: Mapping[str, str] = MappingProxyType({})


class SlowPathWarning(UserWarning):
    """A call was served by the reference because the library that would be faster is missing."""


def _checked(name: str, source: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{source}: expected one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


# The backends asked for, the last one counts. Process-wide like torch.backends, not a context variable: autograd runs
# backward in threads of its own.
_asked = [(None, _checked(os.environ.get("APC_KERNELS_BACKEND") or "auto", "APC_KERNELS_BACKEND"))]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend for every operation inside the `with` block, in all threads; "auto" undoes a forced one.

    Around a compiled function, not inside it: a graph runs long after the block in it was traced.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("apc_kernels.backend: put it around the compiled function, not inside it")
    mine = (object(), _checked(name, "backend"))
    _asked.append(mine)
    try:
        yield
    finally:
        _asked.remove(mine)  # not pop(): another thread may have entered since


@dataclass(frozen=True)
class Kernels:
    """What a family of operations has: where its functions are in each backend, and for which dtypes.

    An operation's functions have its name and take the same arguments in every backend.
    """

    reference: ModuleType
    triton: Callable[[], ModuleType] | None = None  # imports it: Triton is slow to import, and not everywhere
    cuda: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def function(self, backend: str, operation: str) -> Callable:
        if backend == "cpp":
            return getattr(torch.ops.apc_kernels_cpp, operation)
        if backend == "cuda":
            return getattr(torch.ops.apc_kernels_cuda, operation)
        return getattr(self.triton() if backend == "triton" else self.reference, operation)

    def computes_in(self, backend: str) -> tuple[torch.dtype, ...]:
        """The dtypes of a backend: none if the family has nothing there. GPUs have no kernels in float64."""
        if backend in ("reference", "cpp"):
            return self.dtypes
        has = self.cuda if backend == "cuda" else self.triton is not None
        return tuple(dtype for dtype in self.dtypes if has and dtype != torch.float64)

    def select(self, operation: str, x: torch.Tensor, limits: Mapping[str, str] = NO_LIMITS) -> str:
        """The backend that serves an operation on a tensor like x; `limits` says why some cannot take this call."""
        _, forced = _asked[-1]
        device, dtype = x.device.type, x.dtype
        if forced in ("reference", "cpp") or (forced in ("triton", "cuda") and (self.triton or self.cuda)):
            if reason := limits.get(forced) or self.why_not(forced, operation, device, dtype):
                raise RuntimeError(f"{operation}: the backend {forced!r} was asked for, but {reason}")
            return forced
        name, passed_over = self.explain(operation, device, dtype, limits)
        if name == "reference" and not limits and any(dtype in self.computes_in(other) for other in passed_over):
            _warn_once("; ".join(passed_over.values()))
        return name

    def explain(
        self, operation: str, device: str, dtype: torch.dtype, limits: Mapping[str, str] = NO_LIMITS
    ) -> tuple[str, dict[str, str]]:
        """What `auto` takes, and why each backend it prefers to that cannot serve."""
        passed_over = {}
        for name in PREFERENCE.get(device, ("reference",)):
            reason = limits.get(name) or self.why_not(name, operation, device, dtype)
            if reason is None:
                return name, passed_over
            passed_over[name] = reason
        return "reference", passed_over

    def why_not(self, name: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
        """Why a backend cannot serve an operation on a device, or None if it can."""
        dtypes = self.computes_in(name)
        if not dtypes:
            return f"{name} has no {operation}"
        if dtype not in dtypes:
            return f"{name} does not compute in {str(dtype).removeprefix('torch.')}"
        return None if name == "reference" else _why_absent(name, device)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_absent(name: str, device: str) -> str | None:
    """Why there is nothing of a backend on a device, if there is nothing."""
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
    return _without_code(native.record["cuda"]["architectures"]) if name == "cuda" else None


def _without_code(architectures: str) -> str | None:
    """Why the CUDA library does not run on the current GPU, if it does not."""
    return _without_code_on(torch.cuda.current_device(), architectures) if torch.cuda.is_available() else None


@functools.cache
def _without_code_on(device: int, architectures: str) -> str | None:
    from apc_kernels import build  # not above: `python -m apc_kernels.build` would find itself imported already

    major, minor = torch.cuda.get_device_capability(device)
    if build.has_code(architectures.split(";"), (major, minor)):
        return None
    return f"the cuda library has code for {architectures}, this GPU is {major}.{minor} (TORCH_CUDA_ARCH_LIST)"


@functools.cache
def _warn_once(reason: str) -> None:
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "apc_kernels"):
        frame, level = frame.f_back, level + 1
    message = f"apc_kernels runs on the slower PyTorch reference: {reason}"
    warnings.warn(message, SlowPathWarning, stacklevel=level)
