"""Builds the C++ modules of the tests: the CUDA kernels' emulation, and the machine that executes PTX with its kernels.

The modules of the CUDA kernels share their bindings (tests/emulation), so one ninja file builds both.
"""

import fcntl
import functools
import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

from apc_kernels import build

TESTS = Path(__file__).resolve().parents[1]
FOLDER = TESTS.parent / "build"
EMULATION = TESTS / "emulation"
RUNTIME = TESTS / "ptx" / "cuda" / "runtime.cpp"
FLAGS = ["-fPIC", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden"]
DEPENDENCIES = "-MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"


def build_module(folder: Path, lines: list[str], name: str) -> ModuleType:
    """Lets ninja build one module and imports it; of several processes the first builds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        command = [build.find_ninja(), "-C", str(folder), f"{name}.so"]
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rules(flags: list[str]) -> list[str]:
    """Returns ninja's rules for C++ files that may use pybind11."""
    import pybind11

    compiler = build.find_compiler()
    includes = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    flags = " ".join(map(build.quote, [*FLAGS, *flags, *includes]))
    return [
        f"rule cxx\n  command = {compiler} {flags} $optimize {DEPENDENCIES}",
        f"rule link\n  command = {compiler} -shared $in -o $out",
    ]


@functools.cache
def cuda_kernels(name: str) -> ModuleType:
    """Returns the module with the CUDA kernels: `cuda_emulation` by g++, or `ptx_cuda` by nvcc."""
    nvcc = build.find_nvcc()
    # PTX alone, not compressed: no ptxas, and runtime.cpp reads it where the program registers it.
    code = "-arch=compute_80 -code=compute_80 --no-compress -Xcompiler=-fvisibility=hidden,-O0"
    bindings, launches = ("affinities", "pyramid_pool"), ("affinities_launches", "pyramid_pool_launches")

    def compiled(rule: str, source: Path, folder: str, optimize: str = "-O0") -> str:
        return f"build {folder}/{source.stem}.o: {rule} {build.escape(source)}\n  optimize = {optimize}"

    def linked(module: str, folder: str, names: tuple[str, ...]) -> str:
        objects = [*(f"bindings/{name}.o" for name in bindings), *(f"{folder}/{name}.o" for name in names)]
        return f"build {module}.so: link {' '.join(objects)}"

    lines = [
        *rules([f"-I{EMULATION}", "-Wno-unknown-pragmas"]),
        *(compiled("cxx", EMULATION / f"{name}.cpp", "bindings") for name in bindings),
        *(compiled("cxx", EMULATION / f"{name}.cpp", "emulation", "-O1") for name in (*launches, "module", "selftest")),
        linked("cuda_emulation", "emulation", (*launches, "module", "selftest")),
    ]
    if nvcc:
        lines += [
            f"rule nvcc\n  command = {build.quote(nvcc)} {' '.join(build.nvcc_flags())} {code} -x cu {DEPENDENCIES}",
            *(compiled("nvcc", EMULATION / f"{name}.cpp", "ptx") for name in launches),
            compiled("cxx", RUNTIME, "ptx"),
            linked("ptx_cuda", "ptx", (*launches, "runtime")),
        ]
    return build_module(FOLDER / "cuda", lines, name)
