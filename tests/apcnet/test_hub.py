"""Tests that published files are found by name, and that a download is whole and matches its hash or is absent."""

import csv
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import apcnet
from apcnet import hub

CONTENT = bytes(range(256)) * 9000  # more than one chunk
HASH = hashlib.sha256(CONTENT).hexdigest()[:8]
V05 = "https://download.openmmlab.com/mmsegmentation/v0.5"


def test_every_name_has_one_url():
    assert len(hub.URLS) == 114
    assert len({url.rsplit("-", 1)[1] for url in hub.URLS.values()}) == len(hub.URLS)
    for name, url in hub.URLS.items():
        assert hub.locate(name) == hub.locate(url.rsplit("/", 1)[1]) == url


def test_figures_stand_beside_the_file_of_their_own_run():
    with Path(hub.__file__).with_name("published.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["preset"] and row["file"]]
    assert len(rows) == 74
    for row in rows:
        model, depth, data = re.fullmatch(r"(.+?)-r(\d+)-(.+)", row["preset"]).groups()
        words = set(re.split("[-_]", row["file"]))
        assert {model.replace("semantic-", ""), f"r{depth}"} <= words and set(data.split("-")[1:]) <= words | {"769"}
        assert ("769" in data) == ("769x769" in words) and ("59" in data) == ("59" in words)
        name = data.split("-")[0]
        assert {"voc2012": "voc12aug", "context59": "context"}.get(name, name) in words


@pytest.mark.parametrize(
    ("name", "url"),
    [
        (
            "apcnet_r50-d8_512x1024_40k_cityscapes",
            f"{V05}/apcnet/apcnet_r50-d8_512x1024_40k_cityscapes/"
            "apcnet_r50-d8_512x1024_40k_cityscapes_20201214_115717-5e88fa33.pth",
        ),
        (
            "fpn_r101_4xb4-160k_ade20k-512x512.py",
            f"{V05}/sem_fpn/fpn_r101_512x512_160k_ade20k/fpn_r101_512x512_160k_ade20k_20200718_131734-306b5004.pth",
        ),
        (
            "upernet_r50_4xb4-160k_ade20k-512x512",
            f"{V05}/upernet/upernet_r50_512x512_160k_ade20k/"
            "upernet_r50_512x512_160k_ade20k_20200615_184328-8534de8d.pth",
        ),
        (
            "fcn_r101-d8_4xb2-amp-80k_cityscapes-512x1024",
            f"{V05}/fcn/fcn_r101-d8_fp16_512x1024_80k_cityscapes/"
            "fcn_r101-d8_fp16_512x1024_80k_cityscapes_20200717_230921-fb13e883.pth",
        ),
        (
            "pspnet_r101-d8_4xb4-40k_pascal-context-59-480x480",
            f"{V05}/pspnet/pspnet_r101-d8_480x480_40k_pascal_context_59/"
            "pspnet_r101-d8_480x480_40k_pascal_context_59_20210416_114524-86d44cd4.pth",
        ),
        ("resnet50_v1c", "https://download.openmmlab.com/pretrain/third_party/resnet50_v1c-2cccc1ad.pth"),
    ],
)
def test_names_of_files_and_of_both_generations_of_configs(name, url):
    assert hub.locate(name) == url


def test_a_name_that_is_none_gets_the_nearest():
    with pytest.raises(
        ValueError, match=r"published weights, got apcnet_r50-d8_512x1024_40k_city; did you mean apcnet_r50-d8_512x1024"
    ):
        hub.locate("apcnet_r50-d8_512x1024_40k_city")
    with pytest.raises(ValueError, match=r"published weights, got x; `apcnet presets` lists the names$"):
        hub.locate("x")


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT for every path, half of it below /short, nothing below /none."""

    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.path.startswith("/none"):
                return self.send_error(404)
            self.send_response(200)
            if not self.path.startswith("/unsaid"):
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            half = self.path.startswith("/short")
            return self.wfile.write(CONTENT[: len(CONTENT) // 2] if half else CONTENT)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("folder", "total"), [("said", len(CONTENT)), ("unsaid", None)])
def test_a_download_is_whole_and_told_on_the_way(tmp_path, server, folder, total):
    told = []
    path = hub.download(f"{server.url}/{folder}/a-{HASH}.pth?x=1", tmp_path / "new", lambda *x: told.append(x))
    assert path == tmp_path / "new" / f"a-{HASH}.pth" and path.read_bytes() == CONTENT
    assert len(told) > 1 and told[-1] == (len(CONTENT), total)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_is_there_and_right_is_not_fetched_again(tmp_path, server):
    url = f"{server.url}/a-{HASH}.pth"
    path = hub.download(url, tmp_path)
    hub.download(url, tmp_path)
    assert len(server.requests) == 1
    path.write_bytes(b"other")
    assert hub.download(url, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a-00000000.pth", f"expected a file with SHA-256 00000000…, got {HASH}"),
        (f"short/a-{HASH}.pth", "broke off after 1152000 of 2304000 bytes|IncompleteRead"),
        (f"none/a-{HASH}.pth", "the download failed: Not Found"),
    ],
)
def test_a_download_that_fails_leaves_nothing(tmp_path, server, path, message):
    with pytest.raises(ValueError, match=message):
        hub.download(f"{server.url}/{path}", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///a.pth", "http://127.0.0.1:1/", "ftp://host/a.pth", "a.pth"])
def test_other_urls_are_refused(tmp_path, url):
    with pytest.raises(ValueError, match="url: expected http"):
        hub.download(url, tmp_path)


def test_published_weights_without_a_network_tell_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hub, "TRAINED", {"apcnet-r50-ade20k-160k": f"http://127.0.0.1:1/a-{HASH}.pth"})
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = tmp_path / "checkpoints" / f"a-{HASH}.safetensors"
    with pytest.raises(
        ValueError, match=rf"^apcnet-r50-ade20k-160k: http\S+: .*apcnet convert FILE {re.escape(str(file))}$"
    ):
        apcnet.load("apcnet-r50-ade20k-160k")


def test_a_server_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ValueError, match=r"the download failed: .*refused"):
        hub.download("http://127.0.0.1:1/a.pth", tmp_path)
