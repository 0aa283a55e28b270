"""adaptive_context beside PyTorch's composition, which is the reference its tests use.

    python -m benchmarks.adaptive_context      the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 2 (x read, z written); backward 5 (x and dz read for the gradients of the
regions and the shift, and again for dx, which is written).
Operations, in multiply-adds for each position: J·C a product; forward 2 products, backward 3 + 1 and 4 + 1.
"""

from collections.abc import Iterable

import pytest
import stock
import torch
from accuracy import assert_accurate
from cases import ContextCase, channels_last, draw_context, nchw

import apc_kernels
from benchmarks.timing import paired, result_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("cuda", "triton") if DEVICE == "cuda" else ("cpp",)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
CASE = ContextCase(8 if DEVICE == "cuda" else 2, 512, (64, 64))
LAYOUTS = (nchw, channels_last)
DIRECTIONS = ("forward", "forward+backward")
NAMES = ("x", "regions", "weight", "bias", "shift")


def functions(layout, direction: str, backend: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_context(CASE, layout, DTYPE, DEVICE)
    narrow = [t[name].requires_grad_(direction != "forward") for name in NAMES]
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in narrow]

    def step(function, leaves):
        def run():
            z = function(*leaves[:4], CASE.scales, shift=leaves[4], residual=True)
            return [z] if direction == "forward" else torch.autograd.grad(z, leaves, t["grad"].to(z.dtype))

        return run

    def on_backend(*given, **options):
        with apc_kernels.backend(backend):
            return apc_kernels.adaptive_context(*given, **options)

    with torch.no_grad():  # rounding decides which way the ReLU goes near its kink: no gradient there
        z = stock.adaptive_context(*(leaf.double() for leaf in narrow[:4]), CASE.scales)
        near = (z + narrow[4].double()[..., None, None]).abs() < (1e-3 if torch.float32 == DTYPE else 3e-2)
        t["grad"].masked_fill_(near, 0)
    ours, other = step(on_backend, narrow), step(stock.adaptive_context, narrow)
    names = ("z",) if direction == "forward" else NAMES
    for name, actual, exact, own in zip(names, ours(), step(stock.adaptive_context, wide)(), other(), strict=True):
        assert_accurate(actual, exact, own, f"{direction} {name}")
    return ours, other


def measure(layout, direction: str, backend: str, ours, other, seconds: float = 2.0) -> dict:
    case = ", ".join((direction, str(CASE), layout.__name__, str(DTYPE)[len("torch.") :]))
    maps = 2 if direction == "forward" else 7
    elements = CASE.batch * len(CASE.scales) * CASE.channels * CASE.size[0] * CASE.size[1]
    pair = paired(ours, other, DEVICE, seconds)
    moved = maps * elements * DTYPE.itemsize
    return result_row("adaptive_context", case, backend, "PyTorch, op by op", pair, moved, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def bench_adaptive_context(benchmark, layout, direction, backend):
    ours, other = functions(layout, direction, backend)
    benchmark.extra_info.update(measure(layout, direction, backend, ours, other))
    benchmark.pedantic(ours, rounds=5)


def print_rows(operation: str, rows: Iterable[dict]) -> None:
    place = apc_kernels.dispatch.gpu() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{operation}, {str(DTYPE).removeprefix('torch.')}, {place}\n")
    print(f"{'':<76}{'ours ms':>9}{'other ms':>10}{'times':>7}")
    for row in rows:
        name = f"{row['case']} | {row['other']}"
        print(f"{name:<76}{row['ours_ms']:>9.2f}{row['other_ms']:>10.2f}{row['ratio']:>7.1f}", flush=True)


def main() -> None:
    backend = BACKENDS[0]
    settings = [(layout, direction) for layout in LAYOUTS for direction in DIRECTIONS]
    print_rows("adaptive_context", (measure(*s, backend, *functions(*s, backend), seconds=1.0) for s in settings))


if __name__ == "__main__":
    main()
