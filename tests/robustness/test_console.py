"""Tests that the console shows any text as it is."""

import pytest

from apcnet.console import table
from apcnet.progress import Lines, Terminal

MARKUP = ["[/road]", "[bold red]", "[link=x]a", ":smile:", "[", "a\\[b]"]


@pytest.mark.parametrize("name", MARKUP)
def test_names_are_never_markup(capsys, name):
    """Tests names of classes and folders that would be rich's markup."""
    table([("class", name), (name, "1.0")])
    for screen in (Lines(), Terminal()):
        screen.line(f"runs/{name}: 3 images")
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count(name) == 4
