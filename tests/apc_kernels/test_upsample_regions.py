"""Tests upsample_region_sums against float64 and PyTorch's own composition, on every backend that can run here."""

import instruction_sets
import pytest
import torch
from accuracy import same_bits
from cases import channels_last, nchw, sliced
from places import CPU, dtypes, layouts, places_without_cuda
from region_cases import KINDS, assert_matches, check, draw, ours
from upsample_cases import EXTREMES, UPSAMPLES, UpsampleCase

import apc_kernels

ODD = UpsampleCase(2, 13, (9, 11), (29, 46))
DOWN = UpsampleCase(2, 21, (23, 19), (8, 13), True)
TWICE = UpsampleCase(2, 5, (8, 9), (16, 18))
kinds = pytest.mark.parametrize("kind", KINDS)


# Sums and gradients


@places_without_cuda
@kinds
@pytest.mark.parametrize("case", UPSAMPLES, ids=str)
def test_hard_cases(device, backend, case, kind):
    if case.classes == 1 and "softmax" in kind:
        pytest.skip("a softmax needs two classes")
    if case.classes == 1 and kind != "masks":
        pytest.skip("the labels of one class are its mask")
    check(draw(case, kind, device=device), backend, f"{case} {kind}")


@places_without_cuda
@layouts
@dtypes
@pytest.mark.parametrize("case", [ODD, DOWN], ids=str)
@pytest.mark.parametrize("kind", ["weighted softmax", "masks"])
def test_layouts_and_dtypes(device, backend, layout, dtype, case, kind):
    t = draw(case, kind, layout, dtype, device)
    _, grad = check(t, backend, f"{case} {kind}")
    assert grad.stride() == torch.empty_like(t["logits"]).stride()


@places_without_cuda
@kinds
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_labels_of_every_width(device, backend, kind, labels):
    narrow, wide = (draw(ODD, kind, device=device, labels=dtype) for dtype in (labels, torch.int64))
    assert all(same_bits(a, b) for a, b in zip(ours(narrow, backend), ours(wide, backend), strict=True))


@places_without_cuda
@kinds
@pytest.mark.parametrize("ignored", [0, 1, -100, 2**31 + 5, -(2**40)])
def test_any_label_can_be_the_ignored_one(device, backend, kind, ignored):
    t = draw(ODD, kind, device=device)
    t["target"][t["target"] == 255] = ignored
    check(t, backend, f"{kind} {ignored}", ignore_index=ignored)


@places_without_cuda
def test_masks_of_labels_give_the_sums_of_labels(device, backend):
    """Tests that a mask of each class says the same as labels, and that bool masks and single classes do."""
    t = draw(ODD, "sigmoid", device=device)
    valid = t["target"] != 255
    masks = (t["target"][:, None] == torch.arange(13, device=device)[:, None, None]).long()
    by_labels, by_masks = ours(t, backend), ours(t | {"target": masks.where(valid[:, None], 255)}, backend)
    assert all(same_bits(a, b) for a, b in zip(by_labels, by_masks, strict=True))
    with apc_kernels.backend(backend):
        logits = t["logits"][:, :1]
        sums = apc_kernels.upsample_region_sums(logits, masks[:, 0], sigmoid=True)
        for target in masks[:, :1], masks[:, 0].bool(), masks[:, :1].bool():
            assert same_bits(sums, apc_kernels.upsample_region_sums(logits, target, sigmoid=True))
    assert sums.shape == (3, 2, 1) and torch.equal(sums[1, :, 0], masks[:, 0].sum((1, 2)).float())


@places_without_cuda
def test_three_sums_and_a_fourth(device, backend):
    t = draw(ODD, device=device)
    with apc_kernels.backend(backend):
        logits = t["logits"].requires_grad_()
        four = apc_kernels.upsample_region_sums(logits, t["target"], squares=True)
        three = apc_kernels.upsample_region_sums(logits, t["target"])
        p, n, overlap = three
        (grad,) = torch.autograd.grad(n.sum(), logits, retain_graph=True)
    assert four.shape == (4, 2, 13) and same_bits(three, four[:3]) and (overlap <= p).all()
    assert not grad.any()
    counts = torch.stack([labels[labels != 255].bincount(minlength=13) for labels in t["target"]])
    assert torch.equal(n, counts.float())


@places_without_cuda
def test_no_images(device, backend):
    t = draw(UpsampleCase(0, 4, (3, 3), (6, 6)), device=device)
    sums, grad = ours(t, backend)
    assert sums.shape == (4, 0, 4) and grad.shape == (0, 4, 3, 3)


@pytest.mark.parametrize("backend", CPU)
@kinds
@pytest.mark.parametrize(
    "case", [UpsampleCase(2, 3, (2, 3), (5, 4)), UpsampleCase(1, 3, (5, 2), (3, 4), True)], ids=str
)
def test_gradcheck(backend, case, kind):
    t = draw(case, kind, channels_last, torch.float64)

    def function(logits):
        return apc_kernels.upsample_region_sums(logits, t["target"], squares=True, **t["options"])

    with apc_kernels.backend(backend):
        assert torch.autograd.gradcheck(function, t["logits"].requires_grad_())


# Extremes


@places_without_cuda
@kinds
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits(device, backend, extreme, kind):
    t = draw(ODD, kind, device=device)
    t["logits"] = EXTREMES[extreme](t["logits"])
    check(t, backend, f"{extreme} {kind}")


@places_without_cuda
@kinds
def test_many_equal_pixels(device, backend, kind):
    """Tests sums of a hundred thousand equal numbers, which rounding would bend one way."""
    t = draw(UpsampleCase(1, 3, (1, 1), (331, 307)), kind, device=device)
    check(t, backend, kind)


@places_without_cuda
@kinds
def test_ignored_pixels_count_nowhere(device, backend, kind):
    """Ignored pixels do not count, even if their logits are NaN."""
    t = draw(TWICE, kind, device=device)
    t["logits"][1], t["target"][1] = float("nan"), 255
    sums, grad = ours(t, backend)
    half = t | {name: t[name][:1] for name in ("logits", "target")} | {"grad": t["grad"][:, :1]}
    expected = ours(half, backend)
    assert same_bits(sums[:, :1], expected[0]) and same_bits(grad[:1], expected[1])
    assert not sums[:, 1].any() and not grad[1].any()


@places_without_cuda
@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_image(device, backend, kind, value):
    t = draw(TWICE, kind, device=device)
    t["logits"][1, 2, 4, 5] = value
    sums, grad = ours(t, backend)
    alone = 2 if "softmax" not in kind else slice(None)  # with sigmoids the other classes go on
    if value != float("inf") or "softmax" in kind:
        assert sums[0, 1, alone].isnan().all() and grad[1, alone, 4, 5].isnan().all()
    assert sums[:, 0].isfinite().all() and grad[0].isfinite().all()
    if "softmax" not in kind:
        assert sums[:, 1, [0, 1, 3, 4]].isfinite().all() and grad[1, [0, 1, 3, 4]].isfinite().all()
    if backend != "reference":  # whose products bring a NaN to all of the image
        assert grad[1, :, :3].isfinite().all() and grad[1, :, :, 7:].isfinite().all()


# Labels out of range


WRONG = [
    (13, torch.uint8),
    (-1, torch.int16),
    (2**16 + 3, torch.int32),
    (2**32 + 3, torch.int64),
    (-(2**63), torch.int64),
]
wrong_labels = pytest.mark.parametrize(("label", "dtype"), WRONG, ids=str)


@pytest.mark.parametrize("backend", CPU)
@wrong_labels
def test_a_label_out_of_range(backend, label, dtype):
    logits, target = draw(ODD)["logits"], torch.ones(2, *ODD.size, dtype=dtype)
    target[1, 5, 40] = target[1, 28, 0] = label
    masks = torch.ones(2, 13, *ODD.size, dtype=dtype)
    masks[1, 3, 28, 45] = label
    with apc_kernels.backend(backend):
        for sigmoid in False, True:
            with pytest.raises(
                ValueError, match=rf"expected labels of 0 to 12, .*; got {label} in 2 pixels, the first at"
            ):
                apc_kernels.upsample_region_sums(logits, target, sigmoid=sigmoid)
        with pytest.raises(ValueError, match=rf"labels of 0 to 1, .*; got {label} in 1 pixel, at \(1, 3, 28, 45\)$"):
            apc_kernels.upsample_region_sums(logits, masks, sigmoid=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
@kinds
def test_a_label_out_of_range_on_a_gpu(backend, kind):
    """NaN in the sums of its image and in the gradient of its sources, or an error where it was asked for."""
    t = draw(ODD, kind, device="cuda")
    at = (1, 5, 40) if kind != "masks" else (1, 3, 5, 40)
    t["target"][at] = 77
    sums, grad = ours(t, backend)
    assert sums[:, 1, 3].isnan().all() and grad[1, 3, 1, 9].isnan() and sums[:, 0].isfinite().all()
    if kind == "masks":
        assert sums[:, 1, 4].isfinite().all()
    else:
        assert sums[:, 1].isnan().all()
    with apc_kernels.checked_labels(), pytest.raises(ValueError, match="got 77 in 1 pixel"):
        ours(t, backend)


# The same bits


@places_without_cuda
@kinds
def test_same_bits_every_time(device, backend, kind):
    t = draw(UpsampleCase(2, 33, (17, 20), (66, 75)), kind, channels_last, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [ours(t, backend) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for other in others for a, b in zip(first, other, strict=True))


@kinds
@pytest.mark.parametrize(
    "case", [UpsampleCase(3, 19, (33, 29), (130, 117)), UpsampleCase(1, 7, (61, 40), (23, 90), True)], ids=str
)
def test_same_bits_with_any_number_of_threads(threads, kind, case):
    t, results = draw(case, kind), []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(ours(t, "cpp"))
    assert all(same_bits(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def instructed():
    for case in ODD, UpsampleCase(1, 21, (23, 19), (8, 13), True):
        for dtype in torch.float32, torch.bfloat16, torch.float16:
            for kind, layout in zip(KINDS, (nchw, channels_last, sliced, nchw, channels_last), strict=True):
                yield draw(case, kind, layout, dtype)


@instruction_sets.others
def test_every_instruction_set(isa, tmp_path):
    """Tests each set that the processor has, in its own process: the set is chosen once."""
    file = tmp_path / "results.pt"
    program = f"""
import torch
import {__name__.rpartition(".")[2]} as tests
torch.save([tests.ours(t, "cpp") for t in tests.instructed()], {str(file)!r})
"""
    instruction_sets.run(isa, program)
    for i, (t, results) in enumerate(zip(instructed(), torch.load(file), strict=True)):
        assert_matches(*results, t, f"{isa} {i}")
