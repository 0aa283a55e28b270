"""adaptive_context_norm beside mmsegmentation's modules, the identities in plain PyTorch, and torch.compile.

    python -m benchmarks.adaptive_context_norm      the comparison, printed
    make bench                                      the same through pytest-benchmark, into a JSON file

From the reduced features of all scales to what the fusion convolution takes, forward and backward in training.
Bytes that have to move, in maps of x: forward 4 (x for its mean, for the moments, for the product, z), backward 5.
"""

import pytest
import stock
import torch
from cases import draw_norm

import apc_kernels
from apc_kernels import BatchNorm
from benchmarks.adaptive_context import BACKENDS, CASE, DEVICE, DTYPE, LAYOUTS, print_rows
from benchmarks.timing import paired, result_row

OTHERS = {
    "PyTorch modules": stock.adaptive_context_norm,
    "identities in PyTorch": stock.adaptive_context_norm_by_identities,
}
if DEVICE == "cuda":
    OTHERS["torch.compile of the modules"] = torch.compile(stock.adaptive_context_norm)
PARAMETERS = ("regions", "weight", "bias", "projection", "norm.weight", "norm.bias", "guide")
PARAMETERS += ("guide_norm.weight", "guide_norm.bias")


def functions(layout, other: str, backend: str):
    """A training step of ours and of the other side. Checked first: no figure stands behind a wrong result."""
    t = draw_norm(CASE, layout, DTYPE, DEVICE)
    x, grad, leaves = t["x"].requires_grad_(), t["grad"], [t[name].requires_grad_() for name in PARAMETERS]
    # The modules get maps of their own: slicing one would cost them copies.
    xs = [layout(part.detach()).requires_grad_() for part in x.chunk(len(CASE.scales), 1)]
    grads = [layout(part) for part in grad.chunk(len(CASE.scales), 1)]
    norms = [BatchNorm(*(t[f"{norm}.{field}"] for field in BatchNorm._fields[:4])) for norm in ("norm", "guide_norm")]
    small = (t["regions"], t["weight"], t["bias"], CASE.scales, t["projection"], norms[0])

    def ours():
        with apc_kernels.backend(backend):
            z = apc_kernels.adaptive_context_norm(x, *small, guide=t["guide"], guide_norm=norms[1])
        return z.detach(), *torch.autograd.grad(z, [x, *leaves], grad)

    def theirs():
        with torch.autocast(DEVICE, DTYPE, enabled=torch.float32 != DTYPE):
            zs = OTHERS[other](xs, *small, t["guide"], norms[1])
        return torch.autograd.grad(zs, [*xs, *leaves], grads), zs

    (z, grad_x, *_), (theirs_grads, zs) = ours(), theirs()
    # The gradient of x passes through a batch norm over two images, which magnifies rounding; tests compare in float64.
    for name, a, b, limit in (
        ("z", z, torch.cat([part.detach() for part in zs], 1), 1e-5),
        ("x", grad_x, torch.cat(theirs_grads[: len(xs)], 1), 1e-2),
    ):
        differs = (a.float() - b.float()).square().mean().sqrt() / b.float().square().mean().sqrt()
        limit = max(limit, 5e-2 * (DTYPE.itemsize < 4))
        assert differs < limit, f"{name} differs from {other} by {differs:.1e}"
    return ours, theirs


def measure(layout, other: str, backend: str, ours, theirs, seconds: float = 3.0) -> dict:
    case = ", ".join(("training step", str(CASE), layout.__name__, str(DTYPE)[len("torch.") :]))
    elements = CASE.batch * len(CASE.scales) * CASE.channels * CASE.size[0] * CASE.size[1]
    pair = paired(ours, theirs, DEVICE, seconds)
    return result_row("adaptive_context_norm", case, backend, other, pair, 9 * elements * DTYPE.itemsize, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def bench_adaptive_context_norm(benchmark, layout, other, backend):
    ours, theirs = functions(layout, other, backend)
    benchmark.extra_info.update(measure(layout, other, backend, ours, theirs))
    benchmark.pedantic(ours, rounds=5)


def main() -> None:
    backend = BACKENDS[0]
    settings = [(layout, other) for layout in LAYOUTS for other in OTHERS]
    print_rows("adaptive_context_norm", (measure(*s, backend, *functions(*s, backend)) for s in settings))


if __name__ == "__main__":
    main()
