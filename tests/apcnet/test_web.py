"""Tests the page that labels photos in a browser alone: its arithmetic in Node, and the whole of it in Chromium."""

import json
import shutil
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, needs_chromium
from PIL import Image
from small_models import TRACED, pixels_of, small
from ties import assert_same_but_ties

import apcnet
from apcnet import draw, inference, web
from apcnet.config import Config
from apcnet.data.augment import normalise, resize, view_sizes
from apcnet.data.files import read_image
from apcnet.data.synthetic import Synthetic
from apcnet.inference.prediction import Prediction
from apcnet.inference.protocol import WHOLE, Protocol
from apcnet.training.folder import BEST

SIZES = [TRACED, (65, 97), (41, 57), (131, 72)]
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")

# Reads cases and arrays from a folder, and writes what the page's scripts make of them.
SCRIPT = """
import {readFileSync, writeFileSync} from "fs";
import {planes, Scores, viewSize} from "./labels.mjs";
import {labelsPng} from "./png.mjs";
const answers = [];
for (const [i, {logits, view, size, corners, pixel}] of JSON.parse(readFileSync("scores.json")).entries()) {
  const values = new Float32Array(new Uint8Array(readFileSync(`${i}.logits`)).buffer);
  const scores = new Scores(values, logits, view, size, corners), labels = scores.labels();
  writeFileSync(`${i}.labels`, labels);
  const picture = await labelsPng(labels, size[1], size[0], [[1, 2, 3], [4, 5, 6]]);
  writeFileSync(`${i}.png`, Buffer.from(await picture.arrayBuffer()));
  answers.push(scores.at(...pixel));
}
const sizes = JSON.parse(readFileSync("sizes.json")).map(([size, scale, pixels]) => viewSize(size, scale, pixels));
for (const [i, [size, view]] of JSON.parse(readFileSync("planes.json")).entries())
  writeFileSync(`${i}.planes`, planes(readFileSync(`${i}.rgba`), size, view));
writeFileSync("answers.json", JSON.stringify({answers, sizes}));
"""
SCORES = [  # shape of the logits, size of the network's input and of the photo, align_corners, a pixel (x, y)
    ((5, 8, 10), (64, 80), (64, 80), False, (3, 50)),
    ((5, 9, 13), (65, 97), (65, 97), True, (96, 64)),
    ((1, 6, 8), (41, 57), (41, 57), False, (0, 0)),
    ((7, 12, 9), (90, 64), (131, 72), False, (20, 130)),
    ((3, 30, 20), (120, 80), (61, 43), True, (42, 0)),
    ((300, 4, 5), (32, 40), (37, 41), False, (40, 36)),
]
PLANES = [((40, 60), (40, 60)), ((41, 57), (97, 33)), ((131, 72), (50, 200)), ((1, 1), (7, 5)), ((90, 3), (1, 1))]
VIEWS = [((375, 500), (2048, 512), 1 << 20), ((1024, 2048), None, 1 << 20), ((99, 1001), (2049, 1025), 1 << 18)]
VIEWS += [((1200, 1600), None, 1 << 20), ((33, 47), None, 1 << 20), ((4000, 3000), (512, 512), 9999)]


@needs_node
def test_sizes_pixels_and_labels_in_node(tmp_path):
    """Tests each function of the page beside its twin in Python: pixels and sizes are equal, labels but for ties."""
    generator = torch.Generator().manual_seed(0)
    for name in ("labels", "png"):
        source = (resources.files(web) / f"{name}.js").read_text(encoding="utf-8")
        (tmp_path / f"{name}.mjs").write_text(source, encoding="utf-8")
    logits = [torch.randn(case[0], generator=generator) for case in SCORES]
    for i, values in enumerate(logits):
        (tmp_path / f"{i}.logits").write_bytes(values.numpy().tobytes())
    pixels = [torch.randint(256, (4, *size), generator=generator, dtype=torch.uint8) for size, _ in PLANES]
    for i, levels in enumerate(pixels):
        (tmp_path / f"{i}.rgba").write_bytes(levels.permute(1, 2, 0).contiguous().numpy().tobytes())
    keys = ("logits", "view", "size", "corners", "pixel")
    (tmp_path / "scores.json").write_text(json.dumps([dict(zip(keys, case, strict=True)) for case in SCORES]))
    (tmp_path / "planes.json").write_text(json.dumps(PLANES))
    (tmp_path / "sizes.json").write_text(json.dumps(VIEWS))
    (tmp_path / "script.mjs").write_text(SCRIPT)
    ended = subprocess.run(["node", "script.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "answers.json").read_text())

    for i, (levels, (_, size)) in enumerate(zip(pixels, PLANES, strict=True)):
        actual = np.frombuffer((tmp_path / f"{i}.planes").read_bytes(), np.uint8)
        assert np.array_equal(actual, resize(levels[:3].contiguous(), size).numpy().ravel()), PLANES[i]
    for (size, scale, most), actual in zip(VIEWS, found["sizes"], strict=True):
        ratio = actual["ratio"]
        assert [tuple(actual["size"])] == view_sizes(size, (ratio,), scale)
        height, width = view_sizes(size, (1.0,), scale)[0]
        assert (ratio == 1) == (height * width <= most)
        assert ratio == 1 or 0.98 * most <= np.prod(actual["size"]) <= 1.01 * most
    for i, (values, (_, view, size, corners, (x, y))) in enumerate(zip(logits, SCORES, strict=True)):
        model = Given(values, corners).eval()
        expected = inference.labels(model, torch.zeros(1, 3, *view), size=size)[0]
        scores = inference.probabilities(model, torch.zeros(1, 3, *view), size=size)[0]
        wide = np.uint8 if len(scores) <= 256 else np.uint16
        actual = np.frombuffer((tmp_path / f"{i}.labels").read_bytes(), wide).reshape(size)
        assert_same_but_ties(torch.from_numpy(actual.astype(np.int64)), expected.long(), scores.log())
        assert np.allclose(found["answers"][i], scores[:, y, x], rtol=1e-4, atol=1e-7)
        picture = Image.open(tmp_path / f"{i}.png")
        assert picture.mode == ("P" if wide is np.uint8 else "I;16") and np.array_equal(np.array(picture), actual)
        assert wide is np.uint16 or picture.getpalette()[:6] == [1, 2, 3, 4, 5, 6]


class Given(torch.nn.Module):
    """Returns given logits, whatever the images are."""

    def __init__(self, logits: torch.Tensor, align_corners: bool):
        super().__init__()
        self.logits, self.align_corners = logits, align_corners

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[None]


def test_what_a_page_cannot_do(tmp_path, monkeypatch):
    model = small("fcn")
    with pytest.raises(
        FileNotFoundError, match=r"runtime: expected a folder with ort\.wasm\.min\.mjs, .*npm pack onnx"
    ):
        web.write(model, tmp_path / "page", runtime=tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"web: expected npm, .* found none; .* npm pack .* --runtime package/dist"
    ):
        web.write(model, tmp_path / "page")
    monkeypatch.setattr(shutil, "which", lambda name: "false")
    with pytest.raises(
        ConnectionError, match=r"web: npm cannot fetch onnxruntime-web@[\d.]+ \(no message\); .* npm pack"
    ):
        web.write(model, tmp_path / "page")
    model.range = ((0.0, 1.0),) * 3
    with pytest.raises(ValueError, match="model: expected one of 8-bit RGB photos for a page"):
        web.write(model, tmp_path / "page")


def test_wrong_flags(tmp_path, run):
    small("fcn").save(tmp_path / "m.safetensors")
    cases = [
        ((), "out: expected NAME.pt2, NAME.onnx or NAME.xml, or else --web FOLDER, got none"),
        (
            ("m.onnx", "--web", "page"),
            "out: expected NAME.pt2, NAME.onnx or NAME.xml, or else --web FOLDER, got m.onnx and page",
        ),
        (("--web", "page", "--output", "labels"), "web: expected no --format, --no-dynamic, --output and --normalise"),
    ]
    for flags, message in cases:
        status, _, errors = run("export", tmp_path / "m.safetensors", *flags)
        assert status == 2 and message in " ".join(errors.split()), errors


def test_the_page_of_a_run_keeps_its_scale(tmp_path, run, monkeypatch):
    written = []
    monkeypatch.setattr("apcnet.web.write", lambda *arguments, **options: written.append((arguments, options)) or {})
    protocol = Protocol(test_scale=(200, 300))
    folder = tmp_path / "first run"
    folder.mkdir()
    small("fcn").save(folder / BEST)
    (folder / "config.json").write_text(json.dumps(Config(evaluation=protocol).to_json()))
    status, output, errors = run("export", folder, "--web", tmp_path / "my page", "--runtime", tmp_path)
    assert (status, errors) == (0, "")
    assert f"python -m http.server --directory '{tmp_path / 'my page'}', then http://localhost:8000" in " ".join(
        output.split("\n")
    )
    (((_, out, used), options),) = written
    assert (out, used) == (tmp_path / "my page", protocol)
    assert options == {"name": "first run", "size": (512, 512), "runtime": tmp_path}


# In Chromium


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what was requested; isolates the page if asked to, so that it may have threads."""

    def end_headers(self) -> None:
        if self.server.isolates:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *values: object) -> None:
        self.server.lines.append(format % values)


@pytest.fixture
def serve():
    """Returns a function that serves a folder until the test ends."""
    servers = []

    def start(folder: Path, isolates: bool = False) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        server.isolates, server.lines = isolates, []
        server.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    model = small("fcn")
    model.classes = ("sky", "road", "tree", "car", "</script><b>", "building", "background")
    model.palette = draw.palette(7)
    model.mean, model.std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    return model


@pytest.fixture(scope="module")
def page(model, tmp_path_factory):
    """Returns the folder of a page, whose onnxruntime-web comes from npm."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("page")
    try:
        web.write(model, folder, name="small & <i>quick</i>", size=TRACED)
    except ConnectionError as error:
        pytest.skip(f"needs onnxruntime-web: {error}")
    return folder


def status_of(browser: Browser, beginning: str) -> str:
    return browser.until(
        f"(text => text.startsWith({json.dumps(beginning)}) && text)(document.getElementById('status').textContent)"
    )


def saved(browser: Browser, button: str, name: str) -> np.ndarray:
    """Presses a button that saves a picture, and returns it."""
    path, end = browser.downloads / name, time.monotonic() + 30
    path.unlink(missing_ok=True)
    browser.click(button)
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    with Image.open(path) as picture:
        return np.array(picture)


def check_labels(browser: Browser, model, photo: Path, protocol: Protocol = WHOLE) -> Prediction:
    """Checks the saved labels beside those of predict."""
    actual = torch.from_numpy(saved(browser, "#save-labels", f"{photo.stem}.png"))
    expected, image = apcnet.predict(model, photo, protocol), read_image(photo)
    (size,) = view_sizes(image.shape[1:], protocol.ratios, protocol.test_scale)
    view = normalise(resize(image, size), model.mean, model.std)[None]
    scores = inference.probabilities(model, view, protocol, size=image.shape[1:])[0].log()
    assert_same_but_ties(actual, expected.labels, scores)
    return expected


@pytest.mark.slow
@needs_chromium
def test_photos_are_labelled_as_predict_does(model, page, serve, tmp_path):
    server, scene = serve(page), Synthetic("val", size=(301, 403))[3].image
    picture, turned = Image.fromarray(scene.permute(1, 2, 0).numpy()), Image.Exif()
    turned[0x112] = 6
    for size in SIZES:
        Image.fromarray(pixels_of(1, *size)[0].permute(1, 2, 0).numpy()).save(tmp_path / f"{size[0]}.png")
    picture.save(tmp_path / "turned.jpg", exif=turned)
    picture.save(tmp_path / "photo.webp", lossless=True)
    picture.resize((1600, 1200)).save(tmp_path / "large.png")
    with Browser(tmp_path) as browser:
        browser.open(server.url)
        status_of(browser, "Ready.")
        for i, size in enumerate(SIZES):
            photo = tmp_path / f"{size[0]}.png"
            browser.drop("#drop", photo) if i % 2 else browser.choose("#file", photo)
            assert f"{size[0]}.png: {size[1]} × {size[0]}, labelled in" in status_of(browser, photo.name)
            expected = check_labels(browser, model, photo)
            overlay = saved(browser, "#save-overlay", f"{size[0]}_overlay.png")[..., :3]
            assert np.abs(overlay.astype(int) - np.array(expected.overlay(legend=False))).max() <= 1
        for name in ("turned.jpg", "photo.webp"):
            browser.drop("#drop", tmp_path / name)
            status_of(browser, name)
            check_labels(browser, model, tmp_path / name)
        browser.choose("#file", tmp_path / "large.png")
        assert "which the network saw at 836 × 627" in status_of(browser, "large.png")
        check_labels(browser, model, tmp_path / "large.png", Protocol(ratios=(0.5225,)))
        choose = "element.value = 1024 * 1024; element.dispatchEvent(new Event('change'))"
        browser.evaluate(f"(element => {{ {choose} }})(document.getElementById('size'))")
        assert "which the network saw at 1182 × 887" in status_of(
            browser, "large.png: 1600 × 1200, which the network saw at 11"
        )
        seen = browser.evaluate("document.getElementById('seen').textContent")
        assert seen == "Shrunk to 1,048,434 pixels. The labels are those of apcnet predict --ratios 0.739."
        check_labels(browser, model, tmp_path / "large.png", Protocol(ratios=(0.739,)))
        transparent = picture.convert("RGBA")
        transparent.paste((250, 100, 100, 0), (0, 0, 200, 301))
        transparent.save(tmp_path / "clear.png")
        browser.choose("#file", tmp_path / "clear.png")
        status_of(browser, "clear.png")
        assert "saw black in transparent parts" in browser.evaluate("document.getElementById('seen').textContent")
        transparent.paste((0, 0, 0, 255), (0, 0, 200, 301))
        transparent.convert("RGB").save(tmp_path / "clear.png")
        check_labels(browser, model, tmp_path / "clear.png")
        browser.click("#sample")
        status_of(browser, "sample.png: 320 × 240")
        check_labels(browser, model, page / "sample.png")
        assert browser.problems == []
        assert all(url.startswith((server.url, "blob:")) for url in browser.requests)
    assert all(line.startswith('"GET /') for line in server.lines)  # nothing is sent


@pytest.mark.slow
@needs_chromium
def test_the_page_without_a_mouse_and_on_a_phone(model, page, serve, tmp_path):
    server = serve(page, isolates=True)
    with Browser(tmp_path) as browser:
        browser.open(server.url)
        status_of(browser, "Ready.")
        threads = min(8, browser.evaluate("navigator.hardwareConcurrency"))
        about = browser.evaluate("document.getElementById('about').textContent")
        assert about.endswith(f"7 classes, {threads} thread{'s' * (threads > 1)}.")
        assert browser.evaluate("document.title") == "small & <i>quick</i>"
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.id") == "file"
        browser.press("Tab")
        browser.press("Enter")
        status_of(browser, "sample.png: 320 × 240")
        named = browser.accessible()
        for role, name in [
            ("button", "Choose a photo"),
            ("button", "Try a generated sample"),
            ("application", "sample.png, 320 × 240 pixels. Arrow keys move a crosshair."),
            ("slider", "Opacity"),
            ("combobox", "Size"),
            ("button", "Save labels"),
            ("button", "Save overlay"),
        ]:
            assert (role, name) in named
        assert all(name for role, name in named if role in ("button", "slider", "combobox", "application", "heading"))
        prediction = apcnet.predict(model, page / "sample.png")
        listed = [name.rsplit(" ", 2)[0] for role, name in named if role == "button" and name.endswith("%")]
        assert [name.removesuffix(" <") for name in listed] == list(prediction.shares())

        # The crosshair starts in the middle, and the tip and the live region tell what is there.
        browser.evaluate("document.getElementById('stage').focus()")
        for key, modifiers in (("ArrowUp", 0), ("ArrowRight", 0), ("ArrowDown", 8)):
            browser.press(key, modifiers)
        x, y = 161, 130
        view = normalise(read_image(page / "sample.png"), model.mean, model.std)[None]
        shares = inference.probabilities(model, view)[0, :, y, x]
        best = shares.topk(3)
        expected = [
            f"{model.classes[k]} {100 * share:.1f} %" for share, k in zip(*map(torch.Tensor.tolist, best), strict=True)
        ]
        browser.until(f"document.querySelector('.unseen').textContent === {json.dumps(chr(10).join(expected))}")
        assert browser.evaluate("document.querySelector('.tip').textContent.split('\\n')") == expected
        browser.press("Escape")
        assert browser.evaluate("document.querySelector('.tip').hidden && document.querySelector('.cross').hidden")

        browser.press("Tab")
        browser.press("ArrowRight")
        assert browser.evaluate("document.getElementById('percent').textContent") == "51 %"
        assert browser.evaluate("document.querySelector('.colours').style.opacity") == "0.51"
        browser.press("End")
        first, second = list(prediction.shares())[:2]
        browser.click(".legend li:nth-child(2) button")
        alone = saved(browser, "#save-overlay", "sample_overlay.png")[..., :3]
        label = (prediction.labels == model.classes.index(second)).numpy()
        drawn = np.where(
            label[..., None], model.palette[model.classes.index(second)], prediction.image.permute(1, 2, 0)
        )
        assert np.abs(alone.astype(int) - drawn).max() <= 1 and label.any() and first != second
        browser.click(".legend li:nth-child(2) button")
        assert browser.evaluate("document.querySelectorAll('[aria-pressed=true]').length") == 0

        browser.resize(360, 780, dark=True, reduced_motion=True)
        assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"
        assert browser.problems == []


@pytest.mark.slow
@needs_chromium
def test_other_files_other_protocols_and_a_page_without_a_server(model, page, serve, tmp_path):
    folder = tmp_path / "scaled"
    shutil.copytree(page, folder)
    about = json.loads((folder / "model.json").read_text())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing more")
    (tmp_path / "notes.txt").write_text("text")
    shutil.copy(page / "sample.png", tmp_path / "photo.png")
    with Browser(tmp_path) as browser:
        for options in ({"test_scale": (200, 300)}, {"test_scale": (200, 300), "single_resize": True}):
            (folder / "model.json").write_text(json.dumps(about | options))
            browser.open(serve(folder).url)
            status_of(browser, "Ready.")
            for name, message in (
                ("notes.txt", "expected an image, got text/plain"),
                ("broken.png", "this browser cannot"),
            ):
                browser.drop("main", tmp_path / name)
                assert message in status_of(browser, name)
                assert browser.evaluate("document.getElementById('status').className") == "bad"
            paste = "fetch('sample.png').then(r => r.blob()).then(blob => {const data = new DataTransfer();"
            paste += "data.items.add(new File([blob], 'photo.png', {type: 'image/png'}));"
            browser.evaluate(
                paste
                + "document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))})"
            )
            assert "320 × 240, which the network saw at 267 × 200" in status_of(browser, "photo.png")
            check_labels(browser, model, tmp_path / "photo.png", Protocol(**options))
        assert browser.problems == []
        (folder / "model.onnx").unlink()
        browser.open(serve(folder).url + "index.html")
        assert "./model.onnx: 404" in status_of(browser, "The model cannot be read")
        browser.open((page / "index.html").as_uri())
        assert browser.evaluate("document.getElementById('unserved').innerText").startswith(
            "If this text stays, the page"
        )
