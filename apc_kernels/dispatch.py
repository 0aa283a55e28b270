"""Which backend serves a call, and why; how to force one.

    reference   plain PyTorch, every device and dtype
    cpp         the CPU library
    cuda        the CUDA library
    triton      Triton kernels (on CPU tensors only in Triton's interpreter, TRITON_INTERPRET=1)

`auto` takes the first of PREFERENCE that can serve the tensor at hand. `APC_KERNELS_BACKEND=name`, or
`with apc_kernels.backend("name"):`, forces one; a forced backend that cannot serve a call raises and says why. What has
kernels for CPUs alone (ON_CPUS) is not meant by forcing a GPU's backend: a loader's images are on the CPU.
Nothing outside this file asks what hardware there is.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType

import torch

from apc_kernels import library

BACKENDS = ("reference", "cpp", "triton", "cuda")
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}  # not yet measured on a GPU
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_DTYPES = (*GPU_DTYPES, torch.float64, torch.uint8)  # uint8: images, of `augment` alone
ON_CPUS = ("augment", "conv3x3")
DTYPES = {"reference": CPU_DTYPES, "cpp": CPU_DTYPES, "triton": GPU_DTYPES, "cuda": GPU_DTYPES}


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


def select(operation: str, x: torch.Tensor, limits: Mapping[str, str] = MappingProxyType({})) -> str:
    """The backend that serves `operation` on a tensor like x; `limits` says which cannot take this call, and why."""
    _, forced = _asked[-1]
    device, dtype = x.device.type, x.dtype
    if forced != "auto" and not (forced in ("triton", "cuda") and operation in ON_CPUS):
        if reason := limits.get(forced) or why_not(forced, operation, device, dtype):
            raise RuntimeError(f"{operation}: the backend {forced!r} was asked for, but {reason}")
        return forced
    name, passed_over = explain(operation, device, dtype, limits)
    if name == "reference" and not limits and passed_over and dtype in DTYPES[next(iter(passed_over))]:
        _warn_once("; ".join(passed_over.values()))
    return name


def explain(
    operation: str, device: str, dtype: torch.dtype, limits: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, dict[str, str]]:
    """What `auto` takes, and why each backend it prefers to that cannot serve."""
    passed_over = {}
    for name in PREFERENCE.get(device, ("reference",)):
        reason = limits.get(name) or why_not(name, operation, device, dtype)
        if reason is None:
            return name, passed_over
        passed_over[name] = reason
    return "reference", passed_over


def why_not(name: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve an operation on a device, or None if it can."""
    if dtype not in DTYPES[name]:
        return f"{name} does not compute in {str(dtype).removeprefix('torch.')}"
    if name == "reference":
        return None
    if name == "triton":
        if operation in ON_CPUS:
            return f"triton has no {operation}"
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
    if name == "cuda" and (lacking := _without_code(native.record["cuda"]["architectures"])):
        return lacking
    if not hasattr(getattr(torch.ops, f"apc_kernels_{name}"), operation):
        return f"{name} has no {operation}"
    return None


def kernels(name: str, folder: str) -> ModuleType:
    """A backend's functions for the operations of apc_kernels/ops/<folder>, all with the same signatures."""
    if name in ("cpp", "cuda"):
        return getattr(torch.ops, f"apc_kernels_{name}")
    return importlib.import_module(f"apc_kernels.ops.{folder}.{name}")


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
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(reason: str) -> None:
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "apc_kernels"):
        frame, level = frame.f_back, level + 1
    message = f"apc_kernels runs on the slower PyTorch reference: {reason}"
    warnings.warn(message, SlowPathWarning, stacklevel=level)


def gpu() -> str:
    """What GPU torch sees, or why it sees none."""
    if torch.version.cuda is None:
        return f"none used: torch {torch.__version__} is a build without CUDA"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    driver = _driver_cuda_version()
    if driver is None:
        return "none: no NVIDIA driver is installed"
    if driver < tuple(int(part) for part in torch.version.cuda.split(".")[:1]):
        return (
            f"none: the NVIDIA driver is too old. It allows CUDA {'.'.join(map(str, driver))}, this torch needs "
            f"{torch.version.cuda}: update the driver, or install a torch built for an older CUDA"
        )
    return "none visible (nvidia-smi, CUDA_VISIBLE_DEVICES)"


def _driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
