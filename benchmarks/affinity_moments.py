"""affinity_moments beside PyTorch's composition, which is the reference its tests use.

    python -m benchmarks.affinity_moments      the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 1 (x read); backward 2 (x read, its gradient written).
Operations, in multiply-adds for each position: J·C a product with x, Σ s⁴ one with the affinities themselves; forward
one of each, backward three with x (the affinities again, the gradients of x and of the weight) and one of the others.
Memory is what a call needs at its peak beyond its arguments, results included.
"""

import itertools

import stock
import torch
from accuracy import assert_accurate
from cases import ContextCase, draw_context

import apc_kernels
from benchmarks import setting
from benchmarks.adaptive_context import CASE, SCALING, elements, product
from benchmarks.memory import peak_of_side, peaks
from benchmarks.scaling import scaled
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, LAYOUTS, name_of
from benchmarks.timing import paired, result_row


def square(case: ContextCase) -> int:
    """Operations of the product of the affinities with themselves, scale by scale."""
    return 2 * case.batch * case.size[0] * case.size[1] * sum(s**4 for s in case.scales)


def step(function, scales: tuple[int, ...], t: dict, direction: str):
    leaves = [t[name].requires_grad_(direction != "forward") for name in ("x", "weight", "bias")]

    def run():
        mean, covariances = function(*leaves, scales)
        moments = [mean, *covariances]
        return moments if direction == "forward" else torch.autograd.grad([m.sum() for m in moments], leaves)

    return run


def functions(case: ContextCase, layout, direction: str, backend: str, compiled: bool = False):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_context(case, layout, DTYPE, DEVICE)
    wide = {name: tensor.double() for name, tensor in t.items()}
    exact, eager = (step(stock.affinity_moments, case.scales, tensors, direction) for tensors in (wide, t))
    ours = setting.on(backend, step(apc_kernels.affinity_moments, case.scales, t, direction))
    other = step(setting.compile_anew(stock.affinity_moments), case.scales, t, direction) if compiled else eager
    for i, (actual, right, own) in enumerate(zip(ours(), exact(), eager(), strict=True)):
        assert_accurate(actual, right, own, f"{direction}, result {i}")
    return ours, other


def measure(
    case: ContextCase, layout, direction: str, backend: str, compiled: bool = False, **more: float
) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(case, layout, direction, backend, compiled)
    name = ", ".join((direction, str(case), layout.__name__, name_of(DTYPE)))
    maps, products, squares = (1, 1, 1) if direction == "forward" else (3, 4, 2)
    counts = maps * elements(case) * DTYPE.itemsize, products * product(case) + squares * square(case)
    beside = "PyTorch, " + ("torch.compile" if compiled else "op by op")
    return result_row("affinity_moments", name, backend, beside, paired(ours, other), *counts, **more), ours


def memory(layout, direction: str, backend: str, compiled: bool = False) -> dict[str, float]:
    return peaks("benchmarks.affinity_moments", layout.__name__, direction, ours=backend, compiled=compiled)


@setting.backends("cuda", "triton")
@setting.directions
@setting.layouts
def bench_affinity_moments(benchmark, layout, direction, backend):
    setting.need(backend, "affinity_moments")
    given = layout, direction, backend
    setting.record(benchmark, *measure(CASE, *given, **memory(*given)))


@setting.where_compiled
@setting.directions
def bench_compiled(benchmark, direction):
    given = setting.USUAL, direction, setting.best("affinity_moments"), True
    setting.record(benchmark, *measure(CASE, *given, **memory(*given)))


@scaled(SCALING)
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, "forward+backward", setting.best("affinity_moments"))
        setting.record(benchmark, point.row(row), ours)


def peak_of(layout: str, direction: str, side: str) -> int:
    def ready(function, case: ContextCase):
        return step(function, case.scales, draw_context(case, LAYOUTS[layout], DTYPE, DEVICE), direction)

    small = ContextCase(2, 16, (6, 6))
    return peak_of_side(side, apc_kernels.affinity_moments, stock.affinity_moments, ready, CASE, small)


def main() -> None:
    settings = itertools.product(LAYOUTS.values(), DIRECTIONS, [setting.best("affinity_moments")])
    setting.print_rows("affinity_moments", (measure(CASE, *each, **memory(*each))[0] for each in settings))


if __name__ == "__main__":
    main()
