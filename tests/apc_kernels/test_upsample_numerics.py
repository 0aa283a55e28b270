"""Tests the upsample_* operations at their extremes: values, sizes, threads, instruction sets; and at random sizes."""

import math

import instruction_sets
import pytest
import stock
import torch
from accuracy import assert_accurate, max_error, same_bits
from cases import channels_last, nchw, sliced
from hypothesis import given, settings
from hypothesis import strategies as st
from places import CPU, dtypes, places_without_cuda
from upsample_cases import EXTREMES, UpsampleCase, assert_labels, draw_upsample, loss_and_gradient

import apc_kernels

ODD = UpsampleCase(2, 13, (9, 11), (29, 46))
TWICE = UpsampleCase(2, 5, (8, 9), (16, 18))
kernels = pytest.mark.parametrize(  # everywhere but in the reference, which takes seconds and gigabytes
    ("device", "backend"), [("cpu", "cpp"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]
)


def everything(tensors, case, **options):
    """Returns the results of all four operations, and the gradient."""
    loss, grad = loss_and_gradient(apc_kernels.upsample_cross_entropy, tensors, case, **options)
    corners = {"align_corners": case.align_corners}
    logits, target = tensors["logits"].detach(), tensors["target"]
    counts = apc_kernels.upsample_confusion(logits, target, **corners)
    labels = apc_kernels.upsample_argmax(logits, case.size, **corners)
    return loss, grad, apc_kernels.upsample_softmax(logits, case.size, **corners), counts, labels


def same(a, b):
    return same_bits(a, b) if a.is_floating_point() else torch.equal(a, b)


def assert_everything(results, tensors, case, name="", **options):
    """Checks results by the accuracy rule.

    Losses and probabilities are float32: they are held to those of widened logits.
    """
    tensors = {key: t.cpu() for key, t in tensors.items()}
    exact_tensors = {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
    wide = tensors if tensors["grad"].dtype == torch.float64 else tensors | {"logits": tensors["logits"].float()}
    exact = loss_and_gradient(stock.upsample_cross_entropy, exact_tensors, case, **options)
    pytorch = loss_and_gradient(stock.upsample_cross_entropy, tensors, case, **options)
    widened = loss_and_gradient(stock.upsample_cross_entropy, wide, case, **options)
    loss, grad, probabilities, counts, labels = (result.cpu() for result in results)
    assert_accurate(loss, exact[0], widened[0], f"{name} loss")
    assert_accurate(grad, exact[1], pytorch[1], f"{name} gradient")
    exact, widened = (
        stock.upsample_softmax(t["logits"], case.size, align_corners=case.align_corners) for t in (exact_tensors, wide)
    )
    assert_accurate(probabilities, exact, widened, f"{name} probabilities")
    assert torch.equal(counts, stock.confusion(labels, tensors["target"], case.classes))
    assert_labels(labels, tensors["logits"], case)


# Extreme logits


@places_without_cuda
@pytest.mark.parametrize("case", [ODD, TWICE], ids=str)
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_logits(device, backend, kind, case):
    t = draw_upsample(case, device=device)
    t["logits"] = EXTREMES[kind](t["logits"])
    for options in {"reduction": "none", "weight": True, "label_smoothing": 0.1}, {}, {"focal": 2.0}:
        with apc_kernels.backend(backend):
            results = everything(t, case, **options)
        if kind == "all the same":  # nothing but rounding says which label is the largest
            assert not results[4].any() or backend == "reference"
        assert_everything(results, t, case, f"{kind} {options}", **options)


@places_without_cuda
@dtypes
@pytest.mark.parametrize("margin", [20, 60])
def test_a_confident_map(device, backend, dtype, margin):
    """Every pixel's probability is within 1e-7 of 1: the gradient is what is left of it, and not noise."""
    t = draw_upsample(TWICE, dtype=dtype, device=device)
    for image in range(TWICE.batch):
        t["logits"][image, 3 + image] = t["logits"][image].amax(0) + margin
        t["target"][image] = torch.where(t["target"][image] == 255, 255, 3 + image)
    for options in {"reduction": "none"}, {"reduction": "sum"}:
        with apc_kernels.backend(backend):
            results = everything(t, TWICE, **options)
        assert (1 - results[2].amax(1)).max() < 1e-7
        assert_everything(results, t, TWICE, f"{margin} {options}", **options)


def focal_of(logits, target, gamma):
    """Computes the focal loss and its gradient by the formula, in float64, from 1 − p that is not rounded."""
    scores = stock.upsampled(logits.double(), target.shape[1:]).detach()
    own = torch.zeros_like(scores).scatter(1, target.long()[:, None], 1.0).bool()
    shares = (scores - scores.amax(1, keepdim=True)).exp()
    rest = shares.masked_fill(own, 0).sum(1) / shares.sum(1)
    losses = -torch.log1p(-rest) * rest**gamma
    return losses, rest**gamma * (1 + gamma * (1 - rest) * -torch.log1p(-rest) / rest) * rest


@places_without_cuda
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("margin", [5, 20, 40])
def test_focal_loss_of_a_confident_map(device, backend, gamma, margin):
    """Tests that loss and gradient are accurate relative to their own size, however close p is to 1.

    The composition's gradient would be NaN for γ < 1, and noise for others.
    """
    logits = torch.randn(1, 5, 6, 7, generator=torch.Generator().manual_seed(0)).to(device)
    logits[:, 3] += margin
    target = torch.full((1, 6, 7), 3, device=device)
    logits.requires_grad_()
    with apc_kernels.backend(backend):
        losses = apc_kernels.upsample_cross_entropy(logits, target, focal=gamma, reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = focal_of(logits, target, gamma)
    reached = exact > 1e-37  # float32 holds no smaller ones
    torch.testing.assert_close(losses[reached].double(), exact[reached], rtol=3e-5, atol=0)
    torch.testing.assert_close(grad[:, 3][reached].double(), -exact_grad[reached], rtol=3e-5, atol=0)


@places_without_cuda
@pytest.mark.parametrize("gamma", [1e-3, 0.5, 2.0, 1e6])
def test_focal_loss_of_a_certain_map(device, backend, gamma):
    """Tests that loss and gradient are 0 where p is 1, and the cross entropy's where it is 0."""
    logits = torch.zeros(1, 3, 4, 5, device=device)
    logits[:, 1] = 500.0
    target = torch.ones(1, 8, 10, dtype=torch.int64, device=device)
    logits.requires_grad_()
    with apc_kernels.backend(backend):
        for label, loss, grad in (1, 0.0, [0.0, 0.0, 0.0]), (2, 500.0, [0.0, 1.0, -1.0]):
            losses = apc_kernels.upsample_cross_entropy(logits, target.fill_(label), focal=gamma, reduction="none")
            (ours,) = torch.autograd.grad(losses.sum(), logits)
            assert (losses == loss).all()
            torch.testing.assert_close(ours.sum((0, 2, 3)).cpu(), 80 * torch.tensor(grad))


@places_without_cuda
def test_without_focal_nothing_changes(device, backend):
    t = draw_upsample(ODD, device=device)
    with apc_kernels.backend(backend):
        plain = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, weight=True)
        for focal in 0, 0.0, None:
            results = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, ODD, weight=True, focal=focal)
            assert all(same_bits(a, b) for a, b in zip(results, plain, strict=True))


@places_without_cuda
def test_a_class_that_is_switched_off(device, backend):
    """Logits of -inf have no probability and no gradient. At the first row and column PyTorch multiplies 0 by them."""
    t = draw_upsample(TWICE, device=device)
    t["logits"][:, 2] = float("-inf")
    t["target"][t["target"] == 2] = 255
    t["target"][:, 0] = t["target"][:, :, 0] = 255
    with apc_kernels.backend(backend):
        losses = apc_kernels.upsample_cross_entropy(t["logits"], t["target"], reduction="none")
        probabilities = apc_kernels.upsample_softmax(t["logits"], TWICE.size)[..., 1:, 1:]
    others = t["logits"][:, [0, 1, 3, 4]]
    target = torch.where((t["target"] > 2) & (t["target"] < 255), t["target"] - 1, t["target"])
    torch.testing.assert_close(losses, stock.upsample_cross_entropy(others, target, reduction="none"))
    expected = stock.upsample_softmax(others, TWICE.size)[..., 1:, 1:]
    torch.testing.assert_close(probabilities[:, [0, 1, 3, 4]], expected)
    assert not probabilities[:, 2].any()


@places_without_cuda
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_among_its_pixels(device, backend, value):
    t = draw_upsample(TWICE, device=device)
    t["logits"][1, 2, 4, 5] = value
    with apc_kernels.backend(backend):
        losses, grad, probabilities, *_ = everything(t, TWICE, reduction="none")
        total = apc_kernels.upsample_cross_entropy(t["logits"], t["target"])
    touched = torch.zeros(TWICE.batch, *TWICE.size, dtype=torch.bool, device=device)
    touched[1, 7:11, 9:13] = True
    counted = t["target"] != 255
    assert torch.equal(losses.isnan(), touched & counted) and total.isnan()
    assert torch.equal(probabilities.isnan().any(1), touched)
    assert grad[1, :, 4, 5].isnan().all() and grad[0].isfinite().all()
    if backend != "reference":  # whose products bring a NaN to all of the image
        assert grad[1, :, :3].isfinite().all() and grad[1, :, :, 7:].isfinite().all()


@places_without_cuda
def test_ignored_pixels_count_nowhere(device, backend):
    """Ignored pixels do not count, even if their logits are NaN."""
    t = draw_upsample(TWICE, device=device)
    t["logits"][1], t["target"][1] = float("nan"), 255
    smooth = {"reduction": "sum", "label_smoothing": 0.1}
    for options in {"weight": True}, smooth, {"reduction": "none"}, {"reduction": "sum", "focal": 2.0}:
        with apc_kernels.backend(backend):
            loss, grad = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, TWICE, **options)
        half = {name: tensor[:1] if tensor.dim() > 1 else tensor for name, tensor in t.items()}
        expected, expected_grad = loss_and_gradient(stock.upsample_cross_entropy, half, TWICE, **options)
        torch.testing.assert_close(loss[:1] if loss.dim() else loss, expected)
        torch.testing.assert_close(grad[:1], expected_grad)
        assert not grad[1].any() and (not loss.dim() or not loss[1].any())


# The same bits


@places_without_cuda
@dtypes
def test_same_bits_every_time(device, backend, dtype):
    case = UpsampleCase(2, 33, (17, 20), (66, 75))
    t = draw_upsample(case, channels_last, dtype, device)
    torch.use_deterministic_algorithms(True)
    try:
        with apc_kernels.backend(backend):
            first, *others = [everything(t, case, weight=True, label_smoothing=0.1) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize(
    "case", [UpsampleCase(3, 19, (33, 29), (130, 117)), UpsampleCase(1, 7, (61, 40), (23, 90), True)], ids=str
)
def test_same_bits_with_any_number_of_threads(threads, layout, case):
    t, results = draw_upsample(case, layout), []
    for count in (1, 2, 3, 5):
        threads(count)
        with apc_kernels.backend("cpp"):
            each = everything(t, case, reduction="none", weight=True)
            results.append((*everything(t, case), *each, *everything(t, case, focal=2.0)))
    assert all(same(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@instruction_sets.others
def test_every_instruction_set(isa, tmp_path):
    """Tests each set that the processor has, in its own process: the set is chosen once."""
    file = tmp_path / "results.pt"
    program = f"""
import torch, apc_kernels
import {__name__.rpartition(".")[2]} as tests
with apc_kernels.backend("cpp"):
    torch.save([tests.everything(t, case, **options) for case, t, options in tests.instructed()], {str(file)!r})
"""
    instruction_sets.run(isa, program)
    for (case, t, options), results in zip(instructed(), torch.load(file), strict=True):
        assert_everything(results, t, case, f"{isa} {case} {t['logits'].dtype}", **options)


INSTRUCTED = [
    {"reduction": "none", "weight": True, "label_smoothing": 0.1},
    {"reduction": "none", "weight": True, "focal": 2.0},
]


def instructed():
    for case in ODD, UpsampleCase(1, 21, (23, 19), (8, 13), True):
        for dtype in torch.float32, torch.bfloat16, torch.float16:
            for layout in nchw, channels_last, sliced:
                for options in INSTRUCTED:
                    yield case, draw_upsample(case, layout, dtype), options


# Any size


@settings(max_examples=80, deadline=None)
@given(
    source=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    classes=st.integers(1, 20),
    align_corners=st.booleans(),
    by_channel=st.booleans(),
    reduction=st.sampled_from(["mean", "mean_all", "sum", "none"]),
    other=st.sampled_from([{}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"focal": 1.5}, {"focal": 2.0}]),
    weight=st.booleans(),
)
def test_any_size(source, size, classes, align_corners, by_channel, reduction, other, weight):
    """In float64 the reference and C++ agree with PyTorch to all digits, whatever the ratio."""
    case = UpsampleCase(1, classes, source, size, align_corners)
    t = draw_upsample(case, channels_last if by_channel else nchw, torch.float64)
    options = {"reduction": reduction, "weight": weight, **other}
    expected = loss_and_gradient(stock.upsample_cross_entropy, t, case, **options)
    probabilities = stock.upsample_softmax(t["logits"], size, align_corners=align_corners)
    for backend in CPU:
        with apc_kernels.backend(backend):
            loss, grad, ours, counts, labels = everything(t, case, **options)
        for actual, wanted in zip((loss, grad, ours), (*expected, probabilities), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)
        assert torch.equal(counts, stock.confusion(labels, t["target"], classes))
        chosen = probabilities.gather(1, labels.long()[:, None])[:, 0]
        torch.testing.assert_close(chosen, probabilities.amax(1), rtol=1e-11, atol=0)


# Large and far apart


@kernels
def test_sixteen_million_pixels_and_more(device, backend):
    """Counts and sums stay exact that float32 would not hold."""
    pixels = 4099 * 4100
    logits = torch.zeros(1, 2, 1, 1, device=device)
    target = torch.zeros(1, 4099, 4100, dtype=torch.uint8, device=device)
    target[0, -1, -1] = 1
    with apc_kernels.backend(backend):
        assert apc_kernels.upsample_confusion(logits, target).tolist() == [[pixels - 1, 0], [1, 0]]
        loss, correct = apc_kernels.upsample_cross_entropy(
            logits.requires_grad_(), target, reduction="sum", return_correct=True
        )
        (grad,) = torch.autograd.grad(loss, logits)
        mean = apc_kernels.upsample_cross_entropy(logits, target)
    assert correct == pixels - 1 > 2**24
    assert loss.item() == pytest.approx(pixels * math.log(2), rel=1e-6)
    assert mean.item() == pytest.approx(math.log(2), rel=1e-6)
    assert grad.flatten().tolist() == pytest.approx([1 - pixels / 2, pixels / 2 - 1], rel=1e-6)


@kernels
def test_more_scores_than_an_int_counts(device, backend):
    """Tests 2.2e9 upsampled logits, and more classes than an int16 holds.

    All rows of a map with one source row are the same, but for how the weights of that row and itself round.
    """
    case = UpsampleCase(1, 32800, (1, 2), (256, 257))
    row = UpsampleCase(1, 32800, (1, 2), (1, 257))
    t = draw_upsample(row, device=device, labels=torch.int32)
    tall = t | {name: t[name].expand(1, *case.size).contiguous() for name in ("target", "grad")}
    with apc_kernels.backend(backend):
        labels = apc_kernels.upsample_argmax(t["logits"], case.size)
        losses, grad = loss_and_gradient(apc_kernels.upsample_cross_entropy, tall, case, reduction="none")
    assert labels.dtype == torch.int32 and (labels == labels[:, :1]).all()
    assert_labels(labels[:, :1], t["logits"], row)
    cpu = {name: tensor.cpu() for name, tensor in t.items()}
    expected = loss_and_gradient(stock.upsample_cross_entropy, cpu, row, reduction="none")
    torch.testing.assert_close(losses.cpu(), expected[0].expand(1, *case.size), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.cpu(), 256 * expected[1], rtol=1e-4, atol=1e-4)


@kernels
def test_logits_gigabytes_apart(device, backend):
    """Offsets pass 2^31 elements: memory that is never touched but for a few pages."""
    t = draw_upsample(UpsampleCase(2, 34, (4, 4), (9, 9)), dtype=torch.float16, device=device)
    case, near = UpsampleCase(2, 34, (4, 4), (9, 9)), t["logits"]
    for stride in (16, 2**26, 4, 1), (2**31, 1, 4 * 34, 34):  # classes, and images
        memory = torch.empty(sum(s * (n - 1) for s, n in zip(stride, near.shape, strict=True)) + 1, dtype=torch.float16)
        far = memory.to(device).as_strided(near.shape, stride).copy_(near) if stride[0] != 16 else None
        if far is None:
            far = memory.to(device).as_strided((1, 34, 4, 4), stride).copy_(near[:1])
        part = {name: tensor[: far.shape[0]] if tensor.dim() > 1 else tensor for name, tensor in t.items()}
        with apc_kernels.backend(backend):
            expected, results = everything(part, case), everything(part | {"logits": far}, case)
        torch.testing.assert_close(results, expected)


@pytest.mark.gpu
def test_more_pixels_than_an_int_counts():
    logits = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]], device="cuda")
    with apc_kernels.backend("triton"):
        labels = apc_kernels.upsample_argmax(logits, (46342, 46342))
    assert labels.numel() > 2**31
    assert bool((labels[..., : 46342 // 2] == 1).all()) and not bool(labels[..., 46342 // 2 :].any())


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("seed", range(8))
def test_what_all_logits_have_in_common_is_not_what_they_are_rounded_by(offset, seed):
    """Far better than PyTorch: the kernels on the CPU interpolate logits relative to each source pixel's largest."""
    t = draw_upsample(UpsampleCase(1, 6, (9, 9), (37, 41)))
    t["logits"] = torch.randn(t["logits"].shape, generator=torch.Generator().manual_seed(seed)) + offset
    exact = t | {"logits": t["logits"].double()}
    case = UpsampleCase(1, 6, (9, 9), (37, 41))
    with apc_kernels.backend("cpp"):
        _, ours = loss_and_gradient(apc_kernels.upsample_cross_entropy, t, case)
    _, pytorch = loss_and_gradient(stock.upsample_cross_entropy, t, case)
    _, true = loss_and_gradient(stock.upsample_cross_entropy, exact, case)
    assert max_error(ours, true) < max_error(pytorch, true) / 20
