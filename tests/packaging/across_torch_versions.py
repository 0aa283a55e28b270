"""Loads one compiled library under several versions of torch, and checks its results there.

    python tests/packaging/across_torch_versions.py 2.11.0 2.15.0
    python tests/packaging/across_torch_versions.py --python old/bin/python --python new/bin/python

The CPU library is built once, by the first version given (--python before others), or taken from --library.
A version is installed into a temporary virtual environment, from the index pip is set to: gigabytes each by default on
Linux, hundreds of megabytes where PIP_INDEX_URL names PyTorch's CPU index.

pyramid_pool and its gradient are compared with the reference of the same torch (which bounds the error), and with what
the library computed under the first version (which should be the same to the bit). Needs Linux, a compiler and ninja.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import os, sys
from pathlib import Path
from apc_kernels import build
record = build.build(Path(sys.argv[1]), {**os.environ, "NVCC": "not-this-one"})
sys.exit(None if record["cpu"]["built"] else record["cpu"]["reason"])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of torch, to be installed from pip")
    parser.add_argument("--python", action="append", default=[], help="a Python that has torch already (repeatable)")
    parser.add_argument("--library", type=Path, help="a _C.abi3.so built before")
    parser.add_argument("--check", type=Path, metavar="RESULTS", help=argparse.SUPPRESS)  # inside one version
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.check)
    if not arguments.versions and not arguments.python:
        parser.error("expected versions of torch, or --python")
    if arguments.library and not arguments.library.is_file():
        parser.error(f"--library: there is no {arguments.library}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pythons = [*arguments.python, *(install(version, folder) for version in arguments.versions)]
        library = arguments.library or build_library(pythons[0], folder)
        package = package_with(library, folder / "site")
        command = [str(Path(__file__).resolve()), "--check", str(folder / "results.pt")]
        codes = [run(python, *command, package=package).returncode for python in pythons]
    failed = [python for python, code in zip(pythons, codes, strict=True) if code]
    print(f"failed under {', '.join(failed)}" if failed else "the same library serves all of them")
    return 1 if failed else 0


def install(version: str, folder: Path) -> str:
    """Makes a virtual environment with a version of torch, and returns its Python."""
    print(f"installing torch {version}: a download of gigabytes where pip's index holds CUDA builds", flush=True)
    target = folder / f"torch-{version}"
    venv.create(target, with_pip=True)
    python = str(target / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}", "numpy", "ninja"], check=True)
    return python


def build_library(python: str, folder: Path) -> Path:
    result = run(python, "-c", BUILD, str(folder / "native"), package=ROOT)
    if result.returncode:
        sys.exit(f"{python} cannot build the library")
    return folder / "native" / "_C.abi3.so"


def package_with(library: Path, folder: Path) -> Path:
    """Makes the package as it would be installed, with the given library in it."""
    ignored = shutil.ignore_patterns("__pycache__", "native")
    native = shutil.copytree(ROOT / "apc_kernels", folder / "apc_kernels", ignore=ignored) / "native"
    native.mkdir()
    shutil.copy(library, native / "_C.abi3.so")
    record = {"cpu": {"built": True, "reason": str(library)}, "cuda": {"built": False, "reason": "not checked here"}}
    (native / "native.json").write_text(json.dumps(record))
    return folder


def run(python: str, *arguments: str, package: Path) -> subprocess.CompletedProcess:
    return subprocess.run([python, *arguments], env={**os.environ, "PYTHONPATH": str(package)})


def check(results: Path) -> int:
    """Compares, inside one version, with the reference and with the first version's results if they exist."""
    import torch

    import apc_kernels

    def pooled(backend: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        with apc_kernels.backend(backend):
            out = apc_kernels.pyramid_pool(x)
            return out.detach(), torch.autograd.grad(out, x, numbers(out.shape).to(out.dtype))[0]

    def numbers(shape: torch.Size) -> torch.Tensor:
        """Returns numbers that are the same in every version, whatever its random generator does."""
        return ((torch.arange(shape.numel()) * 40503 % 65537).double() / 32768 - 1).reshape(shape)

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return (a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max().item()

    found, worst = {}, 0.0  # worst: in units in the last place of the largest magnitude
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = numbers(torch.Size((2, 37, 41, 29))).to(dtype).contiguous(memory_format=layout)
            for name, ours, theirs in zip(("out", "grad"), pooled("cpp", x), pooled("reference", x), strict=True):
                unit = torch.finfo(dtype).eps * theirs.abs().max().item()
                worst = max(worst, difference(ours, theirs) / unit)
                found[f"{dtype} {layout} {name}"] = ours
    first = torch.load(results, weights_only=True) if results.is_file() else found
    if first is found:
        torch.save(found, results)
    across = max(difference(found[name], first[name]) for name in first)
    print(f"torch {torch.__version__:<16} from the reference: {worst:.2f} units in the last place,", end=" ")
    print(f"from the first version: {across:g}", flush=True)
    return 0 if worst <= 4 and across == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
