"""Draws the README's picture: a scene, its segmentation, and one point's affinities at four scales.

python -m docs.pictures       trains an APCNet on generated scenes, six minutes on one core, and draws affinities.png

The run is kept in build/pictures and not repeated. It is the third run of "four times as long" in experiments/context,
and gives the same bits on the same kind of processor.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import apcnet
from apcnet import draw
from apcnet.data.augment import normalise
from apcnet.data.sample import Sample
from apcnet.presets import preset

ROOT = Path(__file__).resolve().parents[1]
RUN, PICTURE = ROOT / "build" / "pictures" / "affinities", ROOT / "docs" / "pictures" / "affinities.png"
SCENE, POINT = 2, (45, 62)  # of the validation split; row and column

# The page is 1600 pixels wide and shown at 800: nothing on it is smaller than 22 pixels.
PANEL, GAP, MARGIN, TITLE = 384, 16, 8, 52
WIDTH = 4 * PANEL + 3 * GAP + 2 * MARGIN
NOTE = """Fabric looks alike on both sides.
The bands above and below
its half decide its class.

The ringed point weighs the
regions of every scale by its
affinities: here most along
the border. Colours show how
far an affinity lies from its
scale's mean."""
MARK, HEAT = (0, 229, 255), colormaps["inferno"]
SPREAD = 0.06  # the distance from the mean at which colours end
TITLE_SIZE, NUMBER_SIZE, SMALL_SIZE = 28, 26, 22


def main() -> None:
    torch.set_num_threads(1)
    if not (RUN / "final.safetensors").is_file():
        train(RUN)
    model = apcnet.load(RUN / "final.safetensors")
    PICTURE.parent.mkdir(exist_ok=True)
    draw.save(page(model, apcnet.data.open("synthetic", split="val", family="regional")[SCENE], POINT), PICTURE)


def train(out: Path) -> None:
    tiny = preset("tiny")
    data = replace(tiny.data, family="regional")
    apcnet.train(replace(tiny, data=data, steps=10_000, eval_every=2500, save_every=2500, seed=2), out)


def page(model: torch.nn.Module, sample: Sample, point: tuple[int, int]) -> Image.Image:
    """Draws the scene, its segmentation and the legend above the point's affinities to the regions of each scale."""
    labels = apcnet.predict(model, sample.image).labels
    sheet = Image.new("RGB", (WIDTH, 2 * (TITLE + PANEL) + GAP + MARGIN), draw.PAPER)
    scene = enlarged(Image.fromarray(sample.image.permute(1, 2, 0).numpy()))
    above = [
        ("generated scene", marked(scene, point)),
        ("segmentation", enlarged(draw.colourise(labels, model.palette))),
    ]
    for column, (title, picture) in enumerate(above):
        place(sheet, picture, title, column, row=0)
    right = MARGIN + 2 * (PANEL + GAP)
    legend(sheet, sorted(labels.unique().tolist()), model, (right + 16, TITLE))
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((right + PANEL + GAP, TITLE - 4), NOTE, draw.INK, font(TITLE_SIZE - 2), spacing=12)
    maps = model.context_maps(normalise(sample.image, model.mean, model.std)[None])
    y, x = (int(places[i]) for places, i in zip(maps.places(sample.image.shape[1:]), point, strict=True))
    for column, (scale, affinity) in enumerate(zip(maps.scales, maps.affinities, strict=True)):
        its = affinity[0, :, y, x].view(scale, scale)
        place(sheet, marked(heat(scene, its), point), f"affinities to {scale} by {scale} regions", column, row=1)
    return sheet


def place(sheet: Image.Image, picture: Image.Image, title: str, column: int, row: int) -> None:
    left, top = MARGIN + column * (PANEL + GAP), row * (TITLE + PANEL + GAP)
    ImageDraw.Draw(sheet).text((left, top + TITLE // 2), title, draw.INK, font(TITLE_SIZE), anchor="lm")
    sheet.paste(picture, (left, top + TITLE))


def enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize((PANEL, PANEL), Image.Resampling.NEAREST)


def heat(scene: Image.Image, affinity: Tensor) -> Image.Image:
    """Lays the s×s regions over the scene in grey, each in the colour of its affinity and with its number."""
    side, step = len(affinity), PANEL // len(affinity)
    above_mean = (affinity - affinity.mean()).numpy() / (2 * SPREAD) + 0.5
    colors = np.uint8(255 * HEAT(0.1 + 0.75 * above_mean.clip(0, 1))[..., :3])
    shades = Image.fromarray(colors).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    picture = Image.blend(scene.convert("L").convert("RGB"), shades, 0.7)
    pen, size = ImageDraw.Draw(picture), NUMBER_SIZE if side < 6 else SMALL_SIZE
    for y, x in np.ndindex(side, side):
        box = x * step, y * step, (x + 1) * step, (y + 1) * step
        pen.rectangle(box, outline=draw.PAPER, width=1)
        number = f"{affinity[y, x]:.2f}".removeprefix("0")
        middle = x * step + step // 2, y * step + step // 2
        pen.text(middle, number, draw.PAPER, font(size), anchor="mm", stroke_width=3, stroke_fill=(20, 20, 24))
    return picture


def marked(picture: Image.Image, point: tuple[int, int]) -> Image.Image:
    """Draws a ring around a pixel of the scene."""
    picture, scale = picture.copy(), PANEL // 96
    y, x = (round((p + 0.5) * scale) for p in point)
    pen = ImageDraw.Draw(picture)
    for radius, color, width in ((15, draw.INK, 8), (13, MARK, 4)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=width)
    return picture


def legend(sheet: Image.Image, present: list[int], model: torch.nn.Module, corner: tuple[int, int]) -> None:
    left, top = corner
    pen = ImageDraw.Draw(sheet)
    for i, label in enumerate(present):
        y = top + 8 + i * 42
        pen.rounded_rectangle((left, y, left + 28, y + 28), 6, model.palette[label])
        pen.text((left + 44, y + 14), model.classes[label], draw.INK, font(TITLE_SIZE - 2), anchor="lm")


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


if __name__ == "__main__":
    main()
