"""Reads from the first lines of each kernel's file the least that the kernel moves and computes.

A line there begins with the kernel's name: "pool_rows_kernel moves x, row_sums; computes B·C·N". Every tensor is moved
once, those that are not given not at all; a product or a sum is one operation.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
STATEMENT = re.compile(r"^[/ ]+(\w+) +moves ([\w, ]+)(?:; computes ([^\n]+?))?$", re.MULTILINE)
TERM = re.compile(r"([^,]+?)(?: more(?: with (\w+))?)?(?:, |$)")


class Least(NamedTuple):
    """Holds what a kernel's file states: the tensors that move, and formulas, each with the tensor that it needs."""

    moves: list[str]
    computes: list[tuple[str, str]]

    def operations(self, letters: Mapping[str, int], given: Collection[str]) -> int:
        """Returns the operations, for the values of B, C, N, ... and the tensors that a launch was given."""
        formulas = [formula for formula, needed in self.computes if not needed or needed in given]
        factors = [[f if f.isdigit() else letters[f] for f in re.split(r"[·*]", formula)] for formula in formulas]
        return sum(math.prod(map(int, of_one)) for of_one in factors)


def files() -> list[Path]:
    return [*ROOT.glob("apc_kernels/ops/*/triton*.py"), *ROOT.glob("csrc/*/*.cuh")]


@functools.cache
def least() -> dict[str, Least]:
    """Returns what is stated of every kernel, by its name."""
    stated = {}
    for file in files():
        opening = re.match(r'"""(.*?)"""|((?://.*\n)+)', file.read_text(), re.DOTALL)[0]
        joined = re.sub(r"([,;])\n(?://)? {8,}", r"\1 ", opening)  # statements of several lines
        for name, moves, computes in STATEMENT.findall(joined):
            assert name not in stated, f"{file}: {name} is stated twice"
            stated[name] = Least(moves.split(", "), TERM.findall(computes))
    return stated


def plain(kernel: str) -> str:
    """Returns a kernel's name without what C++ adds to it."""
    mangled = re.match(r"_ZL?(\d+)", kernel)
    return kernel[mangled.end() : mangled.end() + int(mangled[1])] if mangled else kernel


def operations(opcodes: Mapping[str, tuple[int, int]]) -> int:
    """Returns the additions and multiplications of float numbers that a launch executed; an exponential is one, too."""
    total = 0
    for opcode, (warps, lanes) in opcodes.items():
        if shape := re.match(r"(?:wg)?mma\.mma_async\S*m(\d+)n(\d+)k(\d+)|mma\.sync\S*m(\d+)n(\d+)k(\d+)", opcode):
            sizes = [int(size) for size in shape.groups() if size]
            total += 2 * math.prod(sizes) * warps // (4 if opcode.startswith("wgmma") else 1)  # four warps share one
        elif re.match(r"fma\.\S*f(16|32|64)", opcode):
            total += 2 * lanes
        elif re.match(r"(add|sub|mul|div|max|min|ex2|rcp)\.\S*f(16|32|64)", opcode):
            total += lanes
    return total
