"""Reports versions, compiled libraries and the backend that serves each operation: `python -m apc_kernels.info`."""

import ctypes
import importlib.metadata
import os
import platform

import torch

import apc_kernels
from apc_kernels import library
from apc_kernels.ops import affinities, augment, conv3x3, encode, pyramid_conv, pyramid_pool, pyramid_reduce, upsample

SERVED_BY = {  # each public operation: its own kernels, or the operations it is composed of
    "adaptive_context": affinities.KERNELS,
    "adaptive_context_norm": "adaptive_context and affinity_moments",
    "affinity_moments": affinities.KERNELS,
    "augment": augment.KERNELS,
    "conv1x1": conv3x3.KERNELS,
    "conv3x3": conv3x3.KERNELS,
    "encode": encode.KERNELS,
    "pyramid_conv": pyramid_conv.KERNELS,
    "pyramid_pool": pyramid_pool.KERNELS,
    "pyramid_reduce": pyramid_reduce.KERNELS,
    "upsample_argmax": upsample.KERNELS,
    "upsample_binary_cross_entropy": "upsample_cross_entropy",
    "upsample_confusion": upsample.KERNELS,
    "upsample_cross_entropy": upsample.KERNELS,
    "upsample_region_sums": upsample.KERNELS,
    "upsample_softmax": upsample.KERNELS,
}


def versions() -> list[tuple[str, str]]:
    """Returns the rows about the package, Python, PyTorch, threads and the GPU."""
    return [
        ("apc_kernels", f"{apc_kernels.__version__} in {apc_kernels.__path__[0]}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("threads", f"{torch.get_num_threads()}, {openmp()}"),
        ("triton", _version("triton")),
        ("gpu", gpu()),
    ]


def openmp() -> str:
    """Returns the OpenMP settings of the environment, and the effect of the wait policy on a busy machine."""
    variables = sorted(os.environ.items())
    settings = [f"{name}={value}" for name, value in variables if name.startswith(("OMP_", "GOMP_", "KMP_"))]
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        settings.append("idle threads sleep, which is right for a busy machine")
    elif not settings:
        settings.append(
            "idle threads spin; on a busy machine set OMP_WAIT_POLICY=PASSIVE, it is many times faster there"
        )
    return ", ".join(settings)


def libraries() -> list[tuple[str, str]]:
    """Returns the rows about the compiled libraries."""
    rows = []
    for name, native in (("cpu library", library.cpu()), ("cuda library", library.cuda())):
        rows.append((name, f"{native.path}, built with {native.reason}" if native.loaded else f"none: {native.reason}"))
    if library.cpu().loaded:
        rows.append(("instructions", _instruction_set()))
    if library.cuda().loaded:
        rows.append(("architectures", library.cuda().record["cuda"]["architectures"]))
    return rows


def explain(operation: str, device: str, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """Returns the backend that serves an operation, and for each preferred one the reason why it cannot."""
    return SERVED_BY[operation].explain(operation, device, dtype)


def why_not(backend: str, operation: str, device: str, dtype: torch.dtype) -> str | None:
    """Returns the reason why a backend cannot serve an operation, or None if it can."""
    return SERVED_BY[operation].why_not(backend, operation, device, dtype)


def serving() -> list[tuple[str, str]]:
    """Returns a row for each operation and device: the backend that serves it, and why not a preferred one."""
    rows = []
    for operation, kernels in SERVED_BY.items():
        if isinstance(kernels, str):
            rows.append((operation, f"composed of {kernels}"))
            continue
        for device in ("cpu", "cuda"):
            name, passed_over = explain(operation, device, kernels.dtypes[0])
            why = "".join(f"; not {other}: {reason}" for other, reason in passed_over.items())
            wide = name
            if torch.float64 in kernels.dtypes:
                wide, _ = explain(operation, device, torch.float64)
            rows.append((f"{operation} on {device}", name + (f" (float64: {wide})" if wide != name else "") + why))
    return rows


def kernels(device: str) -> dict[str, str]:
    """Returns what decides the bits of float32 results: version, instruction set, and the backends of operations.

    A forced backend counts. Images are augmented on the CPU, whatever the device.
    """
    served: dict[str, list[str]] = {}
    for operation, served_by in SERVED_BY.items():
        if not isinstance(served_by, str):
            dtype = served_by.dtypes[0]
            x = torch.empty(0, dtype=dtype, device=device if dtype.is_floating_point else "cpu")
            try:
                served.setdefault(served_by.select(operation, x), []).append(operation)
            except RuntimeError:  # a forced backend cannot serve it
                served.setdefault("none", []).append(operation)
    sources = library.cpu().record.get("sources", "")[:12]
    backends = [f"{name} ({', '.join(operations)})" for name, operations in served.items()]
    return {
        "apc_kernels": f"{apc_kernels.__version__} {sources}".strip(),
        "backend": "; ".join(backends if len(served) > 1 else served),
        "instructions": _instruction_set() if library.cpu().loaded else "none",
    }


def report() -> str:
    """Returns the whole report as text."""
    sections = [versions(), libraries(), serving()]
    width = max(len(label) for rows in sections for label, _ in rows)
    return "\n\n".join("\n".join(f"{label:<{width}}  {text}" for label, text in rows) for rows in sections)


def _instruction_set() -> str:
    try:
        return torch.ops.apc_kernels_cpp.instruction_set()
    except RuntimeError as error:  # APC_KERNELS_ISA names an unknown one
        return f"none: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def gpu() -> str:
    """Returns the name of the GPU that torch uses, or the reason why it uses none."""
    if torch.version.hip:
        if not torch.cuda.is_available():
            return "none: no AMD GPU is visible (check rocminfo and HIP_VISIBLE_DEVICES)"
        properties = torch.cuda.get_device_properties()
        return f"{properties.name} ({properties.gcnArchName.split(':')[0]})"
    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} is a build without CUDA"
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
    return "none: no GPU is visible (check nvidia-smi and CUDA_VISIBLE_DEVICES)"


def _driver_cuda_version() -> tuple[int, int] | None:
    """Returns the newest CUDA version that the installed driver supports, or None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


if __name__ == "__main__":
    print(report())
