"""Tests that the console shows any text as it is, and any speed."""

import pytest

from apcnet.console import RunDisplay, table

MARKUP = ["[/road]", "[bold red]", "[link=x]a", ":smile:", "[", "a\\[b]"]


@pytest.mark.parametrize("name", MARKUP)
def test_names_are_never_markup(capsys, name):
    """Tests names of classes and folders that would be rich's markup."""
    table([("class", name), (name, "1.0")])
    RunDisplay()._print(f"runs/{name}: 3 images")
    assert capsys.readouterr().out.count(name) == 3


def test_a_speed_of_zero_has_no_remaining_time(capsys):
    """Tests the record of a run so slow that its images per second round to 0."""
    display = RunDisplay()
    display.steps, display.batch_size = 10, 2
    display({"step": 3, "loss": 1.0, "lr": 0.1, "images_per_second": 0.0, "memory_mib": 5})
    assert "0.0 images/s  5 MiB  unknown time left" in capsys.readouterr().out
