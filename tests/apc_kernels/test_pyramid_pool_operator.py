"""Tests pyramid_pool as an operator: the dispatcher's contract, and the errors for wrong input."""

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import MapCase, channels_last, draw, nchw, sliced, with_gradient
from places import CPU, places

import apc_kernels

ODD = MapCase((2, 13, 19, 23))


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


def test_export_of_a_meta_model():
    program = torch.export.export(Pool(), (torch.empty(2, 3, 13, 17, device="meta"),))
    assert program.module()(torch.empty(2, 3, 13, 17, device="meta")).shape == (2, 3, 50)


@pytest.mark.parametrize("backend", CPU)
def test_autocast_leaves_the_dtype_alone(backend):
    x, _ = draw(ODD)
    with apc_kernels.backend(backend), torch.autocast("cpu", torch.bfloat16):
        pooled = apc_kernels.pyramid_pool(x)
    assert_accurate(
        pooled, stock.pyramid_pool(x.double(), ODD.scales), stock.pyramid_pool(x, ODD.scales), "under autocast"
    )


# Wrong input


@pytest.mark.parametrize(
    ("x", "scales", "message"),
    [
        (torch.zeros(2, 3, 4), (1,), r"x: expected 4 dimensions .* got 3: \(2, 3, 4\)"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int64), (1,), "x: expected float32, .* got int64"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.complex64), (1,), "x: expected float32, .* got complex64"),
        (torch.zeros(1, 2, 0, 4), (1,), r"x: expected a height and width of 1 to \d+, got \(1, 2, 0, 4\)"),
        (torch.zeros(1, 2, 3, 4), (), "scales: expected 1 to 64 scales, got 0"),
        (torch.zeros(1, 2, 3, 4), (1,) * 65, "scales: expected 1 to 64 scales, got 65"),
        (torch.zeros(1, 2, 3, 4), (2, 0), r"scales: expected scales of 1 to 32768, got \(2, 0\)"),
        (torch.zeros(1, 2, 3, 4), (32769,), r"scales: expected scales of 1 to 32768, got \(32769,\)"),
        (torch.zeros(1, 1, 1, 1).expand(1, 1, 2**31, 1), (2,), "x: expected a height and width of 1 to 2147483647"),
        (torch.zeros(1, 2, 3, 4), (-1,), r"scales: expected scales of 1 to 32768, got \(-1,\)"),
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
        (torch.zeros(1, 2, 5), (1, 2, 0, 8), "size: expected a height and width of 1 to"),
        (torch.zeros(1, 2, 5, dtype=torch.int32), (1, 2, 8, 8), "grad: expected float32, .* got int32"),
    ],
)
def test_wrong_input_of_the_backward_operation(grad, size, message):
    stride = torch.empty(size).stride()
    with pytest.raises(ValueError, match=message):
        torch.ops.apc_kernels.pyramid_pool_backward(grad, [1, 2], size, stride)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("stride", [(128, 64, 8, 0), (128, 0, 8, 1), (128, 64, 1, 1), (256, 64, 8, 1)])
def test_strides_of_the_backward_operation_describe_a_dense_map(backend, stride):
    with apc_kernels.backend(backend), pytest.raises(ValueError, match="stride: expected the strides of a dense map"):
        torch.ops.apc_kernels.pyramid_pool_backward(torch.zeros(2, 2, 5), [1, 2], (2, 2, 8, 8), stride)


@pytest.mark.parametrize(
    ("shape", "scales"), [((1, 1, 8193, 1), (1,)), ((1, 1, 1, 8193), (1,)), ((1, 1, 4, 4), (300, 213))]
)
def test_limits_of_the_gpu_kernels(monkeypatch, shape, scales):
    """`auto` passes over what cannot take a call; forcing it says why."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.ones(shape)
    assert bool((apc_kernels.pyramid_pool(x, scales) == 1).all())
    with apc_kernels.backend("triton"), pytest.raises(RuntimeError, match="the kernels take up to 8192 rows"):
        apc_kernels.pyramid_pool(x, scales)


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
