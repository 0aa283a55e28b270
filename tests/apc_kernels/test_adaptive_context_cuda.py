"""Tests the CUDA kernels on affinities, run on the CPU, against float64.

Their source runs thread by thread (tests/emulation), their PTX in the machine of tests/ptx (slow).

Every hard case in float32; layouts, dtypes, and what may be left out, on cases that are odd in all directions.
"""

import functools
from types import SimpleNamespace

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import CONTEXTS, LAYOUTS, ContextCase, channels_last, draw_context, nchw, transposed
from places import dtypes

from apc_kernels.ops.affinities import reference

ODD, EVEN = ContextCase(2, 5, (5, 15), (2, 3)), ContextCase(1, 72, (6, 12), (5,))
OPTIONAL = ("shift", "residual", "center", "moments", "constant")
NAMES = ["z", "grad_regions", "grad_shift", "bias part", "slope", "slope_moments", "grad_x", "grad_weight", "grad_bias"]


def draw(case, layout=nchw, dtype=torch.float32, given=OPTIONAL):
    """Returns all arguments; None for what is not given. `moments` are linear, quadratic and, with them, center."""
    t = draw_context(case, layout, dtype)
    generator = torch.Generator().manual_seed(2)
    n = case.size[0] * case.size[1]
    t["linear"] = torch.randn(t["bias"].shape, generator=generator) / n
    t["quadratic"] = torch.randn(case.batch, sum(s**4 for s in case.scales), generator=generator) / n
    t["constant"] = torch.randn(t["shift"].shape, generator=generator) / n
    left_out = {"shift", "center", "constant"} - set(given)
    if "moments" not in given:
        left_out |= {"linear", "quadratic"}
    t |= dict.fromkeys(left_out)
    if t["shift"] is not None:  # nothing is asked about the gradient beside the kink
        a = SimpleNamespace(**t, scales=case.scales, residual=False)
        kink = exact_forward(SimpleNamespace(**vars(a) | {"shift": None})) + t["shift"].double()[..., None, None]
        t["grad"].masked_fill_(kink.abs() < (1e-3 if dtype == torch.float32 else 2e-2), 0)
    return SimpleNamespace(**t, scales=list(case.scales), residual="residual" in given)


def exact_forward(a):
    d = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in vars(a).items()}
    inputs = [d[name] for name in ("x", "regions", "weight", "bias", "scales", "shift", "residual", "center")]
    return reference.adaptive_context(*inputs)


def exact(a):
    """Returns the float64 results of all three functions."""
    d = SimpleNamespace(**{name: t.double() if isinstance(t, torch.Tensor) else t for name, t in vars(a).items()})
    inputs = d.x, d.regions, d.weight, d.bias, d.scales, d.shift
    moments = d.linear, d.quadratic, d.constant
    return [
        exact_forward(a),
        *reference.adaptive_context_backward_regions(d.grad, *inputs, d.center),
        *reference.adaptive_context_backward_x(d.grad, *inputs, d.residual, d.center, *moments),
    ]


def pytorch(a):
    """Returns the same results by PyTorch's own operators in the map's dtype."""
    x, weight, bias, regions = leaves = [t.detach().requires_grad_() for t in (a.x, a.weight, a.bias, a.regions)]
    shift = a.x.new_zeros(a.x.shape[:2], dtype=torch.float32) if a.shift is None else a.shift
    shift, dtype = shift.detach().requires_grad_(), a.x.dtype
    product = stock.adaptive_context(
        x, regions, weight, bias, a.scales, None if a.shift is None else shift, False, a.center
    )
    grad_x, grad_weight, bias_part, grad_regions = torch.autograd.grad(product, leaves, a.grad, retain_graph=True)
    grad_shift = a.grad.sum((2, 3)) if a.shift is None else torch.autograd.grad(product, shift, a.grad)[0]
    affinities, slopes, squares, grads = stock.affinities(x, weight, bias, a.scales), [], [], []
    for block, affinity in zip(reference.blocks(a.scales, weight.shape[1]), affinities, strict=True):
        slope, centered = affinity * (1 - affinity), affinity
        if a.center is not None:
            centered = affinity - a.center[:, None, block.rows].to(dtype)
        slopes.append(slope.sum(1))
        squares.append((slope.mT @ centered).flatten(1))
        if a.linear is not None:
            matrix = a.quadratic[:, block.pairs].unflatten(1, (block.regions, block.regions)).to(dtype)
            grads.append(a.linear[:, None, block.rows].to(dtype) + centered @ matrix.mT)
    grad_bias = bias_part
    if grads:
        through_moments = torch.autograd.grad(affinities, (x, weight, bias), grads)
        parts = zip((grad_x, grad_weight, bias_part), through_moments, strict=True)
        grad_x, grad_weight, grad_bias = (first + second for first, second in parts)
    grad_x = grad_x + a.grad if a.residual else grad_x
    grad_x = grad_x if a.constant is None else grad_x + a.constant[..., None, None].to(dtype)
    sums = grad_regions, grad_shift, bias_part, torch.cat(slopes, 1), torch.cat(squares, 1)
    z = product + x if a.residual else product
    return [t.detach() for t in (z, *(s.to(weight.dtype) for s in sums), grad_x, grad_weight, grad_bias)]


@functools.cache
def yardstick(case, dtype, given):
    a = draw(case, nchw, dtype, given)
    return exact(a), pytorch(a)


def array(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    return (argument.view(torch.uint16) if argument.dtype == torch.bfloat16 else argument).numpy()


def poisoned(*shapes):
    return [torch.full(shape, float("nan")) for shape in shapes]


def emulate_forward(module, a, seed=0, z=None):
    z = torch.full_like(a.x, float("nan")) if z is None else z
    dtype = str(a.x.dtype).removeprefix("torch.")
    inputs = a.x, dtype, a.regions, a.weight, a.bias, a.scales, a.shift, a.residual, a.center
    module.adaptive_context(*map(array, (*inputs, z)), seed)
    return z


def emulate_backward_regions(module, a, seed=0, blocks=0):
    batch, rows = a.bias.shape
    sizes = a.regions.shape, a.x.shape[:2], (batch, rows), (batch, rows), (batch, sum(s**4 for s in a.scales))
    results = poisoned(*sizes)
    dtype = str(a.x.dtype).removeprefix("torch.")
    inputs = a.grad, a.x, dtype, a.regions, a.weight, a.bias, a.scales, a.shift, a.center
    module.adaptive_context_backward_regions(*map(array, (*inputs, *results)), blocks, seed)
    return results


def emulate_backward_x(module, a, seed=0, blocks=0):
    results = [torch.full_like(a.x, float("nan")), *poisoned(a.weight.shape, a.bias.shape)]
    dtype = str(a.x.dtype).removeprefix("torch.")
    inputs = a.grad, a.x, dtype, a.regions, a.weight, a.bias, a.scales, a.shift, a.residual, a.center
    moments = a.linear, a.quadratic, a.constant
    module.adaptive_context_backward_x(*map(array, (*inputs, *moments, *results)), blocks, seed)
    return results


def emulate(module, a, seed=0, blocks=0):
    return [
        emulate_forward(module, a, seed),
        *emulate_backward_regions(module, a, seed, blocks),
        *emulate_backward_x(module, a, seed, blocks),
    ]


def assert_matches(results, case, dtype, given):
    for name, actual, expected, own in zip(NAMES, results, *yardstick(case, dtype, given), strict=True):
        assert_accurate(actual, expected, own, name)


def emulate_moments(module, a, seed=0, blocks=0):
    batch, rows = a.bias.shape
    results = (
        torch.full((batch, rows), float("nan"), dtype=torch.float64),
        a.bias.new_full((batch, sum(s**4 for s in a.scales)), float("nan"), dtype=torch.float64),
    )
    inputs = a.x, str(a.x.dtype).removeprefix("torch."), a.weight, a.bias, a.scales
    module.affinity_moments(*map(array, (*inputs, *results)), blocks, seed)
    return results


def assert_moments_match(results, a):
    exact = reference.affinity_moments(a.x.double(), a.weight.double(), a.bias.double(), a.scales)
    mean, covariances = stock.affinity_moments(a.x, a.weight, a.bias, a.scales)
    pytorch = mean, torch.cat([c.flatten(1) for c in covariances], 1)
    for name, actual, expected, own in zip(("mean", "covariance"), results, exact, pytorch, strict=True):
        assert_accurate(actual.float(), expected, own, name)


cases = pytest.mark.parametrize(
    "case", [case for case in CONTEXTS if case.batch], ids=str
)  # empty maps reach no kernel
layouts = pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout is not transposed], ids=lambda layout: layout.__name__
)


@cases
def test_hard_cases(cuda_kernels, case):
    assert_matches(emulate(cuda_kernels, draw(case)), case, torch.float32, OPTIONAL)


@cases
def test_moments_in_hard_cases(cuda_kernels, case):
    a = draw(case)
    assert_moments_match(emulate_moments(cuda_kernels, a), a)


@dtypes
@layouts
@pytest.mark.parametrize("case", [ODD, EVEN], ids=str)
def test_layouts_and_dtypes(cuda_kernels, layout, dtype, case):
    a = draw(case, layout, dtype)
    assert_matches(emulate(cuda_kernels, a), case, dtype, OPTIONAL)
    assert_moments_match(emulate_moments(cuda_kernels, a), a)


@pytest.mark.parametrize(
    "given", [(), ("shift",), ("center",), ("residual", "constant"), ("shift", "center", "moments")], ids="+".join
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_what_may_be_left_out(cuda_kernels, dtype, given):
    case = ContextCase(1, 8, (8, 9), (3, 1))
    assert_matches(emulate(cuda_kernels, draw(case, channels_last, dtype, given)), case, dtype, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_gradients_of_moments_alone(cuda_kernels, dtype):
    """Neither grad nor regions: what the gradient of affinity_moments asks for."""
    case = ContextCase(2, 9, (7, 11), (2, 3))
    a = draw(case, nchw, dtype, ("center", "moments"))
    a.regions, a.grad = torch.zeros_like(a.regions), torch.zeros_like(a.grad)
    expected, own = exact(a)[6:], pytorch(a)[6:]
    a.regions = a.grad = None
    results = emulate_backward_x(cuda_kernels, a)
    for name, actual, wanted, theirs in zip(NAMES[6:], results, expected, own, strict=True):
        assert_accurate(actual, wanted, theirs, name)


@pytest.mark.parametrize("size", [1e-7, 1e8])
def test_moments_that_float16_does_not_hold(cuda_kernels, size):
    """Gradients of covariances: 1/N of something, or with small variances their third power in the denominator."""
    a = draw(ContextCase(2, 9, (7, 11), (2, 3)), nchw, torch.float16, ("center", "moments"))
    a.quadratic, a.linear = size * a.quadratic, size * a.linear
    a.regions, a.grad = torch.zeros_like(a.regions), torch.zeros_like(a.grad)
    expected = dict(zip(NAMES, exact(a), strict=True))["grad_bias"]
    a.regions = a.grad = None
    actual = dict(zip(NAMES[6:], emulate_backward_x(cuda_kernels, a), strict=True))["grad_bias"]
    assert (actual - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("layouts", [(nchw, channels_last), (channels_last, nchw)], ids=["to nchw", "to nhwc"])
def test_maps_of_different_layouts(cuda_kernels, layouts):
    """Threads read and write different elements of a tile then; two chunks of channels."""
    case, (other, layout) = ContextCase(1, 40, (5, 8), (2,)), layouts
    a = draw(case)
    a.grad, a.x = other(a.grad), layout(a.x)
    for seed in range(3):
        z = emulate_forward(cuda_kernels, a, seed, other(torch.full_like(a.x, float("nan"))))
        assert_matches([z, *emulate(cuda_kernels, a, seed)[1:]], case, torch.float32, OPTIONAL)


@pytest.mark.parametrize("blocks", [1, 3], ids=["one chunk", "two chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_chunks_of_several_tiles(cuda_kernels, dtype, blocks):
    """Sums over the tiles of a chunk stay in a slice; all six in one, or four and two."""
    case = ContextCase(1, 10, (17, 19), (3, 2))  # six tiles at two scales
    a = draw(case, nchw, dtype)
    assert_matches(emulate(cuda_kernels, a, blocks=blocks), case, dtype, OPTIONAL)
    assert_moments_match(emulate_moments(cuda_kernels, a, blocks=blocks), a)


@pytest.mark.parametrize("layout", [channels_last, nchw], ids=["channels_last", "nchw"])
def test_more_channels_than_stay_in_shared_memory(cuda_kernels, layout):
    """They are read again, part by part."""
    case = ContextCase(1, 520, (3, 7), (4, 1))
    a = draw(case, layout, torch.bfloat16)
    assert_matches(emulate(cuda_kernels, a), case, torch.bfloat16, OPTIONAL)
    assert_moments_match(emulate_moments(cuda_kernels, a), a)


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((1, 12, 9, 8), (1152, 1, 128, 16), 0),  # channels_last, 12 of 16 channels
        ((1, 16, 9, 8), (1170, 1, 130, 16), 0),  # channels_last, rows that start anywhere
        ((1, 16, 9, 8), (1224, 1, 136, 17), 0),  # channels_last, pixels that start anywhere
        ((1, 8, 8, 8), (576, 72, 9, 1), 0),  # NCHW, rows of 8 that start anywhere
        ((1, 8, 8, 13), (1024, 128, 16, 1), 0),  # NCHW, 13 of 16 columns
        ((1, 8, 8, 16), (1024, 128, 16, 1), 1),  # one element past an aligned address
        ((2, 8, 8, 16), (1025, 128, 16, 1), 0),  # images that start anywhere
    ],
)
def test_what_is_not_vectorised(cuda_kernels, shape, stride, offset):
    """Windows in which some vector of 16 bytes would be misaligned or reach past the map: nothing there is written."""
    case = ContextCase(shape[0], shape[1] // 2, shape[2:], (2, 1))
    a = draw(case, nchw, torch.float16)
    canvas = torch.full((4096,), 7.0, dtype=torch.float16)
    a.x = canvas.clone().as_strided(shape, stride, offset).copy_(a.x)
    window = canvas.as_strided(shape, stride, offset)
    emulate_forward(cuda_kernels, a, z=window)
    (expected, *_), (own, *_) = yardstick(case, torch.float16, OPTIONAL)
    assert_accurate(window.clone(), expected, own, "z")
    window.fill_(7.0)
    assert bool((canvas == 7.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_same_bits_in_any_order_of_threads(cuda_kernels, dtype):
    a = draw(ContextCase(1, 6, (9, 11), (3, 2)), channels_last, dtype)
    results = [
        [*emulate(cuda_kernels, a, seed, blocks=2), *emulate_moments(cuda_kernels, a, seed, blocks=2)]
        for seed in range(3)
    ]
    assert all(same_bits(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_extreme_values_stay_where_they_belong(cuda_kernels, dtype, value):
    """Sets one position of x, of the gradient, and one region: NaN and infinity are where the reference has them."""
    case = ContextCase(2, 5, (5, 15), (2, 3))
    for name, index in (("x", (1, 7, 2, 3)), ("grad", (0, 6, 4, 14)), ("regions", (0, 5, 1))):
        a = draw(case, channels_last, dtype, ("shift", "center", "residual"))
        getattr(a, name)[index] = value
        expected = [t.to(torch.float32) for t in exact(a)]
        for which, actual, wanted in zip(NAMES, emulate(cuda_kernels, a), expected, strict=True):
            assert torch.equal(actual.isnan(), wanted.isnan()), f"{which}: NaN misplaced, {name} {value}"
            assert torch.equal(actual.isinf(), wanted.isinf()), f"{which}: infinity misplaced, {name} {value}"
        if name == "x":
            moments = reference.affinity_moments(a.x.double(), a.weight.double(), a.bias.double(), a.scales)
            for actual, wanted in zip(emulate_moments(cuda_kernels, a), moments, strict=True):
                assert torch.equal(actual.isnan(), wanted.isnan()), f"moments: NaN misplaced, x {value}"
