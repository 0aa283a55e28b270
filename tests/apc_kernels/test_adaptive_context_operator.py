"""Tests adaptive_context as an operator: the dispatcher's contract, and the errors for wrong input."""

import pytest
import torch
from accuracy import same_bits
from cases import ContextCase, channels_last, draw_context, nchw, sliced
from places import CPU, places

import apc_kernels

ODD = ContextCase(2, 13, (9, 23), (1, 2, 6))
NAMES = ("x", "regions", "weight", "bias")
OPERATORS = torch.ops.apc_kernels


def run(function, t, scales):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.items() if name != "grad"}
    given = [leaves[name] for name in NAMES]
    z = function(*given, scales, shift=leaves["shift"], residual=True, center=leaves["center"])
    return z.detach(), *torch.autograd.grad(z, list(leaves.values()), t["grad"])


@places
@pytest.mark.parametrize("layout", [nchw, channels_last, sliced], ids=lambda layout: layout.__name__)
def test_opcheck(device, backend, layout):
    t = draw_context(ODD, layout, device=device)
    grad = t.pop("grad")
    x, regions, weight, bias, shift, center = (tensor.requires_grad_() for tensor in t.values())
    scales, free = list(ODD.scales), [tensor.detach() for tensor in (x, regions, weight, bias)]
    with apc_kernels.backend(backend):
        for options in ((shift, True, center), (None, False, None)):
            torch.library.opcheck(OPERATORS.adaptive_context.default, (x, regions, weight, bias, scales, *options))
        arguments = (grad, *free, scales, shift.detach(), center.detach())
        torch.library.opcheck(OPERATORS.adaptive_context_backward_regions.default, arguments)
        moments = torch.zeros_like(bias), torch.zeros(2, 1 + 16 + 1296, device=device)
        options = (shift.detach(), True, center.detach(), moments[0].detach(), moments[1], None)
        torch.library.opcheck(OPERATORS.adaptive_context_backward_x.default, (grad, *free, scales, *options))


@places
def test_compile(device, backend):
    """One graph, and no second one for other sizes."""
    compiled = torch.compile(apc_kernels.adaptive_context, fullgraph=True, dynamic=True, backend="aot_eager")
    with apc_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for case in (ODD, ContextCase(3, 13, (12, 7), ODD.scales)):
            t = draw_context(case, channels_last, device=device)
            expected, actual = (run(function, t, case.scales) for function in (apc_kernels.adaptive_context, compiled))
            for a, b in zip(actual, expected, strict=True):
                if backend == "reference":  # PyTorch's own products are compiled into others
                    torch.testing.assert_close(a, b)
                else:
                    assert same_bits(a, b)


class Context(torch.nn.Module):
    def forward(self, x, regions, weight, bias, shift, center):
        given = {"shift": shift, "residual": True, "center": center}
        return apc_kernels.adaptive_context(x, regions, weight, bias, ODD.scales, **given)


def test_export_holds_stock_operators_only():
    t = draw_context(ODD)
    del t["grad"]
    sizes = {"x": {2: torch.export.Dim("h", min=2, max=512), 3: torch.export.Dim("w", min=2, max=512)}}
    dynamic = sizes | dict.fromkeys(("regions", "weight", "bias", "shift", "center"))
    program = torch.export.export(Context(), tuple(t.values()), dynamic_shapes=dynamic)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(call, "namespace", "aten") == "aten" for call in calls), calls
    t["x"] = torch.randn(2, 39, 17, 5)
    torch.testing.assert_close(program.module()(*t.values()), Context()(*t.values()))


@pytest.mark.parametrize("backend", CPU)
def test_autocast_widens_what_goes_beside_the_map(backend):
    t = draw_context(ODD, dtype=torch.bfloat16)
    given = t["x"], t["regions"].bfloat16(), t["weight"], t["bias"], ODD.scales
    with apc_kernels.backend(backend), torch.autocast("cpu", torch.bfloat16):
        z = apc_kernels.adaptive_context(*given, shift=t["shift"])
        expected = apc_kernels.adaptive_context(given[0], given[1].float(), *given[2:], shift=t["shift"])
    assert z.dtype == torch.bfloat16 and same_bits(z, expected)
    with pytest.raises(ValueError, match="regions: expected float32 for a map in bfloat16, got bfloat16"):
        apc_kernels.adaptive_context(*given)


# Wrong input


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x: expected 4 dimensions \(B, S·C, h, w\), got 3: \(2, 3, 4\)"),
        ({"x": torch.zeros(2, 40, 4, 4)}, ValueError, "x: expected a multiple of 3 channels, a block for each scale"),
        ({"x": torch.zeros(2, 0, 4, 4)}, ValueError, "x: expected a multiple of 3 channels"),
        ({"x": torch.zeros(2, 39, 0, 4)}, ValueError, r"x: expected 1 to \d+ positions, got \(2, 39, 0, 4\)"),
        ({"x": torch.zeros(2, 39, 4, 4).long()}, ValueError, "x: expected float32, .* got int64"),
        ({"x": torch.zeros(2, 39, 4, 4).double()}, ValueError, "weight: expected float64 for a map in float64"),
        ({"regions": torch.zeros(2, 40, 13)}, ValueError, r"regions: expected \(2, 41, 13\), got \(2, 40, 13\)"),
        ({"regions": torch.zeros(1, 41, 13)}, ValueError, r"regions: expected \(2, 41, 13\), got \(1, 41, 13\)"),
        ({"regions": torch.zeros(2, 41, 13).half()}, ValueError, "regions: expected float32 .* got float16"),
        (
            {"regions": torch.zeros(2, 41, 13, device="meta")},
            ValueError,
            "regions: expected a tensor on x's device, cpu",
        ),
        ({"weight": torch.zeros(41, 13, 1, 1)}, ValueError, r"weight: expected \(41, 13\), got \(41, 13, 1, 1\)"),
        ({"weight": torch.zeros(41, 13).double()}, ValueError, "weight: expected float32 for a map in float32"),
        ({"bias": torch.zeros(40)}, ValueError, r"bias: expected \(41,\) or \(2, 41\), got \(40,\)"),
        ({"shift": torch.zeros(13)}, ValueError, r"shift: expected \(39,\) or \(2, 39\), got \(13,\)"),
        ({"center": torch.zeros(41)}, ValueError, r"center: expected \(2, 41\), got \(41,\)"),
        ({"scales": (1, 2)}, ValueError, "x: expected a multiple of 2 channels"),
        ({"scales": (1, 2, 5)}, ValueError, r"weight: expected \(30, 13\), got \(41, 13\)"),
        ({"scales": (1, 2, 33)}, ValueError, r"scales: expected scales of 1 to 32, got \(1, 2, 33\)"),
        ({"scales": ()}, ValueError, "scales: expected 1 to 64 scales, got 0"),
        ({"scales": 3}, TypeError, "scales: expected a sequence of integers, got 3"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"regions": 1.0}, TypeError, "regions: expected a tensor, got float"),
        ({"center": "no"}, TypeError, "center: expected a tensor, got str"),
    ],
)
def test_wrong_input(changed, error, message):
    t = draw_context(ODD)
    given = {name: t[name] for name in NAMES} | {"scales": ODD.scales} | changed
    with pytest.raises(error, match=message):
        apc_kernels.adaptive_context(**given)


def test_wrong_input_of_the_backward_operators():
    t = draw_context(ODD)
    x, regions, weight, bias, shift, center, grad = t.values()
    scales, both = list(ODD.scales), (weight, bias, list(ODD.scales))
    with pytest.raises(ValueError, match="grad: expected x's shape, dtype and device"):
        OPERATORS.adaptive_context_backward_regions(grad[:, :13], x, regions, *both, shift, center)
    with pytest.raises(ValueError, match="grad: expected x's shape, dtype and device"):
        OPERATORS.adaptive_context_backward_x(grad.half(), x, regions, *both, None, False, None, None, None, None)
    for wrong in (
        (None, x, None, *both, None, False),
        (None, x, None, *both, None, True),
        (grad, x, None, *both, None, False),
    ):
        with pytest.raises(ValueError, match="grad: expected grad and regions, or neither of them"):
            OPERATORS.adaptive_context_backward_x(*wrong, None, None, None, None)
    linear, quadratic = torch.zeros(2, 41), torch.zeros(2, sum(s**4 for s in scales))
    with pytest.raises(ValueError, match="linear: expected linear, quadratic and center together"):
        OPERATORS.adaptive_context_backward_x(None, x, None, *both, None, False, None, linear, quadratic, None)
    with pytest.raises(ValueError, match=r"quadratic: expected \(2, 1313\), got \(2, 41\)"):
        OPERATORS.adaptive_context_backward_x(None, x, None, *both, None, False, center, linear, linear, None)


def test_limits_of_the_gpu_kernels(monkeypatch):
    """`auto` passes over what cannot take a call; forcing it says why."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    t = draw_context(ContextCase(1, 3, (4, 4), (9,)))
    given = [t[name] for name in NAMES]
    apc_kernels.adaptive_context(*given, (9,))
    with (
        apc_kernels.backend("triton"),
        pytest.raises(RuntimeError, match="the kernels take up to 16 scales of up to 8"),
    ):
        apc_kernels.adaptive_context(*given, (9,))


def test_raw_operators_never_leave_their_memory():
    t = draw_context(ODD)
    x, regions, weight, bias, shift, center, grad = t.values()
    with apc_kernels.backend("cpp"):
        apc_kernels.adaptive_context(x, regions, weight, bias, ODD.scales)  # loads the library
    raw, scales, z = torch.ops.apc_kernels_cpp, list(ODD.scales), torch.empty_like(x)
    for message, arguments in (
        (
            "regions: expected size 41 in dimension 1, got 40",
            (x, regions[:, 1:], weight, bias, scales, None, True, None, z),
        ),
        ("regions: expected a contiguous", (x, regions.mT.contiguous().mT, weight, bias, scales, None, True, None, z)),
        ("weight: expected float32", (x, regions, weight.double(), bias, scales, None, True, None, z)),
        ("shift: expected size 39", (x, regions, weight, bias, scales, shift[:, 1:], True, None, z)),
        ("center: expected 2 dimensions", (x, regions, weight, bias, scales, None, True, center[0], z)),
        ("z: expected size 23", (x, regions, weight, bias, scales, None, True, None, z[..., 1:])),
        ("x: expected columns or channels", (x.mT.contiguous().mT, regions, weight, bias, scales, None, True, None, z)),
        ("x: expected a multiple of 2", (x, regions, weight, bias, [1, 2], None, True, None, z)),
        ("scales: expected scales of 1 to 32", (x, regions, weight, bias, [1, 2, 40], None, True, None, z)),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw.adaptive_context(*arguments)
    mean, covariance = torch.empty(2, 41), torch.empty(2, 1313, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mean: expected float64"):
        raw.affinity_moments(x, weight, bias, scales, mean, covariance)
    outputs = torch.empty_like(x), weight.clone(), bias.clone()
    with pytest.raises(RuntimeError, match="grad: expected grad and regions, or neither"):
        raw.adaptive_context_backward_x(grad, x, None, weight, bias, scales, *(None, False), *(None,) * 4, *outputs)
