"""Tests runs with a data set, model, loss, augmentation and callbacks of the user's own."""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import own_objects
import pytest
import real_packages
import safetensors.torch
import small_runs
import torch
from own_objects import Net, Scenes, Smoothed, TwoHeads, config, noisy, objects
from small_runs import digest
from torch import nn

import apcnet
from apcnet.config import Data, Model, Optimisation
from apcnet.data import augment
from apcnet.data.sample import Sample
from apcnet.data.synthetic import Synthetic
from apcnet.models.own import OwnSegmentor
from apcnet.training import checkpoint, log, train
from apcnet.training.own import Own, OwnAugmentation, digest_of


def test_all_objects_take_part_in_a_run(out, monkeypatch):
    records = []
    scores = train(config(), out, **objects(), callbacks=[records.append, lambda record: record.clear()], log_every=3)
    assert records == log.read(out) and [r["step"] for r in records] == [3, 6, 6, 9, 12, 12]
    assert {"smoothed", "size"} < records[0].keys() and "decode.loss_ce" not in records[0]
    assert records[0]["loss"] == pytest.approx(records[0]["smoothed"] + records[0]["size"])
    assert list(scores["iou"]) == list(Synthetic.classes) and (out / "report.html").exists()
    about = json.loads((out / "config.json").read_text())
    assert about["data"]["dataset"] == about["model"]["model"] == "own"
    state = checkpoint.load(out)
    assert state["objects"] == {
        "data": "Scenes",
        "val_data": "Scenes",
        "model": "Net",
        "loss": "Smoothed",
        "augment": "noisy",
    }
    assert {f"{name} source" for name in state["objects"]} <= state["environment"].keys()


def test_an_own_model_is_saved_as_weights(out):
    train(config(steps=3), out, **objects())
    with pytest.raises(ValueError, match=r"final\.safetensors: expected a model with its architecture.* your own Net;"):
        apcnet.load(out / "final.safetensors")
    network = Net()
    network.load_state_dict(safetensors.torch.load_file(out / "final.safetensors"))
    stored = json.loads((out / "metrics.json").read_text())
    model = OwnSegmentor(network, 9)
    assert apcnet.evaluate(model, Scenes("val", 3)).scores().miou == stored["miou"]


@pytest.mark.slow
def test_killed_with_own_objects_it_ends_with_the_same_bits(tmp_path, threads):
    """Tests a run that is killed twice, with 0 and 1 workers, against an uninterrupted one in this process."""
    threads(1)
    train(config(steps=40), tmp_path / "whole", **objects(), log_every=1)
    killed, records = tmp_path / "killed", tmp_path / "killed.records"
    for workers, reached in ((0, 5), (1, 16)):
        command = [sys.executable, own_objects.__file__, str(killed), "40", str(workers)]
        run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        while run.poll() is None and (not records.exists() or records.read_text().count('"smoothed"') < reached):
            time.sleep(0.002)
        run.kill()
        assert run.wait() == -signal.SIGKILL, "the run finished before it was killed"
    assert 0 < checkpoint.load(killed)["step"] < 40
    train(config(steps=40), killed, **objects(), log_every=1, workers=1)
    for name in ("final.safetensors", "best.safetensors", "metrics.json"):
        assert digest(killed / name) == digest(tmp_path / "whole" / name), name
    losses = [[r["loss"] for r in log.read(folder) if "loss" in r] for folder in (killed, tmp_path / "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 40


def test_other_objects_are_refused_and_other_sources_told(out):
    train(config(steps=3), out, **objects())
    with pytest.raises(
        ValueError, match=r"other objects, loss: Smoothed → built-in\. Pass the same ones to apcnet\.train"
    ):
        train(config(steps=3), out, **objects() | {"loss": None})
    with pytest.warns(UserWarning, match="results may no longer be bit-identical, loss source: "):
        train(config(steps=3), out, **objects() | {"loss": Smoothed(0.2)})
    with pytest.raises(ValueError, match="holds another run, dataset: own → synthetic"):
        train(config(steps=3), out, **objects() | {"data": None, "val_data": None})


def test_digests_see_sources_and_settings():
    def one(image, mask, generator, size=3):
        return image, mask

    def other(image, mask, generator, size=4):
        return image, mask

    digests = {
        digest_of(value)
        for value in (
            *(one, other, functools.partial(one, size=5), functools.partial(one, size=6)),
            *(Smoothed(0.1), Smoothed(0.2), Net, Net(), Net(5), noisy, Smoothed(0.1).__call__),
        )
    }
    assert len(digests) == 11
    assert digest_of(Smoothed(0.1)) == digest_of(Smoothed()) and digest_of(Net()) == digest_of(Net())
    assert digest_of(Scenes("train", 4)) == digest_of(
        Scenes("val", 5)
    )  # names and sizes of data are compared elsewhere
    assert digest_of(len) == digest_of(len)


def test_the_seed_decides_about_a_model_that_a_function_makes(tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for folder, seed in ((first, 0), (again, 0), (other, 1)):
        torch.manual_seed(hash(folder.name) % 1000)
        train(config(steps=2, seed=seed), folder, **objects())
    assert digest(first / "final.safetensors") == digest(again / "final.safetensors")
    assert digest(first / "final.safetensors") != digest(other / "final.safetensors")


def test_a_model_with_an_auxiliary_head_trains_by_the_built_in_losses(out):
    network = TwoHeads()
    given = {name: value for name, value in objects().items() if name != "loss"}
    train(config(steps=4), out, **given | {"model": network}, log_every=1)
    records = [r for r in log.read(out) if "loss" in r]
    assert {"decode.loss_ce", "aux.loss_ce"} < records[0].keys()
    stored = safetensors.torch.load_file(out / "final.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in network.state_dict().items())


def test_a_model_of_apcnet_trains_and_loads_as_always(out):
    model = apcnet.create("apcnet", "tiny", 9, width=8, channels=8, auxiliary_channels=0)
    train(config(steps=2), out, model=model, loss=Smoothed())
    loaded = apcnet.load(out / "final.safetensors")
    assert loaded.architecture == model.architecture and loaded.classes == Synthetic.classes


def test_float_images_of_an_own_data_set_are_measured(out):
    class Five(Scenes):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            return torch.cat([image, image[:2]]).float() * 40, mask

    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.stem[0] = nn.Conv2d(5, 8, 3, 2, 1)

    crop = {"augment": lambda image, mask, generator: (image[:, :32, :32], mask[:32, :32])}
    for own in (crop, {}):
        folder = out / str(len(own))
        train(config(steps=2), folder, data=Five("train", 5), val_data=Five("val", 2), model=Wide, workers=1, **own)
        levels = torch.stack([Five("train", 5)[i][0] for i in range(5)]).double()
        measured = json.loads((folder / "images.json").read_text())
        assert measured["mean"] == pytest.approx(levels.mean((0, 2, 3)).tolist())


def test_an_augmentation_is_a_function_of_the_seed_and_the_sample_alone():
    image = torch.randint(0, 256, (3, 48, 52), dtype=torch.uint8)
    sample = Sample(image, torch.zeros(48, 52, dtype=torch.uint8), "a")
    transform = OwnAugmentation(noisy, (32, 32), augment.MEAN, augment.STD)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (transform(sample, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"val_data": None}, "val_data: expected a data set, as for data, got None"),
        ({"data": None}, "data: expected a data set, as for val_data, got None"),
        ({"data": [1, 2]}, r"data: expected a data set with len\(data\), data\[i\] and data.classes, got list without"),
        ({"loss": 3}, "loss: expected a callable, got int"),
        ({"loss": nn.Linear(2, 2)}, "loss: expected no parameters to train, since only the model is saved"),
        ({"loss": lambda output, target: output.logits.mean()}, "loss: expected it to return a dict .*, got Tensor"),
        ({"loss": lambda output, target: {}}, r"loss: expected it to return a dict .*, got \{\}"),
        ({"loss": lambda output, target: {"a": output.logits}}, r"scalar tensors, got \(4, 9, 16, 16\) for 'a'"),
        ({"loss": lambda output, target: {"lr": output.logits.sum()}}, "loss: expected another name than 'lr'"),
        ({"augment": "flip"}, "augment: expected a callable, got str"),
        ({"augment": lambda image, mask, generator: image}, "augment: expected it to return an image and a mask, got"),
        (
            {"augment": lambda image, mask, generator: (image, mask)},
            r"augment: expected an image \(3, 32, 32\), as large",
        ),
        ({"augment": lambda image, mask, generator: (image.long(), mask)}, "image: expected a uint8 tensor on the CPU"),
        ({"callbacks": print}, "callbacks: expected a list of functions, got <built-in function print>"),
        ({"model": lambda: 3}, "model: expected a module, or a function that makes one, got int"),
        (
            {"model": lambda: Net(5)},
            r"model: expected logits \(B, 9, h, w\), since the data have 9 classes, got \(4, 5,",
        ),
        ({"model": lambda: nn.LSTM(3, 3)}, "LSTM|expected"),
        ({"model": apcnet.create("fcn", "tiny", 4, width=8)}, "model: expected 9 classes, as the data have, got 4"),
    ],
)
def test_wrong_objects_are_errors_that_name_them(given, message, out, monkeypatch):
    small_runs.without_pictures(monkeypatch)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        train(config(steps=2), out, **objects() | given)
    assert not out.exists()


def test_wrong_samples_are_named(out):
    class Wrong(Scenes):
        def __getitem__(self, index):
            image, mask = super().__getitem__(index)
            return (image, mask.fill_(9)) if self.scenes.split == "train" else (image, mask)

    with pytest.raises(ValueError, match=r"sample '.*' .*expected labels of 0 to 8 and 255, got 9"):
        train(config(steps=2), out, **objects() | {"data": Wrong("train", 4)})


def test_own_parts_are_objects_of_python(out):
    with pytest.raises(ValueError, match=r"dataset: expected data= and val_data= in a call of apcnet\.train"):
        train(config(data=Data("own"), model=Model(backbone="tiny")), out)
    with pytest.raises(ValueError, match=r"model: expected model=module in a call of apcnet\.train"):
        train(config(model=Model("own")), out)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("optimisation", {"label_smoothing": 0.1}, "label_smoothing: expected the default with loss=, which takes its"),
        (
            "optimisation",
            {"loss": "cross_entropy+dice"},
            "loss: expected the default with loss=, which takes its place",
        ),
        ("data", {"rotate": True}, "rotate: expected the default with augment=, which takes its place, got True"),
    ],
)
def test_settings_that_an_object_replaces_are_refused(out, section, changes, message):
    plain = config()
    given = dataclasses.replace(plain, **{section: dataclasses.replace(getattr(plain, section), **changes)})
    with pytest.raises(ValueError, match=message):
        train(given, out, **objects())
    rest = {"loss": None, "augment": None}
    assert Own(**objects() | rest).config(given).model == Model("own")


@pytest.mark.slow
def test_an_own_model_is_compiled(tmp_path):
    def without_dropout():  # whose random numbers are others in compiled code
        network = Net()
        network.stem[3] = nn.Identity()
        return network

    given = objects() | {"model": without_dropout}
    for compiled in (False, True):
        train(config(steps=3, compile=compiled), tmp_path / str(compiled), **given, log_every=1)
    losses = [[r["loss"] for r in log.read(tmp_path / str(c)) if "loss" in r] for c in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def applied(function, seed: int):
    image = torch.randint(0, 256, (3, 48, 52), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sample = Sample(image, (image[0] > 128).to(torch.uint8), "a")
    return OwnAugmentation(function, (32, 32), (0.0,) * 3, (1.0,) * 3)(sample, torch.Generator().manual_seed(seed))


def documented(package: str) -> dict:
    """Runs the adapter of a package in docs/train.md, for crops of 32 pixels; returns what it defines."""
    page = (Path(__file__).parents[3] / "docs" / "train.md").read_text()
    (block,) = re.findall(rf"```python\n# not run by the tests: the download of {package}\n(.*?)```", page, re.DOTALL)
    found = {"torch": torch}
    exec(block.replace("96", "32"), found)
    return found


@pytest.mark.parametrize("package", ["torchvision", "albumentations"])
def test_transforms_of_other_packages_are_adapted_as_documented(package):
    real_packages.imported(package)
    function = documented(package)["augment"]
    results = [applied(function, seed) for seed in (3, 3, 4, 5)]
    assert all(torch.equal(*pair) for pair in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0]) or not torch.equal(results[0][0], results[3][0])
    for image, mask in results:
        assert image.shape == (3, 32, 32) and mask.shape == (32, 32) and mask.dtype == torch.uint8


@pytest.mark.slow
def test_two_processes_take_own_objects(tmp_path):
    """Tests that both processes end with the same weights, though they start with others and leave a layer unused."""
    results = torch.multiprocessing.get_context("spawn").Manager().dict()
    torch.multiprocessing.spawn(train_rank, (2, str(tmp_path), results), nprocs=2)
    assert results[0] == results[1]
    assert (tmp_path / "run" / "final.safetensors").is_file()


def train_rank(rank: int, world: int, folder: str, results: dict) -> None:
    """Trains as one of several processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    network = Net()
    train(
        config(steps=4, optimisation=Optimisation(lr=0.05, ema=0.5)), f"{folder}/run", **objects() | {"model": network}
    )
    results[rank] = sum(float(parameter.double().sum()) for parameter in network.parameters())
    torch.distributed.destroy_process_group()


def test_own_objects_are_kept_in_one_place():
    own = Own(**objects(), callbacks=[print])
    assert set(own.objects) == {"data", "val_data", "model", "loss", "augment"}
