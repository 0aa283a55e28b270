"""Draws the previews and the worst images of a run: image, truth, prediction and error, as layers inside HTML.

A photo is embedded once and shown by reference below all its labels and errors, which are small PNGs of few colours.
"""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from apcnet import draw
from apcnet.training import panels

MOST_STEPS = 24
Palette = Sequence[draw.Color]


class Step(NamedTuple):
    """Holds the predictions of the samples after a step of training."""

    step: int
    predictions: list[np.ndarray]


class Gallery(NamedTuple):
    """Holds samples, what was predicted of them in one step or in several, and the colour of each class."""

    samples: list[panels.Sample]
    steps: list[Step]
    palette: Palette


def read_previews(folder: Path) -> Gallery | None:
    """Reads the previews of a run: those of at most MOST_STEPS steps, the first and the last among them."""
    if not (folder / panels.SAMPLES).is_file():
        return None
    files = sorted(folder.glob("[0-9]*.npz"))
    if len(files) > MOST_STEPS:
        files = [files[i] for i in np.linspace(0, len(files) - 1, MOST_STEPS).round().astype(int)]
    samples, _, palette = panels.load(folder / panels.SAMPLES)
    steps = [Step(int(file.stem), panels.load(file).predictions) for file in files]
    return Gallery(samples, [step for step in steps if _fit(samples, step)], palette)


def read_worst(folder: Path) -> Gallery | None:
    """Reads the worst images of a run."""
    if not (folder / panels.WORST).is_file():
        return None
    samples, predictions, palette = panels.load(folder / panels.WORST)
    return Gallery(samples, [Step(0, predictions)], palette)


def grids(gallery: Gallery, name: str, budget: int, remarks: Sequence[str] = ()) -> str:
    """Draws a grid for each sample: its image, its truth, and for each step the prediction and its errors.

    Args:
        gallery: What to draw.
        name: Distinguishes the pictures of one gallery from those of others on the page.
        budget: Bytes that all pictures may take together, before base64 makes them a third larger.
        remarks: What to write above each sample; by default its name.
    """
    drawn, side, total = [], panels.LARGEST, budget + 1
    while total > budget and side >= 16:
        drawn = [_drawn(gallery, i, side) for i in range(len(gallery.samples))]
        total = sum(len(picture) for layers in drawn for picture in layers)
        side = int(side * min(0.8, math.sqrt(budget / total)))
    remarks = remarks or [sample.name for sample in gallery.samples]
    return "".join(_grid(gallery, i, files, f"{name}-{i}", remarks[i]) for i, files in enumerate(drawn))


def legend(gallery: Gallery, classes: Sequence[str]) -> str:
    """Lists the classes in the labels and predictions with their colours, and the colours of errors."""
    palette = gallery.palette
    maps = [sample.truth for sample in gallery.samples]
    maps += [found for step in gallery.steps for found in step.predictions]
    present = sorted({int(label) for labels in maps for label in np.unique(labels)})
    items = [(palette[label], classes[label]) for label in present if label < len(classes)]
    items += [(draw.wrong_color(palette), "wrong"), (draw.ignored_color(palette), "ignored")]
    listed = (f"<li>{swatch(color)}{escape(name)}</li>" for color, name in items)
    return f'<ul class="legend">{"".join(listed)}</ul>'


def swatch(color: draw.Color) -> str:
    """Returns a small box of a colour."""
    red, green, blue = color
    return f'<span class="swatch" style="background:#{red:02x}{green:02x}{blue:02x}"></span>'


def _fit(samples: Sequence[panels.Sample], step: Step) -> bool:
    """Tells whether predictions are those of these samples: a run may go on with other validation images."""
    shapes = [found.shape for found in step.predictions]
    return shapes == [sample.truth.shape for sample in samples]


def _drawn(gallery: Gallery, index: int, side: int) -> list[bytes]:
    """Returns the pictures of a sample as files: photo, truth, and the prediction and errors of each step."""
    sample, palette = gallery.samples[index], gallery.palette
    files = [_jpeg(_small(Image.fromarray(sample.image), side, Image.Resampling.BOX))]
    files.append(_labels(sample.truth, palette, side))
    for step in gallery.steps:
        found = step.predictions[index]
        files += [_labels(found, palette, side), _errors(sample.truth, found, palette, side)]
    return files


def _grid(gallery: Gallery, index: int, files: list[bytes], name: str, remark: str) -> str:
    sample, several, classes = gallery.samples[index], len(gallery.steps) > 1, len(gallery.palette)
    height, width = sample.truth.shape
    photo = (
        f'<svg class="store" width="0" height="0" aria-hidden="true"><image id="{escape(name)}" width="{width}" '
        f'height="{height}" preserveAspectRatio="none" href="{_address(files[0], "jpeg")}"/></svg>'
    )

    def panel(kind: str, caption: str, layers: str, step: int | None = None) -> str:
        attribute = "" if step is None else f' data-step="{step}"'
        return (
            f'<figure class="panel {kind}"{attribute}><svg viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(f"{kind} of {sample.name}")}"><use href="#{escape(name)}"/>{layers}</svg>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def layer(file: bytes) -> str:
        return f'<image width="{width}" height="{height}" preserveAspectRatio="none" href="{_address(file, "png")}"/>'

    drawn = [panel("image", "image", ""), panel("truth", "truth", layer(files[1]))]
    for (step, predictions), found, errors in zip(gallery.steps, files[2::2], files[3::2], strict=True):
        after, at = (f", step {step:,}", step) if several else ("", None)
        drawn.append(panel("prediction", f"prediction{after}", layer(found), at))
        veil = f'<rect class="veil" width="{width}" height="{height}"/>'
        caption = f"error{after}: {wrong_text(sample.truth, predictions[index], classes)}"
        drawn.append(panel("error", caption, veil + layer(errors), at))
    return f'<div class="sample"><h3>{escape(remark)}</h3>{photo}<div class="grid4">{"".join(drawn)}</div></div>'


def wrong_text(truth: np.ndarray, prediction: np.ndarray, classes: int) -> str:
    """Says which share of the labelled pixels is wrong."""
    labelled = truth < classes
    if not labelled.any():
        return "all ignored"
    return f"{100 * (prediction[labelled] != truth[labelled]).mean():.1f} % wrong"


def _labels(labels: np.ndarray, palette: Palette, side: int) -> bytes:
    """Draws labels in the colours of their classes."""
    if len(palette) >= 256:
        return _png(_small(draw.colourise(labels, palette), side, Image.Resampling.NEAREST))
    indices = np.where(labels < len(palette), labels, len(palette))
    return _indexed(indices, [(*color, 255) for color in (*palette, draw.ignored_color(palette))], side)


def _errors(truth: np.ndarray, prediction: np.ndarray, palette: Palette, side: int) -> bytes:
    """Draws wrong and ignored pixels; the others stay transparent."""
    indices = np.where(truth >= len(palette), 2, truth != prediction)
    colors = [(0, 0, 0, 0), (*draw.wrong_color(palette), 235), (*draw.ignored_color(palette), 235)]
    return _indexed(indices, colors, side)


def _indexed(indices: np.ndarray, colors: Sequence[tuple[int, ...]], side: int) -> bytes:
    """Writes a picture of at most 256 RGBA colours with a table of them, which takes a fraction of the bytes."""
    picture = _small(Image.fromarray(indices.astype(np.uint8)), side, Image.Resampling.NEAREST)
    picture.putpalette(np.array(colors, np.uint8).tobytes(), "RGBA")
    return _png(picture)


def _small(picture: Image.Image, side: int, method: Image.Resampling) -> Image.Image:
    """Reduces a picture to so many pixels a side if it is larger."""
    factor = side / max(picture.size)
    if factor >= 1:
        return picture
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))), method)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88, subsampling=0 if max(picture.size) <= 160 else 2)
    return buffer.getvalue()


def _address(file: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
