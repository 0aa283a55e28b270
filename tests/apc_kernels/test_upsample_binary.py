"""Tests upsample_binary_cross_entropy and the thresholds of single logits against PyTorch's own composition."""

import pytest
import stock
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, same_bits
from cases import LAYOUTS, channels_last
from places import CPU, dtypes, layouts, places_without_cuda
from upsample_cases import UpsampleCase, draw_upsample, loss_and_gradient

import apc_kernels

ONE = UpsampleCase(2, 1, (7, 9), (29, 46))
CASES = [ONE, UpsampleCase(2, 1, (13, 17), (5, 6), True), UpsampleCase(2, 3, (6, 8), (48, 64))]
OPTIONS = [
    {},
    {"pos_weight": 2.5},
    {"reduction": "mean_all", "pos_weight": 0.3},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"reduction": "none", "pos_weight": 3.0},
    {"reduction": "none", "focal": 2.0},
    {"focal": 0.5, "pos_weight": 3.0},
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "mean"
)


def draw(case, layout=lambda x: x, dtype=torch.float32, device="cpu"):
    """Draws logits, labels 0, 1 and 255 of the shape of the upsampled logits, and a gradient of every loss."""
    t = draw_upsample(case, layout, dtype, device)
    generator = torch.Generator().manual_seed(case.classes)
    shape = (case.batch, case.classes, *case.size)
    target = torch.tensor([0, 1, 255])[torch.randint(3, shape, generator=generator)]
    grad = torch.randn(shape, generator=generator).to(t["grad"])
    return {"logits": t["logits"], "target": target.to(device), "grad": grad}


def without_weight(function):
    return lambda logits, target, weight, **options: function(logits, target, **options)


def check(tensors, case, backend, **options):
    with apc_kernels.backend(backend):
        loss, grad = loss_and_gradient(
            without_weight(apc_kernels.upsample_binary_cross_entropy), tensors, case, **options
        )
    exact = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    wide = {name: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for name, t in tensors.items()}
    theirs = without_weight(stock.upsample_binary_cross_entropy)
    true, own, widened = (loss_and_gradient(theirs, t, case, **options) for t in (exact, tensors, wide))
    assert_accurate(loss.cpu(), true[0].cpu(), widened[0].cpu(), f"{case} {options} loss")
    assert_accurate(grad.cpu(), true[1].cpu(), own[1].cpu(), f"{case} {options} gradient")


@places_without_cuda
@options
@cases
def test_loss(device, backend, options, case):
    check(draw(case, device=device), case, backend, **options)


@places_without_cuda
@layouts
@dtypes
def test_layouts_and_dtypes(device, backend, layout, dtype):
    check(draw(ONE, layout, dtype, device), ONE, backend, pos_weight=2.0)


@places_without_cuda
@pytest.mark.parametrize("reduction", ["mean", "mean_all", "sum", "none"])
def test_a_weight_for_each_channel(device, backend, reduction):
    case = CASES[2]
    weights = torch.tensor([0.5, 1.0, 4.0], device=device)
    check(draw(case, device=device), case, backend, pos_weight=weights, reduction=reduction)


@pytest.mark.parametrize("backend", CPU)
def test_shapes_and_labels(backend):
    t = draw(ONE)
    flat = t["target"][:, 0]
    with apc_kernels.backend(backend):
        for given in {}, {"pos_weight": 2.0, "reduction": "none"}:
            expected = apc_kernels.upsample_binary_cross_entropy(t["logits"], t["target"], **given)
            result = apc_kernels.upsample_binary_cross_entropy(t["logits"], flat, **given)
            assert result.shape == (flat.shape if given else ()) and same_bits(result, expected.view(result.shape))
        expected = apc_kernels.upsample_binary_cross_entropy(t["logits"], (flat == 1).long())
        assert same_bits(apc_kernels.upsample_binary_cross_entropy(t["logits"], flat == 1), expected)
        labels = torch.where(flat == 255, 1, flat).to(torch.uint8)  # uint8 does not hold -100: nothing is ignored
        weighted = apc_kernels.upsample_binary_cross_entropy(t["logits"], labels, ignore_index=-100, pos_weight=2.0)
        total = apc_kernels.upsample_binary_cross_entropy(t["logits"], labels.long(), pos_weight=2.0, reduction="sum")
    torch.testing.assert_close(weighted, total / labels.numel())


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("options", [{}, {"pos_weight": 2.0, "reduction": "none"}, {"focal": 0.5}], ids=str)
def test_gradcheck(backend, options):
    case = UpsampleCase(2, 2, (2, 3), (5, 4))
    t = draw(case, channels_last, torch.float64)

    def function(logits):
        return apc_kernels.upsample_binary_cross_entropy(logits, t["target"], **options)

    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, t["logits"].requires_grad_())


@places_without_cuda
def test_compile(device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        apc_kernels.upsample_binary_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with apc_kernels.backend(backend):
        for case in ONE, UpsampleCase(3, 1, (16, 7), (40, 21)):
            t = draw(case, device=device)
            logits = t["logits"].requires_grad_()
            for given in {}, {"pos_weight": 2.0}:
                expected = apc_kernels.upsample_binary_cross_entropy(logits, t["target"], **given)
                actual = compiled(logits, t["target"], **given)
                assert same_bits(actual, expected)
                grads = (torch.autograd.grad(loss, logits)[0] for loss in (actual, expected))
                assert same_bits(*grads)


class Everything(torch.nn.Module):
    def forward(self, logits, target):
        size = target.shape[1:]
        return (
            apc_kernels.upsample_binary_cross_entropy(logits, target, focal=2.0, pos_weight=3.0),
            apc_kernels.upsample_argmax(logits, size, threshold=0.3),
            apc_kernels.upsample_confusion(logits, target, threshold=0.5),
        )


def test_export_holds_stock_operators_only():
    t = draw(ONE)
    given = t["logits"], t["target"][:, 0]
    sizes = {
        name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in (("logits", (2, 3)), ("target", (1, 2)))
    }
    program = torch.export.export(Everything(), given, dynamic_shapes=sizes)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert not [c for c in calls if getattr(c, "namespace", "aten") != "aten" or "apc_kernels" in str(c)]
    other = draw(UpsampleCase(2, 1, (16, 7), (40, 21)))
    given = other["logits"], other["target"][:, 0]
    with apc_kernels.backend("reference"):
        expected = Everything()(*given)
    for a, b in zip(program.module()(*given), expected, strict=True):
        torch.testing.assert_close(a, b)


# Labels of a single logit


@places_without_cuda
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.9])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_labels_and_counts(device, backend, case, threshold, layout):
    t = draw(case, layout, device=device)
    logits, target = t["logits"], t["target"][:, 0]
    z = F.interpolate(logits.double(), case.size, mode="bilinear", align_corners=case.align_corners)[:, 0]
    clear = (z.sigmoid() - threshold).abs() > 1e-6
    given = {"align_corners": case.align_corners, "threshold": threshold}
    with apc_kernels.backend(backend):
        labels = apc_kernels.upsample_argmax(logits, case.size, **given)
        counts = apc_kernels.upsample_confusion(logits, target, **given)
    assert labels.dtype == torch.uint8 and clear.float().mean() > 0.99
    assert torch.equal(labels[clear] == 1, (z.sigmoid() > threshold)[clear]) and 0 < labels.float().mean() < 1
    valid = target != 255
    expected = torch.bincount(2 * target[valid] + labels[valid].long(), minlength=4).view(2, 2)
    assert torch.equal(counts, expected)


@places_without_cuda
def test_a_probability_at_the_threshold_is_0(device, backend):
    logits = torch.zeros(1, 1, 2, 3, device=device)
    with apc_kernels.backend(backend):
        assert not apc_kernels.upsample_argmax(logits, (5, 7), threshold=0.5).any()
        assert apc_kernels.upsample_argmax(logits, (5, 7), threshold=0.4).all()
        low = apc_kernels.upsample_argmax((logits + 2.0).bfloat16(), (5, 7), threshold=0.88)
    assert low.all()  # σ(2) = 0.8808: the threshold is not rounded to bfloat16


# Wrong input


@pytest.mark.parametrize(
    ("channels", "target", "message"),
    [
        (1, torch.zeros(2, 2, 8, 8).long(), r"target: expected \(B, H, W\) or \(B, 1, H, W\) for 1 logit a pixel, got"),
        (3, torch.zeros(2, 8, 8).long(), r"target: expected \(B, 3, H, W\) for 3 logits a pixel, got \(2, 8, 8\)"),
        (1, torch.zeros(2, 8, 8), "target: expected labels in uint8, int16, int32 or int64, got float32"),
        (1, torch.full((2, 8, 8), 2), "target: expected labels of 0 to 1, or 255 for pixels to ignore; got 2 in"),
    ],
)
def test_wrong_targets(channels, target, message):
    for given in {}, {"pos_weight": 2.0}:
        with pytest.raises(ValueError, match=message):
            apc_kernels.upsample_binary_cross_entropy(torch.zeros(2, channels, 4, 4), target, **given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pos_weight": "much"}, TypeError, "pos_weight: expected a number or a tensor, got 'much'"),
        ({"pos_weight": torch.ones(2)}, ValueError, r"pos_weight: expected \(1,\) or \(1,\), got \(2,\)"),
        (
            {"pos_weight": torch.ones(1, requires_grad=True)},
            ValueError,
            "pos_weight: expected a tensor without gradient",
        ),
        ({"focal": 2.0, "label_smoothing": 0.1}, ValueError, "label_smoothing: expected 0 with focal=2, got 0.1"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of mean, mean_all, sum, none; got 'average'"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        apc_kernels.upsample_binary_cross_entropy(torch.zeros(2, 1, 4, 4), torch.zeros(2, 8, 8).long(), **options)


@pytest.mark.parametrize(
    ("channels", "threshold", "error", "message"),
    [
        (2, 0.5, ValueError, r"logits: expected one channel with a threshold, got \(2, 2, 4, 4\)"),
        (1, 0, ValueError, "threshold: expected a probability above 0 and below 1, got 0.0"),
        (1, 1.0, ValueError, "threshold: expected a probability above 0 and below 1, got 1.0"),
        (1, float("nan"), ValueError, "threshold: expected a probability above 0 and below 1, got nan"),
        (1, "half", TypeError, "threshold: expected a number, got 'half'"),
    ],
)
def test_wrong_thresholds(channels, threshold, error, message):
    logits = torch.zeros(2, channels, 4, 4)
    with pytest.raises(error, match=message):
        apc_kernels.upsample_argmax(logits, (8, 8), threshold=threshold)
    with pytest.raises(error, match=message):
        apc_kernels.upsample_confusion(logits, torch.zeros(2, 8, 8).long(), threshold=threshold)
