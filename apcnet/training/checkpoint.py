"""Saves and loads the state of a training run, so that a killed process never leaves a broken checkpoint.

    last.pt        weights, moving average, momentum, step: everything needed to resume
    previous.pt    the checkpoint before it

Each is written to a temporary file, flushed to disk and then renamed, so that one of the two always exists. Both hold
only tensors, numbers, strings, lists and dicts (State); reading them runs no code (apcnet.interop.pickles).
"""

import os
import shutil
import types
import typing
import warnings
from pathlib import Path
from typing import IO, Any, TypedDict, cast

import torch
from torch import Tensor

from apcnet.config import Config
from apcnet.files import replacing
from apcnet.interop import pickles

LAST, PREVIOUS = "last.pt", "previous.pt"


class WithLoss(TypedDict, total=False):
    """Holds the loss of an evaluation, if the best model is chosen by it."""

    loss: float


class Best(WithLoss):
    """Describes the best evaluation so far."""

    miou: float
    dice: float
    step: int


class State(TypedDict):
    """Describes the entries of a checkpoint."""

    step: int  # the number of steps that are done
    evaluated: int  # the step of the last evaluation
    best: Best | None
    waited: int  # the number of evaluations after the best one
    objects: dict[str, str]  # the names of what the user passed in place of built-in parts, see own.py
    config: dict[str, Any]  # see Config.to_json
    images: int  # the number of training samples
    sample_names: str  # a digest of their names
    class_weights: list[float | int] | None
    environment: dict[str, str | int]  # see environment.py
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[int, dict[str, Tensor | None]]  # the momentum of every parameter, by its number
    scaler: dict[str, float | int]


def save(folder: Path, state: State) -> None:
    """Saves a state as last.pt, after the old last.pt has become previous.pt."""
    with replacing(folder / LAST) as temporary:
        with temporary.open("wb") as file:
            output = _Output(file)
            torch.save(state, output)
            if output.error is not None:
                raise output.error
        if (folder / LAST).exists():
            with replacing(folder / PREVIOUS) as second:
                try:  # a hard link; a copy if the file system has none
                    second.unlink()
                    os.link(folder / LAST, second)
                except OSError:
                    shutil.copyfile(folder / LAST, second)


def load(folder: Path, repair: bool = False) -> State | None:
    """Loads last.pt, or previous.pt if last.pt is damaged; returns None if there is neither.

    `repair` renames a damaged last.pt, so that the next save does not make it previous.pt.
    """
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not os.path.lexists(path):
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
        raise OSError(f"no checkpoint can be read: {'; '.join(problems)}; start from the first step with --new")
    return None


def _read(path: Path) -> State | str:
    """Returns the state in a file, or the reason why it cannot be read. It verifies checksums, unlike torch.load."""
    if not path.is_file():
        return "expected a file, found something else"  # reading a pipe would never end
    try:
        state = pickles.read(path)
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")
    return _problem(state) or cast(State, state)


def _problem(state: Any) -> str | None:
    """Returns what is wrong with the entries of a state, or None."""
    if not isinstance(state, dict):
        return f"expected a dict, got {type(state).__name__}"
    for name, kind in typing.get_type_hints(State).items():
        if name not in state:
            return f"expected an entry {name!r}, found none"
        if not _fits(state[name], kind):
            found = state[name] if state[name] is None else type(state[name]).__name__
            return f"entry {name!r}: expected {getattr(kind, '__name__', kind)}, found {found} or other contents"
    try:
        steps = Config.from_json(state["config"]).steps
    except (ValueError, TypeError) as error:
        return f"entry 'config': {error}"
    if state["best"] and not 0 <= state["best"]["miou"] <= 1:
        return f"entry 'best': expected a miou from 0 to 1, found {state['best']['miou']}"
    best = state["best"]["step"] if state["best"] else 0
    if not 0 <= best <= state["evaluated"] <= state["step"] <= steps:
        found = f"best {best}, evaluated {state['evaluated']}, step {state['step']}, steps {steps}"
        return f"entry 'step': expected steps in this order, found {found}"
    return None


def _fits(value: object, kind: Any) -> bool:
    """Tells whether a value has a declared type, and everything in it too."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if typing.is_typeddict(kind):
        hints = typing.get_type_hints(kind)
        return (
            isinstance(value, dict)
            and kind.__required_keys__ <= value.keys() <= hints.keys()
            and all(_fits(item, hints[name]) for name, item in value.items())
        )
    return type(value) is kind


class _Output:
    """Passes bytes on to a file, and keeps the system's error: PyTorch's writer would end in an error of its own."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.error: OSError | None = None

    def write(self, data) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass  # closing the file does it
