"""How benchmarks are run: rows are written as they come, a run is resumed, what takes long has to be asked for.

pytest benchmarks -o python_files='benchmarks/*.py' -o python_functions='bench_*' --benchmark-quiet --rows FILE

and --all for what takes long, --resume to go on with FILE. (With python_files='*.py' pytest rewrites all of torch.)
"""

import time
from pathlib import Path

import pytest

from benchmarks import rows


def pytest_addoption(parser):
    options = parser.getgroup("rows of results")
    options.addoption("--rows", type=Path, metavar="FILE", help="write every row into FILE as soon as it is there")
    options.addoption("--resume", action="store_true", help="keep FILE's rows, and measure those that it lacks")
    options.addoption("--all", action="store_true", help="also what takes long: scaling, large images, more classes")
    options.addoption("--until", type=float, metavar="TIME", help="start no benchmark after this time (seconds, UNIX)")


def pytest_collection_modifyitems(config, items):
    """What takes long comes last."""
    file = config.getoption("rows")
    done = rows.begin(file, config.getoption("resume")) if file else set()
    later = [item for item in items if item.get_closest_marker("slow")]
    wanted = [item for item in items if item not in later] + later * config.getoption("all")
    wanted = [item for item in wanted if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def pytest_runtest_setup(item):
    until = item.config.getoption("until")
    if until and time.time() > until:
        pytest.skip("needs more time: run it again, it goes on from here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    file = item.config.getoption("rows")
    if file and report.when == "call" and report.passed:
        rows.add(file, item.nodeid, item.funcargs["benchmark"].extra_info)
    return report
