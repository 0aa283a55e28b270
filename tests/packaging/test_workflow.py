"""Tests that what the workflow and the guides tell one to type is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [*ROOT.glob(".github/**/*.*"), ROOT / ".ci" / "run", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_verbs_of_make():
    (phony,) = re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    found = {
        (verb, file.relative_to(ROOT).as_posix())
        for file in GUIDES
        for verb in re.findall(r"(?:^|run: |`)make ([a-z][\w-]*)", file.read_text(), re.MULTILINE)
    }
    assert {("test-all", ".github/workflows/test.yml"), ("test", ".ci/run")} <= found
    assert not [(verb, file) for verb, file in found if verb not in phony.split()]


def test_workflow_spans_the_versions_that_the_package_names():
    workflow, project = ((ROOT / name).read_text() for name in (".github/workflows/test.yml", "pyproject.toml"))
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', project)
    (torch,) = re.findall(r'"torch>=([\d.]+)"', project)
    assert f'python: "{python}", torch: "{torch}.0"' in workflow
