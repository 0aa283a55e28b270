"""Builds, tests and measures on a machine with a GPU: python -m benchmarks.gpu FOLDER (make gpu OUT=FOLDER).

Uses the interpreter it is run with and installs nothing. Everything that is printed goes into FOLDER, step by step; a
step that fails does not keep the next ones from running. The summary comes last.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from apc_kernels import dispatch
from benchmarks import ROOT, report

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
GPU_TESTS = [*PYTEST, "-m", "gpu", "tests"]
SMALL = ["-k", "test_hard_cases and not reference"]  # the sanitizer is a hundred times slower
MEASURED = ["benchmarks", "-o", "python_files=*.py", "-o", "python_functions=bench_*", "--benchmark-only"]


def steps(out: Path) -> dict[str, list[str]]:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return {
        "build": [sys.executable, "-m", "apc_kernels.build"],
        "info": [sys.executable, "-m", "apc_kernels.info"],
        "test": GPU_TESTS,
        "memcheck": [sanitizer, "--tool=memcheck", "--error-exitcode=9", *GPU_TESTS, *SMALL],
        "racecheck": [sanitizer, "--tool=racecheck", "--error-exitcode=9", *GPU_TESTS, *SMALL],
        "bench": [*PYTEST, *MEASURED, f"--benchmark-json={out / 'benchmark.json'}"],
    }


def run(command: list[str], log: Path) -> str:
    """The step's outcome in a few words."""
    if not Path(command[0]).is_file():
        return f"not run: {command[0]} is missing"
    # Freed memory goes back to the driver at once while the sanitizer watches, so that it sees what is still owned.
    environment = os.environ | {"APC_KERNELS_FORCE_CUDA": "1"}
    if "sanitizer" in command[0]:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    text = log.read_text(errors="replace")
    if "Device not supported" in text:
        return "not run: the sanitizer does not support this device or driver"
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return f"{'passed' if code == 0 else f'FAILED (exit {code})'} in {time.perf_counter() - start:.0f} s: {last[:150]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder that results and logs go into")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        sys.exit(f"make gpu needs a GPU; {dispatch.gpu()}")
    out.mkdir(parents=True, exist_ok=True)
    outcome = {}
    for name, command in steps(out).items():
        outcome[name] = run(command, out / f"{name}.log")
        (out / "summary.json").write_text(json.dumps(outcome, indent=1) + "\n")
        print(f"{name:<10} {outcome[name]}", flush=True)
    if (out / "benchmark.json").is_file():
        results = report.results(out / "benchmark.json")
        (out / report.file_name(results["machine"]["name"])).write_text(json.dumps(results, indent=1) + "\n")
        for row in results["rows"]:
            figures = f"{row['ours_ms']:.3f} ms, {row['ratio']:.1f}x, {row['percent_of_copy']:.0f} % of a copy"
            print(f"{row['case']:<62} {row['backend']:<7} {figures}")
    return int(any(text.startswith("FAILED") for text in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
