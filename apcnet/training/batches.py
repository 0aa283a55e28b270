"""Draws the first batches of a training run: augmented crops with their labels, as the network would get them."""

from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

from apcnet import draw
from apcnet.config import Config
from apcnet.data.levels import visible
from apcnet.data.sample import Dataset
from apcnet.data.stream import Batches
from apcnet.draw.text import built_in, written
from apcnet.training.start import augmentation

SAMPLES, COLUMNS = 12, 3  # crops, and how many pairs of pictures stand side by side
SIDE, GAP, LINE = 260, 10, 24  # pixels of the longer side of a picture, between pictures, and of a line of text


def sheet(config: Config, data: Dataset) -> Image.Image:
    """Draws the first SAMPLES crops of a run: the image, and beside it the labels over the image.

    Args:
        config: The config of the run; its data section decides the augmentation, its seed the order and the draws.
        data: The training images.
    """
    channels = data[0].image.shape[0]
    plain = SimpleNamespace(mean=(0.0,) * channels, std=(1.0,) * channels)  # the levels of pixels, not normalised
    batches = Batches(data, augmentation(config.data, plain), config.seed, config.batch_size)
    drawn = [batches.sample(position) for position in range(SAMPLES)]
    clear = draw.backgrounds(data.classes, data.palette)
    cells, present = [], set()
    for levels, labels, name in drawn:
        shown = visible(levels if channels != 3 else levels.round().clamp(0, 255).byte())
        over = draw.overlay(shown, labels, data.palette, clear=clear)
        pictures = [_fitted(Image.fromarray(shown.permute(1, 2, 0).numpy())), _fitted(over)]
        cells.append((pictures, name))
        present |= {label for label in np.unique(labels).tolist() if label < len(data.classes)}
    wide, high = max(p.width for pair, _ in cells for p in pair), max(p.height for pair, _ in cells for p in pair)
    cell = 2 * wide + 3 * GAP, high + LINE + GAP
    below = draw.legend(sorted(present), data.classes, data.palette, COLUMNS * cell[0] + GAP, clear=clear)
    rows = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (below.width, LINE + GAP + rows * cell[1] + below.height), draw.PAPER)
    pen = ImageDraw.Draw(page)
    title = f"The first {len(cells)} crops of training, seed {config.seed}: the image, and its labels over it"
    pen.text((GAP, GAP + LINE // 2), title, draw.INK, built_in(16), anchor="lm")
    for i, (pictures, name) in enumerate(cells):
        left, top = GAP + i % COLUMNS * cell[0], LINE + GAP + i // COLUMNS * cell[1]
        for j, picture in enumerate(pictures):
            page.paste(picture, (left + j * (wide + GAP // 2), top + GAP))
        caption = written(name, i, 13, 2 * wide)
        pen.text((left, top + GAP + high + LINE // 2), caption.text, draw.FAINT, caption.font, anchor="lm")
    page.paste(below, (0, page.height - below.height))
    return page


def _fitted(picture: Image.Image) -> Image.Image:
    """Resizes a picture to SIDE pixels a side; small ones are enlarged, pixel by pixel."""
    factor = SIDE / max(picture.size)
    method = Image.Resampling.BOX if factor < 1 else Image.Resampling.NEAREST
    return picture.resize([max(1, round(side * factor)) for side in picture.size], method)
