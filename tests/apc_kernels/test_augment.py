"""Tests augment by its definition, and for equal bits with every backend, instruction set, layout and thread count."""

import itertools
from fractions import Fraction

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import apc_kernels
from apc_kernels.ops.augment import STEPS

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
EVERY = [("brightness", 7.3), ("contrast", 1 / 3), ("saturation", 1.37), ("hue", -11), ("contrast", 2.2)]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])


def image(height, width, seed=0):
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def interleaved(x):
    """Returns an image with adjacent channels, as decoders leave them."""
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def sliced(x):
    larger = image(x.shape[1] + 3, x.shape[2] + 5, seed=9)
    return larger[:, 2:-1, 4:-1].copy_(x)


def sliced_interleaved(x):
    return interleaved(image(x.shape[1] + 3, x.shape[2] + 5, seed=9))[:, 2:-1, 4:-1].copy_(x)


def transposed(x):
    return x.mT.contiguous().mT


def colors():
    """Returns 20,000 colours, and all between which something changes: grey, black, equal channels, the ends."""
    some = image(100, 200)
    corners = torch.tensor(list(itertools.product((0, 1, 2, 127, 128, 254, 255), repeat=3)), dtype=torch.uint8)
    return torch.cat([some.flatten(1), some.flatten(1) // 32 + 90, corners.T], 1)[:, None]


# By definition


@BACKENDS
@pytest.mark.parametrize("size", [(2, 60), (7, 90), (13, 40), (40, 13), (26, 38), (57, 91)], ids=str)
def test_resized_as_exact_numbers_say(size, backend):
    """PyTorch's interpolation of exact numbers along each axis, with weights of 8 binary places, rounded at the end."""
    given = image(26, 38)

    def weights(source, resized):
        exact = F.interpolate(torch.eye(source, dtype=torch.float64)[None], resized, mode="linear")[0].T
        rounded = (exact * 256).round() / 256
        assert (rounded.sum(1) == 1).all()  # no two halves that both go up
        return rounded

    rows, columns = weights(26, size[0]), weights(38, size[1])
    expected = (torch.einsum("yi,cij,xj->cyx", rows, given.double(), columns) + 0.5).floor()
    with apc_kernels.backend(backend):
        assert torch.equal(apc_kernels.augment(given, size).double(), expected)


def opencv(pixel, turn, factor):
    """Its integers, without its tables' roundings hidden in floats: 12 binary places of each quotient."""
    red, green, blue = pixel
    value, chroma = max(pixel), max(pixel) - min(pixel)
    if chroma == 0:
        return pixel
    of_each = (red, green - blue), (green, blue - red + 2 * chroma), (blue, red - green + 4 * chroma)
    sixths = next(sixths for level, sixths in of_each if level == value)
    hue = (sixths * round(Fraction(30 * 4096, chroma)) + 2048 >> 12) % 180
    saturation = chroma * round(Fraction(255 * 4096, value)) + 2048 >> 12
    multiplied = torch.tensor(float(saturation)) * factor  # in float32, as mmsegmentation's
    saturation, hue = min(int(multiplied), 255), (hue + turn) % 180
    share = [Fraction(min(max(abs(abs(hue - o) - 90), 30), 60) - 30, 30) for o in (90, 150, 30)]
    return tuple(int(value - value * Fraction(saturation, 255) * w) for w in share)


@BACKENDS
@pytest.mark.parametrize(
    ("step", "value"), [("hue", 0), ("hue", -180), ("hue", 17), ("hue", -77), ("saturation", 1.37), ("saturation", 255)]
)
def test_colors_by_definition(step, value, backend):
    given = colors()[..., ::37]
    with apc_kernels.backend(backend):
        changed = apc_kernels.augment(given, steps=[(step, value)])
    turn, factor = (value, 1.0) if step == "hue" else (0, value)
    for pixel, found in zip(given.flatten(1).T.tolist(), changed.flatten(1).T.tolist(), strict=True):
        assert tuple(found) == tuple(opencv(tuple(pixel), turn, factor)), pixel


@BACKENDS
@pytest.mark.parametrize(("factor", "delta"), [(1, -255), (1, -0.001), (1, 31.9), (0, 0), (1 / 3, 0), (255, 0)])
def test_levels_are_clamped_and_cut_off(factor, delta, backend):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    step = ("brightness", delta) if delta else ("contrast", factor)
    with apc_kernels.backend(backend):
        changed = apc_kernels.augment(levels, steps=[step])
    assert torch.equal(changed, (levels.float() * factor + delta).clamp(0, 255).to(torch.uint8))


@BACKENDS
def test_normalised_at_last(backend):
    given = image(9, 11)
    with apc_kernels.backend(backend):
        levels, found = (apc_kernels.augment(given, steps=EVERY, **more) for more in ({}, {"mean": MEAN, "std": STD}))
    assert found.dtype == torch.float32
    mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (MEAN, STD))
    torch.testing.assert_close(found.double(), (levels - mean) / std, rtol=1e-6, atol=1e-6)


@BACKENDS
def test_a_window_is_what_it_is_in_the_whole(backend):
    given, size, (top, left, height, width) = image(31, 47), (53, 29), (5, 3, 40, 20)
    with apc_kernels.backend(backend):
        whole = apc_kernels.augment(given, size, steps=EVERY)
        part = apc_kernels.augment(given, size, (top, left, height, width), steps=EVERY)
        flipped = apc_kernels.augment(given, size, (top, left, height, width), flip=True, steps=EVERY)
    assert torch.equal(part, whole[:, top : top + height, left : left + width])
    assert torch.equal(flipped, part.flip(2))
    assert part.is_contiguous()


def test_nothing_asked_for_changes_nothing():
    given = image(5, 7)
    assert torch.equal(apc_kernels.augment(given), given)


# The same bits


def values(name):
    low, high = STEPS[name]
    return st.integers(low, high) if name == "hue" else st.floats(low, high, width=32) | st.sampled_from([low, 1, high])


@st.composite
def calls(draw):
    """Draws arguments of any kind, sizes that share no factor, windows at the edges."""
    lengths = st.integers(1, 70)
    size = draw(lengths), draw(lengths)
    height, width = (draw(st.integers(1, n)) for n in size)
    window = draw(st.integers(0, size[0] - height)), draw(st.integers(0, size[1] - width)), height, width
    names = draw(st.lists(st.sampled_from(list(STEPS)), max_size=4))
    options = {"flip": draw(st.booleans()), "steps": [(name, draw(values(name))) for name in names]}
    options |= {"mean": MEAN, "std": STD} if draw(st.booleans()) else {}
    layout = draw(st.sampled_from([torch.clone, interleaved, sliced, sliced_interleaved, transposed]))
    return layout(image(draw(lengths), draw(lengths), draw(st.integers(0, 99)))), size, window, options


def on(backend, *arguments, **options):
    with apc_kernels.backend(backend):
        return apc_kernels.augment(*arguments, **options)


@settings(max_examples=150, deadline=None)
@given(call=calls())
def test_kernel_and_reference(call):
    given, size, window, options = call
    found, expected = (on(name, given, size, window, **options) for name in ("cpp", "reference"))
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize(
    "step", [*((name, value) for name in STEPS for value in STEPS[name]), ("hue", 59), ("saturation", 0.61)], ids=str
)
def test_kernel_and_reference_on_many_colors(step):
    given = colors()
    assert torch.equal(on("cpp", given, steps=[step]), on("reference", given, steps=[step]))


@pytest.mark.parametrize("layout", [interleaved, sliced, sliced_interleaved, transposed], ids=lambda f: f.__name__)
def test_layouts_are_read_where_they_lie(layout, forbid_copies):
    given = image(23, 31)
    expected, given = apc_kernels.augment(given, (40, 17), steps=EVERY), layout(given)
    forbid_copies()
    assert torch.equal(apc_kernels.augment(given, (40, 17), steps=EVERY), expected)


def test_one_channel_three_times():
    grey = image(8, 9)[:1].expand(3, -1, -1)
    assert torch.equal(apc_kernels.augment(grey, (11, 5)), apc_kernels.augment(grey.contiguous(), (11, 5)))


def test_any_number_of_threads(threads):
    given, found = interleaved(image(300, 500)), []
    for count in (1, 2, 3):
        threads(count)
        found.append(apc_kernels.augment(given, (411, 777), steps=EVERY, mean=MEAN, std=STD))
    assert all(torch.equal(other, found[0]) for other in found[1:])


@instruction_sets.others
def test_every_instruction_set(isa, tmp_path):
    """Every other set gives the bits of the one that this process has chosen."""
    given, size = interleaved(image(97, 120)), (83, 211)
    options = {"flip": True, "steps": EVERY, "mean": MEAN, "std": STD}
    expected = apc_kernels.augment(given, size, **options)
    file = tmp_path / "call.pt"
    torch.save((given, size, options, expected), file)
    program = f"""
import torch, apc_kernels
image, size, options, expected = torch.load({str(file)!r})
with apc_kernels.backend("cpp"):
    assert torch.equal(apc_kernels.augment(image, size, **options), expected)
"""
    instruction_sets.run(isa, program)


# As an operation


@BACKENDS
def test_opcheck(backend):
    with apc_kernels.backend(backend):
        for mean, std in (([], []), (list(MEAN), list(STD))):
            arguments = (interleaved(image(9, 12)), [20, 7], [3, 1, 12, 5], True, [0, 3], [4.5, -7.0], mean, std)
            torch.library.opcheck(torch.ops.apc_kernels.augment.default, arguments)


def prepared(x):
    return apc_kernels.augment(x, (12, 20), (1, 2, 8, 16), flip=True, steps=EVERY, mean=MEAN, std=STD)


def test_compiled_whole():
    given = image(9, 12)
    assert torch.equal(torch.compile(prepared, fullgraph=True, backend="aot_eager")(given), prepared(given))


def test_exported_with_stock_operators_for_any_size():
    class Prepare(torch.nn.Module):
        def forward(self, x):
            return prepared(x)

    sizes = {"x": {1: torch.export.Dim("height", min=2, max=999), 2: torch.export.Dim("width", min=2, max=999)}}
    program = torch.export.export(Prepare(), (image(9, 12),), dynamic_shapes=sizes)
    assert not any("apc_kernels" in str(node.target) for node in program.graph.nodes)
    for size in ((9, 12), (31, 8)):
        assert torch.equal(program.module()(image(*size)), prepared(image(*size)))


X = torch.zeros(3, 4, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: apc_kernels.augment(X.numpy()), TypeError, "image: expected a uint8 tensor, got ndarray"),
        (lambda: apc_kernels.augment(X.float()), TypeError, "image: expected a uint8 tensor, got float32"),
        (
            lambda: apc_kernels.augment(X[None]),
            ValueError,
            r"image: expected the shape \(3, H, W\), got \(1, 3, 4, 6\)",
        ),
        (lambda: apc_kernels.augment(X[:1]), ValueError, r"image: expected the shape \(3, H, W\), got \(1, 4, 6\)"),
        (lambda: apc_kernels.augment(X[:, :0]), ValueError, r"image: expected a height and width of 1 to .*\(0, 6\)"),
        (lambda: apc_kernels.augment(X, (0, 4)), ValueError, r"size: expected a height and width of 1 to .*\(0, 4\)"),
        (lambda: apc_kernels.augment(X, (2**29, 4)), ValueError, "size: expected a height and width of 1 to 536870911"),
        (lambda: apc_kernels.augment(X, 4), TypeError, r"size: expected integers \(h, w\), got 4"),
        (lambda: apc_kernels.augment(X, (4, 4.5)), TypeError, r"size: expected integers \(h, w\), got \(4, 4.5\)"),
        (lambda: apc_kernels.augment(X, (4, 4, 4)), ValueError, r"size: expected \(h, w\), got \(4, 4, 4\)"),
        (lambda: apc_kernels.augment(X, (4, 4), (0, 0)), ValueError, r"window: expected \(top, left, height, width\)"),
        (
            lambda: apc_kernels.augment(X, (5, 4), (1, 0, 5, 4)),
            ValueError,
            r"window: expected a window inside the resized image \(5, 4\), got \(1, 0, 5, 4\)",
        ),
        (
            lambda: apc_kernels.augment(X, None, (-1, 0, 2, 2)),
            ValueError,
            "window: expected a window inside the resized image",
        ),
        (
            lambda: apc_kernels.augment(X, None, (0, 0, 2, 0)),
            ValueError,
            "window: expected a window inside the resized image",
        ),
        (
            lambda: apc_kernels.augment(X, steps=[("gamma", 2)]),
            ValueError,
            "steps: expected brightness, contrast, saturation, hue; got 'gamma'",
        ),
        (
            lambda: apc_kernels.augment(X, steps=["hue"]),
            TypeError,
            "steps: expected pairs of name and value, got 'hue'",
        ),
        (lambda: apc_kernels.augment(X, steps=[("hue", "a")]), TypeError, "hue: expected a number, got 'a'"),
        (lambda: apc_kernels.augment(X, steps=[("hue", 0.5)]), ValueError, "hue: expected whole steps of two degrees"),
        (
            lambda: apc_kernels.augment(X, steps=[("contrast", float("nan"))]),
            ValueError,
            "contrast: expected a number from 0 to 255, got nan",
        ),
        (lambda: apc_kernels.augment(X, steps=[("brightness", 256)]), ValueError, "brightness: expected a number from"),
        (lambda: apc_kernels.augment(X, mean=MEAN), ValueError, "mean, std: expected three numbers each, std positive"),
        (lambda: apc_kernels.augment(X, mean=MEAN, std=(1, 0, 1)), ValueError, "mean, std: expected three numbers"),
        (lambda: apc_kernels.augment(X, mean=(1,), std=(1,)), ValueError, "mean, std: expected three numbers"),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_raw_operator_checks_what_it_is_given():
    def call(image=X, size=(4, 6), window=(0, 0, 4, 6), kinds=(), values=(), mean=(), std=(), out=X):
        torch.ops.apc_kernels_cpp.augment(
            image, list(size), list(window), False, list(kinds), list(values), list(mean), list(std), out.clone()
        )

    call()
    for arguments, message in (
        ({"image": X.float()}, "image: expected"),
        ({"image": X[:2]}, "image: expected size 3"),
        ({"image": X[:, :0]}, "image, size: expected 1 to"),
        ({"size": (4,)}, "two and four numbers"),
        ({"window": (0, 1, 4, 6)}, "window: expected a part"),
        ({"window": (0, 0, 4, 2**62)}, "window: expected a part"),
        ({"kinds": (4,), "values": (1.0,)}, "kinds: expected 0 to 3, got 4"),
        ({"kinds": (1,)}, "kinds, values: expected as many"),
        ({"mean": MEAN}, "mean, std: expected 3"),
        ({"mean": MEAN, "std": STD}, "out: expected"),
        ({"out": X.float()}, "out: expected"),
        ({"out": X[:, 1:]}, "out: expected size 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**arguments)
