"""Tests upsample_region_sums as an operator: the dispatcher's contract, and the errors for wrong input."""

import pytest
import torch
from accuracy import same_bits
from cases import channels_last, nchw, sliced
from places import CPU, places_without_cuda
from region_cases import KINDS, draw, ours, sums_and_gradient
from upsample_cases import UpsampleCase

import apc_kernels

ODD = UpsampleCase(2, 13, (9, 11), (29, 46))
kinds = pytest.mark.parametrize("kind", KINDS)


# The dispatcher


@places_without_cuda
@kinds
def test_opcheck(device, backend, kind):
    t = draw(ODD, kind, sliced, device=device)
    operators, options = torch.ops.apc_kernels, t["options"]
    settings = (t["target"], options.get("weight"), 255, options["sigmoid"], True)
    with apc_kernels.backend(backend):
        leaf = t["logits"].detach().requires_grad_()
        torch.library.opcheck(operators.upsample_region_sums.default, (leaf, *settings))
        torch.library.opcheck(operators.upsample_region_sums_backward.default, (t["grad"], t["logits"], *settings))


@places_without_cuda
@kinds
def test_compile(device, backend, kind):
    """One graph, and no second one for other sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(apc_kernels.upsample_region_sums, fullgraph=True, dynamic=True, backend="aot_eager")
    with apc_kernels.backend(backend), torch._dynamo.config.patch(error_on_recompile=True):
        for case in ODD, UpsampleCase(3, 13, (16, 7), (40, 21)):
            t = draw(case, kind, channels_last, device=device)
            expected = sums_and_gradient(apc_kernels.upsample_region_sums, t, squares=True)
            actual = sums_and_gradient(compiled, t, squares=True)
            assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


class Sums(torch.nn.Module):
    def __init__(self, options):
        super().__init__()
        self.options = options

    def forward(self, logits, target):
        return apc_kernels.upsample_region_sums(logits, target, **self.options)


@kinds
def test_export_holds_stock_operators_only(kind):
    given, other = draw(ODD, kind), draw(UpsampleCase(2, 13, (16, 7), (40, 21)), kind)
    last = given["target"].dim()
    sizes = {
        name: {i: torch.export.Dim(f"{name}{i}", min=2, max=512) for i in axes}
        for name, axes in (("logits", (2, 3)), ("target", (last - 2, last - 1)))
    }
    module = Sums(given["options"])
    program = torch.export.export(module, (given["logits"], given["target"]), dynamic_shapes=sizes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    foreign = [c for c in calls if getattr(c, "namespace", "aten") != "aten" or "apc_kernels" in str(c)]
    assert not foreign and len(calls) > 5, calls
    with apc_kernels.backend("reference"):
        expected = module(other["logits"], other["target"])
    torch.testing.assert_close(program.module()(other["logits"], other["target"]), expected)


def test_meta_tensors():
    t = draw(ODD, "masks", channels_last, torch.bfloat16)
    logits = t["logits"].to("meta").requires_grad_()
    sums = apc_kernels.upsample_region_sums(logits, t["target"].to("meta"), sigmoid=True)
    (grad,) = torch.autograd.grad(sums.sum(), logits)
    assert sums.shape == (3, 2, 13) and sums.dtype == torch.float32
    assert grad.stride() == logits.stride() and grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_autocast_leaves_the_dtype_alone(backend, dtype):
    """Autocast changes no bit of the results; a weight that it has rounded is widened."""
    t = draw(ODD, "weighted softmax", dtype=dtype)
    expected, weight = ours(t, backend), t["options"]["weight"]
    narrow = ours(t, backend, weight=weight.bfloat16().to(weight))[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(t, backend)
        with apc_kernels.backend(backend):
            widened = apc_kernels.upsample_region_sums(t["logits"], t["target"], weight=weight.bfloat16(), squares=True)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True)) and same_bits(widened, narrow)


@places_without_cuda
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_makes_no_copy(device, backend, layout, forbid_copies):
    if backend == "reference":
        pytest.skip("the reference is a composition")
    t = draw(ODD, layout=layout, device=device)
    with apc_kernels.backend(backend):
        forbid_copies()
        assert apc_kernels.upsample_region_sums(t["logits"], t["target"]).isfinite().all()


# Wrong input

LOGITS, TARGET = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 10, dtype=torch.int64)
MASKS = torch.zeros(2, 3, 8, 10, dtype=torch.uint8)
SUMS, COUNT = torch.zeros(4, 2, 3), torch.zeros(1).long()
PLAIN, SIGMOID = (None, 255, False, False), (None, 255, True, False)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": LOGITS[0]}, ValueError, r"logits: expected 4 dimensions \(B, K, h, w\), got 3"),
        ({"logits": LOGITS.int()}, ValueError, "logits: expected float32, .* got int32"),
        ({"logits": LOGITS[:, :1]}, ValueError, "logits: expected 2 classes or more for a softmax, got 1; one logit"),
        ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
        ({"target": None}, TypeError, "target: expected a tensor, got NoneType"),
        ({"target": MASKS}, ValueError, r"target: expected 3 dimensions \(B, H, W\), got 4"),
        ({"target": TARGET.float()}, ValueError, "target: expected labels in uint8, .* got float32"),
        ({"target": TARGET.bool()}, ValueError, "target: expected labels in uint8, .* got bool"),
        ({"target": TARGET[:1]}, ValueError, "target: expected a batch of 2, as the logits'"),
        ({"target": MASKS[:, :2], "sigmoid": True}, ValueError, r"target: expected masks \(2, 3, H, W\)"),
        ({"target": MASKS.half(), "sigmoid": True}, ValueError, "target: expected masks in bool, .* got float16"),
        ({"target": MASKS.to("meta"), "sigmoid": True}, ValueError, "target: .* on the logits' device, cpu, got meta"),
        ({"target": MASKS[:, :, :0], "sigmoid": True}, ValueError, r"target: expected a height and width of 1 to \d+"),
        ({"target": TARGET.bool(), "sigmoid": True}, ValueError, "target: expected labels in uint8, .* got bool"),
        ({"target": MASKS, "sigmoid": True, "weight": torch.ones(3)}, ValueError, "weight: expected None for masks"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected \(3,\), got \(4,\)"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight: expected a tensor without gradient"),
        ({"weight": [1.0]}, TypeError, "weight: expected a tensor, got list"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an integer, got None"),
        ({"sigmoid": 1}, TypeError, "sigmoid: expected True or False, got 1"),
        ({"squares": None}, TypeError, "squares: expected True or False, got None"),
        ({"align_corners": "no"}, TypeError, "align_corners: expected True or False, got 'no'"),
    ],
)  # fmt: skip
def test_wrong_arguments(changed, error, message):
    given = {"logits": LOGITS, "target": TARGET} | changed
    with pytest.raises(error, match=message):
        apc_kernels.upsample_region_sums(**given)
    if error is ValueError and "requires" not in message and "without gradient" not in message:
        given |= {"weight": given.get("weight"), "sigmoid": given.get("sigmoid", False)}
        if given["target"].device == LOGITS.device:  # torch itself refuses two devices
            with pytest.raises(error, match=message):
                arguments = (given["logits"], given["target"], given["weight"], 255, given["sigmoid"], False)
                torch.ops.apc_kernels.upsample_region_sums(*arguments)


@pytest.mark.parametrize("grad", [torch.zeros(3, 2, 3), torch.zeros(4, 2, 3).double(), torch.zeros(4, 3, 2)])
def test_wrong_gradients(grad):
    with pytest.raises(ValueError, match=r"grad: expected \(4, 2, 3\) in float32 on cpu, got"):
        torch.ops.apc_kernels.upsample_region_sums_backward(grad, LOGITS, TARGET, None, 255, False, False)


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("", (LOGITS, TARGET, *PLAIN, SUMS[1:], COUNT), "sums: expected size 4"),
        ("", (LOGITS, TARGET, *PLAIN, SUMS, COUNT.float()), "wrong: expected one int64"),
        ("", (LOGITS, MASKS, *PLAIN, SUMS, COUNT), "target: expected"),
        ("", (LOGITS, MASKS[:, :2], *SIGMOID, SUMS, COUNT), "target: expected"),
        ("_backward", (SUMS[:, :, 1:], LOGITS, TARGET, *PLAIN, LOGITS), "grad: expected size 3"),
        ("_backward", (SUMS, LOGITS, TARGET, *PLAIN, LOGITS[..., 1:]), "grad_logits: "),
    ],
)  # fmt: skip
def test_raw_operators_never_leave_their_memory(operator, arguments, message):
    with apc_kernels.backend("cpp"):
        apc_kernels.upsample_argmax(torch.zeros(1, 1, 1, 1), (1, 1))  # loads the library
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.apc_kernels_cpp, f"upsample_region_sums{operator}")(*arguments)
