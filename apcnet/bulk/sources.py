"""Lists the images in files and folders, and the files that their predictions are written to."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apcnet.data.layout import SUFFIXES


class Job(NamedTuple):
    """Holds an image to predict, and the files to write; None for those that were not asked for."""

    source: Path
    labels: Path
    overlay: Path | None
    confidence: Path | None


def list_jobs(sources: Iterable[str | Path], out: Path, overlay: str | None, confidence: bool) -> list[Job]:
    """Lists images with the files to write; refuses a file that is written twice or is a source."""
    found = {}  # where in out what comes of an image lies, by its path
    for source in map(Path, sources):
        if source.is_dir():
            below = _images_below(source, out)
            if not below:
                raise FileNotFoundError(f"{source}: expected images in this folder, found none ({', '.join(SUFFIXES)})")
            found |= {path: path.relative_to(source) for path in below}
        elif source.exists():
            found[source] = Path(source.name)
        else:
            raise FileNotFoundError(f"{source}: there is no such file or folder")
    if not found:
        raise FileNotFoundError("sources: expected files or folders, got none")
    alike = Counter(place.with_suffix("") for place in found.values())
    images, written, jobs = set(map(os.path.realpath, found)), {}, []  # realpath takes a link to itself as it is
    for source, place in found.items():
        name = place.name if alike[place.with_suffix("")] > 1 else place.stem
        ends = (".png", f"_overlay.{overlay}", "_confidence.png")
        labels, over, sure = (out / place.with_name(name + end) for end in ends)
        jobs.append(Job(source, labels, over if overlay else None, sure if confidence else None))
        for path in filter(None, jobs[-1][1:]):
            if os.path.realpath(path) in images:
                raise ValueError(f"out: {path} is one of the images that are read; choose another folder")
            if path in written:
                raise ValueError(f"{written[path]} and {source}: both would be written to {path}")
            written[path] = source
    return jobs


def _images_below(folder: Path, out: Path) -> list[Path]:
    """Lists the images in a folder and its subfolders, except `out`, hidden files and links to folders."""
    found, kept = [], os.path.realpath(out)
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(place, name)) != kept
        ]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)
