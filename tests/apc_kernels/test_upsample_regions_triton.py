"""Tests the Triton kernels of upsample_region_sums, run on the CPU, against float64 and PyTorch.

By Triton's interpreter, which rounds bfloat16 wrongly and is spared it, and as compiled code (tests/ptx, slow).
"""

import pytest
import torch
from accuracy import same_bits
from cases import LAYOUTS, channels_last
from region_cases import KINDS, check, draw, ours
from upsample_cases import UpsampleCase

from apc_kernels.ops.upsample import reference

pytest.importorskip("triton", reason="needs triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, of masked lanes
    pytest.mark.usefixtures("triton_machine"),
]
CASES = [
    UpsampleCase(1, 5, (3, 4), (24, 32)),
    UpsampleCase(1, 19, (3, 4), (7, 9), True),
    UpsampleCase(2, 3, (9, 13), (4, 5)),  # downwards: source rows without pixels
    UpsampleCase(1, 3, (6, 1), (33, 1), True),
    UpsampleCase(1, 37, (2, 20), (5, 41)),  # several blocks of classes and of source columns
    UpsampleCase(1, 2, (1, 1), (70, 3)),  # several windows of rows, and no step from one position to the next
    UpsampleCase(1, 2, (19, 2), (23, 5)),  # several blocks of source rows
    UpsampleCase(1, 2, (5, 7), (1, 1)),
]
SMALL = UpsampleCase(2, 5, (3, 2), (7, 5))
SOME = ("weighted softmax", "sigmoid", "masks")
some = pytest.mark.parametrize("kind", SOME)
kinds = pytest.mark.parametrize(
    "kind", [*SOME, *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in SOME)]
)


@kinds
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums(case, kind):
    check(draw(case, kind), "triton", f"{case} {kind}")


def test_a_single_class():
    check(draw(UpsampleCase(1, 1, (3, 3), (8, 8)), "masks"), "triton", "one class")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("kind", ["weighted softmax"])
def test_every_layout(triton_machine, kind, layout, dtype):
    if dtype == torch.bfloat16 and triton_machine == "interpreter":
        pytest.skip("needs compiled code: Triton's interpreter rounds bfloat16 wrongly")
    check(draw(SMALL, kind, layout, dtype), "triton", kind)


@some
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_every_dtype(kind, labels):
    narrow, wide = (draw(SMALL, kind, channels_last, labels=dtype) for dtype in (labels, torch.int64))
    assert all(same_bits(a, b) for a, b in zip(ours(narrow, "triton"), ours(wide, "triton"), strict=True))


@some
def test_an_ignored_label_is_not_wrapped_to_the_width_of_the_labels(kind):
    t = draw(SMALL, kind, labels=torch.uint8)
    t["target"][t["target"] == 255] = 0
    check(t, "triton", kind, ignore_index=256)


@some
def test_large_logits(kind):
    for change in (lambda x: x * 3e3, lambda x: x + 1e4):
        t = draw(SMALL, kind)
        check(t | {"logits": change(t["logits"])}, "triton", kind)


@some
def test_ignored_pixels_count_nowhere(kind):
    """Ignored pixels do not count, even if their logits are NaN."""
    t = draw(SMALL, kind)
    t["logits"][1], t["target"][1] = float("nan"), 255
    sums, grad = ours(t, "triton")
    half = t | {name: t[name][:1] for name in ("logits", "target")} | {"grad": t["grad"][:, :1]}
    expected = ours(half, "triton")
    assert same_bits(sums[:, :1], expected[0]) and same_bits(grad[:1], expected[1])
    assert not sums[:, 1].any() and not grad[1].any()


@some
@pytest.mark.parametrize("label", [-1, 2**32 + 3])
def test_label_out_of_range(kind, label):
    """Called below the public operation, which refuses it on a CPU: NaN in its sums, and in what its pixel reads."""
    from apc_kernels.ops.upsample import triton as kernels

    case = UpsampleCase(2, 5, (4, 5), (12, 15))
    t = draw(case, kind)
    t["target"][1, ..., 8, 8] = 255  # between source rows 2 and 3, columns 2 and 3
    wrong = t["target"].clone()
    wrong[(1, 4, 8, 8) if kind == "masks" else (1, 8, 8)] = label
    results = []
    for target in t["target"], wrong:
        sums, count, grad = torch.empty(4, 2, 5), torch.empty(1, dtype=torch.int64), torch.empty(t["logits"].shape)
        settings = (t["logits"], target, t["options"].get("weight"), 255, t["options"]["sigmoid"], False)
        kernels.upsample_region_sums(*settings, sums, count)
        kernels.upsample_region_sums_backward(t["grad"], *settings, grad)
        results.append((sums, count, grad))
    (sums, count, grads), (wrong_sums, wrong_count, wrong_grads) = results
    assert count.item() == 0 and wrong_count.item() == 1
    touched = torch.zeros(2, 5, dtype=torch.bool)
    touched[1, 4 if kind == "masks" else slice(None)] = True
    assert wrong_sums[:, touched].isnan().all() and same_bits(wrong_sums[:, ~touched], sums[:, ~touched])
    matrix = reference.matrix(4, 12, False, grads)[8].outer(reference.matrix(5, 15, False, grads)[8])
    reached = touched[..., None, None] & (matrix != 0)
    assert wrong_grads[reached].isnan().all() and same_bits(wrong_grads[~reached], grads[~reached])


@some
def test_same_bits_every_time(kind):
    t = draw(SMALL, kind, channels_last)
    first, second = ours(t, "triton"), ours(t, "triton")
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
