"""Defines what the fuzzer runs: readers of files, each from bytes to a result or to one line that names the file.

fuzz.py runs them with mutated bytes, test_findings.py with what the fuzzer has found.
"""

import functools
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from hostile_pickles import MAGIC, checkpoint, tensor, text, write

import apcnet
from apcnet.config import Config
from apcnet.data.matlab import read_field
from apcnet.interop import pickles
from apcnet.training.folder import read_config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(tempfile.mkdtemp(prefix="apcnet-fuzz-"))
MATLAB = (ROOT / "data" / "prepare" / "plain.mat").read_bytes()


def judged(read: Callable[[Path], object], data: bytes, name: str) -> str:
    """Reads a file with these bytes; an error of another kind, or without the file's name in one line, is a finding."""
    path = FOLDER / name
    path.write_bytes(data)
    try:
        read(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(path) in message and "\n" not in message, f"not one line that names the file: {message!r}"
        return "named"
    return "right"


def zipped(data: bytes) -> str:
    """Reads a checkpoint of the zip format with these bytes as its pickle."""
    return judged(weights, write(FOLDER / "a.pth", data, True).read_bytes(), "a.pth")


def archive(data: bytes) -> str:
    """Reads a checkpoint of the zip format with these bytes as the archive."""
    return judged(weights, b"PK\x03\x04" + data, "a.pth")


def legacy(data: bytes) -> str:
    """Reads a checkpoint of the legacy format with these bytes behind the magic number."""
    return judged(weights, MAGIC + data, "a.pth")


def safetensors(data: bytes) -> str:
    """Loads a model file with these bytes as its header."""
    return judged(apcnet.load, struct.pack("<Q", len(data)) + data + model_file()[1], "a.safetensors")


def description(data: bytes) -> str:
    """Loads a model file with these bytes as the description of the model."""
    header, numbers = model_file()
    header = header | {"__metadata__": {"apcnet": data.decode(errors="replace")}}
    text = json.dumps(header).encode()
    return judged(apcnet.load, struct.pack("<Q", len(text)) + text + numbers, "a.safetensors")


def matlab(data: bytes) -> str:
    """Reads a mask from a MATLAB file with these bytes behind its header."""
    return judged(lambda path: read_field(path, "GTcls", "Segmentation"), MATLAB[:128] + data, "a.mat")


def config(data: bytes) -> str:
    """Reads the config of a run."""
    return judged(lambda path: read_config(path.parent), data, "config.json")


def weights(path: Path) -> object:
    return pickles.weights(pickles.read(path), path)


@functools.cache
def model_file() -> tuple[dict, bytes]:
    """Returns header and numbers of a small model's file."""
    torch.manual_seed(0)
    apcnet.create("fcn", "tiny", 2, width=2, channels=2, convs=1, auxiliary_channels=0).save(
        FOLDER / "seed.safetensors"
    )
    data = (FOLDER / "seed.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


TARGETS = {
    function.__name__: function for function in (zipped, archive, legacy, safetensors, description, matlab, config)
}


def seeds(target: str) -> list[bytes]:
    """Returns inputs of a target that are right, for the fuzzer to start from."""
    whole = {
        is_zip: write(FOLDER / "seed.pth", checkpoint(b"", is_zip), is_zip).read_bytes() for is_zip in (True, False)
    }
    match target:
        case "zipped":
            values = b"](K\x01G?\xf8" + bytes(6) + text("a") + b"\x85N\x88e"
            state = b"}" + text("a") + tensor(True) + b"s"
            return [checkpoint(b"", True), checkpoint(text("meta") + values + text("state_dict") + state, True)]
        case "archive":
            return [whole[True][4:]]
        case "legacy":
            return [whole[False][len(MAGIC) :]]
        case "safetensors":
            return [json.dumps(model_file()[0]).encode()]
        case "description":
            return [model_file()[0]["__metadata__"]["apcnet"].encode()]
        case "matlab":
            compressed = (ROOT / "data" / "prepare" / "compressed.mat").read_bytes()
            return [MATLAB[128:], compressed[128:]]
        case "config":
            return [json.dumps(Config().to_json()).encode()]
    raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target}")
