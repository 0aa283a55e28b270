"""Compares two files of results row by row, and fails (exit 1) if B is worse than A.

    python -m benchmarks.compare A.json B.json

A row is slower if the quartiles of its ratios to the other side lie below those of A by more than the margin; times
alone differ between machines, not only between programs. It needs more memory if its peak is higher by the margin and
by one MiB. Rows that only one file has are listed, and are no failure.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import rows

MARGIN = 0.05
CHANGES = ("slower", "more memory", "faster", "less memory")


def changes(a: dict, b: dict, margin: float = MARGIN) -> dict[str, str]:
    """Lists the changes of a row with their figures."""
    found, text = {}, f"{_shown(a)} -> {_shown(b)}"
    if b["ratio_high"] < a["ratio_low"] * (1 - margin):
        found["slower"] = text
    if b["ratio_low"] > a["ratio_high"] * (1 + margin):
        found["faster"] = text
    if "memory_mib" in a and "memory_mib" in b:
        mib, text = (a["memory_mib"], b["memory_mib"]), f"{a['memory_mib']:.1f} -> {b['memory_mib']:.1f} MiB"
        if max(mib) - min(mib) > 1 and max(mib) > min(mib) * (1 + margin):
            found["more memory" if mib[1] > mib[0] else "less memory"] = text
    return found


def compare(a: dict, b: dict, margin: float = MARGIN) -> tuple[list[str], bool]:
    """Returns the lines to print, and True if B is worse in any row."""
    first, second = ({rows.identity(row): row for row in measured["rows"]} for measured in (a, b))
    both = [name for name in first if name in second]
    if not both:
        raise ValueError("expected two files with rows in common, but they have no row in common")
    different = {name: changes(first[name], second[name], margin) for name in both}
    lines = []
    for change in CHANGES:
        for name in both:
            if change in different[name]:
                lines.append(f"{change:<12}{_called(name)}: {different[name][change]}")
    lines += [f"{'missing':<12}{_called(name)}" for name in first if name not in second]
    lines += [f"{'new':<12}{_called(name)}" for name in second if name not in first]
    alike = sum(not change for change in different.values())
    lines.append(f"{alike} of {len(both)} rows are alike within their spread and {margin:.0%}")
    if a["machine"] != b["machine"]:
        lines.append(f"the files come from two machines or versions: {a['machine']} and {b['machine']}")
    worse = any(change in found for found in different.values() for change in ("slower", "more memory"))
    return lines, worse


def _called(name: rows.Identity) -> str:
    operation, case, backend, other = name
    return f"{operation}, {case} [{backend}] beside {other}"


def _shown(row: dict) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def main() -> None:
    about = "Compare two files of results row by row, and fail (exit 1) if B is worse than A."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=about)
    parser.add_argument("a", type=Path, metavar="A.json", help="Compare with these older results.")
    parser.add_argument("b", type=Path, metavar="B.json", help="Judge these newer results.")
    parser.add_argument("--margin", type=float, default=MARGIN, help="Ignore changes up to this share (default 0.05).")
    given = parser.parse_args()
    if not 0 <= given.margin < 1:
        parser.error(f"--margin: expected a number from 0 to below 1, got {given.margin}")
    try:
        lines, worse = compare(rows.read(given.a), rows.read(given.b), given.margin)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    sys.exit(worse)


if __name__ == "__main__":
    main()
