"""Tests adaptive_context against float64 and against PyTorch's own composition, on every backend that can run here.

Grid: every hard case in float32 and NCHW with everything asked for; every layout and dtype on a case that is odd in all
directions; every combination of what can be left out on a small one. The interpreter and the emulation have files of
their own (test_adaptive_context_triton.py, test_adaptive_context_cuda.py).
"""

import instruction_sets
import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import CONTEXTS, LAYOUTS, WIDE_CONTEXTS, ContextCase, channels_last, draw_context, nchw, transposed
from hypothesis import given, settings
from hypothesis import strategies as st
from places import CPU, dtypes, layouts, places

import apc_kernels
from apc_kernels.ops.affinities import reference
from apc_kernels.ops.affinities.context import backward_regions

ODD = ContextCase(2, 13, (9, 23), (1, 2, 6))
NAMES = ("x", "regions", "weight", "bias", "shift", "center")
KINK = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def context_with_gradients(function, case, tensors, residual=True, names=NAMES):
    """Returns z and the gradients of what `names` lists; what it does not list is not given, or has no gradient."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    given = {name: leaves.get(name) for name in ("shift", "center")}
    z = function(*(leaves[name] for name in NAMES[:4]), case.scales, residual=residual, **given)
    return z.detach(), *torch.autograd.grad(z, list(leaves.values()), tensors["grad"])


def without_kink(case, tensors):
    """Removes the gradient where the ReLU's input is so near to 0 that rounding decides its sign."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    given = (t["x"], t["regions"], t["weight"], t["bias"], case.scales)
    z = stock.adaptive_context(*given, center=t["center"]) + t["shift"][..., None, None]
    near = z.abs() < KINK[tensors["x"].dtype]
    return tensors | {"grad": tensors["grad"].masked_fill(near, 0)}


def check(case, tensors, backend, residual=True, names=NAMES):
    tensors = without_kink(case, tensors)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    with apc_kernels.backend(backend):
        actual = context_with_gradients(apc_kernels.adaptive_context, case, tensors, residual, names)
    exact = context_with_gradients(stock.adaptive_context, case, wide, residual, names)
    pytorch = context_with_gradients(stock.adaptive_context, case, tensors, residual, names)
    for name, ours, true, own in zip(("z", *names), actual, exact, pytorch, strict=True):
        if ours.dtype == torch.float64:  # PyTorch's own is the yardstick itself
            torch.testing.assert_close(ours, true)
        else:
            assert_accurate(ours, true, own, f"{case} {name}")


@places
@pytest.mark.parametrize("case", [*CONTEXTS, *WIDE_CONTEXTS], ids=str)
def test_hard_cases(case, device, backend):
    if backend in ("triton", "cuda") and case in WIDE_CONTEXTS:
        pytest.skip("needs a backend that takes more than 64 regions a scale")
    check(case, draw_context(case, device=device), backend)


@places
@layouts
@dtypes
def test_layouts_and_dtypes(device, backend, layout, dtype):
    check(ODD, draw_context(ODD, layout, dtype, device), backend)


@places
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("optional", [(), ("shift",), ("center",), ("shift", "center")], ids="-".join)
def test_what_can_be_left_out(device, backend, residual, optional):
    case = ContextCase(2, 6, (5, 21), (3, 1))
    check(case, draw_context(case, device=device), backend, residual, NAMES[:4] + optional)


@places
def test_one_bias_and_one_shift_for_all_images(device, backend):
    tensors = without_kink(ODD, draw_context(ODD, device=device))
    tensors |= {"bias": tensors["bias"][0], "shift": tensors["shift"][0]}
    repeated = tensors | {name: tensors[name].expand(2, -1) for name in ("bias", "shift")}
    with apc_kernels.backend(backend):
        z, *shared = context_with_gradients(apc_kernels.adaptive_context, ODD, tensors)
        expected, *each = context_with_gradients(apc_kernels.adaptive_context, ODD, repeated)
    assert same_bits(z, expected)
    for name, one, all_images in zip(NAMES, shared, each, strict=True):
        torch.testing.assert_close(one, all_images.sum(0) if name in ("bias", "shift") else all_images)


@places
def test_gradients_of_one_input_at_a_time(device, backend):
    tensors = draw_context(ODD, device=device)
    with apc_kernels.backend(backend):
        _, *together = context_with_gradients(apc_kernels.adaptive_context, ODD, tensors)
        for name, expected in zip(NAMES, together, strict=True):
            leaves = {other: tensors[other].clone().requires_grad_(other == name) for other in NAMES}
            x, regions, weight, bias, shift, center = leaves.values()
            z = apc_kernels.adaptive_context(
                x, regions, weight, bias, ODD.scales, shift=shift, residual=True, center=center
            )
            torch.testing.assert_close(torch.autograd.grad(z, leaves[name], tensors["grad"])[0], expected)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_gradcheck(backend, residual, layout):
    case = ContextCase(2, 2, (3, 4), (2, 1))
    t = draw_context(case, layout, torch.float64)
    leaves = [t[name].requires_grad_() for name in NAMES]

    def function(x, regions, weight, bias, shift, center):
        return apc_kernels.adaptive_context(
            x, regions, weight, bias, case.scales, shift=shift, residual=residual, center=center
        )

    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradcheck(lambda *given: function(*given, None, None), leaves[:4])


@pytest.mark.parametrize("backend", [name for name in CPU if name != "reference"])
@pytest.mark.parametrize("optional", [(), ("shift", "center")], ids="-".join)
def test_sums_that_the_gradient_of_the_bias_consists_of(backend, optional):
    t = draw_context(ODD, dtype=torch.float64)
    arguments = (t["grad"], t["x"], t["regions"], t["weight"], t["bias"], ODD.scales)
    options = [t[name] if name in optional else None for name in ("shift", "center")]
    with apc_kernels.backend(backend):
        actual = backward_regions(*arguments, *options)
    expected = reference.adaptive_context_backward_regions(*arguments, *options)
    for ours, true in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, true)


# Values at the edge of what floats hold


@places
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_pixel(device, backend, value):
    case = ContextCase(1, 5, (8, 13), (2, 3))
    tensors = draw_context(case, device=device)
    clean, spoilt = tensors, tensors | {"x": tensors["x"].clone()}
    spoilt["x"][0, 2, 4, 6] = value  # the first scale's
    with apc_kernels.backend(backend):
        expected, grad, *_ = context_with_gradients(apc_kernels.adaptive_context, case, clean)
        z, grad_x, grad_regions, *_ = context_with_gradients(apc_kernels.adaptive_context, case, spoilt)
    pytorch, own, *_ = context_with_gradients(stock.adaptive_context, case, spoilt)
    for actual, wanted, stocks in ((z, expected, pytorch), (grad_x, grad, own)):
        elsewhere = torch.ones_like(actual, dtype=torch.bool)
        elsewhere[0, :5, 4, 6] = False
        assert same_bits(actual[elsewhere], wanted[elsewhere])
        assert torch.equal(actual.isnan(), stocks.isnan())
    assert grad_regions[:, 4:].isfinite().all()


@places
def test_saturated_affinities(device, backend):
    """Logits of ±30 and beyond give affinities of exactly 1, and of 1e-13 with all their digits."""
    tensors = draw_context(ODD, device=device)
    tensors["bias"] = 30 * tensors["bias"].sign() * (1 + torch.arange(41, device=device) % 5)
    tensors["weight"] = tensors["weight"] * 1e-2
    check(ODD, tensors, backend)
    if backend == "reference":
        return  # PyTorch's own sigmoid
    with apc_kernels.backend(backend):
        low = -torch.tensor([10.0, 30, 80, 87.3, 95, 103], device=device)
        ones, none = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)
        z = [apc_kernels.adaptive_context(none[..., None, None], ones[None], ones, logit[None], (1,)) for logit in low]
    # Triton rounds b·log₂e, and its exp(-b) is infinite from 89 on.
    rtol, atol = {"triton": (3e-6, 2e-38)}.get(backend, (3e-7, 1.5e-45))
    torch.testing.assert_close(torch.cat(z).flatten(), low.double().sigmoid().float(), rtol=rtol, atol=atol)


# Layout, memory, bits


@places
@layouts
def test_strides(device, backend, layout):
    tensors = draw_context(ODD, layout, device=device)
    with apc_kernels.backend(backend):
        z, grad_x, *_ = context_with_gradients(apc_kernels.adaptive_context, ODD, tensors)
    assert z.stride() == grad_x.stride() == torch.empty_like(tensors["x"]).stride()


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not transposed], ids=lambda f: f.__name__)
def test_no_copies(layout, forbid_copies):
    tensors = draw_context(ODD, layout)
    forbid_copies()
    with apc_kernels.backend("cpp"):
        context_with_gradients(apc_kernels.adaptive_context, ODD, tensors)


def test_only_what_was_given_is_saved():
    tensors = {name: t.requires_grad_() for name, t in draw_context(ODD).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        z = apc_kernels.adaptive_context(*(tensors[name] for name in NAMES[:4]), ODD.scales, shift=tensors["shift"])
    assert z.requires_grad and set(saved) <= {t.data_ptr() for t in tensors.values()}


@places
@dtypes
def test_same_bits_every_time(device, backend, dtype):
    tensors = draw_context(ContextCase(2, 70, (33, 21)), channels_last, dtype, device)
    torch.use_deterministic_algorithms(True)
    try:
        with apc_kernels.backend(backend):
            first, *others = [
                context_with_gradients(apc_kernels.adaptive_context, ContextCase(2, 70, (33, 21)), tensors)
                for _ in range(3)
            ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_same_bits_with_any_number_of_threads(threads, layout):
    case, results = ContextCase(3, 40, (61, 27)), []
    for count in (1, 2, 3, 5):
        threads(count)
        with apc_kernels.backend("cpp"):
            results.append(context_with_gradients(apc_kernels.adaptive_context, case, draw_context(case, layout)))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@instruction_sets.others
def test_every_instruction_set(isa):
    """Tests each set that the processor has, in its own process: the set is chosen once."""
    program = """
import torch
from cases import ContextCase, channels_last, draw_context, nchw
from test_adaptive_context import check
case = ContextCase(2, 37, (11, 19))
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in (nchw, channels_last):
        check(case, draw_context(case, layout, dtype), "cpp")
"""
    instruction_sets.run(isa, program)


def test_products_in_low_precision_do_not_lose_the_average_of_the_affinities():
    """In bfloat16 the center is subtracted before rounding: the error is that of the differences, not of A itself."""
    case = ContextCase(1, 64, (16, 16), (6,))
    t = draw_context(case, dtype=torch.bfloat16)
    t["weight"] = t["weight"] * 0.05
    t["regions"] = t["regions"] - t["regions"].mean(1, keepdim=True)
    exact = stock.adaptive_context(*(t[name].double() for name in NAMES[:4]), case.scales)
    with apc_kernels.backend("cpp"):
        z = apc_kernels.adaptive_context(*(t[name] for name in NAMES[:4]), case.scales)
    assert (z.double() - exact).abs().max() <= exact.abs().max() * 2**-8  # its rounding at the end


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 2, 15, 31, 32, 33, 65]),
    size=st.tuples(st.sampled_from([1, 2, 7, 12]), st.sampled_from([1, 8, 13, 95, 96, 97])),
    scales=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    layout=st.sampled_from(LAYOUTS),
    options=st.tuples(*[st.booleans()] * 3),
)
def test_any_size_and_options(batch, channels, size, scales, layout, options):
    """The C++ kernels agree with the reference in float64, around their blocks of channels, positions and regions."""
    case = ContextCase(batch, channels, size, scales)
    tensors = draw_context(case, layout, torch.float64)
    names = NAMES[:4] + tuple(name for name, use in zip(("shift", "center"), options, strict=False) if use)
    results = []
    for backend in ("cpp", "reference"):
        with apc_kernels.backend(backend):
            results.append(context_with_gradients(apc_kernels.adaptive_context, case, tensors, options[2], names))
    for name, actual, expected in zip(("z", *names), *results, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda m, n=name: f"{n}: {m}")
