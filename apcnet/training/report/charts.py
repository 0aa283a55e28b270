"""Draws the charts of a report as SVG inside HTML: they show without scripts, and follow a page's colours."""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 250, 64, 14, 14, 34
MOST_POINTS = 400  # of a line: more would be closer together than pixels
COLORS = 6  # of lines, in page.css
Point = tuple[float, float]


class Line(NamedTuple):
    """Holds the name and the points of a line; points are in the order of their x."""

    name: str
    points: list[Point]


def lines(title: str, drawn: Sequence[Line], percent: bool = False, from_zero: bool = True) -> str:
    """Draws lines over the steps of training, with a list of their last values below for readers without a pointer."""
    drawn = [Line(line.name, thinned(line.points)) for line in drawn if line.points]
    if not drawn:
        return ""
    xs, ys = ([point[axis] for line in drawn for point in line.points] for axis in (0, 1))
    bottom, top, ticks = scale(min(0, *ys) if from_zero else min(ys), max(ys))
    left, right = min(0, *xs), max(*xs, 1)

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (point[1] - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick, text in zip(ticks, tick_texts(ticks, percent), strict=True):
        y = place((left, tick))[1]
        kind = "axis" if tick == bottom else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    steps = [tick for tick in scale(left, right)[2] if left <= tick <= right and float(tick).is_integer()]
    for tick in steps:
        x = place((tick, bottom))[0]
        x, anchor, unit = (min(x + 12, WIDTH - 2), "end", "step ") if tick == steps[-1] else (x, "middle", "")
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{unit}{tick:,.0f}</text>')
    for i, line in enumerate(drawn):
        places = [place(point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line c{i % COLORS}" points="{path}"/>')
        if len(places) <= 40:
            parts += [f'<circle class="dot c{i % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
    data = {
        "lines": [{"name": line.name, "points": line.points} for line in drawn],
        "frame": [left, right, LEFT, WIDTH - RIGHT],
        "percent": percent,
    }
    last = "".join(
        f'<li><span class="key c{i % COLORS}"></span>{escape(line.name)} <b>{number(line.points[-1][1], percent)}</b>'
        "</li>"
        for i, line in enumerate(drawn)
    )
    label = f"{title}: " + ", ".join(f"{line.name} {number(line.points[-1][1], percent)}" for line in drawn)
    return (
        f'<figure class="card chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<ul class="legend">{last}</ul>'
        f'<script type="application/json">{embedded(data)}</script></figure>'
    )


def histogram(title: str, values: Sequence[float], about: str) -> str:
    """Draws how many of the values, fractions of 1, lie in each of 20 intervals."""
    counts = [0] * 20
    for value in values:
        counts[min(int(value * 20), 19)] += 1
    top, ticks = scale(0, max(*counts, 1))[1:]
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = []
    for tick in (tick for tick in ticks if float(tick).is_integer()):
        y = HEIGHT - BOTTOM - tick / top * height
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
    for i, count in enumerate(counts):
        tall, text = count / top * height, f"{5 * i} to {5 * i + 5} %: {count:,} image{'s' * (count != 1)}"
        parts.append(
            f'<rect class="column c0" x="{LEFT + (i + 0.08) * width / 20:.1f}" width="{0.84 * width / 20:.1f}" '
            f'y="{HEIGHT - BOTTOM - tall:.1f}" height="{tall:.1f}"><title>{text}</title></rect>'
        )
    for share in range(0, 101, 20):
        x, anchor = (LEFT + share / 100 * width, "middle") if share < 100 else (WIDTH - 2, "end")
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{share} %</text>')
    return (
        f'<figure class="card"><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}, {escape(about)}">{"".join(parts)}</svg>'
        f'<p class="faint">{escape(about)}</p></figure>'
    )


def trend(points: Sequence[float | None]) -> str:
    """Draws a small line without axes, from 0 to 1."""
    places = [(i, p) for i, p in enumerate(points) if p is not None]
    if len(places) < 2:
        return ""
    step = 80 / (len(points) - 1)
    path = " ".join(f"{i * step:.1f},{22 - 20 * p:.1f}" for i, p in places)
    last = places[-1][0] * step, 22 - 20 * places[-1][1]
    return (
        '<svg class="trend" viewBox="-2 0 86 24" aria-hidden="true"><line class="grid" x1="0" x2="80" y1="22" y2="22"/>'
        f'<polyline class="line c0" points="{path}"/>'
        f'<circle class="dot c0" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="2.2"/></svg>'
    )


def scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """Returns a range of round numbers around two values, and the round numbers in it."""
    if high - low < 1e-12 * max(abs(high), 1e-12):
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Returns at most MOST_POINTS points: means of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(group[-1][0], float(f"{sum(y for _, y in group) / len(group):.6g}")) for group in groups]


def tick_texts(ticks: Sequence[float], percent: bool = False) -> list[str]:
    """Writes the numbers of an axis, all with as many decimals as the distance between two of them needs."""
    if percent:
        ticks = [100 * tick for tick in ticks]
    step = ticks[1] - ticks[0]
    decimals = next((n for n in range(6) if math.isclose(round(step, n), step, rel_tol=1e-6)), None)
    unit = " %" if percent else ""
    if decimals is None or step >= 1e6:
        return [f"{tick:.3g}{unit}" for tick in ticks]
    return [f"{tick + 0.0:,.{decimals}f}{unit}" for tick in ticks]  # + 0.0: never −0


def number(value: float, percent: bool = False) -> str:
    """Writes a number in few letters."""
    if percent:
        return f"{100 * value:.2f} %"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def embedded(data: object) -> str:
    """Writes data as JSON that cannot end the script element it stands in."""
    return json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
