"""affinity_moments beside PyTorch's composition, which is the reference its tests use.

    python -m benchmarks.affinity_moments      the comparison, printed
    make bench                                 the same through pytest-benchmark, into a JSON file

Bytes that have to move, in maps of x: forward 1 (x read); backward 2 (x read, its gradient written).
"""

import pytest
import stock
import torch
from accuracy import assert_accurate
from cases import channels_last, draw_context, nchw

import apc_kernels
from benchmarks.adaptive_context import BACKENDS, CASE, DEVICE, DIRECTIONS, DTYPE, LAYOUTS, print_rows
from benchmarks.timing import paired, result_row


def functions(layout, direction: str, backend: str):
    """Ours and PyTorch's on the same input. Checked first: no figure stands behind a wrong result."""
    t = draw_context(CASE, layout, DTYPE, DEVICE)
    narrow = [t[name].requires_grad_(direction != "forward") for name in ("x", "weight", "bias")]
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in narrow]

    def step(function, leaves):
        def run():
            mean, covariances = function(*leaves, CASE.scales)
            moments = [mean, *covariances]
            return moments if direction == "forward" else torch.autograd.grad([m.sum() for m in moments], leaves)

        return run

    def on_backend(*given):
        with apc_kernels.backend(backend):
            return apc_kernels.affinity_moments(*given)

    ours, other = step(on_backend, narrow), step(stock.affinity_moments, narrow)
    for i, (actual, exact, own) in enumerate(zip(ours(), step(stock.affinity_moments, wide)(), other(), strict=True)):
        assert_accurate(actual, exact, own, f"{direction}, result {i}")
    return ours, other


def measure(layout, direction: str, backend: str, ours, other, seconds: float = 2.0) -> dict:
    case = ", ".join((direction, str(CASE), layout.__name__, str(DTYPE)[len("torch.") :]))
    batch, channels, (height, width), scales = CASE.batch, CASE.channels, CASE.size, CASE.scales
    maps = (1 if direction == "forward" else 3) * batch * len(scales) * channels * height * width
    pair = paired(ours, other, DEVICE, seconds)
    return result_row("affinity_moments", case, backend, "PyTorch, op by op", pair, maps * DTYPE.itemsize, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def bench_affinity_moments(benchmark, layout, direction, backend):
    ours, other = functions(layout, direction, backend)
    benchmark.extra_info.update(measure(layout, direction, backend, ours, other))
    benchmark.pedantic(ours, rounds=5)


def main() -> None:
    backend = BACKENDS[0]
    settings = [(layout, direction) for layout in LAYOUTS for direction in DIRECTIONS]
    print_rows("affinity_moments", (measure(*s, backend, *functions(*s, backend), seconds=1.0) for s in settings))


if __name__ == "__main__":
    main()
