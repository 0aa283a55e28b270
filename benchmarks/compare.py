"""Two files of results, row by row: python -m benchmarks.compare A.json B.json. Fails (exit 1) where B is worse than A.

A row is slower where the quartiles of its ratios to the other side lie below those of A, and farther than the margin:
times alone tell machines apart, not programs. It needs more memory where its peak is higher by the margin and by a MiB.
Rows that one of the two files lacks are listed, and are no failure.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import rows

MARGIN = 0.05
CHANGES = ("slower", "more memory", "faster", "less memory")


def changes(a: dict, b: dict, margin: float = MARGIN) -> dict[str, str]:
    """What is different about a row, and the figures."""
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
    """Lines to print, and whether B is worse anywhere."""
    first, second = ({rows.identity(row): row for row in measured["rows"]} for measured in (a, b))
    both = [name for name in first if name in second]
    if not both:
        raise ValueError("the two files have no row in common")
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
        lines.append(f"these are two machines or versions: {a['machine']} and {b['machine']}")
    worse = any(change in found for found in different.values() for change in ("slower", "more memory"))
    return lines, worse


def _called(name: rows.Identity) -> str:
    operation, case, backend, other = name
    return f"{operation}, {case} [{backend}] beside {other}"


def _shown(row: dict) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("a", type=Path, metavar="A.json", help="as it was")
    parser.add_argument("b", type=Path, metavar="B.json", help="as it is")
    parser.add_argument("--margin", type=float, default=MARGIN, help="how much worse is still alike (default 0.05)")
    given = parser.parse_args()
    if not 0 <= given.margin < 1:
        parser.error(f"--margin: expected 0 up to 1, without 1, got {given.margin}")
    try:
        lines, worse = compare(rows.read(given.a), rows.read(given.b), given.margin)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(lines))
    sys.exit(worse)


if __name__ == "__main__":
    main()
