"""The state of a training run on disk: whole at every moment, whatever happens to the process.

    last.pt        weights, moving average, momentum, step: all that is needed to go on
    previous.pt    the one before

Each is written beside its place, reaches the disk, and is then renamed; neither is ever missing while the other is
replaced. Both hold tensors, numbers, strings, lists and dicts alone, and are read with nothing else allowed.
"""

import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch

from apcnet.files import replacing

LAST, PREVIOUS = "last.pt", "previous.pt"


def save(folder: Path, state: dict) -> None:
    """Makes a state the last one, and the last one the previous one."""
    with replacing(folder / LAST) as temporary:
        torch.save(state, temporary)
        if (folder / LAST).exists():
            with replacing(folder / PREVIOUS) as second:
                _duplicate(folder / LAST, second)


def load(folder: Path) -> dict | None:
    """The last state, the previous one if the last cannot be read, None if there is none."""
    troubles = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            troubles.append(f"{path}: {type(error).__name__} {str(error).partition(chr(10))[0]}")
            continue
        if troubles:
            warnings.warn(f"{troubles[0]}; {PREVIOUS} of step {state['step']} is used instead", stacklevel=2)
        return state
    if troubles:
        raise OSError(f"no checkpoint can be read: {'; '.join(troubles)}")
    return None


def _duplicate(path: Path, into: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no second names."""
    into.unlink()
    try:
        os.link(path, into)
    except OSError:
        shutil.copyfile(path, into)
