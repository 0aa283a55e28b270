"""Tests that a locked file is locked for others, and that systems without locks do without."""

import errno
import os
import subprocess
import sys

import pytest

from apcnet.files import open_locked

fcntl = pytest.importorskip("fcntl", reason="needs POSIX locks")
kinds = pytest.mark.parametrize("inherited", [True, False])

OTHER = """
import sys
from pathlib import Path
from apcnet.files import open_locked
print(open_locked(Path(sys.argv[1]), "out", inherited=sys.argv[2] == "True") is None)
"""


def is_locked_elsewhere(path, inherited) -> bool:
    """Tells whether another process finds the file locked."""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", OTHER, str(path), str(inherited)]
    return subprocess.run(command, env=paths, capture_output=True, text=True, check=True).stdout.strip() == "True"


@kinds
def test_locked_until_it_is_closed(tmp_path, inherited):
    path = tmp_path / "lock"
    with open_locked(path, "out", inherited=inherited):
        assert is_locked_elsewhere(path, inherited)
    assert not is_locked_elsewhere(path, inherited)


def test_an_inherited_lock_survives_reading_the_file(tmp_path):
    path = tmp_path / "lock"
    with open_locked(path, "out", inherited=True):
        path.read_bytes()
        assert is_locked_elsewhere(path, True)


@kinds
@pytest.mark.parametrize(("number", "opens"), [(errno.EAGAIN, False), (errno.EACCES, False), (errno.ENOLCK, True)])
def test_what_the_system_may_say(tmp_path, monkeypatch, inherited, number, opens):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock" if inherited else "lockf", refuse)
    file = open_locked(tmp_path / "lock", "out", inherited=inherited)
    assert (file is not None) == opens
    if file is not None:
        file.close()


@kinds
def test_another_thing_than_a_file(tmp_path, inherited):
    with pytest.raises(ValueError, match=r"out: expected a file or none, got another thing in .*--out"):
        open_locked(tmp_path, "out", inherited=inherited)
