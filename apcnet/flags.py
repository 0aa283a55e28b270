"""Writes commands that a user can type: the one that starts a run, and the two ways on where a folder holds another."""

import functools
import itertools
import shlex
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass

from apcnet.config import Config
from apcnet.presets import names, preset


def refuse_minutes(words: Sequence[str]) -> None:
    """Raises an error that names the flag to use for --checkpoint-every MINUTES, which other packages have."""
    for word, following in itertools.zip_longest(words, words[1:]):
        flag, _, value = word.replace("_", "-").partition("=")
        if flag == "--checkpoint-every":
            minutes = value or following or "MINUTES"
            raise ValueError(
                f"checkpoint_every: expected steps, --save-every STEPS, got minutes, {minutes}: processes share "
                "no clock, so they would save at different steps, and a repeated run would save others. "
                f"{minutes} minutes are {minutes} × 60 × images_per_second / batch_size steps; the log of a run has "
                "images_per_second"
            )


def flags(config: Config) -> dict[str, list[str]]:
    """Returns the flag of every field of a config, with its value, as words of a command line."""
    return dict(_flags(config))


def train_command(config: Config, out: str) -> list[str]:
    """Returns the words of the shortest command that trains a config: a preset, and the flags that differ from it."""
    wanted, best = flags(config), None
    for name, given in _presets().items():
        changed = [word for field, words in wanted.items() if words != given[field] for word in words]
        if name == "folder" and not {"--init", "--from-scratch", "--backbone", "--backbone-weights"} & set(changed):
            changed += wanted["backbone_weights"]  # the preset's own default depends on what is installed
        if best is None or len(changed) < len(best[1]):
            best = name, changed
    assert best is not None  # there are presets
    name, changed = best
    return ["apcnet", "train", *([] if name == "tiny" else [name]), *changed, "--out", out]


def ways_on(words: Sequence[str], stored: Config, fields: Sequence[str], defaults: Config) -> tuple[str, str]:
    """Returns the command that goes on with a stored run, and the one that starts a new run beside it.

    Args:
        words: The command that was typed.
        stored: The config of the run.
        fields: The names of the fields in which the command differs from it.
        defaults: The config without any flag.
    """
    default, before = flags(defaults), flags(stored)
    changed = [name for name in fields if name in before]
    more = itertools.chain.from_iterable(before[name] for name in changed if before[name] != default[name])
    return shlex.join([*_without(words, changed), *more]), shlex.join([*words, "--new"])


@functools.cache
def _presets() -> dict[str, dict[str, list[str]]]:
    """Returns the flags of every preset."""
    return {name: flags(preset(name)) for name in names()}


def _flags(section) -> Iterator[tuple[str, list[str]]]:
    kinds = typing.get_type_hints(type(section))
    for name, value in vars(section).items():
        dashed = name.replace("_", "-")
        if is_dataclass(value):
            yield from _flags(value)
        elif kinds[name] is bool:
            yield name, [f"--{dashed}" if value else f"--no-{dashed}"]
        elif isinstance(value, dict):
            yield name, [f"--{dashed}", *(str(word) for pair in value.items() for word in pair)]
        else:
            yield name, [f"--{dashed}", *map(str, value if isinstance(value, tuple) else [value])]


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Removes the flags of these fields and their values."""
    dashed = [name.replace("_", "-") for name in names]
    unwanted = {f"--{no}{name}" for name in dashed for no in ("", "no-")}
    kept, taken = [], True
    for word in words:
        if word.startswith("--"):
            taken = word.partition("=")[0].replace("_", "-") not in unwanted
        if taken:
            kept.append(word)
    return kept
