"""Tests rasters, videos and cameras among the sources of a job: their names, their files, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from stand_in import Network, draw_image, picture

from apcnet.bulk import predict_files
from apcnet.bulk.jobs import Wanted, list_jobs
from apcnet.bulk.sources import find_items

ALL = Wanted("jpg", confidence=False, probabilities=False)


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def jobs(*sources, wanted=ALL):
    return list_jobs(find_items(sources, Path("out")), Path("out"), wanted)


def test_what_is_written_for_videos_and_cameras(tmp_path):
    for name in ("a.MP4", "b.avi"):
        (tmp_path / name).touch()
    sources = (
        tmp_path / "a.MP4",
        f"{tmp_path}/*.avi",
        "camera:0",
        "/dev/null",
        "rtsp://host/live",
        "http://host/c.webm",
    )
    found = jobs(*sources)
    assert [job.kind for job in found] == ["video", "video", "live", "live", "live", "video"]
    names = ("a_overlay.mp4", "b_overlay.mp4", "camera0_overlay.mp4", "null_overlay.mp4", "live_overlay.mp4")
    assert [job.files for job in found] == [(Path(name),) for name in (*names, "c_overlay.webm")]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (ALL._replace(overlay=None), "overlay: expected jpg or png, got the video camera:0, whose overlay alone"),
        (ALL._replace(confidence=True), "confidence: expected images and rasters, got the video camera:0"),
        (ALL._replace(probabilities=True), "probabilities: expected images alone, got the live camera:0"),
    ],
)
def test_what_videos_do_not_have(wanted, message):
    with pytest.raises(ValueError, match=message):
        jobs("camera:0", wanted=wanted)


def test_a_recording_is_not_replaced(tmp_path):
    (tmp_path / "camera0_overlay.mp4").touch()
    with pytest.raises(
        FileExistsError, match=r"out: .*camera0_overlay\.mp4 is an earlier recording; name another folder"
    ):
        predict_files(Network(), "camera:0", tmp_path)


def test_rasters_go_on_like_images(tmp_path):
    """Tests that a TIFF somewhere on earth becomes another one, and that one elsewhere stays an image."""
    rasterio = pytest.importorskip("rasterio", reason="needs the package rasterio")
    from apcnet.bulk.raster import predict_raster

    folder, out = tmp_path / "maps", tmp_path / "out"
    folder.mkdir()
    levels = draw_image(60, 70).numpy()
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(500000, 5300000, 0.5, 0.5)}
    with rasterio.open(folder / "city.tif", "w", "GTiff", 70, 60, 3, dtype="uint8", **place) as file:
        file.write(levels)
    picture(draw_image(20, 30)).save(folder / "photo.tif")
    (folder / "cut.tif").write_bytes((folder / "city.tif").read_bytes()[:6000])
    report = predict_files(Network(), folder, out, confidence=True)
    assert report.done == 2 and len(report.failures) == 1 and "cut.tif" in report.failures[0]
    expected = ("city.tif", "city_confidence.tif", "photo.png", "photo_confidence.png", "photo_overlay.jpg")
    assert sorted(path.name for path in out.iterdir()) == sorted([*expected, "manifest.jsonl"])
    predict_raster(Network(), folder / "city.tif", tmp_path / "alone.tif")
    with rasterio.open(out / "city.tif") as found, rasterio.open(tmp_path / "alone.tif") as alone:
        assert found.crs == alone.crs and found.transform == alone.transform
        assert np.array_equal(found.read(), alone.read())
    before = (out / "city.tif").stat().st_ino
    assert predict_files(Network(), folder, out, confidence=True).skipped == 2
    assert (out / "city.tif").stat().st_ino == before
