"""Tests rasters, videos and cameras among the sources of a job: their names, their files, and what is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from stand_in import Network, draw_image, picture

from apcnet.bulk import Report, predict_files
from apcnet.bulk import jobs as jobs_module
from apcnet.bulk.jobs import Wanted, list_jobs
from apcnet.bulk.sources import find_items

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = Wanted("jpg", confidence=False, probabilities=False)


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


def test_kinds_are_counted_apart():
    report = Report(8, [], 0, Counter(raster=1, image=3, live=1, video=3))
    assert report.counts() == "3 images, 3 videos, 1 raster, 1 recording"
    assert Report(0, ["a.mp4: none"], 0, Counter(video=0)).counts() == "0 images"


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
    assert report.counts() == "1 image, 1 raster"
    expected = ("city.tif", "city_confidence.tif", "photo.png", "photo_confidence.png", "photo_overlay.jpg")
    assert sorted(path.name for path in out.iterdir()) == sorted([*expected, "manifest.jsonl"])
    predict_raster(Network(), folder / "city.tif", tmp_path / "alone.tif")
    with rasterio.open(out / "city.tif") as found, rasterio.open(tmp_path / "alone.tif") as alone:
        assert found.crs == alone.crs and found.transform == alone.transform
        assert np.array_equal(found.read(), alone.read())
    before = (out / "city.tif").stat().st_ino
    assert predict_files(Network(), folder, out, confidence=True).skipped == 2
    assert (out / "city.tif").stat().st_ino == before


def test_videos_go_on_like_images(tmp_path):
    """Tests that a damaged video is written and reported, and that one that is none fails alone."""
    av = pytest.importorskip("av", reason="needs the package av")
    from apcnet.bulk.video import CONTAINERS

    assert set(jobs_module.CONTAINERS) == set(CONTAINERS)
    folder, out, calls = tmp_path / "videos", tmp_path / "out", []
    folder.mkdir()
    with av.open(str(folder / "street.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            frame = np.roll(draw_image(48, 64).permute(1, 2, 0).numpy(), 4 * number, 1)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        file.mux(stream.encode())
    (folder / "none.mov").write_bytes(b"no video")
    picture(draw_image(20, 30)).save(folder / "photo.png")
    sources = [folder / name for name in ("none.mov", "photo.png", "street.mp4")]
    report = predict_files(Network(), sources, out, progress=lambda *call: calls.append(call))
    assert report.done == 2 and len(report.failures) == 1 and "none.mov" in report.failures[0]
    assert report.counts() == "1 image, 1 video"
    assert sorted(path.name for path in out.iterdir()) == [
        *("manifest.jsonl", "photo.png", "photo_overlay.jpg", "street_overlay.mp4")
    ]
    with av.open(str(out / "street_overlay.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 6
    assert calls[-1] == (3, 3) and calls == sorted(calls) and len(calls) >= 6, "frames are signs of life"
    before = (out / "street_overlay.mp4").stat().st_ino
    assert predict_files(Network(), sources, out).skipped == 2
    assert (out / "street_overlay.mp4").stat().st_ino == before


def test_bands_of_rasters(tmp_path, run, monkeypatch):
    """Tests the flag, that it is a part of the job's description, and the error that names it."""
    rasterio = pytest.importorskip("rasterio", reason="needs the package rasterio")
    from apcnet.bulk.raster import predict_raster

    levels = draw_image(40, 60).numpy()[[0, 1, 2, 0]]
    place = {"crs": "EPSG:32632", "transform": rasterio.Affine(0.5, 0, 500000, 0, -0.5, 5300000)}
    form = {"height": 40, "width": 60, "count": 4, "dtype": "uint8", "photometric": "minisblack"}
    with rasterio.open(tmp_path / "city.tif", "w", "GTiff", **form, **place) as file:
        file.write(levels)
    monkeypatch.setattr("apcnet.load", lambda path: Network())
    command = ("predict", tmp_path / "model.safetensors", tmp_path / "city.tif", "--out", tmp_path / "out")
    (tmp_path / "model.safetensors").touch()
    status, _, errors = run(*command)
    assert status == 1 and "got 4; choose them: --bands 1 2 3" in " ".join(errors.split())
    assert run(*command, "--bands", 3, 2, 1, "--overwrite")[0] == 0
    predict_raster(Network(), tmp_path / "city.tif", tmp_path / "alone.tif", bands=(3, 2, 1))
    with rasterio.open(tmp_path / "out" / "city.tif") as found, rasterio.open(tmp_path / "alone.tif") as alone:
        assert np.array_equal(found.read(), alone.read())
    status, _, errors = run(*command, "--bands", 1, 2, 3)
    assert status != 0 and "bands: [3, 2, 1] → [1, 2, 3]" in " ".join(errors.split())
