"""Runs commands of apcnet in the process of a test."""

import pytest

from apcnet import cli


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs a command, and returns its exit status, output and errors."""
    monkeypatch.setattr("warnings.showwarning", None)  # restored afterwards, since main sets its own

    def run(*arguments):
        status = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return run
