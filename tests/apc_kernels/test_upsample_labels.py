"""Tests that upsample_argmax in Triton excludes no class that wins, on logits that tie or are on the edge of it.

Labels found with the search for classes that can win have to be those found without it, pixel by pixel.
"""

import pytest
import stock
import torch
from cases import channels_last, nchw, sliced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from upsample_cases import UpsampleCase, tied_logits

import apc_kernels

pytest.importorskip("triton", reason="needs triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which excludes the GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, of masked lanes
]
property_test = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31)
layouts = st.sampled_from([nchw, channels_last, sliced])
ratios = st.sampled_from([4, 5, 8, 16])


@pytest.fixture(autouse=True)
def triton_serves(triton_machine):
    with apc_kernels.backend("triton"):
        yield


@pytest.fixture
def both(monkeypatch):
    """Returns a function that computes labels with and without the search, of logits for which there is one."""
    from apc_kernels.ops.upsample import triton_labels

    cells = triton_labels._cells

    def labels(logits: Tensor, ratio: int, align_corners: bool = False) -> tuple[Tensor, Tensor]:
        size = tuple(ratio * n for n in logits.shape[2:])
        assert cells(logits.shape[1], logits.shape[3], size[1], align_corners) > 0
        found = apc_kernels.upsample_argmax(logits, size, align_corners=align_corners)
        with monkeypatch.context() as patch:
            patch.setattr(triton_labels, "_cells", lambda *_: 0)
            return found, apc_kernels.upsample_argmax(logits, size, align_corners=align_corners)

    return labels


def draw_ahead(seed: int, classes: int, source: tuple[int, int]) -> Tensor:
    """Draws logits of which one class is ahead in patches, by little or by much."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, classes, *source, generator=generator)
    patches = [n // 4 + 1 for n in source]
    winner = torch.randint(classes, (1, 1, *patches), generator=generator)
    winner = winner.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., : source[0], : source[1]]
    ahead = (0.5, 2.0, 5.0, 1e4)[seed % 4]
    return logits.scatter_add_(1, winner, torch.full(winner.shape, ahead))


def test_classes_that_are_excluded_would_not_have_won(both):
    @property_test
    @given(seeds, st.sampled_from([16, 19, 33, 70]), ratios, st.booleans(), layouts)
    def check(seed, classes, ratio, align_corners, layout):
        found, expected = both(layout(draw_ahead(seed, classes, (3, 9))), ratio, align_corners)
        assert torch.equal(found, expected)

    check()


def test_a_class_one_rounding_below_the_largest_may_tie_and_win(both):
    """Logits are the same everywhere, and interpolated they are rounded: that of a later class to an earlier one's.

    Without the margin of the bounds a third of these values gives other labels.
    """
    generator, ties = torch.Generator().manual_seed(2), 0
    for value in (1 + torch.rand(8, generator=generator)) * torch.tensor([1, -1]).repeat(4):
        logits = torch.full((1, 20, 1, 5), -1e30)
        logits[:, 17] = value
        logits[:, [3, 11]] = torch.nextafter(value, torch.tensor(-float("inf")))
        found, expected = both(logits, 7)
        assert torch.equal(found, expected)
        ties += int((expected == 3).sum())
    assert ties > 0


def test_confusion_excludes_no_class_that_wins(both):
    logits = channels_last(draw_ahead(2, 33, (2, 5)))
    target = torch.randint(33, (1, 16, 40), generator=torch.Generator().manual_seed(0))
    _, expected = both(logits, 8)
    assert torch.equal(apc_kernels.upsample_confusion(logits, target), stock.confusion(expected, target, 33))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_logits_that_are_not_finite(both, value):
    @property_test
    @given(seeds, ratios)
    def check(seed, ratio):
        logits, generator = draw_ahead(seed, 21, (2, 5)), torch.Generator().manual_seed(seed)
        somewhere = torch.rand(logits.shape, generator=generator) < (0.002, 0.03)[seed % 2]
        largest = logits == logits.amax(1, keepdim=True)
        few = torch.rand(largest.shape, generator=generator) < 0.1
        logits[somewhere | (largest & few)] = value
        logits[:, :, 0, :2] = value  # all classes
        found, expected = both(logits, ratio)
        assert torch.equal(found, expected) and found.max() <= 20

    check()


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (UpsampleCase(1, 40, (2, 5), (8, 20)), channels_last),
        (UpsampleCase(1, 150, (1, 3), (8, 24)), nchw),
        (UpsampleCase(1, 171, (1, 3), (16, 48)), channels_last),
        pytest.param(UpsampleCase(1, 1000, (1, 3), (8, 24)), channels_last, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_of_tied_classes_the_first(case, layout):
    """Interpolation is exact here, so every label is known."""
    logits = tied_logits(case, layout)
    first, second = case.classes // 3, case.classes - 1  # lead everywhere, and tie on the left
    logits[:, [first, second]] += 2
    logits[:, second, :, :2] = logits[:, first, :, :2]
    scores = stock.upsampled(logits.double(), case.size)
    assert (scores == scores.amax(1, keepdim=True)).sum(1).gt(1).double().mean() > 0.1
    assert torch.equal(apc_kernels.upsample_argmax(logits, case.size).long(), scores.argmax(1))
