"""Tests conv3x3 against float64 and against PyTorch's convolution of the concatenation; by tiles at every size."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import calls
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, same_bits
from cases import channels_last, even_window, nchw, sliced, transposed
from hypothesis import given, settings
from hypothesis import strategies as st

import apc_kernels
from apc_kernels.ops.conv3x3 import LEAST_CHANNELS, MOST_TINY, _backward_maps, _forward, reference, tiles


class Case(NamedTuple):
    batch: int
    channels: tuple[int, ...]  # of each map
    outputs: int
    size: tuple[int, int]
    dilation: int = 1


CASES = [
    Case(1, (1,), 1, (1, 1)),
    Case(2, (3,), 2, (1, 7)),
    Case(2, (3, 5), 4, (7, 9)),
    Case(3, (2, 1, 2), 3, (8, 6)),
    Case(1, (4,), 3, (2, 70)),
    Case(2, (600,), 530, (6, 5)),  # several blocks of channels on both sides
    Case(3, (4,), 4, (70, 68)),  # several blocks of rows, one of them of two images
    Case(1, (130, 520), 128, (33, 40)),
    Case(0, (3,), 2, (5, 5)),
    Case(2, (3, 5), 4, (7, 9), 2),
    Case(1, (5,), 33, (13, 8), 3),
    Case(2, (3,), 4, (2, 3), 4),  # smaller than the dilation
    Case(1, (1,), 1, (1, 1), 12),
    Case(1, (2,), 3, (4, 5), 1000),
    Case(1, (130,), 128, (33, 40), 4),
    Case(0, (3,), 2, (5, 5), 2),
]
BACKENDS = ["reference", "cpp"]


def draw(case, dtype=torch.float32, layout=nchw):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    maps = [layout(normal(case.batch, c, *case.size)) for c in case.channels]
    return maps, normal(case.outputs, sum(case.channels), 3, 3), layout(normal(case.batch, case.outputs, *case.size))


def stock(maps, weight, dilation=1):
    return F.conv2d(torch.cat(maps, 1), weight, padding=dilation, dilation=dilation)


def with_gradients(function, maps, weight, grad, dilation=1):
    leaves = [t.detach().requires_grad_() for t in (*maps, weight)]
    result = function(leaves[:-1], leaves[-1], dilation=dilation)
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


def by_tiles(maps, weight, dilation=1):
    """Computes conv3x3 by tiles at every size."""
    return _forward(weight, dilation, maps)


def check(case, dtype=torch.float32, layout=nchw, function=by_tiles):
    given = draw(case, dtype, layout)
    maps, weight, grad = given
    wide = [x.double() for x in maps], weight.double(), grad.double()
    results = [with_gradients(*each, case.dilation) for each in ((function, *given), (stock, *wide), (stock, *given))]
    for ours, exact, own in zip(*results, strict=True):
        assert_accurate(ours, exact, own, f"{case}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hard_cases(case, backend):
    with apc_kernels.backend(backend):
        check(case)


@pytest.mark.parametrize("layout", [sliced, transposed, even_window, channels_last], ids=lambda layout: layout.__name__)
def test_layouts(layout):
    for dilation in (1, 2):
        check(Case(2, (3, 5), 4, (7, 9), dilation), layout=layout)
        check(Case(2, (3, 5), 4, (7, 9), dilation), layout=layout, function=apc_kernels.conv3x3)


def test_results_have_the_layout_of_the_first_map():
    for layout in (nchw, channels_last):
        maps, weight, grad = draw(Case(2, (3, 5), 4, (7, 9)), layout=layout)
        for result in (by_tiles(maps, weight), *_backward_maps(grad, weight, 1, [3, 5])):
            assert result.is_contiguous(memory_format=torch.channels_last) == (layout is channels_last)
            assert result.is_contiguous() == (layout is nchw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_public_function_in_every_dtype(dtype):
    check(Case(2, (LEAST_CHANNELS, 16), LEAST_CHANNELS, (46, 47), 2), dtype, function=apc_kernels.conv3x3)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    outputs=st.integers(1, 5),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dilation=st.integers(1, 5),
    layout=st.sampled_from([nchw, channels_last]),
)
def test_any_size_in_float64(batch, channels, outputs, size, dilation, layout):
    given = *draw(Case(batch, tuple(channels), outputs, size), torch.float64, layout), dilation
    with apc_kernels.backend("cpp"):
        actual = with_gradients(by_tiles, *given)
    for ours, expected in zip(actual, with_gradients(stock, *given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    maps, weight, _ = draw(Case(2, (2, 1), 2, (3, 4)), torch.float64)
    leaves = [t.requires_grad_() for t in (*maps, weight)]
    with apc_kernels.backend(backend):
        for dilation in (1, 2):
            assert torch.autograd.gradcheck(lambda a, b, w, d=dilation: by_tiles([a, b], w, d), leaves)


def test_only_the_gradients_asked_for():
    maps, weight, grad = draw(Case(1, (2, 3), 2, (4, 4)))
    maps[1].requires_grad_()
    result = by_tiles(maps, weight)
    (ours,) = torch.autograd.grad(result, [maps[1]], grad)
    (expected,) = torch.autograd.grad(stock(maps, weight), [maps[1]], grad)
    torch.testing.assert_close(ours, expected)


def test_a_part_of_a_weight():
    """PSPNet's bottleneck gives the features' part of it; other channels of the outputs lie between."""
    maps, weight, _ = draw(Case(1, (3, 4), 5, (6, 6)))
    torch.testing.assert_close(by_tiles(maps[:1], weight[:, :3]), stock(maps[:1], weight[:, :3]))


@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[14]], ids=str)
def test_same_bits_every_time_and_for_any_number_of_threads(case, threads):
    given, bits = draw(case), []
    for count in (2, 2, 1, 3):
        threads(count)
        bits.append(with_gradients(by_tiles, *given, case.dilation))
    for other in bits[1:]:
        assert all(same_bits(a, b) for a, b in zip(bits[0], other, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=lambda layout: layout.__name__)
def test_below_the_tiles_it_is_one_convolution(layout, autocast):
    """In bfloat16, rounded once, with the bits of the concatenation's convolution, and none of its memory kept."""
    maps, weight, grad = draw(Case(2, (24, 8, 8), 4, (12, 10)), torch.float32 if autocast else torch.bfloat16, layout)
    saved, counted = [], []

    def ours(maps, weight, dilation):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            return apc_kernels.conv3x3(maps, weight, dilation=dilation)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = (with_gradients(f, maps, weight, grad.bfloat16()) for f in (ours, stock))
        leaves = [t.detach().requires_grad_() for t in (*maps, weight)]
        counted = calls.count(lambda: apc_kernels.conv3x3(leaves[:-1], leaves[-1]))
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
    assert sorted(t.shape[1] for t in saved) == [8, 8, 24, 40]
    assert counted["convolution"] == counted["cat"] == 1


def test_small_maps_have_second_derivatives():
    maps, weight, _ = draw(Case(2, (2, 1), 2, (3, 4)), torch.float64)
    leaves = [t.requires_grad_() for t in (*maps, weight)]
    assert torch.autograd.gradgradcheck(lambda a, b, w: apc_kernels.conv3x3([a, b], w), leaves)


# As an operation


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    maps, weight, grad = draw(Case(2, (3, 5), 4, (7, 9)))
    leaves = [x.requires_grad_() for x in maps]
    operators, plain = torch.ops.apc_kernels, [x.detach() for x in leaves]
    with apc_kernels.backend(backend):
        for dilation in (1, 2):
            torch.library.opcheck(operators.conv3x3.default, (weight.detach().requires_grad_(), dilation, leaves))
            torch.library.opcheck(operators.conv3x3_backward_maps.default, (grad, weight, dilation, [3, 5]))
            torch.library.opcheck(operators.conv3x3_backward_weight.default, (grad, dilation, plain))


def test_compiled_whole_by_tiles():
    case = Case(2, (LEAST_CHANNELS, 8), LEAST_CHANNELS, (48, 48))
    given = draw(case)
    compiled = torch.compile(apc_kernels.conv3x3, fullgraph=True, backend="aot_eager")
    for dilation in (1, 2):
        results = [with_gradients(function, *given, dilation) for function in (compiled, by_tiles)]
        assert all(same_bits(ours, expected) for ours, expected in zip(*results, strict=True))


def test_tiny_maps_leave_onednn_out():
    """One map of few numbers, whose convolution takes less time than oneDNN takes to begin."""
    maps, weight, grad = draw(Case(2, (5,), 4, (7, 9)))
    assert maps[0].numel() * 4 * 9 <= MOST_TINY
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = with_gradients(apc_kernels.conv3x3, maps, weight, grad, 1)
    called = {event.name for event in profile.events()}
    assert "aten::thnn_conv2d" in called and "aten::mkldnn_convolution" not in called
    expected = with_gradients(reference.conv3x3, maps, weight, grad, 1)
    for ours, stock_result in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, stock_result)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        apc_kernels.conv3x3(torch.randn(2, 16, 32, 32), torch.randn(8, 16, 3, 3))
    assert "aten::thnn_conv2d" not in {event.name for event in profile.events()}


def test_what_takes_tiles(monkeypatch):
    """Large maps in float32 on a CPU; not small ones, low precision, autocast."""
    taken = []
    monkeypatch.setattr("apc_kernels.ops.conv3x3._forward", lambda weight, dilation, maps: taken.append(dilation))
    maps, weight, _ = draw(Case(1, (LEAST_CHANNELS,), LEAST_CHANNELS, (64, 64)))
    apc_kernels.conv3x3(maps, weight)
    apc_kernels.conv3x3([channels_last(x) for x in maps], weight, dilation=4)
    assert taken == [1, 4]
    for others, other in (
        ([x[:, :, 49:] for x in maps], weight),
        ([x[:, :64] for x in maps], weight[:, :64]),
        (maps, weight[:64]),
        ([x.bfloat16() for x in maps], weight.bfloat16()),
    ):
        torch.testing.assert_close(apc_kernels.conv3x3(others, other), reference.conv3x3(others, other))
    with torch.autocast("cpu", torch.bfloat16):
        assert apc_kernels.conv3x3(maps, weight).dtype == torch.bfloat16
    assert taken == [1, 4]


X, W = torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3)


@pytest.mark.parametrize(
    ("maps", "weight", "error", "message"),
    [
        ([], W, ValueError, "maps: expected at least one map"),
        ([X, 3], W, TypeError, r"maps\[1\]: expected a tensor, got int"),
        (X, None, TypeError, "weight: expected a tensor, got NoneType"),
        (X[0], W, ValueError, r"maps\[0\]: expected 4 dimensions, got 3"),
        (X.long(), W, ValueError, r"maps\[0\]: expected float32"),
        ([X, X[:, :, :2]], W, ValueError, r"maps\[1\]: expected batch, size and dtype of maps\[0\]"),
        ([X, X.double()], W, ValueError, r"maps\[1\]: expected batch, size and dtype of maps\[0\]"),
        ([X, X], W, ValueError, r"weight: expected \(O, 6, 3, 3\), O > 0, got \(2, 3, 3, 3\)"),
        (X, W[..., :2], ValueError, r"weight: expected \(O, 3, 3, 3\)"),
        (X, W.to("meta"), ValueError, "weight: expected a tensor on cpu, got one on meta"),
    ],
)
def test_wrong_input(maps, weight, error, message):
    with pytest.raises(error, match=message):
        apc_kernels.conv3x3(maps, weight)


@pytest.mark.parametrize(
    ("dilation", "error"), [(0, ValueError), (-1, ValueError), (2**40, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_wrong_dilation(dilation, error):
    with pytest.raises(error, match="dilation: expected"):
        apc_kernels.conv3x3(X, W, dilation=dilation)


def test_raw_operators_check_what_they_are_given():
    raw, tiles, panels = torch.ops.apc_kernels_cpp, torch.zeros(16, 4, 3), torch.zeros(16, 1, 3, 32)
    for call, message in (
        (lambda: raw.conv3x3_tiles(X, 2, 1, 1, False, tiles), "first_row"),
        (lambda: raw.conv3x3_tiles(X, 3, 1, 0, False, tiles), "side: expected 2 or 4"),
        (lambda: raw.conv3x3_tiles(X, 2, 0, 0, False, tiles), "dilation: expected 1 or more"),
        (lambda: raw.conv3x3_tiles(X, 2, 1, 0, False, torch.zeros(16, 4, 2)), "tiles: expected size 3"),
        (lambda: raw.conv3x3_tiles(X, 4, 1, 0, False, tiles[:, :1]), "tiles: expected size 36"),
        (lambda: raw.conv3x3_tiles(X, 2, 1, 0, False, tiles.double()), "differ in dtype"),
        (lambda: raw.conv3x3(tiles[:, :3], 2, 1, 0, None, None, False, X), "tiles"),
        (lambda: raw.conv3x3(tiles, 2, 1, 0, torch.zeros(2), None, False, X), "bias: expected size 3"),
        (lambda: raw.conv3x3(tiles, 2, 1, 0, None, X, False, X), "channels to lie side by side"),
        (lambda: raw.conv3x3_weight(W[..., :2], 2, False, panels), "weight: expected"),
        (lambda: raw.conv3x3_weight(W.bfloat16(), 2, False, panels.bfloat16()), "float32 or float64"),
        (lambda: raw.conv3x3_weight(W, 4, False, panels), "transformed: expected size 36"),
        (lambda: raw.conv3x3_weight_gradient(torch.zeros(16, 3, 3), W), "planes: expected size 2"),
        (
            lambda: raw.products(tiles, panels, None, None, False, False, torch.zeros(16, 4, 33)),
            "right: expected size 2",
        ),
        (lambda: raw.products(tiles, panels, None, None, False, False, torch.zeros(16, 5, 8)), "out: expected size 4"),
        (
            lambda: raw.products(tiles, panels, None, tiles, False, False, torch.zeros(16, 4, 8)),
            "other: expected size 8",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_under_autocast_maps_may_come_in_any_precision():
    """Maps from a product and other maps may be mixed: all are cast to the precision of the products."""
    maps = [torch.randn(1, 128, 32, 32), torch.randn(1, 16, 32, 32, dtype=torch.bfloat16)]
    weight = torch.randn(128, 144, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        result = apc_kernels.conv3x3(maps, weight)
        expected = F.conv2d(torch.cat([x.bfloat16() for x in maps], 1), weight, padding=1)
    assert result.dtype == torch.bfloat16
    assert (result - expected).abs().max() <= 0.02 * expected.abs().max()
    with pytest.raises(ValueError, match=r"maps\[1\]: expected batch, size and dtype of maps\[0\]"):
        apc_kernels.conv3x3(maps, weight)


# Calls share one piece of scratch memory.


def test_calls_use_the_scratch_memory_of_earlier_ones(monkeypatch):
    """A first call under inference_mode leaves memory that training may write."""
    monkeypatch.setattr(tiles, "_free", [])
    given = draw(CASES[2])
    with torch.inference_mode():
        by_tiles(given[0], given[1])
    (memory,) = tiles._free
    ours = with_gradients(by_tiles, *given)
    assert len(tiles._free) == 1 and tiles._free[0] is memory
    for result, expected in zip(ours, with_gradients(by_tiles, *given), strict=True):
        assert same_bits(result, expected)


def test_more_scratch_memory_than_is_kept_returns_to_the_system(monkeypatch):
    monkeypatch.setattr(tiles, "_free", [])
    monkeypatch.setattr(tiles, "LEAST", 0)
    monkeypatch.setattr(tiles, "MOST", 1000)
    by_tiles(*draw(CASES[2])[:2])
    assert tiles._free == []


def test_a_large_gradient_leaves_no_scratch_memory(monkeypatch):
    """A training step has its peak of memory where the head's bottleneck makes the gradient of its weight."""
    monkeypatch.setattr(tiles, "_free", [])
    maps, weight, grad = draw(CASES[2])
    for large, kept in ((weight.nbytes + 1, 1), (weight.nbytes, 0)):
        monkeypatch.setattr(tiles, "LARGE", large)
        with_gradients(by_tiles, maps, weight, grad)
        assert len(tiles._free) == kept


def test_scratch_memory_is_returned_after_an_error(monkeypatch):
    monkeypatch.setattr(tiles, "_free", [])
    with pytest.raises(ZeroDivisionError), tiles._scratch(X, 10, 20) as (first, second):
        assert (first.numel(), second.numel(), first.dtype) == (10, 20, X.dtype)
        1 / 0  # noqa: B018
    assert len(tiles._free) == 1


def test_threads_do_not_share_scratch_memory():
    given = [draw(case) for case in (CASES[2], CASES[6], CASES[2], CASES[6])]
    expected = [by_tiles(maps, weight) for maps, weight, _ in given]
    with ThreadPoolExecutor(len(given)) as pool:
        for _ in range(5):
            found = pool.map(lambda tensors: by_tiles(*tensors[:2]), given)
            assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
