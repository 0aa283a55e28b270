"""Tests the Triton kernels on affinities, run on the CPU, against float64 and PyTorch's composition.

Every hard case in float32; every layout, float16, and what may be left out, on cases that are odd in all directions.
By Triton's interpreter, for which bfloat16 is multiplied as float32 because its own products of it are wrong, and as
compiled code (tests/ptx, slow).
"""

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import CONTEXTS, LAYOUTS, ContextCase, channels_last, draw_context, nchw

import apc_kernels
from apc_kernels.ops.affinities import reference
from apc_kernels.ops.affinities.context import backward_regions, backward_x

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU")

ODD = ContextCase(2, 13, (5, 13), (1, 2, 6))
SMALL = ContextCase(2, 3, (3, 23), (3, 1))  # three tiles of 32 positions, and two of 64
NAMES = ("x", "regions", "weight", "bias", "shift", "center")
KINK = {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 3e-2}

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
CASES = [case for case in CONTEXTS if case.batch]  # no images reach no kernel
MANY_TILES = [case for case in CASES if case.size[0] * case.size[1] > 250]  # programs know nothing of each other
SLOW = [case for case in CASES if sum(case.scales) > 10 and case.size[0] * case.size[1] > 200]


@pytest.fixture(autouse=True)
def triton_serves(triton_machine):
    with apc_kernels.backend("triton"):
        yield


def with_gradients(function, case, tensors, residual=True, names=NAMES):
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    given = {name: leaves.get(name) for name in ("shift", "center")}
    z = function(*(leaves[name] for name in NAMES[:4]), case.scales, residual=residual, **given)
    return z.detach(), *torch.autograd.grad(z, list(leaves.values()), tensors["grad"])


def draw(case, layout=nchw, dtype=torch.float32, names=NAMES):
    """Draws tensors, with no gradient where the ReLU's input is so near to 0 that rounding decides its sign."""
    tensors = draw_context(case, layout, dtype)
    t = {name: tensor.double() for name, tensor in tensors.items()}
    given = (t["x"], t["regions"], t["weight"], t["bias"], case.scales)
    z = stock.adaptive_context(*given, center=t["center"] if "center" in names else None) + t["shift"][..., None, None]
    tensors["grad"].masked_fill_(z.abs() < KINK[dtype], 0)
    return tensors


def check(case, tensors, residual=True, names=NAMES):
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    actual = with_gradients(apc_kernels.adaptive_context, case, tensors, residual, names)
    exact = with_gradients(stock.adaptive_context, case, wide, residual, names)
    pytorch = with_gradients(stock.adaptive_context, case, tensors, residual, names)
    for name, ours, true, own in zip(("z", *names), actual, exact, pytorch, strict=True):
        assert_accurate(ours, true, own, f"{case} {name}")


@pytest.mark.parametrize("case", [case for case in CASES if case not in MANY_TILES], ids=str)
def test_hard_cases(case):
    check(case, draw(case))


@layouts
def test_layouts(layout):
    check(ODD, draw(ODD, layout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_low_precision(layout, dtype):
    check(ODD, draw(ODD, layout, dtype))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("optional", [(), ("shift",), ("center",)], ids="-".join)
def test_what_can_be_left_out(residual, optional):
    names = NAMES[:4] + optional
    check(SMALL, draw(SMALL, names=names), residual, names)


def test_maps_of_different_layouts():
    tensors = draw(SMALL)
    x, grad = channels_last(tensors["x"]), channels_last(tensors["grad"])
    expected = with_gradients(apc_kernels.adaptive_context, SMALL, tensors)
    for changed in ({"x": x}, {"grad": grad}):
        results = with_gradients(apc_kernels.adaptive_context, SMALL, tensors | changed)
        for actual, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("names", [("shift", "center"), ()], ids=["all", "neither shift nor center"])
def test_sums_that_the_gradient_of_the_bias_consists_of(names):
    t = draw(ODD, names=NAMES if names else NAMES[:4])
    shift, center = (t[name] if name in names else None for name in ("shift", "center"))
    arguments = (t["grad"], t["x"], t["regions"], t["weight"], t["bias"], ODD.scales, shift, center)
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    exact = reference.adaptive_context_backward_regions(*wide)
    in_float32 = reference.adaptive_context_backward_regions(*arguments)
    for actual, true, own in zip(backward_regions(*arguments), exact, in_float32, strict=True):
        assert_accurate(actual, true, own, "sums")


@pytest.mark.parametrize("scale", [1.0, 1e-12, 0.0])
def test_gradients_with_those_of_moments(scale):
    """All that backward_x takes at once; what the moments add may be as small as a loss makes it."""
    t = draw(ODD)
    generator = torch.Generator().manual_seed(0)
    t["linear"] = torch.randn(t["bias"].shape, generator=generator) * scale
    t["quadratic"] = torch.randn(2, sum(s**4 for s in ODD.scales), generator=generator) * scale
    t["constant"] = torch.randn(t["shift"].shape, generator=generator)
    names = ("regions", "weight", "bias", "shift", "center", "linear", "quadratic", "constant")
    regions, weight, bias, shift, center, linear, quadratic, constant = (t[name] for name in names)
    arguments = t["grad"], t["x"], regions, weight, bias, ODD.scales, shift, True, center, linear, quadratic, constant
    alone = None, t["x"], None, weight, bias, ODD.scales, None, False, center, linear, quadratic, None
    for given in (arguments, alone):
        wide = [a.double() if isinstance(a, torch.Tensor) else a for a in given]
        exact, in_float32 = (reference.adaptive_context_backward_x(*a) for a in (wide, given))
        for actual, true, own in zip(backward_x(*given), exact, in_float32, strict=True):
            assert_accurate(actual, true, own, f"gradients beside {scale}")


@pytest.mark.parametrize("case", [case for case in CASES if case not in SLOW], ids=str)
def test_moments(case):
    check_moments(case, draw_context(case))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not nchw], ids=lambda f: f.__name__)
def test_moments_of_every_layout(layout):
    check_moments(SMALL, draw_context(SMALL, layout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_moments_in_low_precision(dtype):
    check_moments(ODD, draw_context(ODD, dtype=dtype))


def check_moments(case, tensors):
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    actual = moments_with_gradients(apc_kernels.affinity_moments, case, tensors)
    exact = moments_with_gradients(stock.affinity_moments, case, wide)
    pytorch = moments_with_gradients(stock.affinity_moments, case, tensors)
    for place, (ours, true, own) in enumerate(zip(actual, exact, pytorch, strict=True)):
        assert_accurate(ours, true, own, f"{case} {place}")


def moments_with_gradients(function, case, tensors):
    leaves = [tensors[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
    mean, covariances = function(*leaves, case.scales)
    generator = torch.Generator().manual_seed(0)
    moments = [mean, *covariances]
    grads = [torch.randn(m.shape, generator=generator).to(m) for m in moments]
    return *(m.detach() for m in moments), *torch.autograd.grad(moments, leaves, grads)


def test_moments_of_affinities_that_hardly_vary():
    """Squares of deviations from the mean, not differences of large numbers: 1e-8 of variance beside means of 0.5."""
    t = draw_context(SMALL)
    t["weight"] *= 1e-4
    t["bias"] *= 1e-4
    wide = [t[name].double() for name in ("x", "weight", "bias")]
    _, exact = stock.affinity_moments(*wide, SMALL.scales)
    _, actual = apc_kernels.affinity_moments(t["x"], t["weight"], t["bias"], SMALL.scales, dtype=torch.float64)
    for ours, true in zip(actual, exact, strict=True):
        assert (ours - true).abs().max() < 2e-3 * true.abs().max()  # the affinities' own rounding: 3e-8 of 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_pixel(value):
    t = draw(SMALL)
    t["x"][1, 4, 1, 20] = value  # the second scale's second channel
    given = t["regions"], t["weight"], t["bias"], SMALL.scales
    z, grad_x = with_gradients(apc_kernels.adaptive_context, SMALL, t, residual=False)[:2]
    expected = stock.adaptive_context(t["x"], *given, t["shift"], False, t["center"])
    torch.testing.assert_close(z, expected, equal_nan=True)
    others = torch.ones_like(z, dtype=torch.bool)
    others[1, 3:, 1, 20] = False
    assert bool(z[others].isfinite().all()) and bool(grad_x[others].isfinite().all())
    assert bool(z[~others].isnan().all()) == (value != value)
    mean, covariances = apc_kernels.affinity_moments(t["x"], t["weight"], t["bias"], SMALL.scales)
    assert bool(mean[:, :9].isfinite().all()) and bool(mean[0].isfinite().all())
    assert bool(mean[1, 9].isnan()) == bool(covariances[1][1].isnan().all()) == (value != value)


def test_an_infinite_gradient_stays_in_its_pixel():
    t = draw(SMALL)
    t["grad"].zero_()
    t["grad"][1, 4, 1, 20] = float("inf")
    z, grad_x, grad_regions, *_ = with_gradients(apc_kernels.adaptive_context, SMALL, t, names=NAMES[:4])
    others = torch.ones_like(z, dtype=torch.bool)
    others[1, 3:, 1, 20] = False
    assert bool((grad_x[others] == 0).all())
    assert not bool(grad_x[1, 4, 1, 20].isfinite())
    assert bool((grad_regions[0] == 0).all()) and bool((grad_regions[1, :9] == 0).all())
    assert grad_regions[1, 9].isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_same_bits_every_time(dtype):
    tensors = draw(SMALL, channels_last, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            with_gradients(apc_kernels.adaptive_context, SMALL, tensors)
            + moments_with_gradients(apc_kernels.affinity_moments, SMALL, tensors)
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
