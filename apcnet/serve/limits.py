"""Defines the limits of the server, and counts what its requests hold in memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

PACE = 1 << 16  # bytes per second that a client must send or read, once its timeout is over
QUEUE_PIXELS = 1 << 27  # of all images in the queue: 384 MiB


@dataclass(frozen=True)
class Limits:
    """Holds the limits of the server: sizes, times and numbers."""

    max_bytes: int = 1 << 24
    """Refuse bodies of more bytes than this."""
    max_pixels: int = 1 << 24
    """Refuse images of more pixels than this; their header tells, before they are decoded."""
    queue: int = 64
    """Hold at most this many images; while there are so many, refuse more with status 503."""
    batch: int = 8
    """Run at most this many images of one size through the network together."""
    wait: float = 0.002
    """Wait at most this many seconds for further images of a batch."""
    timeout: float = 30.0
    """Wait at most this many seconds for a request, for its labels, and for its client to read the answer."""
    connections: int = 512
    """Hold at most this many connections."""

    def __post_init__(self):
        from PIL import Image  # the command line takes the flags from here, and must not wait

        for field in fields(self):
            value, whole = getattr(self, field.name), field.type in (int, "int")
            least = 0 if field.name == "wait" else 1 if whole else 0.1
            kinds, expected = ((int,), "an integer") if whole else ((int, float), "a number")
            if type(value) not in kinds or not least <= value < math.inf:
                raise ValueError(f"{field.name}: expected {expected} of {least} or more, got {value!r}")
        if Image.MAX_IMAGE_PIXELS is not None and self.max_pixels > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_pixels: expected at most {Image.MAX_IMAGE_PIXELS}, which Pillow decodes, got {self.max_pixels}; "
                "larger images: apcnet predict"
            )

    @property
    def bytes_together(self) -> int:
        """Returns how many bytes of bodies the server holds at most."""
        return 16 * self.max_bytes


class FullError(Exception):
    """Reports that the server holds as much as it may."""


class Room:
    """Counts the images, pixels and bytes that requests hold, and refuses what would be too much.

    A single image or body always fits. Only the thread of the event loop may use it.
    """

    def __init__(self, limits: Limits):
        self.limits, self.images, self.pixels, self.bytes = limits, 0, 0, 0

    def check(self) -> None:
        """Raises a FullError if there is no room for one more image."""
        if self.images >= self.limits.queue:
            raise FullError(
                f"queue: expected fewer than {self.limits.queue} images, got {self.images}; try again later"
            )

    @contextmanager
    def image(self, pixels: int) -> Iterator[None]:
        """Holds a place for an image until the end of the block."""
        self.check()
        if self.images and self.pixels + pixels > QUEUE_PIXELS:
            raise FullError(
                f"queue: expected at most {QUEUE_PIXELS} pixels, got {self.pixels + pixels}; try again later"
            )
        self.images += 1
        self.pixels += pixels
        try:
            yield
        finally:
            self.images -= 1
            self.pixels -= pixels

    def add_bytes(self, count: int) -> None:
        """Counts further bytes of a body, whose reader takes them off in the end."""
        most = self.limits.bytes_together
        if self.bytes + count > most:
            raise FullError(
                f"bodies: expected at most {most} bytes together, got {self.bytes + count}; try again later"
            )
        self.bytes += count
