"""Defines what the fuzzer runs: readers of files, each from bytes to a result or to one line that names the file.

fuzz.py runs them with mutated bytes, test_findings.py with what the fuzzer has found.
"""

import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from hostile_pickles import MAGIC, checkpoint, text, write

import apcnet
from apcnet.config import Config
from apcnet.data.matlab import read_field
from apcnet.interop import pickles
from apcnet.training.folder import read_config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(tempfile.mkdtemp(prefix="apcnet-fuzz-"))
# The parts of a zip archive with one entry, archive/data.pkl, around its pickle.
LOCAL, DIRECTORY, END = "<4s5H3I2H", "<4s6H3I5H2I", "<4s4H2IH"


def judged(read: Callable[[Path], object], data: bytes, name: str) -> None:
    """Reads a file with these bytes; an error of another kind, or without the file's name in one line, is a finding."""
    path = FOLDER / name
    path.write_bytes(data)
    try:
        read(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(path) in message and "\n" not in message, f"not one line that names the file: {message!r}"


def zipped(data: bytes) -> None:
    """Reads a checkpoint of the zip format with these bytes as its pickle."""
    name, size, checksum = b"archive/data.pkl", len(data), zlib.crc32(data)
    sizes = checksum, size, size
    local = struct.pack(LOCAL, b"PK\x03\x04", 20, 0, 0, 0, 0, *sizes, len(name), 0) + name + data
    entry = struct.pack(DIRECTORY, b"PK\x01\x02", 20, 20, 0, 0, 0, 0, *sizes, len(name), 0, 0, 0, 0, 0, 0) + name
    end = struct.pack(END, b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(local), 0)
    judged(weights, local + entry + end, "a.pth")


def archive(data: bytes) -> None:
    """Reads a checkpoint of the zip format with these bytes as the archive."""
    judged(weights, b"PK\x03\x04" + data, "a.pth")


def legacy(data: bytes) -> None:
    """Reads a checkpoint of the legacy format with these bytes behind the magic number."""
    judged(weights, MAGIC + data, "a.pth")


def safetensors(data: bytes) -> None:
    """Loads a model file with these bytes as its header."""
    judged(apcnet.load, struct.pack("<Q", len(data)) + data + bytes(4096), "a.safetensors")


def description(data: bytes) -> None:
    """Loads a model file with these bytes as the description of the model."""
    header = json.dumps({"__metadata__": {"apcnet": data.decode(errors="replace")}}).encode()
    judged(apcnet.load, struct.pack("<Q", len(header)) + header, "a.safetensors")


def matlab(data: bytes) -> None:
    """Reads a mask from a MATLAB file with these bytes behind its header."""
    judged(lambda path: read_field(path, "GTcls", "Segmentation"), MATLAB[:128] + data, "a.mat")


def config(data: bytes) -> None:
    """Reads the config of a run."""
    judged(lambda path: read_config(path.parent), data, "config.json")


def weights(path: Path) -> object:
    return pickles.weights(pickles.read(path), path)


MATLAB = (ROOT / "data" / "prepare" / "plain.mat").read_bytes()
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
            state = {"state_dict": {"a": 1.5}, "meta": [None, ("a", 2), {3}], "epoch": -7}
            torch.save(state, FOLDER / "seed.pth", _use_new_zipfile_serialization=False)
            return [
                checkpoint(b"", True),
                checkpoint(text("x") + b"]q\x01h\x01a", True),
                (FOLDER / "seed.pth").read_bytes()[51:],
            ]
        case "archive":
            return [whole[True][4:]]
        case "legacy":
            return [whole[False][len(MAGIC) :]]
        case "safetensors":
            about = {"__metadata__": {"apcnet": seeds("description")[0].decode()}}
            about["a"] = {"dtype": "F32", "shape": [32, 32], "data_offsets": [0, 4096]}
            return [json.dumps(about).encode()]
        case "description":
            model = apcnet.create("apcnet", "tiny", 3, width=8, channels=8, scales=(1, 2), auxiliary_channels=8)
            names = ("architecture", "classes", "palette", "mean", "std")
            return [json.dumps({name: getattr(model, name) for name in names}).encode()]
        case "matlab":
            compressed = (ROOT / "data" / "prepare" / "compressed.mat").read_bytes()
            return [MATLAB[128:], compressed[128:]]
        case "config":
            return [json.dumps(Config().to_json()).encode()]
    raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target}")
