"""Plots a file of results: speed-up, memory, roofline and scaling, each if there are rows with its figures."""

import importlib.util
import statistics
from pathlib import Path

from apcnet.files import replacing
from benchmarks import goals
from benchmarks.rows import groups

AVAILABLE = importlib.util.find_spec("matplotlib") is not None
OURS, OTHER, LINE = "#2a6f97", "#bcb8b1", "#6c757d"
MARKERS = "os^DvPX*<"
AXES = ("batch", "size", "channels", "classes", "codewords", "scales", "threads")


def draw(measured: dict, folder: Path) -> list[Path]:
    """Writes the plots that the rows allow into a folder, and removes the others from it."""
    import matplotlib

    rows, listed = measured["rows"], goals.for_machine(measured["machine"])
    plots = {  # each with the rows that it is made from
        "speed-up": (_speed_up, _representatives(rows, listed)),
        "memory": (_memory, _representatives([row for row in rows if "memory_mib" in row], listed)),
        "roofline": (_roofline, [r for r in rows if plain(r) and "operations" in r and "scaling" not in r]),
        "scaling": (_scaling, [row for row in rows if "scaling" in row]),
    }
    written, style = [], {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    for name, (plot, own) in plots.items():
        path = folder / f"{name}.png"
        if not own:
            path.unlink(missing_ok=True)
            continue
        folder.mkdir(exist_ok=True)
        with matplotlib.rc_context(style), replacing(path) as temporary:
            # Without date and version, the same rows give the same bytes.
            plot(own).savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
        written.append(path)
    return written


def plain(row: dict) -> bool:
    """Returns True for an operation's row; for heads and models, the counts are those of the other side's layers."""
    return row["operation"] not in ("load_head", "accelerate", "model")


def _representatives(rows: list[dict], listed: list[goals.Goal]) -> dict[str, dict]:
    """Picks one row for each operation and direction, by its label."""
    return {", ".join(filter(None, about)): goals.representative(some, listed) for about, some in groups(rows).items()}


def _axes(height: float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _speed_up(rows: dict[str, dict]):
    figure, [[axes]] = _axes(0.8 + 0.26 * len(rows))
    for place, row in enumerate(reversed(rows.values())):
        low, ratio, high = row["ratio_low"], row["ratio"], row["ratio_high"]
        axes.barh(place, ratio - 1, left=1, color=OURS)  # slower rows go to the left
        axes.plot([low, high], [place, place], color=LINE, linewidth=1.5)
        axes.annotate(f"{ratio:.3g}", (max(high, 1), place), (5, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows)[::-1])
    axes.set(xscale="log", xlabel="times as fast as the other side")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1, y=0.02)
    return figure


def _memory(rows: dict[str, dict]):
    figure, [[axes]] = _axes(0.8 + 0.36 * len(rows))
    names = list(rows)[::-1]
    for field, shift, colour, label in (
        ("other_memory_mib", 0.2, OTHER, "other side"),
        ("memory_mib", -0.2, OURS, "ours"),
    ):
        values = [max(rows[name][field], 0.01) for name in names]  # a logarithmic axis has no 0
        axes.barh([place + shift for place in range(len(names))], values, 0.4, color=colour, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set(xscale="log", xlabel="MiB at the peak")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.02)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _roofline(rows: list[dict]):
    """Draws the roofline for the most frequent precision, because the rate of a product depends on it."""
    dtype = statistics.mode(map(precision, rows))
    rows = [row for row in rows if precision(row) == dtype]
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
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel=f"GFLOP/s, {dtype}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def precision(row: dict) -> str:
    """Returns the dtype that a row's case names, or nothing."""
    return next((part for part in row["case"].split(", ") if part.rstrip("123468") in ("float", "bfloat")), "")


def _scaling(rows: list[dict]):
    present = [axis for axis in AXES if any(row["scaling"] == axis for row in rows)]
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
    labels = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
