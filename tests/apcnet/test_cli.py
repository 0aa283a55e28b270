"""What a user of the command line reads, and the exit statuses."""

import subprocess
import sys

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
    code = "import sys, apcnet, apcnet.interop.convert; assert not {'tyro', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
