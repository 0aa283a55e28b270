"""Manages the folder of a run: one run per folder, and one process at a time that writes to it.

config.json            the config of the run: the same one resumes it, another one may differ in MAY_CHANGE only
environment.json       versions, hardware, settings and data of the last start (environment.py)
log.jsonl              losses, learning rate, speed; scores (log.py)
last.pt, previous.pt   checkpoints to resume from (checkpoint.py)
best.safetensors       the model with the best score so far, by default the highest mIoU
final.safetensors      the model after the last step that was taken
metrics.json           scores of the final model
confusion.npy, .png    confusion matrix of the last evaluation, and a picture of it
images.csv             scores of every image in the last evaluation
images.json            levels of images that are not 8-bit RGB, measured before the first step
preview/000150.png     images, labels, predictions and errors of every evaluation
worst.png              the same of the images that the model gets most wrong
preview/*.npz, worst.npz   what these pictures show, for the report (panels.py)
legend.txt             numbers and names of classes, if pictures cannot show the names
report.html            curves, scores and pictures on one page (report)
curves.png             the curves of loss and mIoU as a picture
failed.json            the samples of a step whose losses are not finite
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apcnet.config import Config, Protocol, differences
from apcnet.distributed import gather, rank
from apcnet.files import make_folder, open_locked, read_json, remove_leftovers, write_json

BEST, FINAL = "best.safetensors", "final.safetensors"


# A run may go on with other values of these fields: the steps that it has taken keep their bits. The learning rates of
# the steps to come follow the new number of steps. Workers and logging are no fields of a config, and change no bits.
SCORING = (
    "val_split",
    "best_by",
    *(field.name for field in dataclasses.fields(Protocol)),
)  # the best model is chosen anew
MAY_CHANGE = ("root", "cache", "cache_gib", "steps", "eval_every", "save_every", "patience", *SCORING)


class AnotherRunError(ValueError):
    """Reports that a folder holds another run: `stored` is its config, `fields` are those that differ."""

    def __init__(self, folder: Path, stored: Config, changed: list[str]):
        self.stored, self.fields = stored, [_field_of(line) for line in changed]
        super().__init__(
            f"out: {folder} holds another run, {'; '.join(changed)}. Name another folder with --out, or add --new"
        )


@contextmanager
def claimed(folder: Path, config: Config) -> Iterator[Callable[[dict], None]]:
    """Holds the folder of a run, or raises an error if it holds another one; all processes have to enter this.

    While the block runs, no other run can enter with this folder. It gives the function that records the run and its
    environment, to be called after the first step; a block that fails without that call leaves the folder as it was.
    """
    claim, failure = None, None
    if rank() == 0:
        try:
            claim = Claim(folder, config)
        except (ValueError, OSError) as error:
            failure = error
    message = gather(str(failure or ""))[0]
    if message:
        raise failure or ValueError(message)
    try:
        yield claim.record if claim else lambda environment: None
    finally:
        if claim:
            claim.end()


class Claim:
    """Locks the folder of a run, checks that it holds no other run, and records the run."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config = folder, config
        preview = ("preview/000000.png", "preview/000000.npz", "preview/samples.npz", "preview")
        start = [folder / name for name in ("lock", "log.jsonl", "environment.json", *preview)]
        self.new = [path for path in (*start, folder, *folder.parents) if not path.exists()]  # before the first step
        make_folder(folder, "out")
        lock = open_locked(folder / "lock", "out", inherited=False)  # not by workers, which outlive a killed process
        if lock is None:
            raise ValueError(
                f"out: another process is training in {folder}; wait for it, or name another folder with --out"
            )
        self.lock = lock
        self.recorded = False
        try:
            if os.path.lexists(folder / "config.json"):
                try:
                    stored = read_config(folder)
                except ValueError as error:
                    raise ValueError(f"{error}; delete it and type the same command to resume, or add --new") from None
                if changed := config_changes(stored, config):
                    raise AnotherRunError(folder, stored, changed)
                remove_leftovers(folder)
        except (ValueError, OSError):
            self.end()
            raise

    def record(self, environment: dict) -> None:
        """Writes the config and the environment of the run, at the first call."""
        if self.recorded:
            return
        write_json(self.folder / "environment.json", environment)
        write_json(self.folder / "config.json", self.config.to_json())  # last: it makes the folder a run's
        self.recorded = True

    def end(self) -> None:
        """Unlocks the folder; without a recorded run, removes what the start has written."""
        if not self.recorded:
            for path in self.new:
                with suppress(OSError):  # it was never made, or holds files of others
                    path.rmdir() if path.is_dir() else path.unlink()
        self.lock.close()


def config_changes(stored: Config, config: Config) -> list[str]:
    """Lists the differences between the stored config of a run and a new one that the run cannot go on with."""
    return [line for line in differences(stored, config) if _field_of(line) not in MAY_CHANGE]


def scoring_changed(stored: Config, config: Config) -> bool:
    """Returns True if the scores of two configs cannot be compared."""
    return any(_field_of(line) in SCORING for line in differences(stored, config))


def _field_of(difference: str) -> str:
    return difference.partition(":")[0]


def read_config(folder: Path) -> Config:
    """Reads the config of the run in a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a run, found no config.json in it")
    try:
        return Config.from_json(read_json(path))
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}") from None


def unused_folder(folder: Path) -> Path:
    """Returns the folder, or the first of folder-2, folder-3, … that does not exist."""
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], others) if not path.exists())


def model_file(path: Path) -> Path:
    """Returns a model file, or for the folder of a run its final model, or the best one while it is not finished."""
    if not path.is_dir():
        return path
    for file in (path / FINAL, path / BEST):
        if file.exists():
            return file
    raise FileNotFoundError(
        f"{path}: expected a model file or the folder of a run, found neither {FINAL} nor {BEST} in it"
    )
