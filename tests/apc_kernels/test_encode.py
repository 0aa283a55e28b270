"""Tests encode against float64 and against the residuals written out in PyTorch."""

import pytest
import stock
import torch
from accuracy import max_error, same_bits
from cases import channels_last, nchw
from encoding import NAMES, check, with_gradients
from head_cases import CODES, CodeCase, draw_code
from places import dtypes, layouts

import apc_kernels

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ODD = CodeCase(2, 13, (9, 11), 5)


@DEVICES
@pytest.mark.parametrize("case", CODES, ids=str)
def test_hard_cases(device, case):
    check(draw_code(case, device=device), case)


@DEVICES
@layouts
@dtypes
def test_layouts_and_dtypes(device, layout, dtype):
    check(draw_code(ODD, layout, dtype, device), f"{layout.__name__} {dtype}")


def test_positions_in_one_dimension():
    t = draw_code(ODD)
    assert same_bits(
        apc_kernels.encode(*(t[n] for n in NAMES)), apc_kernels.encode(t["x"].flatten(2), *(t[n] for n in NAMES[1:]))
    )


@pytest.mark.parametrize("offset", [10.0, 100.0, 1000.0])
def test_far_from_the_origin(offset):
    """Distances of a few between features and codewords of up to 1000: products alone would lose them."""
    t = draw_code(CodeCase(1, 32, (12, 12), 8))
    t = t | {"x": t["x"] + offset, "codewords": t["codewords"] + offset}
    check(t, f"offset {offset}")


@pytest.mark.parametrize("factor", [1e4, 1e7])
def test_large_features(factor):
    """Logits of up to 1e17, whose rounding errors are large numbers: that of the winner must be 0 below it, exactly."""
    t = draw_code(CodeCase(1, 32, (12, 12), 8))
    t = t | {"x": t["x"] * factor, "scale": -torch.linspace(0.1, 1, 8)}
    check(t, f"factor {factor}")


def test_centering_is_what_keeps_the_distances():
    """The test above can fail: without the mean codeword taken off, the same products are a hundred times worse."""
    t = draw_code(CodeCase(1, 32, (12, 12), 8))
    x, words, scale = t["x"] + 1000, t["codewords"] + 1000, t["scale"]
    exact = stock.encode(x.double(), words.double(), scale.double())
    flat = x.flatten(2)
    distances = flat.square().sum(1, keepdim=True) + words.square().sum(1)[:, None] - 2 * words @ flat
    weights = (scale[:, None] * distances).softmax(1)
    plain = weights @ flat.mT - weights.sum(2)[..., None] * words
    assert max_error(plain, exact) > 100 * max_error(apc_kernels.encode(x, words, scale), exact)


def test_gradcheck():
    t = draw_code(CodeCase(2, 3, (2, 3), 4), dtype=torch.float64)
    leaves = [t[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(apc_kernels.encode, leaves)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(layout):
    t = draw_code(ODD, dtype=torch.float64)
    leaves = [t[name].requires_grad_() for name in NAMES]
    leaves[0] = leaves[0].detach().to(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.apc_kernels.encode.default, leaves)


@DEVICES
def test_same_bits_every_time(device):
    tensors = draw_code(ODD, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [with_gradients(apc_kernels.encode, tensors) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_compile():
    """One graph, and no second one for other sizes."""
    compiled = torch.compile(apc_kernels.encode, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for case in (ODD, CodeCase(3, 6, (7, 8), 4)):
            tensors = draw_code(case)
            expected = with_gradients(apc_kernels.encode, tensors)
            for ours, wanted in zip(with_gradients(compiled, tensors), expected, strict=True):
                torch.testing.assert_close(ours, wanted)


class Encode(torch.nn.Module):
    def __init__(self):
        super().__init__()
        t = draw_code(ODD)
        self.codewords, self.scale = torch.nn.Parameter(t["codewords"]), torch.nn.Parameter(t["scale"])

    def forward(self, x):
        return apc_kernels.encode(x, self.codewords, self.scale)


def test_export_with_dynamic_sizes():
    sizes = {2: torch.export.Dim("h", min=2, max=512), 3: torch.export.Dim("w", min=2, max=512)}
    module = Encode()
    program = torch.export.export(module, (draw_code(ODD)["x"],), dynamic_shapes={"x": sizes})
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(call, "namespace", "aten") == "aten" for call in calls), calls
    x = torch.randn(2, 13, 30, 7)
    torch.testing.assert_close(program.module()(x), module(x))


def test_autocast_rounds_nothing():
    """Forward, nor in a backward that runs inside autocast too."""
    t = draw_code(ODD)
    expected = with_gradients(apc_kernels.encode, t)
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(apc_kernels.encode, t)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_strides(layout):
    t = draw_code(ODD, layout)
    _, grad_x, *_ = with_gradients(apc_kernels.encode, t)
    assert grad_x.stride() == torch.empty_like(t["x"]).stride()


def test_keeps_little_for_backward():
    """x, which is there anyway, and two numbers for each position and codeword."""
    t = draw_code(CodeCase(1, 64, (20, 20), 5))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        apc_kernels.encode(*(t[name].requires_grad_() for name in NAMES))
    mine = {t[name].data_ptr() for name in NAMES}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in mine) == 2 * 5 * 400


X, CODEWORDS, SCALE = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3), torch.zeros(5)


@pytest.mark.parametrize(
    ("x", "codewords", "scale", "message"),
    [
        (torch.zeros(3, 4), CODEWORDS, SCALE, r"x: expected \(B, C, h, w\) or \(B, C, N\), got \(3, 4\)"),
        (X.long(), CODEWORDS, SCALE, "x: expected float32, .* got int64"),
        (X, torch.zeros(5), SCALE, r"codewords: expected \(K, 3\) for these features, got \(5,\)"),
        (X, torch.zeros(5, 4), SCALE, r"codewords: expected \(K, 3\) for these features, got \(5, 4\)"),
        (X, torch.zeros(0, 3), torch.zeros(0), r"codewords: expected \(K, 3\) for these features, got \(0, 3\)"),
        (X, CODEWORDS, torch.zeros(4), r"scale: expected \(5,\), got \(4,\)"),
        (X, CODEWORDS.double(), SCALE, "codewords: expected float32 for a map in float32, got float64"),
        (X, CODEWORDS, SCALE.to("meta"), "scale: expected a tensor on x's device, cpu, got one on meta"),
    ],
)
def test_wrong_input(x, codewords, scale, message):
    with pytest.raises(ValueError, match=message):
        apc_kernels.encode(x, codewords, scale)


@pytest.mark.parametrize(
    ("x", "codewords", "scale", "message"),
    [
        ([1.0], CODEWORDS, SCALE, "x: expected a tensor, got list"),
        (X, None, SCALE, "codewords: expected a tensor, got NoneType"),
        (X, CODEWORDS, 1.0, "scale: expected a tensor, got float"),
    ],
)
def test_wrong_types(x, codewords, scale, message):
    with pytest.raises(TypeError, match=message):
        apc_kernels.encode(x, codewords, scale)
