"""State on disk: whole after any interruption, read with nothing but data allowed."""

import errno
import os
import pickle

import pytest
import torch

from apcnet import checkpoint, files


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


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace", "torch.save", "os.link"])
@pytest.mark.parametrize("call", [0, 1, 2])
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
        if where == "os.link":  # there a copy serves
            checkpoint.save(tmp_path, state(3))
        elif len(calls_of_a_save(where)) > call:
            with pytest.raises(OSError, match="no space"):
                checkpoint.save(tmp_path, state(3))
    found = checkpoint.load(tmp_path)
    assert (
        found["step"] in ((3,) if where == "os.link" else (2, 3)) and (found["model"]["weight"] == found["step"]).all()
    )
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LAST, checkpoint.PREVIOUS}


def calls_of_a_save(where: str) -> range:
    return range({"torch.save": 1, "pathlib.Path.replace": 2, "os.fsync": 4}[where])


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "a flipped bit in its directory"])
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
    }[damage]
    path.unlink()  # the two may be names of the same bytes
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"last\.pt.*step 1 is used"):
        assert checkpoint.load(tmp_path)["step"] == 1
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
