"""The state of a training run on disk: whole at every moment, whatever happens to the process.

    last.pt        weights, moving average, momentum, step: all that is needed to go on
    previous.pt    the one before

Each is written beside its place, reaches the disk, and is then renamed; neither is ever missing while the other is
replaced. Both hold tensors, numbers, strings, lists and dicts alone, and are read with nothing else allowed.
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
    """Makes a state the last one, and the last one the previous one."""
    with replacing(folder / LAST) as temporary:
        with temporary.open("wb") as file:  # a full disk is then the system's own error, not PyTorch's
            torch.save(state, file)
        if (folder / LAST).exists():
            with replacing(folder / PREVIOUS) as second:
                try:  # a second name for the same bytes; a copy where the file system has no second names
                    second.unlink()
                    os.link(folder / LAST, second)
                except OSError:
                    shutil.copyfile(folder / LAST, second)


def load(folder: Path, mend: bool = False) -> dict | None:
    """The last state, the previous one if the last cannot be read, None if there is none.

    `mend` puts a last state that cannot be read aside, so that the next one does not take the previous one's place.
    """
    troubles = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        trouble, state = _read(path)
        if trouble:
            troubles.append(f"{path}: {trouble}")
            continue
        if troubles:
            warnings.warn(f"{troubles[0]}; {PREVIOUS} of step {state['step']} is used instead", stacklevel=2)
            if mend:
                (folder / LAST).replace(folder / f"{LAST}.damaged")
        return state
    if troubles:
        raise OSError(f"no checkpoint can be read: {'; '.join(troubles)}")
    return None


def _read(path: Path) -> tuple[str | None, dict | None]:
    """Why a state cannot be read, or the state. Its checksums are looked at, which PyTorch does not do."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                return f"damaged in {damaged}", None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged bytes anything may come
        return f"damaged ({type(error).__name__})", None
    if not isinstance(state, dict) or "step" not in state:
        return "holds no state of a run", None
    return None, state
