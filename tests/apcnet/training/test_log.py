"""Tests that the log keeps complete records of steps that count, and passes them to a service."""

import sys
import types

import pytest
from PIL import Image

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


def test_a_service_gets_records_and_pictures(tmp_path, monkeypatch):
    """Tests a stand-in; test_writers.py tests the packages that are installed."""
    given = []
    writer = types.SimpleNamespace(
        add_scalar=lambda *scalar: given.append(scalar),
        add_image=lambda name, pixels, step, dataformats: given.append((name, pixels.shape, step, dataformats)),
        flush=lambda: None,
        close=lambda: given.append("closed"),
    )
    module = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: given.append(purge_step) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Image.new("L", (8, 6)).save(tmp_path / "preview.png")
    log = Log(tmp_path, 4, to="tensorboard")
    log({"step": 5, "loss": 0.5})
    log({"step": 5, "miou": 0.5, "iou": {"wall": 0.3}})
    log.picture("preview", tmp_path / "preview.png", 5)
    log.close()
    numbers = [("train/loss", 0.5, 5), ("val/miou", 0.5, 5), ("val/iou/wall", 0.3, 5)]
    assert given == [5, *numbers, ("preview", (6, 8, 3), 5, "HWC"), "closed"]


def test_wandb_knows_a_run_by_its_folder(tmp_path, monkeypatch):
    started, run = [], types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **about: started.append(about) or run))
    for folder in ("a", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Log(tmp_path / folder, to="wandb").close()
    assert started[0] == started[1] and started[0]["resume"] == "allow" and started[2]["id"] != started[0]["id"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_missing_packages_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(ModuleNotFoundError, match=f"log: {name} is not installed: pip install {name}"):
        Log(tmp_path, to=name)
