"""Runs benchmarks with pytest: writes each row when it is measured, resumes a run, and leaves out long rows by default.

A benchmark that fails comes last in the next run. If it leaves the GPU unusable, the run ends, because all benchmarks
after it would fail as well.

    python -m benchmarks.run --rows FILE      --all to include long rows, --resume to continue FILE
"""

from pathlib import Path

import pytest
import torch

from benchmarks import rows


def pytest_addoption(parser):
    options = parser.getgroup("rows of results")
    options.addoption("--rows", type=Path, metavar="FILE", help="Write every row into FILE when it is measured.")
    options.addoption("--resume", action="store_true", help="Keep the rows of FILE, and measure the missing ones.")
    options.addoption("--all", action="store_true", help="Include long rows: scaling, large images, more classes.")
    options.addoption("--only", action="append", metavar="NAME", help="Measure only this operation.")


def pytest_collection_modifyitems(config, items):
    """Selects the benchmarks to run and sorts them: long ones late, and those that failed before last."""
    file, only = config.getoption("rows"), config.getoption("only")
    done, failed = rows.begin(file, config.getoption("resume")) if file else (set(), [])
    later = [item for item in items if item.get_closest_marker("slow")]
    wanted = [item for item in items if item not in later] + later * config.getoption("all")
    wanted = [item for item in wanted if identity(item) not in done]
    if only:
        wanted = [item for item in wanted if item.callspec.params["row"].operation.name in only]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = sorted(wanted, key=lambda item: identity(item) in failed)


def identity(item) -> rows.Identity:
    return rows.identity(item.callspec.params["row"].named)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    file = item.config.getoption("rows")
    if report.when == "call" and report.passed and "benchmark" in item.funcargs:
        row = item.funcargs["benchmark"].extra_info
        item.config.get_terminal_writer().line(f"\n{described(row)}", flush=True)
        if file:
            rows.add(file, "rows", row)
    if file and report.failed:
        rows.add(file, "failed", identity(item))
        if not usable():
            pytest.exit(f"{item.nodeid} left the GPU unusable: {report.longreprtext.splitlines()[-1]}", returncode=1)
    return report


def described(row: dict) -> str:
    memory = f", {row['memory_mib']:.1f} of {row['other_memory_mib']:.1f} MiB" if "memory_mib" in row else ""
    about = f"{row['operation']}, {row['case']}, {row['backend']}"
    return f"{about}: {row['ours_ms']:.2f} ms, {row['ratio']:.2f} times as fast as {row['other']}{memory}"


def usable() -> bool:
    """Returns True if the GPU still answers; some errors make it unusable for the whole process."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True
