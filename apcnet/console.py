"""Prints tables, and the progress of commands in a terminal; `apcnet.progress` shows training runs."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows as a table; the first row holds the headings, and numbers are aligned to the right."""
    grid = Table()
    for i, name in enumerate(rows[0]):
        grid.add_column(Text(name), justify="right" if i else "left")
    for row in rows[1:]:
        grid.add_row(*map(Text, row))
    _console().print(grid)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar in a terminal; gives the function to update it with, of (done, total)."""
    with _progress(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def progress_steps() -> Iterator[Callable[[str, int, int], None]]:
    """Shows a progress bar for one step after another; gives the function to update it with (step, done, total)."""
    with _progress(MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        tasks: dict[str, TaskID] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield update


def print_error(message, *_) -> None:
    """Prints an error or a warning in one line."""
    print("apcnet:", *str(message).split(), file=sys.stderr)


def _progress(*columns) -> Progress:
    console = _console(stderr=True)
    text, hidden = (
        TextColumn("{task.description}", markup=False),
        not console.is_terminal or os.environ.get("RANK", "0") != "0",
    )
    return Progress(text, BarColumn(), *columns, console=console, transient=True, disable=hidden)


def _console(**options) -> Console:
    """Creates a console that prints text as it is: names of classes and files may hold rich's markup."""
    return Console(highlight=False, markup=False, emoji=False, **options)
