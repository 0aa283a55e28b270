"""Tests that images of every kind and size get the labels of normalisation, the network and one resize."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from stand_in import CLASSES, IMAGE, Network, draw_image, picture, view

import apcnet
from apcnet import draw, inference
from apcnet.data.augment import view_sizes
from apcnet.data.files import read_image, read_mask
from apcnet.inference import Protocol, prediction
from apcnet.inference.prediction import predict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network():
    return Network()


# Kinds of images


@pytest.mark.parametrize(
    "kind",
    {
        "path": lambda path: path,
        "string": str,
        "PIL": lambda path: picture(IMAGE),
        "opened": Image.open,
        "array": lambda path: IMAGE.permute(1, 2, 0).numpy(),
        "read-only": lambda path: np.asarray(picture(IMAGE)),
        "mirrored twice": lambda path: IMAGE.permute(1, 2, 0).numpy()[:, ::-1].copy()[:, ::-1],
        "tensor": lambda path: IMAGE,
        "columns first": lambda path: IMAGE.mT.contiguous().mT,
    }.items(),
    ids=lambda kind: kind[0],
)
def test_every_kind_of_image(tmp_path, network, kind):
    picture(IMAGE).save(tmp_path / "i.png")
    seen = predict(network, kind[1](tmp_path / "i.png"))
    assert torch.equal(seen.labels, inference.labels(network, view(IMAGE))[0])
    assert torch.equal(seen.image, IMAGE) and len(seen.labels.unique()) > 1
    assert seen.classes == CLASSES and seen.palette == Network.palette


@pytest.mark.parametrize("of", [torch.Tensor.clone, torch.Tensor.numpy], ids=["tensor", "array"])
def test_grey_levels(network, of):
    grey = IMAGE[1]
    assert torch.equal(predict(network, of(grey)).image, grey.expand(3, -1, -1))


def test_what_is_predicted_is_a_copy(network):
    given = IMAGE.clone()
    seen = predict(network, given)
    given.zero_()
    assert torch.equal(seen.image, IMAGE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_pil_images_are_taken_as_files_are(tmp_path, network, mode):
    """Tests that alpha is dropped, palettes are expanded, and 16-bit levels keep their upper 8 bits."""
    if mode == "I;16":
        image = Image.fromarray(IMAGE[0].numpy().astype(np.uint16) * 256 + 77)
    else:
        image = picture(IMAGE).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(IMAGE[2].numpy()))
    assert image.mode == mode
    image.save(tmp_path / "i.tif")
    from_file, direct = predict(network, [tmp_path / "i.tif", image])
    assert torch.equal(from_file.image, direct.image) and torch.equal(from_file.labels, direct.labels)
    assert torch.equal(direct.image, read_image(tmp_path / "i.tif"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, network, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(IMAGE).save(tmp_path / "i.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "i.jpg") as opened:
        by_path, by_image = predict(network, (tmp_path / "i.jpg", opened))
        assert opened.size == (44, 30)  # it is not turned itself
    assert torch.equal(by_path.labels, by_image.labels)
    assert by_path.labels.shape == by_path.image.shape[1:] == ((30, 44) if orientation < 5 else (44, 30))


@pytest.mark.parametrize(
    "together", [list, tuple, torch.stack, lambda images: np.stack([i.permute(1, 2, 0) for i in images])]
)
def test_several_images(network, together):
    images = [IMAGE, IMAGE.flip(1), IMAGE.flip(2)]
    seen = predict(network, together(images))
    assert isinstance(seen, list) and len(seen) == 3
    for one, image in zip(seen, images, strict=True):
        assert torch.equal(one.labels, predict(network, image).labels)


def test_no_images(network):
    assert predict(network, []) == []


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (
            IMAGE.float() / 255,
            TypeError,
            "uint8, got torch.float32; what is normalised already goes to apcnet.inference",
        ),
        (IMAGE.int(), TypeError, "expected levels of 0 to 255 as uint8, got torch.int32$"),
        (np.zeros((4, 5, 3), np.uint16), TypeError, "as uint8, got uint16"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"expected the shape \(H, W, 3\) or \(H, W\) .*got \(3, 4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), ValueError, r"got \(4, 5, 4\)"),
        (
            torch.zeros(4, 5, 3, dtype=torch.uint8),
            ValueError,
            r"expected the shape \(3, H, W\) or \(H, W\) .*\(4, 5, 3\)",
        ),
        (torch.zeros(3, 0, 3, dtype=torch.uint8), ValueError, r"without zeros, got \(3, 0, 3\)"),
        (Image.new("F", (4, 5)), ValueError, r"expected 8 or 16 bits for each channel, got 32 \(Pillow's mode F\)"),
        (None, TypeError, "expected a path, a PIL image, an array, a tensor or several of these, got NoneType"),
    ],
)
def test_what_is_no_image(network, image, error, message):
    with pytest.raises(error, match=f"^images: .*{message}"):
        predict(network, image)
    with pytest.raises(error, match=rf"^images\[1\]: .*{message}"):
        predict(network, [IMAGE, image])


def test_broken_and_missing_files(tmp_path, network):
    (tmp_path / "i.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"i\.png: expected an image in a format that Pillow reads"):
        predict(network, tmp_path / "i.png")
    with pytest.raises(FileNotFoundError, match=r"away\.png"):
        predict(network, tmp_path / "away.png")


# Ways through the network


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 9), (5, 300), (129, 65)], ids=str)
def test_any_size(network, size):
    image = draw_image(*size)
    labels = predict(network, image).labels
    assert labels.shape == size and torch.equal(labels, inference.labels(network, view(image))[0])


@pytest.mark.parametrize("model", ["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn", "upernet"])
def test_models_take_a_single_pixel(model):
    segmentor = apcnet.create(model, "resnet18", 4, width=8, stem_width=8, channels=8)
    assert predict(segmentor, draw_image(1, 1)).labels.shape == (1, 1)
    assert predict(segmentor, draw_image(9, 70)).labels.shape == (9, 70)


@pytest.mark.parametrize("align_corners", [False, True])
def test_scale(align_corners):
    network, image = Network(align_corners=align_corners), draw_image(60, 90)
    labels = predict(network, image, Protocol(test_scale=(64, 32))).labels
    assert network.seen == [(1, 3, 32, 48)]
    assert torch.equal(labels, inference.labels(network, view(image, (32, 48)), size=(60, 90))[0])
    once = Protocol(test_scale=(64, 32), single_resize=True)
    straight = predict(network, image, once).labels
    assert torch.equal(straight, inference.labels(network, view(image, (32, 48)), once, size=(60, 90))[0])
    assert not torch.equal(labels, straight)


@pytest.mark.parametrize("scale", [None, (64, 32)])
@pytest.mark.parametrize(("ratios", "flip"), [((1.0,), True), ((0.5, 1.0, 1.5), False), ((0.75, 1.25), True)])
def test_several_scales_and_flips(network, ratios, flip, scale):
    image = draw_image(60, 90)
    views = [view(image, size) for size in view_sizes((60, 90), ratios, scale)]
    protocol = Protocol(test_scale=scale, ratios=ratios, flip=flip)
    expected = inference.labels(network, views, protocol, size=(60, 90))[0]
    assert torch.equal(predict(network, image, protocol).labels, expected)
    assert not torch.equal(predict(network, image, Protocol(test_scale=scale)).labels, expected)


def test_one_scale_other_than_the_image(network):
    image = draw_image(60, 90)
    expected = inference.labels(network, view(image, (30, 45)), size=(60, 90))[0]
    assert torch.equal(predict(network, image, Protocol(ratios=(0.5,))).labels, expected)


@pytest.mark.parametrize("scale", [None, (120, 80)])
@pytest.mark.parametrize("flip", [False, True])
def test_windows(network, scale, flip):
    image, protocol = draw_image(60, 90), Protocol(test_scale=scale, window=(33, 48), stride=(20, 32), flip=flip)
    images = view(image, (80, 120) if scale else (60, 90))
    expected = inference.labels(network, images, protocol, size=(60, 90))[0]
    assert torch.equal(predict(network, image, protocol).labels, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 0}, "max_pixels: expected a positive integer, got 0"),
        ({"precision": "bfloat"}, "precision: expected one of .* did you mean 'bfloat16'"),
    ],
)
def test_what_makes_no_sense(network, options, message):
    with pytest.raises(ValueError, match=message):
        predict(network, IMAGE, **options)


def test_image_of_which_nothing_is_left(network):
    with pytest.raises(ValueError, match=r"^images\[1\]: scale: nothing is left of an image of \(1, 90\)"):
        predict(network, [IMAGE, draw_image(1, 90)], Protocol(test_scale=(16, 16)))


# Models


def test_the_mode_of_the_model_is_restored(network):
    """Tests that every module is in its previous mode afterwards, also after an error."""
    expected = predict(network, IMAGE).labels
    network.frozen = torch.nn.BatchNorm2d(3)
    network.train()
    network.frozen.eval()
    assert torch.equal(predict(network, IMAGE).labels, expected)  # without dropout
    assert network.training and network.dropout.training and not network.frozen.training
    with pytest.raises(ValueError, match="nothing is left"):
        predict(network, draw_image(1, 90), Protocol(test_scale=(9, 9)))
    assert network.training and network.dropout.training and not network.frozen.training


def test_gradients_are_not_kept_and_not_switched_off_for_good(network):
    requires = []
    network.register_forward_hook(lambda module, args, output: requires.append(output.requires_grad))
    predict(network, IMAGE, max_pixels=500)
    assert requires and not any(requires) and torch.is_grad_enabled()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_precision(network, precision):
    dtypes = []
    network.register_forward_hook(lambda module, args, output: dtypes.append(F.linear(args[0], args[0][0, 0]).dtype))
    labels = predict(network, draw_image(40, 40), precision=precision).labels
    assert dtypes == [getattr(torch, precision)]
    assert (labels == predict(network, draw_image(40, 40)).labels).float().mean() > 0.95


def test_model_in_double_precision(network):
    """Tests that images are converted to the dtype of the weights."""
    expected = inference.labels(network.double(), view(IMAGE).double())[0]
    assert torch.equal(predict(network, IMAGE).labels, expected)


def test_model_file(tmp_path):
    model = apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8)
    model.classes, model.palette = ("a", "b", "c"), ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    model.mean, model.std = Network.mean, Network.std
    model.save(tmp_path / "m.safetensors")
    for file in (tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
        seen = predict(file, IMAGE)
        assert torch.equal(seen.labels, inference.labels(model.eval(), view(IMAGE))[0])
        assert (seen.classes, seen.palette) == (model.classes, model.palette)


def test_model_without_names_and_colours():
    seen = predict(apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8), IMAGE)
    assert seen.classes == ("class 0", "class 1", "class 2") and seen.palette == draw.palette(3)


@pytest.mark.parametrize("model", [torch.nn.Conv2d(3, 2, 1), 7, len])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"model: expected one of apcnet\.create or apcnet\.load, or its file, got"):
        predict(model, IMAGE)


# What is seen


def known(labels, classes=CLASSES, palette=Network.palette):
    return prediction.Prediction(labels, draw_image(*labels.shape), classes, palette)


def test_shares():
    labels = torch.tensor([[2, 2, 2], [0, 4, 0], [1, 1, 1]], dtype=torch.uint8)
    expected = [("road", 1 / 3), ("car", 1 / 3), ("sky", 2 / 9), ("wall", 1 / 9)]
    assert list(known(labels).shares().items()) == expected


def test_overlay():
    seen = known(torch.tensor([[2, 2, 0]], dtype=torch.uint8).repeat(90, 200))
    plain = seen.overlay(opacity=0.3, legend=False)
    assert plain.tobytes() == draw.overlay(seen.image, seen.labels, seen.palette, 0.3).tobytes()
    page = seen.overlay(0.3)
    assert page.width == plain.width == 600 and page.height > plain.height == 90
    assert page.crop((0, 0, 600, 90)).tobytes() == plain.tobytes()
    assert seen.overlay().crop((0, 0, 600, 90)).tobytes() == seen.overlay(0.5, legend=False).tobytes()


@pytest.mark.parametrize("count", [2, 5, 255, 256])
def test_labels_are_saved_with_their_colours(tmp_path, count):
    labels = torch.arange(count).repeat(3, 1).to(torch.uint8)
    seen = known(labels, tuple(map(str, range(count))), draw.palette(count))
    seen.save(tmp_path / "l.png")
    assert torch.equal(read_mask(tmp_path / "l.png"), labels)
    with Image.open(tmp_path / "l.png") as picture:
        assert picture.mode == "P"
        assert picture.convert("RGB").tobytes() == seen.colours().tobytes()


def test_labels_of_more_classes_than_a_byte_holds(tmp_path):
    seen = predict(Network(300), IMAGE)
    assert seen.labels.dtype == torch.int16 and len(seen.palette) == 5
    seen.save(tmp_path / "l.png")
    with Image.open(tmp_path / "l.png") as picture:
        assert picture.mode == "I;16" and np.array_equal(np.asarray(picture), seen.labels)


def test_labels_are_not_saved_as_anything_but_png(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected NAME\.png, which keeps labels as they are, got .*l\.jpg"):
        known(torch.zeros(2, 2).byte()).save(tmp_path / "l.jpg")
    assert not list(tmp_path.iterdir())
