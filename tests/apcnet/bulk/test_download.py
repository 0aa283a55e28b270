"""Tests URLs as sources, from a server that also fails on purpose."""

import socket
import threading

import faulty_server
import pytest
import torch
from faulty_server import serving
from stand_in import Network, save_photos

from apcnet.bulk import download, predict_files
from apcnet.data.files import read_mask
from apcnet.inference.prediction import predict

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 5


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path / "served", COUNT)


def test_urls_are_predicted_and_skipped_like_files(tmp_path, photos):
    out = tmp_path / "out"
    with serving(photos) as server:
        urls = [f"{server.address}/{number}.png" for number in range(COUNT)]
        assert predict_files(Network(), urls, out)[:3] == (COUNT, [], 0)
        assert predict_files(Network(), urls, out)[:3] == (COUNT, [], COUNT)
        assert len(server.requests) == COUNT
    for number in range(COUNT):
        assert torch.equal(read_mask(out / f"{number}.png"), predict(Network(), photos / f"{number}.png").labels)
    assert predict_files(Network(), urls, out)[:3] == (COUNT, [], COUNT), "a server that is gone is not asked"


def test_downloads_that_fail_end_nothing(tmp_path, photos, monkeypatch):
    """Tests each fault of the server, a missing file, and a content that is no image; the rest is predicted."""
    monkeypatch.setattr(download, "TIMEOUT", faulty_server.DELAY * 0.8)
    (photos / "notes.png").write_text("no image")
    out = tmp_path / "out"
    with serving(photos, every=2) as server:
        names = [f"{number % COUNT}.png?{number}" for number in range(10)]
        urls = [f"{server.address}/{name}" for name in names]
        report = predict_files(Network(), urls, out, overlay=None)
        assert report.done == 5 and len(report.failures) == 5 == len(server.seen)
        text = "\n".join(report.failures)
        reasons = ("the download failed", "timed out", "broke off after", "cannot be decoded", "Service Unavailable")
        assert all(reason in text for reason in reasons), text
        assert all(failure.startswith(server.address) and ".png?" in failure for failure in report.failures)
    monkeypatch.undo()
    with serving(photos) as server:
        urls = [url.replace(url.rpartition("/")[0], server.address) for url in urls]
        more = [f"{server.address}/none.png", f"{server.address}/notes.png"]
        report = predict_files(Network(), [*urls, *more], tmp_path / "second", overlay=None)
        none, notes = report.failures
        assert report.done == 10 and none == f"{more[0]}: the download failed: Not Found"
        assert notes.startswith(f"{more[1]}: expected an image in a format that Pillow reads")


def test_limits(tmp_path, photos, monkeypatch):
    with serving(photos) as server:
        monkeypatch.setattr(download, "LARGEST", 100)
        (failure,) = predict_files(Network(), f"{server.address}/0.png", tmp_path / "out").failures
        assert f"{server.address}/0.png: expected at most 100 bytes, got a file of" in failure


def test_a_server_that_drips(tmp_path, monkeypatch):
    """Tests that an endless answer without a length ends, by its rate and by its size."""
    monkeypatch.setattr(download, "GRACE", 0.2)
    ended = threading.Event()

    def drip(listening: socket.socket, content: bytes, pause: float) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            try:
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                while not ended.wait(pause):
                    connection.sendall(content)
            except OSError:  # the client has had enough
                pass

    monkeypatch.setattr(download, "LARGEST", 1 << 20)
    for content, pause, message in (
        (b"x", 0.05, "is too slow"),
        (bytes(1 << 16), 0.0, "at most 1,048,576 bytes, got more"),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=drip, args=(listening, content, pause))
            thread.start()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"
            (failure,) = predict_files(Network(), url, tmp_path / "out").failures
            thread.join()
        assert message in failure
