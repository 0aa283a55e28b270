"""Checkpoints are read whole, whatever harmless objects they name, and nothing in a file is ever run."""

import builtins
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict, deque
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from apcnet.interop import pickles

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@contextmanager
def modules(**classes):
    """Provides modules with these classes while a file is written; __ in a name stands for a dot."""
    made = {}
    for name, members in classes.items():
        parts = name.split("__")
        for end in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for member in members:
            member.__module__ = ".".join(parts)
            member.__qualname__ = member.__name__
            setattr(made[".".join(parts)], member.__name__, member)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def save(value, path, zipped):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def state():
    weights = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), steps=torch.tensor(7))
    weights._metadata = OrderedDict({"": {"version": 1}})
    return weights


class HistoryBuffer:
    """Imitates mmengine's: arrays, and the functions that summarise them, pickled through getattr."""

    def __init__(self):
        self._log_history, self._count_history = np.arange(5.0), np.ones(5, dtype=np.int64)
        self._statistics_methods = {"mean": HistoryBuffer.mean}

    def mean(self):
        return self._log_history.mean()


class ConfigDict(dict):
    """Imitates mmcv's: a dict that is its own state."""

    def __getstate__(self):
        return self


@FORMATS
def test_a_training_file_of_mmengine_is_read(tmp_path, zipped):
    with modules(mmengine__logging__history_buffer=[HistoryBuffer]):
        checkpoint = {
            "meta": {"cfg": "model = dict()", "dataset_meta": {"classes": ("road", "sky")}, "seed": np.int64(3)},
            "state_dict": state(),
            "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer()), "best": np.float64(0.5)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": np.float32(0.1)}]},
        }
        path = save(checkpoint, tmp_path / "iter_1.pth", zipped)
    read = pickles.read(path)
    assert torch.equal(read["state_dict"]["weight"], state()["weight"])
    assert read["meta"]["dataset_meta"] == {"classes": ("road", "sky")}
    assert type(read["message_hub"]["log_scalars"]["loss"]) is pickles.Inert
    assert vars(read["message_hub"]["log_scalars"]["loss"]) == {}
    assert type(read["meta"]["seed"]) is pickles.Inert


@FORMATS
def test_containers_of_mmcv_keep_their_items(tmp_path, zipped):
    with modules(mmcv__utils__config=[ConfigDict]):
        counts = defaultdict(list, a=[1])
        checkpoint = {"meta": ConfigDict(config="model = dict()"), "queue": deque([1, 2]), "counts": counts}
        path = save(checkpoint, tmp_path / "a.pth", zipped)
    read = pickles.read(path)
    assert read["meta"] == {"config": "model = dict()"} and read["queue"] == [1, 2] and read["counts"] == {"a": [1]}


def test_safetensors_pass(tmp_path):
    save_file(dict(state()), tmp_path / "a.safetensors")
    assert torch.equal(pickles.read(tmp_path / "a.safetensors")["weight"], state()["weight"])


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Build(Call):
    """Pickles as a call of a function whose result is then given a state."""

    def __reduce__(self):
        return self.function, self.arguments, {"state": 1}


def attacks(mark):
    command = f"touch {mark}"
    return {
        "system": Call(os.system, command),
        "eval": Call(eval, f"__import__('os').system({command!r})"),
        "through getattr": Call(Call(getattr, os, "system"), command),
        "built": Build(os.system, command),
        "an object array": Call(np._core.multiarray.scalar, np.dtype("O"), pickle.dumps(Call(os.system, command), 2)),
        "torch's own": Call(torch.hub.load, "owner/repository", "model"),
        "a module": torch.nn.Linear(2, 2),
    }


NAMES = {
    "system": "posix.system",
    "eval": "builtins.eval",
    "built": "posix.system",
    "torch's own": "torch.hub.load",
    "a module": "torch.nn.modules.linear.Linear",
}


@FORMATS
@pytest.mark.parametrize("attack", NAMES)
def test_code_is_refused_by_name_and_not_run(tmp_path, zipped, attack):
    mark = tmp_path / "run"
    path = save({"state_dict": state(), "x": attacks(mark)[attack]}, tmp_path / "a.pth", zipped)
    with pytest.raises(
        ValueError, match=rf"a\.pth: expected a checkpoint, got a file that (runs|uses) .*{NAMES[attack]}"
    ):
        pickles.read(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_plain_pickle_is_refused_by_name(tmp_path, protocol):
    path, mark = tmp_path / "a.pth", tmp_path / "run"
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {mark}"), protocol))
    with pytest.raises(ValueError, match=r"got a file that runs posix\.system"):
        pickles.read(path)
    assert not mark.exists()


def pickled(*instructions):
    return b"\x80\x02" + b"".join(instructions) + b"."


def zip_of(path, data):
    """Writes a checkpoint in torch's zip format with `data` as its pickle."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, data if entry.endswith("/data.pkl") else content)
    return path


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def test_getattr_is_never_the_real_one(tmp_path):
    """Tests getattr(mmengine.runner, "system") called with a command: the result cannot be called."""
    get = pickled(b"c__builtin__\ngetattr\n", b"cmmengine.runner\nos\n", text("system"), b"\x86R", text("ls"), b"\x85R")
    with pytest.raises(ValueError, match="it calls an object that is no function"):
        pickles.read(zip_of(tmp_path / "a.pth", get))
    get = pickled(b"}", text("a"), b"c__builtin__\ngetattr\n", text("abc"), text("upper"), b"\x86R", b"s")
    assert type(pickles.read(zip_of(tmp_path / "a.pth", get))["a"]) is pickles.Inert


def test_what_others_have_allowed_stays_out_and_is_restored(tmp_path):
    get = pickled(b"}", text("a"), b"c__builtin__\ngetattr\n", text("abc"), text("upper"), b"\x86R", b"s")
    path = zip_of(tmp_path / "a.pth", get)
    with torch.serialization.safe_globals([builtins.getattr, np.dtype]):
        allowed = set(torch.serialization.get_safe_globals())
        assert type(pickles.read(path)["a"]) is pickles.Inert
        assert set(torch.serialization.get_safe_globals()) == allowed > {builtins.getattr, np.dtype}
        assert torch.load(path, weights_only=True)["a"]() == "ABC"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@FORMATS
def test_arrays_of_objects_stay_closed(tmp_path, zipped):
    mark = tmp_path / "run"
    path = save({"x": attacks(mark)["an object array"]}, tmp_path / "a.pth", zipped)
    assert type(pickles.read(path)["x"]) is pickles.Inert and not mark.exists()


def test_state_reaches_nothing(tmp_path):
    """Tests BUILD with a state on an inert object, as `__setstate__` and as `__dict__`."""
    build = pickled(b"}", text("a"), b"cmmcv.runner\nHook\n", b")\x81", b"}", text("__class__"), b"Nsb", b"s")
    assert vars(pickles.read(zip_of(tmp_path / "a.pth", build))["a"]) == {}


@FORMATS
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_truncated_file_says_so(tmp_path, zipped, share):
    path = save({"state_dict": {str(i): torch.rand(100) for i in range(9)}}, tmp_path / "a.pth", zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"a\.pth: expected a whole checkpoint, got a damaged or incomplete file"):
        pickles.read(path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", b"\x89PNG\r\n", b"\x00" * 100], ids=repr)
def test_another_file_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth: expected a checkpoint .*got a file that starts with"):
        pickles.read(path)


def test_other_archives_pickles_and_objects_are_named(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/readme.txt", "no weights")
    with pytest.raises(ValueError, match=r"expected a checkpoint that torch\.save wrote, got another zip archive"):
        pickles.read(path)
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(ValueError, match=r"expected a checkpoint that torch\.save wrote, got another pickle"):
        pickles.read(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(ValueError, match="expected a dictionary of weights, got Tensor"):
        pickles.read(path)
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="damaged"):
        pickles.read(path)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        pickles.read(tmp_path / "none.pth")
