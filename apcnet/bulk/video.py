"""Predicts videos, cameras and streams frame by frame, and writes videos with the labels' colours over the frames.

A thread decodes ahead of the network, and another one draws and encodes behind it. Memory holds a few frames, whatever
the length.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from apcnet.bulk.overlap import Behind, ahead
from apcnet.config import Precision, Protocol
from apcnet.files import make_folder
from apcnet.inference.prediction import predict, prepared_model
from apcnet.inference.protocol import WHOLE
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.models.segmentor import Segmentor
from apcnet.training.signals import Interrupts

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}


class VideoReport(NamedTuple):
    """Holds what `predict_video` did.

    Attributes:
        frames: Number of frames that were predicted.
        failures: What is wrong with the source, one sentence each: damaged frames, or an end before its time.
        stopped: Whether a signal or `stop` ended it.
    """

    frames: int
    failures: list[str]
    stopped: bool


def predict_video(
    model: Segmentor | str | Path,
    source: str | Path | int,
    out: str | Path,
    protocol: Protocol = WHOLE,
    *,
    opacity: float = 0.5,
    labels: str | Path | None = None,
    every: int = 1,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> VideoReport:
    """Predicts every frame of a video, and writes a video of the overlays with the same size, times and sound.

    Frames are turned upright, as a player shows them. Timestamps are kept, also those of a variable frame rate. Videos
    are H.264, or VP9 in WebM; sound is copied. A frame that cannot be decoded is left out. It is reported, and so is a
    file that ends early: the frames before its end are written. Needs the package av.

    Args:
        model: A model of `apcnet.create` or `apcnet.load` on any device, or the path of its file.
        source: A file, the number of a camera or its device such as /dev/video0, or the URL of a stream.
        out: Where to write the video: NAME.mp4, .mov, .mkv or .webm. The file appears once it is whole.
        protocol: Scales, windows and flips. The protocol of the model's evaluation gives the best labels.
        opacity: Opacity of the colours, 0 to 1.
        labels: Also write label maps to this folder, 000000.png for the first frame, as `Prediction.save` does.
        every: Write the label maps of every n-th frame only.
        max_pixels, precision: As in `apcnet.predict`.
        stop: Asked after every frame; once it returns True, the video of a camera or stream ends there, and of a file
            none is written. By default SIGINT and SIGTERM end a camera or stream.
        progress: Called with the number of frames so far, and the total if the source tells it.

    Returns:
        The number of frames, and what is wrong with the source.

    Example:
        >>> predict_video("model.safetensors", "street.mp4", "labelled.mp4")
        >>> predict_video("model.safetensors", 0, "camera.mp4")  # until Ctrl-C
    """
    from apcnet.bulk.videofile import Frame, Reader, writing  # needs an extra

    out = Path(out)
    _check(source, out, opacity, every)
    if labels is not None:
        make_folder(Path(labels), "labels")
    stopped, done = False, 0
    try:
        with ExitStack() as stack:
            prepared = stack.enter_context(prepared_model(model, max_pixels, precision, several=True))
            reader = stack.enter_context(closing(Reader(source)))
            if stop is None:
                signals = stack.enter_context(Interrupts()) if reader.is_live else None
                stop = (lambda: False) if signals is None else (lambda: signals.signal is not None)
            writer = stack.enter_context(writing(out, CONTAINERS[out.suffix.lower()], reader))
            behind = stack.enter_context(Behind())
            for item in stack.enter_context(closing(ahead(reader.items()))):
                if not isinstance(item, Frame):
                    behind(writer.add_sound, item)
                    continue
                seen = predict(prepared, item.levels, protocol, max_pixels=max_pixels, precision=precision)
                behind(writer.add, item, seen, opacity)
                if labels is not None and done % every == 0:
                    behind(seen.save, Path(labels, f"{done:06}.png"))
                done += 1
                if progress is not None:
                    progress(done, reader.total)
                if stop():
                    stopped = True
                    if not reader.is_live:
                        raise _StoppedError
                    break
            if not done:
                raise ValueError("; ".join(reader.failures(0)) or f"{source}: expected a video, found no frame in it")
    except _StoppedError:
        return VideoReport(done, [], True)
    return VideoReport(done, [] if stopped else reader.failures(done), stopped)


class _StoppedError(Exception):
    """Drops the video that is being written, since its source was not read to its end."""


def _check(source: str | Path | int, out: Path, opacity: float, every: int) -> None:
    """Checks the arguments that no other function checks."""
    if out.suffix.lower() not in CONTAINERS:
        raise ValueError(f"out: expected a name that ends with one of {', '.join(CONTAINERS)}, got {out}")
    if out.exists() and not isinstance(source, int) and Path(source).exists() and out.samefile(source):
        raise ValueError(f"out: {out} is the video that is read; choose another name")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every: expected a positive integer, got {every!r}")
