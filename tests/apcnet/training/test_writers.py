"""Tests that TensorBoard, Weights & Biases and MLflow get every number and picture of a run, by the real packages."""

import importlib.util
import json
import struct

import numpy as np
import pytest
from PIL import Image

from apcnet.training.log import Log
from apcnet.training.writers import scalars

TRAINING = {"step": 5, "loss": 0.5, "aux.loss_ce": None, "lr": 0.01}
SCORES = {
    "step": 5,
    "miou": 0.25,
    "iou": {"wall, 背景": 0.5, "sky": None},
    "best": {"miou": 0.25, "step": 5},
    "calibration": [{"pixels": 3}],
}
NUMBERS = {
    "train/loss": 0.5,
    "train/lr": 0.01,
    "val/miou": 0.25,
    "val/iou/wall, 背景": 0.5,
    "val/best/miou": 0.25,
    "val/best/step": 5,
}
COLOR, BLOCK = (200, 30, 90), 1 << 15


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (20, 10), COLOR).save(path)
    return path


def write(folder, service, picture, steps=(5,)):
    """Logs a record of each kind and a picture, then closes the log; a second step resumes the run."""
    folder.mkdir(exist_ok=True)
    for step in steps:
        log = Log(folder, step - 1, step - 1, to=service)
        for record in (TRAINING, SCORES):
            log(record | {"step": step})
        log.picture("preview", picture, step)
        log.close()


def test_numbers_are_named_by_group_and_class():
    assert scalars(TRAINING) | scalars(SCORES) == NUMBERS


@needs("tensorboard")
def test_tensorboard_gets_numbers_and_pictures(tmp_path, picture):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "run", "tensorboard", picture, steps=(5, 6))
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0, "scalars": 0}).Reload()
    found = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    assert {name: points[-1].value for name, points in found.items()} == pytest.approx(NUMBERS)
    assert all([point.step for point in points] == [5, 6] for points in found.values())
    pictures = events.Images("preview")
    assert [(image.step, image.width, image.height) for image in pictures] == [(5, 20, 10), (6, 20, 10)]


@needs("wandb")
def test_wandb_gets_numbers_and_pictures(tmp_path, picture, monkeypatch):
    """Tests a run without a network: its folder holds what a later `wandb sync` sends."""
    import wandb

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    write(tmp_path / "run", "wandb", picture)
    wandb.teardown()  # its process writes the rest of the file
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (image,) = kept.glob("files/media/images/preview_*.png")
    assert np.array_equal(np.asarray(Image.open(image))[0, 0], COLOR)
    sizes = {"preview/size": image.stat().st_size, "preview/width": 20, "preview/height": 10}
    assert recorded(next(kept.glob("*.wandb"))) == pytest.approx(NUMBERS | sizes)


def recorded(path):
    """Returns the numbers in a file of Weights & Biases: records of protobuf in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, numbers, parts = path.read_bytes(), 7, {}, b""
    while place < len(content):
        left = BLOCK - place % BLOCK
        if left < 7:  # no header fits: the rest of the block is empty
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            for item in Record.FromString(parts).history.item:
                name, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                if not name.startswith("_") and isinstance(value, (int, float)):
                    numbers[name] = value
            parts = b""
    return numbers


@needs("mlflow")
def test_mlflow_gets_numbers_and_pictures_of_one_run(tmp_path, picture, monkeypatch):
    """Tests a store of files, and that a resumed run is found again by its folder."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient, set_tracking_uri

    set_tracking_uri((tmp_path / "store").as_uri())
    write(tmp_path / "run", "mlflow", picture, steps=(5, 6))
    write(tmp_path / "other", "mlflow", picture)
    client = MlflowClient()
    (experiment,) = [found for found in client.search_experiments() if found.name == "apcnet"]
    other, run = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and other.info.run_name == "other"
    names = {name.replace(",", "_"): value for name, value in NUMBERS.items()}
    assert run.data.metrics == pytest.approx(names | {"val/best/step": 5})
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [5, 6]
    assert [file.path for file in client.list_artifacts(run.info.run_id, "preview")] == [
        "preview/000005.png",
        "preview/000006.png",
    ]
