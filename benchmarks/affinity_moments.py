"""affinity_moments beside PyTorch's composition, which is the reference its tests use.

    python -m benchmarks.affinity_moments      the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 1 (x read); backward 2 (x read, its gradient written).
Operations, in multiply-adds for each position: J·C a product with x, Σ s⁴ one with the affinities themselves; forward
one of each, backward three with x (the affinities again, the gradients of x and of the weight) and one of the others.
"""

import itertools

import stock
import torch
from accuracy import assert_accurate
from cases import ContextCase, draw_context

import apc_kernels
from benchmarks import setting
from benchmarks.adaptive_context import CASE, elements, product
from benchmarks.setting import DEVICE, DIRECTIONS, DTYPE, name_of
from benchmarks.timing import paired, result_row


def square(case: ContextCase) -> int:
    """Operations of the product of the affinities with themselves, scale by scale."""
    return 2 * case.batch * case.size[0] * case.size[1] * sum(s**4 for s in case.scales)


def functions(case: ContextCase, layout, direction: str, backend: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_context(case, layout, DTYPE, DEVICE)
    narrow = [t[name].requires_grad_(direction != "forward") for name in ("x", "weight", "bias")]
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in narrow]

    def step(function, leaves):
        def run():
            mean, covariances = function(*leaves, case.scales)
            moments = [mean, *covariances]
            return moments if direction == "forward" else torch.autograd.grad([m.sum() for m in moments], leaves)

        return run

    ours = setting.on(backend, step(apc_kernels.affinity_moments, narrow))
    other = step(stock.affinity_moments, narrow)
    for i, (actual, exact, own) in enumerate(zip(ours(), step(stock.affinity_moments, wide)(), other(), strict=True)):
        assert_accurate(actual, exact, own, f"{direction}, result {i}")
    return ours, other


def measure(layout, direction: str, backend: str) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(CASE, layout, direction, backend)
    name = ", ".join((direction, str(CASE), layout.__name__, name_of(DTYPE)))
    maps, products, squares = (1, 1, 1) if direction == "forward" else (3, 4, 2)
    counts = maps * elements(CASE) * DTYPE.itemsize, products * product(CASE) + squares * square(CASE)
    return result_row("affinity_moments", name, backend, "PyTorch, op by op", paired(ours, other), *counts), ours


@setting.backends("cuda", "triton")
@setting.directions
@setting.layouts
def bench_affinity_moments(benchmark, layout, direction, backend):
    setting.need(backend, "affinity_moments")
    setting.record(benchmark, *measure(layout, direction, backend))


def main() -> None:
    settings = itertools.product(setting.LAYOUTS.values(), DIRECTIONS, [setting.best("affinity_moments")])
    setting.print_rows("affinity_moments", (measure(*each)[0] for each in settings))


if __name__ == "__main__":
    main()
