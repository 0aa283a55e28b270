"""Plots of a file of results: speed-up, memory, roofline, scaling. What no row has the figures for is not drawn."""

import importlib.util
import statistics
from pathlib import Path

from apcnet.files import replacing
from benchmarks import goals
from benchmarks.rows import groups

AVAILABLE = importlib.util.find_spec("matplotlib") is not None
OURS, OTHER, LINE = "#2a6f97", "#bcb8b1", "#6c757d"
MARKERS = "os^DvPX*<"
NEEDED = {  # columns that a plot is made from
    "speed-up": ("ratio", "ratio_low", "ratio_high"),
    "memory": ("memory_mib", "other_memory_mib"),
    "roofline": ("operations", "bytes", "gb_per_s", "percent_of_copy", "gflop_per_s", "percent_of_matrix"),
    "scaling": ("scaling", "value", "other_ms"),
}
AXES = ("batch", "size", "channels", "classes", "codewords", "scales", "threads")


def draw(measured: dict, folder: Path) -> list[Path]:
    """Writes what can be drawn into a folder, and takes away what cannot any more."""
    import matplotlib

    rows = {name: [r for r in measured["rows"] if r.keys() >= set(needed)] for name, needed in NEEDED.items()}
    listed = goals.of(measured["machine"])
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        drawn = {
            "speed-up": _speed_up(_telling(rows["speed-up"], listed)),
            "memory": _memory(_telling(rows["memory"], listed)),
            "roofline": _roofline([row for row in rows["roofline"] if plain(row) and "scaling" not in row]),
            "scaling": _scaling(rows["scaling"]),
        }
    written = []
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        folder.mkdir(exist_ok=True)
        with replacing(path) as temporary:  # the same bytes for the same rows: no date, no version
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        written.append(path)
    return written


def plain(row: dict) -> bool:
    """An operation's, not a whole head's or model's, whose operations are counted in the other side's layers."""
    return row["operation"] not in ("load_head", "accelerate", "model")


def _telling(rows: list[dict], listed: list[goals.Goal]) -> dict[str, dict]:
    """A row for each operation and direction, by its label."""
    return {", ".join(filter(None, about)): goals.telling(some, listed) for about, some in groups(rows).items()}


def _axes(height: float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _speed_up(rows: dict[str, dict]):
    if not rows:
        return None
    figure, [[axes]] = _axes(0.8 + 0.26 * len(rows))
    for place, row in enumerate(reversed(rows.values())):
        low, ratio, high = row["ratio_low"], row["ratio"], row["ratio_high"]
        axes.barh(place, ratio - 1, left=1, color=OURS)  # what is slower goes to the left
        axes.plot([low, high], [place, place], color=LINE, linewidth=1.5)
        axes.annotate(f"{ratio:.3g}", (max(high, 1), place), (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows)[::-1])
    axes.set(xscale="log", xlabel="times as fast as the other side")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1, y=0.02)
    return figure


def _memory(rows: dict[str, dict]):
    if not rows:
        return None
    figure, [[axes]] = _axes(0.8 + 0.36 * len(rows))
    names = list(rows)[::-1]
    for field, shift, colour, label in (
        ("other_memory_mib", 0.2, OTHER, "other side"),
        ("memory_mib", -0.2, OURS, "ours"),
    ):
        values = [max(rows[name][field], 0.01) for name in names]  # nothing at all has no place on this axis
        axes.barh([place + shift for place in range(len(names))], values, 0.4, color=colour, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set(xscale="log", xlabel="MiB at the peak")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.02)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _roofline(rows: list[dict]):
    """Of the precision that most rows are in: a product's rate differs from one to the next."""
    if not rows:
        return None
    precision = statistics.mode(map(_precision, rows))
    rows = [row for row in rows if _precision(row) == precision]
    figure, [[axes]] = _axes(5.5)
    copy = statistics.median(100 * row["gb_per_s"] / row["percent_of_copy"] for row in rows)
    product = statistics.median(100 * row["gflop_per_s"] / row["percent_of_matrix"] for row in rows)
    intensities = [row["operations"] / row["bytes"] for row in rows]
    left, right = min(intensities) / 2, max(*intensities, product / copy) * 2
    axes.plot([left, product / copy, right], [copy * left, product, product], color="black", linewidth=0.9)
    notes = {"textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"a copy: {copy:.0f} GB/s", (left, copy * left), (10, -2), **notes)
    axes.annotate(f"a product: {product:.0f} GFLOP/s", (right, product), (-4, 4), ha="right", **notes)
    for i, operation in enumerate(dict.fromkeys(row["operation"] for row in rows)):
        own = [(r["operations"] / r["bytes"], r["gflop_per_s"]) for r in rows if r["operation"] == operation]
        style = {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        axes.plot(*zip(*own, strict=True), label=operation, linestyle="", **style)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel=f"GFLOP/s, {precision}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _precision(row: dict) -> str:
    return next((part for part in row["case"].split(", ") if part.rstrip("123468") in ("float", "bfloat")), "")


def _scaling(rows: list[dict]):
    present = [axis for axis in AXES if any(row["scaling"] == axis for row in rows)]
    if not present:
        return None
    columns = min(len(present), 3)
    lines = -(-len(present) // columns)
    figure, grid = _axes(3.0 * lines, lines, columns)
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    for axes in grid.flat[len(present) :]:
        axes.set_visible(False)
    for axes, axis in zip(grid.flat, present, strict=False):
        for i, operation in enumerate(operations):
            own = sorted((r["value"], r) for r in rows if r["scaling"] == axis and r["operation"] == operation)
            values = [value for value, _ in own]
            axes.plot(values, [row["ours_ms"] for _, row in own], "o-", color=f"C{i}", markersize=3, label=operation)
            axes.plot(values, [row["other_ms"] for _, row in own], "--", color=f"C{i}", linewidth=0.8)
        ticks = sorted({row["value"] for row in rows if row["scaling"] == axis})
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    figure.legend(*_legend(grid.flat), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _legend(grid) -> tuple[list, list]:
    """Every label once."""
    found = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
