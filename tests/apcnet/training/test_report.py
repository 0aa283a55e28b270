"""Tests the report of a run: whole without scripts, safe for any name, small, and working in a real browser."""

import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import small, write_images

from apcnet import cli
from apcnet.flags import train_command
from apcnet.presets import preset
from apcnet.training import panels, report, train
from apcnet.training.report import charts, curves, pictures, tables

CLASSES = ["road", "</script><b>", "[/bold] & 背景"]
PALETTE = [(0, 0, 0), (200, 10, 10), (10, 200, 10)]
VOID = {"meta", "link", "img", "input", "br", "image", "use"}
browser = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")


def write_run(folder: Path, evaluations: int = 3, size: tuple[int, int] = (40, 60), samples: int = 2) -> Path:
    """Writes the files of a run that a report reads."""
    (folder / "preview").mkdir(parents=True)
    config = preset("tiny").to_json()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    noise, records = torch.Generator().manual_seed(0), []

    def labels() -> torch.Tensor:
        return torch.randint(3, size, generator=noise, dtype=torch.uint8)

    names = [f"street {i}/<b>" for i in range(samples)]
    shown = [torch.randint(255, (3, *size), generator=noise, dtype=torch.uint8) for _ in names]
    kept = [panels.reduced(image, labels(), name) for image, name in zip(shown, names, strict=True)]
    panels.save(folder / "preview" / panels.SAMPLES, kept, [], PALETTE)
    for step in range(1, evaluations + 1):
        parts = {"loss": 1 / step, "decode.loss_ce": 0.5 / step, "auxiliary.loss_ce": 0.5 / step}
        records.append({"step": 10 * step, **parts, "lr": 0.1, "images_per_second": 4.0, "memory_mib": 99})
        iou = dict(zip(CLASSES, (0.1 * step, 0.5, None), strict=True))
        best = {"miou": 0.3, "step": 10}
        scores = {"miou": 0.3, "macc": 0.4, "aacc": 0.5, "mean_dice": 0.45, "iou": iou, "dice": iou, "best": best}
        records.append({"step": 10 * step, **scores})
        found = [panels.reduced_labels(labels()) for _ in names]
        panels.save(folder / "preview" / f"{10 * step:06}.npz", [], found, PALETTE)
    panels.save(folder / panels.WORST, kept, found, PALETTE)
    lines = [f'"{name}",2400,0.25,0.125,0.3,0.1,0.2,' for name in names]
    (folder / "images.csv").write_text("\n".join(["image,pixels,aacc,miou,mean_dice,a,b,c", *lines]) + "\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    np.save(folder / "confusion.npy", np.array([[8, 2, 0], [3, 5, 2], [0, 0, 0]]))
    return folder


class Page(HTMLParser):
    """Reads a page, and checks that its elements are closed in order and that no name of an element is used twice."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.text, self.elements = [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []
        names = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(names) == len(set(names))
        self.names = set(names)

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
    for text in ("step 10", "step 30", "30.00", "Dice", "recall", "precision", "Learning rate", "Memory", *CLASSES):
        assert text in page.text, text
    for text in ("street 1/<b>: 75.00 % wrong", "apcnet train --out", "apcnet evaluate", "apcnet export", "2.13.0"):
        assert text in page.text, text
    hidden = [(tag, attributes.get("class")) for tag, attributes in page.elements if "hidden" in attributes]
    assert set(hidden) == {("form", "choice"), ("label", "refresh"), ("button", "copy"), ("p", "readout faint")}
    panel = [attributes["class"].split()[-1] for tag, attributes in page.elements if tag == "figure"]
    assert [panel.count(kind) for kind in ("image", "truth", "prediction", "error")] == [4, 4, 2 * 3 + 2, 2 * 3 + 2]


def test_nothing_is_loaded(tmp_path):
    """Tests that pictures are embedded, and that no address leads out of the file."""
    page = Page(report.write([write_run(tmp_path / "run")]))
    addresses = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href", "action")]
    within = [address[1:] for address in addresses if address.startswith("#")]
    embedded = [address for address in addresses if address.startswith("data:")]
    assert len(within) + len(embedded) == len(addresses) and set(within) <= page.names
    assert sum(address.startswith("data:image/jpeg") for address in embedded) == 4
    assert not re.search(r"url\(|@import|fetch\(|https?://|\bsrc=", (tmp_path / "run" / "report.html").read_text())


def test_a_long_run_of_large_pictures_stays_small(tmp_path):
    """Tests pictures of noise, which no format makes small, of more steps than a page shows."""
    run = write_run(tmp_path / "run", 26, (480, 480))
    path = report.write([run])
    assert path.stat().st_size < 5_000_000
    steps = {attributes["data-step"] for _, attributes in Page(path).elements if "data-step" in attributes}
    assert len(steps) == pictures.MOST_STEPS and {"10", "260"} <= steps


def test_runs_beside_each_other(tmp_path):
    """Tests that runs of one name are told apart, and that the page goes where it was asked to."""
    runs = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    page = Page(report.write(runs, tmp_path / "compare.html"))
    assert "run (1)" in page.text and "run (2)" in page.text and "Comparison" in page.text
    assert "the same settings" in page.text and "Worst images of run (2)" in page.text
    assert not (runs[0] / "report.html").exists()


@pytest.mark.parametrize(
    "missing", ["log.jsonl", "environment.json", "confusion.npy", "preview", "worst.npz", "images.csv"]
)
def test_a_run_that_has_just_begun(tmp_path, missing):
    path = write_run(tmp_path / "run") / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(report.write([tmp_path / "run"]))


def test_previews_of_other_images_are_left_out(tmp_path):
    """Tests a run that went on with other validation images: predictions of the old ones are not drawn on them."""
    run = write_run(tmp_path / "run")
    panels.save(run / "preview" / "000010.npz", [], [np.zeros((7, 9), np.uint8)] * 2, PALETTE)
    steps = {attributes.get("data-step") for _, attributes in Page(report.write([run])).elements}
    assert steps - {None} == {"20", "30"}


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


def test_only_a_run_that_goes_on_is_read_anew(tmp_path):
    run = write_run(tmp_path / "run")
    assert "2 %, 49 min 0 s left" in Page(report.write([run])).text
    assert 'http-equiv="refresh"' in (run / "report.html").read_text()
    (run / "metrics.json").write_text(json.dumps({"step": 30}))  # it ended early, by --patience
    text = report.write([run]).read_text()
    assert ">finished<" in text and 'http-equiv="refresh"' not in text and "data-refresh" not in text


def test_the_curves_as_a_picture(tmp_path):
    """Tests that a curve falls where the loss falls, for a long run too, and that a run without records has axes."""
    run = write_run(tmp_path / "run")
    with Image.open(report.write_curves(run)) as picture:
        assert picture.size == (2 * curves.WIDTH, curves.HEIGHT)
    for count in (3, 2000):
        loss = [(step, 1.0 / step) for step in range(1, count)]
        pixels = np.asarray(curves.curves(loss, [])).astype(int)
        rows, columns = np.nonzero((abs(pixels - curves.LINE).sum(-1) < 60)[curves.TOP - 10 :, : curves.WIDTH])
        middle = (columns.min() + columns.max()) // 2
        assert rows[columns < middle].min() < rows[columns > middle].min()
    assert np.asarray(curves.curves([], [])).min() < 200


# Parts of the page


def test_errors_are_where_labels_differ():
    truth, found = np.array([[0, 1, 2, 255]], np.uint8), np.array([[0, 2, 2, 1]], np.uint8)
    assert pictures.wrong_text(truth, found, 3) == "33.3 % wrong"
    assert pictures.wrong_text(truth[:, 3:], found[:, 3:], 3) == "all ignored"


def test_confusion_is_told_by_rows_and_by_columns():
    html = tables.confusion(np.array([[6, 2], [0, 12]]), ("road", "sky"), "0", "confusion.png")
    assert "road predicted as sky: 25.00 % of road, 2 pixels" in html
    assert "road predicted as sky: 14.29 % of what is predicted as sky, 2 pixels" in html
    assert "<li><b>road</b> predicted as <b>sky</b>" in html and html.count("<li>") == 1
    many = tables.confusion(np.eye(61, dtype=int), [f"c{i}" for i in range(61)], "0", "runs/confusion.png")
    assert "runs/confusion.png" in many and "<table" not in many


@pytest.mark.parametrize("low, high", [(0, 1), (0.2219, 0.5989), (3, 3), (0, 0), (-5, 1e9), (1e-9, 2e-9)])
def test_scales_are_round_and_hold_their_values(low, high):
    bottom, top, ticks = charts.scale(low, high)
    assert bottom <= low and high <= top and bottom < top and 3 <= len(ticks) <= 8
    assert all(float(f"{tick:.3g}") == pytest.approx(tick, abs=1e-12) for tick in ticks)


@pytest.mark.parametrize(
    ("ticks", "percent", "texts"),
    [
        ([0, 0.25, 0.5], False, ["0.00", "0.25", "0.50"]),
        ([0, 0.25, 0.5], True, ["0 %", "25 %", "50 %"]),
        ([0, 500, 1000], False, ["0", "500", "1,000"]),
        ([-0.0, 2.5e-4, 5e-4], False, ["0.00000", "0.00025", "0.00050"]),
        ([0, 5e-7, 1e-6], False, ["0", "5e-07", "1e-06"]),
    ],
)
def test_numbers_of_an_axis_have_the_decimals_they_need(ticks, percent, texts):
    assert charts.tick_texts(ticks, percent) == texts


def test_thinned_points_keep_the_last_step():
    points = charts.thinned([(step, 1.0) for step in range(1001)])
    assert len(points) <= charts.MOST_POINTS and points[-1] == (1000, 1.0)


def test_a_histogram_counts_every_value():
    html = charts.histogram("mIoU", [0.0, 0.049, 0.05, 0.999, 1.0], "five")
    assert "0 to 5 %: 2 images" in html and "5 to 10 %: 1 image<" in html and "95 to 100 %: 2 images" in html


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--lr", "0.2", "--steps", "7"),
        ("pspnet-r50-cityscapes-40k", "--root", "data/a b", "--batch-size", "2"),
        ("folder", "--root", "x", "--backbone-weights", "None", "--labels", "0", "0", "255", "1"),
    ],
    ids=" ".join,
)
def test_the_command_of_a_run_makes_its_config(arguments, monkeypatch):
    """Tests that the command on the page trains what the run was: its flags are read to the same config."""
    configs = []
    monkeypatch.setattr("apcnet.training.train", lambda config, *_, **__: configs.append(config) or exit())
    for words in (("train", *arguments), None):
        with pytest.raises(SystemExit):
            cli.main(list(words or train_command(configs[0], "runs/x")[1:]))
    assert configs[0] == configs[1] and len(configs) == 2
    changed = [word for word in train_command(configs[0], "runs/x") if word.startswith("--")]
    assert set(changed) == {"--out", *(word for word in arguments if word.startswith("--"))}


# In a browser. The page of a real run lies in a frame of the width to test, and tells what it shows.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(small(write_images(folder / "data"), steps=4, eval_every=2), folder / "run", log_every=1)
    torch.set_num_threads(threads)
    return folder / "run"


USE = """<script>
const seen = {}, shown = all => [...document.querySelectorAll(all)].filter(e => e.getClientRects().length).length;
const set = (name, value) => { const range = document.querySelector(`.controls input[name=${name}]`);
  range.value = value; range.dispatchEvent(new Event("input")); return range.nextElementSibling.textContent; };
addEventListener("load", () => {
  seen.panels = shown(".previews .panel"); seen.last = document.querySelector(".controls output").textContent;
  seen.first = set("step", 0); seen.captions = [...new Set([...document.querySelectorAll(".previews .prediction")]
    .filter(e => e.getClientRects().length).map(e => e.textContent))];
  seen.mixed = set("labels", 25);
  seen.opacity = getComputedStyle(document.querySelector(".previews .truth > svg > image")).opacity;
  seen.tables = shown(".share table"); seen.title = shown(".share[data-share=recall] table");
  document.querySelector(".choice input[value=precision]").click();
  seen.precision = shown(".share[data-share=precision] table"); seen.recall = shown(".share[data-share=recall] table");
  const cell = document.querySelector(".share[data-share=precision] tbody td");
  cell.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  seen.readout = document.querySelector(".readout").textContent;
  const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 14, clientY: box.top + 40}));
  const tip = document.querySelector(".tip"), edge = tip.getBoundingClientRect();
  seen.tip = tip.textContent; seen.inside = edge.left >= 0 && edge.right <= innerWidth;
  svg.dispatchEvent(new PointerEvent("pointerleave")); seen.left = tip.hidden;
  const order = () => [...document.querySelectorAll(".sortable tbody th")].map(e => e.textContent);
  seen.order = [order()];
  for (const column of [2, 2, 0]) {
    document.querySelectorAll(".sortable thead th")[column].querySelector("button").click();
    seen.order.push(order());
  }
  document.querySelector(".copy").click();
  seen.copied = getSelection().toString();
  seen.wide = document.documentElement.scrollWidth > innerWidth; seen.width = innerWidth;
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""


def chromium(path: Path, *options: str) -> str:
    """Opens a file in headless Chromium, and returns the title that its scripts gave it; a console message fails."""
    profile = path.parent / "profile"
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    more = ["--window-size=1400,900", "--enable-logging=stderr", "--virtual-time-budget=4000", *options, "--dump-dom"]
    result = subprocess.run([*command, *more, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    return re.search("<title>(.*?)</title>", result.stdout)[1].replace("&lt;", "<").replace("&amp;", "&")


@browser
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_in_a_browser(trained, tmp_path, width):
    """Tests each control at the width of a phone, a tablet and a desk."""
    page = tmp_path / "report.html"
    page.write_text((trained / "report.html").read_text(encoding="utf-8").replace("</body>", f"{USE}</body>"), "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<title></title><script>addEventListener('message', event => document.title = event.data)</script>"
        f'<iframe src="report.html" width="{width}" height="900" style="border:0"></iframe>'
    )
    seen = json.loads(chromium(frame))
    scores = json.loads((trained / "metrics.json").read_text())
    tip, order, copied, readout = (seen.pop(name) for name in ("tip", "order", "copied", "readout"))
    assert tip.splitlines()[:2] == ["step 4", f"mIoU {100 * scores['miou']:.2f} %"]
    names = list(scores["iou"])
    ranked = sorted(names, key=lambda name: -1 if scores["iou"][name] is None else scores["iou"][name])
    values = [[scores["iou"][name] for name in rows] for rows in order[1:3]]
    assert order[0] == names and values == [[scores["iou"][name] for name in rows] for rows in (ranked, ranked[::-1])]
    assert order[3] == names
    words = shlex.split(copied)
    assert words[:5] == ["apcnet", "train", "folder", "--backbone", "tiny"] and words[-2:] == ["--out", str(trained)]
    assert re.fullmatch(r"ground predicted as ground: [\d.]+ % of what is predicted as ground, [\d,]+ pixels", readout)
    assert seen == {
        "panels": 4 * 4,
        "last": "4",
        "first": "0",
        "mixed": "25 %",
        "opacity": "0.25",
        "tables": 1,
        "title": 1,
        "captions": ["prediction, step 0"],
        "precision": 1,
        "recall": 0,
        "left": True,
        "inside": True,
        "wide": False,
        "width": width,
    }


AGAIN = """<script>addEventListener("load", () => {
  const [step, choice, recall] = [".controls input[name=step]", ".choice input[value=precision]", "[data-share=recall]"]
    .map(selector => document.querySelector(selector));
  if (sessionStorage.getItem("opened")) {
    document.title = JSON.stringify([step.value, choice.checked, recall.hidden]);
    document.querySelector(".refresh input").click();
  } else {
    sessionStorage.setItem("opened", "once");
    step.value = 1; step.dispatchEvent(new Event("input")); choice.click();
  }
});</script>"""


@browser
def test_a_page_that_is_read_anew_keeps_its_controls(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REFRESH", 1)
    page = report.write([write_run(tmp_path / "run")])
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{AGAIN}</body>"), "utf-8")
    assert json.loads(chromium(page)) == ["1", True, True]


@browser
def test_names_of_classes_are_only_text_in_a_browser(tmp_path):
    """Tests that names which look like elements and scripts do nothing, in a comparison with every part."""
    runs = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    page = report.write(runs, tmp_path / "compare.html")
    found = "`${document.querySelectorAll('b b, h3 b').length} ${document.scripts.length}`"
    ask = f"<script>document.title = {found}</script>"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{ask}</body>"), "utf-8")
    expected = page.read_text(encoding="utf-8").count("<script")
    assert chromium(page) == f"0 {expected}"
