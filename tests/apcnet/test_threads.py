"""What `apcnet` tells OpenMP, unless the user has said it."""

import os
import subprocess
import sys

import pytest

from apcnet import threads


def openmp(*command: str, **environ: str) -> str:
    """What OpenMP says that it has read: a variable set after PyTorch was imported would be there and do nothing."""
    clean = {
        name: value for name, value in os.environ.items() if name not in (*threads.USER_SETTINGS, "OMP_NUM_THREADS")
    }
    environ = clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | environ
    run = subprocess.run([sys.executable, "-m", "apcnet", *command], env=environ, capture_output=True, text=True)
    if "GOMP_SPINCOUNT" not in run.stderr:
        pytest.skip("needs GNU's OpenMP, as PyTorch has it on Linux")
    return run.stderr + run.stdout


def test_threads_soon_sleep_while_they_wait():
    said = openmp("info")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in said and "GOMP_SPINCOUNT = '10000'" in said
    assert "OMP_WAIT_POLICY=PASSIVE, asleep while they wait" in said


def test_a_small_network_has_one(tmp_path):
    assert "OMP_NUM_THREADS = '1'" in openmp("train", "folder", "--backbone", "tiny", "--root", str(tmp_path))


def test_what_the_user_says_stays(tmp_path):
    command = "train", "folder", "--backbone", "tiny", "--root", str(tmp_path)
    said = openmp(*command, GOMP_SPINCOUNT="123", OMP_NUM_THREADS="3")
    assert "GOMP_SPINCOUNT = '123'" in said and "OMP_NUM_THREADS = '3'" in said


def test_nothing_is_set_where_openmp_has_read_its_environment_already(monkeypatch):
    for name in (*threads.USER_SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    threads.sleep_while_waiting()  # PyTorch is here
    threads.use_one_for_tiny("tiny")
    assert not {*threads.USER_SETTINGS, "OMP_NUM_THREADS"} & {*os.environ}
