"""Reads the frames of videos, cameras and streams, and writes videos of frames with the colours of their labels.

The package av (PyAV), an extra, brings FFmpeg's readers and encoders.
"""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apcnet.files import printable, replacing
from apcnet.inference.prediction import Prediction

try:
    import av  # an extra
    from av.error import FFmpegError
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "expected the package av, which reads and writes videos; install it: pip install 'apc_kernels[video]'"
    ) from None

# The first encoder that PyAV was built with is taken; its wheels have libx264.
ENCODERS = {"h264": ("libx264", "libopenh264", "mpeg4"), "webm": ("libvpx-vp9",)}
FASTSTART = {"movflags": "faststart"}  # the index before the frames, so that players start at once
OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "20"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "6", "crf": "30", "b": "0"},
    "mpeg4": {"qscale": "3"},
}
TIMEOUT = 20.0  # seconds that a camera or stream may be silent
MISSING = 0.5  # seconds that a file may be shorter than it says
MPEG4_TICKS = 60_000  # a second; MPEG-4 allows 65,535


class Frame(NamedTuple):
    """Holds the levels (H, W, 3) of a frame, uint8 RGB and upright, and its timestamp in the reader's time base."""

    levels: np.ndarray
    time: int


class Reader:
    """Decodes the frames of the first video of a source, and passes on the packets of its first sound.

    Attributes:
        is_live: Whether the source is a camera, a stream or a pipe, which last until they are stopped.
        total: Number of frames as the source tells it, or None.
        step: Ticks of the time base between frames, for those without a timestamp.
        color: Colour space, primaries and transfer characteristic of the first frame, as FFmpeg numbers them.
        is_upright: Whether the rows of the first frame are rows of a player's picture.
    """

    def __init__(self, source: str | Path | int):
        self.name = f"camera {source}" if isinstance(source, int) else str(source)
        address, driver = _address(source)
        self.is_live = driver is not None or not Path(address).is_file()
        try:
            self.container = av.open(address, format=driver, timeout=TIMEOUT if self.is_live else None)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.name}: there is no such file or device") from None
        except (FFmpegError, OSError) as error:
            raise ValueError(
                f"{self.name}: expected a video that FFmpeg reads ({printable(error.strerror or error)})"
            ) from None
        if not self.container.streams.video:
            self.container.close()
            raise ValueError(f"{self.name}: expected a video, found none in it")
        self.video = self.container.streams.video[0]
        self.video.thread_type = "AUTO"
        self.sound = next(iter(self.container.streams.audio), None)
        self.total: int | None = self.video.frames or None
        self.time_base: Fraction = self.video.time_base or Fraction(1, 1000)
        self.rate = Fraction(self.video.average_rate or self.video.guessed_rate or 25)
        self.step = max(1, round(1 / self.rate / self.time_base))
        self.start = None if self.container.start_time is None else Fraction(self.container.start_time, av.time_base)
        self.color, self.shape, self.is_upright = (2, 2, 2), None, True
        self.last = self.end = -1  # timestamps of the last frame and of its end
        self.bad_packets = self.bad_frames = 0
        self.error = ""

    def items(self) -> Iterator[Any]:
        """Yields frames and packets of sound in the order of the file."""
        streams = [self.video, self.sound] if self.sound else [self.video]
        try:
            for packet in self.container.demux(streams):
                if packet.stream is self.sound:
                    if packet.pts is not None and self.start is not None:
                        yield packet
                    continue
                try:
                    frames = packet.decode()
                except FFmpegError:  # of this packet; the next ones may be whole
                    self.bad_packets += 1
                    continue
                self.bad_packets += packet.is_corrupt
                for decoded in frames:
                    frame = self._frame(decoded)
                    if self.shape is None:
                        self.shape = frame.levels.shape
                        context = self.video.codec_context
                        self.color = decoded.colorspace, context.color_primaries, context.color_trc
                        self.is_upright = round(decoded.rotation / 90) % 2 == 0
                    if frame.levels.shape != self.shape:
                        self.error = f"the size of its frames changes from {self.shape[:2]} to {frame.levels.shape[:2]}"
                        return
                    yield frame
        except (FFmpegError, OSError) as error:  # of the file
            self.error = printable(error)

    def failures(self, done: int) -> list[str]:
        """Says what is wrong with the source after `done` frames."""
        failures = []
        ended, length = float((self.end + 1) * self.time_base), self._length()
        if self.error:
            failures.append(f"{self.name}: cannot be read after {done} frames, {ended:.1f} s ({self.error})")
        elif length is not None and length - ended > MISSING:
            failures.append(f"{self.name}: ends early, after {done} frames, {ended:.1f} of {length:.1f} s")
        if damaged := max(self.bad_packets, self.bad_frames):
            failures.append(f"{self.name}: {damaged} of its frames are damaged; {done} are predicted")
        return failures

    def close(self) -> None:
        self.container.close()

    def _frame(self, decoded: Any) -> Frame:
        """Converts a frame of FFmpeg."""
        self.bad_frames += decoded.is_corrupt
        time = self.last + self.step
        if decoded.pts is not None:
            if self.start is None:
                self.start = decoded.pts * self.time_base
            time = decoded.pts - round(self.start / self.time_base)
        self.last = max(time, self.last + 1)  # encoders take increasing times only
        self.end = self.last + (decoded.duration or self.step) - 1
        turns = round(decoded.rotation / 90)  # counterclockwise, as in NumPy
        return Frame(np.ascontiguousarray(np.rot90(decoded.to_ndarray(format="rgb24"), turns)), self.last)

    def _length(self) -> float | None:
        """Returns the length of the video in seconds as the file tells it, or None."""
        if self.is_live:
            return None
        if self.video.duration is not None:
            return float(self.video.duration * self.time_base)
        if parts := re.fullmatch(r"(\d+):(\d+):([\d.]+)", self.video.metadata.get("DURATION", "")):  # Matroska
            hours, minutes, seconds = map(float, parts.groups())
            return 3600 * hours + 60 * minutes + seconds
        return None


class Writer:
    """Encodes frames with the colours of their labels, and passes on packets of sound."""

    def __init__(self, path: Path, form: str, name: Path, reader: Reader):
        self.name, self.reader = name, reader
        self.container = av.open(
            str(path), "w", format=form, container_options=FASTSTART if form in ("mp4", "mov") else {}
        )
        encoders = ENCODERS["webm" if form == "webm" else "h264"]
        self.codec = next(filter(_is_built_in, encoders), "")
        if not self.codec:
            raise ValueError(
                f"{name}: expected PyAV with one of the encoders {', '.join(encoders)}, it has none of them"
            )
        self.time_base = reader.time_base
        if self.codec == "mpeg4":
            warnings.warn(f"{name}: is MPEG-4, since this PyAV has no encoder for H.264", stacklevel=2)
            if self.time_base.denominator > 65535:
                self.time_base = Fraction(1, MPEG4_TICKS)
        self.video: Any = None  # is added with the first frame, which tells its size
        self.sound: Any = None
        self.matrix: str | None = None
        self.waiting: list[Any] = []  # packets of sound before the first frame

    def add(self, frame: Frame, seen: Prediction, opacity: float) -> None:
        """Draws and encodes a frame."""
        if self.video is None:
            self._start(*frame.levels.shape[:2])
        picture = av.VideoFrame.from_ndarray(np.asarray(seen.overlay(opacity, legend=False)), format="rgb24")
        picture = picture.reformat(format=self.video.pix_fmt, dst_colorspace=self.matrix)
        picture.pts = round(frame.time * self.reader.time_base / self.time_base)
        picture.time_base = self.time_base
        self.container.mux(self.video.encode(picture))

    def add_sound(self, packet: Any) -> None:
        """Copies a packet of sound."""
        if self.video is None:
            self.waiting.append(packet)
        elif self.sound is not None:
            offset = round(self.reader.start / packet.time_base)
            packet.pts -= offset
            packet.dts = None if packet.dts is None else packet.dts - offset
            packet.stream = self.sound
            self.container.mux(packet)

    def finish(self) -> None:
        """Writes what the encoder holds back, and the end of the file."""
        if self.video is not None:
            self.container.mux(self.video.encode())
        self.container.close()

    def _start(self, height: int, width: int) -> None:
        """Adds the streams."""
        self.video = self.container.add_stream(self.codec, rate=self.reader.rate, options=OPTIONS.get(self.codec, {}))
        self.video.width, self.video.height = width, height
        self.video.pix_fmt = "yuv444p" if self.codec == "libx264" and (width % 2 or height % 2) else "yuv420p"
        context, source = self.video.codec_context, self.reader.video
        context.time_base = self.time_base
        self.matrix = {2: None, 5: "ITU601", 6: "ITU601"}.get(self.reader.color[0], "ITU709")
        if self.matrix is not None:
            context.colorspace, context.color_primaries, context.color_trc = self.reader.color
            context.color_range = 1  # not all levels of a byte, as is usual
        if source.sample_aspect_ratio and source.sample_aspect_ratio != 1:
            ratio = source.sample_aspect_ratio
            context.sample_aspect_ratio = ratio if self.reader.is_upright else 1 / ratio
        if self.reader.sound is not None:
            kind = self.reader.sound.codec_context.codec.canonical_name
            if kind in self.container.supported_codecs:
                self.sound = self.container.add_stream_from_template(self.reader.sound)
            else:
                warnings.warn(f"{self.name}: has no sound, since it cannot hold {kind}; NAME.mkv can", stacklevel=2)
        for packet in self.waiting:
            self.add_sound(packet)
        self.waiting.clear()


@contextmanager
def writing(out: Path, form: str, reader: Reader) -> Iterator[Writer]:
    """Opens a video for writing; it appears under its name once the block has ended."""
    with replacing(out) as temporary:
        try:
            writer = Writer(temporary, form, out, reader)
            try:
                yield writer
                writer.finish()
            finally:
                writer.container.close()
        except av.error.FFmpegError as error:
            raise OSError(f"{out}: cannot be written ({printable(error)})") from error


def _address(source: str | Path | int) -> tuple[str, str | None]:
    """Returns what FFmpeg opens, and the driver of a camera."""
    if isinstance(source, int):
        source = f"/dev/video{source}" if sys.platform == "linux" else str(source)
        driver = {"linux": "v4l2", "darwin": "avfoundation"}.get(sys.platform)
        if driver is None:
            raise ValueError(f"source: expected a file or URL on {sys.platform}, got the number of a camera")
        return source, driver
    return str(source), "v4l2" if str(source).startswith("/dev/video") else None


def _is_built_in(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except ValueError:  # UnknownCodecError
        return False
    return True
