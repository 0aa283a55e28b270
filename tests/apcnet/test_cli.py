"""What a user of the command line reads, and the exit statuses."""

import json
import subprocess
import sys

import fake_trees
import pytest
import torch

import apcnet
from apcnet import cli
from apcnet.interop import mmseg
from apcnet.models import build


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs a command: its exit status, output and errors."""
    monkeypatch.setattr("warnings.showwarning", None)  # put back afterwards; main sets its own

    def run(*arguments):
        status = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return run


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
    assert out.endswith(", with names of classes\n")
    status, out, _ = run("export", made, program, "--size", "64", "96", "--no-dynamic")
    assert status == 0 and out.startswith(f"{program}: logits, off by ") and "64×96" in out
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        given, expected = torch.export.load(program).module()(images), apcnet.load(made)(images)
    assert torch.allclose(given, expected, atol=1e-5)


def test_what_is_assumed_is_said(run, checkpoint, tmp_path):
    status, _, err = run("convert", checkpoint, tmp_path / "a.safetensors", "--align-corners", "False")
    assert status == 0 and err.startswith("apcnet: output_stride: taken as 8") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "a.pth", "a.safetensors"), "apcnet: align_corners: neither the weights nor a config text"),
        (("convert", "a.pth", "a.onnx"), "apcnet: out: expected NAME.safetensors in a folder that exists, got "),
        (("convert", "b.pth", "a.safetensors"), "apcnet: source: there is no file "),
        (("export", "b.safetensors", "a.pt2"), "b.safetensors: there is no such file"),
        (("export", "a.pth", "a.pt2"), "a.pth: not a whole safetensors file"),
    ],
)
def test_wrong_input_is_one_line(run, checkpoint, tmp_path, arguments, message):
    command, *files = arguments
    status, out, err = run(command, *(tmp_path / name for name in files))
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1 and "Traceback" not in err


def test_check_says_what_is_wrong(run, tmp_path):
    """Nothing: 0, something that would break training: 1; the report is also a file where one is asked for."""
    fake_trees.folder(tmp_path / "data")
    status, out, err = run("check", "folder", tmp_path / "data", "--workers", "0")
    assert (status, err) == (0, "") and out.endswith("\nNothing is wrong.\n")
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
    assert run("prepare", "cityscapes", tmp_path) == (0, f"{tmp_path}: 5 files written, 0 were there already\n", "")
    assert run("prepare", "cityscapes", tmp_path) == (0, f"{tmp_path}: 0 files written, 5 were there already\n", "")
    assert run("check", "cityscapes", tmp_path, "--workers", "0")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "folders", "."), "name: expected one of cityscapes, "),
        (("check", "folder", "nowhere"), "root: there is no folder nowhere"),
        (("check", "cityscapes", ".", "--labels", "0", "1"), "labels: those of cityscapes are fixed"),
        (("check", "folder", ".", "--json", "nowhere/a.json"), "json: there is no folder nowhere"),
        (("check", "cityscapes", ".", "--worker", "0"), "--workers"),
        (("prepare", "ade20k", "."), "name: expected one of cityscapes, voc2012, pascal_context, got 'ade20k'"),
        (("prepare", "cityscapes", "nowhere"), "root: there is no folder nowhere"),
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


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and f"usage: apcnet {command}" in out


def test_the_library_needs_neither_tyro_nor_rich():
    imports = "import sys, apcnet, apcnet.interop.convert, apcnet.data.check"
    code = f"{imports}; assert not {{'tyro', 'rich'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
