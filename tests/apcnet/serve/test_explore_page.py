"""Tests the page of `apcnet explore` in a real browser: what it shows is what public functions return."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, needs_chromium
from explored import explored_model
from PIL import Image
from serving import encoded, photo, running

import apcnet
from apcnet.config import Protocol
from apcnet.data.augment import normalise
from apcnet.serve import Served, create_app, explore_page

pytestmark = needs_chromium

PIXELS = """(selector => {
  const {width, height} = document.querySelector(selector);
  const copy = Object.assign(document.createElement("canvas"), {width, height});
  const pen = copy.getContext("2d", {willReadFrequently: true});
  pen.drawImage(document.querySelector(selector), 0, 0);
  return [height, width, [...pen.getImageData(0, 0, width, height).data]];
})"""
SHOWN = "Number(document.body.dataset.shown ?? 0)"


@pytest.fixture(scope="module")
def models():
    return {"one": Served(explored_model()), "two": Served(explored_model("encnet", seed=1))}


@pytest.fixture(scope="module")
def alone(models):
    """Returns the address of a page with one model."""
    with running(create_app({"one": models["one"]}, pages=explore_page.pages())) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def both(models):
    """Returns the address of a page with two models."""
    with running(create_app(models, pages=explore_page.pages())) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def nothing_but_the_server(browser):
    """Checks after each test that the console is empty, and that no other host was asked for anything."""
    browser.problems.clear()
    browser.requests.clear()
    yield
    assert browser.problems == []
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in browser.requests)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "street.png"
    path.write_bytes(encoded(photo((61, 83))))
    return path


def pixels(browser: Browser, selector: str) -> np.ndarray:
    """Returns the pixels of a canvas, (H, W, 4)."""
    height, width, values = browser.evaluate(f"{PIXELS}({json.dumps(selector)})")
    return np.array(values, np.uint8).reshape(height, width, 4)


def settled(browser: Browser, action, *arguments) -> None:
    """Does something that asks the server, and waits until the page shows the answer."""
    before = browser.evaluate(SHOWN)
    action(*arguments)
    browser.until(f"{SHOWN} > {before}")


def opened(browser: Browser, url: str, file: Path | None = None) -> None:
    """Opens the page, which shows a generated scene, and drops a file on it."""
    browser.resize(1280, 900)
    browser.open(url)
    browser.until(f"{SHOWN} > 0")
    if file is not None:
        settled(browser, browser.drop, "body", file)


def text(browser: Browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def set_side(browser: Browser, side: int) -> None:
    """Moves the slider of the input's size, as a pointer does: an event for each of several steps."""
    for value in (side - 16, side - 8, side):
        slider = "document.querySelector('#side')"
        browser.evaluate(f"{slider}.value = {value}, {slider}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def values(browser: Browser, column: int = 1) -> list[float]:
    """Returns the numbers of the tiles, as they are and not as they are written."""
    buttons = f"document.querySelectorAll('.column:nth-of-type({column}) .tiles button')"
    return browser.evaluate(f"[...{buttons}].map(button => Number(button.dataset.value))")


def picked(browser: Browser) -> tuple[int, int]:
    """Returns the pixel that was clicked, as the page names it: x and y."""
    place = text(browser, ".picked").removeprefix("Pixel ").partition(":")[0]
    x, y = map(int, place.split(", "))
    return x, y


def maps_of(served: Served, picture: Image.Image) -> apcnet.models.ContextMaps:
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return served.prepared.context_maps(normalise(levels, served.model.mean, served.model.std)[None])


def coloured(seen: apcnet.inference.prediction.Prediction) -> np.ndarray:
    """Returns the colours of labels (H, W, 4) with full opacity."""
    colors = np.array(seen.palette, np.uint8)[seen.labels.numpy()]
    return np.concatenate([colors, np.full((*colors.shape[:2], 1), 255, np.uint8)], 2)


def test_a_dropped_photo_and_a_clicked_pixel(browser, alone, models, file):
    """Tests that labels are those of apcnet.predict, and numbers of the tiles those of model.context_maps."""
    opened(browser, alone, file)
    seen = apcnet.predict(models["one"].prepared, photo((61, 83)), confidence=True)
    assert np.array_equal(pixels(browser, ".colours"), coloured(seen))
    assert np.array_equal(pixels(browser, ".photo")[..., :3], np.asarray(photo((61, 83))))
    browser.click(".stage", 0.7, 0.3)
    x, y = picked(browser)
    assert (x, y) == (int(0.7 * 83), int(0.3 * 61))
    label, sure = seen.labels[y, x], seen.confidence[y, x]
    assert f"Pixel {x}, {y}: {seen.classes[label]}, {100 * sure:.0f} % sure" in text(browser, ".picked")
    maps = maps_of(models["one"], photo((61, 83)))
    rows, columns = maps.places((61, 83))
    expected = torch.cat([affinities[0, :, rows[y], columns[x]] for affinities in maps.affinities])
    assert values(browser) == expected.tolist()


@pytest.mark.slow
def test_heat_of_a_region(browser, alone, models, file):
    """Tests the colours of the least and the greatest affinity, and the frame around the region."""
    opened(browser, alone, file)
    maps = maps_of(models["one"], photo((61, 83)))
    scale, index = 3, 5
    affinity = maps.affinities[2][0, index]
    browser.click(f".board[aria-label$='{scale} × {scale}'] button:nth-of-type({index + 1})")
    assert browser.evaluate("document.querySelector('[value=heat]').checked")
    drawn = pixels(browser, ".drawing")[..., :3]
    rows, columns = maps.places((61, 83))
    shown = affinity[rows][:, columns]
    assert (drawn[shown.numpy() == affinity.max().item()] == (252, 255, 164)).all()
    assert (drawn[shown.numpy() == affinity.min().item()] == (0, 0, 4)).all()
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 20
    top, left, bottom, right = maps.boxes(scale)[index]
    frame = browser.evaluate(
        "['left', 'top', 'width', 'height'].map(x => document.querySelector('.stage .frame').style[x])"
    )
    height, width = maps.size
    expected = [left / width, top / height, (right - left) / width, (bottom - top) / height]
    assert [float(part[:-1]) / 100 for part in frame] == pytest.approx(expected, abs=1e-4)
    browser.move(".stage", 0.5, 0.5)
    written = text(browser, ".tip").splitlines()[-1]
    value = shown[30, 41].item()
    assert written == f"affinity {value:.2f}".replace("0.", ".")
    assert text(browser, ".told") == "Affinities of all positions to region in row 2, column 3 of 3 × 3"
    browser.click(f".board[aria-label$='{scale} × {scale}'] button:nth-of-type({index + 1})")
    assert browser.evaluate("document.querySelector('[value=classes]').checked")
    assert not pixels(browser, ".drawing").any()


@pytest.mark.slow
def test_the_input_size(browser, alone, models, file):
    """Tests labels, times and shares of changed labels at another size, and the way back."""
    opened(browser, alone, file)
    settled(browser, set_side, browser, 128)
    protocol = Protocol(test_scale=(128, 128))
    seen, usual = (apcnet.predict(models["one"].prepared, photo((61, 83)), p) for p in (protocol, Protocol()))
    assert np.array_equal(pixels(browser, ".colours"), coloured(seen))
    assert text(browser, "output[for=side]") == "128 × 94"
    tried = browser.evaluate("[...document.querySelectorAll('#times button')].map(button => button.textContent)")
    changed = (seen.labels != usual.labels).double().mean().item()
    assert len(tried) == 2
    assert re.fullmatch(r"83 × 61: [\d.]+ m?s, default size", tried[0])
    assert re.fullmatch(rf"128 × 94: [\d.]+ m?s, {100 * changed:.1f} % of labels change", tried[1])
    settled(browser, browser.click, "#own")
    assert np.array_equal(pixels(browser, ".colours"), coloured(usual))


@pytest.mark.slow
def test_two_models_side_by_side(browser, both, models, file):
    opened(browser, both, file)
    seen = [apcnet.predict(served.prepared, photo((61, 83))) for served in models.values()]
    for i, prediction in enumerate(seen, 1):
        assert np.array_equal(pixels(browser, f".column:nth-of-type({i}) .colours"), coloured(prediction))
    differs = (seen[0].labels != seen[1].labels).numpy()
    assert 0 < differs.mean() < 1
    assert text(browser, "#status").endswith(f"the models differ in {100 * differs.mean():.1f} % of the pixels")
    browser.click("#differs")
    for i, prediction in enumerate(seen, 1):
        drawn = pixels(browser, f".column:nth-of-type({i}) .drawing")
        assert np.array_equal(drawn[differs], coloured(prediction)[differs])
        assert (drawn[~differs] == (20, 24, 30, 255)).all()
    browser.click(".stage", 0.25, 0.75)
    x, y = picked(browser)
    maps = maps_of(models["two"], photo((61, 83)))
    rows, columns = maps.places((61, 83))
    assert values(browser, 2) == maps.assignments[0, :, rows[y], columns[x]].tolist()
    tips = "[...document.querySelectorAll('.tip')].map(tip => tip.hidden ? null : tip.textContent.split('\\n')[0])"
    assert browser.evaluate(tips) == [prediction.classes[prediction.labels[y, x]] for prediction in seen]
    browser.click(".words button:nth-of-type(3)")
    assert text(browser, ".column:nth-of-type(2) .told") == "Share of all positions assigned to codeword 3"
    assert text(browser, ".column:nth-of-type(1) .told") == "This model has no such region or codeword."


@pytest.mark.slow
def test_by_keys_alone(browser, alone, models, file):
    """Tests that a screen reader is told class and confidence, and that keys reach a region and its heat."""
    opened(browser, alone, file)
    browser.evaluate("document.querySelector('.stage').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):  # the first key shows the crosshair in the middle
        browser.press(key)
    assert picked(browser) == (42, 31)
    seen = apcnet.predict(models["one"].prepared, photo((61, 83)), confidence=True)
    told = f"{seen.classes[seen.labels[31, 42]]}\n{100 * seen.confidence[31, 42]:.0f} % sure"
    assert text(browser, ".stage [aria-live=polite]") == told
    reached = []
    for _ in range(30):
        browser.press("Tab")
        reached.append(browser.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent"))
        if reached[-1].startswith("region in row 1, column 1 of 2 × 2"):
            break
    assert any(name.startswith("region in row 1, column 1 of 1 × 1") for name in reached)
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        browser.press(key)
    assert text(browser, ".told") == "Affinities of all positions to region in row 2, column 2 of 2 × 2"


@pytest.mark.slow
def test_names_for_a_screen_reader(browser, both, file):
    opened(browser, both, file)
    found = browser.accessible()
    for role, name in found:
        assert name or role not in ("button", "radio", "slider", "heading", "application", "image", "group", "list")
    named = set(found)
    assert {("radio", "classes"), ("radio", "difference"), ("slider", "opacity of the layer")} <= named
    assert {("button", "Choose a photo"), ("button", "generated scene 1"), ("heading", "one")} <= named
    assert ("application", "street.png, 83 × 61 pixels. Arrow keys move a crosshair.") in named
    assert sum(name.startswith("region in row") for role, name in found if role == "button") == 50
    assert sum(name.startswith("codeword") for role, name in found if role == "button") == 32
    assert browser.evaluate("document.querySelector('#status').getAttribute('role')") == "status"


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(390, False), (390, True), (800, False), (1280, True)])
def test_widths_and_colours(browser, both, width, dark):
    """Tests that nothing is wider than the page, and that text stands out from what is behind it."""
    opened(browser, both)
    browser.resize(width, 844, dark=dark, reduced_motion=True)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background, ink = (
        sum(map(int, browser.evaluate(f"getComputedStyle(document.body).{name}")[4:-1].split(", ")))
        for name in ("backgroundColor", "color")
    )
    assert background < 100 and ink > 600 if dark else background > 700 and ink < 150
    stages = browser.evaluate("[...document.querySelectorAll('.stage')].map(s => s.getBoundingClientRect().width)")
    assert min(stages) > (300 if width < 900 else 500)


@pytest.mark.slow
def test_photos_of_many_kinds(browser, alone, models, tmp_path):
    """Tests a picture that is stored on its side, and a TIFF, which the browser cannot decode."""
    opened(browser, alone)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = photo((61, 83))
    picture.save(tmp_path / "turned.jpg", exif=turned, quality=95)
    picture.save(tmp_path / "flat.tiff")
    for name in ("turned.jpg", "flat.tiff"):
        settled(browser, browser.choose, "#file", tmp_path / name)
        seen = apcnet.predict(models["one"].prepared, tmp_path / name)
        assert np.array_equal(pixels(browser, ".colours"), coloured(seen))
    assert np.array_equal(pixels(browser, ".photo")[..., :3], np.asarray(picture))


@pytest.mark.slow
def test_what_is_no_picture(browser, alone, tmp_path, file):
    """Tests that the page says what is wrong with a file, and takes the next one."""
    opened(browser, alone)
    (tmp_path / "broken.png").write_bytes(encoded(photo())[:300])
    (tmp_path / "words.txt").write_text("no picture")
    browser.drop("body", tmp_path / "broken.png")
    browser.until("!document.querySelector('#problem').hidden")
    assert text(browser, "#problem").startswith("body: expected an image")
    assert len(browser.problems) == 1 and "422" in browser.problems[0]  # the browser notes the answer
    browser.problems.clear()
    browser.move(".stage", 0.4, 0.4)  # the picture before is shown still
    assert "% sure" in text(browser, ".tip")
    settled(browser, set_side, browser, 64)
    assert text(browser, "#status").startswith("generated scene 1, 96 × 96 pixels, seen at 64 × 64")
    browser.drop("body", tmp_path / "words.txt")
    assert text(browser, "#problem") == "words.txt: expected an image, got text/plain"
    settled(browser, browser.drop, "body", file)
    assert browser.evaluate("document.querySelector('#problem').hidden")
