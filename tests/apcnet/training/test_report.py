"""Tests the report of a run: whole without scripts, safe for any name, small, and working in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apcnet.presets import preset
from apcnet.training import report
from apcnet.training.report import charts

CLASSES = ["road", "</script><b>", "[/bold] & 背景"]
VOID = {"meta", "link", "img", "input", "br"}


def write_run(folder: Path, evaluations: int = 3, size: tuple[int, int] = (60, 40)) -> Path:
    """Writes the files of a run that a report reads."""
    (folder / "preview").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(preset("tiny").to_json()))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    noise, records = np.random.default_rng(0), []
    for step in range(1, evaluations + 1):
        parts = {"loss": 1 / step, "decode.loss_ce": 0.5 / step, "auxiliary.loss_ce": 0.5 / step}
        records.append({"step": 10 * step, **parts, "lr": 0.1, "images_per_second": 4.0, "memory_mib": 99})
        iou = dict(zip(CLASSES, (0.1 * step, 0.5, None), strict=True))
        best = {"miou": 0.3, "step": 10}
        records.append({"step": 10 * step, "miou": 0.3, "macc": 0.4, "aacc": 0.5, "iou": iou, "best": best})
        picture = Image.fromarray(noise.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        picture.save(folder / "preview" / f"{10 * step:06}.png", compress_level=1)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    np.save(folder / "confusion.npy", np.array([[8, 2, 0], [3, 5, 2], [0, 0, 0]]))
    return folder


class Page(HTMLParser):
    """Reads a page, and checks that its elements are closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.text, self.elements = [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""


def test_without_scripts_everything_is_there(tmp_path):
    page = Page(report.write([write_run(tmp_path / "run")]))
    for text in ("step 10", "step 30", "30.00", "IoU, %", "recall", "precision", "Learning rate", *CLASSES):
        assert text in page.text, text
    hidden = {tag for tag, attributes in page.elements if "hidden" in attributes}
    assert hidden == {"form"}  # of the two radio buttons, which do nothing without scripts


def test_nothing_is_loaded(tmp_path):
    """Tests that pictures are embedded, and that no address leads out of the file."""
    page = Page(report.write([write_run(tmp_path / "run")]))
    addresses = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "action")]
    assert len(addresses) == 4 and all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import|fetch\(|https?://", (tmp_path / "run" / "report.html").read_text())


def test_a_long_run_stays_small(tmp_path):
    path = report.write([write_run(tmp_path / "run", 26, (900, 700))])
    assert path.stat().st_size < 5_000_000
    assert path.read_text().count("<img") == report.MOST_PREVIEWS


def test_runs_beside_each_other(tmp_path):
    """Tests that runs of one name are told apart, and that the page goes where it was asked to."""
    runs = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    page = Page(report.write(runs, tmp_path / "compare.html"))
    assert "run (1)" in page.text and "run (2)" in page.text and "Comparison" in page.text
    assert "the same settings" in page.text
    assert not (runs[0] / "report.html").exists()


@pytest.mark.parametrize("missing", ["log.jsonl", "environment.json", "confusion.npy", "preview"])
def test_a_run_that_has_just_begun(tmp_path, missing):
    path = write_run(tmp_path / "run") / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(report.write([tmp_path / "run"]))


def test_losses_that_are_not_finite(tmp_path):
    run = write_run(tmp_path / "run")
    record = {"step": 40, "loss": None, "lr": 0.1, "images_per_second": 0.0, "memory_mib": 1}
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    Page(report.write([run]))


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the folder of a run, found no config\.json"):
        report.write([tmp_path])
    with pytest.raises(ValueError, match="folders: expected one run or more"):
        report.write([])


@pytest.mark.parametrize("low, high", [(0, 1), (0.2219, 0.5989), (3, 3), (0, 0), (-5, 1e9), (1e-9, 2e-9)])
def test_scales_are_round_and_hold_their_values(low, high):
    bottom, top, ticks = charts.scale(low, high)
    assert bottom <= low and high <= top and bottom < top and 3 <= len(ticks) <= 8
    assert all(float(f"{tick:.3g}") == pytest.approx(tick, abs=1e-12) for tick in ticks)


def test_thinned_points_keep_the_last_step():
    points = charts.thinned([(step, 1.0) for step in range(1001)])
    assert len(points) <= charts.MOST_POINTS and points[-1] == (1000, 1.0)


# Uses the controls as a person does, and writes what they show into the page's title.
USE = """<script>
const seen = {}, shown = all => [...document.querySelectorAll(all)].filter(e => e.offsetParent !== null).length;
seen.previews = shown(".previews figure");
const range = document.querySelector(".slider input"); range.value = 0; range.dispatchEvent(new Event("input"));
seen.step = document.querySelector(".slider output").textContent;
seen.tables = shown(".share table");
document.querySelector(".choice input[value=precision]").click();
seen.precision = shown(".share[data-share=precision] table"); seen.recall = shown(".share[data-share=recall] table");
const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 14, clientY: box.top + 40}));
seen.tip = document.querySelector(".tip").textContent;
svg.dispatchEvent(new PointerEvent("pointerleave")); seen.left = document.querySelector(".tip").hidden;
seen.wide = document.documentElement.scrollWidth > innerWidth;
document.title = JSON.stringify(seen);
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_in_a_browser(tmp_path, width):
    """Tests each control in headless Chromium at the width of a phone, a tablet and a desk."""
    path = report.write([write_run(tmp_path / "run")])
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{USE}</body>"), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [
        "chromium",
        *options,
        f"--window-size={width},900",
        "--enable-logging=stderr",
        "--dump-dom",
        path.as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    seen = json.loads(re.search("<title>(.*?)</title>", result.stdout)[1])
    tip = seen.pop("tip")
    assert tip == "step 30: mIoU 30.00 %, aAcc 50.00 %"
    assert seen == {
        "previews": 1, "step": "step 10", "tables": 1, "precision": 1, "recall": 0, "left": True, "wide": False
    }  # fmt: skip
