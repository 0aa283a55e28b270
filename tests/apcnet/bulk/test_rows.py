"""Tests `apcnet.Predictor` alone, in a pool of processes, and on Ray Data while an actor is killed."""

import io
import multiprocessing
import os
import pickle
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import apcnet
from apcnet.config import Protocol

COUNT = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Writes a model of random weights."""
    torch.manual_seed(0)
    made = apcnet.create("apcnet", "tiny", 5, width=8, channels=8).eval()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    made.save(path)
    return path


def write_images(folder: Path, count: int) -> list[Path]:
    generator = torch.Generator().manual_seed(1)
    paths = [folder / f"{number:04}.png" for number in range(count)]
    for number, path in enumerate(paths):
        small = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(small).resize((32 + number % 5, 24), Image.Resampling.BICUBIC).save(path)
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 7)


def decoded(labels: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(labels)) as image:
        return np.array(image)


def test_rows_in_labels_out(model, paths):
    """Tests that paths, contents and arrays give what `predict` gives, as arrays and as PNG."""
    expected = [one.labels.numpy() for one in apcnet.predict(apcnet.load(model), paths)]
    assert len({labels.tobytes() for labels in expected}) == len(paths)
    arrays = [np.asarray(Image.open(path)) for path in paths]
    for rows in ({"path": paths}, {"bytes": [path.read_bytes() for path in paths]}, {"image": arrays}):
        made = apcnet.Predictor(model, labels="array")({**rows, "number": range(7)})
        assert list(made) == [*rows, "number", "labels", "error"] and set(made["error"]) == {""}
        assert all(map(np.array_equal, made["labels"], expected))
    made = apcnet.Predictor(model)({"path": np.array(list(map(str, paths)))})
    assert all(map(np.array_equal, map(decoded, made["labels"]), expected))


def test_the_protocol_is_used(model, paths):
    protocol = Protocol(flip=True)
    made = apcnet.Predictor(model, protocol, labels="array")({"path": paths})
    expected = apcnet.predict(model, paths, protocol)
    assert all(np.array_equal(one, other.labels) for one, other in zip(made["labels"], expected, strict=True))


def test_a_row_that_cannot_be_read_gets_an_error(model, paths, tmp_path):
    (tmp_path / "bad.png").write_bytes(paths[0].read_bytes()[:60])
    rows = {"path": [paths[0], tmp_path / "bad.png", tmp_path / "none.png", paths[1]]}
    made = apcnet.Predictor(model)(rows)
    assert [bool(error) for error in made["error"]] == [False, True, True, False]
    assert "bad.png" in made["error"][1] and made["error"][2].startswith("FileNotFoundError: ")
    assert made["labels"][1] == b"" and decoded(made["labels"][3]).shape == (24, 33)
    assert apcnet.Predictor(model, labels="array")(rows)["labels"][1].shape == (0, 0)


def test_a_data_frame_stays_one(model, paths):
    pandas = pytest.importorskip("pandas")
    rows = pandas.DataFrame({"path": list(map(str, paths)), "number": range(7)}, index=range(10, 17))
    made = apcnet.Predictor(model)(rows)
    assert list(made) == ["path", "number", "labels", "error"] and list(made.index) == list(rows.index)
    assert np.array_equal(decoded(made["labels"].iloc[3]), apcnet.predict(model, paths[3]).labels)


def test_it_is_pickled_without_its_model(model, paths):
    predictor = apcnet.Predictor(model)
    before = pickle.dumps(predictor)
    predictor({"path": paths[:1]})
    assert predictor.model is not None and pickle.dumps(predictor) == before and len(before) < 2000
    assert pickle.loads(before)({"path": paths[:1]})["error"][0] == ""


@pytest.mark.slow
def test_a_pool_of_processes(model, paths):
    """Tests the plain loop of the documentation."""
    batches = [{"path": paths[start : start + 2]} for start in range(0, 7, 2)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = [labels for rows in pool.map(apcnet.Predictor(model), batches) for labels in rows["labels"]]
    expected = apcnet.predict(model, paths)
    assert all(np.array_equal(decoded(one), other.labels) for one, other in zip(made, expected, strict=True))


@pytest.mark.parametrize(
    ("given", "rows", "message"),
    [
        ({"labels": "jpg"}, {}, "labels: expected one of png, array, got 'jpg'"),
        ({"model": torch.nn.Identity()}, {}, "model: expected the path of a model file, got Identity"),
        ({}, {"name": ["a"]}, r"rows: expected a column image, bytes or path, got \['name'\]"),
        ({"model": "none.safetensors"}, {"path": ["a"]}, "none.safetensors"),
    ],
)
def test_wrong_arguments(model, given, rows, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        apcnet.Predictor(**{"model": model} | given)(rows)


class Mortal(apcnet.Predictor):
    """Kills its process once, at a batch in the middle."""

    def __init__(self, model: Path, grave: Path):
        super().__init__(model)
        self.grave, self.batches = grave, 0

    def __call__(self, rows):
        self.batches += 1
        if self.batches == 4:
            try:
                self.grave.touch(exist_ok=False)
            except FileExistsError:
                return super().__call__(rows)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)


@pytest.mark.slow
def test_ray_predicts_the_same_while_an_actor_is_killed(model, tmp_path):
    ray = pytest.importorskip("ray", reason="needs the package ray")
    images = tmp_path / "images"
    images.mkdir()
    paths = write_images(images, COUNT)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        rows = (
            ray.data.read_binary_files(str(images), include_paths=True)
            .map_batches(Mortal, fn_constructor_args=[model, tmp_path / "grave"], batch_size=20, concurrency=2)
            .select_columns(["path", "labels", "error"])
            .take_all()
        )
    finally:
        ray.shutdown()
    assert (tmp_path / "grave").exists(), "no actor was killed"
    made = {Path(row["path"]): row for row in rows}
    assert len(rows) == len(made) == COUNT and {row["error"] for row in rows} == {""}
    for path, expected in zip(paths, apcnet.predict(model, paths), strict=True):
        assert np.array_equal(decoded(made[path]["labels"]), expected.labels), path
