"""Tests unpacked wheels far from the checkout: backends, messages without a library, and building later."""

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

LIBRARY = "apc_kernels/native/_C.abi3.so"

SERVED_BY_CPP = """
import torch, apc_kernels
from apc_kernels import library

x = torch.randn(1, 2, 8, 8)
with apc_kernels.backend("cpp"):
    pooled = apc_kernels.pyramid_pool(x)
with apc_kernels.backend("reference"):
    torch.testing.assert_close(pooled, apc_kernels.pyramid_pool(x))
print(library.cpu().path)
"""
SERVED_BY_REFERENCE = """
import warnings
import torch, apc_kernels

x = torch.randn(1, 2, 8, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert apc_kernels.pyramid_pool(x).shape == (1, 2, 50)
assert [w.category for w in caught] == [apc_kernels.SlowPathWarning], caught  # once, not at every call
print(apc_kernels.__file__, caught[0].message, sep="\\n")
try:
    with apc_kernels.backend("cpp"):
        apc_kernels.pyramid_pool(x)
except RuntimeError as error:
    print(error)
"""
# root may write anywhere, so os.access is made to say no.
BUILT_WITHOUT_WRITE_ACCESS = """
import os, sys
access = os.access
os.access = lambda path, mode, **options: mode != os.W_OK and access(path, mode, **options)
from apc_kernels import build
sys.exit(build.main())
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="native code is built on Linux only")


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def assert_served_by_cpp(python):
    def check(library: Path, **environ: str) -> None:
        result = python("-c", SERVED_BY_CPP, cwd=library.parent, **environ)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == str(library)

    return check


@pytest.fixture(scope="module")
def without_library(pure_wheel, python, tmp_path_factory) -> list[str]:
    """Checks the warning and the refusal of a forced backend where nothing was built."""
    folder = tmp_path_factory.mktemp("without_library")
    environ = {"PYTHONPATH": str(unpack(pure_wheel, folder / "site")), "XDG_CACHE_HOME": str(folder / "cache")}
    result = python("-c", SERVED_BY_REFERENCE, cwd=folder, **environ)
    assert result.returncode == 0, result.stderr
    file, warning, refusal = result.stdout.splitlines()
    assert Path(file).is_relative_to(folder)
    return [warning, refusal]


@pytest.fixture(scope="module")
def built_later(pure_wheel, native_checkout, python, tmp_path_factory):
    """Unpacks the wheel without libraries and runs `python -m apc_kernels.build`; returns (folder, environ, result)."""
    folder = tmp_path_factory.mktemp("built_later")
    environ = {"PYTHONPATH": str(unpack(pure_wheel, folder / "site")), "XDG_CACHE_HOME": str(folder / "cache")}
    return folder / "site", environ, python("-m", "apc_kernels.build", cwd=folder, **environ)


@pytest.mark.slow
def test_the_library_serves(native_wheel, assert_served_by_cpp, tmp_path):
    folder = unpack(native_wheel, tmp_path / "site")
    assert_served_by_cpp(folder / LIBRARY, PYTHONPATH=str(folder))


def test_without_it_the_reference_serves(without_library):
    warning, refusal = without_library
    assert "slower PyTorch reference" in warning
    assert "'cpp' was asked for" in refusal
    for text in without_library:
        assert "torch is not in the build environment" in text


def test_and_it_says_how_to_build(without_library):
    for text in without_library:
        assert "python -m apc_kernels.build" in text


@pytest.mark.slow
def test_building_later(built_later, assert_served_by_cpp):
    folder, environ, result = built_later
    assert result.returncode == 0, result.stdout + result.stderr
    assert "RuntimeWarning" not in result.stderr  # runpy's, of a module that it finds imported already
    assert re.search(r"cpu library +built", result.stdout)
    assert str(folder / "apc_kernels" / "native") in result.stdout
    (listing,) = folder.glob("*.dist-info/RECORD")  # what pip takes away when it uninstalls
    assert "apc_kernels/native/_C.abi3.so,," in listing.read_text().splitlines()
    assert_served_by_cpp(folder / LIBRARY, **environ)


@pytest.mark.slow
def test_building_later_without_the_right_to_write(built_later, assert_served_by_cpp, python, tmp_path):
    """Tests that the library then goes into the user's cache."""
    folder, environ, _ = built_later
    result = python("-c", BUILT_WITHOUT_WRITE_ACCESS, cwd=tmp_path, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    (library,) = Path(environ["XDG_CACHE_HOME"]).glob("apc_kernels/*/_C.abi3.so")
    assert str(library.parent) in result.stdout
    only_cached = shutil.copytree(folder, tmp_path / "site", ignore=shutil.ignore_patterns("native"))
    assert_served_by_cpp(library, **{**environ, "PYTHONPATH": str(only_cached)})
