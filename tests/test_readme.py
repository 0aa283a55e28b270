"""Tests that figures on pages come from result files, and that an operation's name is found in all its places."""

import subprocess
import sys
from pathlib import Path

import pytest

from apc_kernels import info
from apc_kernels.ops import affinities

ROOT = Path(__file__).resolve().parents[1]


def test_figures_come_from_the_result_files():
    program = "from benchmarks import report; assert all(p.read_text() == text for p, text in report.pages().items())"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"run python -m benchmarks.report\n{run.stderr}"


@pytest.mark.parametrize("operation", info.SERVED_BY)
def test_one_name_five_places(operation):
    """Kernel, reference, test, benchmark and documentation of an operation are found by its name.

    The upsample_* operations share everything, under the name `upsample`; those on affinities share a folder.
    """
    name = "upsample" if operation.startswith("upsample_") else operation
    family = "affinities" if operation in dir(affinities) else name
    folder = ROOT / "apc_kernels" / "ops" / family
    assert (folder / "reference.py").is_file() or (ROOT / "apc_kernels" / "ops" / f"{name}.py").is_file()
    assert (ROOT / "tests" / "apc_kernels" / f"test_{name}.py").is_file()
    table = "upsampling.py" if name == "upsample" else "operations.py"
    assert f'"{operation}"' in (ROOT / "benchmarks" / table).read_text()
