"""Manages the folder of a run: one run per folder, and one process at a time that writes to it.

config.json            the config of the run: the same config resumes it, another one is refused
environment.json       versions, hardware, settings and data of the last start (environment.py)
log.jsonl              losses, learning rate, speed; scores (log.py)
last.pt, previous.pt   checkpoints to resume from (checkpoint.py)
best.safetensors       the model with the highest mIoU so far
final.safetensors      the model after the last step
metrics.json           scores of the final model
confusion.npy, .png    confusion matrix of the last evaluation, and a picture of that of the final model
preview/000150.png     images, labels, predictions and errors of every evaluation
worst.png              the same of the images that the final model gets most wrong
report.html            curves, scores and pictures on one page (report)
failed.json            the samples of a step whose losses are not finite
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import IO

from apcnet.config import Config, differences
from apcnet.distributed import gather, rank
from apcnet.files import make_folder, read_json, remove_leftovers, write_json

BEST, FINAL = "best.safetensors", "final.safetensors"


def claim(folder: Path, config: Config) -> IO | None:
    """Creates the folder of a run, or checks that it holds the same run; all processes have to call this.

    Returns:
        In the first process a locked file: while it is open, no other run can claim the folder. Otherwise None.
    """
    lock, failure = None, None
    if rank() == 0:
        try:
            lock = _claim(folder, config)
        except (ValueError, OSError) as error:
            failure = error
    message = gather(str(failure or ""))[0]
    if message:
        raise failure or ValueError(message)
    return lock


def _claim(folder: Path, config: Config) -> IO:
    make_folder(folder, "out")
    lock = _lock(folder / "lock")
    if (folder / "config.json").exists():
        if changed := config_changes(read_config(folder), config):
            raise ValueError(another_run(folder, changed))
        remove_leftovers(folder)
    else:
        write_json(folder / "config.json", config.to_json())
    return lock


def _lock(path: Path) -> IO:
    """Locks a file until this process ends; its child processes do not inherit the lock."""
    file = path.open("a")
    try:
        import fcntl
    except ImportError:  # on Windows
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(
            f"out: another process is training in {path.parent}; wait for it, or name another folder with --out"
        ) from None
    return file


def config_changes(stored: Config, config: Config) -> list[str]:
    """Lists the differences between the stored config of a run and a new one; the root of its data may differ."""
    return differences(replace(stored, data=replace(stored.data, root=config.data.root)), config)


def another_run(folder: Path, changed: list[str]) -> str:
    """Returns the error message for a folder that holds another run."""
    return f"out: {folder} holds another run, {'; '.join(changed)}. Name another folder with --out, or add --new"


def read_config(folder: Path) -> Config:
    """Reads the config of the run in a folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a run, found no config.json in it")
    try:
        return Config.from_json(read_json(path))
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}; start another run with --new, or restore the file") from None


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
