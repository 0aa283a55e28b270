"""Tests that images and masks of every format are read as they are, or refused by name."""

import io
import pickle
import struct
import zlib

import fake_trees
import numpy as np
import pytest
import torch
from PIL import Image

from apcnet.data.classes import UNKNOWN, label_table, read_classes, reduced_labels, voc_colors
from apcnet.data.files import Files, Pair, read_image, read_mask
from apcnet.data.layout import Listing, images_in, names_in

CLASSES, PALETTE = ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2))
ROTATIONS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud}
ROTATIONS |= {
    5: lambda x: np.rot90(np.fliplr(x)),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(np.fliplr(x), -1),
}
ROTATIONS |= {8: np.rot90}


@pytest.fixture
def photo():
    """Makes a smooth image, which JPEG keeps, without any symmetry."""
    y, x = np.mgrid[:24, :40]
    return np.stack([x * 6, y * 10, 255 - x * 3 - y * 5], -1).astype(np.uint8)


def planes(array):
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def png(values, depth, colors):
    """Encodes a 16-bit PNG file, which Pillow does not write in colour."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in values)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colors, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pair_of(tmp_path, image, mask, **options):
    Image.fromarray(image).save(tmp_path / "i.png")
    Image.fromarray(mask).save(tmp_path / "m.png", **options)
    return [Pair("one", tmp_path / "i.png", tmp_path / "m.png")]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_colours_are_read_exactly(tmp_path, photo, suffix):
    Image.fromarray(photo).save(tmp_path / f"i.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    image = read_image(tmp_path / f"i.{suffix}")
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image, planes(photo))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, photo, mode):
    """Tests that transparent pixels keep their colour, and that palette indices become their colours."""
    image = Image.fromarray(photo)
    if mode in ("LA", "RGBA"):
        image = image.convert("LA" if mode == "LA" else "RGBA")
        image.putalpha(Image.fromarray(photo[..., 0]))
    image = image.convert(mode)
    image.save(tmp_path / "i.tif")
    expected = np.asarray(image.convert("L" if mode == "LA" else "RGB").convert("RGB"))
    assert torch.equal(read_image(tmp_path / "i.tif"), planes(expected))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_that_are_not_rgb(tmp_path, photo, mode):
    Image.fromarray(photo).convert(mode).save(tmp_path / "i.jpg", quality=95)
    expected = np.asarray(Image.fromarray(photo).convert(mode).convert("RGB")).astype(int)
    assert (read_image(tmp_path / "i.jpg").permute(1, 2, 0).numpy() - expected).__abs__().max() < 12


def test_of_sixteen_bits_the_upper_eight_are_kept(tmp_path):
    grey = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]])
    (tmp_path / "grey.png").write_bytes(png(grey, 16, 0))
    assert read_image(tmp_path / "grey.png").tolist() == [[[0, 0, 1], [0x12, 255, 255]]] * 3
    (tmp_path / "rgb.png").write_bytes(png(np.stack([grey, grey[::-1], 0 * grey], -1), 16, 2))
    assert read_image(tmp_path / "rgb.png")[:2].tolist() == [[[0, 0, 1], [18, 255, 255]], [[18, 255, 255], [0, 0, 1]]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_and_masks_are_not(tmp_path, photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photo).save(tmp_path / "i.png", exif=exif)
    Image.fromarray(photo[..., 0]).save(tmp_path / "m.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "i.png"), planes(ROTATIONS[orientation](photo)))
    assert torch.equal(read_mask(tmp_path / "m.png"), torch.from_numpy(photo[..., 0].copy()))


def test_masks_hold_what_is_stored(tmp_path):
    stored = fake_trees.draw("mask", (0, 1, 7, 255))[1]
    fake_trees.save(stored, tmp_path / "grey.png")
    fake_trees.save_palette(stored, tmp_path / "palette.png")
    (tmp_path / "wide.png").write_bytes(png(stored, 16, 0))
    fake_trees.save(stored == 7, tmp_path / "bits.png")
    assert torch.equal(read_mask(tmp_path / "bits.png"), torch.from_numpy((stored == 7).astype(np.uint8)))
    for name in ("grey", "palette", "wide"):
        mask = read_mask(tmp_path / f"{name}.png")
        assert mask.dtype == torch.uint8 and torch.equal(mask, torch.from_numpy(stored)), name


@pytest.mark.parametrize(
    ("image", "suffix", "message"),
    [
        (Image.new("RGB", (4, 3)), "png", "colours .*`apcnet check`"),
        (Image.new("RGBA", (4, 3)), "png", "colours"),
        (Image.new("F", (4, 3)), "tif", "mode F"),
        (Image.new("L", (4, 3)), "jpg", "JPEG"),
        (Image.fromarray(np.full((3, 4), 256, np.uint16)), "png", "expected labels from 0 to 255, got the value 256"),
    ],
    ids=["RGB", "RGBA", "F", "JPEG", "wide"],
)
def test_masks_that_cannot_be_labels_are_refused(tmp_path, image, suffix, message):
    image.save(tmp_path / f"m.{suffix}")
    with pytest.raises(ValueError, match=rf"m\.{suffix}: .*{message}"):
        read_mask(tmp_path / f"m.{suffix}")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_of_32_bits_are_refused(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "i.tif")
    with pytest.raises(ValueError, match=r"i\.tif: cannot be decoded: expected 8 or 16 bits .* got 32"):
        read_image(tmp_path / "i.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:20], lambda data: b"", None]
)
def test_damaged_files_are_named(tmp_path, photo, suffix, damage):
    file = io.BytesIO()
    Image.fromarray(photo).save(file, {"jpg": "JPEG", "png": "PNG"}[suffix])
    path = tmp_path / f"the image.{suffix}"
    path.write_bytes(damage(file.getvalue()) if damage else b"<html>not found</html>")
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=rf"the image\.{suffix}"):
            read(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_file_that_was_cut_is_an_error_or_still_has_every_pixel(tmp_path, photo, suffix):
    path = tmp_path / f"i.{suffix}"
    Image.fromarray(photo).save(path)
    data, whole = path.read_bytes(), read_image(path)
    refused = 0
    for end in range(1, len(data), 7):
        path.write_bytes(data[:end])
        try:
            assert torch.equal(read_image(path), whole)
        except ValueError:
            refused += 1
    assert refused > len(data) // 7 * 0.6


def test_samples(tmp_path, photo):
    mask = np.zeros((24, 40), np.uint8)
    mask[2:4], mask[0, 0] = 2, 255
    files = Files(pair_of(tmp_path, photo, mask), CLASSES, PALETTE)
    files = pickle.loads(pickle.dumps(files))  # as it gets to a worker that was spawned
    image, labels, name = files[0]
    assert (len(files), files.names, name, files.classes, files.palette) == (1, ["one"], "one", CLASSES, PALETTE)
    assert torch.equal(image, planes(photo)) and torch.equal(labels, torch.from_numpy(mask))
    assert [sample.name for sample in files] == ["one"] and files[-1].name == "one"
    with pytest.raises(IndexError):
        files[1]
    with pytest.raises(TypeError):
        files[:1]


def test_labels_that_the_data_set_does_not_have_are_an_error(tmp_path, photo):
    mask = np.zeros((24, 40), np.uint8)
    mask[1:3, 0], mask[0] = 9, 3
    with pytest.raises(ValueError, match=r"sample 0 of 1: .*m\.png: holds 3, 9 at 42 pixels, expected 0 to 2, 255"):
        Files(pair_of(tmp_path, photo, mask), CLASSES, PALETTE)[0]


def test_errors_name_the_file_and_the_position(tmp_path, photo):
    (pair,) = pair_of(tmp_path, photo, np.zeros((24, 40), np.uint8))
    (tmp_path / "cut.png").write_bytes(pair.image.read_bytes()[:60])
    files = Files(
        [pair, pair._replace(image=tmp_path / "cut.png"), pair._replace(mask=tmp_path / "no.png")], CLASSES, PALETTE
    )
    assert files[0].name == "one"
    with pytest.raises(ValueError, match=r"sample 1 of 3: .*cut\.png: cannot be decoded"):
        files[1]
    with pytest.raises(FileNotFoundError, match=r"sample 2 of 3: .*no\.png"):
        files[2]


@pytest.mark.parametrize(("shape", "hint"), [((23, 40), False), ((40, 24), True)])
def test_a_mask_of_another_size_is_an_error(tmp_path, photo, shape, hint):
    with pytest.raises(ValueError, match=rf"i\.png is 40x24, but its mask .*m\.png is {shape[1]}x{shape[0]}") as error:
        Files(pair_of(tmp_path, photo, np.zeros(shape, np.uint8)), CLASSES, PALETTE)[0]
    assert ("EXIF" in str(error.value)) == hint


def test_label_tables():
    assert label_table(2).tolist() == [0, 1, *[UNKNOWN] * 253, 255]
    assert reduced_labels(2).tolist() == [255, 0, 1, *[UNKNOWN] * 252, 255]
    assert label_table(2, {0: 0, 255: 1}).tolist() == [0, *[UNKNOWN] * 254, 1]
    for wrong in ({256: 0}, {0: 2}, {-1: 0}):
        with pytest.raises(ValueError, match="labels: expected values from 0 to 255"):
            label_table(2, wrong)


def test_class_lists(tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("# a comment\n road  128 64 128 \n\ntraffic light 250, 170, 30\n")
    assert read_classes(file) == (("road", "traffic light"), ((128, 64, 128), (250, 170, 30)))
    file.write_text("road\nlane 2\n")
    assert read_classes(file) == (("road", "lane 2"), voc_colors(2))
    assert voc_colors(22)[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert voc_colors(22)[19:] == ((128, 192, 0), (0, 64, 128), (128, 64, 128))
    assert len(set(voc_colors(254))) == 254


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected 1 to 254 classes, got 0"),
        ("a\n" * 2, "expected different names, but lists the class 'a' twice"),
        ("a 1 2 3\nb\n", "'b' has none"),
        ("a 1 2 256", "three numbers from 0 to 255"),
        ("\n".join(map(str, range(255))), "got 255"),
    ],
)
def test_class_lists_that_are_wrong(tmp_path, text, message):
    (tmp_path / "my.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"my\.txt.*{message}"):
        read_classes(tmp_path / "my.txt")


def listing(names, images, masks, image_folder="images", hint=""):
    return Listing(names, images, masks, image_folder, "masks", CLASSES, PALETTE, hint=hint)


def test_files_are_found_by_name(tmp_path):
    for name in ("b.PNG", "a/c d.Jpg", "a/._c d.jpg", ".hidden/x.png", "notes.txt", "B.png", "a.b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "linked").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "linked")
    found = images_in(tmp_path / "in")
    assert sorted(found) == ["B", "a.b", "a/c d", "b", "link/c d"]
    assert images_in(tmp_path / "in", ending=" d").keys() == {"a/c", "link/c"}
    names = sorted(found)
    assert listing(names[::-1], found, found, tmp_path).open().names == names


def test_folders_that_are_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the folder .*nowhere"):
        images_in(tmp_path / "nowhere")
    (tmp_path / "a.png").touch()
    (tmp_path / "a.JPG").touch()
    with pytest.raises(ValueError, match=r"expected one image of each name, got a\.(png|JPG) and a\.(JPG|png)"):
        images_in(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "up").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="up: links to a folder that contains it"):
        images_in(tmp_path / "in")


def test_pairs_that_are_not_there_are_counted_and_named(tmp_path):
    images = {name: tmp_path / name for name in "abcdefg"}
    masks = {name: tmp_path / name for name in "agh"}
    with pytest.raises(FileNotFoundError, match=r"5 of 7 samples have no mask in masks: b, c, d, …; do this"):
        listing(images, images, masks, hint="; do this").open()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 samples have no image in .*: h; 5 of 8"):
        listing(images.keys() | masks.keys(), images, masks).open()
    assert listing(images, images, masks).complete().names == ["a", "g"]
    with pytest.raises(FileNotFoundError, match="expected images in images, found none"):
        listing([], {}, {})


def test_lists_of_names(tmp_path):
    file = tmp_path / "train.txt"
    file.write_bytes(b"\xef\xbb\xbfb \r\n\r\na\r\n")
    assert names_in(file) == ["b", "a"]
    for content, message in (
        (b"\n\n", "lists no names"),
        (b"a\nb\na\n", "lists a more than once"),
        (b"\xff\x00", "expected text .*, got other bytes"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"train\.txt.*{message}"):
            names_in(file)
