"""Tests that every level and channel of an image reaches the network: 16 bits, floats, and any number of bands."""

import json
import struct
import zlib

import annotation_trees as trees
import fake_trees
import numpy as np
import pytest
import torch
from PIL import Image

import apcnet
from apcnet.data import augment
from apcnet.data import open as open_data
from apcnet.data.doctor.check import check
from apcnet.data.files import image_size, read_as
from apcnet.data.levels import form_of, upright, visible
from apcnet.data.png16 import SIGNATURE
from apcnet.data.sample import Sample
from apcnet.data.statistics import Moments, Statistics
from apcnet.data.stream import generator_at
from apcnet.export import export

RNG = np.random.default_rng(3)
TINY = ("--backbone", "tiny", "--width", 8, "--channels", 8, "--auxiliary-channels", 0, "--batch-size", 2)
TINY += ("--crop", 48, 48, "--scale", 84, 60, "--test-scale", "None", "--steps", 2, "--workers", 0)


def png(levels: np.ndarray, filters=(0, 1, 2, 3, 4)) -> bytes:
    """Encodes levels (H, W, C) of 16 bits, each row by the next of the filters."""
    height, width, channels = levels.shape
    stored = np.frombuffer(levels.astype(">u2").tobytes(), np.uint8).reshape(height, width, -1).astype(int)
    rows = b""
    for i, row in enumerate(stored):
        left = np.vstack([0 * row[:1], row[:-1]])
        above = stored[i - 1] if i else 0 * row
        between = np.vstack([0 * row[:1], above[:-1]])
        near = [abs(left + above - between - each) for each in (left, above, between)]
        nearest = np.where(
            (near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], above, between)
        )
        kind = filters[i % len(filters)]
        guess = (0 * row, left, above, (left + above) // 2, nearest)[kind]
        rows += bytes([kind]) + ((row - guess) % 256).astype(np.uint8).tobytes()

    def block(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    data = zlib.compress(rows)
    pixels = block(b"IDAT", data[:40]) + block(b"IDAT", data[40:])
    return SIGNATURE + block(b"IHDR", head) + pixels + block(b"IEND", b"")


def pages(path, levels: np.ndarray) -> None:
    """Writes every band (H, W, C) as a page of its own, as tifffile does with (C, H, W)."""
    first, *others = [Image.fromarray(levels[..., i]) for i in range(levels.shape[2])]
    first.save(path, save_all=True, append_images=others)


def levels_of(path) -> np.ndarray:
    return read_as(path, form_of(path)).numpy()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_of_16_bits_keeps_all_of_them(tmp_path, channels):
    stored = RNG.integers(0, 1 << 16, (23, 31, channels)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png(stored))
    opaque = {1: 1, 2: 1, 3: 3, 4: 3}[channels]
    assert form_of(tmp_path / "a.png") == (opaque, "uint16", 23, 31) and image_size(tmp_path / "a.png") == (23, 31)
    assert np.array_equal(levels_of(tmp_path / "a.png"), stored[..., :opaque].transpose(2, 0, 1))


@pytest.mark.parametrize("write", [trees.bands, pages], ids=["bands", "pages"])
@pytest.mark.parametrize("channels", [2, 4, 8])
def test_a_tiff_keeps_all_bands(tmp_path, write, channels):
    stored = RNG.integers(0, 4096, (20, 30, channels)).astype(np.uint16)
    write(tmp_path / "a.tif", stored)
    assert form_of(tmp_path / "a.tif") == (channels, "uint16", 20, 30)
    assert np.array_equal(levels_of(tmp_path / "a.tif"), stored.transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_a_grey_tiff_keeps_its_levels(tmp_path, dtype):
    stored = (RNG.random((5, 7)) * 50_000).astype(dtype)
    Image.fromarray(stored).save(tmp_path / "a.tif")
    assert np.array_equal(levels_of(tmp_path / "a.tif")[0], stored.astype(np.float32))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_usual_images_stay_8_bit_rgb(tmp_path, mode, suffix):
    if (mode, suffix) == ("CMYK", "png"):
        pytest.skip("PNG has no CMYK")
    Image.new(mode, (6, 4)).save(tmp_path / f"a.{suffix}")
    assert form_of(tmp_path / f"a.{suffix}") is None
    assert read_as(tmp_path / f"a.{suffix}", None).dtype == torch.uint8


def test_a_compressed_tiff_of_many_bands_asks_for_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    trees.bands(tmp_path / "a.tif", np.zeros((4, 5, 6), np.uint16))
    data = (tmp_path / "a.tif").read_bytes()
    compression = struct.pack("<HHII", 259, 3, 1, 1)
    assert compression in data
    (tmp_path / "a.tif").write_bytes(data.replace(compression, struct.pack("<HHII", 259, 3, 1, 5)))
    with pytest.raises(ModuleNotFoundError, match=r"a\.tif: .*pip install tifffile"):
        levels_of(tmp_path / "a.tif")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_levels_that_are_no_numbers_are_refused(tmp_path, value):
    stored = np.zeros((4, 5), np.float32)
    stored[1, 2] = value
    Image.fromarray(stored).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: expected finite levels, found NaN or infinity at 1 places"):
        levels_of(tmp_path / "a.tif")


def test_orientations_are_those_of_pillow():
    from PIL import ImageOps

    stored = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for orientation in range(1, 9):
        image, exif = Image.fromarray(stored), Image.Exif()
        exif[0x0112] = orientation
        image.info["exif"] = exif.tobytes()
        image.getexif()[0x0112] = orientation
        assert np.array_equal(upright(stored[None], orientation)[0], np.asarray(ImageOps.exif_transpose(image)))


def test_statistics_are_those_of_all_levels():
    images = [torch.from_numpy(RNG.random((3, 4, 5 + i)).astype(np.float32)) * 900 for i in range(4)]
    measured = Statistics.over("uint16", map(Moments.of, images))
    together = torch.cat([image.flatten(1) for image in images], 1).double()
    assert measured.mean == pytest.approx(together.mean(1).tolist())
    assert measured.std == pytest.approx(together.std(1, correction=0).tolist())
    assert measured.range == tuple(zip(together.amin(1).tolist(), together.amax(1).tolist(), strict=True))
    assert Statistics.from_json(json.loads(json.dumps(measured.json()))) == measured


def test_levels_are_augmented_with_the_draws_of_8_bit_images():
    """Tests the same windows, flips and labels, and pixels that differ by rounding and by the distortion left out."""
    image = torch.from_numpy(RNG.integers(0, 256, (3, 40, 52)).astype(np.uint8))
    mask = torch.from_numpy(fake_trees.draw("m", (0, 1, 2), (40, 52))[1])
    options = {"crop_size": (32, 32), "scale": (52, 40), "mean": (0, 0, 0), "std": (1, 1, 1)}
    for position in range(8):
        plain, labels = augment.train(Sample(image, mask, "a"), generator_at(0, position), **options)
        levels, same = augment.train(Sample(image.float(), mask, "a"), generator_at(0, position), **options)
        assert torch.equal(labels, same) and levels.shape == plain.shape and levels.dtype == torch.float32
    size, window = (31, 70), (3, 5, 20, 40)
    expected = torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear")[0][:, 3:23, 5:45]
    resized = augment.resized_levels(image.float(), size, window)
    assert (resized - expected).abs().max() < 1e-3
    assert torch.equal(augment.resized_levels(image.float(), size, window, flip=True), resized.flip(2))
    assert torch.equal(augment.resized_levels(image.float(), (40, 52), (0, 0, 40, 52)), image.float())


def test_pictures_show_the_range():
    levels = torch.tensor([[[0.0, 50.0, 100.0]]]).expand(8, 1, 3) * torch.arange(1, 9)[:, None, None]
    shown = visible(levels, [(0.0, 100.0 * i) for i in range(1, 9)])
    assert shown.dtype == torch.uint8 and shown[:, 0].tolist() == [[0, 128, 255]] * 3
    assert visible(levels[:1])[:, 0].tolist() == [[0, 128, 255]] * 3


def write_folder(root, channels: int) -> dict[str, np.ndarray]:
    """Writes a folder of 12-bit images in 16: grey PNG files, or TIFF files of several bands."""
    stored = {}
    for number, (name, (_, mask)) in enumerate(trees.draw_samples().items()):
        split = "val" if number % 3 == 2 else "train"
        noise = RNG.integers(0, 1000, (*mask.shape, channels))
        levels = (noise + mask[..., None].astype(int) * 900 + np.arange(channels) * 10).astype(np.uint16)
        if channels == 1:
            trees.sixteen_bits(root / "images" / split / f"{name}.png", levels[..., 0])
        else:
            trees.bands(root / "images" / split / f"{name}.tif", levels)
        fake_trees.save(mask, root / "masks" / split / f"{name}.png")
        stored[name] = levels.transpose(2, 0, 1)
    fake_trees.save_lines(trees.CLASSES, root / "classes.txt")
    return stored


@pytest.mark.parametrize("channels", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_images_of_12_bits_are_trained_evaluated_predicted_and_exported(run, tmp_path, channels):
    root = tmp_path / "data"
    stored = write_folder(root, channels)
    for split in ("train", "val"):
        for image, _, name in open_data("folder", root, split):
            assert np.array_equal(image.numpy(), stored[name]) and len(np.unique(image)) > 900
    report = check("folder", root, workers=0)
    training = np.concatenate([stored[n].reshape(channels, -1) for n in open_data("folder", root, "train").names], 1)
    assert report.ok and report.images.mean == pytest.approx(training.mean(1))
    assert f"images: {channels} channel" in report.text() and report.json()["images"]["kind"] == "uint16"

    out = tmp_path / "run"
    status, _, err = run("train", "folder", "--root", root, *TINY, "--out", out)
    assert status == 0 and "of uint16" in err and "augmented without changes of brightness" in err, err
    model = apcnet.load(out / "final.safetensors")
    assert model.in_channels == channels and model.backbone.stem[0].in_channels == channels
    assert model.mean == pytest.approx(training.mean(1)) and model.std == pytest.approx(training.std(1))
    assert model.range == tuple(zip(training.min(1).tolist(), training.max(1).tolist(), strict=True))
    assert json.loads((out / "images.json").read_text())["mean"] == pytest.approx(training.mean(1))
    status, more, err = run("train", "folder", "--root", root, *TINY, "--steps", 3, "--out", out)
    assert status == 0 and "resuming at step 2" in more, err

    assert run("evaluate", out, "--workers", 0)[0] == 0
    status, text, err = run("predict", out, root / "images" / "val", "--out", tmp_path / "seen")
    assert status == 0 and text.endswith("2 images\n"), err
    name, model = open_data("folder", root, "val").names[0], apcnet.load(out / "final.safetensors")
    seen = apcnet.predict(model, stored[name].transpose(1, 2, 0))
    assert torch.equal(seen.labels, apcnet.predict(model, torch.from_numpy(stored[name].astype(np.int32))).labels)
    assert np.array_equal(seen.labels.numpy(), np.array(Image.open(tmp_path / "seen" / f"{name}.png")))
    tiled = apcnet.predict(model, stored[name].transpose(1, 2, 0), max_pixels=2000)
    assert tiled.labels.shape == seen.labels.shape

    differences = export(model, tmp_path / "a.pt2", size=(64, 64), output="labels", normalise=True)
    assert max(differences.values()) < 1e-4
    program = torch.export.load(tmp_path / "a.pt2").module()
    image = torch.from_numpy(stored[name].astype(np.float32))[None]
    assert (program(image)[0] == seen.labels).float().mean() > 0.99


def test_every_level_reaches_the_network(tmp_path, monkeypatch):
    """Tests that two images that differ by one level of 4096, or in the last band alone, are different inputs."""
    given = []
    write_folder(tmp_path / "data", 8)
    data = open_data("folder", tmp_path / "data", "val")
    model = apcnet.create("fcn", "tiny", 4, in_channels=8, width=8, channels=8).eval()
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()))
    levels = data[0].image.clone()
    for changed in (levels, levels + 1, torch.cat([levels[:7], levels[7:] + 1])):
        apcnet.predict(model, changed)
    steps = [(other - given[0]).amax((0, 2, 3)) > 0 for other in given[1:]]
    assert steps[0].all() and steps[1].tolist() == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--in-channels", 4), "in_channels: expected 8, as the images have, got 4; leave it out"),
        (("--init", "rgb.safetensors"), "init: expected a model of images with 8 channels, got rgb.safetensors with 3"),
    ],
)
def test_channels_that_do_not_fit_are_one_line(run, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", 8)
    apcnet.create("apcnet", "tiny", 4, width=8, channels=8, auxiliary_channels=0).save("rgb.safetensors")
    status, _, err = run("train", "folder", "--root", "data", *TINY, *change)
    assert status == 2 and message in err and err.count("\n") == 1


def test_images_of_two_kinds_are_refused(run, tmp_path):
    write_folder(tmp_path / "data", 1)
    image = next((tmp_path / "data" / "images" / "val").iterdir())
    fake_trees.save(np.array(Image.open(image)).astype(np.uint8), image)
    status, out, _ = run("check", "folder", tmp_path / "data", "--workers", 0)
    assert status == 1 and "other levels or channels than the first image" in out
    status, _, err = run("train", "folder", "--root", tmp_path / "data", *TINY, "--out", tmp_path / "run")
    assert status == 2 and "other levels or channels than the first image" in err and err.count("\n") == 1


def test_a_model_of_rgb_says_that_it_drops_bits(tmp_path):
    model = apcnet.create("fcn", "tiny", 4, width=8, channels=8)
    trees.sixteen_bits(tmp_path / "a.png", np.full((40, 40), 4000))
    with pytest.warns(UserWarning, match=r"a\.png: of 16 bits the upper 8 are used"):
        apcnet.predict(model, tmp_path / "a.png")
    trees.bands(tmp_path / "b.tif", np.zeros((40, 40, 8), np.uint16))
    with pytest.raises(ValueError, match=r"b\.tif: expected 8-bit RGB, as the model was trained with, got 8 channels"):
        apcnet.predict(model, tmp_path / "b.tif")


def test_a_model_is_evaluated_on_images_of_its_own_kind_alone(tmp_path):
    write_folder(tmp_path / "data", 1)
    data = open_data("folder", tmp_path / "data", "val")
    with pytest.raises(ValueError, match="expected 8-bit RGB, as the model was trained with, got 1 channels of more"):
        apcnet.evaluate(apcnet.create("fcn", "tiny", 4, width=8, channels=8), data)
