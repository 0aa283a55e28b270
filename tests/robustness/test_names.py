"""Tests names of folders and images that are not valid Unicode: they are shown with an escape, and files keep them.

Linux allows any bytes in a file name; Python gives those that are not UTF-8 as surrogates, which no codec encodes.
"""

import io
import json
import sys
import warnings

import pytest
import torch
from PIL import Image
from small_runs import flags, small, write_images

import apcnet
from apcnet import cli, draw
from apcnet.data import classes, prepare
from apcnet.data.layout import names_in
from apcnet.export import export
from apcnet.files import read_json, write_json
from apcnet.interop import mmseg
from apcnet.interop.convert import convert

NAME = "caf\udce9"
SHOWN = "caf\\udce9"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Returns a folder of images under such a name, with such names of images."""
    folder = write_images(tmp_path_factory.mktemp("data") / NAME)
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_name(f"{NAME}{path.name}"))
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Returns the folder of a small run on these images."""
    out = tmp_path_factory.mktemp("runs") / NAME
    assert SHOWN in command(*flags(small(root, steps=2, eval_every=1, save_every=1)), "--out", out)
    return out


def command(*arguments, encoding="utf-8", status=0) -> str:
    """Runs a command, and returns what it writes to an output that is as strict as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    before, sys.stdout = sys.stdout, out
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main(list(map(str, arguments)))
        ended = 0
    except SystemExit as exit:
        ended = exit.code or 0
    finally:
        sys.stdout = before
    assert ended == status
    out.flush()
    return out.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_check_shows_and_writes_them(root, tmp_path, encoding):
    report = tmp_path / f"{NAME}.json"
    shown = command("check", "folder", root, "--json", report, "--workers", 0, encoding=encoding)
    assert SHOWN in shown
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["root"] == str(root)


def test_a_report_of_a_damaged_image_names_it(root, tmp_path):
    with Image.open(next((root / "images" / "train").iterdir())) as image:
        image.save(tmp_path / "whole.png")
    broken = tmp_path / "data" / NAME
    broken.mkdir(parents=True)
    (broken / "classes.txt").write_bytes((root / "classes.txt").read_bytes())
    for kind in ("images", "masks"):
        (broken / kind / "train").mkdir(parents=True)
        (broken / kind / "train" / f"{NAME}.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    assert f"{SHOWN}.png" in command("check", "folder", broken, "--splits", "train", "--workers", 0, status=1)


def test_a_run_evaluates_and_predicts(root, run, tmp_path):
    """Tests that the files of a run, of an evaluation and of a prediction can be used under such names."""
    assert read_json(run / "config.json")["data"]["root"] == str(root)
    assert "mean" in command("evaluate", run / "final.safetensors", "--out", tmp_path / NAME)
    assert read_json(tmp_path / NAME / "metrics.json")
    images = root / "images" / "val"
    assert command("predict", run / "final.safetensors", images, "--out", tmp_path / "labels")
    found = {path.name for path in (tmp_path / "labels").iterdir()} - {"manifest.jsonl"}
    assert len(found) == 2 * len(list(images.iterdir())) and all(name.startswith(NAME) for name in found)


def test_losses_that_are_not_finite_name_the_samples(root, tmp_path, capsys):
    config = small(root, steps=9)
    command(*flags(config)[:-2], "--lr", 1e30, "--out", tmp_path / NAME, status=2)
    assert f"{SHOWN}/failed.json" in capsys.readouterr().err
    assert read_json(tmp_path / NAME / "failed.json")["samples"][0]["name"].startswith(NAME)


def test_models_are_converted_and_saved_under_them(tmp_path):
    torch.manual_seed(0)
    model = apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8).eval()
    with (tmp_path / f"{NAME}.pth").open("wb") as file:
        torch.save(mmseg.state_dict(model), file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(tmp_path / f"{NAME}.pth", tmp_path / f"{NAME}.safetensors", align_corners=False)
    loaded = apcnet.load(tmp_path / f"{NAME}.safetensors")
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_models_are_exported_under_them(tmp_path, ending):
    if ending == "onnx":
        pytest.importorskip("onnxscript")
    model = apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8).eval()
    model.classes = (NAME, "b", "c")
    export(model, tmp_path / f"{NAME}.{ending}", size=(64, 64))
    assert (tmp_path / f"{NAME}.{ending}").stat().st_size


def test_pictures_show_the_number_of_a_class(tmp_path):
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    photo = draw.colourise(labels, draw.palette(2))
    pictures = [draw.with_legend(photo, labels, (name, "b"), draw.palette(2)) for name in (NAME, "\ue000", "cafe")]
    unknown, without_letters, known = (picture.tobytes() for picture in pictures)
    assert unknown == without_letters != known
    draw.save(pictures[0], tmp_path / f"{NAME}.png")
    draw.save(draw.confusion(torch.eye(2).long(), (NAME, "b")), tmp_path / f"{NAME}.png")


def test_lists_and_json_keep_them(tmp_path):
    prepare._write(tmp_path / "list.txt", lambda: [NAME, "b"])
    assert (tmp_path / "list.txt").read_bytes() == b"caf\xe9\nb\n"
    assert names_in(tmp_path / "list.txt") == [NAME, "b"]
    with pytest.raises(ValueError, match=r"list\.txt: expected text in UTF-8, got other bytes in line 1"):
        classes.read_classes(tmp_path / "list.txt")
    write_json(tmp_path / "a.json", {NAME: "é"})
    assert read_json(tmp_path / "a.json") == {NAME: "é"}
