"""adaptive_context beside PyTorch's composition, which is the reference its tests use.

    python -m benchmarks.adaptive_context      the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 2 (x read, z written); backward 5 (x and dz read for the gradients of the
regions and the shift, and again for dx, which is written).
Operations, in multiply-adds for each position: J·C a product; forward 2 products, backward 3 + 1 and 4 + 1.
"""

import itertools

import stock
import torch
from accuracy import assert_accurate
from cases import ContextCase, draw_context

import apc_kernels
from benchmarks import setting
from benchmarks.scaling import BATCHES, CHANNELS, COUNTS, SIDES, THREADS, points, scaled
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, here, name_of
from benchmarks.timing import paired, result_row

CASE = here(ContextCase(2, 512, (64, 64)), ContextCase(8, 512, (64, 64)), ContextCase(2, 16, (6, 6)))
SCALING = points(CASE, batch=BATCHES, size=SIDES, channels=CHANNELS, scales=COUNTS, threads=THREADS)
NAMES = ("x", "regions", "weight", "bias", "shift")


def elements(case: ContextCase) -> int:
    """Of a map of all scales."""
    return case.batch * len(case.scales) * case.channels * case.size[0] * case.size[1]


def product(case: ContextCase) -> int:
    """Operations of the product of all positions with the rows of all scales."""
    return 2 * case.batch * case.size[0] * case.size[1] * sum(s * s for s in case.scales) * case.channels


def functions(case: ContextCase, layout, direction: str, backend: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_context(case, layout, DTYPE, DEVICE)
    narrow = [t[name].requires_grad_(direction != "forward") for name in NAMES]
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in narrow]

    def step(function, leaves):
        def run():
            z = function(*leaves[:4], case.scales, shift=leaves[4], residual=True)
            return [z] if direction == "forward" else torch.autograd.grad(z, leaves, t["grad"].to(z.dtype))

        return run

    with torch.no_grad():  # rounding decides which way the ReLU goes near its kink: no gradient there
        z = stock.adaptive_context(*(leaf.double() for leaf in narrow[:4]), case.scales)
        near = (z + narrow[4].double()[..., None, None]).abs() < (1e-3 if torch.float32 == DTYPE else 3e-2)
        t["grad"].masked_fill_(near, 0)
    ours = setting.on(backend, step(apc_kernels.adaptive_context, narrow))
    other = step(stock.adaptive_context, narrow)
    names = ("z",) if direction == "forward" else NAMES
    for name, actual, exact, own in zip(names, ours(), step(stock.adaptive_context, wide)(), other(), strict=True):
        assert_accurate(actual, exact, own, f"{direction} {name}")
    return ours, other


def measure(case: ContextCase, layout, direction: str, backend: str) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(case, layout, direction, backend)
    name = ", ".join((direction, str(case), layout.__name__, name_of(DTYPE)))
    maps, products = (2, 2) if direction == "forward" else (7, 11)
    counts = maps * elements(case) * DTYPE.itemsize, products * product(case)
    return result_row("adaptive_context", name, backend, "PyTorch, op by op", paired(ours, other), *counts), ours


@setting.backends("cuda", "triton")
@setting.directions
@setting.layouts
def bench_adaptive_context(benchmark, layout, direction, backend):
    setting.need(backend, "adaptive_context")
    setting.record(benchmark, *measure(CASE, layout, direction, backend))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, "forward+backward", setting.best("adaptive_context"))
        setting.record(benchmark, point.row(row), ours)


def main() -> None:
    settings = itertools.product([CASE], setting.LAYOUTS.values(), DIRECTIONS, [setting.best("adaptive_context")])
    setting.print_rows("adaptive_context", (measure(*each)[0] for each in settings))


if __name__ == "__main__":
    main()
