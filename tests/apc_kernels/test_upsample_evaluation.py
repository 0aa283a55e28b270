"""Tests upsample_argmax, upsample_confusion and upsample_softmax against float64 and PyTorch's own compositions."""

import pytest
import stock
import torch
from accuracy import assert_accurate, same_bits
from cases import channels_last, nchw, sliced, sliced_channels_last, transposed
from places import CPU, dtypes, layouts, places_without_cuda
from upsample_cases import UPSAMPLES, UpsampleCase, assert_labels, draw_upsample, tied_logits

import apc_kernels

ODD = UpsampleCase(2, 13, (9, 11), (29, 46))
DOWN = UpsampleCase(2, 21, (23, 19), (8, 13), True)
TIED = [
    UpsampleCase(2, 5, (8, 9), (32, 36)),
    UpsampleCase(2, 19, (5, 9), (9, 17), True),
    UpsampleCase(1, 40, (6, 7), (6, 7)),
    UpsampleCase(1, 6, (12, 16), (3, 4)),  # every result the mean of four logits
    UpsampleCase(1, 300, (4, 4), (16, 16)),
]


# Labels


@places_without_cuda
@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_argmax_of_hard_cases(device, backend, case):
    logits = draw_upsample(case, device=device)["logits"]
    with apc_kernels.backend(backend):
        labels = apc_kernels.upsample_argmax(logits, case.size, align_corners=case.align_corners)
    assert labels.shape == (case.batch, *case.size) and labels.is_contiguous()
    assert labels.dtype == (torch.uint8 if case.classes <= 256 else torch.int16)
    assert_labels(labels, logits, case)


@places_without_cuda
@layouts
@dtypes
@pytest.mark.parametrize("case", [ODD, DOWN], ids=str)
def test_argmax_of_layouts_and_dtypes(device, backend, layout, dtype, case):
    logits = draw_upsample(case, layout, dtype, device)["logits"]
    with apc_kernels.backend(backend):
        labels = apc_kernels.upsample_argmax(logits, case.size, align_corners=case.align_corners)
    assert_labels(labels, logits, case)  # in float32: scores of the logits' own dtype would miss it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_the_reference_is_the_argmax_of_pytorch(case, dtype):
    logits = draw_upsample(case, dtype=dtype)["logits"]
    with apc_kernels.backend("reference"):
        labels = apc_kernels.upsample_argmax(logits, case.size, align_corners=case.align_corners)
    wide = logits if dtype == torch.float64 else logits.float()
    assert torch.equal(labels.long(), stock.upsample_argmax(wide, case.size, align_corners=case.align_corners))


@places_without_cuda
@pytest.mark.parametrize("layout", [nchw, channels_last, sliced], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", TIED, ids=str)
def test_of_tied_classes_the_first(device, backend, layout, case):
    """Interpolation is exact here, so every label is known: also that a flat image's is 0."""
    logits = tied_logits(case, layout, device)
    logits[0, :, : case.source[0] // 2] = 1.0
    expected = stock.upsample_argmax(logits.cpu().double(), case.size, align_corners=case.align_corners)
    scores = stock.upsampled(logits.cpu().double(), case.size, case.align_corners)
    assert (scores == scores.amax(1, keepdim=True)).sum(1).gt(1).double().mean() > 0.3
    with apc_kernels.backend(backend):
        labels = apc_kernels.upsample_argmax(logits, case.size, align_corners=case.align_corners)
    assert torch.equal(labels.cpu().long(), expected)


@places_without_cuda
@pytest.mark.parametrize(
    ("classes", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16), (2**15 + 1, torch.int32)]
)
def test_labels_are_as_narrow_as_the_classes_allow(device, backend, classes, dtype):
    """The largest label comes out as itself, in every pixel of one source."""
    logits = torch.zeros(1, classes, 1, 2, device=device)
    logits[0, classes - 1, 0, 1] = 1.0
    with apc_kernels.backend(backend):
        labels = apc_kernels.upsample_argmax(logits, (2, 8))
    assert labels.dtype == dtype
    assert labels.tolist() == [[[0, 0] + [classes - 1] * 6] * 2]


@places_without_cuda
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_labels_of_logits_that_are_not_finite(device, backend, value):
    """No label leaves the range, whatever the logits, and pixels that read only finite ones have their label."""
    logits = draw_upsample(ODD, device=device)["logits"]
    logits[0] = value
    finite = logits.clone()
    logits[1, 0, 4, 5] = float("nan")
    with apc_kernels.backend(backend):
        labels, expected = (apc_kernels.upsample_argmax(given, (36, 44)) for given in (logits, finite))
    assert labels.max() <= 12
    labels[1, 14:22, 18:26] = expected[1, 14:22, 18:26]  # the pixels that read it
    assert torch.equal(labels[1], expected[1])


BLOBS = [
    UpsampleCase(2, 19, (40, 48), (320, 384)),
    UpsampleCase(1, 150, (33, 41), (129, 161), True),
    UpsampleCase(1, 21, (64, 64), (128, 128)),
    UpsampleCase(2, 33, (20, 30), (31, 77)),
    UpsampleCase(1, 300, (9, 70), (72, 70)),
]


def draw_blobs(case: UpsampleCase, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """Draws logits as a trained model's: one class is ahead in patches, some classes equal it up to a rounding."""
    generator = torch.Generator().manual_seed(case.classes)
    logits = torch.randn(case.batch, case.classes, *case.source, generator=generator, dtype=torch.float64)
    patches = [n // 6 + 1 for n in case.source]
    winner = torch.randint(case.classes, (case.batch, 1, *patches), generator=generator)
    winner = winner.repeat_interleave(6, 2).repeat_interleave(6, 3)[..., : case.source[0], : case.source[1]]
    logits.scatter_add_(1, winner, torch.full_like(winner, 6, dtype=torch.float64))
    logits[:, 0, ::4, ::4] = logits[:, :, ::4, ::4].amax(1) * (1 - 2**-24)
    logits[:, -1] = logits[:, 1]
    logits[:, 2, ::7, ::5] = -1e4  # as masked
    return (logits * scale).to(dtype)


@dtypes
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", BLOBS, ids=str)
def test_classes_that_are_excluded_would_not_have_won(layout, dtype, case):
    """The C++ kernel interpolates all classes where a logit is not finite: one more class makes it do so."""
    scales = (1.0, 2.0**-130, 2.0**110) if dtype in (torch.float32, torch.float64) else (1.0,)
    for scale in scales:
        logits = layout(draw_blobs(case, dtype, scale))
        absent = torch.full_like(logits[:, :1], float("-inf"))
        given = {"size": case.size, "align_corners": case.align_corners}
        with apc_kernels.backend("cpp"):
            labels = apc_kernels.upsample_argmax(logits, **given)
            expected = apc_kernels.upsample_argmax(torch.cat([logits, absent], 1), **given)
        assert len(labels.unique()) > 5
        assert torch.equal(labels, expected)


# Confusion


@places_without_cuda
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [ODD, DOWN, *(case for case in UPSAMPLES if case.classes > 20)], ids=str)
def test_confusion(device, backend, labels, case):
    """Every pixel is counted, in its own cell, by the label that upsample_argmax gives it."""
    if labels == torch.uint8 and case.classes > 256:
        labels = torch.int16
    t = draw_upsample(case, channels_last, device=device, labels=labels)
    with apc_kernels.backend(backend):
        prediction = apc_kernels.upsample_argmax(t["logits"], case.size, align_corners=case.align_corners)
        for ignored in (255, 2):
            t["target"][t["target"] == 255] = ignored
            counts = apc_kernels.upsample_confusion(
                t["logits"], t["target"], ignore_index=ignored, align_corners=case.align_corners
            )
            assert counts.dtype == torch.int64
            assert torch.equal(counts, stock.confusion(prediction, t["target"], case.classes, ignored))
            assert counts.sum() == (t["target"] != ignored).sum() > 0


@places_without_cuda
@pytest.mark.parametrize("case", TIED, ids=str)
def test_confusion_of_tied_classes(device, backend, case):
    logits, target = tied_logits(case, device=device), draw_upsample(case, device=device)["target"]
    with apc_kernels.backend(backend):
        counts = apc_kernels.upsample_confusion(logits, target, align_corners=case.align_corners)
    expected = stock.upsample_confusion(logits.cpu().double(), target.cpu(), align_corners=case.align_corners)
    assert torch.equal(counts.cpu(), expected)


@places_without_cuda
@dtypes
@layouts
def test_confusion_of_layouts_and_dtypes(device, backend, layout, dtype):
    t = draw_upsample(ODD, layout, dtype, device)
    with apc_kernels.backend(backend):
        prediction = apc_kernels.upsample_argmax(t["logits"], ODD.size)
        assert torch.equal(
            apc_kernels.upsample_confusion(t["logits"], t["target"]), stock.confusion(prediction, t["target"], 13)
        )


@places_without_cuda
def test_confusion_of_nothing(device, backend):
    t = draw_upsample(ODD, device=device)
    with apc_kernels.backend(backend):
        assert not apc_kernels.upsample_confusion(t["logits"], torch.full_like(t["target"], 255)).any()
        counts = apc_kernels.upsample_confusion(t["logits"][:0], t["target"][:0])
    assert counts.shape == (13, 13) and not counts.any()


@places_without_cuda
def test_targets_that_are_not_contiguous(device, backend):
    t = draw_upsample(ODD, device=device)
    wide = torch.stack([t["target"], t["target"] + 1000], 3)[..., 0]
    assert not wide.is_contiguous()
    with apc_kernels.backend(backend):
        assert torch.equal(
            apc_kernels.upsample_confusion(t["logits"], wide), apc_kernels.upsample_confusion(t["logits"], t["target"])
        )
        for given in {}, {"reduction": "none"}:
            loss, expected = (
                apc_kernels.upsample_cross_entropy(t["logits"], target, **given) for target in (wide, t["target"])
            )
            assert same_bits(loss, expected)


# Probabilities


def assert_probabilities(result, logits, case, flip=False, before=None):
    """Checks probabilities, which are float32 for all logits and so held to PyTorch's on widened ones."""
    given = {"size": case.size, "flip": flip, "align_corners": case.align_corners}
    exact = stock.upsample_softmax(logits.cpu().double(), **given)
    pytorch = stock.upsample_softmax(logits.cpu().float(), **given)
    if before is not None:
        exact, pytorch = before.cpu().double() + exact, before.cpu() + pytorch
    assert_accurate(result.cpu(), exact, pytorch, f"{case} flip={flip}")


@places_without_cuda
@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_softmax_of_hard_cases(device, backend, case, flip):
    logits = draw_upsample(case, device=device)["logits"]
    given = {"flip": flip, "align_corners": case.align_corners}
    before = torch.randn(case.batch, case.classes, *case.size, device=device)
    out = before.clone()
    with apc_kernels.backend(backend):
        result = apc_kernels.upsample_softmax(logits, case.size, **given)
        assert apc_kernels.upsample_softmax(logits, case.size, out=out, **given) is out
    assert_probabilities(result, logits, case, flip)
    assert_probabilities(out, logits, case, flip, before)


@places_without_cuda
@layouts
@dtypes
@pytest.mark.parametrize("case", [ODD, DOWN], ids=str)
def test_softmax_of_layouts_and_dtypes(device, backend, layout, dtype, case):
    logits = draw_upsample(case, layout, dtype, device)["logits"]
    with apc_kernels.backend(backend):
        result = apc_kernels.upsample_softmax(logits, case.size, flip=True, align_corners=case.align_corners)
    assert_probabilities(result, logits, case, True)
    last = layout in (channels_last, sliced_channels_last)
    assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@places_without_cuda
def test_a_buffer_that_holds_the_logits(device, backend):
    """The logits are read as they were before the first result is written."""
    logits = draw_upsample(ODD, device=device)["logits"]
    out = torch.zeros(2, 13, *ODD.size, device=device)
    inside = out[:, :, : ODD.source[0], : ODD.source[1]].copy_(logits)
    before = out.clone()
    with apc_kernels.backend(backend):
        apc_kernels.upsample_softmax(inside, ODD.size, out=out)
    assert_probabilities(out, logits, ODD, False, before)


@places_without_cuda
@layouts
@pytest.mark.parametrize("buffer", [nchw, channels_last, sliced, transposed], ids=lambda layout: layout.__name__)
def test_buffers_of_any_layout(device, backend, layout, buffer):
    """Added to in place, and nothing beside them written."""
    logits = draw_upsample(ODD, layout, device=device)["logits"]
    before = torch.rand(2, 13, *ODD.size, device=device)
    out = buffer(before.clone())
    given = {"out": out, "flip": True}
    with apc_kernels.backend(backend):
        assert apc_kernels.upsample_softmax(logits, ODD.size, **given) is out
    assert_probabilities(out, logits, ODD, True, before)
    if buffer is sliced:
        everything = torch.empty(0, device=device).set_(out.untyped_storage())
        assert everything.isfinite().sum() == out.numel()  # around the window lies NaN


@places_without_cuda
def test_softmax_of_many_scales_and_flips(device, backend):
    """Multi-scale and flip testing: the flipped image's logits, mirrored back, add up with the others."""
    sizes, out, exact = [(9, 11), (13, 17), (5, 6)], torch.zeros(2, 13, 29, 46, device=device), 0
    with apc_kernels.backend(backend):
        for source in sizes:
            logits = draw_upsample(UpsampleCase(2, 13, source, (29, 46)), device=device)["logits"]
            apc_kernels.upsample_softmax(logits, (29, 46), out=out)
            apc_kernels.upsample_softmax(logits.flip(3), (29, 46), flip=True, out=out)
            exact = exact + 2 * stock.upsample_softmax(logits.double(), (29, 46))
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.sum(1), torch.full_like(out[:, 0], 6.0), rtol=0, atol=1e-5)


@places_without_cuda
def test_softmax_of_no_images(device, backend):
    logits = torch.zeros(0, 13, 9, 11, device=device)
    out = torch.zeros(0, 13, 29, 46, device=device)
    with apc_kernels.backend(backend):
        assert apc_kernels.upsample_softmax(logits, (29, 46)).shape == out.shape
        assert apc_kernels.upsample_softmax(logits, (29, 46), out=out) is out
        assert apc_kernels.upsample_argmax(logits, (29, 46)).shape == (0, 29, 46)


@pytest.mark.parametrize("backend", CPU)
def test_softmax_is_for_inference_only(backend):
    logits, out = torch.randn(1, 3, 4, 5), torch.zeros(1, 3, 8, 10)
    message = "logits, out: expected tensors without gradient: upsample_softmax is for inference only"
    with apc_kernels.backend(backend):
        with pytest.raises(ValueError, match=message):
            apc_kernels.upsample_softmax(logits.clone().requires_grad_(), (8, 10))
        with pytest.raises(ValueError, match=message):
            apc_kernels.upsample_softmax(logits, (8, 10), out=out.clone().requires_grad_())
        assert not out.any()
        with torch.no_grad():
            result = apc_kernels.upsample_softmax(logits.requires_grad_(), (8, 10), out=out)
        assert not result.requires_grad and out.any()


@pytest.mark.parametrize("backend", CPU)
def test_the_buffer_knows_that_it_was_written(backend):
    """Autograd sees a mutation: what saved the buffer for backward raises instead of using other values."""
    factor, out = torch.ones(1, 3, 8, 10, requires_grad=True), torch.ones(1, 3, 8, 10)
    product = (factor * out).sum()
    with apc_kernels.backend(backend):
        apc_kernels.upsample_softmax(torch.randn(1, 3, 4, 5), (8, 10), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@places_without_cuda
def test_labels_have_no_gradient(device, backend):
    t = draw_upsample(ODD, device=device)
    logits = t["logits"].requires_grad_()
    with apc_kernels.backend(backend):
        assert not apc_kernels.upsample_argmax(logits, ODD.size).requires_grad
        assert not apc_kernels.upsample_confusion(logits, t["target"]).requires_grad
