"""Builds, tests and measures on a machine with a GPU: python -m benchmarks.gpu FOLDER (make gpu OUT=FOLDER PART=…).

    build+test   the libraries, every test that needs a GPU, compute-sanitizer on small maps where it runs
    ops          the operations beside PyTorch and torch.compile
    models       heads, whole models and training steps beside their stock PyTorch modules

It uses the running interpreter and installs nothing. Each part stops when its time is over; every row of results is
written when it is measured, and the same command with the same folder continues. All output goes into FOLDER, with a
log for each part; a step that fails does not stop the others. A summary of at most 60 lines comes last.

--rehearse does the same on a CPU with tiny sizes: it builds nothing, and uses Triton's interpreter and the emulation of
CUDA.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from apc_kernels import info
from apcnet.files import read_json, write_json
from benchmarks import ROOT

PARTS = ("build+test", "ops", "models")
SECONDS = 520.0  # for each part
SANITIZERS = ("memcheck", "racecheck")
NEEDED = {"pytest_benchmark": "pytest-benchmark", "PIL": "pillow"}
NEEDED |= {name: name for name in ("numpy", "pytest", "hypothesis", "safetensors")}
NAMES = {  # the names for python -m benchmarks.run, in the order of measurement
    "ops": (
        ("upsample_cross_entropy", "upsample_argmax", "upsample_confusion", "upsample_softmax"),
        *(("adaptive_context_norm",), ("pyramid_pool",), ("adaptive_context",), ("affinity_moments",)),
        ("upsample_region_sums", "cross_entropy_and_dice", "focal_loss", "upsample_binary_cross_entropy"),
        *(("encode",), ("pyramid_conv",), ("pyramid_reduce",)),
    ),
    "models": (("model",), ("load_head", "accelerate")),
}
LINES = 60
NOTHING = "nothing to do"
GPU_TESTS = re.compile(r"mark\.gpu|from places import")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


class Part:
    """Runs one part of the work, and keeps its log and the outcomes of its steps in the folder."""

    def __init__(self, name: str, out: Path, rehearse: bool, seconds: float):
        self.name, self.out, self.rehearse = name, out, rehearse
        self.end, self.lock = time.time() + seconds, threading.Lock()
        self.file, self.log = out / "summary.json", out / f"{name}.log"
        self.outcomes: dict[str, str] = read_json(self.file) if self.file.exists() else {}

    def step(self, name: str, command: list[str], again: bool = False) -> None:
        """Runs a command, unless it has passed before."""
        name = f"{self.name}: {name}"
        if not again and self.outcomes.get(name, "").startswith(("passed", "not run")):
            return
        outcome, text = run(command, self.end - time.time(), self.rehearse)
        with self.lock:
            with self.log.open("a") as log:
                log.write(f"\n==== {name}: {outcome}\n{' '.join(command)}\n{text}\n")
            self.outcomes[name] = outcome
            write_json(self.file, self.outcomes)
            print(f"{name:<60} {outcome}", flush=True)

    def build(self) -> None:
        """Builds at the start of every call, because each part may run on another machine."""
        build = [sys.executable, "-m", "apc_kernels.build", *["--help"] * self.rehearse]
        self.step("build", build, again=True)
        self.step("info", [sys.executable, "-m", "apc_kernels.info"], again=True)

    def test(self, only: Sequence[str]) -> None:
        """Runs every kernel once, to find what is broken altogether; then tests and sanitizers in parallel."""
        chosen = [f"--only={name}" for name in only]
        once = [*PYTEST, "-vv", "benchmarks/run.py", "-o", "python_functions=check_*", *chosen]
        self.step("every kernel once", once)
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        tools = [(tool, [sanitizer, f"--tool={tool}", "--error-exitcode=9", *once]) for tool in SANITIZERS]
        files = [(each[0], [*PYTEST, *each]) for each in tests(self.rehearse)]
        with ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 2) // 2))) as pool:
            list(pool.map(lambda each: self.step(*each), [*tools, *files]))

    def measure(self, names: Sequence[Sequence[str]]) -> None:
        """Measures each group of names in a process of its own, so that none disturbs the next; long rows come last."""
        rows = [f"--rows={self.out / f'{self.name}.json'}", "--resume", "-p", "no:cacheprovider"]
        extents = ([], ["--all"])
        if self.rehearse:  # one process: there is no GPU to disturb, and starting takes a while
            names, extents = [[name for some in names for name in some]], (["--all"],)
        for extent in extents:
            for some in names:
                label = ", ".join(some) + ", long rows" * bool(extent)
                self.step(label, [sys.executable, "-m", "benchmarks.run", *some, *rows, *extent], again=True)


def run(command: list[str], seconds: float, rehearse: bool) -> tuple[str, str]:
    """Runs a command and returns its outcome in a few words and its output; kills its whole group when time is over."""
    if seconds <= 5:
        return "not begun, out of time: run it again", ""
    if not Path(command[0]).is_file():
        return f"not run: {command[0]} is missing", ""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment(command, rehearse),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"stopped after {seconds:.0f} s: run it again", process.communicate()[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if "Device not supported" in text:
        return "not run: the sanitizer does not support this device or driver", text
    last = next((line.strip("= ") for line in reversed(text.splitlines()) if line.strip("= ")), "")
    if process.returncode == 5:  # pytest's
        return NOTHING, text
    if process.returncode != 0:
        return f"FAILED (exit {process.returncode}): {last[:110]}", text
    return f"passed in {time.perf_counter() - start:.0f} s: {last[:110]}", text


def environment(command: list[str], rehearse: bool) -> dict[str, str]:
    """Builds for this GPU alone; turns off PyTorch's memory cache under the sanitizer, so that it sees each tensor."""
    found = dict(os.environ)
    if rehearse:
        return found | {"APC_REHEARSAL": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability()))
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "sanitizer" in command[0] else {}
    return found | {"APC_KERNELS_FORCE_CUDA": "1"} | watched


def tests(rehearse: bool) -> list[list[str]]:
    """Lists the files with GPU tests and the options that select them; in a rehearsal, two quick files."""
    if rehearse:
        return [["tests/test_emulation.py", "-k", "barrier"], ["tests/apc_kernels/test_encode.py", "-m", "gpu"]]
    files = [(file, file.read_text()) for file in sorted((ROOT / "tests").rglob("test_*.py"))]
    return [[str(file.relative_to(ROOT)), "-m", "gpu"] for file, text in files if GPU_TESTS.search(text)]


def summary(out: Path) -> list[str]:
    """Summarises the folder in a few lines: steps that did not pass, then goals, then one row for each group."""
    from benchmarks import goals, rows  # imported here, so that main can first name the packages that are missing

    outcomes = read_json(out / "summary.json")
    outcomes = {name: what for name, what in outcomes.items() if what != NOTHING}
    passed = sum(what.startswith("passed") for what in outcomes.values())
    lines = [f"{info.gpu()}, torch {torch.__version__}: {passed} of {len(outcomes)} steps passed"]
    lines += [f"{name}: {what}" for name, what in outcomes.items() if not what.startswith("passed")][:15]
    logs = "".join(log.read_text() for log in sorted(out.glob("*.log")))
    failed = (line for line in logs.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    lines += list(dict.fromkeys(failed))[:10]
    files = [file for part in PARTS[1:] if (file := out / f"{part}.json").exists()]
    measured = [row for file in files for row in rows.read(file)["rows"]]
    verdicts = [(goal, goal.verdict(measured)) for goal in goals.GPU]
    lines += [f"goal {what}, {t.formatted(measured)}: {t}" for t, what in verdicts if what != goals.OPEN]
    lines.append(f"{sum(what == goals.OPEN for _, what in verdicts)} of {len(verdicts)} goals not measured")
    for about, some in rows.groups(measured).items():
        row = goals.representative(some, goals.GPU)
        beside = f"{row['ratio']:.3g} times as fast as {row['other']}, {row['percent_of_copy']:.0f} % of a copy"
        lines.append(f"{', '.join(filter(None, about))}: {row['ours_ms']:.3g} ms, {beside}")
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"and {len(lines) - LINES + 1} more lines: see the files in {out}"]
    return [line[:160] for line in lines]


def main() -> int:
    about = "Build, test and measure on a machine with a GPU."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=about)
    parser.add_argument("out", type=Path, help="Write results and logs into this folder, or continue those in it.")
    parser.add_argument("--part", choices=PARTS, help="Run only this part; by default all of them in turn.")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="Measure only these operations or models."
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"Stop each part after this time ({SECONDS:.0f})."
    )
    parser.add_argument("--rehearse", action="store_true", help="Run the same on a CPU with tiny sizes, as a trial.")
    given = parser.parse_args()
    if missing := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        parser.error(f"make gpu needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if not given.rehearse and not torch.cuda.is_available():
        parser.error(f"make gpu needs a GPU; {info.gpu()}. Give --rehearse to try it without one")
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([given.part] if given.part else PARTS):
        part = Part(name, out, given.rehearse, given.seconds)
        if i == 0:
            part.build()
        if name == "build+test":
            part.test(given.only)
        else:
            groups = ([each for each in group if each in given.only or not given.only] for group in NAMES[name])
            part.measure([group for group in groups if group])
    lines = summary(out)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    return int(any(what.startswith("FAILED") for what in part.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
