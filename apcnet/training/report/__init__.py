"""Writes the report of a run: one HTML file with curves, scores, pictures and settings, which opens without a network.

`apcnet train` writes report.html into the run's folder after every evaluation; `apcnet compare` writes one of several
runs. The page is complete without scripts. Pictures are embedded, reduced so that the file stays below 5 MB.
"""

import base64
import io
import json
import shlex
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from apcnet.config import Config, differences
from apcnet.confusion import percent
from apcnet.files import read_json, replacing
from apcnet.training import log
from apcnet.training.folder import BEST, FINAL
from apcnet.training.report.charts import Line, lines, trend

NAME = "report.html"
MOST_PREVIEWS, PICTURE_BYTES = 24, 2_400_000  # all pictures together, before base64 makes them a third larger
LARGEST_MATRIX = 60  # classes: a larger confusion matrix would be megabytes of cells that nobody can read


class Run(NamedTuple):
    """Holds the files of a run that a report shows."""

    name: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    losses: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    confusion: np.ndarray | None

    @property
    def steps(self) -> int:
        """Returns the step that the run has reached."""
        return max((record["step"] for record in (*self.losses, *self.scores)), default=0)


def read(folder: str | Path) -> Run:
    """Reads the files of a run."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a run, found no config.json in it")
    environment, matrix = folder / "environment.json", folder / "confusion.npy"
    records = log.read(folder)
    return Run(
        folder.resolve().name,
        folder,
        read_json(folder / "config.json"),
        read_json(environment) if environment.exists() else {},
        [record for record in records if "miou" not in record],
        [record for record in records if "miou" in record],
        np.load(matrix) if matrix.exists() else None,
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


def page(runs: Sequence[Run]) -> str:
    """Returns the HTML of a report."""
    files = resources.files("apcnet.training.report")
    style, script = ((files / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = " and ".join(run.name for run in runs)
    budget = PICTURE_BYTES // len(runs)
    body = "".join(
        [
            _head(runs),
            _curves(runs),
            _classes(runs),
            *(_confusion(run, len(runs) > 1) for run in runs),
            *(_pictures(run, budget, len(runs) > 1) for run in runs),
            *(_settings(run) for run in runs),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)} – apcnet</title><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body>{body}<script>{script}</script></body></html>\n"
    )


class Figure(NamedTuple):
    """Holds a figure of a run, its name, and a remark."""

    name: str
    value: str
    remark: str = ""


def _head(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        rows = "".join(
            f'<tr><td><span class="key c{i % 6}"></span>{escape(run.name)}</td>'
            + "".join(f'<td class="n">{f.value} <span class="faint">{f.remark}</span></td>' for f in _figures(run))
            + "</tr>"
            for i, run in enumerate(runs)
        )
        names = "".join(f'<th class="n">{figure.name}</th>' for figure in _figures(runs[0]))
        table = f'<div class="wide"><table><tr><th>run</th>{names}</tr>{rows}</table></div>'
        return f"<h1>Comparison</h1>{table}{_differences(runs)}"
    (run,) = runs
    model, data = run.config.get("model", {}), run.config.get("data", {})
    about = " · ".join(str(v) for v in (model.get("model"), model.get("backbone"), data.get("dataset")) if v)
    tiles = "".join(f"<li><b>{figure.value}</b>{figure.name} {figure.remark}</li>" for figure in _figures(run))
    return f'<h1>{escape(run.name)}</h1><p class="faint">{escape(about)}</p><ul class="tiles">{tiles}</ul>'


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
        Figure("step", f"{run.steps:,}", f"of {run.config['steps']:,}"),
        Figure("mIoU", percent(score.get("miou")), "%"),
        Figure("best mIoU", percent(best.get("miou")), f"% at step {best['step']:,}" if best else ""),
        Figure("aAcc", percent(score.get("aacc")), "%"),
        Figure("loss", f"{loss['loss']:.4f}" if _has(loss, "loss") else "–"),
        Figure("images a second", f"{np.median(speeds):.1f}" if speeds else "–"),
        Figure("memory", f"{loss['memory_mib']:,}" if loss else "–", "MiB"),
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
    scores = {"miou": "mIoU"} if several else {"miou": "mIoU", "context_miou": "context mIoU"} | {"aacc": "aAcc"}
    parts = [key for key in (runs[0].losses[-1] if runs[0].losses else ()) if "." in key and "loss" in key]
    losses = ["loss"] if several or len(parts) < 2 else ["loss", *parts]
    charts = [
        chart(
            "mIoU on the validation images" if several else "Scores on the validation images", "scores", scores, True
        ),
        chart("Loss", "losses", {key: key for key in losses}),
        chart("Learning rate", "losses", {"lr": "learning rate"}),
        chart("Images a second", "losses", {"images_per_second": "images a second"}),
    ]
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'


def _has(record: dict[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _classes(runs: Sequence[Run]) -> str:
    scored = [run for run in runs if run.scores]
    if not scored:
        return ""
    several = len(scored) > 1
    names = list(dict.fromkeys(name for run in scored for name in run.scores[-1]["iou"]))
    rows = []
    for name in names:
        values = [run.scores[-1]["iou"].get(name) for run in scored]
        bars = "".join(f'<i class="c{i % 6}" style="width:{100 * (v or 0):.1f}%"></i>' for i, v in enumerate(values))
        numbers = "".join(f'<td class="n">{percent(value)}</td>' for value in values)
        history = "" if several else f"<td>{trend([r['iou'].get(name) for r in scored[0].scores])}</td>"
        rows.append(f'<tr><td>{escape(name)}</td><td class="bar">{bars}</td>{numbers}{history}</tr>')
    heads = "".join(f'<th class="n">{escape(run.name) if several else "IoU, %"}</th>' for run in scored)
    history = "" if several else "<th>trend</th>"
    return (
        f'<h2>Classes</h2><div class="wide"><table><tr><th>class</th><th></th>{heads}{history}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _confusion(run: Run, named: bool) -> str:
    if run.confusion is None or not run.scores:
        return ""
    counts, names = run.confusion.astype(float), list(run.scores[-1]["iou"])
    title = f"<h2>Confusion{f' of {escape(run.name)}' if named else ''}</h2>"
    if len(names) > LARGEST_MATRIX or counts.shape != (len(names), len(names)):
        return f"{title}<p>For {len(names)} classes, see {escape(str(run.folder / 'confusion.png'))}.</p>"
    kinds = (
        ("recall", 1, "how the pixels of a class were predicted"),
        ("precision", 0, "which pixels were predicted as a class"),
    )
    choices = "".join(
        f'<label><input type="radio" name="share-{escape(run.name)}" value="{kind}"{" checked" if axis else ""}> '
        f"{kind}: {text}</label>"
        for kind, axis, text in kinds
    )
    tables = "".join(
        f'<div class="share" data-share="{kind}"><p class="faint">Rows are true classes, columns predicted ones; '
        f"per cent of each {'row' if axis else 'column'}.</p>{_matrix(counts, names, axis)}</div>"
        for kind, axis, _ in kinds
    )
    return f'{title}<div><form class="choice" hidden>{choices}</form>{tables}</div>'


def _matrix(counts: np.ndarray, names: Sequence[str], axis: int) -> str:
    shares = counts / np.maximum(counts.sum(axis, keepdims=True), 1)
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            share = shares[i, j]
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            hue, strength = ("right" if i == j else "wrong"), np.sqrt(share)
            title = f"{name} predicted as {other}: {100 * share:.2f} %, {counts[i, j]:,.0f} pixels"
            style = f"--hue:var(--{hue});--share:{strength:.2f}"
            strong = ' class="strong"' if strength > 0.6 else ""
            cells.append(f'<td{strong} style="{style}" title="{escape(title)}">{text}</td>')
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table class="matrix"><thead><tr><td></td>{heads}</tr></thead>{"".join(rows)}</table></div>'
    )


def _pictures(run: Run, budget: int, named: bool) -> str:
    files = sorted((run.folder / "preview").glob("[0-9]*.png"))
    if len(files) > MOST_PREVIEWS:
        files = [files[i] for i in np.linspace(0, len(files) - 1, MOST_PREVIEWS).round().astype(int)]
    worst = run.folder / "worst.png"
    shown = [*files, worst] if worst.exists() else files
    if not shown:
        return ""
    of_run = f" of {escape(run.name)}" if named else ""
    previews = "".join(
        f"<figure><figcaption>step {int(file.stem):,}</figcaption>{_embedded(file, budget // len(shown))}</figure>"
        for file in files
    )
    parts = [f'<h2>Previews{of_run}</h2><div class="pictures previews">{previews}</div>'] if files else []
    if worst.exists():
        parts.append(
            f'<h2>Worst images{of_run}</h2><div class="pictures">{_embedded(worst, budget // len(shown))}</div>'
        )
    return "".join(parts)


def _embedded(file: Path, budget: int) -> str:
    """Returns an image element with a picture as JPEG, reduced until it fits."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    for width in (1200, 900, 700, 500, 360):
        reduced = picture
        if picture.width > width:
            reduced = picture.resize((width, max(1, picture.height * width // picture.width)), Image.Resampling.BOX)
        buffer = io.BytesIO()
        reduced.save(buffer, "JPEG", quality=85)
        if buffer.tell() <= budget:
            break
    data = base64.b64encode(buffer.getvalue()).decode()
    name = f"{file.parent.name} {file.stem}: image, truth, prediction and error"
    return (
        f'<img src="data:image/jpeg;base64,{data}" width="{reduced.width}" height="{reduced.height}" '
        f'alt="{escape(name)}" loading="lazy">'
    )


def _settings(run: Run) -> str:
    folder = shlex.quote(str(run.folder))
    model = FINAL if (run.folder / FINAL).exists() else BEST
    commands = (
        f"apcnet evaluate {folder} --out {folder}/scores        # score it again\n"
        f"apcnet predict {folder} PHOTOS --out seen        # label other images\n"
        f"apcnet export {folder}/{model} model.onnx        # use it without PyTorch"
    )
    settings = json.dumps({"config": run.config, "environment": run.environment}, indent=2, ensure_ascii=False)
    return (
        f"<h2>{escape(run.name)}: what to do next</h2><pre>{escape(commands)}</pre>"
        f"<details><summary>Settings and environment</summary><pre>{escape(settings)}</pre></details>"
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Numbers the names that occur more than once."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
