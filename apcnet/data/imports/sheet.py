"""Draws a sheet of twelve imported samples, image, mask and both together, so that a mistake is seen at a glance."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from apcnet import draw
from apcnet.data.classes import Color
from apcnet.data.files import checked_form, image_size, read_as
from apcnet.data.imports.source import Item
from apcnet.data.levels import visible

EXAMPLES, COLUMNS = 12, 2  # samples, and how many stand side by side
SIDE, GAP = 220, 12  # pixels of the longer side of a picture, and between pictures


def write(path: Path, items: Sequence[Item], counts: Sequence[Counter], names: Sequence[str], palette: Sequence[Color]):
    """Draws samples that show every class if twelve can, and saves the sheet."""
    chosen = choose(counts)
    rows = [_panels(items[i], names, palette) for i in chosen]
    height = max(picture.height for row in rows for picture in row)
    cell = 3 * SIDE + 3 * GAP, height + 2 * GAP + 8
    lines = -(-len(rows) // COLUMNS)
    present = sorted({label for i in chosen for label in counts[i]})
    below = draw.legend(present, names, palette, COLUMNS * cell[0])
    page = Image.new(
        "RGB", (max(COLUMNS * cell[0] + GAP, below.width), lines * cell[1] + GAP + below.height), draw.PAPER
    )
    pen = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        left, top = GAP + i % COLUMNS * cell[0], GAP + i // COLUMNS * cell[1]
        for j, picture in enumerate(row):
            page.paste(picture, (left + j * (SIDE + GAP // 2), top))
        caption = f"{items[chosen[i]].split}/{items[chosen[i]].name}".encode("ascii", "replace").decode()
        pen.text((left, top + height + 4), caption, draw.FAINT)
    page.paste(below, (0, page.height - below.height))
    draw.save(page, path)


def choose(counts: Sequence[Counter]) -> list[int]:
    """Chooses the samples: for each class, rarest first, the one that shows most of it, and then others evenly."""
    holding = Counter(label for count in counts for label in count if label != 255)
    chosen: list[int] = []
    for label in sorted(holding, key=lambda label: (holding[label], label)):
        if len(chosen) < EXAMPLES and not any(counts[i][label] for i in chosen):
            chosen.append(max(range(len(counts)), key=lambda i: counts[i][label] / max(1, counts[i].total())))
    others = [i for i in range(len(counts)) if i not in chosen]
    wanted = min(EXAMPLES - len(chosen), len(others))
    return sorted(chosen + [others[i * len(others) // wanted] for i in range(wanted)])


def _panels(item: Item, names: Sequence[str], palette: Sequence[Color]) -> list[Image.Image]:
    """Returns the image, the mask in colours and both together, in one size."""
    image = visible(read_as(item.image, checked_form(item.image)))
    labels = torch.from_numpy(item.mask(image_size(item.image)))
    factor = SIDE / max(labels.shape)
    size = max(1, round(labels.shape[1] * factor)), max(1, round(labels.shape[0] * factor))
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    clear = draw.backgrounds(names, palette)
    pictures = photo, draw.colourise(labels, palette), draw.overlay(image, labels, palette, clear=clear)
    method = Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST
    return [picture.resize(size, method) for picture in pictures]
