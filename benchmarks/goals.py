"""Judges rows of results by the project's goals, which goals.csv lists, one figure on each line.

The goals for a CPU are for two cores in float32, those for a GPU for an H200 in bfloat16. A goal is met by the row that
it names; without such a row it stays open.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import memory_share

Rows = Sequence[dict]
MET, MISSED, OPEN = "met", "**missed**", "not measured"
AT_MOST = ("ms", "MiB at the peak", "of the other's memory", "of what the other keeps for backward")
AT_MOST += ("of upsample_argmax's time",)


@dataclass(frozen=True)
class Goal:
    """Describes the figure to reach, in rows with this operation and this beginning of their case."""

    name: str
    operation: str
    case: str
    bound: float
    what: str
    other: str  # the other side that it was measured beside; empty for any

    def names(self, row: dict) -> bool:
        return row["operation"] == self.operation and row["case"].startswith(self.case)

    def best(self, rows: Rows) -> float | None:
        """Returns the best figure of all measured backends, or None."""
        figures = (figure(self.what, r, rows) for r in rows if self.names(r) and self.other in ("", r["other"]))
        return (min if self.what in AT_MOST else max)((f for f in figures if f is not None), default=None)

    def __str__(self) -> str:
        beside = f" beside {self.other}" if self.other else ""
        return f"{self.operation}, {self.case}{beside}, {self.asked}"

    @property
    def asked(self) -> str:
        return f"{'at most' if self.what in AT_MOST else 'at least'} {self.bound:g} {self.what}"

    def formatted(self, rows: Rows) -> str:
        """Returns the best figure as text, or nothing if it was not measured."""
        figure = self.best(rows)
        return "" if figure is None else f"{figure:.3g}"

    def verdict(self, rows: Rows) -> str:
        figure = self.best(rows)
        if figure is None:
            return OPEN
        return MET if (figure <= self.bound if self.what in AT_MOST else figure >= self.bound) else MISSED


def figure(what: str, row: dict, rows: Rows) -> float | None:
    """Returns a row's figure of the kind `what`, or None if it was not measured."""
    if what == "of the other's memory":
        return memory_share(row)
    if what == "of what the other keeps for backward":
        return row["kept_mib"] / row["other_kept_mib"] if row.get("other_kept_mib") else None
    if what == "of upsample_argmax's time":
        argmax = (r for r in rows if r["operation"] == "upsample_argmax" and r["case"] == row["case"])
        return next((row["ours_ms"] / r["ours_ms"] for r in argmax), None)
    columns = {"ms": "ours_ms", "MiB at the peak": "memory_mib", "% of a copy's bandwidth": "percent_of_copy"}
    return row.get(columns.get(what, "ratio"))


def read(machine: str) -> list[Goal]:
    with (Path(__file__).parent / "goals.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["machine"] == machine]
    return [Goal(r["goal"], r["operation"], r["case"], float(r["bound"]), r["figure"], r["other"]) for r in rows]


CPU, GPU = read("CPU"), read("GPU")


def for_machine(machine: dict) -> list[Goal]:
    """Returns the goals for a GPU or a CPU, whichever the machine of the results is."""
    return GPU if "sm_" in machine["name"] else CPU


def representative(rows: Rows, listed: Sequence[Goal]) -> dict:
    """Picks the row of a group that a goal names, or the first."""
    return next((row for row in rows if any(goal.names(row) for goal in listed)), rows[0])
