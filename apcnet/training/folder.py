"""The folder of a run: one run a folder, one process at a time that writes to it, and what the run in it is.

config.json            what the run is: the same config goes on, another one is refused
environment.json       where it runs
log.jsonl              losses, learning rate, speed; scores (log.py)
last.pt, previous.pt   where to go on (checkpoint.py)
best.safetensors       the model with the highest mIoU so far
final.safetensors      the model after the last step
metrics.json           its scores
confusion.npy, .png    its confusion matrix
preview/000150.png     images, truth, predictions and errors at every evaluation
failed.json            the samples of a step whose losses are not finite
"""

import itertools
import platform
import warnings
from dataclasses import replace
from pathlib import Path
from typing import IO

import torch

from apcnet.config import Config, differences
from apcnet.distributed import gather, rank, world_size
from apcnet.files import read_json, remove_leftovers, write_json

BEST, FINAL = "best.safetensors", "final.safetensors"


def claim(folder: Path, config: Config) -> IO | None:
    """Makes the folder for a run, or finds that the run in it is this one, for all processes.

    Returns:
        of the first process a file that is locked for as long as it is open: no second run writes there.
    """
    lock, trouble = None, None
    if rank() == 0:
        try:
            lock = _claim(folder, config)
        except (ValueError, OSError) as error:
            trouble = error
    told = gather(str(trouble or ""))[0]
    if told:
        raise trouble or ValueError(told)
    return lock


def _claim(folder: Path, config: Config) -> IO:
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder / "lock")
    if (folder / "config.json").exists():
        if changed := changes(read_config(folder), config):
            raise ValueError(f"out: {folder} holds another run, {'; '.join(changed)}. Name another folder")
        remove_leftovers(folder)
    else:
        write_json(folder / "config.json", config.to_json())
    now, path = environment(), folder / "environment.json"
    if path.exists():
        before = read_json(path)
        if changed := [f"{key}: {before.get(key)} → {now[key]}" for key in now if before.get(key) != now[key]]:
            warnings.warn(f"{folder}: its bits may differ from here on, {'; '.join(changed)}", stacklevel=3)
    else:
        write_json(path, now)
    return lock


def _locked(path: Path) -> IO:
    """The lock goes with the process, however that ends; the processes that it starts have no part in it."""
    file = path.open("a")
    try:
        import fcntl
    except ImportError:  # on Windows
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(f"out: another process is training in {path.parent}") from None
    return file


def changes(there: Config, config: Config) -> list[str]:
    """What differs between two configs of a run. Its data may have moved."""
    return differences(replace(there, data=replace(there.data, root=config.data.root)), config)


def read_config(folder: Path) -> Config:
    """What the run in a folder is."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: there is no run, it has no config.json")
    try:
        return Config.from_json(read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def unused_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, … that is not there yet."""
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], others) if not path.exists())


def model_file(path: Path) -> Path:
    """The file of a model: of a run's folder the last one, while it goes on the best so far."""
    if not path.is_dir():
        return path
    for file in (path / FINAL, path / BEST):
        if file.exists():
            return file
    raise FileNotFoundError(
        f"{path}: expected a model's file or a run's folder, there is neither {FINAL} nor {BEST} in it"
    )


def environment() -> dict:
    """What the bits of a run depend on beside its config."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} {capability}",
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }
