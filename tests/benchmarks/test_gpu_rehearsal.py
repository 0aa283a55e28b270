"""Rehearses `make gpu` without a GPU: every part runs, writes its rows, resumes, and prints few lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.run import OPERATIONS

ROOT = Path(__file__).resolve().parents[2]


def rehearse(out: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", str(out), "--rehearse", *arguments]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part(tmp_path):
    """Tests every part without the command line's packages, which are replaced by modules that fail to import."""
    for name in ("tyro", "rich"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not to be imported')\n")
    out = tmp_path / "out"
    run = rehearse(out, "--only", "upsample_argmax", "load_head", path=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    outcomes = json.loads((out / "summary.json").read_text())
    assert {name.partition(":")[0] for name in outcomes} == set(gpu.PARTS)
    for name, outcome in outcomes.items():
        assert outcome.startswith("not run: " if name.endswith("check") else "passed"), f"{name}: {outcome}"
    summary = (out / "summary.txt").read_text()
    assert run.stdout.endswith(summary) and len(summary.splitlines()) <= gpu.LINES
    assert "upsample_argmax: " in summary and "load_head, apc head, training: " in summary

    before = (out / "ops.json").read_text()
    assert {row["backend"] for row in json.loads(before)["rows"]} == {"triton"}
    again = rehearse(out, "--part", "ops", "--only", "upsample_argmax")
    assert again.returncode == 0 and (out / "ops.json").read_text() == before, "nothing is measured twice"


def test_everything_is_measured():
    """Tests that all operations for a GPU, the heads and whole models are measured."""
    named = {name for groups in gpu.NAMES.values() for group in groups for name in group}
    wanted = {name for name, operation in OPERATIONS.items() if operation.on_gpu}
    assert named == wanted


def step(tmp_path, command, **options):
    part = gpu.Part("ops", tmp_path, rehearse=True, seconds=options.pop("seconds", 60))
    part.step("a step", [sys.executable, "-c", command], **options)
    return gpu.Part("ops", tmp_path, rehearse=True, seconds=60).outcomes["ops: a step"]


@pytest.mark.parametrize(
    ("command", "outcome"),
    [
        ("print('all is well')", "passed in 0 s: all is well"),
        ("print('no'); raise SystemExit(3)", "FAILED (exit 3): no"),
        ("print('Device not supported'); raise SystemExit(1)", "not run: the sanitizer does not support this device"),
    ],
)
def test_what_came_of_a_step(tmp_path, command, outcome):
    assert step(tmp_path, command).startswith(outcome)
    assert command in (tmp_path / "ops.log").read_text()


def test_a_step_ends_in_time_with_all_that_it_started(tmp_path):
    child = f"import time; time.sleep(20); open({str(tmp_path / 'late')!r}, 'w')"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert step(tmp_path, command, seconds=6).startswith("stopped after 6 s")
    processes = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.is_file()]
    assert not any(str(tmp_path / "late").encode() in arguments for arguments in processes)
    assert step(tmp_path, command, seconds=3).startswith("not begun"), "no time is left"


def test_what_passed_is_not_repeated(tmp_path):
    file = tmp_path / "count"
    command = f"open({str(file)!r}, 'a').write('x')"
    for again, count in ((False, 1), (False, 1), (True, 2)):
        step(tmp_path, command, again=again)
        assert len(file.read_text()) == count


def test_without_a_gpu_it_says_so(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "make gpu needs a GPU; none" in run.stderr and not (tmp_path / "out").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", {"no_such_module": "its-package"})
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "make gpu needs its-package: pip install its-package" in capsys.readouterr().err
