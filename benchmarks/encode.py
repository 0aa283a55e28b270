"""encode beside the residuals written out, which is what EncNet's peers do and the reference its tests use.

    python -m benchmarks.encode                the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 1 (x read); backward 2 (x read, its gradient written). The residuals are
as many maps as there are codewords. Operations, in multiply-adds for each position: K·C a product with the codewords;
forward 2 products (distances, sums), backward 3. Memory is what a call needs at its peak beyond its arguments, results
included.
"""

import itertools

import stock
import torch
from accuracy import assert_accurate
from head_cases import ENCODER, CodeCase, draw_code

import apc_kernels
from benchmarks import setting
from benchmarks.memory import peak_of_side, peaks
from benchmarks.scaling import BATCHES, CHANNELS, SIDES, THREADS, points, scaled
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, LAYOUTS, here, name_of
from benchmarks.timing import paired, result_row

CASE = here(ENCODER, CodeCase(8, ENCODER.channels, ENCODER.size, ENCODER.codewords), CodeCase(2, 8, (6, 6), 3))
CODEWORDS = here((8, 16, 32, 64), (8, 16, 32, 64), ())
SCALING = points(CASE, batch=BATCHES, size=SIDES, channels=CHANNELS, codewords=CODEWORDS, threads=THREADS)
LEAVES = ("x", "codewords", "scale")


def step(function, t: dict, direction: str):
    leaves = [t[name].requires_grad_(direction != "forward") for name in LEAVES]

    def run():
        result = function(*leaves)
        return [result] if direction == "forward" else torch.autograd.grad(result, leaves, t["grad"])

    return run


def functions(case: CodeCase, layout, direction: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_code(case, layout, DTYPE, DEVICE)
    wide = {name: tensor.double() for name, tensor in t.items()}
    other = setting.compile_anew(stock.encode) if compiled else stock.encode
    ours, other = step(apc_kernels.encode, t, direction), step(other, t, direction)
    for actual, exact, own in zip(ours(), step(stock.encode, wide, direction)(), other(), strict=True):
        assert_accurate(actual, exact.detach(), own, direction)
    return ours, other


def measure(case: CodeCase, layout, direction: str, compiled: bool = False, **more: float) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(case, layout, direction, compiled)
    name = ", ".join((direction, str(case), layout.__name__, name_of(DTYPE)))
    positions = case.batch * case.size[0] * case.size[1]
    maps, products = (1, 2) if direction == "forward" else (3, 5)
    counts = (
        maps * positions * case.channels * DTYPE.itemsize,
        products * 2 * positions * case.codewords * case.channels,
    )
    beside = "residuals written out" + (", torch.compile" if compiled else "")
    return result_row("encode", name, "PyTorch", beside, paired(ours, other), *counts, **more), ours


def memory(layout, direction: str, compiled: bool = False) -> dict[str, float]:
    return peaks("benchmarks.encode", layout.__name__, direction, compiled=compiled)


@setting.compiled
@setting.directions
@setting.usual_layout_first
def bench_encode(benchmark, layout, direction, compiled):
    given = layout, direction, compiled
    setting.record(benchmark, *measure(CASE, *given, **memory(*given)))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, "forward+backward")
        setting.record(benchmark, point.row(row), ours)


def peak_of(layout: str, direction: str, side: str) -> int:
    def ready(function, case: CodeCase):
        return step(function, draw_code(case, LAYOUTS[layout], DTYPE, DEVICE), direction)

    return peak_of_side(side, apc_kernels.encode, stock.encode, ready, CASE, CodeCase(1, 4, (4, 4), 3))


def main() -> None:
    settings = itertools.product(LAYOUTS.values(), DIRECTIONS)
    setting.print_rows("encode", (measure(CASE, *each, **memory(*each))[0] for each in settings))


if __name__ == "__main__":
    main()
