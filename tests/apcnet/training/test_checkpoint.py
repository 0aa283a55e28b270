"""Tests that checkpoints survive any interruption, and that loading them runs no code."""

import errno
import os
import pickle
import signal

import pytest
import torch

from apcnet import files
from apcnet.config import Config
from apcnet.training import checkpoint


def state(step: int) -> checkpoint.State:
    return {
        "step": step,
        "evaluated": step,
        "best": {"miou": 0.5, "dice": 0.6, "step": step},
        "waited": 0,
        "objects": {},
        "config": Config().to_json(),
        "images": 7,
        "sample_names": "0123456789ab",
        "class_weights": None,
        "environment": {"threads": 1},
        "model": {"weight": torch.full((1000,), float(step))},
        "average": None,
        "optimizer": {0: {"momentum_buffer": torch.zeros(1000)}},
        "scaler": {},
    }


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.LAST, checkpoint.PREVIOUS]
    assert checkpoint.load(tmp_path)["step"] == 3
    (tmp_path / checkpoint.LAST).unlink()
    assert checkpoint.load(tmp_path)["step"] == 2


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize(
    "where, call",
    [*(("os.fsync", call) for call in range(4)), ("torch.save", 0), *(("pathlib.Path.replace", c) for c in range(2))],
)
def test_an_interrupted_save_loses_nothing(tmp_path, monkeypatch, where, call):
    """Tests that the old or the new state can be loaded whole, and that no other file is left behind."""
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


def test_previous_is_copied_where_hard_links_are_missing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    (tmp_path / checkpoint.LAST).unlink()
    assert checkpoint.load(tmp_path)["step"] == 1


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit for the size of files")
def test_a_full_disk_is_the_systems_own_error_wherever_it_fills_up(tmp_path):
    """Tests limits for the size of files up to the checkpoint's own: the error names last.pt, which stays as it was."""
    import resource

    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    size, (soft, hard) = (tmp_path / checkpoint.LAST).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [*range(0, size, size // 20), size - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=r"File too large.*last\.pt"):
                checkpoint.save(tmp_path, state(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {path.name for path in tmp_path.iterdir()} == {checkpoint.LAST, checkpoint.PREVIOUS}
        assert checkpoint.load(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "a flipped bit in its directory", "a flipped bit in its tensors"]
)
def test_previous_replaces_a_damaged_last_with_a_warning(tmp_path, damage):
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
    path.unlink()  # the two may be hard links to the same bytes
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match=r"last\.pt.*step 1 is used"):
        assert checkpoint.load(tmp_path, repair=True)["step"] == 1
    checkpoint.save(tmp_path, state(3))
    assert torch.load(tmp_path / checkpoint.PREVIOUS)["step"] == 1  # not the damaged one
    (tmp_path / checkpoint.LAST).write_bytes(damaged)
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(OSError, match=r"no checkpoint can be read.*last\.pt.*previous\.pt"):
        checkpoint.load(tmp_path)


def test_loading_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    (tmp_path / checkpoint.LAST).write_bytes(pickle.dumps(Attack()))
    torch.save({"step": 1, "model": Attack()}, tmp_path / checkpoint.PREVIOUS)
    with pytest.raises(OSError, match="no checkpoint can be read"):
        checkpoint.load(tmp_path)
