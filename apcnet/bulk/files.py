"""Predicts files and whole folders, and writes label maps and overlays: `predict_files`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from apcnet import draw
from apcnet.bulk.sources import list_jobs
from apcnet.choices import check_choice
from apcnet.config import Precision, Protocol
from apcnet.inference.levels import model_levels
from apcnet.inference.prediction import predict_levels, prepared_model
from apcnet.inference.protocol import WHOLE
from apcnet.inference.tiles import MAX_PIXELS
from apcnet.models.segmentor import Segmentor


class Report(NamedTuple):
    """Holds the number of images that predict_files has finished, and an error for each failed image."""

    done: int
    failures: list[str]


def predict_files(
    model: Segmentor | str | Path,
    sources: str | Path | Iterable[str | Path],
    out: str | Path,
    protocol: Protocol = WHOLE,
    *,
    max_pixels: int = MAX_PIXELS,
    precision: Precision = "float32",
    overlay: Literal["jpg", "png"] | None = "jpg",
    opacity: float = 0.5,
    confidence: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Predicts files and all images in folders, and continues after images that cannot be read.

    For photos/street/a.jpg in the source photos, it writes the labels to out/street/a.png and the overlay to
    out/street/a_overlay.jpg. Two images that differ only in their suffix keep it: a.jpg.png. If no font has the letters
    of some classes, overlays show their numbers, and out/legend.txt lists the names.

    Args:
        model, protocol, max_pixels, precision: As in `predict`.
        sources: Files and folders. Hidden files, and `out` inside a source, are skipped.
        out: Output folder, created when needed. Files of an earlier run are replaced; source images never are.
        overlay: Suffix of the overlays; None writes labels only.
        opacity: Opacity of the colours in overlays.
        confidence: Also write the probability of every pixel's label, as grey levels to out/street/a_confidence.png.
        progress: Called with the number of finished images and the total.

    Returns:
        The number of finished images, and an error for each failed one.
    """
    if overlay is not None:
        check_choice(overlay, "overlay", ("jpg", "png"))
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected 0 to 1, got {opacity}")
    failures = []
    jobs = list_jobs([sources] if isinstance(sources, (str, Path)) else sources, Path(out), overlay, confidence)
    with prepared_model(model, max_pixels, precision, several=True) as prepared:
        for done, job in enumerate(jobs, 1):
            try:
                levels = model_levels(prepared, job.source, str(job.source))
                prediction = predict_levels(prepared, levels, str(job.source), protocol, max_pixels, confidence)
            except (ValueError, OSError) as error:  # of this image: the options are checked, and nothing is written yet
                failures.append(str(error))
            else:
                job.labels.parent.mkdir(parents=True, exist_ok=True)
                prediction.save(job.labels)
                if job.overlay is not None:
                    draw.save(prediction.overlay(opacity), job.overlay)
                    draw.save_names(Path(out), prediction.classes)
                if job.confidence is not None:
                    prediction.save_confidence(job.confidence)
            if progress is not None:
                progress(done, len(jobs))
    return Report(len(jobs) - len(failures), failures)
