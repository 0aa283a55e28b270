"""What `python -m benchmarks.ablation` shows while it trains: a bar over all runs, or a line for each that ends."""

import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from apcnet import logs
from benchmarks.ablation import Recipe, Run, finished, result, write_results


class Display:
    """A bar over all runs, or, where nobody is looking, a line for each that ends."""

    def __init__(self, recipe: Recipe, chosen: Sequence[Run], out: Path, results: Path):
        self.recipe, self.chosen, self.out, self.results = recipe, chosen, out, results
        self.before, self.began = self.done(), time.monotonic()
        self.bar = bar() if sys.stderr.isatty() and find_spec("rich") else None
        if self.bar:
            self.bar.add_task("", total=len(chosen), completed=self.before, done=self.before, now="")

    def done(self) -> int:
        return sum(finished(self.out / run.path) for run in self.chosen)

    def __call__(self, under_way: Sequence[Run], ended: Run | None) -> None:
        if ended is not None:
            self.end(ended)
        if self.bar:
            parts = {run: self.part(run) for run in under_way}
            now = "  ".join(f"{run} {part:.0%}" for run, part in parts.items())
            done = self.done()
            self.bar.update(self.bar.task_ids[0], completed=done + sum(parts.values()), done=done, now=now)

    def part(self, run: Run) -> float:
        records = logs.read(self.out / run.path)
        return records[-1]["step"] / self.recipe.steps if records else 0.0

    def end(self, run: Run) -> None:
        if not finished(self.out / run.path):
            self.say(f"FAILED: {run}")
            return
        write_results(self.recipe, self.out, self.results)
        scores, done = result(run, self.out), self.done()
        text = f"{run}: mIoU {scores['miou']:.4f}, of context classes {scores['context_miou']:.4f}"
        if not self.bar:
            each = (time.monotonic() - self.began) / (done - self.before)
            left = each * (len(self.chosen) - done) / 60
            text = f"{done} of {len(self.chosen)}  {text}, about {left:.0f} minutes left"
        self.say(text)

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)


def bar():
    """With rich, which a machine that is lent for its GPU may lack."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.fields[done]} of {task.total} runs"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return Progress(*columns, TextColumn("{task.fields[now]}"), console=console, speed_estimate_period=1800)
