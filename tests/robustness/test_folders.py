"""Tests folders of images whose links lead nowhere."""

import os

import pytest
from judge import within
from PIL import Image

import apcnet
from apcnet.bulk import predict_files
from apcnet.cli import main
from apcnet.presets import preset


def test_links_in_a_circle_fail_alone(tmp_path, monkeypatch):
    """Tests that an image that links to itself is reported, and a folder that does is skipped."""
    monkeypatch.setenv("APC_KERNELS_BACKEND", "reference")
    (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "sub").symlink_to(tmp_path / "sub")
    model = apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8)
    report = predict_files(model, tmp_path, tmp_path / "out")
    assert report.done == 0
    (failure,) = report.failures
    assert "a.jpg: expected an image file" in failure


def test_a_name_that_starts_with_a_dash(tmp_path, monkeypatch):
    """Tests that `--` ends the options, as in other programs."""
    monkeypatch.setenv("APC_KERNELS_BACKEND", "reference")
    monkeypatch.chdir(tmp_path)
    apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8).save("model.safetensors")
    Image.new("RGB", (40, 30)).save("-x.png")
    main(["predict", "model.safetensors", "--out", "out", "--", "-x.png"])
    assert (tmp_path / "out" / "-x.png").exists()


def test_a_lock_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "lock")
    with within(30), pytest.raises(ValueError, match=r"out: expected a file or none, got another thing in .*lock"):
        apcnet.train(preset("tiny"), tmp_path)
