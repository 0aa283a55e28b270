"""Images of every kind, size and number give the labels that normalising, the network and one resize give them."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import apcnet
from apcnet import draw, inference, prediction
from apcnet.data.augment import normalise, resize, view_sizes
from apcnet.data.files import read_image, read_mask
from apcnet.prediction import predict, predict_files

CLASSES = ("sky", "road", "car", "tree", "wall")


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)  # such small products are no work for more


class Network(torch.nn.Module):
    """Stands in for a model: logits at a quarter of the resolution; remembers the shapes it was given."""

    classes, palette = CLASSES, tuple((50 * i, 255 - 40 * i, 9) for i in range(5))
    mean, std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)

    def __init__(self, num_classes=5, align_corners=False):
        super().__init__()
        self.num_classes, self.align_corners, self.seen = num_classes, align_corners, []
        generator = torch.Generator().manual_seed(num_classes)
        self.near = torch.nn.Parameter(torch.randn(num_classes, 3, 5, 5, generator=generator))
        self.everywhere = torch.nn.Parameter(torch.randn(num_classes, 3, generator=generator))
        self.dropout = torch.nn.Dropout(0.5)
        self.eval()

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        context = (images.mean((2, 3)) @ self.everywhere.mT)[:, :, None, None]
        return self.dropout(F.conv2d(images, self.near, stride=4, padding=2).tanh() + context)


@pytest.fixture
def network():
    return Network()


def draw_image(height, width):
    """Levels (3, H, W) of blotches a few pixels wide."""
    generator = torch.Generator().manual_seed(height * 10000 + width)
    coarse = torch.rand(1, 3, height // 6 + 2, width // 6 + 2, generator=generator) * 255
    return F.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)


def picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def view(image, size=None):
    return normalise(image if size is None else resize(image, size), Network.mean, Network.std)[None]


def windows(size, crop, stride):
    """(top, bottom, left, right) of each."""

    def along(length, side, step):
        starts = range(0, max(length - side, 0) + step, step)
        return sorted({min(start, max(length - side, 0)) for start in starts})

    return [
        (top, min(top + crop[0], size[0]), left, min(left + crop[1], size[1]))
        for top in along(size[0], crop[0], stride[0])
        for left in along(size[1], crop[1], stride[1])
    ]


def averaged_over_windows(image, crop, stride, scores_of):
    """The mean of the scores (1, K, h, w) that a function gives to each window's levels."""
    size, total, hits = image.shape[1:], 0, 0
    for top, bottom, left, right in windows(size, crop, stride):
        around = (left, size[1] - right, top, size[0] - bottom)
        scores = scores_of(image[:, top:bottom, left:right])
        total, hits = total + F.pad(scores, around), hits + F.pad(torch.ones_like(scores[:1, :1]), around)
    return total / hits


def agree(labels, scores):
    """Labels are the largest score, or one that rounding cannot tell from it."""
    assert labels.dtype == torch.uint8 and labels.device.type == "cpu" and labels.shape == scores.shape[2:]
    chosen = scores[0].gather(0, labels.long()[None])[0]
    return (scores[0].amax(0) - chosen).max() <= 1e-4 and len(labels.unique()) > 1


# Kinds of images


IMAGE = draw_image(30, 44)


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
    """Alpha is dropped, palettes stand for their colours, of 16 bits the upper 8 are kept."""
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
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"expected the shape \(H, W, 3\) or \(H, W\), .*got \(3, 4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), ValueError, r"got \(4, 5, 4\)"),
        (
            torch.zeros(4, 5, 3, dtype=torch.uint8),
            ValueError,
            r"expected the shape \(3, H, W\) or \(H, W\), .*\(4, 5, 3\)",
        ),
        (torch.zeros(3, 0, 3, dtype=torch.uint8), ValueError, r"none of them 0, got \(3, 0, 3\)"),
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
    with pytest.raises(ValueError, match=r"i\.png: is no image"):
        predict(network, tmp_path / "i.png")
    with pytest.raises(FileNotFoundError, match=r"away\.png"):
        predict(network, tmp_path / "away.png")


# Ways through the network


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 9), (5, 300), (129, 65)], ids=str)
def test_any_size(network, size):
    image = draw_image(*size)
    labels = predict(network, image).labels
    assert labels.shape == size and torch.equal(labels, inference.labels(network, view(image))[0])


@pytest.mark.parametrize("model", ["apcnet", "pspnet", "encnet", "semantic_fpn", "fcn"])
def test_models_take_a_single_pixel(model):
    segmentor = apcnet.create(model, "resnet18", 4, width=8, stem_width=8, channels=8)
    assert predict(segmentor, draw_image(1, 1)).labels.shape == (1, 1)
    assert predict(segmentor, draw_image(9, 70)).labels.shape == (9, 70)


@pytest.mark.parametrize("align_corners", [False, True])
def test_scale(align_corners):
    network, image = Network(align_corners=align_corners), draw_image(60, 90)
    labels = predict(network, image, scale=(64, 32)).labels
    assert network.seen == [(1, 3, 32, 48)]
    assert torch.equal(labels, inference.labels(network, view(image, (32, 48)), (60, 90))[0])
    straight = predict(network, image, scale=(64, 32), single_resize=True).labels
    assert torch.equal(straight, inference.labels(network, view(image, (32, 48)), (60, 90), single_resize=True)[0])
    assert not torch.equal(labels, straight)


@pytest.mark.parametrize("scale", [None, (64, 32)])
@pytest.mark.parametrize(("ratios", "flip"), [((1.0,), True), ((0.5, 1.0, 1.5), False), ((0.75, 1.25), True)])
def test_several_scales_and_flips(network, ratios, flip, scale):
    image = draw_image(60, 90)
    views = [view(image, size) for size in view_sizes((60, 90), ratios, scale)]
    expected = inference.multi_scale_labels(network, views, (60, 90), flip=flip)[0]
    assert torch.equal(predict(network, image, scale=scale, ratios=ratios, flip=flip).labels, expected)
    assert not torch.equal(predict(network, image, scale=scale).labels, expected)


def test_one_scale_other_than_the_image(network):
    image = draw_image(60, 90)
    expected = inference.labels(network, view(image, (30, 45)), (60, 90))[0]
    assert torch.equal(predict(network, image, ratios=(0.5,)).labels, expected)


@pytest.mark.parametrize("scale", [None, (120, 80)])
@pytest.mark.parametrize("flip", [False, True])
def test_windows(network, scale, flip):
    image, window = draw_image(60, 90), {"crop_size": (33, 48), "stride": (20, 32)}
    views = [view(image, (80, 120) if scale else (60, 90))]
    if flip:
        expected = inference.multi_scale_labels(network, views, (60, 90), **window)[0]
    else:
        expected = inference.labels(network, views[0], (60, 90), **window)[0]
    seen = predict(network, image, scale=scale, window=(33, 48), stride=(20, 32), flip=flip)
    assert torch.equal(seen.labels, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0, 512)}, r"scale: expected two positive integers, got \(0, 512\)"),
        ({"scale": (512,)}, "scale: expected two positive integers"),
        ({"window": (32, 32)}, r"window, stride: expected both or neither, got \(32, 32\) and None"),
        ({"window": (32, 32), "stride": (40, 32)}, r"stride: \(40, 32\) leaves gaps between windows of \(32, 32\)"),
        ({"ratios": ()}, "ratios: expected positive numbers, at least one"),
        ({"ratios": (1.0, -1.0)}, "ratios: expected positive numbers"),
        ({"max_pixels": 0}, "max_pixels: expected a positive integer, got 0"),
        ({"precision": "bfloat"}, "precision: expected one of .* did you mean 'bfloat16'"),
        ({"single_resize": True, "flip": True}, "single_resize: windows, and what is averaged"),
        ({"single_resize": True, "window": (32, 32), "stride": (32, 32)}, "single_resize: windows"),
    ],
)
def test_what_makes_no_sense(tmp_path, network, options, message):
    with pytest.raises(ValueError, match=message):
        predict(network, IMAGE, **options)
    picture(IMAGE).save(tmp_path / "i.png")
    with pytest.raises(ValueError, match=message):
        predict_files(network, tmp_path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_image_of_which_nothing_is_left(network):
    with pytest.raises(ValueError, match=r"^images\[1\]: scale: nothing is left of an image of \(1, 90\)"):
        predict(network, [IMAGE, draw_image(1, 90)], scale=(16, 16))


# Large images


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(97, 140), (31, 200), (200, 3)], ids=str)
def test_large_images_go_in_tiles(size, align_corners):
    """Of 32 × 32 pixels, the root of what is allowed, each a third over the next."""
    network, image = Network(align_corners=align_corners), draw_image(*size)
    labels = predict(network, image, max_pixels=1030 if min(size) > 3 else 599).labels
    side = 32 if min(size) > 3 else 24
    crop, stride = (side, side), (2 * side // 3,) * 2
    assert {shape[2:] for shape in network.seen} == {(min(side, size[0]), min(side, size[1]))}
    expected = inference.labels(network, view(image), crop_size=crop, stride=stride)[0]
    assert torch.equal(labels, expected)
    scores = averaged_over_windows(image, crop, stride, lambda tile: inference.whole_logits(network, view(tile)))
    assert agree(labels, scores)


def test_largest_image_in_one_piece(network):
    predict(network, draw_image(20, 30), max_pixels=600)
    assert network.seen == [(1, 3, 20, 30)]
    predict(network, draw_image(20, 30), max_pixels=599)
    assert len(network.seen) > 2


def test_published_sizes_are_one_piece():
    assert prediction.MAX_PIXELS >= 1025 * 2049


@pytest.mark.parametrize(("ratios", "flip"), [((1.0,), True), ((0.5, 1.0, 1.5), True), ((1.5,), False)])
def test_tiles_at_several_scales(network, ratios, flip):
    """Every tile as an image of its own would be; tiles are so small that the largest scale is within bounds."""
    image, most = draw_image(70, 110), 2000
    labels = predict(network, image, ratios=ratios, flip=flip, max_pixels=most).labels
    assert max(shape[2] * shape[3] for shape in network.seen) <= most * 1.05  # sides are whole numbers
    side = int((most / max(ratios) ** 2) ** 0.5)

    def scores_of(tile):
        views = [view(tile, [round(n * ratio) for n in tile.shape[1:]]) for ratio in ratios]
        if not flip:
            logits = inference.whole_logits(network, views[0])
            return F.interpolate(logits, tuple(tile.shape[1:]), mode="bilinear")
        return inference.multi_scale_probabilities(network, views, tile.shape[1:], flip=True)

    assert agree(labels, averaged_over_windows(image, (side, side), (2 * side // 3,) * 2, scores_of))


def test_tiles_of_an_image_fitted_into_a_scale(network):
    image = draw_image(70, 110)
    labels = predict(network, image, scale=(220, 140), max_pixels=4000).labels
    assert {shape[2:] for shape in network.seen} == {(62, 62)}  # 31 × 31 pixels of the image

    def scores_of(tile, logits_of):
        logits = logits_of(view(tile, [2 * n for n in tile.shape[1:]]))
        return F.interpolate(logits, tuple(tile.shape[1:]), mode="bilinear")

    twice = averaged_over_windows(
        image, (31, 31), (20, 20), lambda tile: scores_of(tile, lambda x: inference.whole_logits(network, x))
    )
    once = averaged_over_windows(image, (31, 31), (20, 20), lambda tile: scores_of(tile, network))
    straight = predict(network, image, scale=(220, 140), max_pixels=4000, single_resize=True).labels
    assert agree(labels, twice) and agree(straight, once) and not agree(straight, twice)


def test_tiles_are_lower_where_a_band_of_them_would_be_large(network, monkeypatch):
    monkeypatch.setattr(prediction, "BAND", 5 * 400 * 20)
    monkeypatch.setattr(prediction, "LOWEST", 12)
    predict(network, draw_image(60, 400), max_pixels=1600)
    assert {shape[2:] for shape in network.seen} == {(20, 40)}
    network.seen.clear()
    predict(network, draw_image(60, 4000), max_pixels=1600)
    assert {shape[2:] for shape in network.seen} == {(12, 40)}


def test_probabilities_of_large_images_at_a_small_scale(network, monkeypatch):
    """They are never formed at the size of the image, and the labels are nearly the same."""
    image, sizes = draw_image(240, 360), []

    def remember(scores, size):
        sizes.append(tuple(scores.shape[2:]))
        return argmax(scores, size)

    argmax = prediction.upsample_argmax
    exact = predict(network, image, scale=(90, 60), flip=True).labels
    monkeypatch.setattr(prediction, "upsample_argmax", remember)
    labels = predict(network, image, scale=(90, 60), flip=True, max_pixels=6000).labels
    assert sizes == [(60, 90)] and {shape[2:] for shape in network.seen} == {(60, 90)}
    assert (labels == exact).float().mean() > 0.99


# Models


def test_the_model_is_left_as_it_was(network):
    """Part of it may be frozen in evaluation while the rest is in training; an error changes nothing about it."""
    expected = predict(network, IMAGE).labels
    network.frozen = torch.nn.BatchNorm2d(3)
    network.train()
    network.frozen.eval()
    assert torch.equal(predict(network, IMAGE).labels, expected)  # without dropout
    assert network.training and network.dropout.training and not network.frozen.training
    with pytest.raises(ValueError, match="nothing is left"):
        predict(network, draw_image(1, 90), scale=(9, 9))
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
    """Images go to the dtype that the weights have."""
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
    labels = torch.tensor([[2, 2, 2], [0, 4, 0]], dtype=torch.uint8)
    assert list(known(labels).shares().items()) == [("car", 1 / 2), ("sky", 1 / 3), ("wall", 1 / 6)]


def test_overlay():
    seen = known(torch.tensor([[2, 2, 0]], dtype=torch.uint8).repeat(90, 200))
    plain = seen.overlay(opacity=0.3, legend=False)
    assert plain.tobytes() == draw.overlay(seen.image, seen.labels, seen.palette, 0.3).tobytes()
    page = seen.overlay(0.3)
    assert page.width == plain.width == 600 and page.height > plain.height == 90
    assert page.crop((0, 0, 600, 90)).tobytes() == plain.tobytes()
    assert seen.overlay().crop((0, 0, 600, 90)).tobytes() == seen.overlay(0.5, legend=False).tobytes()


@pytest.mark.parametrize("count", [5, 255, 256])
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


# Files and folders


@pytest.fixture
def photos(tmp_path):
    """A folder of images and other things."""
    folder = tmp_path / "photos"
    for name in ("b.png", "a.PNG", "street/x.y.bmp", "street/deep/c.tif", ".hidden.png", ".cache/d.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = draw_image(20, 24 + len(name))
        picture(image).save(folder / name, {".PNG": "PNG"}.get(os.path.splitext(name)[1]))
    (folder / "notes.txt").write_text("no image")
    return folder


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_folder(tmp_path, network, photos):
    calls = []
    report = predict_files(network, photos, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert report == (4, []) and calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    names = ("a", "b", "street/deep/c", "street/x.y")
    assert files_in(tmp_path / "out") == sorted(f"{name}{end}" for name in names for end in (".png", "_overlay.jpg"))
    seen = predict(network, photos / "street/x.y.bmp")
    assert torch.equal(read_mask(tmp_path / "out/street/x.y.png"), seen.labels)
    with Image.open(tmp_path / "out/street/x.y_overlay.jpg") as overlay:
        expected = seen.overlay()
        assert overlay.format == "JPEG" and overlay.size == expected.size
        difference = np.asarray(overlay).astype(int) - np.asarray(expected)
        assert np.abs(difference).mean() < 6  # colours are kept at half the resolution


def test_options_reach_the_prediction(tmp_path, network, photos):
    predict_files(network, photos / "b.png", tmp_path, overlay="png", opacity=1.0, scale=(16, 16))
    assert files_in(tmp_path) == sorted([*(f"photos/{name}" for name in files_in(photos)), "b.png", "b_overlay.png"])
    seen = predict(network, photos / "b.png", scale=(16, 16))
    assert torch.equal(read_mask(tmp_path / "b.png"), seen.labels)
    with Image.open(tmp_path / "b_overlay.png") as overlay:
        assert overlay.tobytes() == seen.overlay(1.0).tobytes()


def test_labels_alone(tmp_path, network, photos):
    predict_files(network, [photos / "a.PNG", photos / "street"], tmp_path / "out", overlay=None)
    assert files_in(tmp_path / "out") == ["a.png", "deep/c.png", "x.y.png"]


def test_model_file_for_folders(tmp_path, photos):
    apcnet.create("fcn", "resnet18", 3, width=8, stem_width=8, channels=8).save(tmp_path / "m.safetensors")
    assert predict_files(tmp_path / "m.safetensors", photos, tmp_path / "out").done == 4


def test_broken_images_stop_none_of_the_others(tmp_path, network, photos):
    whole = (photos / "b.png").read_bytes()
    (photos / "b.png").write_bytes(whole[: len(whole) // 2])
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    picture(draw_image(1, 90)).save(photos / "thin.png")
    calls = []
    report = predict_files(
        network, photos, tmp_path / "out", progress=lambda *call: calls.append(call), scale=(16, 16), overlay=None
    )
    assert report.done == 3 and calls[-1] == (6, 6)
    assert files_in(tmp_path / "out") == ["a.png", "street/deep/c.png", "street/x.y.png"]
    broken, gone, thin = report.failures
    assert "photos/b.png: cannot be decoded" in broken
    assert "No such file" in gone and "gone.jpg" in gone
    assert "photos/thin.png: scale: nothing is left" in thin


def test_full_disk_stops_all(tmp_path, network, photos, monkeypatch):
    """It is no fault of an image."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(draw, "save", full)
    with pytest.raises(OSError, match="No space left"):
        predict_files(network, photos, tmp_path / "out")


def test_images_that_differ_in_their_suffix_keep_it(tmp_path, network, photos):
    picture(IMAGE).save(photos / "b.jpg")
    picture(IMAGE).save(photos / "street/b.jpg")
    predict_files(network, photos, tmp_path / "out")
    assert files_in(tmp_path / "out")[2:6] == ["b.jpg.png", "b.jpg_overlay.jpg", "b.png.png", "b.png_overlay.jpg"]
    assert (tmp_path / "out/street/b.png").exists()


def test_two_images_are_never_written_to_one_file(tmp_path, network, photos):
    picture(IMAGE).save(tmp_path / "b.png")
    predict_files(network, [photos, photos / "b.png"], tmp_path / "one")  # given twice, it is still one
    picture(IMAGE).save(photos / "b_overlay.png")
    predict_files(network, photos, tmp_path / "other")
    with pytest.raises(ValueError, match=r"b\.png and .*b_overlay\.png: both would be written to .*out/b_overlay\.png"):
        predict_files(network, photos, tmp_path / "out", overlay="png")
    with pytest.raises(ValueError, match=r"photos/x\.png and .*other/x\.png: both would be written to"):
        for folder in (photos, tmp_path / "other"):
            picture(IMAGE).save(folder / "x.bmp")
            (folder / "x.bmp").rename(folder / "x.png")
        predict_files(network, [photos / "x.png", tmp_path / "other/x.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_are_never_overwritten(tmp_path, network, photos):
    before = {name: (photos / name).read_bytes() for name in files_in(photos)}
    with pytest.raises(ValueError, match=r"out: .*photos/b\.png is one of the images that are read; choose another"):
        predict_files(network, photos, photos)
    with pytest.raises(ValueError, match="is one of the images"):
        predict_files(network, photos / "b.png", photos / "street" / "..", overlay=None)
    assert {name: (photos / name).read_bytes() for name in files_in(photos)} == before


def test_what_an_earlier_run_wrote_is_replaced_and_not_read(tmp_path, network, photos):
    first = predict_files(network, photos, photos / "out")
    written = files_in(photos / "out")
    assert predict_files(network, photos, photos / "out") == first
    assert files_in(photos / "out") == written


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (["photos", "nowhere"], FileNotFoundError, "nowhere: there is no such file or folder"),
        (["photos", "empty"], FileNotFoundError, r"empty: there are no images in it \(\.bmp, .*\.webp\)"),
        ([], FileNotFoundError, "sources: expected files or folders, got none"),
    ],
)
def test_nothing_to_predict(tmp_path, network, photos, sources, error, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        predict_files(network, [tmp_path / source for source in sources], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"overlay": "gif"}, "overlay: expected one of jpg, png"), ({"opacity": 2}, "opacity: expected 0 to 1, got 2")],
)
def test_overlays_that_cannot_be_drawn(tmp_path, network, photos, options, message):
    with pytest.raises(ValueError, match=message):
        predict_files(network, photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
