"""Predicts what is read while it is predicted: rasters in windows, videos and cameras frame by frame.

Each needs the package of an extra, which is imported with the first of its kind.
"""

from collections.abc import Callable
from pathlib import Path

from apcnet.bulk.download import local_file
from apcnet.bulk.jobs import Job
from apcnet.bulk.sources import CAMERA
from apcnet.config import Precision, Protocol
from apcnet.models.segmentor import Segmentor


def predict_large(
    model: Segmentor,
    job: Job,
    out: Path,
    alive: Callable[[], object],
    *,
    protocol: Protocol,
    max_pixels: int,
    precision: Precision,
    opacity: float,
) -> list[str]:
    """Predicts a raster or video, and returns what is wrong with it, although its files could be written.

    Args:
        model: A model on any device.
        job: The raster, video, camera or stream.
        out: Where to write the labels of a raster, or the overlay of a video. The confidence of a raster goes to a
            file beside it.
        alive: Called after every window or frame.
        protocol, max_pixels, precision: As in `apcnet.predict`.
        opacity: Opacity of the colours in overlays.
    """
    shared = {"max_pixels": max_pixels, "precision": precision, "progress": lambda *_: alive()}
    if job.kind == "live":
        from apcnet.bulk.video import predict_video

        camera = CAMERA.fullmatch(str(job.source))
        source = int(camera[1]) if camera else str(job.source)
        return list(predict_video(model, source, out, protocol, opacity=opacity, **shared).failures)
    with local_file(job.source) as path:
        if job.kind == "video":
            from apcnet.bulk.video import predict_video

            return list(predict_video(model, path, out, protocol, opacity=opacity, **shared).failures)
        from apcnet.bulk.raster import predict_raster

        predict_raster(model, path, out, protocol, confidence=job.confidence is not None, **shared)
        return []
