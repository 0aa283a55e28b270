"""Builds real wheels from copies of this checkout, in subprocesses and without network.

Each is built once for all the tests here: compiling the native library takes most of their time.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apc_kernels import build

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "apc_kernels", "apcnet", "csrc")
ABOUT_BUILDS = {"TORCH_CUDA_ARCH_LIST", "CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "TRITON_INTERPRET"}


@pytest.fixture(scope="session")
def python():
    """Runs this Python in an environment with no other settings for builds than the given ones."""

    def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if k not in ABOUT_BUILDS and not k.startswith("APC_KERNELS")}
        # No nvcc unless a test brings one: a CUDA library takes minutes to compile and is not what is tested here.
        environ = {"NVCC": "no-such-nvcc", **inherited, **environ}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture(scope="session")
def make_wheel(python):
    def make(checkout: Path, destination: Path, **environ: str) -> Path:
        command = ("setup.py", "-q", "bdist_wheel", "--dist-dir", str(destination))
        result = python(*command, cwd=checkout, **environ)
        assert result.returncode == 0, result.stdout + result.stderr
        (wheel,) = destination.glob("*.whl")
        return wheel

    return make


@pytest.fixture(scope="session")
def pure_wheel(make_wheel, tmp_path_factory) -> Path:
    """Builds a wheel without torch."""
    folder = tmp_path_factory.mktemp("pure")
    (folder / "hide").mkdir()
    (folder / "hide" / "torch.py").write_text('raise ImportError("hidden by the tests")\n')
    return make_wheel(copy_checkout(folder / "checkout"), folder / "dist", PYTHONPATH=str(folder / "hide"))


@pytest.fixture(scope="session")
def native_checkout(tmp_path_factory) -> Path:
    """Copies the checkout to a machine that can build the CPU library."""
    world = build.observe({})
    if not (world.compiler and world.ninja):
        pytest.skip(f"needs a C++ compiler and ninja; compiler: {world.compiler}, ninja: {world.ninja}")
    return copy_checkout(tmp_path_factory.mktemp("native") / "checkout")


@pytest.fixture(scope="session")
def native_wheel(make_wheel, native_checkout) -> Path:
    """Builds a wheel with the torch that runs the tests."""
    return make_wheel(native_checkout, native_checkout.parent / "dist")


def copy_checkout(folder: Path) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or newer")
    folder.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)
    for name in ("tests", "benchmarks", "build"):  # nothing of these belongs in a wheel
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
        (folder / name / "stray.py").touch()
    return folder
