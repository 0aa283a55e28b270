"""The part that all preparations share: making many files, several at a time, each written whole, none twice."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from apcnet.files import replacing

Progress = Callable[[int, int], None]


class Job(NamedTuple):
    out: Path
    make: Callable[[], np.ndarray | list[str]]  # a mask, or the lines of a list


class Prepared(NamedTuple):
    written: int
    kept: int


def run(jobs: Iterable[Job], progress: Progress | None = None) -> Prepared:
    """Makes what is not there yet. Lists come last, so that a name that is listed has its mask."""
    jobs = list(jobs)
    missing = [job for job in jobs if not os.path.lexists(job.out)]
    masks = [job for job in missing if job.out.suffix == ".png"]
    lists = [job for job in missing if job.out.suffix != ".png"]
    done = kept = len(jobs) - len(missing)
    report = progress or (lambda done, total: None)
    report(done, len(jobs))
    for folder in {job.out.parent for job in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes and encodes without holding the interpreter's lock
    try:
        for together in (masks, lists):
            for future in as_completed([pool.submit(_write, job) for job in together]):
                future.result()
                done += 1
                report(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)
    return Prepared(len(missing), kept)


def _write(job: Job) -> None:
    made = job.make()
    with replacing(job.out) as temporary:
        if isinstance(made, np.ndarray):
            Image.fromarray(made).save(temporary, format="PNG")
        else:
            temporary.write_text("".join(f"{line}\n" for line in made), encoding="utf-8")
