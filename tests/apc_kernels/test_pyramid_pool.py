"""pyramid_pool against float64 and against PyTorch's own pooling, on every backend that can run here.

Grid: every hard case in float32 and NCHW; every layout and every dtype on a case that is odd in all directions. The
interpreter (seconds a case) and the emulation (milliseconds) run the GPU kernels on the CPU.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import DTYPES, assert_accurate, same_bits
from cases import LAYOUTS, MAPS, MapCase, channels_last, nchw, sliced, transposed
from hypothesis import given, settings
from hypothesis import strategies as st

import apc_kernels
from apc_kernels.ops.pyramid_pool import reference

ODD = MapCase((2, 13, 19, 23))
WIDE = MapCase((1, 72, 6, 136))
CPU, GPU = ["reference", "cpp"], ["reference", "triton", "cuda"]
PLACES = [("cpu", name) for name in CPU] + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in GPU]
places = pytest.mark.parametrize(("device", "backend"), PLACES)
cases = pytest.mark.parametrize("case", MAPS, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def stock(x, scales):
    """What one writes in PyTorch today."""
    return torch.cat([F.adaptive_avg_pool2d(x, s).flatten(2) for s in scales], 2)


def draw(case, layout=nchw, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(case.shape))
    x = torch.randn(case.shape, generator=generator).to(device, dtype)
    grad = torch.randn(*case.shape[:2], sum(s * s for s in case.scales), generator=generator).to(device, dtype)
    return layout(x), grad


def with_gradient(function, x, scales, grad):
    x = x.detach().requires_grad_()
    result = function(x, scales)
    return result.detach(), torch.autograd.grad(result, x, grad)[0]


@functools.cache
def yardstick(case, dtype):
    """The float64 result and PyTorch's own, each with its gradient, on the values that `draw` gives for a dtype."""
    x, grad = draw(case, nchw, dtype)
    function = stock if min(x.shape) else reference.pyramid_pool  # PyTorch refuses maps without channels
    exact = with_gradient(function, x.double(), case.scales, grad.double())
    return exact, with_gradient(function, x, case.scales, grad)


def assert_matches(results, case, dtype):
    for actual, exact, pytorch, name in zip(results, *yardstick(case, dtype), ("result", "gradient"), strict=True):
        assert_accurate(actual.cpu(), exact, pytorch, name)


def emulate(module, x, scales, grad, seed=0):
    """The CUDA kernels on the CPU: result and gradient, from memory that held NaN."""

    def array(tensor):
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    name = str(x.dtype).removeprefix("torch.")
    out, grad_x = torch.full_like(grad, float("nan")), torch.full_like(x, float("nan"))
    module.pyramid_pool(array(x), name, list(scales), array(out), seed)
    module.pyramid_pool_backward(array(grad), name, list(scales), array(grad_x), seed)
    return out, grad_x


# Results


@places
@cases
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


@cases
def test_hard_cases_on_emulated_cuda(cuda_emulation, case):
    x, grad = draw(case)
    if x.numel() == 0:
        pytest.skip("empty maps never reach a kernel")
    assert_matches(emulate(cuda_emulation, x, case.scales, grad), case, torch.float32)


@dtypes
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", [ODD, WIDE], ids=str)
def test_layouts_and_dtypes_on_emulated_cuda(cuda_emulation, layout, dtype, case):
    x, grad = draw(case, layout, dtype)
    assert_matches(emulate(cuda_emulation, x, case.scales, grad), case, dtype)


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
def test_interpreted_triton(layout, case, dtype):
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
def test_any_size_and_scales(cuda_emulation, h, w, scales, by_channel):
    """The bins are PyTorch's: reference, C++ and CUDA agree with it in float64 or float32 wherever bins fall."""
    case = MapCase((1, 3, h, w), tuple(scales))
    x, grad = draw(case, channels_last if by_channel else nchw)
    exact = with_gradient(stock, x.double(), scales, grad.double())
    for backend in CPU:
        with apc_kernels.backend(backend):
            results = with_gradient(apc_kernels.pyramid_pool, x.double(), scales, grad.double())
        for actual, expected in zip(results, exact, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(emulate(cuda_emulation, x, scales, grad), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=2e-6)


@places
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3e38, 1e-45])
def test_extreme_values_stay_in_their_bins(device, backend, value):
    x = torch.zeros(1, 2, 12, 12, device=device)
    x[0, 1, 2, 3] = value
    with apc_kernels.backend(backend):
        pooled = apc_kernels.pyramid_pool(x, (2, 6))
    expected = stock(x, (2, 6))
    if backend == "reference":  # a matrix product meets an infinity in every bin of its row and column: inf · 0
        pooled, expected = pooled[..., [0, 4 + 6 + 1]], expected[..., [0, 4 + 6 + 1]]
    torch.testing.assert_close(pooled, expected, equal_nan=True, rtol=1e-6, atol=0)


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
    (expected,) = torch.autograd.grad(stock(x, (1, 2, 3, 6)).sum(), x)
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


def test_same_bits_in_any_order_of_threads_on_emulated_cuda(cuda_emulation):
    x, grad = draw(ODD)
    results = [emulate(cuda_emulation, x, ODD.scales, grad, seed) for seed in range(5)]
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_every_instruction_set(isa, tmp_path):
    """Each on a processor that has it, in a process of its own: the set is chosen once."""
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
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"APC_KERNELS_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if "APC_KERNELS_ISA" in run.stderr:
        pytest.skip(f"needs a processor with {isa}")
    assert run.returncode == 0, run.stderr
    for x, grad, pooled, grad_x in torch.load(file):
        exact = with_gradient(stock, x.double(), (1, 2, 3, 6), grad.double())
        pytorch = with_gradient(stock, x, (1, 2, 3, 6), grad)
        for actual, expected, own in zip((pooled, grad_x), exact, pytorch, strict=True):
            assert_accurate(actual, expected, own, f"{isa} {x.dtype}")


# The dispatcher


@places
@pytest.mark.parametrize("layout", [nchw, channels_last, sliced], ids=lambda layout: layout.__name__)
def test_opcheck(device, backend, layout):
    x, grad = draw(ODD, layout, device=device)
    stride = torch.empty_like(x).stride()
    with apc_kernels.backend(backend):
        torch.library.opcheck(torch.ops.apc_kernels.pyramid_pool.default, (x.requires_grad_(), [1, 2, 3, 6]))
        arguments = (grad.requires_grad_(), [1, 2, 3, 6], x.shape, stride)
        torch.library.opcheck(torch.ops.apc_kernels.pyramid_pool_backward.default, arguments)


@places
def test_compile(device, backend):
    """One graph, and no second one for other sizes."""
    compiled = torch.compile(apc_kernels.pyramid_pool, fullgraph=True, dynamic=True, backend="aot_eager")
    with apc_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for case in (ODD, MapCase((3, 5, 32, 7))):
            x, grad = draw(case, channels_last, device=device)
            expected = with_gradient(apc_kernels.pyramid_pool, x, case.scales, grad)
            actual = with_gradient(compiled, x, case.scales, grad)
            assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


class Pool(torch.nn.Module):
    def forward(self, x):
        return apc_kernels.pyramid_pool(x)


def test_export_holds_stock_operators_only():
    sizes = {2: torch.export.Dim("h", min=2, max=512), 3: torch.export.Dim("w", min=2, max=512)}
    program = torch.export.export(Pool(), (torch.randn(2, 3, 13, 17),), dynamic_shapes={"x": sizes})
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(call, "namespace", "aten") == "aten" for call in calls), calls
    x, _ = draw(MapCase((2, 3, 40, 21)))
    torch.testing.assert_close(program.module()(x), apc_kernels.pyramid_pool(x))


@pytest.mark.parametrize("backend", CPU)
def test_autocast_leaves_the_dtype_alone(backend):
    x, _ = draw(ODD)
    with apc_kernels.backend(backend), torch.autocast("cpu", torch.bfloat16):
        pooled = apc_kernels.pyramid_pool(x)
    assert_accurate(pooled, stock(x.double(), ODD.scales), stock(x, ODD.scales), "under autocast")


# Wrong input


@pytest.mark.parametrize(
    ("x", "scales", "message"),
    [
        (torch.zeros(2, 3, 4), (1,), r"x: expected 4 dimensions .* got 3: \(2, 3, 4\)"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int64), (1,), "x: expected float32, .* got int64"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.complex64), (1,), "x: expected float32, .* got complex64"),
        (torch.zeros(1, 2, 0, 4), (1,), r"x: expected a height and width of at least 1, got \(1, 2, 0, 4\)"),
        (torch.zeros(1, 2, 3, 4), (), "scales: expected 1 to 64 scales, got 0"),
        (torch.zeros(1, 2, 3, 4), (1,) * 65, "scales: expected 1 to 64 scales, got 65"),
        (torch.zeros(1, 2, 3, 4), (2, 0), r"scales: expected scales of at least 1, got \(2, 0\)"),
        (torch.zeros(1, 2, 3, 4), (-1,), r"scales: expected scales of at least 1, got \(-1,\)"),
    ],
)
def test_wrong_input(x, scales, message):
    with pytest.raises(ValueError, match=message):
        apc_kernels.pyramid_pool(x, scales)
    with pytest.raises(ValueError, match=message):
        torch.ops.apc_kernels.pyramid_pool(x, list(scales))


@pytest.mark.parametrize(
    ("x", "scales", "message"),
    [
        ([[1.0]], (1,), "x: expected a tensor, got list"),
        (torch.zeros(1, 2, 3, 4), 3, "scales: expected a sequence of integers, got 3"),
        (torch.zeros(1, 2, 3, 4), (1.5,), r"scales: expected a sequence of integers, got \(1.5,\)"),
    ],
)
def test_wrong_type(x, scales, message):
    with pytest.raises(TypeError, match=message):
        apc_kernels.pyramid_pool(x, scales)


@pytest.mark.parametrize(
    ("grad", "size", "message"),
    [
        (
            torch.zeros(1, 2, 4),
            (1, 2, 8, 8),
            r"grad: expected \(1, 2, 5\) for a map of \(1, 2, 8, 8\), got \(1, 2, 4\)",
        ),
        (torch.zeros(2, 5), (1, 2, 8, 8), r"grad: expected \(1, 2, 5\)"),
        (torch.zeros(1, 2, 5), (2, 8, 8), "size, stride: expected 4 numbers each"),
        (torch.zeros(1, 2, 5), (1, 2, 0, 8), "size: expected a height and width of at least 1"),
        (torch.zeros(1, 2, 5, dtype=torch.int32), (1, 2, 8, 8), "grad: expected float32, .* got int32"),
    ],
)
def test_wrong_input_of_the_backward_operation(grad, size, message):
    stride = torch.empty(size).stride()
    with pytest.raises(ValueError, match=message):
        torch.ops.apc_kernels.pyramid_pool_backward(grad, [1, 2], size, stride)


@pytest.mark.parametrize(
    ("map", "pooled", "message"),
    [
        (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 4), "pooled: expected size 5 in dimension 2, got 4"),
        (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 5).double(), "pooled and map differ in dtype"),
        (torch.zeros(1, 2, 8), torch.zeros(1, 2, 5), "map: expected 4 dimensions, got 3"),
        (torch.zeros(1, 2, 8, 16)[..., ::2], torch.zeros(1, 2, 5), "map: expected columns or channels"),
        (torch.zeros(1, 2, 8, 8), torch.zeros(1, 5, 2).mT, "pooled: expected a contiguous tensor"),
        (torch.zeros(1, 2, 8, 8).int(), torch.zeros(1, 2, 5).int(), "map: expected float32"),
    ],
)
def test_raw_operators_never_leave_their_memory(map, pooled, message):
    with apc_kernels.backend("cpp"):
        apc_kernels.pyramid_pool(torch.zeros(1, 1, 1, 1), (1,))  # loads the library
    for operator, arguments in (
        ("pyramid_pool", (map, [1, 2], pooled)),
        ("pyramid_pool_backward", (pooled, [1, 2], map)),
    ):
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.apc_kernels_cpp, operator)(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_more_elements_than_an_int_counts(backend):
    x = torch.ones(1, 33000, 256, 256, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with apc_kernels.backend(backend):
        pooled = apc_kernels.pyramid_pool(x, (1, 6))
        assert bool((pooled == 1).all())
        pooled.sum().backward()
    assert bool((x.grad[0, -1] == x.grad[0, 0]).all())
