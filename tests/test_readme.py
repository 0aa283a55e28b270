"""The README tells the truth: its examples run, its figures are those of the result files, it lists every operation."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from apc_kernels import info
from apc_kernels.ops import affinities

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_examples_run():
    """One after the other in one process, none with the names of another."""
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = f"for example in {examples!r}: exec(compile(example, example, 'exec'), {{'__name__': '__main__'}})"
    run = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
    assert examples and run.returncode == 0 and not run.stderr, run.stderr


def test_figures_come_from_the_result_files():
    program = "from benchmarks import report; assert all(p.read_text() == text for p, text in report.pages().items())"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"run python -m benchmarks.report\n{run.stderr}"


def test_every_operation_is_listed():
    for operation in info.SERVED_BY:
        assert f"[`{operation}`](apc_kernels/ops/" in README


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


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/experiment.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text())
    assert links
    for link in links:
        assert ((ROOT / page).parent / link).exists(), link
