"""Saves and loads the state of a training run, so that a killed process never leaves a broken checkpoint.

    last.pt        weights, moving average, momentum, step: everything needed to resume
    previous.pt    the checkpoint before it

Each is written to a temporary file, flushed to disk and then renamed, so that one of the two always exists. Both hold
only tensors, numbers, strings, lists and dicts, and are loaded with `weights_only=True`.
"""

import os
import shutil
import warnings
import zipfile
from pathlib import Path

import torch

from apcnet.files import replacing

LAST, PREVIOUS = "last.pt", "previous.pt"


def save(folder: Path, state: dict) -> None:
    """Saves a state as last.pt, after the old last.pt has become previous.pt."""
    with replacing(folder / LAST) as temporary:
        with temporary.open("wb") as file:  # so that a full disk raises an OSError, not an error of PyTorch's
            torch.save(state, file)
        if (folder / LAST).exists():
            with replacing(folder / PREVIOUS) as second:
                try:  # a hard link; a copy if the file system has none
                    second.unlink()
                    os.link(folder / LAST, second)
                except OSError:
                    shutil.copyfile(folder / LAST, second)


def load(folder: Path, repair: bool = False) -> dict | None:
    """Loads last.pt, or previous.pt if last.pt is damaged; returns None if there is neither.

    `repair` renames a damaged last.pt, so that the next save does not make it previous.pt.
    """
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        state = _read(path)
        if isinstance(state, str):
            problems.append(f"{path}: {state}")
            continue
        if problems:
            warnings.warn(f"{problems[0]}; {PREVIOUS} of step {state['step']} is used instead", stacklevel=2)
            if repair:
                (folder / LAST).replace(folder / f"{LAST}.damaged")
        return state
    if problems:
        raise OSError(f"no checkpoint can be read: {'; '.join(problems)}; delete both to start from the first step")
    return None


def _read(path: Path) -> dict | str:
    """Returns the state in a file, or the reason why it cannot be read. It verifies checksums, unlike PyTorch."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                return f"damaged in {damaged}"
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise anything
        return f"damaged ({type(error).__name__})"
    if not isinstance(state, dict) or "step" not in state:
        return "holds no state of a run"
    return state
