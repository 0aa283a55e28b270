"""Draws the loss and the mIoU of a run as a picture, for those who want a file."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from apcnet import draw
from apcnet.draw.text import built_in
from apcnet.training.report.charts import Point, number, scale, thinned, tick_texts

NAME = "curves.png"
TIMES = 2  # pixels per unit: lines are drawn larger and reduced, which smooths them
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 72, 28, 58, 44
LINE, GRID = (31, 111, 214), (226, 229, 234)


def curves(loss: Sequence[Point], miou: Sequence[Point]) -> Image.Image:
    """Draws two charts beside each other: the training loss, and the mIoU on the validation images, over the steps.

    Args:
        loss: (step, loss) pairs.
        miou: (step, mIoU) pairs, fractions of 1.
    """
    page = Image.new("RGB", (2 * WIDTH, HEIGHT), draw.PAPER)
    for i, (title, points, percent) in enumerate((("Training loss", loss, False), ("Validation mIoU", miou, True))):
        page.paste(_chart(title, thinned(points), percent), (i * WIDTH, 0))
    return page


def _chart(title: str, points: Sequence[Point], percent: bool) -> Image.Image:
    large = Image.new("RGB", (WIDTH * TIMES, HEIGHT * TIMES), draw.PAPER)
    pen, font = ImageDraw.Draw(large), built_in(14 * TIMES)
    bottom, top, ticks = scale(min(0, *(y for _, y in points)), max(y for _, y in points)) if points else scale(0, 1)
    left, right, steps = scale(0, max(x for x, _ in points)) if points else scale(0, 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return TIMES * across, TIMES * (HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM))

    for tick, text in zip(ticks, tick_texts(ticks, percent), strict=True):
        pen.line((*place(left, tick), *place(right, tick)), GRID, TIMES)
        pen.text((TIMES * (LEFT - 9), place(left, tick)[1]), text, draw.FAINT, font, anchor="rm")
    for step in (step for step in steps if float(step).is_integer()):
        pen.text((place(step, bottom)[0], TIMES * (HEIGHT - 22)), f"{step:,.0f}", draw.FAINT, font, anchor="mm")
    places = [place(*point) for point in points]
    if len(places) > 1:
        pen.line(places, LINE, 2 * TIMES, joint="curve")
    for x, y in places if len(places) <= 40 else places[-1:]:
        pen.ellipse((x - 3 * TIMES, y - 3 * TIMES, x + 3 * TIMES, y + 3 * TIMES), LINE)
    pen.text((TIMES * LEFT, 24 * TIMES), title, draw.INK, built_in(17 * TIMES), anchor="lm")
    if points:
        last = number(points[-1][1], percent)
        pen.text((TIMES * (WIDTH - RIGHT), 24 * TIMES), f"{last} at step {points[-1][0]:,.0f}", LINE, font, anchor="rm")
    return large.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
