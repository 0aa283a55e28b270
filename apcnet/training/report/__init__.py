"""Writes the report of a run: one HTML file with curves, scores, pictures and settings, which opens without a network.

`apcnet train` writes report.html into the run's folder after every evaluation; `apcnet compare` writes one of several
runs. The page is complete without scripts. Pictures are embedded, reduced so that the file stays below 5 MB.
"""

import csv
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apcnet import draw
from apcnet.config import Config, differences
from apcnet.confusion import percent
from apcnet.files import read_json, replacing
from apcnet.flags import train_command
from apcnet.training import log
from apcnet.training.folder import BEST, FINAL
from apcnet.training.report import curves, pictures, tables
from apcnet.training.report.charts import COLORS, Line, histogram, lines

NAME = "report.html"
PICTURE_BYTES = 2_400_000  # all pictures together, before base64 makes them a third larger
REFRESH = 20  # seconds after which the page of a run that goes on is read anew


class Image(NamedTuple):
    """Holds the scores of an image in images.csv."""

    name: str
    aacc: float
    miou: float


class Run(NamedTuple):
    """Holds the files of a run that a report shows."""

    name: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    losses: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    confusion: np.ndarray | None
    images: list[Image]
    previews: pictures.Gallery | None
    worst: pictures.Gallery | None

    @property
    def step(self) -> int:
        """Returns the step that the run has reached."""
        return max((record["step"] for record in (*self.losses, *self.scores)), default=0)

    @property
    def is_finished(self) -> bool:
        """Tells whether the run has ended, after all steps or early, and has not gone on since."""
        metrics = self.folder / "metrics.json"
        return metrics.exists() and read_json(metrics).get("step") == self.step

    @property
    def classes(self) -> list[str]:
        """Returns the names of the classes, after an evaluation."""
        return list(self.scores[-1]["iou"]) if self.scores else []

    @property
    def palette(self) -> pictures.Palette | None:
        """Returns the colours of the classes, if pictures were saved."""
        return self.previews.palette if self.previews and len(self.previews.palette) == len(self.classes) else None


def read(folder: str | Path) -> Run:
    """Reads the files of a run."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a run, found no config.json in it")
    environment, matrix = folder / "environment.json", folder / "confusion.npy"
    records = log.read(folder)
    scores = [record for record in records if "miou" in record]
    counts = np.load(matrix) if matrix.exists() else None
    if counts is not None and (not scores or len(counts) != len(scores[-1]["iou"])):
        counts = None
    return Run(
        folder.resolve().name,
        folder,
        read_json(folder / "config.json"),
        read_json(environment) if environment.exists() else {},
        [record for record in records if "miou" not in record],
        scores,
        counts,
        _read_images(folder / "images.csv"),
        pictures.read_previews(folder / "preview"),
        pictures.read_worst(folder),
    )


def write(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of one run, or of several beside each other.

    Args:
        folders: The folders of the runs.
        out: The file to write; by default report.html in the folder of the first run.

    Returns:
        The file.

    Example:
        >>> report.write(["runs/tiny"])
        >>> report.write(["runs/a", "runs/b"], "compare.html")
    """
    runs = [read(folder) for folder in folders]
    if not runs:
        raise ValueError("folders: expected one run or more, got none")
    path = Path(out) if out is not None else runs[0].folder / NAME
    names = _distinct([run.name for run in runs])
    runs = [run._replace(name=name) for run, name in zip(runs, names, strict=True)]
    with replacing(path) as temporary:
        temporary.write_text(page(runs), encoding="utf-8", errors="backslashreplace")
    return path


def write_curves(folder: str | Path) -> Path:
    """Draws the loss and mIoU of a run, and returns the file, curves.png in its folder."""
    records, path = log.read(Path(folder)), Path(folder) / curves.NAME
    loss = [(record["step"], record["loss"]) for record in records if "miou" not in record and _has(record, "loss")]
    draw.save(curves.curves(loss, [(r["step"], r["miou"]) for r in records if _has(r, "miou")]), path)
    return path


def page(runs: Sequence[Run]) -> str:
    """Returns the HTML of a report."""
    files = resources.files("apcnet.training.report")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    several = len(runs) > 1
    title = " and ".join(run.name for run in runs)
    sections = [("training", "Training", _curves(runs)), ("classes", "Classes", _classes(runs))]
    for i, run in enumerate(runs):
        of_run = f" of {run.name}" if several else ""
        sections += [
            (f"confusion-{i}", f"Confusion{of_run}", _confusion(run, i)),
            (f"previews-{i}", f"Predictions over time{of_run}", _previews(run, i, PICTURE_BYTES * 2 // 3 // len(runs))),
            (f"worst-{i}", f"Worst images{of_run}", _worst(run, i, PICTURE_BYTES // 3 // len(runs))),
        ]
    for i, run in enumerate(runs):
        of_run = f" of {run.name}" if several else ""
        sections.append((f"commands-{i}", f"Commands{of_run}", _commands(run)))
        sections.append((f"settings-{i}", f"Settings{of_run}", _settings(run)))
    sections = [(key, heading, body) for key, heading, body in sections if body]
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>' for key, heading, body in sections)
    goes_on = not several and not runs[0].is_finished
    again = f'<noscript><meta http-equiv="refresh" content="{3 * REFRESH}"></noscript>' if goes_on else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f'<title>{escape(title)} – apcnet</title><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body{f' data-refresh={REFRESH}' if goes_on else ''}>{_head(runs)}<nav>{links}</nav>{body}"
        f"<script>{script}</script></body></html>\n"
    )


class Figure(NamedTuple):
    """Holds a figure of a run, its name, and a remark."""

    name: str
    value: str
    remark: str = ""


def _head(runs: Sequence[Run]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if len(runs) > 1:
        rows = "".join(
            f'<tr><th scope="row"><span class="key c{i % COLORS}"></span>{escape(run.name)}</th>'
            + "".join(f'<td class="n">{f.value}<small>{f.remark}</small></td>' for f in _figures(run))
            + "</tr>"
            for i, run in enumerate(runs)
        )
        names = "".join(f'<th class="n">{figure.name}</th>' for figure in _figures(runs[0]))
        table = f'<div class="wide card"><table><thead><tr><th>run</th>{names}</tr></thead>{rows}</table></div>'
        about = f'<p class="faint">{len(runs)} runs · written {written}</p>'
        return f"<header><h1>Comparison</h1>{about}</header>{table}{_differences(runs)}"
    (run,) = runs
    model, data = run.config.get("model", {}), run.config.get("data", {})
    parts = model.get("model"), model.get("backbone"), data.get("dataset"), f"written {written}"
    about = " · ".join(str(part) for part in parts if part)
    tiles = "".join(
        f'<li><span class="faint">{f.name}</span><b>{f.value}</b><span class="faint">{f.remark}</span></li>'
        for f in _figures(run)
    )
    return (
        f'<header><div class="title"><h1>{escape(run.name)}</h1>{_state(run)}</div><p class="faint">{escape(about)}</p>'
        f'</header><ul class="tiles">{tiles}</ul>'
    )


def _state(run: Run) -> str:
    """Says how far the run is, and how long it will take if it goes on as fast as it did."""
    total = run.config["steps"]
    if run.is_finished:
        return '<span class="pill done">finished</span>'
    speeds = [record["images_per_second"] for record in run.losses[-10:] if record["images_per_second"]]
    left = ""
    if speeds:
        minutes, seconds = divmod(round((total - run.step) * run.config["batch_size"] / np.median(speeds)), 60)
        hours, minutes = divmod(minutes, 60)
        left = f", {hours} h {minutes} min left" if hours else f", {minutes} min {seconds} s left"
    return (
        f'<span class="pill">{100 * run.step / total:.0f} %{left}</span>'
        '<label class="refresh" hidden><input type="checkbox" checked>refresh</label>'
        f'<progress max="{total}" value="{run.step}" aria-label="steps"></progress>'
    )


def _differences(runs: Sequence[Run]) -> str:
    """Lists the settings of each run that are not those of the first."""
    first, *others = (Config.from_json(run.config) for run in runs)
    changes = ("; ".join(differences(first, other)) or "the same settings" for other in others)
    items = (f"<li><b>{escape(run.name)}</b> {escape(text)}</li>" for run, text in zip(runs[1:], changes, strict=True))
    return f"<p>Settings that differ from those of {escape(runs[0].name)}:</p><ul>{''.join(items)}</ul>"


def _figures(run: Run) -> list[Figure]:
    """Returns the most important figures of a run."""
    score, loss = (run.scores or [{}])[-1], (run.losses or [{}])[-1]
    best, speeds = score.get("best", {}), [record["images_per_second"] for record in run.losses]
    return [
        Figure("step", f"{run.step:,}", f"of {run.config['steps']:,}"),
        Figure("mIoU", f"{percent(score.get('miou'))} %", f"at step {score['step']:,}" if score else ""),
        Figure("best mIoU", f"{percent(best.get('miou'))} %", f"at step {best['step']:,}" if "step" in best else ""),
        Figure("mean Dice", f"{percent(score.get('mean_dice'))} %", "F1 of the classes"),
        Figure("pixels right", f"{percent(score.get('aacc'))} %", "of all labelled"),
        Figure("loss", f"{loss['loss']:.4f}" if _has(loss, "loss") else "–", "in training"),
        Figure("speed", f"{np.median(speeds):.1f}" if speeds else "–", "images/s, median"),
        Figure("memory", f"{loss['memory_mib']:,}" if _has(loss, "memory_mib") else "–", "MiB at most"),
    ]


def _curves(runs: Sequence[Run]) -> str:
    def chart(title: str, records: str, names: dict[str, str], in_percent: bool = False) -> str:
        drawn = [
            Line(run.name if several else name, [(r["step"], r[key]) for r in getattr(run, records) if _has(r, key)])
            for run in runs
            for key, name in names.items()
        ]
        return lines(title, drawn, in_percent)

    several = len(runs) > 1
    more = {"context_miou": "context mIoU", "mean_dice": "mean Dice", "aacc": "pixels right"}
    parts = [key for key in (runs[0].losses[-1] if runs[0].losses else ()) if "." in key and "loss" in key]
    losses = ["loss"] if several or len(parts) < 2 else ["loss", *parts]
    charts = [
        chart(
            "mIoU on the validation images" if several else "Scores on the validation images",
            "scores",
            {"miou": "mIoU"} if several else {"miou": "mIoU"} | more,
            True,
        ),
        chart("Training loss", "losses", {key: key for key in losses}),
        chart("Loss on the validation images", "scores", {"val_loss": "loss"}),
        chart("Learning rate", "losses", {"lr": "learning rate"}),
        chart("Speed", "losses", {"images_per_second": "images a second"}),
        chart("Memory at most", "losses", {"memory_mib": "MiB"}),
        *(_distribution(run, several) for run in runs),
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _distribution(run: Run, named: bool) -> str:
    """Draws how many images have which mIoU."""
    values = [image.miou for image in run.images if not np.isnan(image.miou)]
    if not values:
        return ""
    mean, median = (percent(float(average(values))) for average in (np.mean, np.median))
    of_run = f" of {run.name}" if named else ""
    title = f"mIoU of every validation image{of_run}"
    return histogram(title, values, f"{len(values):,} images, mean {mean} %, median {median} %")


def _has(record: dict[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _classes(runs: Sequence[Run]) -> str:
    scored = [run for run in runs if run.scores]
    if not scored:
        return ""
    if len(scored) > 1:
        return tables.compared_classes([run.name for run in scored], [run.scores[-1]["iou"] for run in scored])
    (run,) = scored
    return tables.classes(run.scores, None if run.confusion is None else run.confusion.sum(1), run.palette)


def _confusion(run: Run, number: int) -> str:
    if run.confusion is None:
        return ""
    return tables.confusion(run.confusion, run.classes, str(number), str(run.folder / "confusion.png"))


def _previews(run: Run, number: int, budget: int) -> str:
    if run.previews is None or not run.previews.steps or not run.scores:
        return ""
    grids = pictures.grids(run.previews, f"preview-{number}", budget)
    listed = pictures.legend(run.previews, run.classes)
    return f'<div class="previews">{listed}{grids}</div>'


def _worst(run: Run, number: int, budget: int) -> str:
    if run.worst is None or not run.worst.samples or not run.scores:
        return ""
    scores = {image.name: image for image in run.images}
    remarks = [
        f"{sample.name}: {percent(1 - found.aacc)} % wrong, mIoU {percent(found.miou)} %"
        if (found := scores.get(sample.name))
        else sample.name
        for sample in run.worst.samples
    ]
    grids = pictures.grids(run.worst, f"worst-{number}", budget, remarks)
    about = f'<p class="faint">The scores of every image are in {escape(str(run.folder / "images.csv"))}.</p>'
    return f'{about}<div class="worst">{grids}</div>'


def _commands(run: Run) -> str:
    folder = shlex.quote(str(run.folder))
    model = FINAL if (run.folder / FINAL).exists() else BEST
    evaluate, predict = f"apcnet evaluate {folder}", f"apcnet predict {folder} PHOTOS --out seen"
    commands = [
        ("Evaluate it, with boundaries and calibration", f"{evaluate} --boundary --calibration --out {folder}/scores"),
        ("Label other images", predict),
        ("Export it, to use it without this package", f"apcnet export {folder}/{model} model.onnx"),
    ]
    items = "".join(
        f"<li><span>{escape(title)}</span><pre><code>{escape(command)}</code></pre>"
        '<button type="button" class="copy" hidden>copy</button></li>'
        for title, command in _training_commands(run) + commands
    )
    return f'<ul class="commands">{items}</ul>'


def _training_commands(run: Run) -> list[tuple[str, str]]:
    """Returns the commands that train the run and go on with it; none if it was started with objects of Python."""
    config = Config.from_json(run.config)
    if "own" in (config.data.dataset, config.model.model):
        return []
    commands = [("Train this run; the same command goes on where it stopped", config)]
    if run.is_finished:
        longer = replace(config, steps=2 * config.steps)
        commands.append((f"Go on, to {longer.steps:,} steps", longer))
    return [(title, shlex.join(train_command(wanted, str(run.folder)))) for title, wanted in commands]


def _settings(run: Run) -> str:
    environment = tables.settings({"environment": run.environment}) if run.environment else ""
    return (
        f"<details open><summary>Configuration</summary>{tables.settings(run.config)}</details>"
        f"<details><summary>Environment</summary>{environment}</details>"
    )


def _read_images(path: Path) -> list[Image]:
    """Reads the scores of every image."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Image(row["image"], *(float(row[key] or "nan") for key in ("aacc", "miou"))) for row in csv.DictReader(file)
        ]


def _distinct(names: Sequence[str]) -> list[str]:
    """Numbers the names that occur more than once."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
