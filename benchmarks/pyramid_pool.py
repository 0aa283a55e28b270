"""pyramid_pool beside one F.adaptive_avg_pool2d call for each scale, which is the reference its tests use.

    python -m benchmarks.pyramid_pool          the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move: forward B·C·(h·w + J) elements, x read and the result written; backward as many, the other way.
Operations: an addition for each element of x, each way (the sums of segments, which are few, are added up once more).
"""

import itertools

import pytest
import stock
import torch
from accuracy import assert_accurate, max_error
from cases import LARGE_MAPS, MapCase

import apc_kernels
from benchmarks import setting
from benchmarks.scaling import BATCHES, CHANNELS, COUNTS, SCALES, SIDES, THREADS, Point, scaled
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, here, name_of
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


def functions(case: MapCase, layout, direction: str, backend: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    x = layout(torch.randn(case.shape, device=DEVICE).to(DTYPE)).requires_grad_(direction != "forward")
    grad = torch.randn(*case.shape[:2], sum(s * s for s in case.scales), device=DEVICE).to(DTYPE)

    def step(function):
        def run():
            pooled = function(x, case.scales)
            return pooled if direction == "forward" else torch.autograd.grad(pooled, x, grad)[0]

        return run

    ours, other = setting.on(backend, step(apc_kernels.pyramid_pool)), step(stock.pyramid_pool)
    exact, actual, pytorch = _exact(x, case, direction, grad), ours(), other()
    assert_accurate(actual, exact, pytorch, f"{case} {layout.__name__} {direction}")
    return ours, other, {"error": max_error(actual, exact), "other_error": max_error(pytorch, exact)}


def measure(case: MapCase, layout, direction: str, backend: str) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other, errors = functions(case, layout, direction, backend)
    scales = () if case.scales == SCALES else (f"scales {'.'.join(map(str, case.scales))}",)
    name = ", ".join((direction, "x".join(map(str, case.shape)), *scales, layout.__name__, name_of(DTYPE)))
    beside, pair = "F.adaptive_avg_pool2d for each scale", paired(ours, other)
    return result_row("pyramid_pool", name, backend, beside, pair, *counts(case, direction), **errors), ours


@setting.backends("cuda", "triton")
@setting.directions
@setting.layouts
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_pyramid_pool(benchmark, case, layout, direction, backend):
    setting.need(backend, "pyramid_pool")
    setting.record(benchmark, *measure(case, layout, direction, backend))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, "forward+backward", setting.best("pyramid_pool"))
        setting.record(benchmark, point.row(row), ours)


def _exact(x, case, direction, grad):
    wide = x.detach().double().requires_grad_(x.requires_grad)
    pooled = stock.pyramid_pool(wide, case.scales)
    return pooled if direction == "forward" else torch.autograd.grad(pooled, wide, grad.double())[0]


def main() -> None:
    settings = itertools.product(CASES[:2], setting.LAYOUTS.values(), DIRECTIONS, [setting.best("pyramid_pool")])
    setting.print_rows("pyramid_pool", (measure(*each)[0] for each in settings))


if __name__ == "__main__":
    main()
