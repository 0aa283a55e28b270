"""Threads sleep while they wait wherever `apcnet` is started, unless the user has said how they wait."""

import os
import subprocess
import sys

import pytest

from apcnet import threads


@pytest.mark.parametrize(
    ("said", "policy", "spins"),
    [({}, "PASSIVE", "0"), ({"GOMP_SPINCOUNT": "123"}, None, "123")],
    ids=["nothing", "spins"],
)
def test_openmp_is_told_before_it_is_loaded_what_the_user_has_not_said(said, policy, spins):
    """OpenMP itself says what it has read; set after PyTorch's import, the variable would be there and do nothing."""
    environ = {name: value for name, value in os.environ.items() if name not in threads.SAYS}
    command = [sys.executable, "-m", "apcnet", "info"]
    environ |= {"OMP_DISPLAY_ENV": "VERBOSE", **said}
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert ("OMP_WAIT_POLICY=PASSIVE, asleep" in run.stdout) == (policy == "PASSIVE")
    if "GOMP_SPINCOUNT" not in run.stderr:
        pytest.skip("needs GNU's OpenMP, as PyTorch has it on Linux")
    assert f"GOMP_SPINCOUNT = '{spins}'" in run.stderr


def test_nothing_is_set_where_openmp_has_read_its_environment_already(monkeypatch):
    for name in threads.SAYS:
        monkeypatch.delenv(name, raising=False)
    threads.sleep_while_waiting()  # PyTorch is here
    assert not {*threads.SAYS} & {*os.environ}
