"""Runs the command line as one of several processes, the second of which fails: failing_rank.py HOW train …."""

import os
import signal
import sys
from pathlib import Path

from apcnet import cli
from apcnet.training.step import Trainer


def main(how: str, *arguments: str) -> None:
    usual = Trainer.step

    def step(trainer: Trainer, number: int, images, *others):
        if number == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "nan":
                images = images * float("nan")
            if how == "error":
                raise ValueError("labels: expected 0 to 8, got 9")
        return usual(trainer, number, images, *others)

    if os.environ["RANK"] == "1":
        Trainer.step = step
        root = Path(arguments[arguments.index("--root") + 1])
        if how == "one image less":
            arguments = tuple(str(root.with_name("less")) if word == str(root) else word for word in arguments)
        if how == "no images":
            arguments = tuple(str(root.with_name("none")) if word == str(root) else word for word in arguments)
    cli.main(list(arguments))


main(*sys.argv[1:])
