"""pyramid_pool beside one F.adaptive_avg_pool2d call for each scale, which is the reference its tests use.

    python -m benchmarks.pyramid_pool          the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move: forward B·C·(h·w + J) elements, x read and the result written; backward as many, the other way.
Operations: an addition for each element of x, each way (the sums of segments, which are few, are added up once more).
Memory is what a call needs at its peak beyond its arguments, results included, in the first case.
"""

import itertools

import pytest
import stock
import torch
from accuracy import assert_accurate, max_error
from cases import LARGE_MAPS, MapCase, draw
from torch import Tensor

import apc_kernels
from benchmarks import setting
from benchmarks.memory import peak_of_side, peaks
from benchmarks.scaling import BATCHES, CHANNELS, COUNTS, SCALES, SIDES, THREADS, Point, scaled
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, LAYOUTS, here, name_of
from benchmarks.timing import paired, result_row

CASES = here(LARGE_MAPS, [MapCase((8, 2048, 64, 64)), *LARGE_MAPS], [MapCase((1, 4, 6, 6))])
BASE = here((2, 2048, 64, 64), (8, 2048, 64, 64), (1, 4, 6, 6))
SCALING = [
    *(Point("batch", n, MapCase((n, *BASE[1:]))) for n in BATCHES),
    *(Point("size", n, MapCase((*BASE[:2], n, n))) for n in SIDES),
    *(Point("channels", n, MapCase((BASE[0], n, *BASE[2:]))) for n in CHANNELS),
    *(Point("scales", n, MapCase(BASE, SCALES[:n])) for n in COUNTS),
    *(Point("threads", n, MapCase(BASE)) for n in THREADS),
]


def counts(case: MapCase, direction: str) -> tuple[int, int]:
    """Bytes and operations."""
    batch, channels, height, width = case.shape
    ways = 1 if direction == "forward" else 2
    regions = sum(s * s for s in case.scales)
    return (
        ways * batch * channels * (height * width + regions) * DTYPE.itemsize,
        ways * batch * channels * height * width,
    )


def step(function, scales: tuple[int, ...], x: Tensor, grad: Tensor, direction: str):
    x.requires_grad_(direction != "forward")

    def run():
        pooled = function(x, scales)
        return pooled if direction == "forward" else torch.autograd.grad(pooled, x, grad)[0]

    return run


def functions(case: MapCase, layout, direction: str, backend: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    x, grad = draw(case, layout, DTYPE, DEVICE)
    exact = step(stock.pyramid_pool, case.scales, x.double(), grad.double(), direction)()
    eager = step(stock.pyramid_pool, case.scales, x, grad, direction)
    ours = setting.on(backend, step(apc_kernels.pyramid_pool, case.scales, x, grad, direction))
    other = step(setting.compile_anew(stock.pyramid_pool), case.scales, x, grad, direction) if compiled else eager
    actual = ours()
    assert_accurate(actual, exact, eager(), f"{case} {layout.__name__} {direction}")
    return ours, other, {"error": max_error(actual, exact), "other_error": max_error(other(), exact)}


def measure(
    case: MapCase, layout, direction: str, backend: str, compiled: bool = False, **more: float
) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other, errors = functions(case, layout, direction, backend, compiled)
    scales = () if case.scales == SCALES else (f"scales {'.'.join(map(str, case.scales))}",)
    name = ", ".join((direction, "x".join(map(str, case.shape)), *scales, layout.__name__, name_of(DTYPE)))
    beside, pair = "F.adaptive_avg_pool2d for each scale" + ", torch.compile" * compiled, paired(ours, other)
    return result_row("pyramid_pool", name, backend, beside, pair, *counts(case, direction), **errors, **more), ours


def memory(case: MapCase, layout, direction: str, backend: str, compiled: bool = False) -> dict[str, float]:
    if case is not CASES[0]:
        return {}
    return peaks("benchmarks.pyramid_pool", layout.__name__, direction, ours=backend, compiled=compiled)


@setting.backends("cuda", "triton")
@setting.directions
@setting.layouts
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_pyramid_pool(benchmark, case, layout, direction, backend):
    setting.need(backend, "pyramid_pool")
    given = case, layout, direction, backend
    setting.record(benchmark, *measure(*given, **memory(*given)))


@setting.where_compiled
@setting.directions
def bench_compiled(benchmark, direction):
    given = CASES[0], setting.USUAL, direction, setting.best("pyramid_pool"), True
    setting.record(benchmark, *measure(*given, **memory(*given)))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, "forward+backward", setting.best("pyramid_pool"))
        setting.record(benchmark, point.row(row), ours)


def peak_of(layout: str, direction: str, side: str) -> int:
    def ready(function, case: MapCase):
        return step(function, case.scales, *draw(case, LAYOUTS[layout], DTYPE, DEVICE), direction)

    return peak_of_side(side, apc_kernels.pyramid_pool, stock.pyramid_pool, ready, CASES[0], MapCase((1, 4, 6, 6)))


def main() -> None:
    settings = itertools.product(CASES[:2], LAYOUTS.values(), DIRECTIONS, [setting.best("pyramid_pool")])
    setting.print_rows("pyramid_pool", (measure(*each, **memory(*each))[0] for each in settings))


if __name__ == "__main__":
    main()
