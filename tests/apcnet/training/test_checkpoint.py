"""State on disk: whole after any interruption, read with nothing but data allowed."""

import errno
import os
import pickle

import pytest
import torch

from apcnet import files
from apcnet.training import checkpoint


def state(step: int) -> dict:
    return {"step": step, "model": {"weight": torch.full((1000,), float(step))}, "best": {"miou": 0.5, "step": step}}


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.LAST, checkpoint.PREVIOUS]
    assert checkpoint.load(tmp_path)["step"] == 3
    (tmp_path / checkpoint.LAST).unlink()
    assert checkpoint.load(tmp_path)["step"] == 2


def test_there_may_be_none(tmp_path):
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize(
    "where, call",
    [*(("os.fsync", call) for call in range(4)), ("torch.save", 0), *(("pathlib.Path.replace", c) for c in range(2))],
)
def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch, where, call):
    """At any point: the state before is still the last one, or the new one is, whole; nothing else is left behind."""
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    module, name = where.rsplit(".", 1)
    owner = {"os": os, "torch": torch, "pathlib.Path": files.Path}[module]
    usual, calls = getattr(owner, name), []

    def fails(*arguments, **options):
        calls.append(name)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, "no space left on device")
        return usual(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fails)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(tmp_path, state(3))
    found = checkpoint.load(tmp_path)
    assert found["step"] in (2, 3) and (found["model"]["weight"] == found["step"]).all()
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LAST, checkpoint.PREVIOUS}


def test_where_files_have_one_name_the_one_before_is_copied(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "no second names here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    (tmp_path / checkpoint.LAST).unlink()
    assert checkpoint.load(tmp_path)["step"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_the_systems_own_error():
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "wb") as file:
        torch.save(state(1), file)


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "a flipped bit in its directory", "a flipped bit in its tensors"]
)
def test_of_a_damaged_file_the_one_before_serves_and_says_so(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    path = tmp_path / checkpoint.LAST
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"<html>not found</html>",
        "a flipped bit in its directory": whole[:-20] + bytes([whole[-20] ^ 64]) + whole[-19:],
        "a flipped bit in its tensors": (
            values := torch.full((2,), 2.0).numpy().tobytes(),
            whole.replace(values, values[:-1] + b"A", 1),
        )[1],
    }[damage]
    path.unlink()  # the two may be names of the same bytes
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"last\.pt.*step 1 is used"):
        assert checkpoint.load(tmp_path, mend=True)["step"] == 1
    checkpoint.save(tmp_path, state(3))
    assert torch.load(tmp_path / checkpoint.PREVIOUS)["step"] == 1  # and not what was damaged
    (tmp_path / checkpoint.LAST).write_bytes(damaged)
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(OSError, match=r"no checkpoint can be read.*last\.pt.*previous\.pt"):
        checkpoint.load(tmp_path)


def test_nothing_in_a_file_is_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    (tmp_path / checkpoint.LAST).write_bytes(pickle.dumps(Attack()))
    torch.save({"step": 1, "model": Attack()}, tmp_path / checkpoint.PREVIOUS)
    with pytest.raises(OSError, match="no checkpoint can be read"):
        checkpoint.load(tmp_path)
