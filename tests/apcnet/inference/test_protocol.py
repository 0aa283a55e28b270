"""Tests labels, confusion matrices and probabilities of every protocol against plain PyTorch code."""

import pytest
import torch
import torch.nn.functional as F
from naive_inference import averaged, resized, slid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import apc_kernels
from apcnet import inference
from apcnet.inference import Protocol
from apcnet.inference.logits import slide_bands

pytestmark = pytest.mark.usefixtures("one_thread")


class Network(torch.nn.Module):
    """Stands in for a model: its logits, at a quarter of the resolution, depend on the surroundings of a pixel."""

    def __init__(self, classes=5, align_corners=False):
        super().__init__()
        self.align_corners = align_corners
        generator = torch.Generator().manual_seed(classes)
        self.near = torch.nn.Parameter(torch.randn(classes, 3, 5, 5, generator=generator))
        self.everywhere = torch.nn.Parameter(torch.randn(classes, 3, generator=generator))
        self.eval()

    def forward(self, images):
        context = (images.mean((2, 3)) @ self.everywhere.mT)[:, :, None, None]
        return F.conv2d(images, self.near, stride=4, padding=2).tanh() + context


def draw(batch, height, width, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height), dtype=dtype)


def close(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def agree(labels, scores):
    """Checks that labels have the largest score, up to rounding."""
    assert labels.dtype == torch.uint8
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    return labels.shape == chosen.shape and (scores.amax(1) - chosen).max() <= 1e-4


class Allocations(TorchDispatchMode):
    """Records the number of elements of the largest floating-point tensor that any operator returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor._is_view():
                self.largest = max(self.largest, tensor.numel())
        return result


# Windows


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((64, 96), (32, 32), (32, 32)),  # side by side
        ((65, 97), (33, 51), (21, 32)),  # the last ones are moved back inside
        ((65, 97), (33, 33), (7, 11)),  # many over each pixel
        ((40, 70), (64, 32), (32, 31)),  # higher than the image
        ((23, 31), (64, 64), (43, 43)),  # larger than the image
        ((32, 48), (32, 48), (1, 1)),  # as large as the image
        ((33, 49), (32, 48), (32, 48)),
    ],
    ids=str,
)
def test_sliding_window(size, crop, stride, align_corners):
    model, images = Network(align_corners=align_corners), draw(2, *size)
    with torch.no_grad():
        expected = slid(model, images, crop, stride)
        assert close(inference.slide_logits(model, images, crop, stride), expected)
    assert agree(inference.labels(model, images, Protocol(window=crop, stride=stride)), expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_whole_image(align_corners):
    model, images = Network(align_corners=align_corners), draw(2, 37, 54)
    with torch.no_grad():
        expected = resized(model(images), (37, 54), align_corners)
        assert torch.equal(inference.whole_logits(model, images), expected)
    assert agree(inference.labels(model, images), expected)
    assert torch.equal(inference.labels(model, images, size=(37, 54)), inference.labels(model, images))


def test_one_window_is_the_whole_image():
    model, images = Network(), draw(1, 30, 41)
    with torch.no_grad():
        whole = inference.whole_logits(model, images)
        assert torch.equal(inference.slide_logits(model, images, (30, 41), (20, 20)), whole)
        assert torch.equal(inference.slide_logits(model, images, (99, 99), (99, 99)), whole)


def test_the_same_bits_however_they_are_consumed():
    model, images, window = Network(), draw(2, 65, 97), ((33, 51), (21, 32))
    protocol = Protocol(window=window[0], stride=window[1])
    with torch.no_grad():
        logits = inference.slide_logits(model, images, *window)
        one_by_one = [inference.slide_logits(model, image, *window) for image in images.split(1)]
        bands = [(top, rows.clone()) for top, rows in slide_bands(model, images[:1], *window)]
    assert torch.equal(logits, torch.cat(one_by_one))
    assert [top for top, _ in bands] == [0, 21, 32] and [rows.shape[2] for _, rows in bands] == [21, 11, 33]
    assert torch.equal(torch.cat([rows for _, rows in bands], 2), logits[:1])
    labels = inference.labels(model, images, protocol)
    assert torch.equal(labels, apc_kernels.upsample_argmax(logits, (65, 97)))
    assert torch.equal(labels, inference.labels(model, images, protocol))


def test_labels_of_a_large_image_need_one_band_of_logits():
    model, image = Network(classes=40), draw(1, 300, 50)
    with Allocations() as streamed:
        labels = inference.labels(model, image, Protocol(window=(32, 32), stride=(20, 20)))
    with torch.no_grad(), Allocations() as formed:
        logits = inference.slide_logits(model, image, (32, 32), (20, 20))
    assert streamed.largest == 40 * 32 * 50 and formed.largest == 40 * 300 * 50
    assert torch.equal(labels, apc_kernels.upsample_argmax(logits, (300, 50)))


@pytest.mark.parametrize("infer", ["whole_logits", "slide_logits"])
def test_logits_are_differentiable(infer):
    model = Network()
    images, again = (draw(2, 41, 50).requires_grad_() for _ in range(2))
    window = ((24, 20), (15, 20)) if infer == "slide_logits" else ()
    logits = getattr(inference, infer)(model, images, *window)
    expected = slid(model, again, *window) if window else resized(model(again), (41, 50), False)
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    of_network = torch.autograd.grad((logits * cotangent).sum(), [images, model.near])
    for actual, wanted in zip(
        of_network, torch.autograd.grad((expected * cotangent).sum(), [again, model.near]), strict=True
    ):
        assert close(actual, wanted)


# Sizes


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(80, 121), (19, 30)], ids=str)
@pytest.mark.parametrize("window", [None, ((33, 40), (21, 32))], ids=["whole", "slide"])
def test_labels_go_through_the_size_of_the_network_input(size, window, align_corners):
    model, images = Network(align_corners=align_corners), draw(2, 40, 61)
    protocol = Protocol(window=window[0], stride=window[1]) if window else Protocol()
    labels = inference.labels(model, images, protocol, size=size)
    with torch.no_grad():
        first = slid(model, images, *window) if window else resized(model(images), (40, 61), align_corners)
    assert agree(labels, resized(first, size, align_corners))


def test_a_single_resize_is_another_thing():
    model, images = Network(), draw(2, 40, 61)
    labels = inference.labels(model, images, Protocol(single_resize=True), size=(80, 121))
    with torch.no_grad():
        assert agree(labels, resized(model(images), (80, 121), False))
    differing = (labels != inference.labels(model, images, size=(80, 121))).double().mean()
    assert 0 < differing < 0.05


def test_which_logits_are_formed():
    """Tests that logits at the input's size are stored for one image if a second resize follows, else for none."""
    model, images = Network(classes=30), draw(4, 64, 64)
    largest = {}
    for size, single in (((64, 64), False), ((128, 128), False), ((128, 128), True)):
        with Allocations() as made:
            inference.labels(model, images, Protocol(single_resize=single), size=size)
        largest[size, single] = made.largest
    of_network = 4 * 30 * 16 * 16
    assert largest == {((64, 64), False): of_network, ((128, 128), False): 30 * 64 * 64, ((128, 128), True): of_network}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(
    ("size", "protocol"),
    [
        ((40, 61), Protocol()),
        ((80, 121), Protocol()),
        ((80, 121), Protocol(single_resize=True)),
        ((40, 61), Protocol(window=(33, 40), stride=(21, 32))),
        ((19, 30), Protocol(window=(33, 40), stride=(21, 32))),
        ((80, 121), Protocol(flip=True)),
    ],
    ids=str,
)
def test_the_confusion_matrix_is_that_of_the_labels(size, protocol, align_corners):
    model, images = Network(align_corners=align_corners), draw(2, 40, 61)
    target = torch.randint(6, (2, *size), generator=torch.Generator().manual_seed(0))
    labels = inference.labels(model, images, protocol, size=size)
    counted = target != 5
    expected = torch.bincount(target[counted] * 5 + labels[counted], minlength=25).view(5, 5)
    assert torch.equal(inference.confusion(model, images, target, protocol, ignore_index=5), expected)


def test_the_confusion_matrix_of_a_large_image_needs_one_band_of_logits():
    model, image = Network(classes=40), draw(1, 300, 50)
    with Allocations() as made:
        inference.confusion(model, image, torch.zeros(1, 300, 50).byte(), Protocol(window=(32, 32), stride=(20, 20)))
    assert made.largest == 40 * 32 * 50


def test_more_classes_than_a_byte_holds():
    labels = inference.labels(Network(classes=300), draw(1, 24, 24), Protocol(window=(16, 16), stride=(8, 8)))
    assert labels.dtype == torch.int16 and labels.max() > 255


def test_logits_of_low_precision_are_resized_in_float32():
    class Rounded(Network):
        def forward(self, images):
            return super().forward(images).bfloat16()

    class Widened(Rounded):
        def forward(self, images):
            return super().forward(images).float()

    images, window = draw(1, 33, 47), ((20, 20), (13, 13))
    with torch.no_grad():
        assert close(inference.whole_logits(Rounded(), images), resized(Widened()(images), (33, 47), False))
        assert close(inference.slide_logits(Rounded(), images, *window), slid(Widened(), images, *window))


# Scales and flips

TWO_SCALES = Protocol(ratios=(1.0, 1.5), flip=True)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("window", [None, ((33, 40), (21, 32))], ids=["whole", "slide"])
def test_multi_scale(window, flip):
    model, size = Network(), (48, 73)
    views = [draw(2, height, width) for height, width in ((24, 37), (48, 73), (72, 109))]
    sliding = {"window": window[0], "stride": window[1]} if window else {}
    protocol = Protocol(ratios=(0.5, 1.0, 1.5), flip=flip, **sliding)
    probabilities = inference.probabilities(model, iter(views), protocol, size=size)
    with torch.no_grad():
        expected = averaged(model, views, size, flip, window)
    assert close(probabilities, expected) and not probabilities.requires_grad
    labels = inference.labels(model, (view for view in views), protocol, size=size)
    assert agree(labels, probabilities)


def test_the_views_need_not_exist_at_once():
    """Tests that a view is requested only after all passes over the previous one."""
    seen, model = [], Network()

    def watched(images):
        seen.append(tuple(images.shape[2:]))
        return model(images)

    watched.align_corners = False

    def views():
        for height in (16, 24):
            seen.append(height)
            yield draw(1, height, 20)

    inference.labels(watched, views(), TWO_SCALES, size=(20, 20))
    assert seen == [16, (16, 20), (16, 20), 24, (24, 20), (24, 20)]


def test_multi_scale_adds_into_one_buffer():
    """Tests that only one tensor has the size of the result, for any number of views."""
    model, size = Network(classes=30), (100, 100)
    with Allocations() as made:
        inference.probabilities(model, [draw(2, 32, 32), draw(2, 48, 48)], TWO_SCALES, size=size)
    assert made.largest == 2 * 30 * 100 * 100
    full = []

    class Buffers(Allocations):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            full.extend(
                tensor.data_ptr()
                for tensor in tree_leaves(result)
                if isinstance(tensor, torch.Tensor) and tensor.shape[2:] == size
            )
            return result

    with Buffers():
        result = inference.probabilities(model, [draw(1, 32, 32), draw(1, 48, 48)], TWO_SCALES, size=size)
    assert set(full) == {result.data_ptr()}


# Errors

IMAGES = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"images": torch.zeros(3, 16, 16)},
            ValueError,
            r"images: expected the shape \(B, 3, H, W\).* got \(3, 16, 16\)",
        ),
        ({"images": torch.zeros(0, 3, 16, 16)}, ValueError, r"images: .* got \(0, 3, 16, 16\)"),
        ({"images": IMAGES.byte()}, TypeError, "images: expected normalised images in floating point, got uint8"),
        ({"images": [[1.0]]}, TypeError, "images: expected a tensor, got list"),
        ({"size": (0, 4)}, ValueError, r"size: expected two positive integers, got \(0, 4\)"),
        ({"size": 4}, TypeError, "size: expected two integers, got 4"),
        ({"size": (4.5, 4)}, TypeError, r"size: expected two integers, got \(4.5, 4\)"),
        ({"protocol": Protocol(ratios=(1, 2))}, ValueError, r"images: expected .* ratios \(1.0, 2.0\), got 1 views"),
        ({"images": [IMAGES] * 2, "size": (4, 4)}, ValueError, r"images: expected .* ratios \(1.0,\), got 2 views"),
        ({"images": [IMAGES]}, TypeError, r"images: .* for several views, pass the images' size \(H, W\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        inference.labels(Network(), **{"images": IMAGES} | arguments)


def test_wrong_targets():
    with pytest.raises(ValueError, match=r"target: expected \(1, H, W\), one for each image, got \(2, 16, 16\)"):
        inference.confusion(Network(), IMAGES, torch.zeros(2, 16, 16).byte())
    with pytest.raises(TypeError, match="target: expected a tensor, got list"):
        inference.confusion(Network(), IMAGES, [[0]])


def test_wrong_views():
    model = Network()
    with pytest.raises(ValueError, match=r"images: expected a view at each of the ratios \(1.0, 1.5\), got 0 views"):
        inference.labels(model, [], TWO_SCALES, size=(4, 4))
    with pytest.raises(ValueError, match=r"images: expected 1 in each view, as in the first, got \(2, 3, 8, 8\)"):
        inference.labels(model, [IMAGES, torch.zeros(2, 3, 8, 8)], TWO_SCALES, size=(4, 4))


def test_wrong_windows():
    with pytest.raises(ValueError, match=r"stride: expected at most the window, \(8, 8\), got \(8, 9\)"):
        inference.slide_logits(Network(), IMAGES, (8, 8), (8, 9))
    with pytest.raises(ValueError, match=r"window: expected two sides of 1 or more, got \(8, -8\)"):
        inference.slide_logits(Network(), IMAGES, (8, -8), (8, 8))


def test_wrong_models():
    with pytest.raises(
        ValueError, match=r"model: expected evaluation mode, got a model in training mode; call model.eval\(\) first"
    ):
        inference.labels(Network().train(), IMAGES)

    def unresized(images):
        return images

    with pytest.raises(TypeError, match=r"model: expected an attribute align_corners \(bool\), function has none"):
        inference.labels(unresized, IMAGES)

    def several(images):
        return images, images

    with pytest.raises(TypeError, match=r"model: expected it to return logits \(1, K, h, w\), got tuple"):
        inference.whole_logits(several, IMAGES)
