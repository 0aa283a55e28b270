"""adaptive_context_norm beside mmsegmentation's modules, the identities in plain PyTorch, and torch.compile.

    python -m benchmarks.adaptive_context_norm      the comparison, printed
    make bench                                      the same through pytest-benchmark, into a JSON file

From the reduced features of all scales to what the fusion convolution takes, forward and backward in training.
Bytes that have to move, in maps of x: forward 4 (x for its mean, for the moments, for the product, z), backward 5.
Operations are those of the two operations it is made of, affinity_moments forward and adaptive_context both ways.
Memory is what a step needs at its peak beyond its arguments, results included.
"""

import itertools

import pytest
import stock
import torch
from cases import ContextCase, draw_norm

import apc_kernels
from apc_kernels import BatchNorm
from benchmarks import setting
from benchmarks.adaptive_context import CASE, SCALING, elements, product
from benchmarks.affinity_moments import square
from benchmarks.memory import peak_here, peaks
from benchmarks.scaling import scaled
from benchmarks.setting import DEVICE, DTYPE, LAYOUTS, ON_GPU, name_of
from benchmarks.timing import paired, result_row

MODULES, IDENTITIES, COMPILED = "PyTorch modules", "identities in PyTorch", "torch.compile of the modules"
OTHERS = (MODULES, IDENTITIES, COMPILED) if ON_GPU else (MODULES, IDENTITIES)
PARAMETERS = ("regions", "weight", "bias", "projection", "norm.weight", "norm.bias", "guide")
PARAMETERS += ("guide_norm.weight", "guide_norm.bias")


def functions(case: ContextCase, layout, other: str, backend: str):
    """A training step of ours and of the other side. Checked first: no figure stands behind a wrong result."""
    t = draw_norm(case, layout, DTYPE, DEVICE)
    ours, theirs = setting.on(backend, _fused(case, t)), _by_scale(case, layout, t, other)
    wide = {name: tensor.detach().double() for name, tensor in t.items()}
    exact, modules = _by_scale(case, layout, wide, MODULES)(), _by_scale(case, layout, t, MODULES)()
    # The gradient of x passes through a batch norm over as many values as images, which magnifies rounding.
    for side, step in (("ours", ours), (other, theirs)):
        for name, given, right, own, unit in zip(("z", "x"), step(), exact, modules, (1e-6, 1e-4), strict=False):
            error, its = _error(given, right), _error(own, right)
            allowed = 2 * its + (unit if torch.float32 == DTYPE else 1e-2)
            assert error <= allowed, f"{side}: {name} is {error:.1e} off, the modules' {its:.1e}"
    return ours, theirs


def _fused(case: ContextCase, t: dict):
    """z, the gradient of x, and those of the parameters."""
    x, leaves = t["x"].requires_grad_(), [t[name].requires_grad_() for name in PARAMETERS]
    norm, guide_norm = _norms(t)
    small = (t["regions"], t["weight"], t["bias"], case.scales, t["projection"], norm)

    def run():
        z = apc_kernels.adaptive_context_norm(x, *small, guide=t["guide"], guide_norm=guide_norm)
        return z.detach(), *torch.autograd.grad(z, [x, *leaves], t["grad"])

    return run


def _by_scale(case: ContextCase, layout, t: dict, other: str):
    """The same of the other side, which takes the scales' maps one by one: its own, for slicing would cost copies."""
    function = stock.adaptive_context_norm_by_identities if other == IDENTITIES else stock.adaptive_context_norm
    function = setting.compile_anew(function) if other == COMPILED else function
    leaves = [t[name].requires_grad_() for name in PARAMETERS]
    xs = [layout(part.detach()).requires_grad_() for part in t["x"].chunk(len(case.scales), 1)]
    grads = [layout(part) for part in t["grad"].chunk(len(case.scales), 1)]
    norm, guide_norm = _norms(t)
    small = (t["regions"], t["weight"], t["bias"], case.scales, t["projection"], norm)

    def run():
        with torch.autocast(DEVICE, DTYPE, enabled=xs[0].itemsize < 4):
            zs = function(xs, *small, t["guide"], guide_norm)
        gradients = torch.autograd.grad(zs, [*xs, *leaves], grads)
        return [z.detach() for z in zs], gradients[: len(xs)], *gradients[len(xs) :]

    return run


def _norms(t: dict) -> list[BatchNorm]:
    return [BatchNorm(*(t[f"{norm}.{field}"] for field in BatchNorm._fields[:4])) for norm in ("norm", "guide_norm")]


def _error(given, exact) -> float:
    """Of a map, or of those of all scales, relative to its root mean square."""
    given, exact = (t if torch.is_tensor(t) else torch.cat(list(t), 1) for t in (given, exact))
    return ((given.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def measure(case: ContextCase, layout, other: str, backend: str, **more: float) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, theirs = functions(case, layout, other, backend)
    name = ", ".join(("training step", str(case), layout.__name__, name_of(DTYPE)))
    counts = 9 * elements(case) * DTYPE.itemsize, 12 * product(case) + square(case)
    return result_row("adaptive_context_norm", name, backend, other, paired(ours, theirs), *counts, **more), ours


def memory(layout, other: str, backend: str) -> dict[str, float]:
    return peaks("benchmarks.adaptive_context_norm", layout.__name__, ours=backend, other=other)


@setting.backends("cuda", "triton")
@pytest.mark.parametrize("other", OTHERS)
@setting.layouts
def bench_adaptive_context_norm(benchmark, layout, other, backend):
    setting.need(backend, "adaptive_context")
    given = layout, other, backend
    setting.record(benchmark, *measure(CASE, *given, **memory(*given)))


# A batch norm in training needs two images: of one the pooled vectors have no variance.
@scaled([point for point in SCALING if point.case.batch > 1])
def bench_scaling(benchmark, point):
    with point.threads():
        row, ours = measure(point.case, setting.USUAL, MODULES, setting.best("adaptive_context"))
        setting.record(benchmark, point.row(row), ours)


def peak_of(layout: str, side: str) -> int:
    """Of a call on a backend, or of one of OTHERS."""

    def ready(case: ContextCase):
        t = draw_norm(case, LAYOUTS[layout], DTYPE, DEVICE)
        return _by_scale(case, LAYOUTS[layout], t, side) if side in OTHERS else setting.on(side, _fused(case, t))

    call = ready(CASE)
    first = call if side == COMPILED else ready(ContextCase(2, 16, (6, 6)))
    first()
    return peak_here(call)


def main() -> None:
    settings = itertools.product(LAYOUTS.values(), OTHERS, [setting.best("adaptive_context")])
    setting.print_rows("adaptive_context_norm", (measure(CASE, *each, **memory(*each))[0] for each in settings))


if __name__ == "__main__":
    main()
