"""Draws confusion matrices: recall in the cells, and the recall, precision and IoU of every class beside them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from apcnet.draw.colors import PAPER, Color
from apcnet.draw.text import Written, built_in, text_size, upright, written

INK, FAINT = (38, 42, 50), (124, 129, 139)
# The darkest colours of a confusion matrix, on the diagonal and off it.
RIGHT_SHARE, WRONG_SHARE = (16, 66, 148), (196, 18, 40)
BAR = (203, 220, 246)  # of the scores beside the matrix
COLUMN = 84  # pixels of a score beside the matrix


def confusion(matrix: Tensor | np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Draws a confusion matrix; each row shows how the pixels of one true class were predicted.

    Correct predictions are blue and wrong ones red. The colour grows with the square root of the share, so that a few
    per cent are visible. Cells show per cent where there is room, and their diagonal is recall. Columns on the right
    show recall, precision and IoU of every class. Names of classes without pixels are faint.

    Args:
        matrix: (K, K) counts; rows are targets, columns are predictions, as in `ConfusionMatrix.matrix`.
        classes: Name of each class.
    """
    counts = torch.as_tensor(matrix).double().cpu().numpy()
    if counts.shape != (len(classes), len(classes)) or not len(classes):
        raise ValueError(f"matrix: expected ({len(classes)}, {len(classes)}), a row for each class, got {counts.shape}")
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    cell = min(max(960 // len(classes), 15), 84)
    side, size = cell * len(classes), min(max(cell - 3, 11), 16)
    names = [written(name, i, size, 220) for i, name in enumerate(classes)]
    name_width = max(name.width for name in names) + 10
    big, small = built_in(text_size(side)), built_in(14)
    about = [
        ("Confusion matrix", built_in(20), INK),
        ("Each row: how the pixels of a true class were predicted, in per cent.", small, INK),
        ("The diagonal is recall; precision and IoU stand beside it.", small, INK),
    ]
    margin, title, key, line = 24, 36, _key(), 24
    left = margin + title + name_width
    top = margin + line * len(about) + title + name_width
    text_width = math.ceil(max(font.getlength(text) for text, font, _ in about))
    width = max(left + side + 20 + 3 * COLUMN, left + key.width, margin + text_width)
    page = Image.new("RGB", (width + margin, top + side + key.height + 2 * margin), PAPER)
    page.paste(_heat(shares, cell), (left, top))
    draw = ImageDraw.Draw(page)
    for i, (text, font, ink) in enumerate(about):
        draw.text((margin, margin + i * line + (line // 2 if i else 6)), text, ink, font, anchor="lm")
    caption = margin + line * len(about) + 14
    draw.text((left + side // 2, caption), "prediction", INK, big, anchor="mm")
    truth = Written("truth", big)
    upright(page, margin + 10, top + (side + truth.width) // 2, truth, INK)
    for i, (name, total) in enumerate(zip(names, totals[:, 0], strict=True)):
        middle, ink = i * cell + cell // 2, INK if total else FAINT
        draw.text((left - 8, top + middle), name.text, ink, name.font, anchor="rm")
        upright(page, left + middle, top - 8, name, ink)
    if cell >= 26:
        number = built_in(min(cell * 2 // 5, 20))
        for i, j in np.argwhere(shares >= 0.005):
            place = left + j * cell + cell // 2, top + i * cell + cell // 2
            draw.text(place, f"{100 * shares[i, j]:.0f}", PAPER if shares[i, j] > 0.2 else INK, number, anchor="mm")
    _draw_scores(draw, counts, (left + side + 20, top), cell, size)
    page.paste(key, (left - 4, top + side + margin))
    return page


def _draw_scores(draw: ImageDraw.ImageDraw, counts: np.ndarray, place: tuple[int, int], cell: int, size: int) -> None:
    """Draws recall, precision and IoU of every class, as bars with numbers."""
    hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    columns = {"recall": labelled, "precision": predicted, "IoU": labelled + predicted - hits}
    font, (left, top) = built_in(size), place
    for number, (name, whole) in enumerate(columns.items()):
        x = left + number * COLUMN
        draw.text((x, top - 8), name, INK, built_in(14), anchor="ls")
        for i, (part, total) in enumerate(zip(hits, whole, strict=True)):
            middle, half = top + i * cell + cell // 2, min(cell // 2 - 2, 9)
            share = part / total if total else 0.0
            if share:
                draw.rectangle((x, middle - half, x + round((COLUMN - 14) * share), middle + half), BAR)
            text, ink = (f"{100 * share:.1f}", INK) if total else ("-", FAINT)
            draw.text((x + 3, middle), text, ink, font, anchor="lm")


def _heat(shares: np.ndarray, cell: int) -> Image.Image:
    """Draws the cells of a confusion matrix with light lines between them."""
    darkest = np.where(np.eye(len(shares), dtype=bool)[..., None], RIGHT_SHARE, WRONG_SHARE)
    colors = _shades(shares, darkest).repeat(cell, 0).repeat(cell, 1)
    colors[cell - 1 :: cell] = colors[:, cell - 1 :: cell] = PAPER
    return Image.fromarray(colors)


def _shades(shares: np.ndarray, darkest: Color | np.ndarray) -> np.ndarray:
    """Returns colours from nearly white to the darkest, by the square root of the shares; RGB is the last axis."""
    pale = np.array([242, 243, 246])
    return np.round(pale + np.sqrt(shares)[..., None] * (darkest - pale)).astype(np.uint8)


def _key() -> Image.Image:
    """Draws the colour scale of a confusion matrix."""
    font, width, height, left = built_in(13), 260, 12, 4
    sheet = Image.new("RGB", (width + 64, 76), PAPER)
    draw = ImageDraw.Draw(sheet)
    shares = np.broadcast_to(np.linspace(0, 1, width) ** 2, (height, width))
    for top, darkest, name in ((0, RIGHT_SHARE, "right"), (height + 6, WRONG_SHARE, "wrong")):
        sheet.paste(Image.fromarray(_shades(shares, darkest)), (left, top))
        draw.text((left + width + 10, top + height // 2), name, INK, font, anchor="lm")
    bottom = 2 * height + 6
    for share in (0, 1, 10, 25, 50, 100):
        place = left + round((width - 1) * math.sqrt(share / 100))
        draw.line((place, bottom + 1, place, bottom + 4), FAINT)
        draw.text((place, bottom + 14), str(share), FAINT, font, anchor="mm")
    draw.text((left, bottom + 36), "per cent of the true pixels of a class", FAINT, font, anchor="lm")
    return sheet
