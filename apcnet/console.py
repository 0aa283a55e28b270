"""Shows progress and results in a terminal, or as plain lines if there is none."""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class RunDisplay:
    """Shows the records and events of `apcnet.training` as a progress bar, or without a terminal as lines.

    The bar is drawn inside `with display.bar`.
    """

    def __init__(self):
        self.out = _console(soft_wrap=True)
        self.bar = _progress(
            MofNCompleteColumn(), TextColumn("{task.fields[status]}", markup=False), TimeRemainingColumn()
        )
        self.steps, self.batch_size = 0, 0
        self.training_task: TaskID | None = None
        self.evaluation_task: TaskID | None = None

    def __call__(self, record: dict) -> None:
        try:
            self._show(record)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _leave_terminal()

    def _show(self, record: dict) -> None:
        match record.get("event"):
            case "started":
                self._started(record)
            case "evaluating":
                self._evaluating(record)
            case "stopped":
                self._print(f"stopped after step {record['step']:,}; the same command resumes from there")
            case None:
                (self._scores if "miou" in record else self._step)(record)

    def _started(self, event: dict) -> None:
        self.steps, self.batch_size = event["steps"], event["batch_size"]
        several = f" in {event['processes']} processes" if event["processes"] > 1 else ""
        self._print(
            f"{event['folder']}: {event['parameters'] / 1e6:.2f} M parameters, {event['images']:,} training images, "
            f"{event['val_images']:,} validation images, {event['steps']:,} steps of {event['batch_size']} images, "
            f"on {event['device']}{several}"
        )
        if event["step"]:
            self._print(f"resuming at step {event['step']:,}")
        self.training_task = self.bar.add_task("training", total=self.steps, completed=event["step"], status="")

    def _step(self, record: dict) -> None:
        step = record["step"]
        speed = record["images_per_second"]  # rounded: 0 for slow runs, and where the clock stands still
        left = _clock((self.steps - step) * self.batch_size / speed) if speed else "unknown time"
        status = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {speed:.1f} images/s"
        memory = f"{record['memory_mib']:,} MiB"
        if self.training_task is not None:
            self.bar.update(self.training_task, completed=step, status=f"{status}  {memory}")
        if not self.out.is_terminal:
            self._print(f"step {step:,} of {self.steps:,}  {status}  {memory}  {left} left")

    def _evaluating(self, event: dict) -> None:
        if self.evaluation_task is None:
            self.evaluation_task = self.bar.add_task("evaluating", total=event["total"], status="")
        self.bar.update(self.evaluation_task, completed=event["done"], total=event["total"])

    def _scores(self, record: dict) -> None:
        if self.evaluation_task is not None:
            self.bar.remove_task(self.evaluation_task)
            self.evaluation_task = None
        context = f"  context mIoU {record['context_miou']:.4f}" if "context_miou" in record else ""
        best = f"best {record['best']['miou']:.4f} at step {record['best']['step']:,}"
        self._print(f"step {record['step']:,}  mIoU {record['miou']:.4f}{context}  aAcc {record['aacc']:.4f}  ({best})")

    def _print(self, text: str) -> None:
        (self.bar.console if self.out.is_terminal else self.out).print(text)


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


def show_download(received: int, total: int | None) -> None:
    """Prints the number of megabytes received, over the previous number."""
    if sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        print(f"\rdownload {received / 1e6:.1f}{of_total} MB", end="\n" if received == total else "", file=sys.stderr)


def _leave_terminal() -> None:
    """Sends all further output nowhere, after the terminal was closed: a run goes on, or stops in order."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):  # not a file or a pipe
            os.dup2(nowhere, output)
    os.close(nowhere)


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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
