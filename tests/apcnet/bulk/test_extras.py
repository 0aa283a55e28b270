"""Tests what predictions of videos and rasters say where their packages are missing."""

import sys

import pytest
from stand_in import Network

from apcnet.bulk.raster import predict_raster
from apcnet.bulk.video import predict_video


@pytest.mark.parametrize(
    ("predict", "package", "reader", "names", "extra"),
    [
        (predict_video, "av", "apcnet.bulk.videofile", ("a.mp4", "b.mp4"), "video"),
        (predict_raster, "rasterio", "apcnet.bulk.geotiff", ("a.tif", "b.tif"), "raster"),
    ],
)
def test_missing_packages(monkeypatch, tmp_path, predict, package, reader, names, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, reader, raising=False)
    message = rf"expected the package {package}, .*pip install 'apc_kernels\[{extra}\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        predict(Network(), *(tmp_path / name for name in names))
