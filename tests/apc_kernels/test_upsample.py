"""Tests upsample_cross_entropy against float64 and PyTorch's own composition, on every backend that can run here.

The loss is float32 whatever the logits: it is held to PyTorch's on widened logits. Their gradient is held to PyTorch's
in their own dtype.
"""

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import channels_last, nchw
from places import CPU, dtypes, layouts, places_without_cuda
from upsample_cases import UPSAMPLES, UpsampleCase, draw_upsample, loss_and_gradient, tied_logits

import apc_kernels

ODD = UpsampleCase(2, 13, (9, 11), (29, 46))
DOWN = UpsampleCase(2, 21, (23, 19), (8, 13), True)
OPTIONS = [
    {},
    {"weight": True, "label_smoothing": 0.1},
    {"reduction": "mean_all", "weight": True},
    {"reduction": "sum", "label_smoothing": 0.3},
    {"reduction": "none"},
    {"reduction": "none", "weight": True, "label_smoothing": 0.2},
    {"reduction": "none", "weight": True, "label_smoothing": 1.0},
    {"focal": 2.0},
    {"focal": 0.5, "reduction": "mean_all", "weight": True},
    {"focal": 5.0, "reduction": "none", "weight": True},
]
FOCAL = OPTIONS[-1]
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "mean"
)


def widened(tensors, dtype):
    return {name: t.to("cpu", dtype) if t.is_floating_point() else t.cpu() for name, t in tensors.items()}


def assert_matches(results, tensors, case, **options):
    exact = loss_and_gradient(stock.upsample_cross_entropy, widened(tensors, torch.float64), case, **options)
    wide = loss_and_gradient(stock.upsample_cross_entropy, widened(tensors, torch.float32), case, **options)
    own = {name: t.cpu() for name, t in tensors.items()}
    pytorch = loss_and_gradient(stock.upsample_cross_entropy, own, case, **options)
    assert_accurate(results[0].cpu(), exact[0], wide[0], f"{case} {options} loss")
    assert_accurate(results[1].cpu(), exact[1], pytorch[1], f"{case} {options} gradient")


def check(tensors, case, backend, **options):
    with apc_kernels.backend(backend):
        results = loss_and_gradient(apc_kernels.upsample_cross_entropy, tensors, case, **options)
    assert_matches(results, tensors, case, **options)
    return results


# Results and gradients


@places_without_cuda
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5], FOCAL], ids=["mean", "none", "focal"])
@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_hard_cases(device, backend, case, options):
    check(draw_upsample(case, device=device), case, backend, **options)


@places_without_cuda
@layouts
@dtypes
@pytest.mark.parametrize("case", [ODD, DOWN], ids=str)
def test_layouts_and_dtypes(device, backend, layout, dtype, case):
    check(draw_upsample(case, layout, dtype, device), case, backend, **OPTIONS[5])


@places_without_cuda
@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_options(device, backend, options, dtype):
    check(draw_upsample(ODD, channels_last, dtype, device), ODD, backend, **options)


@places_without_cuda
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_labels_of_every_width(device, backend, labels):
    narrow, wide = (draw_upsample(ODD, device=device, labels=dtype) for dtype in (labels, torch.int64))
    for given in OPTIONS[1], OPTIONS[5]:
        with apc_kernels.backend(backend):
            results = loss_and_gradient(apc_kernels.upsample_cross_entropy, narrow, ODD, **given)
            expected = loss_and_gradient(apc_kernels.upsample_cross_entropy, wide, ODD, **given)
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


@places_without_cuda
@pytest.mark.parametrize("ignored", [0, 12, -1, -100, 2**31 + 5, -(2**40)])
def test_any_label_can_be_the_ignored_one(device, backend, ignored):
    t = draw_upsample(ODD, device=device)
    t["target"][t["target"] == 255] = ignored
    check(t, ODD, backend, ignore_index=ignored, weight=True)


@places_without_cuda
def test_an_ignored_label_is_not_wrapped_to_the_width_of_the_labels(device, backend):
    t = draw_upsample(ODD, device=device, labels=torch.uint8)
    t["target"][t["target"] == 255] = 3
    with apc_kernels.backend(backend):
        results = [
            loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, ignore_index=i) for i in (-100, 256 + 3)
        ]
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert_matches(results[0], t, ODD, ignore_index=-100)


@places_without_cuda
@pytest.mark.parametrize("case", [ODD, DOWN, UPSAMPLES[-2]], ids=str)
def test_correct_pixels(device, backend, case):
    t = draw_upsample(case, device=device)
    with apc_kernels.backend(backend):
        prediction = apc_kernels.upsample_argmax(t["logits"], case.size, align_corners=case.align_corners)
        t["target"] = torch.where(t["target"] % 2 == 0, prediction, t["target"])  # many are right, many are not
        expected = ((prediction == t["target"]) & (t["target"] != 255)).sum()
        smooth = {"reduction": "sum", "weight": t["weight"], "label_smoothing": 0.5}
        for given in {}, {"reduction": "none"}, smooth, {"focal": 2.0}:
            given["align_corners"] = case.align_corners
            loss, correct = apc_kernels.upsample_cross_entropy(
                t["logits"].requires_grad_(), t["target"], return_correct=True, **given
            )
            assert correct.dtype == torch.int64 and correct.dim() == 0 and not correct.requires_grad
            assert torch.equal(correct, expected) and expected > 10
            assert same_bits(loss, apc_kernels.upsample_cross_entropy(t["logits"], t["target"], **given))


@places_without_cuda
def test_of_tied_classes_the_first_is_correct(device, backend):
    case = UpsampleCase(2, 5, (8, 9), (32, 36))
    logits, target = tied_logits(case, device=device), draw_upsample(case, device=device)["target"]
    with apc_kernels.backend(backend):
        _, correct = apc_kernels.upsample_cross_entropy(logits, target, return_correct=True)
        _, focal_correct = apc_kernels.upsample_cross_entropy(logits, target, focal=2.0, return_correct=True)
    assert torch.equal(correct, focal_correct)
    assert torch.equal(correct, (stock.upsample_argmax(logits, case.size) == target).sum())


# Denominators, and nothing to divide


@places_without_cuda
@pytest.mark.parametrize("reduction", ["mean", "mean_all"])
def test_half_batches_with_the_count_of_all(device, backend, reduction):
    """Data-parallel training: the losses and gradients of the parts add up to those of one process."""
    t = draw_upsample(UpsampleCase(4, 13, (9, 11), (29, 46)), device=device)
    t["target"][:3] = torch.where(t["target"][:3] < 9, 255, t["target"][:3])  # the parts differ in what counts
    weight = t["weight"]
    count = weight[t["target"][t["target"] != 255]].sum(dtype=torch.float64) if reduction == "mean" else 4 * 29 * 46
    settings = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
    logits = t["logits"].requires_grad_()
    with apc_kernels.backend(backend):
        whole = apc_kernels.upsample_cross_entropy(logits, t["target"], **settings)
        parts = [
            apc_kernels.upsample_cross_entropy(logits[part], t["target"][part], denominator=count, **settings)
            for part in (slice(0, 2), slice(2, 4))
        ]
        (grad,), (grad_of_parts,) = torch.autograd.grad(whole, logits), torch.autograd.grad(sum(parts), logits)
    assert parts[0] < 0.9 * parts[1]
    torch.testing.assert_close(sum(parts), whole, rtol=3e-7, atol=0)
    torch.testing.assert_close(grad_of_parts, grad, rtol=1e-6, atol=1e-9)


@places_without_cuda
def test_denominators(device, backend):
    t = draw_upsample(ODD, device=device)
    given = [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([[7.0]], dtype=torch.float64)]
    with apc_kernels.backend(backend):
        expected = apc_kernels.upsample_cross_entropy(t["logits"], t["target"], reduction="sum").double() / 7
        for denominator in given:
            if isinstance(denominator, torch.Tensor):
                denominator = denominator.to(device)
            for reduction in "mean", "mean_all":
                loss = apc_kernels.upsample_cross_entropy(
                    t["logits"], t["target"], reduction=reduction, denominator=denominator
                )
                torch.testing.assert_close(loss.double(), expected, rtol=2e-7, atol=0)


@places_without_cuda
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "mean_all", "sum", "none"])
def test_all_pixels_ignored(device, backend, reduction, weight, smoothing):
    """Tests for PyTorch's results: a mean of nothing is NaN, its gradient 0 nevertheless; everything else is 0."""
    t = draw_upsample(ODD, device=device)
    t["target"].fill_(255)
    given = {"reduction": reduction, "weight": weight, "label_smoothing": smoothing}
    with apc_kernels.backend(backend):
        loss, grad = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, **given)
    expected, expected_grad = loss_and_gradient(stock.upsample_cross_entropy, t, ODD, **given)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert not grad.any() and torch.equal(grad, expected_grad)
    torch.testing.assert_close(loss, expected, equal_nan=True, rtol=0, atol=0)


@places_without_cuda
def test_a_rank_without_pixels_adds_nothing(device, backend):
    t = draw_upsample(ODD, device=device)
    t["target"].fill_(255)
    with apc_kernels.backend(backend):
        loss, grad = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, denominator=100.0)
        nothing = apc_kernels.upsample_cross_entropy(t["logits"], t["target"], denominator=0)
    assert loss == 0 and not grad.any() and nothing.isnan()


@places_without_cuda
def test_no_images(device, backend):
    t = draw_upsample(UpsampleCase(0, 4, (3, 3), (6, 6)), device=device)
    logits = t["logits"].requires_grad_()
    with apc_kernels.backend(backend):
        loss, correct = apc_kernels.upsample_cross_entropy(logits, t["target"], reduction="sum", return_correct=True)
        (grad,) = torch.autograd.grad(loss, logits)
        losses = apc_kernels.upsample_cross_entropy(logits, t["target"], reduction="none")
        mean = apc_kernels.upsample_cross_entropy(logits, t["target"])
    assert loss == 0 and correct == 0 and mean.isnan()
    assert grad.shape == (0, 4, 3, 3) and losses.shape == (0, 6, 6)


# Labels out of range


def with_wrong_label(label, dtype=torch.int64, device="cpu"):
    t = draw_upsample(ODD, device=device)
    target = t["target"].where(t["target"] < 255, 7).to(dtype)
    target[1, 5, 40] = target[1, 28, 0] = label
    return t["logits"], target


WRONG = [
    (13, torch.uint8),
    (254, torch.uint8),
    (-1, torch.int16),
    (256 + 3, torch.int16),  # 3 in 8 bits
    (2**16 + 3, torch.int32),
    (2**32 + 3, torch.int64),
    (-(2**63), torch.int64),
    (2**63 - 1, torch.int64),
]
wrong_labels = pytest.mark.parametrize(("label", "dtype"), WRONG, ids=str)


@pytest.mark.parametrize("backend", CPU)
@wrong_labels
def test_a_label_out_of_range(backend, label, dtype):
    logits, target = with_wrong_label(label, dtype)
    message = (
        rf"target: expected labels of 0 to 12, or 255 for pixels to ignore; got {label} in 2 pixels, the first at "
        r"\(1, 5, 40\)$"
    )
    with apc_kernels.backend(backend):
        for given in {}, {"reduction": "none"}, {"label_smoothing": 1.0}:
            with pytest.raises(ValueError, match=message):
                apc_kernels.upsample_cross_entropy(logits, target, **given)
        with pytest.raises(ValueError, match=message):
            apc_kernels.upsample_confusion(logits, target)
        target[0, 0, 1] = 100
        with pytest.raises(ValueError, match=r"got 100 in 1 pixel, at \(0, 0, 1\); 2 more have other labels"):
            apc_kernels.upsample_confusion(logits, target)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(
    ("label", "dtype", "ignored"),
    [(156, torch.uint8, -100), (20, torch.uint8, 276), (20, torch.int32, 2**32 + 20), (-20, torch.int16, 2**16 - 20)],
)
def test_a_label_that_wraps_to_the_ignored_one(backend, label, dtype, ignored):
    """An ignored label that the target's dtype does not hold is no label at all."""
    logits, target = with_wrong_label(label, dtype)
    target[target == 255] = 0
    message = rf"or {ignored} for pixels to ignore; got {label} in 2 pixels, the first at \(1, 5, 40\)$"
    with apc_kernels.backend(backend):
        for function in apc_kernels.upsample_cross_entropy, apc_kernels.upsample_confusion:
            with pytest.raises(ValueError, match=message):
                function(logits, target, ignore_index=ignored)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
@wrong_labels
def test_a_label_out_of_range_on_a_gpu(backend, label, dtype):
    """NaN in the pixel and in the gradient of its sources, or an error where it was asked for."""
    logits, target = with_wrong_label(label, dtype, "cuda")
    logits.requires_grad_()
    with apc_kernels.backend(backend):
        losses = apc_kernels.upsample_cross_entropy(logits, target, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), logits)
        assert apc_kernels.upsample_cross_entropy(logits, target).isnan()
        with apc_kernels.checked_labels(), pytest.raises(ValueError, match=rf"got {label} in 2 pixels"):
            apc_kernels.upsample_cross_entropy(logits, target)
        with pytest.raises(ValueError, match=rf"got {label} in 2 pixels"):
            apc_kernels.upsample_confusion(logits, target)
    assert losses.isnan().nonzero().tolist() == [[1, 5, 40], [1, 28, 0]]
    assert grad[1, :, 1, 9].isnan().all() and grad[1, :, 8, 0].isnan().all()
    if backend != "reference":  # whose products bring a NaN to all of the image
        assert grad[0].isfinite().all() and grad[1, :, 4].isfinite().all()


# Gradients


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[4], OPTIONS[5], *OPTIONS[-3:]], ids=str)
@pytest.mark.parametrize(
    "case", [UpsampleCase(2, 3, (2, 3), (5, 4)), UpsampleCase(1, 3, (5, 2), (3, 4), True)], ids=str
)
def test_gradcheck(backend, case, options):
    t = draw_upsample(case, channels_last, torch.float64)
    given = options | {"align_corners": case.align_corners, "weight": t["weight"] if "weight" in options else None}

    def function(logits):
        return apc_kernels.upsample_cross_entropy(logits, t["target"], **given)

    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, t["logits"].requires_grad_())


@places_without_cuda
def test_differentiable_once(device, backend):
    t = draw_upsample(ODD, device=device)
    logits = t["logits"].requires_grad_()
    with apc_kernels.backend(backend):
        loss = apc_kernels.upsample_cross_entropy(logits, t["target"])
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(grad.square().sum(), logits)


@places_without_cuda
def test_a_broadcast_gradient(device, backend):
    t = draw_upsample(ODD, device=device)
    logits = t["logits"].requires_grad_()
    with apc_kernels.backend(backend):
        losses = apc_kernels.upsample_cross_entropy(logits, t["target"], reduction="none")
        (actual,) = torch.autograd.grad(losses.sum(), logits)  # the gradient has strides of 0
    _, expected = loss_and_gradient(stock.upsample_cross_entropy, t, ODD, reduction="sum")
    torch.testing.assert_close(actual, expected / 0.7)


@places_without_cuda
@layouts
def test_strides(device, backend, layout):
    t = draw_upsample(ODD, layout, device=device)
    with apc_kernels.backend(backend):
        losses, grad = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, reduction="none")
    assert losses.is_contiguous()
    assert grad.stride() == torch.empty_like(t["logits"]).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_no_copies(layout, dtype, forbid_copies):
    t = draw_upsample(ODD, layout, dtype)
    forbid_copies()
    with apc_kernels.backend("cpp"):
        for given in OPTIONS[1], OPTIONS[5]:
            loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, **given)
        apc_kernels.upsample_argmax(t["logits"], ODD.size)
        apc_kernels.upsample_confusion(t["logits"], t["target"])
        apc_kernels.upsample_softmax(t["logits"], ODD.size, out=apc_kernels.upsample_softmax(t["logits"], ODD.size))
