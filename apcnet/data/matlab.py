"""Reads one field of one structure from a .mat file of MATLAB 5 to 7, which is how SBD stores its masks.

Such a file is a header of 128 bytes and then elements, each a tag (type, size) and that many bytes, padded to a
multiple of 8. Up to 4 bytes may be stored in the tag itself. A variable is an element of type 14, or of type 15 if
compressed. It consists of elements again: flags, shape and name, and then, for a structure, the length of its fields'
names, the names, and one variable for each field; for an array, the numbers, column by column.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

MATRIX, COMPRESSED = 14, 15
STRUCTURE, NUMBERS = 2, range(6, 16)  # kinds of variables
STORED_AS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}


class Variable(NamedTuple):
    """Holds a decoded variable, its content still as elements (type, bytes)."""

    kind: int
    shape: list[int]
    name: str
    content: list[tuple[int, memoryview]]


def read_field(path: Path, variable: str, field: str) -> np.ndarray:
    """Reads the array `variable.field` from a .mat file."""
    data = path.read_bytes()
    if not data.startswith(b"MATLAB 5.0 MAT-file") or data[126:128] != b"IM":
        raise ValueError(f"{path}: expected a little-endian MAT-file of version 5 to 7, got something else")
    try:
        for kind, element in _elements(memoryview(data)[128:]):
            if kind == COMPRESSED:
                ((kind, element),) = _elements(memoryview(zlib.decompress(element)))
            if kind == MATRIX and (found := _variable(element)).name == variable:
                return _numbers(_variable(_fields(found)[field]))
    except (struct.error, zlib.error, ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {variable}.{field} cannot be read, {type(error).__name__}: {error}") from error
    raise ValueError(f"{path}: expected the variable {variable}, but there is none")


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        start, stop = at + 8, at + 8 + size
        following = stop if kind == COMPRESSED else at + 8 + -(-size // 8) * 8
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            start, stop, following = at + 4, at + 4 + size, at + 8
        yield kind, data[start:stop]
        at = following


def _variable(data: memoryview) -> Variable:
    (_, flags), (_, shape), (_, name), *content = _elements(data)
    return Variable(flags[0], np.frombuffer(shape, "<i4").tolist(), bytes(name).decode(), content)


def _fields(variable: Variable) -> dict[str, memoryview]:
    if variable.kind != STRUCTURE:
        raise ValueError("expected a structure, got another kind of variable")
    (_, length), (_, names), *values = variable.content
    length, names = int.from_bytes(length, "little"), bytes(names)
    fields = [names[i : i + length].rstrip(b"\0").decode() for i in range(0, len(names), length)]
    return {field: value for field, (_, value) in zip(fields, values, strict=True)}


def _numbers(variable: Variable) -> np.ndarray:
    if variable.kind not in NUMBERS:
        raise ValueError("expected an array of numbers, got another kind of variable")
    stored, numbers = variable.content[0]
    return np.frombuffer(numbers, STORED_AS[stored]).reshape(variable.shape, order="F")
