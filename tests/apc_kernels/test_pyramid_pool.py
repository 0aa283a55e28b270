"""Tests pyramid_pool against float64 and against PyTorch's own pooling, on every backend that can run here.

Grid: every hard case in float32 and NCHW; every layout and every dtype on a case that is odd in all directions. The
interpreter (seconds a case) and the emulation (milliseconds) run the GPU kernels on the CPU.
"""

import functools

import instruction_sets
import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import LAYOUTS, MAPS, MapCase, channels_last, draw, nchw, transposed, with_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from places import CPU, dtypes, layouts, places

import apc_kernels
from apc_kernels.ops.pyramid_pool import reference

ODD = MapCase((2, 13, 19, 23))
WIDE = MapCase((1, 72, 6, 136))


@functools.cache
def yardstick(case, dtype):
    """Returns the float64 result and PyTorch's own, each with its gradient, on the values of `draw` for a dtype."""
    x, grad = draw(case, nchw, dtype)
    function = stock.pyramid_pool if min(x.shape) else reference.pyramid_pool  # PyTorch refuses maps without channels
    exact = with_gradient(function, x.double(), case.scales, grad.double())
    return exact, with_gradient(function, x, case.scales, grad)


def assert_matches(results, case, dtype):
    for actual, exact, pytorch, name in zip(results, *yardstick(case, dtype), ("result", "gradient"), strict=True):
        assert_accurate(actual.cpu(), exact, pytorch, name)


def emulate(module, x, scales, grad, seed=0):
    """Runs the CUDA kernels on the CPU: result and gradient, from memory that held NaN."""

    def array(tensor):
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    name = str(x.dtype).removeprefix("torch.")
    out, grad_x = torch.full_like(grad, float("nan")), torch.full_like(x, float("nan"))
    module.pyramid_pool(array(x), name, list(scales), array(out), seed)
    module.pyramid_pool_backward(array(grad), name, list(scales), array(grad_x), seed)
    return out, grad_x


# Results


@places
@pytest.mark.parametrize("case", MAPS, ids=str)
def test_hard_cases(device, backend, case):
    x, grad = draw(case, device=device)
    with apc_kernels.backend(backend):
        assert_matches(with_gradient(apc_kernels.pyramid_pool, x, case.scales, grad), case, torch.float32)


@places
@layouts
@dtypes
@pytest.mark.parametrize("case", [ODD, WIDE], ids=str)
def test_layouts_and_dtypes(device, backend, layout, dtype, case):
    x, grad = draw(case, layout, dtype, device)
    with apc_kernels.backend(backend):
        assert_matches(with_gradient(apc_kernels.pyramid_pool, x, case.scales, grad), case, dtype)


@pytest.mark.parametrize("case", [case for case in MAPS if min(case.shape)], ids=str)  # empty maps reach no kernel
def test_hard_cases_on_emulated_cuda(cuda_kernels, case):
    x, grad = draw(case)
    assert_matches(emulate(cuda_kernels, x, case.scales, grad), case, torch.float32)


@dtypes
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not transposed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [ODD, WIDE], ids=str)
def test_layouts_and_dtypes_on_emulated_cuda(cuda_kernels, layout, dtype, case):
    x, grad = draw(case, layout, dtype)
    assert_matches(emulate(cuda_kernels, x, case.scales, grad), case, dtype)


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((1, 13, 9, 8), (1152, 1, 128, 16), 0),  # channels_last, 13 of 16 channels
        ((1, 16, 9, 8), (1170, 1, 130, 16), 0),  # channels_last, rows that start anywhere
        ((1, 16, 9, 8), (1224, 1, 136, 17), 0),  # channels_last, pixels that start anywhere
        ((1, 8, 8, 8), (576, 72, 9, 1), 0),  # NCHW, rows of 8 that start anywhere
        ((1, 8, 8, 13), (1024, 128, 16, 1), 0),  # NCHW, 13 of 16 columns
        ((1, 8, 8, 16), (1024, 128, 16, 1), 1),  # one element past an aligned address
        ((2, 8, 8, 16), (1025, 128, 16, 1), 0),  # images that start anywhere
    ],
)
def test_what_emulated_cuda_does_not_vectorise(cuda_kernels, shape, stride, offset):
    """Windows in which some vector of 16 bytes would be misaligned or reach past the map: nothing there is written."""
    case = MapCase(shape, (1, 2, 3))
    x, grad = draw(case, dtype=torch.float16)
    canvas = torch.full((4096,), 7.0, dtype=torch.float16)
    results = emulate(cuda_kernels, canvas.clone().as_strided(shape, stride, offset).copy_(x), case.scales, grad)
    window = canvas.as_strided(shape, stride, offset)
    cuda_kernels.pyramid_pool_backward(grad.numpy(), "float16", list(case.scales), window.numpy(), 0)
    assert_matches((results[0], window.clone()), case, torch.float16)
    window.fill_(7.0)
    assert bool((canvas == 7.0).all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU")
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (MapCase((2, 3, 7, 5), (1, 2, 3)), torch.float32),
        (MapCase((1, 66, 3, 66), (2,)), torch.float16),
        (MapCase((1, 2, 2, 3), (3, 18)), torch.float32),  # more column bins than a block holds
    ],
    ids=str,
)
def test_triton_on_the_cpu(triton_machine, layout, case, dtype):
    x, grad = draw(case, layout, dtype)
    with apc_kernels.backend("triton"):
        assert_matches(with_gradient(apc_kernels.pyramid_pool, x, case.scales, grad), case, dtype)


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    scales=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    by_channel=st.booleans(),
)
def test_any_size_and_scales(cuda_kernels, h, w, scales, by_channel):
    """The bins are PyTorch's: reference, C++ and CUDA agree with it in float64 or float32 wherever bins fall."""
    case = MapCase((1, 3, h, w), tuple(scales))
    x, grad = draw(case, channels_last if by_channel else nchw)
    exact = with_gradient(stock.pyramid_pool, x.double(), scales, grad.double())
    for backend in CPU:
        with apc_kernels.backend(backend):
            results = with_gradient(apc_kernels.pyramid_pool, x.double(), scales, grad.double())
        for actual, expected in zip(results, exact, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(emulate(cuda_kernels, x, scales, grad), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6)


EXTREMES = pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-45])


def one_extreme(value, device="cpu"):
    x = torch.zeros(1, 2, 12, 12, device=device)
    x[0, 1, 2, 3] = value
    return x


@places
@EXTREMES
def test_extreme_values_stay_in_their_bins(device, backend, value):
    x = one_extreme(value, device)
    with apc_kernels.backend(backend):
        pooled = apc_kernels.pyramid_pool(x, (2, 6))
    expected = stock.pyramid_pool(x, (2, 6))
    if backend == "reference":  # a matrix product meets an infinity in every bin of its row and column: inf · 0
        pooled, expected = pooled[..., [0, 4 + 6 + 1]], expected[..., [0, 4 + 6 + 1]]
    torch.testing.assert_close(pooled, expected, equal_nan=True, rtol=1e-6, atol=0)


@EXTREMES
@pytest.mark.parametrize("gpu_kernels", ["triton", "cuda"])
def test_extreme_values_stay_in_their_bins_on_gpu_kernels(cuda_kernels, gpu_kernels, value):
    """Forward, and the gradient of one bin: it reaches that bin's pixels and no other."""
    x, grad = one_extreme(value), torch.zeros(1, 2, 40)
    grad[0, 1, 4 + 6 + 1] = value
    expected = with_gradient(stock.pyramid_pool, x, (2, 6), grad)
    if gpu_kernels == "cuda":
        results = emulate(cuda_kernels, x, (2, 6), grad)
    elif torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter, which excludes the GPU")
    else:
        with apc_kernels.backend("triton"):
            results = with_gradient(apc_kernels.pyramid_pool, x, (2, 6), grad)
    for actual, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, wanted, equal_nan=True, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_every_low_precision_number(dtype, layout):
    """All 65,536 of them through bins of one pixel, there and back, and rounded means of neighbours: PyTorch's bits."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = layout(numbers.reshape(1, 1, 256, 256).expand(1, 2, 256, 256))
    identity = x.reshape(1, 2, -1)
    with apc_kernels.backend("cpp"):
        pooled, grad_x = with_gradient(apc_kernels.pyramid_pool, x, (256,), identity)
    assert same_numbers(pooled, identity) and same_numbers(grad_x, x)
    pairs = torch.stack([numbers, numbers.roll(-1)], 1).reshape(256, 512).repeat_interleave(2, 0)
    with apc_kernels.backend("cpp"):
        means = apc_kernels.pyramid_pool(layout(pairs.expand(1, 2, 512, 512)), (256,))
    first, second = numbers.float(), numbers.roll(-1).float()
    expected = ((2 * first + 2 * second) / 4).to(dtype)  # halfway between two numbers: ties, and subnormal ones
    assert same_numbers(means, expected.expand(1, 2, -1))


def same_numbers(actual, expected):
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(0), expected.nan_to_num(0))


# Gradients


@pytest.mark.parametrize("backend", CPU)
@layouts
def test_gradcheck(backend, layout):
    x = layout(torch.randn(2, 3, 5, 7, dtype=torch.float64)).requires_grad_()
    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(lambda x: apc_kernels.pyramid_pool(x, (1, 2, 3, 6)), x)
        assert torch.autograd.gradgradcheck(lambda x: apc_kernels.pyramid_pool(x, (1, 3)), x)


@places
def test_a_broadcast_gradient(device, backend):
    x = torch.randn(2, 3, 9, 8, device=device, requires_grad=True)
    with apc_kernels.backend(backend):
        (actual,) = torch.autograd.grad(apc_kernels.pyramid_pool(x).sum(), x)  # the gradient has strides of 0
    (expected,) = torch.autograd.grad(stock.pyramid_pool(x, (1, 2, 3, 6)).sum(), x)
    torch.testing.assert_close(actual, expected)


@places
@layouts
def test_strides(device, backend, layout):
    x, grad = draw(ODD, layout, device=device)
    with apc_kernels.backend(backend):
        result, grad_x = with_gradient(apc_kernels.pyramid_pool, x, ODD.scales, grad)
    assert result.is_contiguous()
    assert grad_x.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout is not transposed], ids=lambda f: f.__name__)
def test_no_copies(layout, forbid_copies):
    x, grad = draw(ODD, layout)
    forbid_copies()
    with apc_kernels.backend("cpp"):
        with_gradient(apc_kernels.pyramid_pool, x, ODD.scales, grad)


# Determinism


@places
@dtypes
def test_same_bits_every_time(device, backend, dtype):
    x, grad = draw(MapCase((2, 130, 33, 40)), channels_last, dtype, device)
    torch.use_deterministic_algorithms(True)
    try:
        with apc_kernels.backend(backend):
            first, *others = [with_gradient(apc_kernels.pyramid_pool, x, (1, 2, 3, 6), grad) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_same_bits_with_any_number_of_threads(threads, layout):
    x, grad = draw(MapCase((3, 70, 61, 67)), layout)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        with apc_kernels.backend("cpp"):
            results.append(with_gradient(apc_kernels.pyramid_pool, x, (1, 2, 3, 6), grad))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_same_bits_in_any_order_of_threads_on_emulated_cuda(cuda_kernels):
    x, grad = draw(ODD)
    results = [emulate(cuda_kernels, x, ODD.scales, grad, seed) for seed in range(5)]
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@instruction_sets.others
def test_every_instruction_set(isa, tmp_path):
    """Tests each set that the processor has, in its own process: the set is chosen once."""
    file = tmp_path / "results.pt"
    program = f"""
import torch, apc_kernels
torch.manual_seed(0)
results = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 21, 19, 23).to(dtype).contiguous(memory_format=format).requires_grad_()
        with apc_kernels.backend("cpp"):
            pooled = apc_kernels.pyramid_pool(x)
            grad = torch.randn(pooled.shape).to(dtype)
            results.append((x.detach(), grad, pooled.detach(), torch.autograd.grad(pooled, x, grad)[0]))
torch.save(results, {str(file)!r})
"""
    instruction_sets.run(isa, program)
    for x, grad, pooled, grad_x in torch.load(file):
        exact = with_gradient(stock.pyramid_pool, x.double(), (1, 2, 3, 6), grad.double())
        pytorch = with_gradient(stock.pyramid_pool, x, (1, 2, 3, 6), grad)
        for actual, expected, own in zip((pooled, grad_x), exact, pytorch, strict=True):
            assert_accurate(actual, expected, own, f"{isa} {x.dtype}")


# Large and far apart


def test_long_sums():
    """The mean of 33 million ones has no rounding error."""
    with apc_kernels.backend("cpp"):
        assert apc_kernels.pyramid_pool(torch.ones(1, 1, 1, 2**25), (1,)).item() == 1
        assert apc_kernels.pyramid_pool(torch.ones(1, 1, 2**25, 1), (1,)).item() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU")
def test_triton_with_channels_gigabytes_apart():
    """Offsets in a tile pass 2^31 elements: memory that is never touched but for a few pages."""
    x = torch.empty(34 * 2**26, dtype=torch.float16).as_strided((1, 34, 4, 4), (0, 2**26, 4, 1))
    x.copy_(torch.randn(1, 34, 4, 4))
    with apc_kernels.backend("triton"):
        pooled = apc_kernels.pyramid_pool(x, (2,))
    torch.testing.assert_close(pooled, stock.pyramid_pool(x.contiguous(), (2,)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_elements_than_an_int_counts(backend):
    x = torch.ones(1, 33000, 256, 256, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with apc_kernels.backend(backend):
        pooled = apc_kernels.pyramid_pool(x, (1, 6))
        assert bool((pooled == 1).all())
        pooled.sum().backward()
    assert bool((x.grad[0, -1] == x.grad[0, 0]).all())
