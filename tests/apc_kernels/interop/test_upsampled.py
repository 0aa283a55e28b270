"""Tests logits whose upsampling is deferred, beside F.interpolate."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accuracy import same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from apc_kernels.interop.upsampled import Deferred, UpsampledLogits, upsampled

ALIGN = pytest.mark.parametrize("align_corners", [False, True])


def logits(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape or (2, 5, 6, 7), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def both(align_corners=False, size=(24, 30), dtype=torch.float32):
    """Returns logits twice, each with its upsampling: deferred and as it is."""
    a, b = logits(dtype=dtype), logits(dtype=dtype)
    expected = F.interpolate(b, size, mode="bilinear", align_corners=align_corners)
    return (a, upsampled(a, size, align_corners)), (b, expected)


def target(size=(24, 30), ignored=255):
    labels = torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(1))
    labels[:, :5, 3:] = ignored
    return labels


READS = {
    "addition": lambda x: x + 1,
    "softmax": lambda x: x.softmax(1),
    "a slice": lambda x: x[:, 1:3, ::2],
    "one image": lambda x: x[1] * 2,
    "the last image": lambda x: x[-1] * 2,
    "concatenation": lambda x: torch.cat([x, x], 1),
    "einsum": lambda x: torch.einsum("bkhw->bk", x),
    "a resize": lambda x: F.interpolate(x, (5, 9), mode="bilinear"),
    "a module": nn.Conv2d(5, 3, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1).reshape(-1, 5),
    "exp of a clone": lambda x: x.clone().exp(),
    "a checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=True),
}


@ALIGN
@pytest.mark.parametrize("read", READS)
def test_whatever_reads_them_gets_the_upsampled_values(read, align_corners):
    torch.manual_seed(0)
    (a, given), (b, expected) = both(align_corners)
    x, y = READS[read](given), READS[read](expected)
    assert type(x) is torch.Tensor and same_bits(x, y)
    x.square().mean().backward(), y.square().mean().backward()
    assert same_bits(a.grad, b.grad)


class Twice(torch.autograd.Function):
    """Takes its input without a call of a function of PyTorch."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@ALIGN
def test_a_function_of_autograd_reads_them(align_corners):
    (a, given), (b, expected) = both(align_corners)
    x, y = Twice.apply(given), Twice.apply(expected)
    assert same_bits(x, y)
    x.square().mean().backward(), y.square().mean().backward()
    assert same_bits(a.grad, b.grad)


def test_what_tells_of_them_computes_nothing():
    (_, given), (_, expected) = both()
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "layout"):
        assert getattr(given, name) == getattr(expected, name), name
    assert given.size(1) == 5 and len(given) == 2 and given.dim() == 4 and given.numel() == expected.numel()
    assert given._values is None and isinstance(given, torch.Tensor)


def test_values_are_computed_once_and_printed():
    (_, given), (_, expected) = both()
    assert (given + 0).equal(expected) and given.values() is given.values()
    assert repr(given) == repr(expected)
    assert given.detach().numpy().shape == (2, 5, 24, 30)
    copied = (copy.deepcopy(given.detach()), pickle.loads(pickle.dumps(given.detach())))
    assert all(same_bits(x, expected.detach()) for x in copied)


@ALIGN
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 255, "reduction": "sum"},
        {"ignore_index": 255, "reduction": "none"},
        {"ignore_index": 255, "label_smoothing": 0.1},
        {"ignore_index": 255, "weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]).double()},
    ],
    ids=["default", "sum", "none", "smoothing", "weight"],
)
def test_cross_entropy_reads_the_source(options, align_corners):
    (a, given), (b, expected) = both(align_corners, dtype=torch.float64)
    labels = target(ignored=options.get("ignore_index", -100))
    x, y = (nn.CrossEntropyLoss(**options)(z, labels) for z in (given, expected))
    x.square().sum().backward(), y.square().sum().backward()
    assert given._values is None
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(a.grad, b.grad)


def test_other_cross_entropies_read_the_upsampled_values():
    (a, given), (b, expected) = both()
    labels = target(ignored=0)
    probabilities = F.one_hot(labels, 5).permute(0, 3, 1, 2).float()
    x, y = (F.cross_entropy(z, probabilities) for z in (given, expected))
    x.backward(), y.backward()
    assert same_bits(x, y) and same_bits(a.grad, b.grad)
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        F.cross_entropy(given, target(size=(23, 30)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_losss_dtype_is_the_logits(dtype):
    (_, given), (_, expected) = both(dtype=dtype)
    x, y = (F.cross_entropy(z, target(), ignore_index=255) for z in (given, expected))
    assert x.dtype == y.dtype == dtype
    torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


def test_autocast_of_the_place_where_they_were_deferred():
    low = logits(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        given = upsampled(low, (24, 30), False)
        expected = F.interpolate(low, (24, 30), mode="bilinear")
        x, y = (F.cross_entropy(z, target(), ignore_index=255) for z in (given, expected))
    assert given.dtype == expected.dtype and x.dtype == y.dtype and same_bits(given + 0, expected)


@ALIGN
def test_argmax_reads_the_source(align_corners):
    (_, given), (_, expected) = both(align_corners)
    for dim in (1, -3):
        assert torch.equal(given.argmax(dim), expected.argmax(dim))
        assert torch.equal(torch.argmax(given, dim=dim, keepdim=True), torch.argmax(expected, dim=dim, keepdim=True))
    assert given._values is None
    assert torch.equal(given[1].argmax(0), expected[1].argmax(0))
    assert torch.equal(given[0].argmax(dim=-3), expected[0].argmax(dim=-3))
    for dim in (0, 2, 3, None):
        assert torch.equal(given.argmax(dim), expected.argmax(dim))


def test_the_grad_mode_of_the_place_where_they_were_deferred():
    with torch.no_grad():
        given = upsampled(logits(), (24, 30), False)
    assert not given.requires_grad and not (given + 0).requires_grad
    given = upsampled(logits(), (24, 30), False)
    with torch.inference_mode():
        assert given.values().requires_grad and not given.values().is_inference()


WRITES = {
    "in place": lambda x: x.mul_(torch.linspace(-1, 1, 5)[:, None, None]),
    "a slice": lambda x: x[:, 0].fill_(9.0),
    "an index": lambda x: x.__setitem__((slice(None), 2), 3.0),
    "an image": lambda x: x[0].mul_(-1),
    "an image's class": lambda x: x[-1].__setitem__(1, 5.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_to_them_counts(write):
    (a, given), (b, expected) = both()
    images = given[0], given[1]
    WRITES[write](given), WRITES[write](expected)
    assert torch.equal(given + 0, expected) and torch.equal(given.argmax(1), expected.argmax(1))
    for image, x in zip(images, expected, strict=True):
        assert torch.equal(image.argmax(0), x.argmax(0)) and torch.equal(image + 0, x)
    x, y = (F.cross_entropy(z, target(), ignore_index=255) for z in (given, expected))
    x.backward(), y.backward()
    assert same_bits(x, y) and same_bits(a.grad, b.grad)
    doubled = Twice.apply(given)
    assert torch.equal(doubled, 2 * expected)
    with pytest.raises(
        RuntimeError, match=r"were written to, or have hooks: give an autograd.Function their clone\(\)"
    ):
        doubled.sum().backward()


def test_gradients_at_full_size_can_be_watched():
    (_, given), (_, expected) = both()
    given.retain_grad(), expected.retain_grad()
    seen = []
    given.register_hook(seen.append)
    x, y = (F.cross_entropy(z, target(), ignore_index=255) for z in (given, expected))
    x.backward(), y.backward()
    assert torch.equal(given.grad, expected.grad) and torch.equal(seen[0], expected.grad)


CALLS = {
    "size": {"size": (24, 28)},
    "align_corners": {"size": (24, 28), "align_corners": True},
    "one number": {"size": 12},
    "factor": {"scale_factor": 3},
    "factors, corners": {"scale_factor": (2.0, 4.0), "align_corners": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_bilinear_upsampling_is_deferred(call):
    x = logits()
    with Deferred():
        given = F.interpolate(x, mode="bilinear", **CALLS[call])
    assert isinstance(given, UpsampledLogits)
    assert same_bits(given + 0, F.interpolate(x, mode="bilinear", **CALLS[call]))


@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ((2, 5, 6, 7), {"size": (24, 28)}),  # nearest
        ((2, 5, 6, 7), {"size": (24, 28), "mode": "bicubic"}),
        ((2, 5, 6, 7), {"size": (24, 28), "mode": "bilinear", "antialias": True}),
        ((2, 5, 6, 7), {"scale_factor": 2.3, "mode": "bilinear"}),
        ((2, 5, 7), {"size": 14, "mode": "linear"}),
        ((0, 5, 6, 7), {"size": (24, 28), "mode": "bilinear"}),
    ],
)
def test_other_resizes_are_not_deferred(shape, call):
    x = logits(*shape)
    with Deferred():
        given = F.interpolate(x, **call)
    assert type(given) is torch.Tensor and torch.equal(given, F.interpolate(x, **call))


def test_only_upsampling_to_the_size_is_deferred():
    with Deferred((24, 28)):
        other = F.interpolate(logits(), (24, 24), mode="bilinear")
        once = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=True)(logits())
        twice = F.interpolate(once, (24, 28), mode="bilinear")
    assert type(other) is torch.Tensor and once is twice and twice.align_corners
