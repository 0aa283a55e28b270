"""Decodes the images of requests: their header decides whether they are decoded at all.

Images become RGB levels as `apcnet.predict` reads a file: turned upright by their EXIF tag, without alpha, the first
frame of several.
"""

import io
import math
import re
import warnings

from PIL import Image
from torch import Tensor

from apcnet.data.files import levels_of
from apcnet.files import printable

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # which start no programs, and whose headers do not lie
SCANS = 100  # of a progressive JPEG, each of which costs the time of a whole image; encoders write ten
TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of TIFF
START_OF_SCAN = b"\xff\xda"  # nothing but a marker holds these two bytes in a JPEG
MOST_PARTS = 32  # of a form

OPAQUE = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # the last is curl's word for any bytes
FORM = "multipart/form-data"


class ImageError(ValueError):
    """Reports an image that is refused, with the status of the answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def check_type(content_type: str) -> None:
    """Raises an ImageError if the Content-Type of a body is none of an image or a form."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in (*OPAQUE, FORM) and not re.fullmatch(r"image/[\w.+*-]+", kind):
        raise ImageError(415, f"Content-Type: expected image/* or {FORM}, got {printable(kind)}")


def image_part(body: bytes, content_type: str) -> bytes | memoryview:
    """Returns the bytes of the image in a body: all of it, or the first file of a form."""
    if content_type.partition(";")[0].strip().lower() != FORM:
        return body
    boundary = re.search(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', content_type)
    if boundary is None:
        raise ImageError(422, f"Content-Type: expected {FORM} with a boundary, got none")
    mark = b"--" + (boundary[1] or boundary[2]).encode("latin-1")
    start = body.find(mark)
    for _ in range(MOST_PARTS):
        head = body.find(b"\r\n\r\n", start)
        end = body.find(b"\r\n" + mark, head)
        if start < 0 or head < 0 or end < 0:
            break
        if re.search(rb"^content-disposition:.*\bfilename\*?=", body[start:head], re.IGNORECASE | re.MULTILINE):
            return memoryview(body)[head + 4 : end]
        start = end + 2
    raise ImageError(422, "body: expected a form with a file, found none; for example curl -F image=@photo.jpg")


def opened(content: bytes | memoryview, max_pixels: int) -> Image.Image:
    """Opens an image without decoding it; refuses one that is unreadable or too large."""
    if not len(content):
        raise ImageError(422, "body: expected an image, got 0 bytes; for example curl --data-binary @photo.jpg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        size = max((image.width, image.height), _tile(image), key=math.prod)
    except Image.DecompressionBombError:
        raise ImageError(413, f"body: expected an image of at most {max_pixels} pixels, got many more") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds of errors
        raise _unreadable(error) from None
    if math.prod(size) > max_pixels:
        raise ImageError(413, f"body: expected an image of at most {max_pixels} pixels, got {size[0]} × {size[1]}")
    if image.format in ("JPEG", "MPO") and (scans := bytes(content).count(START_OF_SCAN)) > SCANS:
        raise ImageError(422, f"body: expected a JPEG of at most {SCANS} scans, got {scans}")
    return image


def decoded(image: Image.Image) -> Tensor:
    """Decodes an image to RGB levels, (3, H, W) uint8."""
    try:
        return levels_of(image)
    except Exception as error:
        raise _unreadable(error) from None


def _tile(image: Image.Image) -> tuple[int, int]:
    """Returns the size of a TIFF's tiles, each of which is decoded as a whole, or 0 if it has none."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_LENGTH, 0))


def _unreadable(error: Exception) -> ImageError:
    reason = re.sub(r" ?<_io\.BytesIO.*?>", " the body", printable(error)) or type(error).__name__
    return ImageError(422, f"body: expected an image ({', '.join(FORMATS)}), got bytes that cannot be read: {reason}")
