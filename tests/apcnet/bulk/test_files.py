"""Tests the prediction of folders: the images that are read, the names of the results, and broken images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import IMAGE, Network, draw_image, picture

import apcnet
from apcnet import draw
from apcnet.bulk import predict_files
from apcnet.data.files import read_mask
from apcnet.inference import Protocol
from apcnet.inference.prediction import predict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def photos(tmp_path):
    """Makes a folder of images and other files."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a.PNG", "street/x.y.bmp", "street/deep/c.tif", ".hidden.png", ".cache/d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = draw_image(20, 24 + len(name))
        picture(image).save(folder / name, {".PNG": "PNG"}.get(os.path.splitext(name)[1]))
    (folder / "notes.txt").write_text("no image")
    return folder


def files_in(folder):
    """Lists the files in a folder but for the manifest."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != "manifest.jsonl")


def test_folder(tmp_path, network, photos):
    calls = []
    report = predict_files(network, photos, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert report[:3] == (4, [], 0) and calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    names = ("a", "b", "street/deep/c", "street/x.y")
    assert files_in(tmp_path / "out") == sorted(f"{name}{end}" for name in names for end in (".png", "_overlay.jpg"))
    seen = predict(network, photos / "street/x.y.bmp")
    assert torch.equal(read_mask(tmp_path / "out/street/x.y.png"), seen.labels)
    with Image.open(tmp_path / "out/street/x.y_overlay.jpg") as overlay:
        expected = seen.overlay()
        assert overlay.format == "JPEG" and overlay.size == expected.size
        difference = np.asarray(overlay).astype(int) - np.asarray(expected)
        assert np.abs(difference).mean() < 6  # colours are kept at half the resolution


def test_options_reach_the_prediction(tmp_path, network, photos):
    protocol = Protocol(test_scale=(16, 16))
    predict_files(network, photos / "b.png", tmp_path, protocol, overlay="png", opacity=1.0)
    assert files_in(tmp_path) == sorted([*(f"photos/{name}" for name in files_in(photos)), "b.png", "b_overlay.png"])
    seen = predict(network, photos / "b.png", protocol)
    assert torch.equal(read_mask(tmp_path / "b.png"), seen.labels)
    with Image.open(tmp_path / "b_overlay.png") as overlay:
        assert overlay.tobytes() == seen.overlay(1.0).tobytes()


def test_confidence_is_written_beside_the_labels(tmp_path, network, photos):
    predict_files(network, photos, tmp_path / "seen", confidence=True)
    with Image.open(tmp_path / "seen" / "street" / "x.y_confidence.png") as found:
        levels = torch.from_numpy(np.array(found))
    expected = predict(network, photos / "street" / "x.y.bmp", confidence=True).confidence
    assert levels.dtype == torch.uint8 and torch.equal(levels, (expected * 255).round().byte())
    assert levels.min() < levels.max()
    with pytest.raises(ValueError, match="confidence: expected a prediction of predict"):
        predict(network, photos / "b.png").save_confidence(tmp_path / "a.png")


def test_labels_alone(tmp_path, network, photos):
    predict_files(network, [photos / "a.PNG", photos / "street"], tmp_path / "out", overlay=None)
    assert files_in(tmp_path / "out") == ["a.png", "deep/c.png", "x.y.png"]


def test_model_file_for_folders(tmp_path, photos):
    apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8).save(tmp_path / "m.safetensors")
    assert predict_files(tmp_path / "m.safetensors", photos, tmp_path / "out").done == 4


def test_broken_images_stop_none_of_the_others(tmp_path, network, photos):
    whole = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(whole[: len(whole) // 2])
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    picture(draw_image(1, 90)).save(photos / "thin.png")
    calls = []
    protocol, out = Protocol(test_scale=(16, 16)), tmp_path / "out"
    report = predict_files(network, photos, out, protocol, progress=lambda *call: calls.append(call), overlay=None)
    assert report.done == 3 and calls[-1] == (6, 6)
    assert files_in(tmp_path / "out") == ["a.png", "street/deep/c.png", "street/x.y.png"]
    broken, gone, thin = report.failures
    assert "photos/b.png: cannot be decoded" in broken
    assert "No such file" in gone and "gone.jpg" in gone
    assert "photos/thin.png: scale: nothing is left" in thin


def test_full_disk_stops_all(tmp_path, network, photos, monkeypatch):
    """Tests that a full disk ends the prediction, since no image is at fault."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(draw, "encoded", full)
    with pytest.raises(OSError, match="No space left"):
        predict_files(network, photos, tmp_path / "out")


def test_images_that_differ_in_their_suffix_keep_it(tmp_path, network, photos):
    picture(IMAGE).save(photos / "b.jpg")
    picture(IMAGE).save(photos / "street/b.jpg")
    predict_files(network, photos, tmp_path / "out")
    assert files_in(tmp_path / "out")[2:6] == ["b.jpg.png", "b.jpg_overlay.jpg", "b.png.png", "b.png_overlay.jpg"]
    assert (tmp_path / "out/street/b.png").exists()


def test_two_images_are_never_written_to_one_file(tmp_path, network, photos):
    picture(IMAGE).save(tmp_path / "b.png")
    predict_files(network, [photos, photos / "b.png"], tmp_path / "one")  # given twice, it is still one
    picture(IMAGE).save(photos / "b_overlay.png")
    predict_files(network, photos, tmp_path / "other")
    with pytest.raises(ValueError, match=r"b\.png and .*b_overlay\.png: both would be written to .*out/b_overlay\.png"):
        predict_files(network, photos, tmp_path / "out", overlay="png")
    with pytest.raises(ValueError, match=r"photos/x\.png and .*other/x\.png: both would be written to"):
        for folder in (photos, tmp_path / "other"):
            picture(IMAGE).save(folder / "x.bmp")
            (folder / "x.bmp").rename(folder / "x.png")
        predict_files(network, [photos / "x.png", tmp_path / "other/x.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_are_never_overwritten(tmp_path, network, photos):
    before = {name: (photos / name).read_bytes() for name in files_in(photos)}
    with pytest.raises(ValueError, match=r"out: .*photos/b\.png is one of the images that are read; choose another"):
        predict_files(network, photos, photos)
    with pytest.raises(ValueError, match="is one of the images"):
        predict_files(network, photos / "b.png", photos / "street" / "..", overlay=None)
    assert {name: (photos / name).read_bytes() for name in files_in(photos)} == before


def test_what_an_earlier_run_wrote_is_not_read(tmp_path, network, photos):
    first = predict_files(network, photos, photos / "out")
    written = files_in(photos / "out")
    assert predict_files(network, photos, photos / "out", overwrite=True) == first
    assert files_in(photos / "out") == written


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (["photos", "nowhere"], FileNotFoundError, "nowhere: there is no such file or folder"),
        (
            ["photos", "empty"],
            FileNotFoundError,
            r"empty: expected images in this folder, found none \(\.bmp, .*\.webp\)",
        ),
        ([], FileNotFoundError, "sources: expected files or folders, got none"),
    ],
)
def test_nothing_to_predict(tmp_path, network, photos, sources, error, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        predict_files(network, [tmp_path / source for source in sources], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlay": "gif"}, "overlay: expected one of jpg, png"),
        ({"opacity": 2}, "opacity: expected 0 to 1, got 2"),
        ({"precision": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_read(tmp_path, network, photos, options, message):
    with pytest.raises(ValueError, match=message):
        predict_files(network, photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
