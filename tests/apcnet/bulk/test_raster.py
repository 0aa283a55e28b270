"""Tests that rasters of any size get the labels that `apcnet.predict` gives, at the same place on earth."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import limited
from PIL import Image
from stand_in import CLASSES, Network, draw_image, picture

import apcnet
from apcnet.bulk import windows as cut
from apcnet.bulk.raster import predict_raster
from apcnet.inference import Protocol

rasterio = pytest.importorskip("rasterio")
geotiff = pytest.importorskip("apcnet.bulk.geotiff")
ColorInterp = geotiff.ColorInterp

PLACE = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.2, 0, 390000, 0, -0.2, 5820000)}
WINDOWS = Protocol(window=(32, 40), stride=(20, 25))


@pytest.fixture(autouse=True)
def small(threads, monkeypatch):
    threads(1)
    monkeypatch.setattr(geotiff, "BLOCK", 16)
    monkeypatch.setattr(cut, "BLOCK", 16)
    monkeypatch.setattr(cut, "STRIP_WINDOWS", 1)


@pytest.fixture
def network():
    return Network()


def write(path, levels, **options):
    """Writes levels (C, H, W) as a tiled GeoTIFF, and returns its path."""
    form = {"count": len(levels), "height": levels.shape[1], "width": levels.shape[2], "dtype": str(levels.dtype)}
    blocks = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", **form, **{**blocks, **PLACE, **options}) as file:
        file.write(np.asarray(levels))
    return path


def read(path):
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.mark.parametrize("most", [10**9, 5 * 32 * 90, 1], ids=["one strip", "strips of windows", "strips of blocks"])
@pytest.mark.parametrize("size", [(97, 141), (30, 200), (200, 3), (32, 40), (33, 41), (1, 1)], ids=str)
def test_labels_equal_those_of_predict(network, tmp_path, monkeypatch, size, most):
    """Tests odd sizes, and those below a window, with strips of several widths."""
    monkeypatch.setattr(cut, "STRIP_SCORES", most)
    image = draw_image(*size)
    source = write(tmp_path / "in.tif", image.numpy())
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS, confidence=True)
    expected = apcnet.predict(network, image, WINDOWS, confidence=True)
    assert np.array_equal(read(tmp_path / "out.tif"), expected.labels.numpy())
    sure = read(tmp_path / "out_confidence.tif") / 254
    assert np.abs(sure - expected.confidence.numpy()).max() <= 0.5 / 254 + 1e-5


@pytest.mark.parametrize(
    "protocol", [Protocol(), Protocol(flip=True), Protocol(ratios=(0.5, 1.0, 1.5), flip=True), Protocol(ratios=(1.5,))]
)
@pytest.mark.parametrize("most", [10**9, 5 * 32 * 90])
def test_tiles_equal_those_of_predict(network, tmp_path, monkeypatch, protocol, most):
    """Tests rasters above the limit of pixels without a window: tiles that overlap by a third, at all scales."""
    monkeypatch.setattr(cut.Windows, "strips", strips_within(most))
    image = draw_image(70, 110)
    source = write(tmp_path / "in.tif", image.numpy())
    predict_raster(network, source, tmp_path / "out.tif", protocol, max_pixels=1100, confidence=True)
    expected = apcnet.predict(network, image, protocol, max_pixels=1100, confidence=True)
    assert np.array_equal(read(tmp_path / "out.tif"), expected.labels.numpy())
    sure = read(tmp_path / "out_confidence.tif") / 254
    assert np.abs(sure - expected.confidence.numpy()).max() <= 0.5 / 254 + 1e-5


def strips_within(most):
    """Returns a function that cuts strips under another limit than the windows were chosen by."""
    all_strips = cut.Windows.strips

    def strips(windows):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cut, "STRIP_SCORES", most)
            return all_strips(windows)

    return strips


def test_a_raster_below_the_limit_is_one_window(network, tmp_path):
    image = draw_image(45, 70)
    predict_raster(network, write(tmp_path / "in.tif", image.numpy()), tmp_path / "out.tif")
    assert network.seen == [(1, 3, 45, 70)]
    assert np.array_equal(read(tmp_path / "out.tif"), apcnet.predict(network, image).labels.numpy())


def test_every_window_is_seen_once_in_a_strip(network, tmp_path, monkeypatch):
    """Tests that strips add only the windows at their borders, and that progress counts all of them."""
    monkeypatch.setattr(cut, "STRIP_SCORES", 5 * 32 * 400)
    source, seen = write(tmp_path / "in.tif", draw_image(64, 800).numpy()), []
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS, progress=lambda *given: seen.append(given))
    windows, rows = math.ceil((800 - 40) / 25) + 1, 3
    assert windows * rows < len(network.seen) <= (windows + 2 * 2) * rows
    assert seen == [(i + 1, len(network.seen)) for i in range(len(network.seen))]


def test_place_names_and_colours(network, tmp_path):
    """Tests all that a geographic information system reads: place, palette, names, no-data value, blocks."""
    source = write(tmp_path / "in.tif", draw_image(50, 70).numpy())
    with rasterio.open(source, "r+") as file:
        file.update_tags(AREA_OR_POINT="Point")
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS, confidence=True)
    for name, label in (("out.tif", "class"), ("out_confidence.tif", "confidence")):
        with rasterio.open(source) as before, rasterio.open(tmp_path / name) as after:
            assert (after.crs, after.transform, after.shape) == (before.crs, before.transform, before.shape)
            assert after.tags()["AREA_OR_POINT"] == "Point" and after.descriptions == (label,)
            assert after.profile["tiled"] and after.profile["compress"] == "deflate" and after.nodata == 255
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.dtypes == ("uint8",) and file.colorinterp == (ColorInterp.palette,)
        assert [file.colormap(1)[i][:3] for i in range(5)] == list(Network.palette)
        assert [file.tags(1)[f"CLASS_{i}"] for i in range(5)] == list(CLASSES)
    with rasterio.open(tmp_path / "out_confidence.tif") as file:
        assert file.scales == (pytest.approx(1 / 254),)


def test_ground_control_points_are_kept(network, tmp_path):
    from rasterio.control import GroundControlPoint

    points = [GroundControlPoint(row, column, 10.0 + column, 50.0 - row) for row, column in ((0, 0), (0, 60), (40, 9))]
    source = write(tmp_path / "in.tif", draw_image(50, 70).numpy(), crs=None, transform=None)
    with rasterio.open(source, "r+") as file:
        file.gcps = points, rasterio.CRS.from_epsg(4326)
    predict_raster(network, source, tmp_path / "out.tif")
    with rasterio.open(tmp_path / "out.tif") as file:
        found, system = file.gcps
        assert system.to_epsg() == 4326
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]


@pytest.mark.filterwarnings("error")
def test_images_without_a_place(network, tmp_path):
    """Tests a TIFF of strips, without tiles, compression and georeference, and a PNG."""
    image = draw_image(40, 60)
    picture(image).save(tmp_path / "in.tif")
    picture(image).save(tmp_path / "in.png")
    for source in ("in.tif", "in.png"):
        predict_raster(network, tmp_path / source, tmp_path / "out.tif", WINDOWS)
        expected = apcnet.predict(network, image, WINDOWS).labels
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out.tif")), expected.numpy())


def test_grey_bands_and_palettes_become_rgb(network, tmp_path):
    image = draw_image(40, 60)
    predict_raster(network, write(tmp_path / "grey.tif", image[:1].numpy()), tmp_path / "out.tif", WINDOWS)
    assert np.array_equal(read(tmp_path / "out.tif"), apcnet.predict(network, image[0], WINDOWS).labels.numpy())
    indexed = picture(image).quantize(20)
    source = write(tmp_path / "indexed.tif", np.asarray(indexed)[None])
    colors = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
    with rasterio.open(source, "r+") as file:
        file.write_colormap(1, dict(enumerate(map(tuple, colors.tolist()))))
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS)
    expected = apcnet.predict(network, colors[np.asarray(indexed)], WINDOWS).labels
    assert len(expected.unique()) > 1 and np.array_equal(read(tmp_path / "out.tif"), expected.numpy())


def hole(shape):
    """Returns a mask with a corner and a scattering of pixels without data, as large as some windows."""
    valid = np.ones(shape, bool)
    valid[:45, :70] = False
    valid[::7, ::5] = False
    return valid


@pytest.mark.parametrize("most", [10**9, 1])
@pytest.mark.parametrize("kind", ["alpha", "nodata", "mask"])
def test_pixels_without_data(network, tmp_path, monkeypatch, kind, most):
    """Tests that they have no label, and look to the network like the mean; windows of them alone are left out."""
    monkeypatch.setattr(cut, "STRIP_SCORES", most)
    image = draw_image(90, 130).numpy().clip(1)
    valid = hole(image.shape[1:])
    empty = np.where(valid, image, 0)
    if kind == "alpha":
        levels = np.concatenate([empty, valid[None] * np.uint8(200)])
        source = write(tmp_path / "in.tif", levels, photometric="rgb", alpha="yes")
        with rasterio.open(source) as file:
            assert file.colorinterp[3] == ColorInterp.alpha
    else:
        source = write(tmp_path / "in.tif", empty, nodata=0 if kind == "nodata" else None)
    if kind == "mask":
        with rasterio.open(source, "r+") as file:
            file.write_mask(valid)
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS, confidence=True)
    filled = torch.from_numpy(np.where(valid, image, np.array(Network.mean, np.uint8)[:, None, None]))
    calls = len(network.seen)
    expected = apcnet.predict(network, filled, WINDOWS).labels.numpy()
    labels = read(tmp_path / "out.tif")
    assert (labels[~valid] == 255).all() and np.array_equal(labels[valid], expected[valid])
    assert np.array_equal(read(tmp_path / "out_confidence.tif") == 255, ~valid)
    if most > 1:
        assert calls < len(network.seen) - calls  # some windows were empty


@pytest.fixture
def spectral():
    """Makes a model of four channels, as 16-bit images train it."""
    torch.manual_seed(0)
    model = apcnet.create("fcn", backbone="tiny", num_classes=4, in_channels=4).eval()
    model.mean, model.std, model.range = (3000.0,) * 4, (1500.0,) * 4, ((0.0, 10000.0),) * 4
    return model


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float64"])
def test_bands_of_a_trained_model(spectral, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(apcnet.inference, "prepare", lambda model: model)
    levels = (draw_image(60, 80).numpy().astype(dtype) * 30)[[0, 1, 2, 0]]
    levels[3] //= 2
    predict_raster(spectral, write(tmp_path / "in.tif", levels), tmp_path / "out.tif", WINDOWS)
    expected = apcnet.predict(spectral, levels.transpose(1, 2, 0), WINDOWS).labels
    assert len(expected.unique()) > 1 and np.array_equal(read(tmp_path / "out.tif"), expected.numpy())
    order = [2, 1, 4, 3]
    predict_raster(spectral, tmp_path / "in.tif", tmp_path / "out.tif", WINDOWS, bands=order)
    turned = apcnet.predict(spectral, levels[[1, 0, 3, 2]].transpose(1, 2, 0), WINDOWS).labels
    assert np.array_equal(read(tmp_path / "out.tif"), turned.numpy()) and not torch.equal(turned, expected)


def test_levels_that_are_not_finite_have_no_data(spectral, tmp_path):
    """Tests NaN in one band, which keeps the pixel, in all of them, and numbers that float32 cannot hold."""
    levels = (draw_image(60, 80).numpy().astype(np.float64) * 30)[[0, 1, 2, 0]]
    levels[:, 20:30, 40:50] = np.nan
    levels[:, 5, 5], levels[1, 50, 50], levels[:, 55, 70] = np.inf, np.nan, 1e300
    predict_raster(spectral, write(tmp_path / "in.tif", levels), tmp_path / "out.tif", WINDOWS)
    labels = read(tmp_path / "out.tif")
    empty = np.zeros(labels.shape, bool)
    empty[20:30, 40:50], empty[5, 5], empty[55, 70] = True, True, True
    assert np.array_equal(labels == 255, empty) and len(np.unique(labels)) > 2


def test_no_data_of_a_band_beyond_the_levels(spectral, tmp_path):
    levels = (draw_image(60, 80).numpy().astype(np.int32) * 30)[[0, 1, 2, 0]]
    levels[:, 10:20] = -(2**31)
    source = write(tmp_path / "in.tif", levels, nodata=-(2**31))
    predict_raster(spectral, source, tmp_path / "out.tif", WINDOWS)
    assert (read(tmp_path / "out.tif")[10:20] == 255).all()
    levels[:, 10:20] = 2**30
    with pytest.raises(ValueError, match="expected levels up to 16777216"):
        predict_raster(spectral, write(tmp_path / "in.tif", levels), tmp_path / "out.tif", WINDOWS)


@pytest.mark.parametrize(
    ("classes", "dtype", "missing"), [(1, "uint8", 255), (255, "uint8", 255), (256, "uint16", 65535)]
)
def test_any_number_of_classes(tmp_path, classes, dtype, missing):
    network, image = Network(classes), draw_image(40, 60)
    network.classes = network.palette = None
    source = write(tmp_path / "in.tif", image.numpy())
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.dtypes == (dtype,) and file.nodata == missing
        assert np.array_equal(file.read(1), apcnet.predict(network, image, WINDOWS).labels.numpy())
        assert file.tags(1)["CLASS_1"] == "class 1"


@pytest.mark.parametrize(("blocks", "rows", "columns"), [({"tiled": False}, 48, 400), ({}, 48, 112)])
def test_blocks_of_a_row_of_windows_are_kept(network, tmp_path, monkeypatch, blocks, rows, columns):
    """Tests that GDAL may keep them: blocks of a few rows and all columns would be decoded again for every window."""
    from rasterio.env import get_gdal_config

    monkeypatch.setattr(cut, "STRIP_SCORES", 1)  # strips of one block; three windows, 90 columns, add to it
    before, seen = get_gdal_config("GDAL_CACHEMAX"), set()
    source = write(tmp_path / "in.tif", draw_image(64, 400).numpy(), **blocks)
    predict_raster(
        network, source, tmp_path / "out.tif", WINDOWS, progress=lambda *_: seen.add(get_gdal_config("GDAL_CACHEMAX"))
    )
    assert seen == {geotiff.CACHE + 3 * rows * columns} and get_gdal_config("GDAL_CACHEMAX") == before


def peak():
    """Returns the largest memory of this process since it was last reset, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def test_memory_does_not_grow_with_the_raster(tmp_path, monkeypatch):
    """Tests that the peak is the same for a raster that is eight times as wide or as high."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("needs a Linux that lets a process reset the peak of its memory")
    network, windows, peaks = Network(20), Protocol(window=(128, 128), stride=(96, 96)), []
    network.classes = network.palette = None
    monkeypatch.setattr(cut, "STRIP_SCORES", 20 * 128 * 512)
    for size in ((256, 512), (256, 4096), (4096, 256)):
        levels = np.tile(draw_image(256, 256).numpy(), (1, size[0] // 256, size[1] // 256))
        source = write(tmp_path / "in.tif", levels, blockxsize=256, blockysize=256)
        Path("/proc/self/clear_refs").write_text("5")
        predict_raster(network, source, tmp_path / "out.tif", windows)
        peaks.append(peak())
    assert max(peaks[1:]) - peaks[0] < 25, peaks  # the scores of 20 classes are 80 MiB, a band of all columns 40 MiB


@pytest.mark.slow
def test_raster_of_50000_times_50000_pixels(tmp_path, monkeypatch):
    """Tests 2.5 billion pixels, of which few have data: the rest costs the network nothing, and the file little."""
    network, side, image = Network(2), 50_000, draw_image(600, 900).clip(1)
    place = rasterio.windows.Window(30_000, 41_000, 900, 600)
    monkeypatch.setattr(geotiff, "BLOCK", 512)
    monkeypatch.setattr(cut, "BLOCK", 512)
    form = {"height": side, "width": side, "count": 3, "dtype": "uint8", "nodata": 0, "sparse_ok": True}
    blocks = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    with rasterio.open(tmp_path / "in.tif", "w", driver="GTiff", **form, **blocks, **PLACE) as file:
        file.write(image.numpy(), window=place)
    predict_raster(
        network, tmp_path / "in.tif", tmp_path / "out.tif", Protocol(window=(1000, 1000), stride=(1000, 1000))
    )
    assert len(network.seen) == 1
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.shape == (side, side)
        found = file.read(1, window=place)
        around = file.read(1, window=rasterio.windows.Window(29_000, 40_000, 3000, 3000))
    assert found.max() == 1 and (around != 255).sum() == 900 * 600 and len(np.unique(found)) > 1


def test_stopped_and_failed_jobs_leave_nothing(network, tmp_path):
    source = write(tmp_path / "in.tif", draw_image(60, 80).numpy())

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_raster(network, source, tmp_path / "out.tif", WINDOWS, confidence=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_truncated_and_damaged_rasters(network, tmp_path, share):
    """Tests that the error names the file; which rows are lost is known once blocks cannot be decoded."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (3, 120, 160), np.uint8)
    source = write(tmp_path / "in.tif", noise)
    content = source.read_bytes()
    source.write_bytes(content[: int(share * len(content))])
    with pytest.raises((OSError, ValueError), match=r"in\.tif: (rows \d+ to \d+|expected a raster)"):
        predict_raster(network, source, tmp_path / "out.tif", WINDOWS)
    damaged = bytearray(content)
    middle = int(share * len(content) * 0.9)
    damaged[middle : middle + 400] = bytes(400)
    source.write_bytes(damaged)
    with pytest.raises(OSError, match=r"in\.tif: rows \d+ to \d+ of columns \d+ to \d+ cannot be read"):
        predict_raster(network, source, tmp_path / "out.tif", WINDOWS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_full_disk(network, tmp_path, share):
    """Tests the end of the file too, which GDAL writes when it closes it."""
    source = write(tmp_path / "in.tif", draw_image(200, 300).numpy())
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS)
    whole = (tmp_path / "out.tif").read_bytes()
    with limited(int(share * len(whole))), pytest.raises(OSError, match=r"out\.tif: cannot be written"):
        predict_raster(network, source, tmp_path / "out.tif", WINDOWS)
    assert (tmp_path / "out.tif").read_bytes() == whole and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("bands", "dtype", "arguments", "message"),
    [
        (3, "uint8", {"out": "labels.png"}, r"out: expected NAME\.tif"),
        (3, "uint8", {"out": "in.tif"}, r"out: .*in\.tif is the raster that is read"),
        (3, "uint8", {"out": "none/out.tif"}, "expected a file in an existing folder"),
        (3, "uint8", {"source": "none.tif"}, r"none\.tif: there is no such file"),
        (3, "uint8", {"source": "text.tif"}, r"text\.tif: expected a raster that GDAL reads"),
        (3, "uint8", {"protocol": Protocol(test_scale=(64, 64))}, r"test_scale: .*in\.tif.*add --test-scale None"),
        (3, "uint8", {"bands": [1, 2, 4]}, "bands: expected numbers from 1 to 3"),
        (3, "uint8", {"bands": []}, "bands: expected numbers from 1 to 3"),
        (3, "uint8", {"bands": [1, 2]}, "bands: expected 3 bands, as the model was trained with, got"),
        (5, "uint8", {}, "expected 3 bands, as the model was trained with, got 5; choose them: --bands 1 2 3"),
        (2, "uint8", {}, "expected 3 bands, as the model was trained with, got 2"),
        (3, "uint16", {}, "expected bands of uint8, as the model was trained with, got uint16"),
        (3, "float32", {}, "expected bands of uint8, as the model was trained with, got float32"),
        (3, "uint8", {"max_pixels": 0}, "max_pixels: expected a positive integer"),
        (3, "uint8", {"precision": "int8"}, "precision"),
    ],
)
def test_wrong_arguments(network, tmp_path, bands, dtype, arguments, message):
    levels = draw_image(40, 60).numpy()[[0, 1, 2, 0, 1][:bands]].astype(dtype)
    write(tmp_path / "in.tif", levels, photometric="minisblack")
    (tmp_path / "text.tif").write_text("no raster")
    given = {"source": "in.tif", "out": "out.tif", **arguments}
    for name in ("source", "out"):
        given[name] = tmp_path / given[name]
    with pytest.raises((ValueError, OSError), match=message):
        predict_raster(network, **given)
    assert {path.name for path in tmp_path.iterdir()} == {"in.tif", "text.tif"}


@pytest.mark.parametrize(
    ("count", "dtype", "message"),
    [
        (3, "uint16", r"expected 4 bands, as the model was trained with, got 3; choose them: --bands 1 2 3 4"),
        (4, "uint8", "expected levels up to 10000, as the model was trained with, got bands of uint8"),
        (4, "complex64", "expected bands of real numbers, got complex64"),
    ],
)
def test_rasters_that_do_not_fit_a_trained_model(spectral, tmp_path, count, dtype, message):
    levels = draw_image(40, 60).numpy()[[0, 1, 2, 0][:count]].astype(dtype)
    with pytest.raises(ValueError, match=message):
        predict_raster(spectral, write(tmp_path / "in.tif", levels, photometric="minisblack"), tmp_path / "out.tif")
