"""Tests training runs: their files, how they end, and errors for wrong input."""

import dataclasses
import json
import signal
import sys

import numpy as np
import parity
import pytest
import small_runs
import torch
from PIL import Image
from small_runs import small, start

import apcnet
from apcnet.config import Model, Optimisation
from apcnet.inference.measures import MeanLoss
from apcnet.presets import preset
from apcnet.training import checkpoint, log, train
from apcnet.training.checkpoint import Best
from apcnet.training.start import check, initial_model
from apcnet.training.writers import Service


def test_a_run_writes_its_files(root, out):
    shown = []
    scores = train(small(root), out, log_every=4, progress=shown.append)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "environment.json", "lock", "log.jsonl", "metrics.json", "last.pt", "previous.pt"),
        *("best.safetensors", "final.safetensors", "confusion.npy", "confusion.png", "preview"),
        *("worst.png", "worst.npz", "images.csv", "report.html", "curves.png"),
    }
    assert {path.name for path in (out / "preview").iterdir()} == {
        *("000000.png", "000006.png", "000012.png", "000000.npz", "000006.npz", "000012.npz", "samples.npz")
    }
    assert json.loads((out / "metrics.json").read_text()) == scores
    records = log.read(out)
    assert [record["step"] for record in records] == [4, 6, 8, 12, 12]
    assert records == [record for record in shown if "event" not in record]
    assert records[0].keys() >= {"loss", "decode.loss_ce", "aux.loss_ce", "lr", "gradient_norm", "images_per_second"}
    assert scores["best"]["miou"] == max(record["miou"] for record in records if "miou" in record)
    model = apcnet.load(out / "final.safetensors")
    assert model.classes == apcnet.data.open("folder", root, "val").classes
    assert train(small(root), out) == scores  # the finished run returns its scores


def test_one_logit_is_trained_for_two_classes(root, out, monkeypatch):
    """Tests masks of 0 and 255: training, scores of both classes, resuming, the model's file and its predictions."""
    small_runs.without_pictures(monkeypatch)
    (root / "classes.txt").write_text("background\nobject\n")
    for path in root.glob("masks/*/*.png"):
        mask = torch.from_numpy(np.array(Image.open(path)))
        Image.fromarray(((mask > 3) & (mask != 255)).numpy().astype(np.uint8) * 255).save(path)
    settings = Optimisation(lr=0.02, loss="binary_cross_entropy+0.5*dice", accumulate=2)
    config = small(root, optimisation=settings)
    scores = train(dataclasses.replace(config, steps=6), out)
    with pytest.warns(UserWarning, match="steps: 6 → 12"):
        assert len(scores["iou"]) == 2 and train(config, out)["step"] == 12
    record = log.read(out)[0]
    assert record.keys() >= {"decode.loss_bce", "decode.loss_dice", "aux.loss_bce", "aux.loss_dice"}
    with pytest.raises(ValueError, match=r"loss: binary_cross_entropy\+0.5\*dice → dice"):
        train(dataclasses.replace(config, optimisation=dataclasses.replace(settings, loss="dice")), out)
    model = apcnet.load(out / "final.safetensors")
    assert (model.num_classes, len(model.classes)) == (1, 2)
    labels = apcnet.predict(model, next(root.glob("images/val/*.png"))).labels
    assert set(labels.unique().tolist()) <= {0, 1} and labels.shape == (48, 56)


def test_training_restores_the_state_of_the_process(root, out):
    torch.manual_seed(5)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    before = torch.get_rng_state()
    train(small(root, steps=2), out)
    assert torch.equal(torch.get_rng_state(), before) and not torch.are_deterministic_algorithms_enabled()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def scored(monkeypatch, *scores):
    """Makes evaluations give these values of mIoU, mean Dice and loss, by their number."""
    monkeypatch.setattr("apcnet.training.run.rated", lambda _, loss, step: Best(step=step, **of_step[step]))
    of_step = {3 * (i + 1): dict(zip(("miou", "dice", "loss"), values, strict=True)) for i, values in enumerate(scores)}


@pytest.mark.parametrize(
    ("by", "patience", "best", "last"), [("miou", 2, 6, 12), ("dice", 2, 3, 9), ("loss", 1, 9, 12)]
)
def test_a_run_stops_after_its_patience(root, out, monkeypatch, by, patience, best, last):
    scored(monkeypatch, *((0.1, 0.5, 3.0), (0.3, 0.4, 2.0), (0.2, 0.5, 1.0), (0.2, 0.3, 1.0), (0.9, 0.9, 0.1)))
    small_runs.without_pictures(monkeypatch)
    config, shown = small(root, steps=15, eval_every=3, best_by=by, patience=patience), []
    scores = train(config, out, log_every=5, progress=shown.append)
    assert (scores["step"], scores["best"]["step"]) == (last, best)
    assert log.read(out)[-1] == json.loads((out / "metrics.json").read_text()) == scores
    assert {"event": "over", "step": last, "waited": patience} in shown
    assert train(config, out) == scores and checkpoint.load(out)["step"] == last
    if by == "miou":  # more patience: the run goes on
        assert train(small(root, steps=15, eval_every=3, patience=4), out)["step"] == 15


def test_patience_counts_on_after_a_kill(root, out, monkeypatch):
    scored(monkeypatch, *((0.5, 0.5, 1.0), (0.4, 0.4, 1.0), (0.4, 0.4, 1.0), (0.4, 0.4, 1.0)))
    small_runs.without_pictures(monkeypatch)
    config = small(root, steps=12, eval_every=3, patience=2)

    def show(record):
        if record.get("step") == 6 and "miou" in record:
            raise KeyError("a stand-in for SIGKILL: nothing is saved")

    with pytest.raises(KeyError):
        train(config, out, progress=show)
    assert checkpoint.load(out)["waited"] == 0
    assert train(config, out)["step"] == 9


def test_the_best_model_by_loss_has_the_lowest(root, out):
    scores = train(small(root, eval_every=3, best_by="loss"), out)
    losses = {r["step"]: r["val_loss"] for r in log.read(out) if "miou" in r}
    assert scores["best"]["loss"] == min(losses.values()) == losses[scores["best"]["step"]]
    model, data = apcnet.load(out / "best.safetensors"), apcnet.data.open("folder", root, "val")
    measured = MeanLoss()
    apcnet.evaluate(model, data, loss=measured)
    assert measured.mean == scores["best"]["loss"]


def test_a_start_that_takes_no_step_leaves_its_folder_free(root, out, monkeypatch):
    """Tests that a start that fails, before its first step or in it, writes nothing that another start runs into."""
    for extra in ("timm", "wandb"):
        monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package timm.* pip install"):
        train(small(root, model=Model("apcnet", "resnet50", "timm:resnet50c")), out / "of" / "mine")
    assert not out.exists()
    masks = next((root / "masks" / "train").iterdir())
    content = masks.read_bytes()
    masks.write_bytes(b"")
    with pytest.raises(ValueError, match="expected an image"):
        train(small(root, batch_size=8), out)
    assert not out.exists()
    masks.write_bytes(content)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ModuleNotFoundError, match="log: wandb is not installed"):
        train(small(root), out, log_to="wandb")
    assert (out / "notes.txt").read_text() == "mine" and not (out / "config.json").exists()
    assert train(small(root, steps=1), out)["step"] == 1


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_weights(root, out):
    config = small(root, optimisation=Optimisation(lr=1e20, momentum=0.0))
    with pytest.raises(FloatingPointError, match=r"step \d+: losses or gradients are not finite \(loss .*failed\.json"):
        train(config, out)
    failed, state = json.loads((out / "failed.json").read_text()), checkpoint.load(out)
    assert failed["step"] == state["step"] > 0 and len(failed["samples"]) == 4
    assert failed["samples"][0]["position"] == 4 * failed["step"] and failed["samples"][0]["name"].startswith(
        "whole-train"
    )
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_files_end_a_run_with_their_names(root, out, workers):
    def show(record):
        if record.get("step") == 7:
            for path in (root / "images" / "train").iterdir():
                path.unlink()

    with pytest.raises(ValueError, match=r"whole-train.*position \d+.*FileNotFoundError") as error:
        train(small(root, steps=40), out, workers=workers, log_every=1, progress=show)
    assert "Traceback" not in str(error.value)
    assert checkpoint.load(out)["step"] >= 6


def test_a_full_disk_ends_a_run_and_leaves_its_checkpoint(root, out, monkeypatch):
    usual = torch.save

    def save(state, path):
        if state["step"] == 9:
            raise OSError(28, "No space left on device")
        usual(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        train(small(root), out)
    assert checkpoint.load(out)["step"] == 6 and not list(out.glob(".*"))


def test_two_processes_train_as_one_does(tmp_path, threads):
    """Tests equality up to rounding with frozen batch norms; otherwise each process has statistics of its half.

    Two processes that accumulate two parts each train as one process on the whole batch.
    """
    threads(1)
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(small_runs.train_rank, (2, str(tmp_path / "meeting"), results), nprocs=2)
    cases = (True, 1e-6), (False, 2e-3), (True, 1e-6)
    for (frozen_norms, limit), first, second in zip(cases, results[0], results[1], strict=True):
        alone = small_runs.train_some_steps(0, 1, frozen_norms)
        assert torch.equal(first[0], second[0])
        assert parity.distance(first[0], alone[0]) < limit
        assert parity.distance(first[1], alone[1]) < limit


def test_a_run_starts_from_a_model_with_other_classes(root, out, tmp_path):
    torch.manual_seed(1)
    options = {"width": 8, "channels": 8, "auxiliary_channels": 0}
    apcnet.create("pspnet", "tiny", 4, **options).save(tmp_path / "four.safetensors")
    config = small(root, model=Model("pspnet", "tiny", init=tmp_path / "four.safetensors", **options), steps=1)
    with pytest.warns(UserWarning, match="these layers start with new weights: head.classifier"):
        model = initial_model(config, apcnet.data.open("folder", root, "train"))
    assert model.num_classes == 9
    assert torch.equal(
        model.backbone.stem[0].weight, apcnet.load(tmp_path / "four.safetensors").backbone.stem[0].weight
    )
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, model="fcn", channels=16))
    with pytest.raises(
        ValueError, match=r"init: .* holds another model than the config, model: pspnet → fcn; channels: 8 → 16"
    ):
        train(wrong, out)


def test_class_weights_come_from_a_report(root, out, tmp_path):
    report = tmp_path / "report.json"
    config = small(root, optimisation=Optimisation(lr=0.02, class_weights=report), steps=2)
    report.write_text(json.dumps({"class_weights": {"weights": [1.0] * 8 + [3.0]}}))
    train(config, out)
    for content, message in (
        ("{}", "expected a report of `apcnet check --json`"),
        ('{"class_weights": {"weights": [1]}}', "expected 9 numbers of 0 or more"),
    ):
        report.write_text(content)
        with pytest.raises(ValueError, match=message):
            train(config, tmp_path / "other")


def test_wrong_configs_are_refused_before_anything_is_written(root, out, monkeypatch):
    resnet = small(root, model=Model("apcnet", "resnet50"))
    with pytest.raises(
        ValueError,
        match=r"backbone_weights: expected pretrained weights for resnet50, .*--backbone-weights.*--from-scratch",
    ):
        train(resnet, out)
    with pytest.raises(ValueError, match="accumulate: expected a divisor of the 4 images per process"):
        train(small(root, optimisation=Optimisation(accumulate=3)), out)
    monkeypatch.setattr("apcnet.training.start.world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        check(small(root))
    assert not out.exists()


@pytest.mark.slow
def test_a_short_run_learns_classes_that_need_context(tmp_path, threads):
    """Tests a quarter of the steps of `apcnet train`; guessing gives a context_miou of about 1/3."""
    threads(1)
    scores = train(dataclasses.replace(preset("tiny"), steps=400, eval_every=400), tmp_path / "run")
    assert scores["context_miou"] >= 0.5


@pytest.mark.slow
def test_only_heads_with_context_learn_the_generated_scenes(tmp_path):
    """Tests that APCNet learns the classes that need context in a full run, and that FCN does not."""
    heads = {"apcnet": ["--eval-every", 750], "fcn": ["--model", "fcn", "--eval-every", 1500]}
    runs = {name: start("train", *more, "--workers", 0, "--out", tmp_path / name) for name, more in heads.items()}
    scores = {}
    for name, run in runs.items():
        _, errors = run.communicate()
        assert run.returncode == 0, errors
        scores[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    assert scores["apcnet"]["miou"] >= 0.85 and scores["apcnet"]["context_miou"] >= 0.75
    assert scores["fcn"]["context_miou"] <= 0.35


def test_a_service_gets_every_record_and_the_pictures_of_every_evaluation(root, out, monkeypatch):
    given, pictures = [], []

    def picture(name, path, step):
        assert path.is_file()
        pictures.append((name, step))

    service = Service(given.append, picture, lambda: given.append("closed"))
    monkeypatch.setattr("apcnet.training.log.open_service", lambda writer, folder, step: service)
    train(small(root, steps=4, eval_every=2), out, log_every=1, log_to="wandb")
    assert given == [*log.read(out), "closed"]
    kinds = ("val/preview", "val/worst", "val/confusion")
    assert pictures == [(kind, step) for step in (2, 4) for kind in kinds]
