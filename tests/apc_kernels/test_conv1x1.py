"""Tests conv1x1 against float64 and against PyTorch's convolution of the concatenation; by products at every size."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, same_bits
from cases import channels_last, nchw
from hypothesis import given, settings
from hypothesis import strategies as st

import apc_kernels
from apc_kernels.ops.conv1x1 import LEAST_CHANNELS, _forward

CASES = [  # batch, channels of each map, outputs, size
    (1, (1,), 1, (1, 1)),
    (2, (3, 5), 4, (7, 9)),
    (1, (64,), 33, (1, 70)),
    (2, (600, 32), 530, (6, 5)),  # several chunks of the depth
    (1, (40,), 300, (20, 31)),  # several blocks of rows and columns
    (0, (3,), 2, (5, 5)),
]
BACKENDS = ["reference", "cpp"]


def draw(case, dtype=torch.float32, layout=channels_last):
    batch, channels, outputs, size = case
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    maps = [layout(normal(batch, c, *size)) for c in channels]
    return maps, normal(outputs, sum(channels), 1, 1), layout(normal(batch, outputs, *size))


def stock(maps, weight):
    return F.conv2d(torch.cat(maps, 1), weight)


def by_products(maps, weight):
    """Computes conv1x1 by products at every size."""
    return _forward(weight, maps)


def with_gradients(function, maps, weight, grad):
    leaves = [t.detach().requires_grad_() for t in (*maps, weight)]
    result = function(leaves[:-1], leaves[-1])
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


def check(case, dtype=torch.float32, layout=channels_last, function=by_products):
    maps, weight, grad = given = draw(case, dtype, layout)
    wide = [x.double() for x in maps], weight.double(), grad.double()
    results = [with_gradients(*each) for each in ((function, *given), (stock, *wide), (stock, *given))]
    for ours, exact, own in zip(*results, strict=True):
        assert_accurate(ours, exact, own, f"{case}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hard_cases(case, backend):
    with apc_kernels.backend(backend):
        check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [nchw, channels_last], ids=["nchw", "channels_last"])
def test_public_function(dtype, layout):
    check((2, (LEAST_CHANNELS, 16), LEAST_CHANNELS, (16, 17)), dtype, layout, function=apc_kernels.conv1x1)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    outputs=st.integers(1, 70),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_any_size_in_float64(batch, channels, outputs, size):
    given = draw((batch, tuple(channels), outputs, size), torch.float64)
    with apc_kernels.backend("cpp"):
        actual = with_gradients(by_products, *given)
    for ours, expected in zip(actual, with_gradients(stock, *given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_parts_of_a_map_and_of_a_weight():
    """APCNet's context modules read parts of one map, between which the other parts lie."""
    (x,), weight, _ = draw((1, (128,), 64, (16, 16)))
    first, second = x.chunk(2, 1)
    torch.testing.assert_close(by_products([second], weight[:, :64]), stock([second], weight[:, :64]))
    torch.testing.assert_close(by_products([second, first], weight), stock([second, first], weight))


def test_same_bits_for_any_number_of_threads(threads):
    given, bits = draw(CASES[4]), []
    for count in (2, 2, 1, 3):
        threads(count)
        bits.append(with_gradients(by_products, *given))
    for other in bits[1:]:
        assert all(same_bits(a, b) for a, b in zip(bits[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_an_operation(backend):
    maps, weight, grad = draw(CASES[1])
    leaves = [x.requires_grad_() for x in maps]
    with apc_kernels.backend(backend):
        operators, plain = torch.ops.apc_kernels, [x.detach() for x in leaves]
        torch.library.opcheck(operators.conv1x1.default, (weight.requires_grad_(), leaves))
        torch.library.opcheck(operators.conv1x1_backward_maps.default, (grad, weight.detach(), [3, 5]))
        torch.library.opcheck(operators.conv1x1_backward_weight.default, (grad, plain))
        wide, wide_weight, _ = draw((2, (2, 1), 3, (2, 3)), torch.float64)
        leaves = [t.requires_grad_() for t in (*wide, wide_weight)]
        assert torch.autograd.gradcheck(lambda a, b, w: by_products([a, b], w), leaves)


def test_compiled_whole():
    given = draw((2, (LEAST_CHANNELS, 8), LEAST_CHANNELS, (16, 16)))
    compiled = torch.compile(apc_kernels.conv1x1, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(with_gradients(compiled, *given), with_gradients(by_products, *given), strict=True):
        assert same_bits(ours, expected)


def test_wrong_input():
    x, w = torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 1, 1)
    for maps, weight, error, message in (
        ([], w, ValueError, "maps: expected at least one map"),
        (3, w, TypeError, "maps: expected a tensor or a sequence"),
        ([x, 3], w, TypeError, r"maps\[1\]: expected a tensor, got int"),
        (x, w[:, :2], ValueError, r"weight: expected \(O, 3, 1, 1\)"),
        (x, torch.zeros(2, 3, 3, 3), ValueError, r"weight: expected \(O, 3, 1, 1\)"),
        ([x, x[:, :, :2]], w, ValueError, r"maps\[1\]: expected batch, size and dtype"),
    ):
        with pytest.raises(error, match=message):
            apc_kernels.conv1x1(maps, weight)
