"""Tests the Triton kernels on upsampled logits, run on the CPU, against float64 and PyTorch.

By Triton's interpreter, which rounds bfloat16 wrongly and is spared it, and as compiled code (tests/ptx, slow).
"""

import pytest
import stock
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, same_bits
from cases import LAYOUTS, channels_last, nchw

import apc_kernels
from apc_kernels.ops.upsample import reference

pytest.importorskip("triton", reason="needs triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, of masked lanes
]

CASES = [  # shape of the logits, size
    ((1, 5, 3, 4), (24, 32)),
    ((1, 19, 3, 4), (7, 9)),
    ((1, 7, 5, 4), (5, 4)),
    ((2, 3, 9, 13), (4, 5)),
    ((1, 4, 1, 5), (1, 70)),
    ((1, 3, 6, 1), (33, 1)),
    ((1, 1, 3, 3), (8, 8)),
    ((1, 37, 2, 20), (5, 41)),  # several blocks of classes and of source columns
    ((1, 2, 1, 1), (70, 3)),  # several windows of rows, and no step from one position to the next
    ((1, 2, 19, 2), (23, 5)),  # several blocks of source rows
    ((1, 2, 5, 7), (1, 1)),
    ((1, 6, 2, 50), (5, 121)),  # the columns of one block of threads, which close to a ring
]
SMALL = CASES[1]
LABELS = [torch.uint8, torch.int16, torch.int32, torch.int64]
REDUCTIONS = ["mean", "mean_all", "sum", "none"]

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join("x".join(map(str, n)) for n in case))
corners = pytest.mark.parametrize("align_corners", [False, True], ids=["centers", "corners"])


@pytest.fixture(autouse=True)
def triton_serves(triton_machine):
    with apc_kernels.backend("triton"):
        yield


def draw(case, layout=nchw, dtype=torch.float32, labels=torch.int64):
    """Returns logits, labels of which a fifth is ignored, class weights, and a gradient for every pixel."""
    shape, size = case
    generator = torch.Generator().manual_seed(sum(shape) + sum(size))
    logits = layout(torch.randn(shape, generator=generator).mul(3).to(dtype))
    target = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[0, 0, 0] = 0  # some pixel counts
    return (
        logits,
        target.to(labels),
        torch.rand(shape[1], generator=generator) + 0.1,
        torch.randn(target.shape, generator=generator),
    )


def upsampled(logits, size, align_corners):
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=align_corners)


def stock_loss(logits, target, *, align_corners, reduction="mean", weight=None, focal=None, **options):
    """Computes the loss as mmsegmentation does: logits interpolated in their dtype, the loss in float32."""
    scores = upsampled(logits, target.shape[1:], align_corners)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    weight = None if weight is None else weight.to(scores.dtype)
    if focal:
        return stock.focal_loss(scores, target, weight, 255, focal, reduction)
    inner = "sum" if reduction == "mean_all" else reduction
    loss = F.cross_entropy(scores, target.long(), weight, ignore_index=255, reduction=inner, **options)
    return loss / target.numel() if reduction == "mean_all" else loss


def with_gradient(function, logits, target, grad, **options):
    logits = logits.detach().requires_grad_()
    loss = function(logits, target, **options)
    grad = grad.to(loss.dtype) if loss.dim() else None
    return loss.detach(), torch.autograd.grad(loss, logits, grad)[0]


def check_loss(case, tensors, **options):
    logits, target, _, grad = tensors
    actual = with_gradient(apc_kernels.upsample_cross_entropy, logits, target, grad, **options)
    exact = with_gradient(stock_loss, logits.double(), target, grad, **options)
    pytorch = with_gradient(stock_loss, logits, target, grad, **options)
    assert actual[1].stride() == torch.empty_like(logits).stride()
    for name, ours, true, own in zip(("loss", "gradient"), actual, exact, pytorch, strict=True):
        assert_accurate(ours, true, own, f"{case} {name}")


@corners
@cases
def test_loss(case, align_corners):
    check_loss(case, draw(case), align_corners=align_corners)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_with_weights_and_smoothing(reduction, smoothing):
    tensors = draw(SMALL)
    options = {"align_corners": False, "reduction": reduction, "label_smoothing": smoothing}
    check_loss(SMALL, tensors, **options, weight=tensors[2])
    check_loss(SMALL, tensors, **options)


@pytest.mark.parametrize("case", [case for case in CASES[:9] if case[0][1] > 1], ids=str)
@pytest.mark.parametrize(("gamma", "reduction"), [(2.0, "mean"), (0.5, "none")])
def test_focal_loss(case, gamma, reduction):
    tensors = draw(case)
    check_loss(case, tensors, align_corners=False, focal=gamma, reduction=reduction, weight=tensors[2])


def test_focal_loss_of_one_class():
    logits, target, _, grad = draw(((1, 1, 3, 3), (8, 8)))
    results = with_gradient(apc_kernels.upsample_cross_entropy, logits, target, grad, focal=0.5, reduction="none")
    assert all(bool((result == 0).all()) for result in results)


def test_correct_pixels_of_focal_loss():
    logits, target, *_ = draw(((1, 19, 4, 5), (12, 15)))
    target = torch.where(target % 2 == 0, apc_kernels.upsample_argmax(logits, (12, 15)).long(), target)
    logits[0, 7] = logits[0, 3]  # tied everywhere
    given = {"return_correct": True}
    _, expected = apc_kernels.upsample_cross_entropy(logits, target, **given)
    _, correct = apc_kernels.upsample_cross_entropy(logits, target, focal=2.0, **given)
    assert correct.equal(expected) and expected > 10


def test_correct_pixels_of_tied_classes():
    """Small integers are interpolated exactly: many pixels have several largest logits, of which the first counts."""
    logits = torch.randint(-1, 2, (1, 6, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    scores = upsampled(logits, (16, 20), False)
    first, last = scores.argmax(1), 5 - scores.flip(1).argmax(1)
    tied = first != last
    assert (first // 4 < last // 4)[tied].sum() > 10 and (first // 4 == last // 4)[tied].sum() > 10  # blocks of classes
    target = torch.where(torch.arange(20) % 3 == 0, last, first)
    for focal in None, 2.0:
        _, correct = apc_kernels.upsample_cross_entropy(logits, target, focal=focal, return_correct=True)
        assert correct == (first == target).sum()


@pytest.mark.parametrize("value", [-float("inf"), float("inf"), float("nan")])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_not_finite_spreads_as_in_interpolation(value, smoothing):
    logits, target, *_ = draw(((1, 5, 4, 5), (8, 10)))
    logits[0, 2, 0, 0] = logits[0, 3, 2, 3] = value
    options = {"reduction": "none", "label_smoothing": smoothing}
    losses, grad = with_gradient(apc_kernels.upsample_cross_entropy, logits, target, torch.ones(1, 8, 10), **options)
    expected = stock_loss(logits, target, align_corners=False, **options)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    assert bool(grad[..., 2:, 0].isfinite().all()) and bool(grad[..., 0, 2:].isfinite().all())
    assert value == -float("inf") or bool(grad[..., 2, 3].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_loss_of_every_layout(triton_machine, layout, dtype):
    if dtype == torch.bfloat16 and triton_machine == "interpreter":
        pytest.skip("needs compiled code: Triton's interpreter rounds bfloat16 wrongly")
    check_loss(SMALL, draw(SMALL, layout, dtype), align_corners=False)


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_labels_of_every_dtype(labels):
    logits, target, weight, grad = draw(SMALL, channels_last, labels=labels)
    check_loss(SMALL, (logits, target, weight, grad), align_corners=True)
    _, correct = apc_kernels.upsample_cross_entropy(logits, target, return_correct=True)
    prediction = upsampled(logits, SMALL[1], False).argmax(1)
    assert correct.item() == (prediction == target).sum().item()
    counts = apc_kernels.upsample_confusion(logits, target)
    assert counts.equal(reference.upsample_confusion(logits, target, 255, False)[0])
    assert counts.sum().item() == (target != 255).sum().item() and counts.trace() == correct


@corners
@cases
def test_argmax(case, align_corners):
    logits, *_ = draw(case)
    labels = apc_kernels.upsample_argmax(logits, case[1], align_corners=align_corners)
    assert labels.dtype == torch.uint8
    assert labels.long().equal(upsampled(logits.double(), case[1], align_corners).argmax(1))


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_argmax_of_equal_logits_is_the_first_class(layout):
    logits = layout(torch.zeros(1, 40, 2, 3))
    logits[:, [11, 30, 7, 39]] = 1.0
    assert bool((apc_kernels.upsample_argmax(logits, (6, 7)) == 7).all())
    assert bool((apc_kernels.upsample_argmax(logits - torch.inf, (2, 3)) == 0).all())


def test_argmax_of_many_classes():
    logits = torch.randn(1, 300, 1, 2, generator=torch.Generator().manual_seed(0))
    labels = apc_kernels.upsample_argmax(logits, (2, 5))
    assert labels.dtype == torch.int16
    assert labels.long().equal(upsampled(logits, (2, 5), False).argmax(1))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_softmax(case, layout, flip):
    logits, *_ = draw(case, layout)
    exact, own = (upsampled(x, case[1], False).softmax(1) for x in (logits.double(), logits))
    exact, own = (t.flip(3) if flip else t for t in (exact, own))
    assert_accurate(apc_kernels.upsample_softmax(logits, case[1], flip=flip), exact, own, f"{case}")
    for start in (nchw(exact.float()), channels_last(exact.float())):
        total = apc_kernels.upsample_softmax(logits, case[1], flip=flip, out=start.clone())
        assert_accurate(total, exact + start, own + start, f"{case} added")


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_large_logits_and_classes_that_are_left_out(layout):
    logits, target, _, grad = draw(SMALL, layout)
    check_loss(SMALL, (logits * 3e3, target, None, grad), align_corners=False, label_smoothing=0.1)
    check_loss(SMALL, (logits + 1e4, target, None, grad), align_corners=False)
    left_out = logits.clone()
    left_out[:, 3] = -float("inf")
    expected = upsampled(left_out, SMALL[1], False).softmax(1)
    assert bool(expected.isfinite().any())
    torch.testing.assert_close(apc_kernels.upsample_softmax(left_out, SMALL[1]), expected, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_pixel_ignored(reduction, smoothing):
    logits, target, _, grad = draw(SMALL)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    grad = torch.full_like(grad, float("inf"))
    target = torch.full_like(target, 255)
    loss, grad_logits = with_gradient(apc_kernels.upsample_cross_entropy, logits, target, grad, **options)
    assert bool(loss.isnan()) if reduction == "mean" else bool((loss == 0).all())
    assert bool((grad_logits == 0).all())


def test_ignored_pixels_contribute_nothing():
    """Whatever their gradient and, where no other pixel reads them, their logits."""
    logits, target, _, grad = draw(((1, 5, 4, 4), (32, 32)))
    target[:, :, 16:] = 255
    options = {"reduction": "none"}
    expected = with_gradient(apc_kernels.upsample_cross_entropy, logits, target, grad, **options)
    grad[target == 255] = float("nan")
    logits[:, :, :, 3] = float("nan")
    actual = with_gradient(apc_kernels.upsample_cross_entropy, logits, target, grad, **options)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("label", "smoothing", "focal"), [(-1, 0.0, 0.0), (19, 0.1, 0.0), (2**32 + 3, 0.0, 0.0), (2**32 + 3, 0.0, 2.0)]
)
def test_label_out_of_range(label, smoothing, focal):
    """Called below the public operation, which refuses it on a CPU: NaN in its pixel, and in what the pixel reads."""
    from apc_kernels.ops.upsample import triton as kernels

    logits, target, weight, grad = draw(((1, 19, 4, 5), (12, 15)))
    target[0, 8, 8] = 255
    wrong = target.clone()
    wrong[0, 8, 8] = label  # between source rows 2 and 3, columns 2 and 3
    results = []
    for labels in (target, wrong):
        saved, losses, sums = torch.empty(target.shape), torch.empty(target.shape), torch.empty(4, dtype=torch.float64)
        settings = (weight, 255, smoothing, focal, False)
        kernels.upsample_cross_entropy(logits, labels, *settings, True, saved, losses, sums)
        grad_logits = torch.empty_like(logits)
        kernels.upsample_cross_entropy_backward(grad, logits, labels, *settings, saved, grad_logits)
        results.append((saved, losses, sums, grad_logits))
    (saved, losses, sums, grads), (wrong_saved, wrong_losses, wrong_sums, wrong_grads) = results
    pixel = torch.zeros_like(target, dtype=torch.bool)
    pixel[0, 8, 8] = True
    assert bool(wrong_losses[pixel].isnan().all()) and same_bits(saved[~pixel], wrong_saved[~pixel])
    scores = upsampled(logits.double(), (12, 15), False)
    exact = (scores - scores.amax(1, keepdim=True)).exp()
    if focal:
        exact = exact.scatter(1, torch.where(target == 255, 0, target)[:, None], 0.0)
    counted = target != 255
    torch.testing.assert_close(saved.double()[counted], exact.sum(1)[counted], rtol=1e-6, atol=0)
    assert same_bits(wrong_losses[~pixel], losses[~pixel])
    assert bool(wrong_sums[0].isnan()) and wrong_sums[1:].tolist() == [*sums[1:3].tolist(), 1.0]
    matrix = reference.matrix(4, 12, False, grads)[8].outer(reference.matrix(5, 15, False, grads)[8])
    touched = (matrix != 0).expand(grads.shape)
    assert bool(wrong_grads[touched].isnan().all()) and same_bits(wrong_grads[~touched], grads[~touched])
    counts, invalid = torch.empty(19, 19, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    kernels.upsample_confusion(logits, wrong, 255, False, counts, invalid)
    assert invalid.item() == 1
    assert counts.equal(reference.upsample_confusion(logits, target, 255, False)[0])


@pytest.mark.parametrize("column", [0, 120])
def test_the_ends_of_a_row_do_not_meet(column):
    """A block of threads that holds all columns hands values from its last thread to its first."""
    from apc_kernels.ops.upsample import triton as kernels

    logits, target, _, grad = draw(((1, 3, 2, 50), (3, 121)), channels_last)
    target[0, 1, column] = 3
    saved, grads = torch.empty(target.shape), torch.empty_like(logits)
    settings = (None, 255, 0.0, 0.0, False)
    sums = torch.empty(4, dtype=torch.float64)
    kernels.upsample_cross_entropy(logits, target, *settings, False, saved, torch.empty(0), sums)
    kernels.upsample_cross_entropy_backward(grad, logits, target, *settings, saved, grads)
    edge = column // 120 * 49
    assert bool(grads[..., edge].isnan().all()) and grads.isnan().sum() == grads[..., edge].numel()


def test_ignored_class():
    """ignore_index may be a class: its pixels do not count, its logits do."""
    logits, target, *_ = draw(SMALL)
    target[target == 255] = 3
    loss = apc_kernels.upsample_cross_entropy(logits, target, ignore_index=3)
    expected = F.cross_entropy(upsampled(logits, SMALL[1], False), target, ignore_index=3)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_same_bits_every_time(dtype):
    logits, target, weight, grad = draw(SMALL, channels_last, dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            (
                *with_gradient(apc_kernels.upsample_cross_entropy, logits, target, grad, weight=weight),
                apc_kernels.upsample_softmax(logits, SMALL[1]),
            )
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
