"""Draws the pictures of the report: bars, the predictions of each head, and APCNet's affinities."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from apcnet import draw
from apcnet.data.augment import normalise
from apcnet.data.sample import IGNORE, Sample
from apcnet.data.synthetic import Synthetic
from apcnet.files import replacing
from apcnet.inference.prediction import predict
from apcnet.zoo import load
from experiments.context.estimates import Estimate

CONTEXT, OTHERS, INK = "#3b6fb6", "#c9ced6", "#262a32"
SCENES = 4  # in the grid, for each family


def bars(path: Path, families: Mapping[str, Mapping[str, Mapping[str, Estimate]]]) -> None:
    """Draws the mIoU of context classes and of the others, with one panel for each family.

    Bars are means, whiskers are standard deviations over seeds; families[family][head][measure] is the estimate.
    """
    heads = list(next(iter(families.values())))
    kinds = (("context_miou", CONTEXT, "context decides the class", -0.2), ("other_miou", OTHERS, "it does not", 0.2))
    figure = Figure(figsize=(10, 0.5 * len(heads) + 1.2))
    panels = figure.subplots(1, len(families), sharey=True)
    for panel, (family, rows) in zip(panels, families.items(), strict=True):
        for (measure, color, label, shift), (y, head) in itertools.product(kinds, enumerate(heads)):
            estimate, place = rows[head][measure], y + shift
            mean = 100 * estimate.mean
            panel.barh(place, mean, 0.38, color=color, label=None if y else label)
            panel.text(102, place, f"{mean:.1f}", va="center", fontsize=7, color=INK)
            panel.errorbar(mean, place, xerr=100 * estimate.deviation, color=INK, capsize=2.5, lw=1)
        panel.set(title=f"{family} scenes", xlim=(0, 110), xlabel="mIoU of these classes, per cent")
        panel.set_xticks(range(0, 101, 20))
        panel.set_yticks(range(len(heads)), heads)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    _save(figure, path)


def scenes(path: Path, models: Mapping[str, Mapping[str, Path]], samples: Mapping[str, Sequence[Sample]]) -> None:
    """Draws a column for each scene: image, truth and each head's labels; models[family][head] are files."""
    heads = list(next(iter(models.values())))
    columns, present = [], set()
    for family, of_family in samples.items():
        rows = [[_photo(sample.image) for sample in of_family]]
        labels = [[sample.mask for sample in of_family]]
        for head in heads:
            model = load(models[family][head])
            labels.append([seen.labels for seen in predict(model, [sample.image for sample in of_family])])
        present |= {int(label) for row in labels for found in row for label in found.unique()}
        rows += [[draw.colourise(found, Synthetic.palette) for found in row] for row in labels]
        columns += [(family, column) for column in zip(*rows, strict=True)]
    names, font = ["image", "truth", *heads], ImageFont.load_default(14)
    cell = columns[0][1][0].width
    left, top, step = round(max(map(font.getlength, names))) + 20, 28, cell + 6
    width, height = left + step * len(columns), top + step * len(names)
    below = draw.legend(present, Synthetic.classes, Synthetic.palette, width)
    page = Image.new("RGB", (max(width, below.width), height + below.height), draw.PAPER)
    pen = ImageDraw.Draw(page)
    for y, name in enumerate(names):
        pen.text((left - 10, top + y * step + cell // 2), name, draw.INK, font, anchor="rm")
    for x, (family, column) in enumerate(columns):
        if x % SCENES == 0:
            pen.text((left + x * step, top // 2), f"{family} scenes", draw.INK, font, anchor="lm")
        for y, picture in enumerate(column):
            page.paste(picture, (left + x * step, top + y * step))
    page.paste(below, (0, height))
    draw.save(page, path)


def affinities(path: Path, families: Mapping[str, tuple[Path, Sample]]) -> None:
    """Draws the affinities of an APCNet in a scene of each family.

    The upper row shows the affinities of one pixel to the regions of every scale. The lower row shows the affinities of
    every pixel to one region of each scale, the one with that pixel's largest affinity. Thin lines are the borders
    between classes.
    """
    models = {family: load(file) for family, (file, _) in families.items()}
    scales = next(iter(models.values())).head.scales
    shape = 2 * len(families), 1 + len(scales)
    figure = Figure(figsize=(2.1 * shape[1], 2.25 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape)
    for row, (family, model) in enumerate(models.items()):
        sample = families[family][1]
        maps = model.context_maps(normalise(sample.image, model.mean, model.std)[None])
        pixel = marked_pixel(sample)
        place = [int(places[i]) for places, i in zip(maps.places(sample.image.shape[1:]), pixel, strict=True)]
        photo, (above, below) = _photo(sample.image), panels[2 * row : 2 * row + 2]
        extent = (0, photo.width, photo.height, 0)
        borders = np.where((sample.mask == IGNORE)[..., None], *np.array([[255, 255, 255, 90], [0, 0, 0, 0]], np.uint8))
        above[0].imshow(photo, extent=extent)
        above[0].set_title(f"{family}: a pixel ×", fontsize=9)
        below[0].imshow(draw.colourise(sample.mask, Synthetic.palette), extent=extent)
        below[0].set_title("truth", fontsize=9)
        for s, affinity, upper, lower in zip(scales, maps.affinities, above[1:], below[1:], strict=True):
            affinity = affinity[0].unflatten(0, (s, s))
            its = affinity[:, :, place[0], place[1]]
            y, x = divmod(int(its.argmax()), s)
            heats = ((upper, its, f"to {s}×{s} regions"), (lower, affinity[y, x], "of all pixels to the framed one"))
            for panel, values, title in heats:
                heat = panel.imshow(values.numpy(), extent=extent, cmap="magma", vmin=0, vmax=1)
                panel.imshow(borders, extent=extent, interpolation="nearest")
                panel.set_title(f"{title}\n{values.min():.2f} to {values.max():.2f}", fontsize=7)
            box = (x * photo.width / s, y * photo.height / s), photo.width / s, photo.height / s
            lower.add_patch(Rectangle(*box, fill=False, color="#39c2ff", lw=1.5, clip_on=False))
        for panel in (*above, below[0]):
            panel.plot(pixel[1] + 0.5, pixel[0] + 0.5, "x", color="#39c2ff", markersize=7, markeredgewidth=2)
    for panel in panels.flat:
        panel.set_axis_off()
    figure.colorbar(heat, ax=panels, shrink=0.4, label="affinity")
    _save(figure, path)


def marked_pixel(sample: Sample) -> tuple[int, int]:
    """Returns the middle one, in reading order, of the pixels whose class depends on context."""
    rows, columns = torch.isin(sample.mask.long(), torch.tensor(Synthetic.context_classes)).nonzero(as_tuple=True)
    return int(rows[len(rows) // 2]), int(columns[len(rows) // 2])


def _photo(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
