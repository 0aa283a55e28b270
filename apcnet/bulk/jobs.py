"""Plans a job: the files that each source is written to, which are no source, and which no two sources share."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apcnet.bulk.sources import Item, Kind

CONTAINERS = (".mp4", ".mov", ".mkv", ".webm")  # of videos that can be written


class Wanted(NamedTuple):
    """Describes what to write beside the labels: the overlay's suffix or None, confidence and probabilities."""

    overlay: str | None
    confidence: bool
    probabilities: bool


class Job(NamedTuple):
    """Holds a source to predict and the files to write, relative to the output folder; None for no file."""

    number: int  # in the order of sources
    source: Path | str
    kind: Kind
    labels: Path | None
    overlay: Path | None
    confidence: Path | None
    probabilities: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Lists the files, at least one."""
        return tuple(path for path in self[3:] if path is not None)


def list_jobs(items: Sequence[Item], out: Path, wanted: Wanted) -> list[Job]:
    """Lists the jobs in the order of the items; raises an error if a file is written twice or is a source."""
    alike = Counter(item.place.with_suffix("") for item in items)
    # realpath takes a link to itself as it is
    read = {os.path.realpath(item.source) for item in items if isinstance(item.source, Path)}
    written: dict[Path, Path | str] = {}
    jobs = []
    for number, item in enumerate(items):
        name = item.place.name if alike[item.place.with_suffix("")] > 1 else item.place.stem
        job = Job(number, item.source, item.kind, *_files(item, item.place.with_name(name), wanted))
        for path in job.files:
            if os.path.realpath(out / path) in read:
                raise ValueError(f"out: {out / path} is one of the images that are read; choose another folder")
            if path in written:
                raise ValueError(f"{written[path]} and {item.source}: both would be written to {out / path}")
            written[path] = item.source
        jobs.append(job)
    return jobs


def _files(item: Item, place: Path, wanted: Wanted) -> tuple[Path | None, Path | None, Path | None, Path | None]:
    """Names the files of an item, and raises an error for those that its kind does not have.

    Rasters have no overlay, but their labels show the colours of classes. Videos have the overlay alone.
    """

    def named(end: str, is_wanted: object = True) -> Path | None:
        return place.with_name(f"{place.name}{end}") if is_wanted else None

    if wanted.probabilities and item.kind != "image":
        raise ValueError(f"probabilities: expected images alone, got the {item.kind} {item.source}")
    if item.kind == "raster":
        return named(".tif"), None, named("_confidence.tif", wanted.confidence), None
    if item.kind != "image":
        if wanted.overlay is None or wanted.confidence:
            option = "confidence: expected images and rasters" if wanted.overlay else "overlay: expected jpg or png"
            raise ValueError(f"{option}, got the video {item.source}, whose overlay alone is written")
        suffix = item.place.suffix.lower()
        return None, named(f"_overlay{suffix if suffix in CONTAINERS else '.mp4'}"), None, None
    return (
        named(".png"),
        named(f"_overlay.{wanted.overlay}", wanted.overlay),
        named("_confidence.png", wanted.confidence),
        named("_probabilities.npy", wanted.probabilities),
    )
