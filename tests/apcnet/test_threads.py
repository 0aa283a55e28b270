"""Tests the OpenMP settings that `apcnet` makes, unless the user has made them."""

import os
import subprocess
import sys

import pytest

from apcnet import threads


def openmp(*command: str, **environ: str) -> str:
    """Returns the settings that OpenMP has read; variables set after PyTorch's import would have no effect."""
    clean = {
        name: value for name, value in os.environ.items() if name not in (*threads.USER_SETTINGS, "OMP_NUM_THREADS")
    }
    environ = clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | environ
    run = subprocess.run([sys.executable, "-m", "apcnet", *command], env=environ, capture_output=True, text=True)
    if "GOMP_SPINCOUNT" not in run.stderr:
        pytest.skip("needs GNU's OpenMP, as PyTorch has it on Linux")
    return run.stderr + run.stdout


def test_waiting_threads_sleep_soon():
    output = openmp("info")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in output and "GOMP_SPINCOUNT = '10000'" in output
    assert "OMP_WAIT_POLICY=PASSIVE, idle threads sleep" in output


def test_a_small_network_uses_one_thread(tmp_path):
    assert "OMP_NUM_THREADS = '1'" in openmp("train", "folder", "--backbone", "tiny", "--root", str(tmp_path))


def test_settings_of_the_user_are_kept(tmp_path):
    command = "train", "folder", "--backbone", "tiny", "--root", str(tmp_path)
    output = openmp(*command, GOMP_SPINCOUNT="123", OMP_NUM_THREADS="3")
    assert "GOMP_SPINCOUNT = '123'" in output and "OMP_NUM_THREADS = '3'" in output


def test_nothing_is_set_after_pytorch_is_imported(monkeypatch):
    for name in (*threads.USER_SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    threads.sleep_while_waiting()  # this process has imported PyTorch
    threads.use_one_for_tiny("tiny")
    assert not {*threads.USER_SETTINGS, "OMP_NUM_THREADS"} & {*os.environ}
