"""Builds wheels for real, from copies of this checkout: what is in them, what serves once they are unpacked.

In subprocesses, without network, in four worlds: without torch, with torch, with a CUDA torch but no working nvcc, and
with a CUDA library that was demanded and cannot be. The native library is compiled twice, everything else is quick.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from apc_kernels import build

pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or newer")

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "apc_kernels", "apcnet", "csrc")
LIBRARY = "apc_kernels/native/_C.abi3.so"
RECORD = "apc_kernels/native/native.json"
ABSENT = {"NVCC": "no-such-nvcc"}  # a CUDA library takes minutes; whether it can be compiled is tested elsewhere

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="native code is built on Linux only"),
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="these tests need the checkout"),
]
world = build.observe(ABSENT)
needs_compiler = pytest.mark.skipif(
    not (world.compiler and world.ninja), reason=f"compiler: {world.compiler}, ninja: {world.ninja}; needs both"
)

HIDDEN = 'raise ImportError("hidden by the test")'
# Looks like a CUDA torch (or like one without), but has the real one's headers and libraries.
POSED = f"""
import types
__file__, __version__, version = {torch.__file__!r}, "2.13.0+posed", types.SimpleNamespace(cuda=%r)
"""


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
    """python with the given arguments, and an environment that says nothing about builds but what is given."""
    about_builds = {"TORCH_CUDA_ARCH_LIST", "CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "TRITON_INTERPRET"}
    inherited = {k: v for k, v in os.environ.items() if k not in about_builds and not k.startswith("APC_KERNELS")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**inherited, **environ}, capture_output=True, text=True, timeout=600
    )


def copy_checkout(folder: Path) -> Path:
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / name).is_file():
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("tests", "benchmarks", "build"):  # nothing of these belongs in a wheel
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
        (folder / name / "stray.py").touch()
    return folder


def torch_instead(folder: Path, text: str) -> dict[str, str]:
    folder.mkdir()
    (folder / "torch.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def failing_nvcc(path: Path) -> str:
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.88" && exit\necho "out of luck"; exit 1\n')
    path.chmod(0o755)
    return str(path)


def make_wheel(checkout: Path, destination: Path, **environ: str) -> Path:
    result = run("setup.py", "-q", "bdist_wheel", "--dist-dir", str(destination), cwd=checkout, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = destination.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def record_in(wheel: Path) -> dict:
    return json.loads(zipfile.ZipFile(wheel).read(RECORD))


def unpack(wheel: Path, folder: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pure")
    return make_wheel(
        copy_checkout(folder / "checkout"), folder / "dist", **torch_instead(folder / "hide", HIDDEN), **ABSENT
    )


@pytest.fixture(scope="module")
def native_checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("native") / "checkout")


@pytest.fixture(scope="module")
def native_wheel(native_checkout):
    return make_wheel(native_checkout, native_checkout.parent / "dist", **ABSENT)


@pytest.fixture(scope="module")
def built_later(pure_wheel, tmp_path_factory):
    """The wheel without libraries, unpacked, and `python -m apc_kernels.build` run in it: (folder, result, environ)."""
    folder = unpack(pure_wheel, tmp_path_factory.mktemp("built_later") / "site")
    environ = {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder.parent / "cache"), **ABSENT}
    return folder, run("-m", "apc_kernels.build", cwd=folder.parent, **environ), environ


def test_without_torch_the_wheel_is_pure(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    record = record_in(pure_wheel)
    for device in ("cpu", "cuda"):
        assert not record[device]["built"]
        assert "torch is not in the build environment" in record[device]["reason"]
    assert not [name for name in names_in(pure_wheel) if name.endswith(".so")]


@needs_compiler
def test_with_torch_the_wheel_holds_the_library(native_wheel):
    assert re.fullmatch(r"apc_kernels-[\d.]+-cp310-abi3-linux_\w+\.whl", native_wheel.name)
    assert record_in(native_wheel)["cpu"]["built"]
    native = {name for name in names_in(native_wheel) if name.startswith("apc_kernels/native/")}
    assert native == {LIBRARY, RECORD}


@pytest.mark.parametrize("kind", ["pure_wheel", pytest.param("native_wheel", marks=needs_compiler)])
def test_what_every_wheel_holds(kind, request):
    wheel = request.getfixturevalue(kind)
    names = names_in(wheel)
    sources = {path.relative_to(build.SOURCES).as_posix() for path in build.source_files()}
    assert {f"apc_kernels/csrc/{source}" for source in sources} <= names, "the library could not be built later"
    (metadata,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert f"{metadata}/licenses/LICENSE" in names
    assert {name.split("/")[0] for name in names} == {"apc_kernels", "apcnet", metadata}
    assert not [name for name in names if Path(name).name in ("stray.py", "build.ninja") or name.endswith(".o")]


@needs_compiler
def test_with_a_cuda_torch_but_no_nvcc(native_wheel, native_checkout, tmp_path):
    """In the checkout that is built already, so that only the CUDA half is new."""
    cuda_torch = torch_instead(tmp_path / "torch", POSED % "13.0")
    wheel = make_wheel(native_checkout, tmp_path / "dist", **cuda_torch, **ABSENT)
    assert LIBRARY in names_in(wheel)
    assert "nvcc was not found" in record_in(wheel)["cuda"]["reason"]


@needs_compiler
def test_with_an_nvcc_that_fails(native_wheel, native_checkout, tmp_path):
    environ = {**torch_instead(tmp_path / "torch", POSED % "13.0"), "NVCC": failing_nvcc(tmp_path / "nvcc")}
    wheel = make_wheel(native_checkout, tmp_path / "dist", **environ)
    assert LIBRARY in names_in(wheel)
    assert not record_in(wheel)["cuda"]["built"]
    assert "out of luck" in record_in(wheel)["cuda"]["reason"]

    forced = run("setup.py", "-q", "bdist_wheel", cwd=native_checkout, APC_KERNELS_FORCE_CUDA="1", **environ)
    assert forced.returncode != 0
    assert "out of luck" in forced.stderr
    assert "Traceback" not in forced.stderr


@needs_compiler
def test_demanding_cuda_of_a_torch_without_it(native_checkout, tmp_path):
    cpu_torch = torch_instead(tmp_path / "torch", POSED % None)
    result = run("setup.py", "-q", "bdist_wheel", cwd=native_checkout, APC_KERNELS_FORCE_CUDA="1", **cpu_torch)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "APC_KERNELS_FORCE_CUDA" in line]
    assert line.startswith("apc_kernels: ")
    assert line.endswith("torch 2.13.0+posed is a build without CUDA")


SERVED_BY_CPP = """
import torch, apc_kernels
from apc_kernels import library

x = torch.randn(1, 2, 8, 8)
with apc_kernels.backend("cpp"):
    fast = apc_kernels.pyramid_pool(x)
with apc_kernels.backend("reference"):
    torch.testing.assert_close(fast, apc_kernels.pyramid_pool(x))
print(library.cpu().path)
"""
SERVED_BY_REFERENCE = """
import json, warnings
import torch, apc_kernels

x = torch.randn(1, 2, 8, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [apc_kernels.pyramid_pool(x) for _ in range(2)]
assert results[0].shape == (1, 2, 50)
try:
    with apc_kernels.backend("cpp"):
        apc_kernels.pyramid_pool(x)
except RuntimeError as error:
    refusal = str(error)
warned = [str(w.message) for w in caught if w.category is apc_kernels.SlowPathWarning]
print(json.dumps({"file": apc_kernels.__file__, "warned": warned, "refusal": refusal}))
"""


def assert_served_by_cpp(library: Path, **environ: str) -> None:
    result = run("-c", SERVED_BY_CPP, cwd=library.parent, **environ)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(library)


@needs_compiler
def test_the_unpacked_library_serves(native_wheel, tmp_path):
    folder = unpack(native_wheel, tmp_path / "site")
    assert_served_by_cpp(folder / LIBRARY, PYTHONPATH=str(folder))


def test_without_the_library_the_reference_serves(pure_wheel, tmp_path):
    folder = unpack(pure_wheel, tmp_path / "site")
    result = run("-c", SERVED_BY_REFERENCE, cwd=tmp_path, PYTHONPATH=str(folder), XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert Path(said["file"]).is_relative_to(folder)
    (warning,) = said["warned"]  # once, not at every call
    for text in (warning, said["refusal"]):
        assert "torch is not in the build environment" in text
    assert "'cpp' was asked for" in said["refusal"]
    assert "python -m apc_kernels.build" in warning


@needs_compiler
def test_building_later(built_later):
    folder, result, environ = built_later
    assert result.returncode == 0, result.stdout + result.stderr
    assert "RuntimeWarning" not in result.stderr  # runpy's, of a module that it finds imported already
    assert re.search(r"cpu library +built", result.stdout)
    assert str(folder / "apc_kernels" / "native") in result.stdout
    assert_served_by_cpp(folder / LIBRARY, **environ)


@needs_compiler
def test_building_later_without_the_right_to_write(built_later, tmp_path):
    """The user's cache then takes the library. root may write anywhere, so os.access is made to say no."""
    folder, _, environ = built_later
    script = "import os, sys; os.access = lambda *_: False; from apc_kernels import build; sys.exit(build.main())"
    result = run("-c", script, cwd=tmp_path, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    (library,) = Path(environ["XDG_CACHE_HOME"]).glob("apc_kernels/*/_C.abi3.so")
    assert str(library.parent) in result.stdout
    only_cached = shutil.copytree(folder, tmp_path / "site", ignore=shutil.ignore_patterns("native"))
    assert_served_by_cpp(library, **{**environ, "PYTHONPATH": str(only_cached)})


def inspect(tool: str, *arguments: str | Path) -> list[str]:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (binutils) is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


@needs_compiler
def test_undefined_symbols(native_wheel, tmp_path):
    """Only torch's C shims, which it keeps stable, and the C and C++ runtimes: so one binary serves every torch."""
    lines = inspect("nm", "-D", "--undefined-only", unpack(native_wheel, tmp_path) / LIBRARY)
    undefined = {line.split()[-1]: line.split()[-2] for line in lines}  # name@version: U, or w for weak
    shims = {name for name in undefined if re.match(r"(aoti_torch|torch)_", name)}
    runtime = {name for name in undefined if re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)}
    weak = {name for name in undefined if undefined[name] == "w" and re.match(r"_ITM_|__gmon_start__", name)}
    assert shims
    assert set(undefined) - shims - runtime - weak == set()
    assert not [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)|_?Py[A-Z_]", name)]


@needs_compiler
def test_needed_libraries(native_wheel, tmp_path):
    lines = inspect("readelf", "-d", unpack(native_wheel, tmp_path) / LIBRARY)
    needed = {match[1] for line in lines if (match := re.search(r"\(NEEDED\).*\[(.+)\]", line))}
    assert "libtorch_cpu.so" in needed
    for unwanted in ("libgomp", "libiomp", "libtorch_python", "libtorch_cuda", "libc10_cuda", "libcudart", "libpython"):
        assert not [name for name in needed if name.startswith(unwanted)]
    assert not [line for line in lines if "RPATH" in line or "RUNPATH" in line]  # a folder of the building machine
