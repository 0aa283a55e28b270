"""Reads a torch checkpoint without running any code in it.

A `.pth` file is a pickle: a program that may import any function and call it. mmengine's training files do name
`builtins.getattr`, numpy's constructors and mmengine's own classes. `read` loads with `weights_only=True`, which needs
every name beyond torch's own to be allowed, and replaces each of these by `Inert`, a class that takes any arguments and
any state and keeps nothing. A checkpoint needs no names outside `HARMLESS`: `read` refuses a file that has one.
"""

import pickletools
import re
import threading
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from apcnet.models.weights import listed

# Checkpoints of mmsegmentation 0.x and 1.x and of sssegmentation name these besides tensors: log histories with numpy
# arrays and (through getattr) the methods that summarise them, config objects, random states, dates and paths.
HARMLESS = re.compile(
    r"(mmengine|mmcv|mmseg|mmcls|mmpretrain|mmdet|ssseg|addict|argparse|pathlib|datetime)\..+"
    r"|collections\.(defaultdict|deque)"
    r"|builtins\.(getattr|object|list|dict|tuple|int|float|bool|str|frozenset|range|slice|bytes)"
    r"|copyreg\._reconstructor"
    r"|numpy\.(dtype|ndarray|(_?core\.(multiarray|numeric)|dtypes|random)\..+)"
)
# torch itself allows or refuses these names.
TORCH = re.compile(r"torch\..+|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)")
# These classes are filled item by item, which torch allows for its own containers only.
MAPPINGS = re.compile(r".+\.ConfigDict|addict\..*Dict|collections\.defaultdict")

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of a file of torch before 1.6
LEGACY_PICKLES = 4  # magic number, protocol, byte order and sizes, the object


class Inert:
    """Replaces an object that a file names but nobody needs: takes any arguments and any state, keeps nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class InertMapping(Inert):
    """Replaces a mapping that a file names by an OrderedDict."""

    def __new__(cls, *args):
        return OrderedDict()


class InertSequence(Inert):
    """Replaces a sequence that a file names by a list."""

    def __new__(cls, *args):
        return []


def read(path: str | Path) -> dict[str, Any]:
    """Reads the dictionary in a checkpoint (torch's zip or legacy format, or safetensors) to the CPU."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise _damaged(path, error) from error
    zipped = head.startswith(ZIP_MAGIC)
    names = _names_in_zip(path) if zipped else _names_in_legacy(path, head)
    refused = sorted(name for name in names if not HARMLESS.fullmatch(name) and not TORCH.fullmatch(name))
    if refused:
        raise ValueError(
            f"{path}: expected a checkpoint, got a file that runs {listed(refused)} when it is loaded; no checkpoint "
            "needs that. It was not loaded and nothing in it was run"
        )
    if not zipped and not head.startswith(LEGACY_MAGIC):
        raise ValueError(f"{path}: expected a checkpoint that torch.save wrote, got another pickle")
    checkpoint = _load(path, names)
    if not isinstance(checkpoint, dict):
        found = "a pickled object" if isinstance(checkpoint, Inert) else type(checkpoint).__name__
        raise ValueError(
            f"{path}: expected a dictionary of weights, got {found}; write one by torch.save(model.state_dict(), path)"
        )
    return checkpoint


def _load(path, names):
    try:
        with _only_inert(names):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can make torch raise anything
        # torch's own message advises weights_only=False, which would run the code in the file.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().partition("\n")[0]
        refused = re.match(r"Unsupported global: GLOBAL (\S+)", reason)
        if refused:
            raise ValueError(
                f"{path}: expected a checkpoint, got a file that uses {refused[1]}, which torch does not allow"
            ) from error
        raise _damaged(path, reason or type(error).__name__) from error


def _damaged(path, reason):
    return ValueError(f"{path}: expected a whole checkpoint, got a damaged or incomplete file: {reason}")


_allowing = threading.Lock()  # torch keeps one list of allowed names per process


@contextmanager
def _only_inert(names):
    """Lets torch.load use inert replacements of `names`, and none of the real objects that other code has allowed."""
    with _allowing:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            ours = [(_stand_in(name), name) for name in names if HARMLESS.fullmatch(name)]
            with torch.serialization.safe_globals(ours):
                yield
        finally:
            torch.serialization.add_safe_globals(others)


def _stand_in(name):
    if MAPPINGS.fullmatch(name):
        return InertMapping
    return InertSequence if name == "collections.deque" else Inert


def _names_in_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
            pickled = [entry for entry in entries if entry.count("/") == 1 and entry.endswith("/data.pkl")]
            names = {name for entry in pickled for name in _names(archive.read(entry))}
    except Exception as error:
        raise _damaged(path, error) from error
    if not pickled or any(entry.endswith("/constants.pkl") for entry in entries):
        raise ValueError(f"{path}: expected a checkpoint that torch.save wrote, got another zip archive or TorchScript")
    return names


def _names_in_legacy(path, head):
    names, from_torch = set(), head.startswith(LEGACY_MAGIC)
    with path.open("rb") as file:
        try:
            for _ in range(LEGACY_PICKLES if from_torch else 1):
                names.update(_names(file))
        except ValueError as error:
            if from_torch or names:
                raise _damaged(path, error) from error
            raise ValueError(
                f"{path}: expected a checkpoint (torch's zip or legacy format, or safetensors), "
                f"got a file that starts with {head[:16]!r}"
            ) from error
    return names


def _names(pickled):
    """Yields every importable name in a pickle; reads its instructions without running them."""
    strings = ["", ""]
    for instruction, argument, _ in pickletools.genops(pickled):
        if instruction.name in ("GLOBAL", "INST"):
            module, name = str(argument).split(" ", 1)
        elif instruction.name == "STACK_GLOBAL":
            module, name = strings[-2:]
        else:
            if isinstance(argument, str):
                strings.append(argument)
            continue
        # Protocol 2, torch's, writes Python 2's names.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        yield f"{module}.{name}"
