"""Runs batteries of bad inputs in child processes, so that a crash, a hang or exhausted memory fails one named case.

A battery is a module with

    KINDS = {"kind": cases, …}     cases(count, seed) yields `count` pairs (name of the case, function)

where the function takes an empty folder and returns "right" or "named", as `judge.verdict` does, or raises an
AssertionError. `python tests/support/battery.py 1000 tests/robustness/test_*.py` runs 1,000 cases of each kind of these
modules, or all of a kind that has fewer, and prints the counts.
"""

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

MEMORY = 6 << 30  # bytes of address space that cases may take beyond what the libraries do
SECONDS = 60  # for one case, with all that starts and ends it


def judged(module: str | Path, count: int, seed: int = 0, kinds: list[str] | None = None) -> dict[str, Counter]:
    """Runs cases of a battery in a child process and counts the verdicts of each kind; fails where one is bad."""
    command = [sys.executable, __file__, "--child", str(module), str(count), str(seed), *(kinds or [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    counts, case = {}, "the start"
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
    ):
        for line in child.stdout:
            kind, case, verdict = json.loads(line)
            if verdict is not None:
                counts.setdefault(kind, Counter())[verdict] += 1
        if child.wait():
            errors.seek(0)
            raise AssertionError(f"{case}: the process ended with {child.returncode}\n{errors.read()[-3000:]}")
    bad = [verdict for verdicts in counts.values() for verdict in verdicts if verdict not in ("right", "named")]
    assert not bad, "\n".join(bad)
    return counts


def _run(module: str, count: str, seed: str, *kinds: str) -> None:
    """Runs cases in this process; prints each before and after it runs."""
    import torch  # before memory is limited
    from judge import within

    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    battery = load(module)
    for kind in kinds or battery.KINDS:
        for name, call in battery.KINDS[kind](int(count), int(seed)):
            name = f"{kind}: {name}"
            print(json.dumps([kind, name, None]), flush=True)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    with within(SECONDS):
                        verdict = call(Path(folder))
                except BaseException as error:  # whatever a case raises is its verdict
                    verdict = f"{name}: {type(error).__name__}: {str(error)[:500]}"
            print(json.dumps([kind, name, verdict]), flush=True)


def load(module: str | Path):
    """Imports a battery from its file."""
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    battery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(battery)
    return battery


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        _run(*sys.argv[2:])
    else:
        total = Counter()
        for file in sys.argv[2:]:
            if hasattr(load(file), "KINDS"):
                for kind, verdicts in judged(file, int(sys.argv[1])).items():
                    print(f"{Path(file).stem}: {kind}: {verdicts.total()}: {dict(verdicts)}", flush=True)
                    total += verdicts
        print(f"all: {total.total()}: {dict(total)}")
