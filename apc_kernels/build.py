"""Builds the compiled libraries: detects the toolchain, writes a ninja file, runs it and records the result.

`setup.py` does this during installation; `python -m apc_kernels.build` does it later. It needs a compiler, ninja and an
installed torch (for its headers), and never imports the rest of the package.

Environment variables: APC_KERNELS_SKIP_NATIVE=1 builds nothing, APC_KERNELS_FORCE_CUDA=1 fails if the CUDA library
cannot be built, TORCH_CUDA_ARCH_LIST ("8.0;9.0;10.0+PTX") lists the GPU architectures, MAX_JOBS limits parallel
compilations, CXX, CUDA_HOME and NVCC name the compilers.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "csrc").is_dir() and (PACKAGE.parent / "setup.py").is_file() else None
SOURCES = CHECKOUT / "csrc" if CHECKOUT else PACKAGE / "csrc"
RECORD = "native.json"
CPU_LIBRARY, CUDA_LIBRARY = "_C.abi3.so", "_C_cuda.abi3.so"

DESCRIPTION = "Build the compiled libraries of apc_kernels with the compilers of this machine."

TARGET = "2.11"  # the oldest torch that the libraries run on
TARGET_FLAG = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the same, as the headers read it
FLAGS = ["-O3", "-fPIC", "-std=c++20", "-fvisibility=hidden", TARGET_FLAG]
ENTRY = re.compile(r"(\d+)\.(\d+[a-z]?)(\+PTX)?")
INSTRUCTION_SETS = {"baseline": "x86-64", "x86_64_v3": "x86-64-v3", "x86_64_v4": "x86-64-v4"}
ARCHITECTURES, OLDER_ARCHITECTURES = "8.0;9.0;10.0+PTX", "8.0;9.0+PTX"  # the second for an nvcc older than 12.8


class BuildError(RuntimeError):
    """Reports that a requested library cannot be built; the message gives the reason."""


@dataclass(frozen=True)
class Toolchain:
    """Describes the tools that the decision depends on.

    A GPU is not among them: the machine that builds is often not the one that runs the code.
    """

    torch: str | None  # the version
    torch_cuda: str | None  # the CUDA version it was built for
    torch_path: str | None
    compiler: str | None
    ninja: str | None
    nvcc: str | None
    nvcc_cuda: str | None  # the CUDA version of nvcc


class Decision(NamedTuple):
    """Holds the decision about one library: whether to build it, and why."""

    build: bool
    reason: str


def observe(environ: Mapping[str, str] = os.environ) -> Toolchain:
    """Detects the installed torch, compiler, ninja and nvcc."""
    try:
        import torch
    except (ImportError, OSError):  # not installed, or a library it needs is missing
        torch = None
    nvcc = find_nvcc(environ)
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"])) if nvcc else None
    return Toolchain(
        torch=torch.__version__ if torch else None,
        torch_cuda=torch.version.cuda if torch else None,
        torch_path=str(Path(torch.__file__ or "").parent) if torch else None,
        compiler=find_compiler(environ),
        ninja=find_ninja(),
        nvcc=nvcc if version else None,
        nvcc_cuda=version[1] if version else None,
    )


def find_compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns CXX unchanged (it may be "ccache g++"), or the first compiler on PATH."""
    if environ.get("CXX"):
        return environ["CXX"] if shutil.which(environ["CXX"].split()[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the path of nvcc: NVCC, or the first in CUDA_HOME, CUDA_PATH, /usr/local/cuda and on PATH."""
    if environ.get("NVCC"):
        return shutil.which(environ["NVCC"])
    for home in (environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (nvcc := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return nvcc
    return shutil.which("nvcc")


def find_ninja() -> str | None:
    """Returns the path of ninja, first looking where pip installs scripts."""
    return shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")


def decide(toolchain: Toolchain, environ: Mapping[str, str] = os.environ) -> dict[str, Decision]:
    """Decides whether to build the CPU and the CUDA library. The first reason against building one is reported."""

    def first(*reasons_against: tuple[bool, str], otherwise: str) -> Decision:
        reason = next((reason for holds, reason in reasons_against if holds), None)
        return Decision(reason is None, reason or otherwise)

    force_cuda = _is_set(environ, "APC_KERNELS_FORCE_CUDA")
    common = (
        (_is_set(environ, "APC_KERNELS_SKIP_NATIVE"), "APC_KERNELS_SKIP_NATIVE is set"),
        (sys.platform != "linux", f"the libraries are built on Linux only, this is {sys.platform}"),
        (
            toolchain.torch is None,
            "torch is not in the build environment (install torch, then use pip install --no-build-isolation)",
        ),
        (
            toolchain.torch is not None and _numbers(toolchain.torch) < _numbers(TARGET),
            f"torch {toolchain.torch} is older than {TARGET}",
        ),
        (toolchain.compiler is None, "no C++ compiler was found (set CXX, or install g++ or clang++)"),
        (toolchain.ninja is None, "ninja was not found (pip install ninja)"),
    )
    cpu = first(*common, otherwise=f"torch {toolchain.torch} and {toolchain.compiler}")
    cuda = first(
        *common,
        (toolchain.torch_cuda is None, f"torch {toolchain.torch} is a build without CUDA"),
        (toolchain.nvcc is None, "nvcc was not found (install the CUDA toolkit, or set CUDA_HOME or NVCC)"),
        (
            _numbers(toolchain.torch_cuda)[:1] != _numbers(toolchain.nvcc_cuda)[:1],
            f"nvcc is CUDA {toolchain.nvcc_cuda}, torch was built for CUDA {toolchain.torch_cuda}",
        ),
        otherwise=f"torch {toolchain.torch} for CUDA {toolchain.torch_cuda} and nvcc {toolchain.nvcc_cuda}",
    )
    if force_cuda and not cuda.build:
        raise BuildError(f"APC_KERNELS_FORCE_CUDA is set, but the CUDA library cannot be built: {cuda.reason}")
    return {"cpu": cpu, "cuda": cuda}


def architectures(environ: Mapping[str, str] = os.environ, nvcc_cuda: str | None = None) -> list[str]:
    """Returns the entries of TORCH_CUDA_ARCH_LIST from 8.0 on: older tensor cores lack the kernels' instructions."""
    usual = OLDER_ARCHITECTURES if nvcc_cuda and _numbers(nvcc_cuda) < (12, 8) else ARCHITECTURES
    given = environ.get("TORCH_CUDA_ARCH_LIST") or usual
    kept = [entry for entry in re.split(r"[;,\s]+", given) if int(_architecture(entry)[0]) >= 8]
    if not kept:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected an architecture from 8.0 on, got {given!r}")
    return kept


def _architecture(entry: str) -> tuple[str, str, str | None]:
    """Splits an entry like 10.0+PTX into the major number, the minor one and the suffix."""
    match = ENTRY.fullmatch(entry)
    if not match:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 10.0+PTX, got {entry!r}")
    return match[1], match[2], match[3]


def code_options(entries: Sequence[str]) -> list[str]:
    """Returns nvcc's -gencode options for a list of architectures."""
    options = []
    for major, minor, ptx in map(_architecture, entries):
        options.append(f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}")
        if ptx:
            options.append(f"-gencode=arch=compute_{major}{minor},code=compute_{major}{minor}")
    return options


def has_code(entries: Sequence[str], capability: tuple[int, int]) -> bool:
    """Tells whether code for these architectures runs on a GPU: code of its generation, or PTX that is not newer."""
    for major, minor, ptx in map(_architecture, entries):
        compiled = int(major), int(minor.rstrip("abcdefghijklmnopqrstuvwxyz"))
        if minor.isdigit() and compiled <= capability and (ptx or compiled[0] == capability[0]):
            return True
        if not minor.isdigit() and compiled == capability:  # 9.0a is for 9.0 alone
            return True
    return False


def source_files() -> list[Path]:
    """Returns all C++ and CUDA source files, sorted."""
    return sorted(path for path in SOURCES.rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"})


def cuda_files() -> list[Path]:
    """Returns the source files of the CUDA library, sorted."""
    return sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*_cuda.cpp")])


def source_hash() -> str:
    """Returns a hash of the sources, which tells libraries of other versions apart."""
    digest = hashlib.sha256(TARGET.encode())
    for path in source_files():
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def user_cache() -> Path:
    """Returns the folder for libraries that are built later, if the package's own folder is not writable."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "apc_kernels" / f"{platform.machine()}-{source_hash()}"


def ninja_file(toolchain: Toolchain, decisions: dict[str, Decision], environ: Mapping[str, str] = os.environ) -> str:
    """Returns the text of build.ninja.

    Files *_cpu.cpp are compiled for each instruction set. Files *_cuda.cpp, compiled by nvcc for its include path, and
    *.cu make the CUDA library. The former include torch's headers, which nvcc would read in the latter once for each
    architecture.
    """
    assert toolchain.torch_path, "decide() builds nothing without torch"
    targets = code_options(architectures(environ, toolchain.nvcc_cuda)) if decisions["cuda"].build else []
    include = f"-isystem {quote(Path(toolchain.torch_path) / 'include')}"
    torch_libraries = f"-L{quote(Path(toolchain.torch_path) / 'lib')}"
    lines = [
        f"cxx = {toolchain.compiler}",
        f"nvcc = {quote(toolchain.nvcc or '')}",
        f"flags = {' '.join(FLAGS)} -Wall -Wextra {include}",
        f"cuda_flags = {' '.join([*nvcc_flags(environ), *targets])} {include}",
        f"link = -shared {torch_libraries} -Wl,--no-as-needed",
        "rule cxx\n  command = $cxx $flags $set -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule cuda\n  command = $nvcc $cuda_flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule library\n  command = $cxx $in -o $out $link $libraries",
        f"cuda_link = -shared {torch_libraries} -Xlinker --no-as-needed",
        "rule cuda_library\n  command = $nvcc $in -o $out $cuda_link $libraries",
    ]
    objects = []
    for source in set(SOURCES.rglob("*.cpp")) - set(SOURCES.rglob("*_cuda.cpp")):
        is_kernel, stem = source.stem.endswith("_cpu"), source.relative_to(SOURCES).with_suffix("").as_posix()
        for name, march in _instruction_sets().items() if is_kernel else [("", "")]:
            target = f"objects/{stem}{name and '.'}{name}.o"
            lines.append(f"build {target}: cxx {escape(source)}")
            if is_kernel:
                lines.append(f"  set = -DAPC_ISA={name} {march}")
            objects.append(target)
    lines.append(f"build {CPU_LIBRARY}: library {' '.join(sorted(objects))}\n  libraries = -ltorch_cpu -ltorch")
    if decisions["cuda"].build:
        objects = []
        for source in cuda_files():
            objects.append(f"objects/{source.relative_to(SOURCES).as_posix()}.o")
            lines.append(f"build {objects[-1]}: cuda {escape(source)}")
        lines.append(
            f"build {CUDA_LIBRARY}: cuda_library {' '.join(sorted(objects))}\n"
            "  libraries = -ltorch_cpu -ltorch_cuda -ltorch"
        )
    return "\n".join(lines) + "\n"


def nvcc_flags(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the flags of nvcc, except for architectures and include paths."""
    host = [f"-ccbin={quote(environ['CXX'])}"] if environ.get("CXX") and " " not in environ["CXX"] else []
    own = [
        "-O3",
        "-std=c++20",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-DUSE_CUDA",
        "-lineinfo",
        "--expt-relaxed-constexpr",
    ]
    return [*host, *own, TARGET_FLAG]


def build(folder: Path, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Builds the libraries that can be built into `folder`, and returns the record, which it also writes there.

    Raises a BuildError only if APC_KERNELS_FORCE_CUDA is set and cannot be satisfied.
    """
    toolchain = observe(environ)
    decisions = decide(toolchain, environ)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        return _build(folder, toolchain, decisions, environ)


def _build(
    folder: Path, toolchain: Toolchain, decisions: dict[str, Decision], environ: Mapping[str, str]
) -> dict[str, Any]:
    record = {
        "sources": source_hash(),
        "target": TARGET,
        "world": {name: getattr(toolchain, name) for name in ("torch", "torch_cuda", "nvcc_cuda")},
    }
    if decisions["cpu"].build:
        (folder / "build.ninja").write_text(ninja_file(toolchain, decisions, environ))
    for device, library in (("cpu", CPU_LIBRARY), ("cuda", CUDA_LIBRARY)):
        decision = decisions[device]
        if decision.build:
            assert toolchain.ninja, "decide() builds nothing without ninja"
            failure = _run_ninja(toolchain.ninja, folder, library, environ)
            if failure and device == "cuda" and _is_set(environ, "APC_KERNELS_FORCE_CUDA"):
                raise BuildError(f"APC_KERNELS_FORCE_CUDA is set, but the CUDA library failed to compile:\n{failure}")
            if failure:
                decision = Decision(False, f"compilation failed: {failure}")
        if not decision.build:
            (folder / library).unlink(missing_ok=True)
        record[device] = {"built": decision.build, "reason": decision.reason}
    if record["cuda"]["built"]:
        record["cuda"]["architectures"] = ";".join(architectures(environ, toolchain.nvcc_cuda))
    _write(folder / RECORD, record)
    return record


def install(record: dict[str, Any], folder: Path, destination: Path) -> None:
    """Copies the built libraries and their record to the folder where the package looks for them."""
    destination.mkdir(parents=True, exist_ok=True)
    for device, library in (("cpu", CPU_LIBRARY), ("cuda", CUDA_LIBRARY)):
        if record[device]["built"]:
            partial = destination / f"{library}.{os.getpid()}"
            shutil.copy2(folder / library, partial)
            partial.replace(destination / library)  # atomic: another process may be loading the library
        else:
            (destination / library).unlink(missing_ok=True)
    _write(destination / RECORD, record)


def summary(record: dict[str, Any]) -> str:
    """Returns one line for each library: what it was built with, or why it was not built."""
    lines = []
    for device in ("cpu", "cuda"):
        outcome = "built with" if record[device]["built"] else "not built:"
        lines.append(f"{device + ' library':<13} {outcome} {record[device]['reason']}")
    return "\n".join(lines)


def main() -> int:
    """Runs the build from the command line and returns the exit status: 0 if the CPU library was built."""
    parser = argparse.ArgumentParser(prog="python -m apc_kernels.build", description=DESCRIPTION)
    parser.parse_args()
    if CHECKOUT:
        folder = CHECKOUT / "build" / "native"
        record = build(folder)
    else:
        destination = PACKAGE / "native" if os.access(PACKAGE, os.W_OK) else user_cache()
        folder = user_cache() / "objects"
        record = build(folder)
        install(record, folder, destination)
        if destination.parent == PACKAGE:
            _tell_pip(destination)
        folder = destination
    print(f"{summary(record)}\n{'folder':<13} {folder}")
    return 0 if record["cpu"]["built"] else 1


def _tell_pip(folder: Path) -> None:
    """Adds the libraries to pip's list of installed files, so that `pip uninstall` removes them too."""
    try:
        installed = importlib.metadata.files("apc_kernels") or []
    except importlib.metadata.PackageNotFoundError:  # not installed by pip: a folder on PYTHONPATH
        return
    for record in (file.locate() for file in installed if file.name == "RECORD"):
        with open(record, "a") as listing:
            for library in sorted(folder.glob("*.so")):
                if library.relative_to(PACKAGE.parent).as_posix() not in {str(file) for file in installed}:
                    listing.write(f"{library.relative_to(PACKAGE.parent).as_posix()},,\n")


def _write(file: Path, record: dict[str, Any]) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(file)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder for one build at a time: several processes of a job may start the same build."""
    if sys.platform != "linux":
        yield
        return
    import fcntl

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _instruction_sets() -> dict[str, str]:
    if platform.machine() in {"x86_64", "AMD64"}:
        return {name: f"-march={march}" for name, march in INSTRUCTION_SETS.items()}
    return {"baseline": ""}


def _run_ninja(ninja: str, folder: Path, target: str, environ: Mapping[str, str]) -> str | None:
    jobs = ["-j", environ["MAX_JOBS"]] if environ.get("MAX_JOBS") else []
    result = subprocess.run([ninja, *jobs, "-C", str(folder), target], capture_output=True, text=True)
    return None if result.returncode == 0 else result.stdout[-4000:] + result.stderr[-1000:]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _is_set(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() not in {"", "0", "false", "no"}


def _numbers(version: str | None) -> tuple[int, ...]:
    """Returns the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version or "")[:2])


def quote(path: Path | str) -> str:
    """Quotes a path for use in a command, which ninja passes to the shell."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: Path | str) -> str:
    """Escapes a path for use in a build statement of ninja."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BuildError as error:
        sys.exit(f"apc_kernels: {error}")
