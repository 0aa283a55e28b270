"""Tests that the log keeps complete records of steps that count, and passes them to TensorBoard and wandb."""

import sys
import types

import pytest

from apcnet.training.log import NAME, Log, read


def test_a_log_resumes_with_its_run(tmp_path):
    log = Log(tmp_path)
    for step in (1, 2, 3):
        log({"step": step, "loss": 0.5})
    log.close()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed in the middle of a line
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3]
    log = Log(tmp_path, 2)
    log({"step": 3, "loss": 0.25})
    log.close()
    assert read(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar), flush=lambda: None)
    module = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Log(tmp_path, to="tensorboard")({"step": 5, "loss": 0.5, "iou": {"wall": 0.3}})
    assert written == [("loss", 0.5, 5)]


def test_wandb_gets_the_numbers_of_one_run(tmp_path, monkeypatch):
    written, started = [], []
    run = types.SimpleNamespace(log=lambda values, step: written.append((values, step)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **about: started.append(about) or run))
    for step in (5, 6):
        Log(tmp_path, step, step, to="wandb")({"step": step, "loss": 0.5})
    assert written == [({"loss": 0.5}, 5), ({"loss": 0.5}, 6)]
    assert started[0] == started[1] and started[0]["resume"] == "allow"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_packages_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(ModuleNotFoundError, match=f"log: {name} is not installed: pip install {name}"):
        Log(tmp_path, to=name)
