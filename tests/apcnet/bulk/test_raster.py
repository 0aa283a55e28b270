"""Tests that rasters of any size get the labels that `apcnet.predict` gives, at the same place on earth."""

import numpy as np
import pytest
from stand_in import Network, draw_image

import apcnet
from apcnet.inference import Protocol

rasterio = pytest.importorskip("rasterio")
geotiff = pytest.importorskip("apcnet.bulk.geotiff")
raster = pytest.importorskip("apcnet.bulk.raster")
predict_raster = raster.predict_raster

PLACE = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.2, 0, 390000, 0, -0.2, 5820000)}
WINDOWS = Protocol(window=(32, 40), stride=(20, 25))


@pytest.fixture(autouse=True)
def small(threads, monkeypatch):
    threads(1)
    monkeypatch.setattr(geotiff, "BLOCK", 16)
    monkeypatch.setattr(raster, "BLOCK", 16)


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
    monkeypatch.setattr(raster, "STRIP_SCORES", most)
    image = draw_image(*size)
    source = write(tmp_path / "in.tif", image.numpy())
    predict_raster(network, source, tmp_path / "out.tif", WINDOWS, confidence=True)
    expected = apcnet.predict(network, image, WINDOWS, confidence=True)
    assert np.array_equal(read(tmp_path / "out.tif"), expected.labels.numpy())
    sure = read(tmp_path / "out_confidence.tif") / 254
    assert np.abs(sure - expected.confidence.numpy()).max() <= 0.5 / 254 + 1e-5
