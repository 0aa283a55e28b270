"""pyramid_pool beside one F.adaptive_avg_pool2d call for each scale, which is the reference its tests use.

    python -m benchmarks.pyramid_pool          the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move: forward B·C·(h·w + J) elements, x read and the result written; backward as many, the other way.
"""

import pytest
import stock
import torch
from accuracy import assert_accurate, max_error
from cases import LARGE_MAPS, MapCase, channels_last, nchw

import apc_kernels
from benchmarks.timing import Pair, paired, result_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("cuda", "triton") if DEVICE == "cuda" else ("cpp",)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CASES = [MapCase((8, 2048, 64, 64)), *LARGE_MAPS] if DEVICE == "cuda" else LARGE_MAPS
LAYOUTS = (nchw, channels_last)
DIRECTIONS = ("forward", "forward+backward")


def bytes_moved(case: MapCase, direction: str, dtype: torch.dtype) -> int:
    batch, channels, height, width = case.shape
    once = batch * channels * (height * width + sum(s * s for s in case.scales)) * dtype.itemsize
    return once if direction == "forward" else 2 * once


def functions(case: MapCase, layout, direction: str, backend: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    x = layout(torch.randn(case.shape, device=DEVICE).to(DTYPE)).requires_grad_(direction != "forward")
    grad = torch.randn(*case.shape[:2], sum(s * s for s in case.scales), device=DEVICE).to(DTYPE)

    def step(function):
        def run():
            pooled = function(x, case.scales)
            return pooled if direction == "forward" else torch.autograd.grad(pooled, x, grad)[0]

        return run

    def on_backend(x, scales):
        with apc_kernels.backend(backend):
            return apc_kernels.pyramid_pool(x, scales)

    ours, other = step(on_backend), step(stock.pyramid_pool)
    exact = _exact(x, case, direction, grad)
    assert_accurate(ours(), exact, other(), f"{case} {layout.__name__} {direction}")
    return ours, other, {"error": max_error(ours(), exact), "other_error": max_error(other(), exact)}


def measure(case: MapCase, layout, direction: str, backend: str, seconds: float = 2.0) -> dict:
    ours, other, errors = functions(case, layout, direction, backend)
    return _row(case, layout, direction, backend, paired(ours, other, DEVICE, seconds), errors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_pyramid_pool(benchmark, case, layout, direction, backend):
    ours, other, errors = functions(case, layout, direction, backend)
    benchmark.extra_info.update(_row(case, layout, direction, backend, paired(ours, other, DEVICE), errors))
    benchmark.pedantic(ours, rounds=5)


def _exact(x, case, direction, grad):
    wide = x.detach().double().requires_grad_(x.requires_grad)
    pooled = stock.pyramid_pool(wide, case.scales)
    return pooled if direction == "forward" else torch.autograd.grad(pooled, wide, grad.double())[0]


def _row(case: MapCase, layout, direction: str, backend: str, pair: Pair, errors: dict) -> dict:
    name = ", ".join((direction, "x".join(map(str, case.shape)), layout.__name__, str(DTYPE)[len("torch.") :]))
    other, moved = "F.adaptive_avg_pool2d for each scale", bytes_moved(case, direction, DTYPE)
    return result_row("pyramid_pool", name, backend, other, pair, moved, DEVICE, **errors)


def main() -> None:
    place = apc_kernels.dispatch.gpu() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"pyramid_pool, scales (1, 2, 3, 6), {str(DTYPE).removeprefix('torch.')}, {place}")
    print("beside one F.adaptive_avg_pool2d call for each scale; errors against float64\n")
    print(f"{'map':<20}{'layout':<15}{'':<18}{'ours ms':>9}{'PyTorch ms':>12}{'times':>7}{'error':>10}{'PyTorch':>10}")
    for case in CASES[:2]:
        for layout in LAYOUTS:
            for direction in DIRECTIONS:
                row = measure(case, layout, direction, BACKENDS[0], seconds=1.0)
                print(
                    f"{'x'.join(map(str, case.shape)):<20}{layout.__name__:<15}{direction:<18}{row['ours_ms']:>9.2f}"
                    f"{row['other_ms']:>12.2f}{row['ratio']:>7.1f}{row['error']:>10.1e}{row['other_error']:>10.1e}"
                )


if __name__ == "__main__":
    main()
