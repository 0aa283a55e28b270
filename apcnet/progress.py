"""Shows the progress of a training run: bars in a terminal or a notebook, lines everywhere else.

`RunDisplay` turns the records and events of `apcnet.training` into texts, and a screen shows them. The estimate of the
time left counts steps, evaluations and checkpoints, and is there from the second step on.
"""

import errno
import math
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from typing import Any, Protocol

Show = Callable[[dict], None]

STEPS = 20  # over so many steps the speed is averaged
FORWARD = 1 / 3  # of a training step's time for an image is taken by its evaluation; a guess before the first one
FIRST_SILENCE, SILENCE = 2, 30  # seconds without a line, after which a line shows that a run goes on
REDRAWN = 0.2  # seconds between two updates in a notebook


class Screen(Protocol):
    """Shows a line that stays, and bars that move: pairs of done and total, each with a text."""

    def line(self, text: str) -> None: ...
    def update(self, display: "RunDisplay") -> None: ...
    def close(self) -> None: ...


class Mean:
    """Averages numbers; those of long ago count less."""

    def __init__(self, horizon: int):
        self.decay, self.count, self.sum, self.weight = 1 - 1 / horizon, 0, 0.0, 0.0

    def add(self, value: float) -> None:
        if self.count == 1:  # the first one includes the start of workers and the choice of kernels
            self.sum = self.weight = 0.0
        self.count += 1
        self.sum, self.weight = self.decay * self.sum + value, self.decay * self.weight + 1

    @property
    def value(self) -> float | None:
        return self.sum / self.weight if self.count else None


class Pace:
    """Measures how long steps, evaluations and checkpoints of a run take, and estimates how long the others will."""

    def __init__(self, started: dict, now: float):
        self.steps, self.batch_size, self.images = (started[name] for name in ("steps", "batch_size", "val_images"))
        self.eval_every, self.save_every = started["eval_every"], started["save_every"]
        self.step = self.saved = self.evaluated = started["step"]
        self.step_seconds, self.eval_seconds, self.save_seconds = Mean(STEPS), Mean(3), Mean(3)
        self.last = now  # when the last step, evaluation or checkpoint ended
        self.current: tuple[float, int, int] | None = None  # start, done and total of the evaluation that runs

    def took_step(self, step: int, now: float) -> None:
        self.step_seconds.add(now - self.last)
        self.step, self.last = step, now

    def took_save(self, now: float) -> None:
        self.save_seconds.add(now - self.last)
        self.saved, self.last = self.step, now

    def evaluates(self, done: int, total: int, now: float) -> None:
        self.current = (self.current[0] if self.current else now), done, total

    def took_evaluation(self, now: float) -> None:
        self.eval_seconds.add(now - self.last)
        self.evaluated, self.last, self.current = self.step, now, None

    @property
    def speed(self) -> float | None:
        """Returns the number of images a second in training, without evaluations and checkpoints."""
        seconds = self.step_seconds.value
        return self.batch_size / seconds if seconds else None

    def left(self, now: float) -> float | None:
        """Returns the seconds until the run ends, or None before the first step."""
        seconds = self.step_seconds.value
        if seconds is None:
            return None
        evaluations = _due(self.evaluated, self.steps, self.eval_every)
        each, both = (self.save_every, self.eval_every), math.lcm(self.save_every, self.eval_every)
        saves = sum(_due(self.saved, self.steps, every) for every in each) - _due(self.saved, self.steps, both)
        total = (self.steps - self.step) * seconds + evaluations * self._evaluation(seconds, now)
        return max(total + saves * (self.save_seconds.value or 0) - (now - self.last), 0)

    def _evaluation(self, step_seconds: float, now: float) -> float:
        if self.eval_seconds.value is not None:
            return self.eval_seconds.value
        if self.current and self.current[1]:
            start, done, total = self.current
            return (now - start) / done * total
        return self.images * step_seconds / self.batch_size * FORWARD


class RunDisplay:
    """Shows the records and events of a run on a screen, by default the one that fits where Python runs."""

    def __init__(self, screen: Screen | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock, self.screen = clock, screen or screen_here()
        self.pace: Pace | None = None
        self.status, self.memory = "", ""

    def __call__(self, record: dict) -> None:
        try:
            self._show(record)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            _leave_terminal()

    def left(self) -> str:
        """Returns the time that the run still needs."""
        seconds = self.pace.left(self.clock()) if self.pace else None
        return "unknown time" if seconds is None else clock_text(seconds)

    def _show(self, record: dict) -> None:
        now = self.clock()
        match record.get("event"):
            case "started":
                self.pace = Pace(record, now)
                self._started(record)
            case "step" if self.pace:
                self.pace.took_step(record["step"], now)
                speed = self.pace.speed
                images = f"  {speed:.1f} images/s" if speed else ""
                self.status = f"loss {record['values']['loss']:.4f}  lr {record['values']['lr']:.2e}{images}"
                self.screen.update(self)
            case "saved" if self.pace:
                self.pace.took_save(now)
            case "evaluating" if self.pace:
                self.pace.evaluates(record["done"], record["total"], now)
                self.screen.update(self)
            case "stopped":
                self.screen.line(f"stopped after step {record['step']:,}; the same command resumes from there")
            case "over" if self.pace and record["step"] < self.pace.steps:
                self.screen.line(
                    f"no better score in {record['waited']} evaluations: the run ends at step {record['step']:,} of "
                    f"{self.pace.steps:,}"
                )
            case "evaluated" if self.pace:
                self.pace.took_evaluation(now)
                self.screen.update(self)
            case None if self.pace:
                (self._scores if "miou" in record else self._losses)(record)

    def _started(self, event: dict) -> None:
        several = f" in {event['processes']} processes" if event["processes"] > 1 else ""
        self.screen.line(
            f"{event['folder']}: {event['parameters'] / 1e6:.2f} M parameters, {event['images']:,} training images, "
            f"{event['val_images']:,} validation images, {event['steps']:,} steps of {event['batch_size']} images, "
            f"on {event['device']}{several}"
        )
        if event["step"]:
            self.screen.line(f"resuming at step {event['step']:,}")
        self.screen.update(self)

    def _losses(self, record: dict) -> None:
        self.memory = f"  {record['memory_mib']:,} MiB"
        if isinstance(self.screen, Lines):
            self.screen.line(self.progress())
        else:
            self.screen.update(self)

    def _scores(self, record: dict) -> None:
        context = f"  context mIoU {record['context_miou']:.4f}" if "context_miou" in record else ""
        best = f"best {record['best']['miou']:.4f} at step {record['best']['step']:,}"
        self.screen.line(
            f"step {record['step']:,}  mIoU {record['miou']:.4f}{context}  aAcc {record['aacc']:.4f}  ({best})"
        )

    def progress(self) -> str:
        """Returns a line about the last step, or about the evaluation that runs."""
        assert self.pace is not None
        if self.pace.current:
            return f"evaluating {self.pace.current[1]:,} of {self.pace.current[2]:,} images  {self.left()} left"
        return f"step {self.pace.step:,} of {self.pace.steps:,}  {self.status}{self.memory}  {self.left()} left"


class Lines:
    """Prints lines, for files and pipes, and where the package rich is missing."""

    def __init__(self):
        self.printed, self.silence = time.monotonic(), FIRST_SILENCE

    def line(self, text: str) -> None:
        self.printed = time.monotonic()
        print(text, flush=True)

    def update(self, display: RunDisplay) -> None:
        if time.monotonic() - self.printed >= self.silence and display.status:
            self.line(display.progress())
            self.silence = SILENCE

    def close(self) -> None:
        pass


class Terminal:
    """Draws bars with the package rich, below the lines."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        terminal = self

        class Left(ProgressColumn):
            """Shows the time left, which moves between two steps too."""

            def render(self, task: Any) -> Text:
                display = terminal.display
                return Text(f"{display.left()} left" if display and task.id == terminal.training else "")

        self.display: RunDisplay | None = None
        self.training = self.evaluating = None
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            Left(),
            console=Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True),
            transient=True,
        )

    def line(self, text: str) -> None:
        self.bars.console.print(text)

    def update(self, display: RunDisplay) -> None:
        pace, self.display = display.pace, display
        assert pace is not None
        if self.training is None:
            self.training = self.bars.add_task("training", total=pace.steps, status="")
            self.bars.start()
        self.bars.update(self.training, completed=pace.step, status=display.status + display.memory)
        if pace.current:
            if self.evaluating is None:
                self.evaluating = self.bars.add_task("evaluating", total=None, status="")
            self.bars.update(self.evaluating, completed=pace.current[1], total=pace.current[2])
        elif self.evaluating is not None:
            self.bars.remove_task(self.evaluating)
            self.evaluating = None

    def close(self) -> None:
        self.bars.stop()


class Notebook:
    """Updates the output of a cell: bars in HTML, with the lines below them."""

    def __init__(self):
        from IPython.display import HTML, display

        self.html, self.show = HTML, display
        self.handle: Any = None
        self.lines: list[str] = []
        self.bars, self.drawn = "", -math.inf

    def line(self, text: str) -> None:
        self.lines.append(text)
        self._draw()

    def update(self, display: RunDisplay) -> None:
        pace = display.pace
        assert pace is not None
        done, total = pace.current[1:] if pace.current else (pace.step, pace.steps)
        self.bars = f'<progress value="{done}" max="{total}"></progress> {escape(display.progress())}'
        if time.monotonic() - self.drawn >= REDRAWN:
            self._draw()

    def close(self) -> None:
        self.bars = ""
        self._draw()

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        content = self.html(f"<div>{self.bars}</div><pre>{escape(chr(10).join(self.lines))}</pre>")
        if self.handle is None:
            self.handle = self.show(content, display_id=True)
        else:
            self.handle.update(content)


def screen_here() -> Screen:
    """Returns the screen that fits: a notebook's, a terminal's, or lines."""
    interactive = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(interactive, "kernel"):
        return Notebook()
    if sys.stdout.isatty() and sys.stderr.isatty() and find_spec("rich"):
        return Terminal()
    return Lines()


@contextmanager
def shown(progress: bool | Show) -> Iterator[Show]:
    """Gives the function that shows a run: the given one, a display of its own for True, or none."""
    if not isinstance(progress, bool):
        if not callable(progress):
            raise TypeError(f"progress: expected True, False or a function, got {progress!r}")
        yield progress
    elif not progress:
        yield lambda record: None
    else:
        display = RunDisplay()
        try:
            yield display
        finally:
            display.screen.close()


def clock_text(seconds: float) -> str:
    """Returns a time as minutes and seconds, or hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _due(start: int, steps: int, every: int) -> int:
    """Counts the steps after `start` that end an interval of so many steps, or the run."""
    return steps // every - start // every + (steps % every > 0 and start < steps)


def _leave_terminal() -> None:
    """Sends all further output nowhere, after the terminal was closed: a run goes on, or stops in order."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):  # not a file or a pipe
            os.dup2(nowhere, output)
    os.close(nowhere)
