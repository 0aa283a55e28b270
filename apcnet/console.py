"""What a run and its results look like in a terminal; and, where there is none, as plain lines."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class RunDisplay:
    """Shows the records and events of `apcnet.training`: a bar with everything in it, or a line for every record.

    The bar is drawn inside `with display.bar`.
    """

    def __init__(self):
        self.out = Console(soft_wrap=True, highlight=False)
        self.bar = _progress(MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
        self.steps, self.batch_size, self.images = 0, 0, None

    def __call__(self, record: dict) -> None:
        match record.get("event"):
            case "started":
                self._started(record)
            case "evaluating":
                self._evaluating(record)
            case "stopped":
                self._say(f"stopped after step {record['step']:,}; the same command goes on from there")
            case None:
                (self._scores if "miou" in record else self._step)(record)

    def _started(self, event: dict) -> None:
        self.steps, self.batch_size = event["steps"], event["batch_size"]
        several = f" in {event['processes']} processes" if event["processes"] > 1 else ""
        self._say(
            f"{event['folder']}: {event['parameters'] / 1e6:.2f} M parameters, {event['images']:,} images to train on, "
            f"{event['val_images']:,} to evaluate on, {event['steps']:,} steps of {event['batch_size']}, "
            f"on {event['device']}{several}"
        )
        if event["step"]:
            self._say(f"going on at step {event['step']:,}")
        self.task = self.bar.add_task("training", total=self.steps, completed=event["step"], now="")

    def _step(self, record: dict) -> None:
        step = record["step"]
        left = (self.steps - step) * self.batch_size / record["images_per_second"]
        now = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['images_per_second']:.1f} images/s"
        memory = f"{record['memory_mib']:,} MiB"
        self.bar.update(self.task, completed=step, now=f"{now}  {memory}")
        if not self.out.is_terminal:
            self._say(f"step {step:,} of {self.steps:,}  {now}  {memory}  {_clock(left)} left")

    def _evaluating(self, event: dict) -> None:
        if self.images is None:
            self.images = self.bar.add_task("evaluating", total=event["total"], now="")
        self.bar.update(self.images, completed=event["done"], total=event["total"])

    def _scores(self, record: dict) -> None:
        if self.images is not None:
            self.bar.remove_task(self.images)
            self.images = None
        context = f"  on context classes {record['context_miou']:.4f}" if "context_miou" in record else ""
        best = f"best {record['best']['miou']:.4f} at step {record['best']['step']:,}"
        self._say(f"step {record['step']:,}  mIoU {record['miou']:.4f}{context}  aAcc {record['aacc']:.4f}  ({best})")

    def _say(self, text: str) -> None:
        (self.bar.console if self.out.is_terminal else self.out).print(text)


def table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows, the first of them the head; numbers to the right."""
    drawn = Table()
    for i, name in enumerate(rows[0]):
        drawn.add_column(name, justify="right" if i else "left")
    for row in rows[1:]:
        drawn.add_row(*row)
    Console(highlight=False).print(drawn)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Draws how much is done of how much, until it is; only where somebody may be looking."""
    with _progress(MofNCompleteColumn(), TimeRemainingColumn()) as drawn:
        task = drawn.add_task(what, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


def show_download(come: int, total: int | None) -> None:
    """Megabytes so far, on one line."""
    if sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        print(f"\rdownload {come / 1e6:.1f}{of_total} MB", end="\n" if come == total else "", file=sys.stderr)


def _progress(*columns) -> Progress:
    console = Console(stderr=True, highlight=False)
    text, nobody = TextColumn("{task.description}"), not console.is_terminal or os.environ.get("RANK", "0") != "0"
    return Progress(text, BarColumn(), *columns, console=console, transient=True, disable=nobody)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
