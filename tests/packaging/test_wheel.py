"""Tests wheels built without torch, with torch and without a working nvcc, and the needs of the installed library."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from apc_kernels import library

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "apc_kernels/native/_C.abi3.so"
RECORD = "apc_kernels/native/native.json"
# Says that it was built for a CUDA (or for none), and has the headers and libraries of the torch that is really there.
POSED = f"""
import types
__file__, __version__, version = {torch.__file__!r}, "2.13.0+posed", types.SimpleNamespace(cuda=%r)
"""
FAILING_NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit
echo "out of luck"
exit 1
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native code is built on Linux only")


def contents(wheel: Path) -> tuple[set[str], dict]:
    """Returns the names of a wheel's files, and its record of the build."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist()), json.loads(archive.read(RECORD))


@pytest.fixture
def pose(tmp_path):
    """Puts a stand-in for torch first on the path."""

    def torch_for(cuda: str | None) -> dict[str, str]:
        (tmp_path / "posed").mkdir()
        (tmp_path / "posed" / "torch.py").write_text(POSED % cuda)
        return {"PYTHONPATH": str(tmp_path / "posed")}

    return torch_for


def test_without_torch(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names, record = contents(pure_wheel)
    assert {name for name in names if name.startswith("apc_kernels/native/")} == {RECORD}
    for device in ("cpu", "cuda"):
        assert not record[device]["built"]
        assert "torch is not in the build environment" in record[device]["reason"]


@pytest.mark.slow
def test_with_torch(native_wheel):
    assert re.fullmatch(r"apc_kernels-[\d.]+-cp310-abi3-linux_\w+\.whl", native_wheel.name)
    names, record = contents(native_wheel)
    assert record["cpu"]["built"]
    assert {name for name in names if name.startswith("apc_kernels/native/")} == {LIBRARY, RECORD}


def test_with_a_torch_that_does_not_import(native_checkout, make_wheel, tmp_path):
    """Tests that a CUDA torch without its libraries does not make an installation fail."""
    (tmp_path / "torch.py").write_text('raise OSError("libcudart.so.13: cannot open shared object file")\n')
    wheel = make_wheel(native_checkout, tmp_path / "dist", PYTHONPATH=str(tmp_path))
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize("kind", ["pure_wheel", pytest.param("native_wheel", marks=pytest.mark.slow)])
def test_what_every_wheel_holds(kind, request):
    names, _ = contents(request.getfixturevalue(kind))
    for source in (ROOT / "csrc").rglob("*.*"):  # all of them, so that the library can be built later
        assert f"apc_kernels/{source.relative_to(ROOT).as_posix()}" in names
    assert {"apc_kernels/py.typed", "apcnet/py.typed"} <= names
    for table in (ROOT / "apcnet" / "published.csv", *(ROOT / "apcnet" / "data" / "class_lists").iterdir()):
        assert table.relative_to(ROOT).as_posix() in names
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert f"{metadata}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"apc_kernels", "apcnet", metadata}
    assert not [name for name in names if Path(name).name in ("stray.py", "build.ninja") or name.endswith(".o")]


# The tests below build in the checkout that was built already: ninja compiles only what differs.


@pytest.mark.slow
def test_with_a_cuda_torch_but_no_nvcc(native_wheel, native_checkout, make_wheel, pose, tmp_path):
    names, record = contents(make_wheel(native_checkout, tmp_path / "dist", **pose("13.0")))
    assert LIBRARY in names
    assert not record["cuda"]["built"]
    assert "nvcc was not found" in record["cuda"]["reason"]


@pytest.mark.slow
def test_with_an_nvcc_that_fails(native_wheel, native_checkout, make_wheel, python, pose, tmp_path):
    (tmp_path / "nvcc").write_text(FAILING_NVCC)
    (tmp_path / "nvcc").chmod(0o755)
    environ = {**pose("13.0"), "NVCC": str(tmp_path / "nvcc")}
    names, record = contents(make_wheel(native_checkout, tmp_path / "dist", **environ))
    assert LIBRARY in names
    assert not record["cuda"]["built"]
    assert "out of luck" in record["cuda"]["reason"]

    forced = python("setup.py", "-q", "bdist_wheel", cwd=native_checkout, APC_KERNELS_FORCE_CUDA="1", **environ)
    assert forced.returncode != 0
    assert "out of luck" in forced.stderr
    assert "Traceback" not in forced.stderr


def test_demanding_cuda_of_a_torch_without_it(native_checkout, python, pose):
    result = python("setup.py", "-q", "bdist_wheel", cwd=native_checkout, APC_KERNELS_FORCE_CUDA="1", **pose(None))
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "APC_KERNELS_FORCE_CUDA" in line]
    assert line.startswith("apc_kernels: ")
    assert line.endswith("torch 2.13.0+posed is a build without CUDA")


# Of the library that is in use here: installing built it.


def inspect(tool: str, *arguments: str) -> list[str]:
    """Returns the output of a tool of binutils for a library."""
    path = library.cpu().path
    if path is None or shutil.which(tool) is None:
        pytest.skip(f"needs a CPU library, and {tool} of binutils")
    return subprocess.run([tool, *arguments, path], capture_output=True, text=True, check=True).stdout.splitlines()


def test_undefined_symbols():
    """Tests for torch's stable C shims and the C and C++ runtimes alone, so that one binary serves every torch."""
    lines = inspect("nm", "-D", "--undefined-only")
    undefined = {line.split()[-1]: line.split()[-2] for line in lines}  # name@version: U, or w for weak
    shims = {name for name in undefined if re.match(r"(aoti_torch|torch)_", name)}
    runtimes = {name for name in undefined if re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)}
    optional = {name for name in undefined if undefined[name] == "w" and re.match(r"_ITM_|__gmon_start__", name)}
    assert shims
    assert set(undefined) - shims - runtimes - optional == set()
    assert not [name for name in undefined if re.match(r"_Z\w*(2at|3c10|5torch)|_?Py[A-Z_]", name)]


def test_needed_libraries():
    lines = inspect("readelf", "-d")
    needed = {match[1] for line in lines if (match := re.search(r"\(NEEDED\).*\[(.+)\]", line))}
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.match("libgomp|libiomp|libtorch_(python|cuda)|libc10|libcu|libpy", name)]
    assert not [line for line in lines if "RPATH" in line or "RUNPATH" in line]  # a folder of the building machine
