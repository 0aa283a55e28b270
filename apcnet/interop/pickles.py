"""Reads a checkpoint of any origin without running any code in it, and without trusting any number in it.

`torch.save` writes a zip archive with a pickle and an entry for each storage, uncompressed, each with its checksum.
Before PyTorch 1.6 it wrote four pickles and then the storages one after another. `unpickler` builds the objects; this
module finds the numbers of the tensors, and reads no more of them than the file holds.
"""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from apcnet.files import printable
from apcnet.interop.unpickler import Inert, RefusedNameError, Unpickler
from apcnet.models.weights import listed

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of a file of torch before 1.6
SMALL = 1 << 16  # bytes that may be asked for unchecked
LEGACY_PROTOCOL = 1001
DIRECTORY = 1 << 24  # bytes of a zip archive's list of entries; 10,000 tensors take a tenth


def read(path: str | Path) -> dict[str, Any]:
    """Reads the dictionary in a checkpoint (torch's zip or legacy format, or safetensors) to the CPU."""
    path = Path(path)
    with _File(io.FileIO(path)) as file:
        head = file.peek(64)[:64]
        try:
            if head[8:9] == b"{":
                return safetensors.torch.load(file.read())
            checkpoint = (_read_zip if head.startswith(ZIP_MAGIC) else _read_legacy)(file, head)
        except RefusedNameError as error:
            raise ValueError(
                f"{path}: expected a checkpoint, got a file that runs {printable(error)} when it is loaded; no "
                "checkpoint needs that. It was not loaded and nothing in it was run"
            ) from None
        except _AnotherFileError as error:
            raise ValueError(f"{path}: expected a checkpoint{error}") from None
        except Exception as error:  # an untrusted file can make a library raise anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"{path}: expected a whole checkpoint, got a damaged or incomplete file: {kind}{printable(error)}"
            ) from error
    if not isinstance(checkpoint, dict):
        found = "a pickled object" if isinstance(checkpoint, Inert) else type(checkpoint).__name__
        raise ValueError(
            f"{path}: expected a dictionary of weights, got {found}; write one by torch.save(model.state_dict(), path)"
        )
    return checkpoint


def weights(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Returns the weights in a checkpoint, without DistributedDataParallel's prefix of their names."""
    found = [checkpoint[key] for key in ("state_dict", "model") if key in checkpoint]
    state_dict = found[0] if found else checkpoint
    expected = f"{path}: expected a dict of weights, alone or under state_dict or model"
    if not isinstance(state_dict, dict) or not state_dict:
        given = "an empty dict" if isinstance(state_dict, dict) else type(state_dict).__name__
        raise ValueError(f"{expected}, got {given}")
    others = [str(name) for name, value in state_dict.items() if not isinstance(value, Tensor) or type(name) is not str]
    if others:
        raise ValueError(f"{expected}, got others: {listed(others)}")
    return {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}


class _AnotherFileError(ValueError):
    """Says that a file is no checkpoint; its text ends the sentence "expected a checkpoint"."""


class _File(io.BufferedReader):
    """Reads a file, and refuses to read more than it holds, or than `largest`, at once: a file may declare any size."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw)
        self.size = self.largest = os.fstat(raw.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > SMALL:
            most = min(self.size - self.tell(), self.largest)
            if size > most:
                raise ValueError(f"it declares {size:,} bytes where at most {most:,} can be")
        return super().read(size)

    def fill(self, numbers: Tensor) -> memoryview:
        """Reads the bytes of a tensor, and returns them."""
        memory = memoryview(numbers.view(torch.uint8).numpy())
        if self.readinto(memory) != len(memory):
            raise ValueError("it ends inside the numbers of a tensor")
        return memory


class _Space:
    """Allocates tensors for stored numbers, and refuses more bytes than the file holds."""

    def __init__(self, file: _File):
        self.left = file.size

    def take(self, dtype: torch.dtype, count: int) -> Tensor:
        self.left -= count * dtype.itemsize
        if self.left < 0:
            raise ValueError("it declares more numbers than it holds")
        return torch.empty(count, dtype=dtype)


def _read_zip(file: _File, head: bytes) -> Any:
    file.largest = DIRECTORY
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise ValueError("it has two entries of one name")
    pickled = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1 or any(name.endswith("/constants.pkl") for name in entries):
        raise _AnotherFileError(" that torch.save wrote, got another zip archive or TorchScript")
    root, space = pickled[0].removesuffix("data.pkl"), _Space(file)

    def content(name: str, dtype: torch.dtype, count: int | None = None) -> Tensor:
        entry = entries.get(root + name)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"expected {name} in it without compression, got {'no' if entry is None else 'another'}")
        if count is not None and count != entry.file_size // dtype.itemsize:
            raise ValueError(f"{name} has {entry.file_size:,} bytes, expected {count:,} numbers of {dtype}")
        numbers = space.take(torch.uint8, entry.file_size)
        file.seek(entry.header_offset)
        names = struct.unpack("<4s22xHH", file.read(30))
        file.seek(sum(names[1:]), os.SEEK_CUR)
        if names[0] != ZIP_MAGIC or zlib.crc32(file.fill(numbers)) != entry.CRC:
            raise ValueError(f"{name} differs from its checksum")
        return numbers[: entry.file_size // dtype.itemsize * dtype.itemsize].view(dtype)

    if f"{root}byteorder" in entries and bytes(content("byteorder", torch.uint8).tolist()) != b"little":
        raise ValueError("its numbers are big-endian")
    unpickler = Unpickler(lambda dtype, key, count: content(f"data/{key}", dtype, count))
    return unpickler.run(io.BytesIO(content("data.pkl", torch.uint8).numpy()))


def _read_legacy(file: _File, head: bytes) -> Any:
    unpickler = Unpickler(lambda dtype, key, count: space.take(dtype, count))  # filled below: numbers come last
    space, storages = _Space(file), unpickler.storages
    if not head.startswith(LEGACY_MAGIC):
        try:
            unpickler.run(file)
        except RefusedNameError:
            raise
        except Exception:
            raise _AnotherFileError(
                f" (torch's zip or legacy format, or safetensors), got a file that starts with {head[:16]!r}"
            ) from None
        raise _AnotherFileError(" that torch.save wrote, got another pickle")
    _, protocol, system, checkpoint, keys = (unpickler.run(file) for _ in range(5))
    if protocol != LEGACY_PROTOCOL:
        raise ValueError(f"its protocol is not {LEGACY_PROTOCOL}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("its list of storages does not match its tensors")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != len(storages[key].values):
            raise ValueError(f"storage {key} has {count:,} numbers, expected {len(storages[key].values):,}")
        file.fill(storages[key].values)
    return checkpoint
