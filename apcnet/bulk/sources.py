"""Lists what to predict: files, folders, patterns, lists of these, and URLs, each with its place in the output folder.

A folder gives its images, hidden files aside; videos are predicted if they are named, or match a pattern. A TIFF that
lies somewhere on earth, or is too large to be decoded at once, is a raster. The place of a file is its path below the
folder or the fixed part of the pattern; a file or URL that is named has its name alone. In a list, which may name files
of many folders, places are the paths as they are written.
"""

import glob
import hashlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from apcnet.data.layout import SUFFIXES
from apcnet.data.levels import tiff_tags

Kind = Literal["image", "raster", "video", "live"]  # live: a camera or a stream, which lasts until it is stopped
VIDEOS = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".webm", ".wmv")
WIDTH, HEIGHT, GEO_KEYS = 256, 257, 34735  # tags of a TIFF
LARGE = 1 << 26  # pixels of a TIFF that is read in windows
CAMERA, STREAM = re.compile(r"camera:(\d+)"), re.compile(r"(rtsps?|rtmps?|rtp|srt|udp|tcp)://", re.IGNORECASE)
URL = re.compile(r"https?://", re.IGNORECASE)


class Item(NamedTuple):
    """Holds a file, URL or camera to predict, and its place in the output folder: a relative path with its suffix."""

    source: Path | str
    place: Path
    kind: Kind


def find_items(sources: Iterable[str | Path], out: Path) -> list[Item]:
    """Lists what the sources stand for, each file once, without what is below `out`; the order is always the same."""
    found: dict[str, Item] = {}
    for item in itertools.chain.from_iterable(_items(source, out) for source in sources):
        found.setdefault(name_of(item.source), item)
    if not found:
        raise FileNotFoundError("sources: expected files or folders, got none")
    return _distinct(list(found.values()))


def name_of(source: Path | str) -> str:
    """Names a source in a manifest: its absolute path, or its URL."""
    return source if isinstance(source, str) else os.path.abspath(source)


def _items(source: str | Path, out: Path, listed: bool = False) -> Iterator[Item]:
    """Yields what a source stands for; a path that exists is that path, whatever characters it has."""
    text = str(source)
    if isinstance(source, str) and (URL.match(text) or STREAM.match(text)):
        place = _place_of_url(text, listed)
        is_video = place.suffix.lower() in VIDEOS
        yield Item(text, place, "live" if STREAM.match(text) else "video" if is_video else "image")
    elif os.path.isdir(text):
        for path in _images_below(Path(text), out):
            yield Item(path, _as_written(path) if listed else path.relative_to(text), _kind(path))
    elif os.path.exists(text):
        path = Path(text)
        if path.is_char_device():
            yield Item(text, Path(path.name), "live")
        else:
            yield Item(path, _as_written(path) if listed else Path(path.name), _kind(path))
    elif CAMERA.fullmatch(text):
        yield Item(text, Path(text.replace(":", "")), "live")
    elif text.startswith("@"):
        yield from _listed(Path(text[1:]), out)
    elif "://" in text:
        raise ValueError(f"{text}: expected a URL of http, https or a stream (rtsp, rtmp, rtp, srt, udp, tcp)")
    elif glob.has_magic(text):
        yield from _matches(text, out, listed)
    else:
        raise FileNotFoundError(f"{text}: there is no such file or folder")


def _images_below(folder: Path, out: Path) -> list[Path]:
    """Lists the images in a folder and its subfolders, except `out`, hidden files and links to folders."""
    found, kept = [], os.path.realpath(out)
    for place, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if not name.startswith(".") and os.path.realpath(Path(place, name)) != kept
        ]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    found = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder}: expected images in this folder, found none ({', '.join(SUFFIXES)})")
    return found


def _matches(pattern: str, out: Path, listed: bool) -> Iterator[Item]:
    """Yields the files that a pattern such as photos/**/*.jpg matches, without those below `out`."""
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    kept = os.path.realpath(out)
    paths = [Path(name) for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name)]
    paths = sorted(path for path in paths if not Path(os.path.realpath(path)).is_relative_to(kept))
    if not paths:
        raise FileNotFoundError(f"{pattern}: there is no such file or folder, and no file matches this pattern")
    for path in paths:
        yield Item(path, _as_written(path) if listed else path.relative_to(fixed), _kind(path))


def _listed(path: Path, out: Path) -> Iterator[Item]:
    """Yields what the lines of a text file stand for, paths from the current folder on; empty lines are skipped."""
    if not path.is_file():
        raise FileNotFoundError(f"@{path}: expected a text file with a source in each line, there is no file {path}")
    count = 0
    for line in path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
        source = line.removesuffix("\r")
        if source.strip():
            if source.startswith("@") and not os.path.exists(source):
                raise ValueError(f"@{path}: expected files, folders, patterns and URLs, got another list, {source}")
            yield from _items(source, out, listed=True)
            count += 1
    if not count:
        raise FileNotFoundError(f"@{path}: expected a source in each line, found none")


def _kind(path: Path) -> Kind:
    """Returns the kind of a file; what cannot be read is an image, and reading it says why."""
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        return "video"
    tags = tiff_tags(path) if suffix in (".tif", ".tiff") and path.is_file() else {}
    pixels = math.prod(tags.get(tag, [0])[0] for tag in (WIDTH, HEIGHT))
    return "raster" if GEO_KEYS in tags or pixels > LARGE else "image"


def _as_written(path: Path) -> Path:
    """Returns a path without its root and what leads out of a folder: the place of a listed file."""
    parts = Path(os.path.normpath(path)).parts
    return Path(*(part for part in parts if part not in (path.anchor, os.pardir)))


def _place_of_url(url: str, listed: bool) -> Path:
    """Returns the name in a URL, or for a listed one its host and path."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"{url}: expected a URL with a host, http(s)://HOST/FILE")
    names = [re.sub(r"[/\\\0]", "_", unquote(name)) for name in PurePosixPath(parts.path).parts[1:]]
    names = [name for name in names if name not in (os.curdir, os.pardir)] or [parts.hostname]
    return Path(parts.hostname, *names) if listed else Path(names[-1])


def _distinct(items: list[Item]) -> list[Item]:
    """Appends a hash of the URL to the names of URLs that end alike: those of …/image?id=1 and …/image?id=2."""
    count = Counter(item.place for item in items)
    return [
        item._replace(place=item.place.with_stem(f"{item.place.stem}-{_short_hash(item.source)}"))
        if isinstance(item.source, str) and count[item.place] > 1
        else item
        for item in items
    ]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
