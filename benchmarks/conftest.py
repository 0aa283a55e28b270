"""How benchmarks are run: rows are written as they come, a run is resumed, what takes long has to be asked for.

A benchmark that fails comes last the next time. Where it has left the GPU unusable the run ends there: whatever came
after it would fail as well.

python -m benchmarks.run --rows FILE, and --all for what takes long, --resume to go on with FILE.
"""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import rows


def pytest_addoption(parser):
    options = parser.getgroup("rows of results")
    options.addoption("--rows", type=Path, metavar="FILE", help="write every row into FILE as soon as it is there")
    options.addoption("--resume", action="store_true", help="keep FILE's rows, and measure those that it lacks")
    options.addoption("--all", action="store_true", help="also what takes long: scaling, large images, more classes")
    options.addoption("--only", action="append", metavar="NAME", help="only this operation")
    options.addoption("--until", type=float, metavar="TIME", help="start no benchmark after this time (seconds, UNIX)")


def pytest_collection_modifyitems(config, items):
    """What takes long comes last, but for what has failed before."""
    file, only = config.getoption("rows"), config.getoption("only")
    done, failed = rows.begin(file, config.getoption("resume")) if file else (set(), [])
    later = [item for item in items if item.get_closest_marker("slow")]
    wanted = [item for item in items if item not in later] + later * config.getoption("all")
    wanted = [item for item in wanted if item.nodeid not in done]
    if only:
        wanted = [item for item in wanted if item.callspec.params["row"].operation.name in only]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = sorted(wanted, key=lambda item: item.nodeid in failed)


def pytest_runtest_setup(item):
    until = item.config.getoption("until")
    if until and time.time() > until:
        pytest.skip("needs more time: run it again, it goes on from here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    file = item.config.getoption("rows")
    if report.when == "call" and report.passed:
        row = item.funcargs["benchmark"].extra_info
        item.config.get_terminal_writer().line(f"\n{shown(row)}", flush=True)
        if file:
            rows.add(file, item.nodeid, row)
    if file and report.failed:
        rows.add_failed(file, item.nodeid)
        if not usable():
            pytest.exit(f"{item.nodeid} left the GPU unusable: {report.longreprtext.splitlines()[-1]}", returncode=1)
    return report


def shown(row: dict) -> str:
    memory = f", {row['memory_mib']:.1f} of {row['other_memory_mib']:.1f} MiB" if "memory_mib" in row else ""
    about = f"{row['operation']}, {row['case']}, {row['backend']}"
    return f"{about}: {row['ours_ms']:.2f} ms, {row['ratio']:.2f} times as fast as {row['other']}{memory}"


def usable() -> bool:
    """Whether the GPU still answers: after some errors a process has lost it."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True
