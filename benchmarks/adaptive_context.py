"""adaptive_context beside PyTorch's composition, which is the reference its tests use.

    python -m benchmarks.adaptive_context      the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 2 (x read, z written); backward 5 (x and dz read for the gradients of the
regions and the shift, and again for dx, which is written).
Operations, in multiply-adds for each position: J·C a product; forward 2 products, backward 3 + 1 and 4 + 1.
Memory is what a call needs at its peak beyond its arguments, results included.
"""

import itertools

import stock
import torch
from accuracy import assert_accurate
from cases import ContextCase, draw_context

import apc_kernels
from benchmarks import setting
from benchmarks.memory import peak_of_side, peaks
from benchmarks.scaling import BATCHES, CHANNELS, COUNTS, SIDES, THREADS, points, scaled
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, LAYOUTS, here, name_of
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


def step(function, scales: tuple[int, ...], t: dict, direction: str):
    leaves = [t[name].requires_grad_(direction != "forward") for name in NAMES]

    def run():
        z = function(*leaves[:4], scales, shift=leaves[4], residual=True)
        return [z] if direction == "forward" else torch.autograd.grad(z, leaves, t["grad"])

    return run


def functions(case: ContextCase, layout, direction: str, backend: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_context(case, layout, DTYPE, DEVICE)
    wide = {name: tensor.double() for name, tensor in t.items()}
    # Rounding decides which way the ReLU goes near its kink: no gradient there.
    z = stock.adaptive_context(*(wide[name] for name in NAMES[:4]), case.scales) + wide["shift"][..., None, None]
    for grad in (t["grad"], wide["grad"]):
        grad.masked_fill_(z.abs() < (1e-3 if torch.float32 == DTYPE else 3e-2), 0)
    exact, eager = (step(stock.adaptive_context, case.scales, tensors, direction) for tensors in (wide, t))
    ours = setting.on(backend, step(apc_kernels.adaptive_context, case.scales, t, direction))
    other = step(setting.compile_anew(stock.adaptive_context), case.scales, t, direction) if compiled else eager
    names = ("z",) if direction == "forward" else NAMES
    for name, actual, right, own in zip(names, ours(), exact(), eager(), strict=True):
        assert_accurate(actual, right.detach(), own, f"{direction} {name}")
    return ours, other


def measure(
    case: ContextCase, layout, direction: str, backend: str, compiled: bool = False, **more: float
) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(case, layout, direction, backend, compiled)
    name = ", ".join((direction, str(case), layout.__name__, name_of(DTYPE)))
    maps, products = (2, 2) if direction == "forward" else (7, 11)
    counts = maps * elements(case) * DTYPE.itemsize, products * product(case)
    beside = "PyTorch, " + ("torch.compile" if compiled else "op by op")
    return result_row("adaptive_context", name, backend, beside, paired(ours, other), *counts, **more), ours


def memory(layout, direction: str, backend: str, compiled: bool = False) -> dict[str, float]:
    return peaks("benchmarks.adaptive_context", layout.__name__, direction, ours=backend, compiled=compiled)


@setting.backends("cuda", "triton")
@setting.directions
@setting.layouts
def bench_adaptive_context(benchmark, layout, direction, backend):
    setting.need(backend, "adaptive_context")
    given = layout, direction, backend
    setting.record(benchmark, *measure(CASE, *given, **memory(*given)))


@setting.where_compiled
@setting.directions
def bench_compiled(benchmark, direction):
    given = setting.USUAL, direction, setting.best("adaptive_context"), True
    setting.record(benchmark, *measure(CASE, *given, **memory(*given)))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, "forward+backward", setting.best("adaptive_context"))
        setting.record(benchmark, point.row(row), ours)


def peak_of(layout: str, direction: str, side: str) -> int:
    def ready(function, case: ContextCase):
        return step(function, case.scales, draw_context(case, LAYOUTS[layout], DTYPE, DEVICE), direction)

    small = ContextCase(2, 16, (6, 6))
    return peak_of_side(side, apc_kernels.adaptive_context, stock.adaptive_context, ready, CASE, small)


def main() -> None:
    settings = itertools.product(LAYOUTS.values(), DIRECTIONS, [setting.best("adaptive_context")])
    setting.print_rows("adaptive_context", (measure(CASE, *each, **memory(*each))[0] for each in settings))


if __name__ == "__main__":
    main()
