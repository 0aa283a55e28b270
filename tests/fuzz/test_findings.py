"""Tests the readers with inputs that once ended in a traceback or an unclear error, and what the fuzzer finds."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("targets", HERE / "targets.py")
targets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(targets)
FINDINGS = sorted(path.relative_to(HERE / "findings") for path in (HERE / "findings").glob("*/*"))


@pytest.mark.parametrize("finding", FINDINGS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_a_finding_is_read_or_named(finding):
    targets.TARGETS[finding.parts[0]]((HERE / "findings" / finding).read_bytes())


@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_each_target_reads_its_seeds(target):
    assert {targets.TARGETS[target](seed) for seed in targets.seeds(target)} == {"right"}
