"""Tests that colours are in the right places and that nothing is cut off or too large."""

import numpy as np
import pytest
import torch
from PIL import Image

from apcnet import draw
from apcnet.data.classes import LISTS, read_classes
from apcnet.draw import text

PALETTE = ((250, 200, 10), (20, 160, 240), (90, 200, 60))
CLASSES = ("sky", "road", "traffic light")
PHOTO = (70, 20, 120)  # a colour that nothing else is drawn in


def photo(height, width, color=PHOTO):
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, height, width)


def where(picture, color):
    """Finds the box (left, top, right, bottom) of all pixels of a colour, and counts them."""
    mask = (np.asarray(picture) == color).all(-1)
    return Image.fromarray(mask).getbbox(), int(mask.sum())


def same(one, other):
    return one.size == other.size and one.tobytes() == other.tobytes()


def empty(picture, box):
    return (np.asarray(picture.crop(box)) == 255).all()


# Colours


@pytest.mark.parametrize("count", [1, 2, 19, 150, 254])
def test_palette_is_distinct_and_grows_at_its_end(count):
    colors = draw.palette(count)
    assert len(set(colors)) == count and colors == draw.palette(300)[:count]
    assert not {draw.IGNORED, draw.PAPER, (0, 0, 0)} & set(colors)
    among = np.array(colors, int)
    apart = np.abs(among[:, None] - among).sum(-1) + 999 * np.eye(count, dtype=int)
    assert apart.min() >= (16 if count > 19 else 90)


def test_palette_of_more_colours_than_there_are():
    with pytest.raises(ValueError, match=r"num_classes: expected 1 to \d+, got 99999"):
        draw.palette(99999)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_in_their_colours(dtype):
    labels = torch.tensor([[0, 1, 2], [2, 3, 255]]).to(dtype)
    expected = [[*PALETTE], [PALETTE[2], draw.IGNORED, draw.IGNORED]]
    assert np.array_equal(draw.colourise(labels, PALETTE), expected)
    assert np.array_equal(draw.colourise(labels.numpy(), PALETTE), expected)


def test_negative_labels_are_ignored():
    assert np.array_equal(draw.colourise(torch.tensor([[-1, -(2**40)]]), PALETTE), [[draw.IGNORED] * 2])


def test_255_is_a_class_like_any_other_if_there_are_256():
    colors = draw.palette(256)
    assert np.array_equal(
        draw.colourise(torch.tensor([[255, 0]], dtype=torch.uint8), colors), [[colors[255], colors[0]]]
    )


def test_overlay_mixes_colours_into_the_image():
    labels = torch.tensor([[0, 1, 255]])
    for opacity, share in ((0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)):
        picture = np.asarray(draw.overlay(photo(1, 3), labels, PALETTE, opacity)).astype(int)
        mixed = np.array(PALETTE[:2]) * share + np.array(PHOTO) * (4 - share)
        assert np.abs(4 * picture[0, :2] - mixed).max() <= 4
        assert tuple(picture[0, 2]) == PHOTO


def test_the_background_stays_clear():
    """Tests that black and what is called background darken no picture, and that their box in the legend is empty."""
    colors, names = ((0, 0, 0), (20, 160, 240), (90, 200, 60)), ("thing", "road", "Background")
    assert draw.backgrounds(names, colors) == [0, 2] and draw.backgrounds(CLASSES, PALETTE) == []
    labels = torch.tensor([[0, 1, 2]]).repeat(20, 1).repeat_interleave(200, 1)
    clear = draw.backgrounds(names, colors)
    picture = draw.overlay(photo(20, 600), labels, colors, clear=clear)
    assert where(picture, PHOTO) == ((0, 0, 600, 20), 20 * 400)
    page = draw.with_legend(picture, labels, names, colors, clear)
    below = page.crop((0, 20, *page.size))
    assert where(below, colors[1])[1] > 100 and not where(below, colors[2])[1] and not where(below, colors[0])[1]


@pytest.mark.parametrize(
    "taken", [[], [draw.WRONG], [(220, 20, 60)], [draw.IGNORED], [(60, 60, 60), (255, 0, 0), (236, 0, 200)]], ids=str
)
def test_errors_have_the_colour_of_no_class(taken):
    """Tests pictures and legends of palettes that hold red and dark grey."""
    colors = (*PALETTE[:2], *taken)
    wrong, ignored = draw.wrong_color(colors), draw.ignored_color(colors)
    assert not {wrong, ignored} & set(colors) and wrong != ignored
    near = np.abs(np.array(colors, int) - wrong).sum(-1).min(), np.abs(np.array(colors, int) - ignored).sum(-1).min()
    assert min(near) > 60
    truth = torch.zeros(12, 12, dtype=torch.uint8)
    truth[:3] = 255
    names = [f"class {i}" for i in range(len(colors))]
    page = draw.preview([(photo(12, 12), truth, 1 - truth.clamp(max=1))], names, colors)
    assert where(panels(page)[3], wrong)[1] == 24**2 * 9 * 12 and where(panels(page)[3], ignored)[1] == 24**2 * 3 * 12


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "voc2012", "pascal_context", "synthetic"])
def test_errors_differ_from_the_classes_of_benchmarks(name):
    colors = read_classes(LISTS / f"{name}.txt")[1]
    assert not {draw.wrong_color(colors), draw.ignored_color(colors)} & set(colors)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (photo(2, 2), torch.zeros(2, 3, dtype=torch.long), PALETTE),
            ValueError,
            r"labels: expected \(2, 2\), the image",
        ),
        ((photo(2, 2), torch.zeros(2, 2), PALETTE), TypeError, "labels: expected integers, got float32"),
        ((photo(2, 2), torch.zeros(1, 2, 2).long(), PALETTE), ValueError, r"labels: expected the shape \(H, W\)"),
        ((photo(2, 2).float(), torch.zeros(2, 2).long(), PALETTE), TypeError, r"image: expected a \(3, H, W\) tensor"),
        ((photo(2, 2), torch.zeros(2, 2).long(), PALETTE, 1.5), ValueError, "opacity: expected 0 to 1, got 1.5"),
    ],
)
def test_what_cannot_be_overlaid(arguments, error, message):
    with pytest.raises(error, match=message):
        draw.overlay(*arguments)


# Legends


@pytest.mark.parametrize("width", [40, 333, 1200, 4000])
@pytest.mark.parametrize("count", [1, 2, 19, 150])
def test_legend_names_what_is_present_and_nothing_is_cut_off(count, width):
    colors = draw.palette(count)
    names = [f"{'quite a ' * (i % 3)}long name {i}" for i in range(count)]
    present = range(0, count, 2)
    sheet = draw.legend(present, names, colors, width)
    assert sheet.width >= width
    assert sheet.width == width or width < 333  # one column of 19 letters is all that makes it wider
    found = {color: size for size, color in sheet.getcolors(1 << 24)}
    sizes = [found.get(color, 0) for color in colors]
    assert all(size > 100 for size in sizes[::2]) and not any(sizes[1::2])
    edge = 10
    for box in ((0, 0, sheet.width, edge), (sheet.width - edge, 0, sheet.width, sheet.height)):
        assert empty(sheet, box)
    assert empty(sheet, (0, sheet.height - edge, sheet.width, sheet.height))


def test_legend_fills_columns_from_the_top():
    colors = draw.palette(150)
    sheet = draw.legend(range(150), [f"class {i}" for i in range(150)], colors, 1000)
    first, second, last = (where(sheet, colors[i])[0] for i in (0, 1, 149))
    assert sheet.height < 150 * 24 / 5
    assert first[0] == second[0] and first[1] < second[1] and last[0] > 800


@pytest.fixture
def no_fonts(monkeypatch):
    """Hides the fonts of the system; Pillow's own remains."""
    text.system_font.cache_clear()
    monkeypatch.setattr(text, "FOLDERS", ())
    yield
    text.system_font.cache_clear()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("Straße", "Strasse"),
        ("forêt ombragée", "foret ombragee"),
        ("røykdykker", "roykdykker"),
        ("道路", "7"),
        ("traffic 🚦", "7"),
        ("two\nlines", "7"),
        ("tab\there", "7"),
        ("", "7"),
    ],
)
def test_names_that_the_font_cannot_write(no_fonts, name, written):
    """Tests that accents are dropped, and that other names become their class's number, which legend.txt explains."""
    assert text.written(name, 7, 14).text == written
    names = [*map(str, range(7)), name]
    assert text.numbered(names) == ([7] if written == "7" else [])
    plain, other = (draw.legend([7], [*names[:7], given], draw.palette(8), 300) for given in (name, written))
    assert (plain.height > other.height) == (written == "7")  # for the note
    assert same(*(draw.confusion(torch.eye(8), [*names[:7], given]) for given in (name, written)))


def test_numbers_are_explained_by_a_file(no_fonts, tmp_path):
    text.save_names(tmp_path, ("road", "sky"))
    assert not list(tmp_path.iterdir())
    text.save_names(tmp_path, ("road", "背景"))
    assert (tmp_path / "legend.txt").read_text(encoding="utf-8") == "0 road\n1 背景\n"


@pytest.mark.parametrize("name", ["дорога", "δρόμος", "Straße", "forêt ombragée", "כביש"])
def test_names_in_any_script_that_the_system_has_a_font_for(name):
    font = text.system_font(name, 14)
    if font is None:
        pytest.skip("needs a font with these letters, such as DejaVu Sans")
    assert text.written(name, 7, 14).text == name and text.numbered([name]) == []
    sheet = draw.legend([0], [name], PALETTE[:1], 300)
    assert not same(sheet, draw.legend([0], ["0"], PALETTE[:1], 300))
    box = bytes(font.getmask("\uffff"))
    assert box not in {bytes(font.getmask(letter)) for letter in name}


def test_long_names_are_shortened():
    name = "a name that goes on and on, longer than any picture is wide, and says nothing"
    sheet = draw.legend([0], [name], PALETTE[:1], 100)
    assert sheet.width < 300
    assert not same(sheet, draw.legend([0], ["a name that"], PALETTE[:1], 100))


def test_ignored_stands_at_the_end_of_a_legend():
    sheet = draw.legend([255, 1], CLASSES, PALETTE, 100)
    (_, road, _, _), (_, ignored, _, _) = (where(sheet, color)[0] for color in (PALETTE[1], draw.IGNORED))
    assert road < ignored


def test_legend_without_a_colour_for_each_name():
    with pytest.raises(ValueError, match="classes, palette: expected a colour for each name, got 3 and 2"):
        draw.legend([0], CLASSES, PALETTE[:2], 100)


@pytest.mark.parametrize("width", [8, 700, 3000])
def test_legend_lies_beneath_the_picture(width):
    labels = torch.tensor([[0, 2]]).repeat(20, width // 2)
    picture = draw.colourise(labels, PALETTE)
    page = draw.with_legend(picture, labels, CLASSES, PALETTE)
    left = (page.width - width) // 2
    assert same(page.crop((left, 0, left + width, 20)), picture)
    assert left == 0 or width == 8
    assert where(page.crop((0, 20, *page.size)), PALETTE[2])[1] > 100
    assert not where(page, PALETTE[1])[1]
    letters = (np.asarray(page.crop((0, 20, *page.size))) == draw.INK).all(-1).any(1).sum()
    assert letters >= max(8, width // 200)  # they grow with the picture


# Previews


def panels(page, row=0):
    """Finds the four pictures of a row by the colour of the image."""
    (left, top, right, bottom), _ = where(page, PHOTO)
    margin = left
    step = (page.width - 2 * margin - (right - left)) // 3
    return [page.crop((left + i * step, top, right + i * step, bottom)) for i in range(4)]


def test_preview_shows_image_truth_prediction_and_error():
    truth = torch.zeros(12, 12, dtype=torch.uint8)
    truth[:, 6:], truth[:3] = 2, 255
    prediction = truth.clone()
    prediction[:4, :5] = 1  # ignored in three rows, wrong in one
    image, true, predicted, error = panels(draw.preview([(photo(12, 12), truth, prediction)], CLASSES, PALETTE))
    assert image.size == (288, 288) and where(image, PHOTO)[1] == 288**2
    square = Image.Resampling.NEAREST
    assert same(true, draw.colourise(truth, PALETTE).resize((288, 288), square))
    assert same(predicted, draw.colourise(prediction, PALETTE).resize((288, 288), square))
    assert where(error, draw.WRONG) == ((0, 72, 120, 96), 24**2 * 5)
    assert where(error, draw.IGNORED) == ((0, 0, 288, 72), 24**2 * 36)
    assert len(np.unique(np.asarray(error).reshape(-1, 3), axis=0)) == 3  # the rest is one grey


def test_preview_says_how_much_is_wrong_of_what_counts():
    """Tests 4 wrong of 16 pixels with 48 ignored ones."""
    lines = []
    for wrong, ignored in ((2, 4), (4, 8), (3, 8)):
        truth, prediction = torch.zeros(2, 8, 8, dtype=torch.uint8)
        prediction[:wrong, :wrong] = 1
        truth[:, ignored:], truth[ignored:] = 255, 255
        page = draw.preview([(photo(8, 8), truth, prediction)], CLASSES, PALETTE)
        right, bottom = page.width, where(page, PHOTO)[0][3]
        line = page.crop((right - right // 4, bottom, right, bottom + 24))
        assert not empty(line, (0, 0, *line.size)) and empty(page, (0, bottom, right - right // 4, bottom + 24))
        lines.append(line)
    assert same(lines[0], lines[1]) and not same(lines[1], lines[2])


def test_preview_of_what_is_all_ignored():
    ignored = torch.full((9, 9), 255, dtype=torch.uint8)
    page = draw.preview([(photo(9, 9), ignored, torch.zeros(9, 9, dtype=torch.int64))], CLASSES, PALETTE)
    _, _, predicted, error = panels(page)
    assert where(predicted, PALETTE[0])[1] == where(error, draw.IGNORED)[1] == 288**2


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        ((480, 480), (480, 480)),
        ((1024, 2048), (480, 240)),
        ((2000, 500), (120, 480)),
        ((3, 5000), (480, 1)),
        ((200, 289), (289, 200)),
        ((96, 144), (288, 192)),
    ],
    ids=str,
)
def test_preview_has_pictures_of_bounded_size(size, shown):
    labels = torch.zeros(size, dtype=torch.uint8)
    page = draw.preview([(photo(*size), labels, labels)], CLASSES, PALETTE)
    assert all(picture.size == shown for picture in panels(page))


def test_preview_of_several_sizes():
    """Tests that a row is as high as its pictures and a column as wide as its widest, others centred."""
    rows = [
        (photo(*size, color), torch.zeros(size).byte(), torch.zeros(size).byte())
        for size, color in (((300, 400), PHOTO), ((480, 200), (7, 8, 9)))
    ]
    page = draw.preview(rows, CLASSES, PALETTE)
    (wide_left, _, wide_right, wide_bottom), _ = where(page, PHOTO)
    (left, top, right, bottom), _ = where(page, (7, 8, 9))
    assert (right - left, bottom - top) == (200, 480) and top > wide_bottom
    assert left + right == wide_left + wide_right


def test_preview_of_nothing_and_of_what_does_not_fit():
    with pytest.raises(ValueError, match="rows: expected one or more, got none"):
        draw.preview([], CLASSES, PALETTE)
    labels = torch.zeros(4, 4).byte()
    with pytest.raises(ValueError, match=r"prediction: expected \(4, 4\), the image's size, got \(4, 5\)"):
        draw.preview([(photo(4, 4), labels, torch.zeros(4, 5).byte())], CLASSES, PALETTE)


# Confusion matrices


@pytest.mark.parametrize("count", [1, 2, 9, 19, 40, 150])
def test_confusion_of_any_number_of_classes(count):
    names = [f"class {i}" for i in range(count)]
    page = draw.confusion(torch.eye(count, dtype=torch.int64) * 7, names)
    (left, top, right, bottom), _ = where(page.crop((0, 0, page.width, page.height - 110)), draw.RIGHT_SHARE)
    assert right - left == bottom - top  # the diagonal goes from corner to corner
    assert right - left >= 14 * count and max(page.size) <= 2700
    assert empty(page, (page.width - 10, 0, page.width, page.height)) and empty(page, (0, 0, 10, page.height))


def test_confusion_has_the_truth_in_rows():
    """Tests a matrix where all of the first class is predicted as the second."""
    page = draw.confusion(torch.tensor([[0, 9, 0], [0, 5, 0], [0, 0, 1]]), CLASSES)
    page = page.crop((0, 0, page.width, page.height - 110))
    wrong, right = where(page, draw.WRONG_SHARE)[0], where(page, draw.RIGHT_SHARE)[0]
    assert wrong[0] == right[0] and wrong[3] < right[1] + 2


def test_confusion_is_of_shares():
    """Tests that rows that are multiples look alike; precision, beside the matrix, depends on all rows."""
    one, other = torch.tensor([[3, 1], [2, 2]]), torch.tensor([[300, 100], [1, 1]])
    pictures = [draw.confusion(matrix, CLASSES[:2]) for matrix in (one, other.numpy(), one.flip(1))]
    cells = [picture.crop((0, 0, picture.width - 3 * 84 - 24, picture.height)) for picture in pictures]
    assert same(cells[0], cells[1]) and not same(cells[0], cells[2])
    assert not same(pictures[0], pictures[1])


def test_confusion_fades_the_names_of_classes_that_are_not_there():
    full, lacking = (draw.confusion(torch.diag(torch.tensor([5, n])), ("a", "b")) for n in (5, 0))
    faint = [where(page.crop((0, 0, page.width, page.height - 110)), draw.FAINT)[1] for page in (full, lacking)]
    assert faint[0] == 0 < faint[1]


@pytest.mark.parametrize(
    "matrix", [torch.zeros(2, 2), torch.zeros(3), torch.zeros(3, 4)], ids=lambda m: str(tuple(m.shape))
)
def test_confusion_of_another_shape(matrix):
    with pytest.raises(ValueError, match=r"matrix: expected \(3, 3\), a row for each class"):
        draw.confusion(matrix, CLASSES)


# Files


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG")])
def test_pictures_are_saved_as_what_they_are_called(tmp_path, name, kind):
    draw.save(Image.new("RGB", (5, 4)), tmp_path / name)
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind and picture.size == (5, 4)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_pictures_of_unknown_kinds_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"path: expected a name that ends with one of \.png, \.jpg, \.jpeg, got .*a\.gif"
    ):
        draw.save(Image.new("RGB", (5, 4)), tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
