"""python -m apc_kernels.info: versions, what is built and for what, which backend serves each operation and why."""

import importlib.metadata
import inspect
import os
import platform

import torch

import apc_kernels
from apc_kernels import dispatch, library


def operations() -> list[str]:
    """The public operations, in the order in which the package lists them."""
    public = ((name, getattr(apc_kernels, name)) for name in apc_kernels.__all__)
    return [name for name, function in public if _is_operation(function)]


def _is_operation(function) -> bool:
    return inspect.isfunction(function) and function.__module__.startswith("apc_kernels.ops.")


def versions() -> list[tuple[str, str]]:
    return [
        ("apc_kernels", f"{apc_kernels.__version__} in {apc_kernels.__path__[0]}"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("threads", f"{torch.get_num_threads()}, {openmp()}"),
        ("triton", _version("triton")),
        ("gpu", dispatch.gpu()),
    ]


def openmp() -> str:
    """What the environment tells OpenMP, and what that means where other programs run."""
    said = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "GOMP_", "KMP_"))
    ]
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        said.append("asleep while they wait, for spinning ones crawl on a busy machine")
    elif not said:
        said.append("spinning while they wait; on a busy machine OMP_WAIT_POLICY=PASSIVE is many times as fast")
    return ", ".join(said)


def libraries() -> list[tuple[str, str]]:
    rows = []
    for name, native in (("cpu library", library.cpu()), ("cuda library", library.cuda())):
        rows.append((name, f"{native.path or 'none'}: {native.reason}"))
    if library.cpu().loaded:
        rows.append(("instructions", _instruction_set()))
    if library.cuda().loaded:
        rows.append(("architectures", library.cuda().record["cuda"]["architectures"]))
    return rows


def serving() -> list[tuple[str, str]]:
    rows = []
    for operation in operations():
        built_on = getattr(inspect.getmodule(getattr(apc_kernels, operation)), "BUILT_ON", None)
        if built_on:
            rows.append((operation, f"built on {', '.join(built_on)}"))
            continue
        for device in ("cpu", "cuda"):
            name, passed_over = dispatch.explain(operation, device, torch.float32)
            why = "".join(f"; not {other}: {reason}" for other, reason in passed_over.items())
            wide, _ = dispatch.explain(operation, device, torch.float64)
            rows.append((f"{operation} on {device}", name + (f" (float64: {wide})" if wide != name else "") + why))
    return rows


def report() -> str:
    sections = [versions(), libraries(), serving()]
    width = max(len(label) for rows in sections for label, _ in rows)
    return "\n\n".join("\n".join(f"{label:<{width}}  {text}" for label, text in rows) for rows in sections)


def _instruction_set() -> str:
    try:
        return torch.ops.apc_kernels_cpp.instruction_set()
    except RuntimeError as error:  # APC_KERNELS_ISA names one that is not there
        return f"none: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
