"""Converts the fields of dataclasses to their declared types, and checks their values."""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from apcnet.choices import check_choice

# Conditions on values: the words of the error message, and the test.
COUNT = "1 or more", lambda count: count >= 1
SIDES = "two sides of 1 or more", lambda sides: min(sides) >= 1
LARGEST = 3.4e38  # float32 holds no larger number, and PyTorch's optimizer raises an error
POSITIVE = f"a positive number up to {LARGEST}", lambda number: 0 < number <= LARGEST
NOT_NEGATIVE = "0 or more", lambda number: 0 <= number < math.inf
FRACTION = "0 or more, but less than 1", lambda part: 0 <= part < 1


def fields(section) -> Iterator[tuple[str, object]]:
    """Yields the names and values of a dataclass, and of those that it holds in their place."""
    for name, value in vars(section).items():
        yield from fields(value) if dataclasses.is_dataclass(value) else [(name, value)]


def convert_fields(section) -> None:
    """Converts every field to its declared type, so that lists become tuples and strings become paths."""
    for name, kind in typing.get_type_hints(type(section)).items():
        object.__setattr__(section, name, convert(kind, getattr(section, name), name))


def check(section, expected: str, is_allowed: Callable, *names: str) -> None:
    """Raises a ValueError for the first of these fields that is given and not allowed."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not is_allowed(value):
            raise ValueError(f"{name}: expected {expected}, got {value}")


def convert(kind: typing.Any, given: typing.Any, name: str) -> typing.Any:
    """Converts a value to a declared type, or raises an error that names the field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(given, dict):
        for key in given:
            check_choice(key, f"field of {name}", typing.get_type_hints(kind))
        return kind(**given)
    if {str, Path} < set(arguments) and isinstance(given, str) and "://" in given:
        return given  # an address: as a path, it would lose a slash
    if {str, Path} < set(arguments):
        return None if given is None else convert(Path, given, name)
    if origin in (typing.Union, types.UnionType):  # always X | None
        return None if given is None else convert(next(a for a in arguments if a is not type(None)), given, name)
    if origin is Literal:
        check_choice(str(convert(type(arguments[0]), given, name)), name, map(str, arguments))
        return given
    if origin is tuple and isinstance(given, (list, tuple)):
        if arguments[-1] is not ... and len(given) != len(arguments):
            raise ValueError(f"{name}: expected {len(arguments)} numbers, got {list(given)}")
        return tuple(convert(arguments[0], item, name) for item in given)  # the items of a tuple share one type
    if origin is dict and isinstance(given, dict):
        decimal = arguments[0] is int  # JSON's keys are strings
        keys = (int(key) if decimal and str(key).isdecimal() else key for key in given)
        pairs = zip(keys, given.values(), strict=True)
        return {convert(arguments[0], key, name): convert(arguments[1], item, name) for key, item in pairs}
    if kind is float and type(given) is int:
        return float(given)
    if kind is Path and isinstance(given, (str, Path)):
        return Path(given)
    if kind is int and not isinstance(given, bool) and hasattr(given, "__index__"):  # NumPy integers too
        return operator.index(given)
    if type(given) is not kind:
        raise TypeError(f"{name}: expected {kind if origin else kind.__name__}, got {given!r}")
    return given
