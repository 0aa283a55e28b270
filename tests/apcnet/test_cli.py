"""Tests the command line: its output, its error messages and its exit statuses."""

import json
import os
import re
import shlex
import subprocess
import sys

import fake_trees
import forked
import pytest
import small_runs
import torch
from PIL import Image

import apcnet
from apcnet import cli
from apcnet.interop import mmseg
from apcnet.models import build
from apcnet.presets import preset

COMMANDS = re.compile(r".*To go on with it: (apcnet train .*); to start another run: (apcnet train .*)\n")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = build("fcn", "resnet18", 3, width=8, stem_width=16, channels=8, auxiliary_channels=8)
    torch.save({"meta": {"CLASSES": ["a", "b", "c"]}, "state_dict": mmseg.state_dict(model)}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_convert_and_export(run, checkpoint, tmp_path):
    made, program = tmp_path / "a.safetensors", tmp_path / "a.pt2"
    status, out, err = run("convert", checkpoint, made, "--align-corners", "False", "--output-stride", "8")
    assert (status, err) == (0, "")
    assert out.startswith(f"{made}: model fcn, backbone resnet18, num_classes 3, ")
    assert out.endswith(", with class names\n")
    status, out, _ = run("export", made, program, "--size", "64", "96", "--no-dynamic")
    assert status == 0 and out.startswith(f"{program}: logits, off by ") and "64×96" in out
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        given, expected = torch.export.load(program).module()(images), apcnet.load(made)(images)
    assert torch.allclose(given, expected, atol=1e-5)


def test_assumptions_are_reported(run, checkpoint, tmp_path):
    status, _, err = run("convert", checkpoint, tmp_path / "a.safetensors", "--align-corners", "False")
    assert status == 0 and err.startswith("apcnet: output_stride: assumed 8") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "a.pth", "a.safetensors"), "a.pth: align_corners: expected True or False, got none"),
        (("convert", "a.pth", "a.onnx"), "apcnet: out: expected NAME.safetensors in an existing folder, got "),
        (
            ("convert", "b.pth", "a.safetensors"),
            "apcnet: source: expected a file, a URL or the name of published weights, got ",
        ),
        (("export", "b.safetensors", "a.pt2"), "b.safetensors: there is no such file"),
        (("export", "a.pth", "a.pt2"), "a.pth: expected a whole safetensors file"),
    ],
)
def test_wrong_input_is_one_line(run, checkpoint, tmp_path, arguments, message):
    command, *files = arguments
    status, out, err = run(command, *(tmp_path / name for name in files))
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1 and "Traceback" not in err


def test_check_reports_problems(run, tmp_path):
    """Tests exit status 0 without problems, 1 with a problem that would break training, and the report as a file."""
    fake_trees.folder(tmp_path / "data")
    status, out, err = run("check", "folder", tmp_path / "data", "--workers", "0")
    assert (status, err) == (0, "") and out.endswith("\nNo problems found.\n")
    (tmp_path / "data" / "masks" / "val" / "d.png").write_bytes(b"")
    status, out, err = run("check", "folder", tmp_path / "data", "--json", tmp_path / "report.json", "--splits", "val")
    assert (status, err) == (1, "") and "\nerror: unreadable mask, 1 in val\n  the file is empty\n    d: " in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["ok"] and report["findings"][0]["kind"] == "unreadable mask" and list(report["splits"]) == ["val"]


def test_check_takes_labels(run, tmp_path):
    fake_trees.folder(tmp_path)
    labels = ("0", "255", "1", "0", "2", "1", "255", "2")
    assert run("check", "folder", tmp_path, "--workers", "0", "--labels", *labels)[0] == 0
    assert run("check", "folder", tmp_path, "--workers", "0", "--labels", *labels[2:])[0] == 1


def test_prepare_and_check(run, tmp_path):
    fake_trees.cityscapes(tmp_path, prepared=False)
    status, out, _ = run("check", "cityscapes", tmp_path, "--workers", "0")
    assert status == 1 and f"`apcnet prepare cityscapes {tmp_path}`" in out
    assert run("prepare", "cityscapes", tmp_path) == (0, f"{tmp_path}: 5 files written, 0 already there\n", "")
    assert run("prepare", "cityscapes", tmp_path) == (0, f"{tmp_path}: 0 files written, 5 already there\n", "")
    assert run("check", "cityscapes", tmp_path, "--workers", "0")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "folders", "."), "name: expected one of cityscapes, "),
        (("check", "folder", "nowhere"), "root: expected an existing folder, got nowhere"),
        (
            ("check", "cityscapes", ".", "--labels", "0", "1"),
            "labels: expected with folder only, got them with cityscapes",
        ),
        (
            ("check", "folder", ".", "--json", "nowhere/a.json"),
            "json: expected a file in an existing folder, got nowhere/a.json",
        ),
        (("check", "cityscapes", ".", "--worker", "0"), "--workers"),
        (("prepare", "ade20k", "."), "needs nothing but its download; to read all of it: apcnet check ade20k ."),
        (("prepare", "cityscapes", "nowhere"), "root: expected an existing folder, got nowhere"),
    ],
)
def test_wrong_use_of_check_and_prepare(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "convert"),
        (("convrt",), "convert"),
        (("convert", "a.pth", "a.safetensors", "--align-corner", "False"), "--align-corners"),
        (("convert", "a.pth", "a.safetensors", "--output-stride", "4"), "--output-stride"),
    ],
)
def test_wrong_flags_name_the_right_ones(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 2 and message in err


@pytest.mark.parametrize("command", [command.__name__ for command in cli.COMMANDS])
def test_every_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"usage: apcnet {command}" in out


@pytest.mark.parametrize("arguments", [("train", "--help"), ("presets",)])
def test_a_closed_pipe_ends_a_command_quietly(arguments):
    command = [sys.executable, "-m", "apcnet", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (cli.CLOSED_PIPE, "")


def test_the_library_needs_neither_tyro_nor_rich():
    imports = "import sys, apcnet, apcnet.interop.convert, apcnet.data.doctor.check"
    code = f"{imports}; assert not {{'tyro', 'rich'}} & set(sys.modules)"
    assert forked.run(["-c", code]).returncode == 0


def test_help_does_not_wait_for_pytorch():
    script = (
        "import sys, time; from apcnet.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, time.process_time())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *text, last = run.stdout.splitlines()
    imported, seconds = last.split()
    assert "train" in "\n".join(text) and imported == "False"
    assert float(seconds) < 1  # of the processor; 0.2 on an idle machine


@pytest.fixture
def trained(run, tmp_path):
    """Trains a small model; returns the folder of the run and the output of the command."""
    root = small_runs.write_images(tmp_path / "data")
    status, out, err = run(*small_runs.flags(small_runs.small(root)), "--out", tmp_path / "run", "--workers", 0)
    assert status == 0, err
    return tmp_path / "run", out


def test_a_run_is_trained_evaluated_and_used(run, trained, tmp_path):
    folder, out = trained
    assert f"{folder}: 0.0" in out and "step 12 of 12  loss" in out and "fabric by dots" in out
    report = out.splitlines()[-1].split()[-1]
    assert report == str(folder / "report.html") and "fabric by dots" in (folder / "report.html").read_text()
    assert f"apcnet export {folder}/final.safetensors" in (folder / "report.html").read_text()
    assert Image.open(folder / "worst.png").width == Image.open(folder / "preview" / "000012.png").width > 400
    results, labels = tmp_path / "results", tmp_path / "labels"
    status, out, err = run("evaluate", folder, "--out", results, "--predictions", labels)
    assert status == 0, err
    header, first = (line.split() for line in out.splitlines()[1:4:2])
    assert [word for word in header if word.isalnum()] == ["class", "IoU", "Dice", "precision", "recall"]
    assert "ground" in first and {"mIoU", "mAcc", "aAcc", "fwIoU"} <= set(out.splitlines()[-2].split())
    assert out.splitlines()[-1] == "11,031 labelled pixels of 5 images, scores in per cent"
    assert len((results / "images.csv").read_text().splitlines()) == 6
    evaluated, trained = (json.loads((path / "metrics.json").read_text()) for path in (results, folder))
    assert evaluated["miou"] == trained["miou"] and evaluated["iou"] == trained["iou"]
    assert len(list(labels.rglob("*.png"))) == 5
    status, out, err = run("evaluate", folder / "best.safetensors", "--multi-scale", "--workers", 1)
    assert status == 0, err
    more = "--boundary", "--calibration", "--loss", "--out", results, "--workers", 0
    status, out, err = run("evaluate", folder, *more)
    assert status == 0 and "boundary IoU" in out and "ECE" in out and "loss" in out.splitlines()[-2], err
    measured = json.loads((results / "metrics.json").read_text())
    assert measured["iou"] == trained["iou"] and 0 < measured["mean_boundary_iou"] < measured["miou"] + 0.5
    assert 0 < measured["ece"] < 1 and measured["loss"] > 0
    images = tmp_path / "data" / "images" / "val"
    status, out, err = run("predict", folder, images, "--out", tmp_path / "seen", "--confidence")
    assert status == 0 and out.endswith("5 images\n"), err
    assert len(list((tmp_path / "seen").glob("*_confidence.png"))) == 5
    assert len(list((tmp_path / "seen").glob("*_overlay.jpg"))) == 5


def test_checked_images_are_drawn_as_training_sees_them(run, trained, tmp_path):
    root, out = tmp_path / "data", tmp_path / "crops.png"
    status, text, err = run("check", "folder", root, "--pictures", out)
    assert status == 0 and text.endswith(f"pictures {out}\n"), err
    with Image.open(out) as picture:
        assert picture.width > 1500 and len(picture.getcolors(1 << 24)) > 1000
    status, _, err = run("check", "folder", root, "--pictures", out, "--preset", "tiny")
    assert status == 2 and "preset: expected one for folder, got tiny, which is for synthetic" in err
    status, _, err = run("check", "folder", root, "--pictures", tmp_path / "none" / "a.png")
    assert status == 2 and "pictures: expected a file in an existing folder" in err


def test_own_images_are_trained_from_a_model_with_class_weights(run, trained, tmp_path):
    root, report = tmp_path / "data", tmp_path / "report.json"
    status, _, err = run("check", "folder", root, "--json", report)
    assert err == ""
    start = "--init", trained[0] / "final.safetensors", "--class-weights", report, "--steps", 2, "--workers", 0
    more = "--crop", 48, 48, "--out", tmp_path / "finer", "--batch-size", 4, "--log-every", 1
    status, out, err = run("train", "folder", "--root", root, *start, *more)
    assert status == 0 and "step 2 of 2" in out, err
    config = json.loads((tmp_path / "finer" / "config.json").read_text())
    assert config["model"]["backbone"] == "tiny" and config["model"]["width"] == 8  # as in the file


def test_a_broken_image_is_named_and_the_others_are_predicted(run, trained, tmp_path):
    images = tmp_path / "data" / "images" / "val"
    (images / "broken.png").write_bytes(b"no image")
    status, out, err = run("predict", trained[0], images, "--out", tmp_path / "seen")
    assert status == 1 and out.endswith("5 images\n") and "broken.png" in err and err.count("\n") == 1


def test_the_same_command_resumes_and_another_one_is_refused(run, trained, tmp_path):
    again = small_runs.flags(small_runs.small(tmp_path / "data")), ("--out", trained[0], "--workers", 0)
    status, out, _ = run(*again[0], *again[1])
    assert status == 0 and "resuming at step 12" in out and "step 12 of 12" not in out
    status, _, err = run(*again[0], *again[1], "--lr", 0.5)
    assert status == 2 and "holds another run, lr: 0.02 → 0.5" in err and err.count("\n") == 1
    go_on, new = (shlex.split(command) for command in COMMANDS.fullmatch(err).groups())
    assert new == ["apcnet", *map(str, (*again[0], *again[1], "--lr", 0.5)), "--new"]
    assert run(*go_on[1:])[0] == 0 and "--lr" in go_on
    status, out, _ = run(*again[0], *again[1], "--lr", 0.5, "--new", "--steps", 1)
    assert status == 0 and (tmp_path / "run-2" / "final.safetensors").exists()


@pytest.mark.parametrize("name", ["apcnet-r50-ade20k", "apcnet-r50-ade20k-160k"])
def test_published_weights_are_evaluated_as_their_preset(name):
    arguments, defaults = cli._defaults("evaluate", [name, "--root", "data"])
    assert arguments == [name, "--root", "data"] and defaults["data"] == preset("apcnet-r50-ade20k-160k").data


@pytest.mark.parametrize(
    ("more", "timm", "weights"),
    [
        ((), True, "timm:resnet50c"),
        ((), False, None),
        (("--from-scratch",), True, None),
        (("--backbone=tiny",), True, None),
    ],
)
def test_own_images_start_from_timms_weights_where_it_is_installed(monkeypatch, more, timm, weights):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: timm or None)
    _, defaults = cli._defaults("train", ["folder", "--root", "mine", *more])
    assert defaults["config"].model.backbone_weights == weights


def test_several_processes_train_and_one_tests_the_same(run, tmp_path):
    """Tests that one process evaluates like the two processes that trained the model."""
    root = small_runs.write_images(tmp_path / "data")
    config = small_runs.small(root, steps=3, eval_every=3)
    arguments = *small_runs.flags(config), "--out", tmp_path / "run", "--workers", 0
    out, err = (both := small_runs.start(*arguments, processes=2)).communicate()
    assert both.returncode == 0, err
    assert out.count("in 2 processes") == 1
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())
    results = tmp_path / "results"
    assert run("evaluate", tmp_path / "run", "--out", results, "--workers", 0)[0] == 0
    assert json.loads((results / "metrics.json").read_text())["iou"] == scores["iou"]
    assert (results / "confusion.npy").read_bytes() == (tmp_path / "run" / "confusion.npy").read_bytes()


@pytest.mark.slow
def test_several_processes_test(trained, tmp_path):
    started = small_runs.start("evaluate", trained[0], "--out", tmp_path / "results", processes=2)
    _, err = started.communicate()
    assert started.returncode == 0, err
    assert (tmp_path / "results" / "confusion.npy").read_bytes() == (trained[0] / "confusion.npy").read_bytes()


def test_presets_are_listed(run):
    status, out, _ = run("presets", "apcnet-r50-ade20k")
    assert status == 0 and "apcnet-r50-ade20k-80k" in out and "42.20" in out and "pspnet" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "tinny"], "preset: expected a name that `apcnet presets` lists, got 'tinny'; did you mean tiny?"),
        (["train", "--lrr", "3"], "Perhaps you meant: --lr"),
        (["train", "--lr", "-3"], "lr: expected a positive number"),
        (["train", "--window", "3", "3"], "window, stride: expected both or neither, got (3, 3) and None"),
        (["predict", "no.safetensors", "a.jpg", "--out", "b", "--stride", "3", "3"], "window, stride: expected both"),
        (
            ["train", "apcnet-r50-ade20k", "--root", "."],
            "backbone_weights: expected pretrained weights for resnet50, got none; add --backbone-weights FILE",
        ),
        (["train", "apcnet-r50-ade20k"], "root: expected the folder of ade20k, got none; add --root FOLDER"),
        (["train", "folder", "--init", "no.safetensors"], "no.safetensors: there is no such file"),
        (["train", "tiny", "--gpus", "2", "--device", "cpu"], "gpus: expected 1 or more of the"),
        (
            ["evaluate", "no.safetensors"],
            "no.safetensors: expected a run folder or a model in one, found no config.json",
        ),
        (["evaluate", "."], ".: expected a run folder or a model in one, found no config.json"),
        (["predict", "no.safetensors", "a.jpg", "--out", "b"], "no.safetensors: there is no such file"),
        (["predict", ".", "a.jpg", "--out", "b"], ".: expected a model file or the folder of a run, found neither"),
        (
            ["predict", "nothing", "a.jpg", "--out", "b"],
            "path: expected a model file, hf:user/model or the name of published weights, got nothing;",
        ),
        (["train", "--out", "/dev/null/run"], "out: expected a folder that can be created, got /dev/null/run (Not a"),
        (["train", "folder"], "root: expected the folder of your images and masks, got none; add --root FOLDER"),
        (["evaluate", "apcnet-ade20k"], "published weights, got apcnet-ade20k; did you mean apcnet-r50-ade20k-"),
        (["trian"], "command: expected one of train, evaluate, predict"),
        (["trian"], "got 'trian'; did you mean 'train'?"),
        (["compare"], "runs: expected the folders of one run or more, got none: apcnet compare RUN RUN"),
        (["serve"], "models: expected one or more, got none; name a run's folder, a model file or hf:USER/MODEL"),
        (["prepare", "ade20k", "a"], "name: ade20k needs nothing but its download; to read all of it: apcnet check"),
        (["presets", "unet"], "presets: expected a part of a name that `apcnet presets` lists, got 'unet'"),
    ],
)
def test_wrong_input_is_reported(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*arguments)
    assert status == 2 and message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err and "dummy" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("APC_KERNELS_ISA", "sse9", "apcnet: APC_KERNELS_ISA=sse9: this processor allows"),
        ("APC_KERNELS_BACKEND", "cuda", "the backend 'cuda' was asked for, but cuda does not run on cpu tensors"),
    ],
)
def test_a_variable_that_cannot_be_served_is_named(tmp_path, variable, value, message):
    command = ["-m", "apcnet", "train", "--steps", "1", "--device", "cpu", "--out", tmp_path / "run"]
    result = forked.run(command, tmp_path, os.environ | {variable: value})
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
