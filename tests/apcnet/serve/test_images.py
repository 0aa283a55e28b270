"""Tests what becomes of the bodies of requests: which are taken, and which are refused before they are decoded."""

import io
import tracemalloc

import bombs
import pytest
import torch
from PIL import Image
from serving import SIZES, encoded, photo

from apcnet.data.files import read_image
from apcnet.serve.images import SCANS, ImageError, check_type, decoded, image_part, opened

LIMIT = 1 << 20
BOUNDARY = "----form7"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def refused(call, *arguments) -> tuple[int, str]:
    with pytest.raises(ImageError) as error:
        call(*arguments)
    return error.value.status, str(error.value)


def form(*parts: tuple[str, bytes]) -> bytes:
    heads = (f"--{BOUNDARY}\r\nContent-Disposition: form-data; {about}\r\n\r\n".encode() for about, _ in parts)
    return b"".join(head + content + b"\r\n" for head, (_, content) in zip(heads, parts, strict=True)) + (
        f"--{BOUNDARY}--\r\n".encode()
    )


@pytest.mark.parametrize(
    "kind", ["image/png", "image/jpeg; q=1", "IMAGE/X-icon", "image/*", "", "application/octet-stream", FORM]
)
def test_types_of_images_and_forms_are_taken(kind):
    check_type(kind)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json", "image", "video/mp4", "image/png/x", "multipart/mixed"]
)
def test_other_types_are_refused(kind):
    assert refused(check_type, kind) == (
        415, f"Content-Type: expected image/* or multipart/form-data, got {kind}"
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_levels_are_those_of_the_file(kind, tmp_path):
    content = encoded(photo((61, 83)), kind)
    (tmp_path / "image").write_bytes(content)
    assert torch.equal(decoded(opened(content, LIMIT)), read_image(tmp_path / "image"))


def test_images_are_turned_upright_and_lose_their_alpha():
    picture = photo((20, 30)).convert("RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(opened(encoded(picture, exif=exif), LIMIT)).shape == (3, 30, 20)


@pytest.mark.parametrize("kind", bombs.KINDS)
def test_bombs_are_refused_by_their_header(kind):
    width, height = (16_000, 16_000) if kind == "webp" else bombs.ENORMOUS  # WebP counts with 14 bits
    content = bombs.KINDS[kind](width, height)
    tracemalloc.start()
    status, message = refused(opened, content, LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert status == 413 and message.startswith(f"body: expected an image of at most {LIMIT} pixels, got "), message
    assert peak < 1 << 21


@pytest.mark.parametrize("kind", bombs.KINDS)
def test_the_limit_of_pixels_is_exact(kind):
    content = bombs.KINDS[kind](1024, 1025)
    assert refused(opened, content, LIMIT) == (
        413, f"body: expected an image of at most {LIMIT} pixels, got 1024 × 1025"
    )  # fmt: skip
    assert opened(bombs.KINDS[kind](1024, 1024), LIMIT).size in ((1024, 1024), (64, 64))


def test_jpegs_of_many_scans_are_refused():
    status, message = refused(opened, bombs.many_scans(SCANS), LIMIT)
    assert status == 422 and message.startswith(f"body: expected a JPEG of at most {SCANS} scans, got "), message
    assert decoded(opened(bombs.many_scans(SCANS // 2), LIMIT)).shape == (3, 64, 64)


@pytest.mark.parametrize("content", [b"", b"text", bytes(1000), encoded(photo())[:40]])
def test_what_is_no_image_is_refused(content):
    status, message = refused(opened, content, LIMIT)
    assert status == 422 and message.startswith("body: expected an image"), message
    assert "BytesIO" not in message and "0x" not in message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_images_are_refused(kind):
    content = encoded(photo((61, 83)), kind)

    def both(content):
        return decoded(opened(content, LIMIT))

    status, message = refused(both, content[: len(content) // 2])
    assert status == 422 and "cannot be read" in message and "BytesIO" not in message


def test_the_first_file_of_a_form_is_the_image():
    content = encoded(photo(SIZES[2]))
    body = form(
        ('name="note"', b"hello"), ('name="image"; filename="a.png"', content), ('name="b"; filename="c"', b"d")
    )
    assert image_part(body, FORM) == content
    assert image_part(body, FORM.replace(BOUNDARY, f'"{BOUNDARY}"')) == content
    assert decoded(opened(image_part(body, FORM), LIMIT)).shape == (3, *SIZES[2])


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(('name="note"', b"hello")), FORM),
        (form(), FORM),
        (b"", FORM),
        (form(('name="image"; filename="a"', b"x"))[:-60], FORM),
        (form(*[('name="note"', b"x")] * 40, ('name="image"; filename="a"', b"x")), FORM),
        (form(('name="image"; filename="a"', b"x")), "multipart/form-data"),
        (form(('name="image"; filename="a"', b"x")), "multipart/form-data; boundary=other"),
    ],
)
def test_forms_without_a_file_are_refused(body, kind):
    status, message = refused(image_part, body, kind)
    assert status == 422 and ("expected a form with a file" in message or "with a boundary" in message)


def test_other_bodies_are_the_image():
    assert image_part(b"anything", "image/png") == b"anything"


def test_only_formats_that_start_no_programs_are_read():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS"
    assert refused(opened, eps, LIMIT)[0] == 422
