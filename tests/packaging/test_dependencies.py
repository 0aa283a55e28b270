"""Tests what an installation needs: the wheel in a virtual environment with the packages it asks for and no others.

The packages are links to those of the environment that runs the tests: nothing is downloaded.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import apc_kernels
import apcnet

ROOT = Path(__file__).resolve().parents[2]
EXTRA = {"pillow", "rich", "safetensors", "tyro"}
LINE = "apcnet needs pillow, rich, safetensors and tyro: pip install 'apc_kernels[apcnet]', "
LINE += "or in a clone pip install '.[apcnet]'"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="wheels are for Linux")


def needs(distribution: importlib.metadata.Distribution, extra: str = "") -> set[str]:
    """The names of the packages that a distribution, or one of its extras, requires here."""
    requirements = [Requirement(text) for text in distribution.requires or []]
    return {need.name for need in requirements if need.marker is None or need.marker.evaluate({"extra": extra})}


def with_theirs(names: set[str]) -> Iterator[importlib.metadata.Distribution]:
    """Yields the named distributions and everything that they need in turn."""
    seen, waiting = set(), sorted(names)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            yield (distribution := importlib.metadata.distribution(name))
            waiting.extend(needs(distribution))


class Installation:
    """Holds a virtual environment with the wheel, and links to the packages named."""

    def __init__(self, folder: Path, wheel: Path):
        venv.create(folder, with_pip=False)
        self.bin, (self.site,) = folder / "bin", folder.glob("lib/python*/site-packages")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.bin / "python")]
        subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
        (self.metadata,) = importlib.metadata.distributions(path=[str(self.site)])

    def link(self, names: set[str]) -> None:
        for distribution in with_theirs(names):
            for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
                if not (self.site / top).exists():
                    (self.site / top).symlink_to(distribution.locate_file(top))

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess:
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.bin / program), *arguments]
        return subprocess.run(command, cwd=self.site.parent, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bare(pure_wheel, tmp_path_factory) -> Installation:
    """`pip install apc_kernels`."""
    installation = Installation(tmp_path_factory.mktemp("bare"), pure_wheel)
    installation.link(needs(installation.metadata))
    return installation


def test_requirements(bare):
    assert needs(bare.metadata) == {"torch", "numpy"}
    assert needs(bare.metadata, "apcnet") == {"torch", "numpy", *EXTRA}
    extras = bare.metadata.metadata.get_all("Provides-Extra")
    for extra in {"test", "onnx", "tiff", "timm", "tensorboard", "wandb"} & set(extras):
        assert "apc_kernels" in needs(bare.metadata, extra), f"{extra} is of no use without apcnet"


def test_the_operations_need_torch_and_numpy_alone(bare):
    program = "import torch, apc_kernels; print(apc_kernels.pyramid_pool(torch.ones(1, 2, 8, 8)).shape[2])"
    run = bare.run("python", "-W", "ignore", "-c", program)
    assert (run.stdout, run.returncode) == ("50\n", 0), run.stderr
    run = bare.run("python", "-m", "apc_kernels.info")
    assert run.returncode == 0 and f" {apc_kernels.__version__} in {bare.site}" in run.stdout, run.stderr


@pytest.mark.parametrize("command", [("apcnet", "train"), ("python", "-m", "apcnet", "--help")], ids=" ".join)
def test_the_command_says_in_one_line_what_it_needs(bare, command):
    run = bare.run(*command)
    assert (run.returncode, run.stdout, run.stderr) == (1, "", f"{LINE}\n")


def test_the_library_says_the_same_line_in_an_error_that_can_be_caught(bare):
    run = bare.run("python", "-c", "import apcnet.data")
    assert run.returncode == 1 and run.stderr.endswith(f"\nModuleNotFoundError: {LINE}\n")
    run = bare.run("python", "-c", "try: import apcnet\nexcept ImportError as error: print(error)")
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{LINE}\n", "")


def test_the_extra_is_enough(pure_wheel, tmp_path):
    installation = Installation(tmp_path / "whole", pure_wheel)
    installation.link({"torch", "numpy", "pillow", "safetensors"})
    library = "import apcnet; print(apcnet.create('fcn', 'resnet18', 2).num_classes, apcnet.__version__)"
    run = installation.run("python", "-c", library)  # neither rich nor tyro: both are the command's
    assert (run.returncode, run.stdout) == (0, f"2 {apc_kernels.__version__}\n"), run.stderr
    run = installation.run("apcnet", "presets")
    assert (run.returncode, run.stderr) == (1, f"{LINE}\n")
    installation.link(needs(installation.metadata, "apcnet"))
    run = installation.run("apcnet", "presets", "apcnet-r50")
    assert run.returncode == 0 and "apcnet-r50-ade20k-160k" in run.stdout, run.stderr


def test_the_version_is_written_once(bare):
    assert apc_kernels.__version__ == apcnet.__version__ == bare.metadata.version
    assert f"## {apc_kernels.__version__} " in (ROOT / "CHANGELOG.md").read_text()  # what is said of it
    assert "version" not in (ROOT / "CITATION.cff").read_text().replace("cff-version", "")


def test_a_source_archive_holds_what_is_built(native_checkout, python, tmp_path):
    run = python("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path), cwd=native_checkout)
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob(f"apc_kernels-{apc_kernels.__version__}.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {
        "apc_kernels/py.typed",
        "apcnet/py.typed",
        "csrc/pyramid_pool/operators.h",
        "pyproject.toml",
        "setup.py",
    } <= names
