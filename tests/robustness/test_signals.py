"""Tests signals to a run and to its workers at random moments: it stops in order, and resumes to the same bits."""

import contextlib
import multiprocessing
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_runs
from judge import verdict
from small_runs import digest, flags, small

from apcnet.training import checkpoint, log, train

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DEADLY = (signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV)  # a worker ignores STOPS
# The moments at which a worker is killed: an event or a kind of record of the run.
MOMENTS = ("started", "loss", "evaluating", "miou")


def cases(seed: int, count: int) -> Iterator[tuple[signal.Signals, float]]:
    """Yields signals to a run, each with a moment: a share of the time that the run takes."""
    draws = random.Random(seed)
    for _ in range(count):
        yield draws.choice(STOPS), draws.random()


def worker_cases(seed: int, count: int) -> Iterator[tuple[signal.Signals, str, int]]:
    """Yields signals to a worker, each with a moment, and how often it comes before."""
    draws = random.Random(seed)
    for _ in range(count):
        yield draws.choice((*DEADLY, *STOPS)), draws.choice(MOMENTS), draws.randrange(3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trains a run that nothing interrupts; returns its config, its folder, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    config = small(small_runs.write_images(folder / "data"), steps=6, eval_every=3, save_every=100)
    start = time.perf_counter()
    train(config, folder / "run")
    return config, folder / "run", time.perf_counter() - start


@pytest.fixture
def ignored():
    """Ignores STOPS for a test: they may come before or after the run."""
    before = {number: signal.signal(number, lambda *_: None) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_stops_a_run_that_resumes(whole, tmp_path, ignored, count):
    config, run, seconds = whole
    stopped = 0
    for case, (number, moment) in enumerate(cases(count, count)):
        folder = tmp_path / f"{case}"
        timer = threading.Timer(moment * seconds, os.kill, (os.getpid(), number))
        timer.start()
        try:
            train(config, folder)
        except SystemExit as stop:
            assert stop.code == 128 + number
            stopped += 1
        timer.join()
        train(config, folder)
        assert digest(folder / "final.safetensors") == digest(run / "final.safetensors"), (number, moment)
    assert stopped


@pytest.mark.parametrize("count", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_worker_is_named_and_the_run_resumes(whole, tmp_path, count):
    config, run, _ = whole
    named = 0
    for case, (number, moment, turn) in enumerate(worker_cases(count, count)):
        folder, seen = tmp_path / f"{case}", []

        def show(record, number=number, moment=moment, turn=turn, seen=seen) -> None:
            if moment in record or record.get("event") == moment:
                seen.append(moment)
                workers = multiprocessing.active_children()
                if len(seen) > turn and workers and not seen.count("killed"):
                    seen.append("killed")
                    os.kill(workers[-1].pid, number)

        def is_right(scores, folder=folder) -> bool:
            return digest(folder / "final.safetensors") == digest(run / "final.safetensors")

        def run_once(folder=folder, progress=show):
            return train(config, folder, workers=2, log_every=1, progress=progress)

        named += verdict(run_once, is_right, "a worker process was killed", seconds=90) == "named"
        train(config, folder)
        assert is_right(None), (number, moment, turn)
    assert named or count == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_terminal_stops_a_run_in_order(tmp_path, workers):
    """Tests the commonest end: the terminal is closed, which sends SIGHUP, and nothing can be printed any more."""
    config = small(small_runs.write_images(tmp_path / "data"), steps=400, eval_every=400, save_every=400)
    run = _start_in_terminal(config, tmp_path / "run", workers)
    assert run.wait(60) == 128 + signal.SIGHUP
    step = checkpoint.load(tmp_path / "run")["step"]
    assert 5 <= step < 400 and log.read(tmp_path / "run")[-1]["step"] == step


@pytest.mark.slow
def test_a_run_under_nohup_goes_on_without_its_terminal(tmp_path):
    config = small(small_runs.write_images(tmp_path / "data"), steps=40, eval_every=40, save_every=40)
    run = _start_in_terminal(config, tmp_path / "run", 0, nohup=True)
    assert run.wait(60) == 0
    train(config, tmp_path / "whole")
    assert digest(tmp_path / "run" / "final.safetensors") == digest(tmp_path / "whole" / "final.safetensors")


def _start_in_terminal(config, folder: Path, workers: int, nohup: bool = False) -> subprocess.Popen:
    """Starts a run in a terminal of its own, and closes the terminal after some steps."""
    ours, theirs = pty.openpty()
    take_terminal = (
        "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if nohup else 'SIG_DFL'}); "
        "os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-m", "apcnet", *flags(config), "--workers", workers, "--out", folder]
    arguments = [sys.executable, "-c", take_terminal, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    run = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.set_blocking(ours, False)
    while not folder.exists() or not any(record["step"] >= 5 for record in log.read(folder)):
        assert run.poll() is None
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 16)
        time.sleep(0.02)
    os.close(ours)
    return run
