"""What is published of the five models: figures, by whom; weights, where they lie; and how they get here.

published.csv has a line for each run or file. Figures of mmsegmentation are those of the READMEs beside its configs; a
page with results of the five models that is often met shows PSPNet's rows under APCNet's name, down to their links, and
nothing here is from it. Of files there are those that a model here can hold: no ResNetV1b ("r50b", "rsb"), no output
stride that is none of 8, 16, 32 ("d32"), no dilated FCN head ("d6"). A file's name ends in the first eight digits of
its SHA-256.
"""

import csv
import hashlib
import re
from collections.abc import Callable
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from apcnet.files import replacing

SERVER = "https://download.openmmlab.com"
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte

Progress = Callable[[int, int | None], None]


class Published(NamedTuple):
    """Figures of one run; None: not published."""

    miou: float | None  # percent on the val split, at a single scale
    multi_scale: float | None  # the same, averaged over six scales and their mirror images
    memory: float | None  # GB on each of four GPUs in training
    fps: float | None  # images a second on a V100, one at a time, up to labels of their own size
    source: str


def _stem(name: str) -> str:
    """Of a file's or a config's name, what is neither date, hash nor suffix."""
    return re.sub(r"([_-]\d{8}_\d{6})?(-[0-9a-f]{8})?(\.pth|\.py)?$", "", name)


def _figures(row: dict[str, str]) -> Published:
    figures = (row[name] for name in Published._fields[:-1])
    return Published(*(float(figure) if figure else None for figure in figures), row["source"])


def _url(row: dict[str, str]) -> str:
    own_folder = f"{_stem(row['file'])}/" if row["folder"].startswith("mmsegmentation") else ""
    return f"{SERVER}/{row['folder']}/{own_folder}{row['file']}"


_ROWS = list(csv.DictReader((Path(__file__).parent / "published.csv").read_text(encoding="utf-8").splitlines()))
PUBLISHED = {row["preset"]: _figures(row) for row in _ROWS if row["preset"]}
URLS = {_stem(row["file"]): _url(row) for row in _ROWS if row["file"]}


def locate(name: str) -> str:
    """The URL of a published file by its name: of the file, or of the config (1.x's order of words will do)."""
    stem = _stem(name)
    if stem not in URLS:
        stem = next((known for known in URLS if _words(known) == _words(stem)), stem)
    if stem not in URLS:
        near = get_close_matches(stem, URLS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"they are called like {', '.join(list(URLS)[::24])}"
        raise ValueError(f"source: there is no file {name}, and no published weights are called {name}; {hint}")
    return URLS[stem]


def _words(name: str) -> list[str]:
    """fcn_r101-d8_4xb2-amp-80k_cityscapes-512x1024 and fcn_r101-d8_fp16_512x1024_80k_cityscapes have the same."""
    words = re.split("[_-]", name.lower().replace("amp", "fp16"))
    return sorted(word for word in words if not re.fullmatch(r"\d+xb\d+|\dx\d", word))


def fetch(source: str | Path, folder: str | Path, progress: Progress | None = None) -> Path:
    """The file that a path, a URL or the name of published weights stands for; it is downloaded into a folder.

    `progress` is called with how many bytes have come and how many there are (None if the server does not say).
    """
    if Path(source).exists():
        return Path(source)
    return download(str(source) if "://" in str(source) else locate(str(source)), folder, progress)


def download(url: str, folder: str | Path, progress: Progress | None = None) -> Path:
    """Brings a file, http or https, into a folder, whole or not at all, and returns where it is.

    Where its name ends in a hash, its content has to have it, and a file that has it already is not fetched again.
    """
    parts = urlsplit(url)
    name = PurePosixPath(parts.path).name
    if parts.scheme not in ("http", "https") or not name:
        raise ValueError(f"url: expected http(s)://…/FILE, got {url}")
    target = Path(folder) / name
    hashed = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    if hashed and target.is_file() and _sha256(target).startswith(hashed[1]):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        _fetch(url, temporary, progress)
        if hashed and not (found := _sha256(temporary)).startswith(hashed[1]):
            raise ValueError(f"{url}: expected a file whose SHA-256 begins with {hashed[1]}, got {found[:8]}…")
    return target


def _fetch(url: str, path: Path, progress: Progress | None) -> None:
    come = 0
    try:
        request = Request(url, headers={"User-Agent": "apcnet"})
        with urlopen(request, timeout=TIMEOUT) as response, path.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while chunk := response.read(CHUNK):
                file.write(chunk)
                come += len(chunk)
                if progress is not None:
                    progress(come, total)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise ValueError(f"{url} cannot be downloaded: {getattr(error, 'reason', error)}") from error
    if total is not None and come != total:
        raise ValueError(f"{url} cannot be downloaded: it broke off after {come} of {total} bytes")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
