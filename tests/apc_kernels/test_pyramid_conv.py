"""Tests pyramid_conv against float64 and against upsampling, concatenating and convolving in PyTorch."""

from dataclasses import replace

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import channels_last, nchw
from head_cases import CONVS, ConvCase, draw_bottleneck, draw_conv
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import kept_bytes
from places import dtypes, places_without_cuda
from torch._subclasses import FakeTensorMode

import apc_kernels
from apc_kernels.ops.conv3x3 import layout_of, tiles
from apc_kernels.ops.pyramid_conv import reference

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=("nchw", "nhwc"))
ODD = ConvCase(2, 7, 5, (9, 14), 3, (1, 2, 3, 6))


def with_gradients(function, tensors, case, **options):
    leaves = [tensors[name].detach().requires_grad_() for name in ("regions", "weight")]
    result = function(*leaves, case.size, case.scales, align_corners=case.align_corners, **options)
    return result.detach(), *torch.autograd.grad(result, leaves, tensors["grad"])


def check(case, dtype=torch.float32, device="cpu", **options):
    tensors = draw_conv(case, dtype, device)
    actual = with_gradients(apc_kernels.pyramid_conv, tensors, case, **options)
    exact = with_gradients(stock.pyramid_conv, {name: t.double() for name, t in tensors.items()}, case)
    pytorch = with_gradients(stock.pyramid_conv, tensors, case)
    for ours, true, own, name in zip(actual, exact, pytorch, ("result", "regions", "weight"), strict=True):
        assert_accurate(ours, true, own, f"{case} {name}")
    return actual[0]


@places_without_cuda
@FORMATS
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_hard_cases(device, backend, memory_format, case):
    with apc_kernels.backend(backend):
        result = check(case, device=device, memory_format=memory_format)
    assert result.is_contiguous(memory_format=memory_format)


@places_without_cuda
@dtypes
@FORMATS
def test_dtypes(device, backend, dtype, memory_format):
    with apc_kernels.backend(backend):
        check(ConvCase(2, 32, 24, (20, 17), 3, (1, 2, 3, 6)), dtype, device, memory_format=memory_format)


@FORMATS
def test_more_outputs_than_a_unit_takes(memory_format):
    """As many channels, columns and regions as leave a part of a panel, and a gradient in either layout."""
    case = ConvCase(3, 300, 37, (17, 35), 3, (1, 2, 3, 6))
    check(case, memory_format=memory_format)
    tensors = draw_conv(case)
    expected = with_gradients(apc_kernels.pyramid_conv, tensors, case)
    tensors["grad"] = tensors["grad"].contiguous(memory_format=torch.channels_last)
    actual = with_gradients(apc_kernels.pyramid_conv, tensors, case)
    assert all(torch.allclose(a, e, rtol=1e-4, atol=1e-4) for a, e in zip(actual, expected, strict=True))


def test_a_weight_in_any_layout():
    tensors = draw_conv(ODD)
    expected = with_gradients(apc_kernels.pyramid_conv, tensors, ODD)
    turned = tensors | {"weight": tensors["weight"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)}
    actual = with_gradients(apc_kernels.pyramid_conv, turned, ODD)
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


def test_the_kernels_serve(monkeypatch):
    monkeypatch.setattr(reference, "pyramid_conv", None)
    with_gradients(apc_kernels.pyramid_conv, draw_conv(ODD), ODD)


def test_same_bits_for_any_number_of_threads(threads):
    case = ConvCase(2, 40, 37, (20, 17), 3)
    tensors = draw_conv(case)
    first, *others = [(threads(n), with_gradients(apc_kernels.pyramid_conv, tensors, case))[1] for n in (1, 2, 3)]
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


@places_without_cuda
@dtypes
@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_with_adjacent_channels(device, backend, dtype, kernel):
    """A part of a channels_last weight is multiplied where it lies."""
    case = ConvCase(2, 32, 24, (20, 17), kernel, (1, 2, 3, 6))
    tensors = draw_conv(case, dtype, device)
    weight = tensors["weight"]
    whole = torch.cat([torch.full_like(weight[:, :5], float("nan")), weight], 1).to(memory_format=torch.channels_last)
    part = whole[:, 5:]
    assert part.equal(weight) and not part.is_contiguous()

    leaves = tensors["regions"].detach().requires_grad_(), part.detach().requires_grad_()
    with apc_kernels.backend(backend):
        result = apc_kernels.pyramid_conv(*leaves, case.size, case.scales)
        actual = result.detach(), *torch.autograd.grad(result, leaves, tensors["grad"])
    exact = with_gradients(stock.pyramid_conv, {name: t.double() for name, t in tensors.items()}, case)
    pytorch = with_gradients(stock.pyramid_conv, tensors, case)
    for ours, true, own in zip(actual, exact, pytorch, strict=True):
        assert_accurate(ours, true, own, str(case))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_no_copy_of_the_weight_is_kept(backend):
    """Taps are multiplied as one matrix; backward makes that copy of a contiguous weight again."""
    regions, weight = torch.randn(2, 32, 10), torch.randn(16, 64, 3, 3, requires_grad=True)
    result = []
    with apc_kernels.backend(backend):
        kept = kept_bytes(
            lambda: result.append(apc_kernels.pyramid_conv(regions, weight, (4, 4), (1, 3))), [regions, weight]
        )
    assert kept < weight.nbytes
    assert result[0].grad_fn is not None


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    scales=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    kernel=st.sampled_from((1, 3, 5, 7)),
    align_corners=st.booleans(),
    last=st.booleans(),
)
def test_any_size_scales_and_kernel(size, scales, kernel, align_corners, last):
    case = ConvCase(1, 3, 2, size, kernel, tuple(scales), align_corners)
    tensors = draw_conv(case, torch.float64)
    exact = with_gradients(stock.pyramid_conv, tensors, case)
    memory_format = torch.channels_last if last else torch.contiguous_format
    actual = with_gradients(apc_kernels.pyramid_conv, tensors, case, memory_format=memory_format)
    for ours, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@FORMATS
def test_gradcheck(memory_format):
    case = ConvCase(2, 2, 2, (4, 5), 3, (2, 1))
    t = draw_conv(case, torch.float64)

    def function(regions, weight):
        return apc_kernels.pyramid_conv(regions, weight, case.size, case.scales, memory_format=memory_format)

    assert torch.autograd.gradcheck(function, (t["regions"].requires_grad_(), t["weight"].requires_grad_()))
    assert torch.autograd.gradgradcheck(function, (t["regions"], t["weight"]))


@DEVICES
def test_same_bits_every_time(device):
    tensors = draw_conv(ODD, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [with_gradients(apc_kernels.pyramid_conv, tensors, ODD) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


# Beside features, as in PSPNet's bottleneck

BY_TILES, SMALL = (
    ConvCase(1, 24, 130, (34, 31), 3),
    ConvCase(2, 3, 5, (12, 10), 3),
)  # with features of 140 and 6 channels
FEATURES = {BY_TILES: 140, SMALL: 6}


def drawn_beside(case, layout=lambda x: x, dtype=torch.float32):
    return draw_bottleneck(case, layout, dtype, "cpu", FEATURES[case])


def beside(tensors, case, function=None, **options):
    """Returns the result and the gradients of features, regions and weight."""
    leaves = [tensors[name].detach().requires_grad_() for name in ("x", "regions", "weight")]
    if function is not None:
        result = function(*leaves, case.scales)
    else:
        x, regions, weight = leaves
        result = apc_kernels.pyramid_conv(regions, weight, case.size, case.scales, features=x, **options)
    return result.detach(), *torch.autograd.grad(result, leaves, tensors["grad"])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("layout", [nchw, channels_last])
@pytest.mark.parametrize("case", [BY_TILES, SMALL, replace(SMALL, kernel=5)], ids=str)
def test_features_beside_the_pyramid(backend, layout, case):
    FEATURES.setdefault(case, 6)
    tensors = drawn_beside(case, layout)
    with apc_kernels.backend(backend):
        actual = beside(tensors, case)
    exact = beside({name: t.double() for name, t in tensors.items()}, case, stock.pyramid_bottleneck)
    pytorch = beside(tensors, case, stock.pyramid_bottleneck)
    for ours, true, own in zip(actual, exact, pytorch, strict=True):
        assert_accurate(ours, true, own, str(case))
    assert actual[0].is_contiguous(memory_format=layout_of(tensors["x"]))


@FORMATS
@pytest.mark.parametrize("case", [BY_TILES, SMALL], ids=str)
def test_features_and_a_memory_format(memory_format, case):
    tensors = drawn_beside(case)
    result, *grads = beside(tensors, case, memory_format=memory_format)
    assert result.is_contiguous(memory_format=memory_format)
    expected, *others = beside(tensors, case)
    assert same_bits(result.contiguous(), expected)
    for grad, other in zip(grads, others, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_the_weights_of_both_parts_have_one_gradient(monkeypatch):
    """Both kernels write into it; joining two gradients would take their memory once more."""
    written = []
    gradient_of_weight = tiles.gradient_of_weight
    monkeypatch.setattr(
        tiles, "gradient_of_weight", lambda *given: (written.append(given[-1]), gradient_of_weight(*given))
    )
    tensors = drawn_beside(BY_TILES)
    *_, grad_weight = beside(tensors, BY_TILES)
    assert written[0].data_ptr() == grad_weight.data_ptr()

    x, regions = tensors["x"], tensors["regions"]
    own, others = (w.clone().requires_grad_() for w in tensors["weight"].split([140, 4 * 24], 1))
    sizes = BY_TILES.size, BY_TILES.scales
    result = apc_kernels.conv3x3(x, own) + apc_kernels.pyramid_conv(regions, others, *sizes)
    assert same_bits(grad_weight, torch.cat(torch.autograd.grad(result, (own, others), tensors["grad"]), 1))


@pytest.mark.parametrize("wanted", ["x", "regions", "weight"])
def test_a_single_gradient_beside_features(wanted):
    tensors = drawn_beside(BY_TILES)
    expected = dict(zip(("x", "regions", "weight"), beside(tensors, BY_TILES)[1:], strict=True))
    leaf = tensors[wanted].detach().requires_grad_()
    x, regions, weight = ((tensors | {wanted: leaf})[name] for name in ("x", "regions", "weight"))
    result = apc_kernels.pyramid_conv(regions, weight, BY_TILES.size, BY_TILES.scales, features=x)
    assert same_bits(torch.autograd.grad(result, leaf, tensors["grad"])[0], expected[wanted])


def test_same_bits_for_any_number_of_threads_beside_features(threads):
    tensors = drawn_beside(BY_TILES, channels_last)
    first, *others = [(threads(n), beside(tensors, BY_TILES))[1] for n in (1, 2, 3)]
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_gradients_of_gradients_beside_features():
    case = ConvCase(2, 2, 2, (4, 5), 3, (2, 1))
    t = draw_bottleneck(case, nchw, torch.float64, "cpu", 3)

    def function(x, regions, weight):
        return apc_kernels.pyramid_conv(regions, weight, case.size, case.scales, features=x)

    leaves = [t[name].requires_grad_() for name in ("x", "regions", "weight")]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradients_with_a_graph_beside_features():
    """By tiles the operation is differentiable once; asking for a graph changes nothing in the first gradients."""
    tensors = drawn_beside(BY_TILES)
    leaves = [tensors[name].requires_grad_() for name in ("x", "regions", "weight")]
    x, regions, weight = leaves
    result = apc_kernels.pyramid_conv(regions, weight, BY_TILES.size, BY_TILES.scales, features=x)
    grads = torch.autograd.grad(result, leaves, tensors["grad"], create_graph=True)
    for grad, expected in zip(grads, beside(tensors, BY_TILES)[1:], strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="conv3x3 is differentiable once"):
        torch.autograd.grad(grads[0].sum(), weight)


def test_compile_beside_features():
    tensors = drawn_beside(SMALL)
    compiled = torch.compile(
        lambda x, regions, weight, scales: apc_kernels.pyramid_conv(regions, weight, x.shape[2:], scales, features=x),
        fullgraph=True,
        backend="aot_eager",
    )
    for ours, expected in zip(beside(tensors, SMALL, compiled), beside(tensors, SMALL), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("features", "weight", "size", "message"),
    [
        (torch.zeros(2, 7, 4), torch.zeros(4, 13, 3, 3), (4, 4), r"features: expected \(B, F, h, w\), got \(2, 7, 4\)"),
        (
            torch.zeros(2, 7, 4, 4),
            torch.zeros(4, 12, 3, 3),
            (4, 4),
            "7 channels of features and 2 scales of 3, 13; got",
        ),
        (
            torch.zeros(2, 7, 4, 5),
            torch.zeros(4, 13, 3, 3),
            (4, 4),
            r"expected \(2, F, 4, 4\) for these regions and size",
        ),
        (torch.zeros(1, 7, 4, 4), torch.zeros(4, 13, 3, 3), (4, 4), r"features: expected \(2, F, 4, 4\) .* got \(1, 7"),
        (torch.zeros(2, 7, 4, 4).double(), torch.zeros(4, 13, 3, 3), (4, 4), "weight: expected the maps' dtype"),
    ],
)
def test_wrong_features(features, weight, size, message):
    with pytest.raises(ValueError, match=message):
        apc_kernels.pyramid_conv(REGIONS, weight, size, (1, 2), features=features)


# As an operation


def test_compile():
    """One graph, and no second one for other sizes."""
    compiled = torch.compile(apc_kernels.pyramid_conv, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case in (ODD, ConvCase(3, 4, 6, (11, 8), 3, (1, 2, 3, 6))):
            tensors = draw_conv(case)
            actual = with_gradients(compiled, tensors, case)
            for ours, expected in zip(actual, with_gradients(apc_kernels.pyramid_conv, tensors, case), strict=True):
                torch.testing.assert_close(ours, expected)


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4 * 3, 3, 3))

    def forward(self, x, regions):
        return apc_kernels.pyramid_conv(regions, self.weight, x.shape[2:], (1, 2, 3, 6))


def test_export_with_dynamic_sizes():
    sizes = {2: torch.export.Dim("h", min=2, max=512), 3: torch.export.Dim("w", min=2, max=512)}
    module = Conv()
    program = torch.export.export(
        module, (torch.randn(2, 1, 13, 17), torch.randn(2, 3, 50)), dynamic_shapes={"x": sizes, "regions": None}
    )
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(call, "namespace", "aten") == "aten" for call in calls), calls
    x, regions = torch.randn(2, 1, 30, 9), torch.randn(2, 3, 50)
    torch.testing.assert_close(program.module()(x, regions), module(x, regions))


def test_autocast_computes_as_a_convolution_does():
    t = draw_conv(ODD)
    with torch.autocast("cpu", torch.bfloat16):
        result = apc_kernels.pyramid_conv(t["regions"].bfloat16(), t["weight"], ODD.size, ODD.scales)
    assert result.dtype == torch.bfloat16
    exact = stock.pyramid_conv(t["regions"].double(), t["weight"].double(), ODD.size, ODD.scales)
    narrow = stock.pyramid_conv(t["regions"].bfloat16(), t["weight"].bfloat16(), ODD.size, ODD.scales)
    assert_accurate(result, exact, narrow, "under autocast")


REGIONS, WEIGHT = torch.zeros(2, 3, 5), torch.zeros(4, 6, 3, 3)


@pytest.mark.parametrize(
    ("regions", "weight", "size", "scales", "message"),
    [
        (torch.zeros(2, 3), WEIGHT, (4, 4), (1, 2), r"regions: expected \(B, C, J\), got \(2, 3\)"),
        (torch.zeros(2, 3, 6), WEIGHT, (4, 4), (1, 2), r"regions: expected \(B, C, 5\) for scales \(1, 2\)"),
        (REGIONS.long(), WEIGHT, (4, 4), (1, 2), "regions: expected float32, .* got int64"),
        (REGIONS, torch.zeros(4, 6, 3), (4, 4), (1, 2), r"weight: expected \(O, S\*C, k, k\), got \(4, 6, 3\)"),
        (REGIONS, torch.zeros(4, 5, 3, 3), (4, 4), (1, 2), "weight: .* for 2 scales of 3 channels, 6; got"),
        (REGIONS, torch.zeros(4, 6, 2, 2), (4, 4), (1, 2), "weight: expected an odd, square kernel"),
        (REGIONS, torch.zeros(4, 6, 3, 1), (4, 4), (1, 2), "weight: expected an odd, square kernel"),
        (REGIONS, WEIGHT.double(), (4, 4), (1, 2), "weight: expected the dtype of regions, float32, got float64"),
        (REGIONS, WEIGHT.to("meta"), (4, 4), (1, 2), "weight: expected a tensor on the regions' device, cpu, got meta"),
        (REGIONS, WEIGHT, (0, 4), (1, 2), "size: expected a height and width of 1 to 1073741823"),
        (REGIONS, WEIGHT, (4, 4), (), "scales: expected 1 to 64 scales, got 0"),
    ],
)
def test_wrong_input(regions, weight, size, scales, message):
    with pytest.raises(ValueError, match=message):
        apc_kernels.pyramid_conv(regions, weight, size, scales)


@pytest.mark.parametrize(
    ("regions", "weight", "size", "message"),
    [
        ([1.0], WEIGHT, (4, 4), "regions: expected a tensor, got list"),
        (REGIONS, None, (4, 4), "weight: expected a tensor, got NoneType"),
        (REGIONS, WEIGHT, 4, "size: expected two integers"),
    ],
)
def test_wrong_types(regions, weight, size, message):
    with pytest.raises(TypeError, match=message):
        apc_kernels.pyramid_conv(regions, weight, size, (1, 2))


def test_wrong_memory_format():
    with pytest.raises(ValueError, match="memory_format: expected contiguous_format or channels_last, got"):
        apc_kernels.pyramid_conv(REGIONS, WEIGHT, (4, 4), (1, 2), memory_format=torch.preserve_format)


# The matrices of an eager call are kept.


def test_kept_matrices_serve_gradients_after_inference():
    tensors = draw_conv(ODD)
    arguments = (tensors["regions"], tensors["weight"], ODD.size, ODD.scales)
    reference._kept_matrices.cache_clear()
    with torch.inference_mode():
        expected = apc_kernels.pyramid_conv(*arguments)
    result, *_ = with_gradients(apc_kernels.pyramid_conv, tensors, ODD)
    assert same_bits(result, expected.clone())
    assert reference._kept_matrices.cache_info().hits == 1


def test_fake_tensors_are_not_kept():
    reference._kept_matrices.cache_clear()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(REGIONS), mode.from_tensor(WEIGHT)
        assert apc_kernels.pyramid_conv(*fake, (4, 4), (1, 2)).shape == (2, 4, 4, 4)
    assert reference._kept_matrices.cache_info().currsize == 0
    apc_kernels.pyramid_conv(REGIONS, WEIGHT, (4, 4), (1, 2))


def test_few_matrices_are_kept():
    for height in range(1, 100):
        apc_kernels.pyramid_conv(REGIONS, WEIGHT, (height, 4), (1, 2))
    assert reference._kept_matrices.cache_info().currsize <= 32
