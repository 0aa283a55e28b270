"""Tests affinity_moments against float64 and PyTorch's own composition, and as an operator."""

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import CONTEXTS, WIDE_CONTEXTS, ContextCase, channels_last, draw_context, nchw
from places import CPU, dtypes, layouts, places

import apc_kernels

ODD = ContextCase(2, 13, (9, 23), (1, 2, 6))
NAMES = ("x", "weight", "bias")


def moments_with_gradients(function, case, tensors):
    leaves = [tensors[name].detach().requires_grad_() for name in NAMES]
    mean, covariances = function(*leaves, case.scales)
    generator = torch.Generator().manual_seed(0)
    moments = [mean, *covariances]
    grads = [torch.randn(m.shape, generator=generator).to(m) for m in moments]
    return *(m.detach() for m in moments), *torch.autograd.grad(moments, leaves, grads)


def check(case, tensors, backend):
    with apc_kernels.backend(backend):
        actual = moments_with_gradients(apc_kernels.affinity_moments, case, tensors)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    exact = moments_with_gradients(stock.affinity_moments, case, wide)
    pytorch = moments_with_gradients(stock.affinity_moments, case, tensors)
    names = ["mean", *(f"covariance {s}" for s in case.scales), *NAMES]
    for name, ours, true, own in zip(names, actual, exact, pytorch, strict=True):
        assert_accurate(ours, true, own, f"{case} {name}")


@places
@pytest.mark.parametrize("case", [case for case in (*CONTEXTS, *WIDE_CONTEXTS) if case.batch], ids=str)
def test_hard_cases(case, device, backend):
    if backend in ("triton", "cuda") and case in WIDE_CONTEXTS:
        pytest.skip("needs a backend that takes more than 64 regions a scale")
    check(case, draw_context(case, device=device), backend)


@places
@layouts
@dtypes
def test_layouts_and_dtypes(device, backend, layout, dtype):
    check(ODD, draw_context(ODD, layout, dtype, device), backend)


@pytest.mark.parametrize("backend", CPU)
def test_no_images(backend):
    case = ContextCase(0, 4, (6, 6))
    with apc_kernels.backend(backend):
        mean, covariances, *_ = moments_with_gradients(apc_kernels.affinity_moments, case, draw_context(case))[:2]
    assert mean.shape == (0, 50) and covariances.shape == (0, 1, 1)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_gradcheck(backend, layout):
    case = ContextCase(2, 2, (3, 4), (2, 1))
    t = draw_context(case, layout, torch.float64)

    def function(*given):
        mean, covariances = apc_kernels.affinity_moments(*given, case.scales)
        return mean, *covariances

    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, [t[name].requires_grad_() for name in NAMES])
        assert torch.autograd.gradcheck(lambda *given: function(*given)[2], [t["x"], t["weight"], t["bias"][0]])


@places
def test_float64_on_request(device, backend):
    """Moments of float32 affinities, to all digits: float32 would leave a variance that cancels with none."""
    t = draw_context(ODD, device=device)
    with apc_kernels.backend(backend):
        narrow = apc_kernels.affinity_moments(t["x"], t["weight"], t["bias"], ODD.scales)
        wide = apc_kernels.affinity_moments(t["x"], t["weight"], t["bias"], ODD.scales, dtype=torch.float64)
    assert wide[0].dtype == torch.float64 and all(c.dtype == torch.float64 for c in wide[1])
    assert same_bits(wide[0].float(), narrow[0])
    assert all(same_bits(w.float(), n) for w, n in zip(wide[1], narrow[1], strict=True))
    assert any((w != n.double()).any() for w, n in zip(wide[1], narrow[1], strict=True))


@places
def test_covariances_are_tensors_of_their_own(device, backend):
    t = draw_context(ODD, device=device)
    with apc_kernels.backend(backend):
        mean, covariances = apc_kernels.affinity_moments(t["x"], t["weight"], t["bias"], ODD.scales)
    assert len({c.untyped_storage().data_ptr() for c in (mean, *covariances)}) == 1 + len(covariances)
    assert all(c.is_contiguous() and c.untyped_storage().nbytes() == c.nbytes for c in covariances)


@places
def test_nan_goes_to_its_own_scale(device, backend):
    t = draw_context(ODD, device=device)
    t["x"][0, ODD.channels, 3, 3] = float("nan")  # the second scale's
    with apc_kernels.backend(backend):
        mean, covariances = apc_kernels.affinity_moments(t["x"], t["weight"], t["bias"], ODD.scales)
    assert mean[0, 1:5].isnan().all() and covariances[1][0].isnan().all()
    assert mean[0, [0, *range(5, 41)]].isfinite().all() and mean[1].isfinite().all()
    assert covariances[0].isfinite().all() and covariances[2].isfinite().all()


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_same_bits_with_any_number_of_threads(threads, layout):
    case, results = ContextCase(3, 40, (61, 27)), []
    for count in (1, 2, 3, 5):
        threads(count)
        with apc_kernels.backend("cpp"):
            results.append(moments_with_gradients(apc_kernels.affinity_moments, case, draw_context(case, layout)))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# As an operator


@places
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_opcheck(device, backend, layout):
    t = draw_context(ODD, layout, device=device)
    arguments = (t["x"].requires_grad_(), t["weight"].requires_grad_(), t["bias"], list(ODD.scales))
    with apc_kernels.backend(backend):
        torch.library.opcheck(torch.ops.apc_kernels.affinity_moments.default, arguments)


@places
def test_compile(device, backend):
    compiled = torch.compile(apc_kernels.affinity_moments, fullgraph=True, dynamic=True, backend="aot_eager")
    with apc_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for case in (ODD, ContextCase(3, 13, (12, 7), ODD.scales)):
            t = draw_context(case, channels_last, device=device)
            expected = moments_with_gradients(apc_kernels.affinity_moments, case, t)
            actual = moments_with_gradients(compiled, case, t)
            for a, b in zip(actual, expected, strict=True):
                if backend == "reference":  # PyTorch's own products are compiled into others
                    torch.testing.assert_close(a, b)
                else:
                    assert same_bits(a, b)


def test_export_holds_stock_operators_only():
    class Moments(torch.nn.Module):
        def forward(self, x, weight, bias):
            return apc_kernels.affinity_moments(x, weight, bias, ODD.scales)

    t = draw_context(ODD)
    arguments = (t["x"], t["weight"], t["bias"])
    program = torch.export.export(Moments(), arguments)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(call, "namespace", "aten") == "aten" or "getitem" in str(call) for call in calls), calls
    for a, b in zip(program.module()(*arguments)[1], Moments()(*arguments)[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x: expected 4 dimensions \(B, S·C, h, w\), got 3"),
        ({"x": torch.zeros(2, 40, 4, 4)}, ValueError, "x: expected a multiple of 3 channels, .* got 40"),
        ({"weight": torch.zeros(40, 13)}, ValueError, r"weight: expected \(41, 13\), got \(40, 13\)"),
        ({"bias": torch.zeros(3, 41)}, ValueError, r"bias: expected \(41,\) or \(2, 41\), got \(3, 41\)"),
        ({"scales": (1, 2, 33)}, ValueError, "scales: expected scales of 1 to 32"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype: expected float32 or float64 for this map, got bfloat16"),
        ({"x": None}, TypeError, "x: expected a tensor, got NoneType"),
    ],
)
def test_wrong_input(changed, error, message):
    t = draw_context(ODD)
    given = {"x": t["x"], "weight": t["weight"], "bias": t["bias"], "scales": ODD.scales} | changed
    with pytest.raises(error, match=message):
        apc_kernels.affinity_moments(**given)
