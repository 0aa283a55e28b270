"""Writes the tables of a report: classes with their scores, confusion matrices, settings."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from apcnet.confusion import percent
from apcnet.training.report.charts import COLORS, trend
from apcnet.training.report.pictures import Palette, swatch

LARGEST_MATRIX = 60  # classes: a larger confusion matrix would be megabytes of cells that nobody can read
MISTAKES = 8  # of the most frequent ones that are listed
COLUMNS = {"iou": "IoU", "dice": "Dice", "precision": "precision", "recall": "recall"}


def classes(scores: Sequence[Mapping[str, Any]], pixels: np.ndarray | None, palette: Palette | None) -> str:
    """Writes the scores of every class of one run, from its evaluations: a bar, all scores, and the trend of IoU.

    Args:
        scores: Records of the evaluations.
        pixels: Labelled pixels of each class.
        palette: RGB colour of each class.
    """
    last, total = scores[-1], max(pixels.sum(), 1) if pixels is not None else 1
    columns = {name: title for name, title in COLUMNS.items() if name in last}
    rows = []
    for i, name in enumerate(last["iou"]):
        box = swatch(palette[i]) if palette else ""
        iou = last["iou"][name]
        cells = [
            f'<th scope="row">{box}{escape(name)}</th>',
            f'<td class="bar">{_bar(0, iou)}</td>',
            *(_number(last[column].get(name)) for column in columns),
        ]
        if pixels is not None:
            cells.append(_number(pixels[i] / total))
        cells.append(f"<td>{trend([record['iou'].get(name) for record in scores])}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["<th>class</th><th></th>", *(f'<th class="n">{title}</th>' for title in columns.values())]
    if pixels is not None:
        heads.append('<th class="n">share of pixels</th>')
    head = f"<thead><tr>{''.join(heads)}<th>IoU over time</th></tr></thead>"
    return (
        '<p class="faint">Scores of the last evaluation in per cent.</p>'
        f'<div class="wide card"><table class="sortable">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def compared_classes(names: Sequence[str], last: Sequence[Mapping[str, float | None]]) -> str:
    """Writes the IoU of every class in several runs beside each other."""
    rows = []
    for name in dict.fromkeys(name for scores in last for name in scores):
        values = [scores.get(name) for scores in last]
        bars = "".join(map(_bar, range(len(values)), values))
        cells = "".join(map(_number, values))
        rows.append(f'<tr><th scope="row">{escape(name)}</th><td class="bar">{bars}</td>{cells}</tr>')
    heads = "".join(
        f'<th class="n"><span class="key c{i % COLORS}"></span>{escape(name)}</th>' for i, name in enumerate(names)
    )
    return (
        '<p class="faint">IoU of the last evaluation in per cent.</p><div class="wide card"><table class="sortable">'
        f"<thead><tr><th>class</th><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def confusion(counts: np.ndarray, names: Sequence[str], group: str, picture: str) -> str:
    """Writes a confusion matrix by rows and by columns, and its most frequent mistakes.

    Args:
        counts: (K, K); rows are true classes, columns predicted ones.
        names: Name of each class.
        group: Distinguishes the buttons from those of other matrices on the page.
        picture: File to name where the matrix is too large for a page.
    """
    counts = counts.astype(float)
    if len(names) > LARGEST_MATRIX:
        return f"<p>The matrix of {len(names)} classes is drawn in {escape(picture)}.</p>{_mistakes(counts, names)}"
    kinds = (
        ("recall", 1, "how the pixels of each true class were predicted; rows sum to 100 %, the diagonal is recall"),
        ("precision", 0, "what the pixels predicted as a class are; columns sum to 100 %, the diagonal is precision"),
    )
    choices = "".join(
        f'<label><input type="radio" name="share-{escape(group)}" value="{kind}"{" checked" if axis else ""}>'
        f"{kind}</label>"
        for kind, axis, _ in kinds
    )
    matrices = "".join(
        f'<div class="share" data-share="{kind}"><p class="faint">Shows {text}.</p>{_matrix(counts, names, axis)}</div>'
        for kind, axis, text in kinds
    )
    return (
        f'<div class="confusion"><div class="card"><form class="choice" hidden>{choices}</form>{matrices}'
        '<p class="readout faint" aria-live="polite" hidden>Point at a cell to read its share and its pixels.</p></div>'
        f"{_mistakes(counts, names)}</div>"
    )


def settings(sections: Mapping[str, Any]) -> str:
    """Writes nested settings as tables, a section each; None stands for a default, and is left out."""
    tables = []
    for title, values in _sections(sections):
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(_text(value))}</td></tr>'
            for name, value in values.items()
        )
        tables.append(f'<div class="card"><h3>{escape(title)}</h3><table class="settings">{rows}</table></div>')
    return f'<div class="cards">{"".join(tables)}</div>'


def _sections(values: Mapping[str, Any], title: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    plain = {name: value for name, value in values.items() if value is not None and not isinstance(value, dict)}
    if plain:
        yield title or "run", plain
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _sections(value, name)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bar(number: int, value: float | None) -> str:
    return f'<i class="c{number % COLORS}" style="width:{100 * (value or 0):.1f}%"></i>'


def _number(value: float | None) -> str:
    return f'<td class="n" data-value="{-1 if value is None else value:.6f}">{percent(value)}</td>'


def _mistakes(counts: np.ndarray, names: Sequence[str]) -> str:
    """Lists the pairs of classes with the most wrong pixels."""
    wrong = counts * (1 - np.eye(len(counts)))
    places = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]]
    found = [(i, j) for i, j in places if wrong[i, j]]
    if not found:
        return ""
    rows = "".join(
        f"<li><b>{escape(names[i])}</b> predicted as <b>{escape(names[j])}</b>"
        f'<span class="faint"> {100 * wrong[i, j] / counts[i].sum():.1f} % of {escape(names[i])}, '
        f"{wrong[i, j]:,.0f} pixels</span></li>"
        for i, j in found
    )
    return f'<div class="card mistakes"><h3>Most frequent mistakes</h3><ol>{rows}</ol></div>'


def _matrix(counts: np.ndarray, names: Sequence[str], axis: int) -> str:
    shares = counts / np.maximum(counts.sum(axis, keepdims=True), 1)
    heads = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for j, other in enumerate(names):
            share = shares[i, j]
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            hue, strength = ("right" if i == j else "wrong"), np.sqrt(share)
            whole = f"of {name}" if axis else f"of what is predicted as {other}"
            title = f"{name} predicted as {other}: {100 * share:.2f} % {whole}, {counts[i, j]:,.0f} pixels"
            strong = ' class="strong"' if strength > 0.6 else ""
            style = f' style="--hue:var(--{hue});--share:{strength:.2f}"' if share >= 0.0005 else ""
            cells.append(f'<td{strong}{style} title="{escape(title)}">{text}</td>')
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide"><table class="matrix"><thead><tr><td class="corner">true ↓ predicted →</td>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
