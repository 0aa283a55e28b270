"""Lists published results and weights of the models, and downloads weights.

published.csv has a line for each run or file. mmsegmentation's figures come from the READMEs of its configs; a common
page of results that shows PSPNet's rows under APCNet's name was not used. Only files that a model here can hold are
listed: no ResNetV1b ("r50b", "rsb"), no output stride other than 8, 16, 32 ("d32"), no dilated FCN head ("d6"). A
file's name ends in the first eight digits of its SHA-256.
"""

import csv
import hashlib
import re
import sys
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
TIMEOUT = 60  # seconds without data

Progress = Callable[[int, int | None], None]


class Published(NamedTuple):
    """Holds the published figures of one run; None means not published."""

    miou: float | None  # percent on the val split, at a single scale
    multi_scale: float | None  # the same with six scales and horizontal flips
    memory: float | None  # GB on each of four GPUs in training
    fps: float | None  # images per second on a V100, batch size 1, labels at the image's size
    source: str


def _stem(name: str) -> str:
    """Removes date, hash and suffix from the name of a file or config."""
    return re.sub(r"([_-]\d{8}_\d{6})?(-[0-9a-f]{8})?(\.pth|\.py)?$", "", name)


def _figures(row: dict[str, str]) -> Published:
    names = ("miou", "multi_scale", "memory", "fps")
    miou, multi_scale, memory, fps = (float(row[name]) if row[name] else None for name in names)
    return Published(miou, multi_scale, memory, fps, row["source"])


def _url(row: dict[str, str]) -> str:
    own_folder = f"{_stem(row['file'])}/" if row["folder"].startswith("mmsegmentation") else ""
    return f"{SERVER}/{row['folder']}/{own_folder}{row['file']}"


_ROWS = list(csv.DictReader((Path(__file__).parent / "published.csv").read_text(encoding="utf-8").splitlines()))
PUBLISHED = {row["preset"]: _figures(row) for row in _ROWS if row["preset"]}
URLS = {_stem(row["file"]): _url(row) for row in _ROWS if row["file"]}
TRAINED = {row["preset"]: _url(row) for row in _ROWS if row["preset"] and row["file"]}  # by presets of `apcnet train`


class DownloadError(ValueError):
    """Reports a download that failed or broke off."""


def locate(name: str, expected: str = "source: expected a file, a URL or the name of published weights") -> str:
    """Returns the URL of published weights.

    Args:
        name: Name of the file or of its config, in the spelling of mmsegmentation 0.x or 1.x; or of the preset that
            trains the same, where one without a schedule stands for the longest.
        expected: How the error about an unknown name begins.
    """
    lasting = [preset for preset in TRAINED if re.fullmatch(rf"{re.escape(name)}-\d+k", preset)]
    if name in TRAINED or lasting:
        return TRAINED[name if name in TRAINED else max(lasting, key=_thousands)]
    stem = _stem(name)
    if stem not in URLS:
        stem = next((known for known in URLS if _words(known) == _words(stem)), stem)
    if stem not in URLS:
        hint = "".join(f"did you mean {near}? " for near in get_close_matches(stem, [*TRAINED, *URLS], n=1, cutoff=0.4))
        raise ValueError(f"{expected}, got {name}; {hint}`apcnet presets` lists the names")
    return URLS[stem]


def _thousands(preset: str) -> int:
    return int(preset.rpartition("-")[2].removesuffix("k"))


def _words(name: str) -> list[str]:
    """Splits a name into sorted words, which are the same in both spellings of mmsegmentation.

    fcn_r101-d8_4xb2-amp-80k_cityscapes-512x1024 is fcn_r101-d8_fp16_512x1024_80k_cityscapes.
    """
    words = re.split("[_-]", name.lower().replace("amp", "fp16"))
    return sorted(word for word in words if not re.fullmatch(r"\d+xb\d+|\dx\d", word))


def fetch(source: str | Path, folder: str | Path, progress: Progress | None = None) -> Path:
    """Returns the local path of a checkpoint, and downloads it if it is not a local file.

    Args:
        source: Path, URL or name of published weights.
        folder: Folder for downloads.
        progress: Function that is called with (bytes received, bytes in total or None) during the download.

    Example:
        >>> fetch("pspnet_r50-d8_512x512_160k_ade20k", "weights")
    """
    if Path(source).exists():
        return Path(source)
    return download(str(source) if "://" in str(source) else locate(str(source)), folder, progress)


def download(url: str, folder: str | Path, progress: Progress | None = None) -> Path:
    """Downloads a file into a folder and returns its path; the file appears whole or not at all.

    If the name ends in a hash, the content must match it, and a file in the folder that matches is not fetched again.

    Args:
        url: http or https URL that ends in the file's name.
        folder: Folder for the file; it is made if it does not exist.
        progress: Function that is called with (bytes received, bytes in total or None).
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
            raise ValueError(f"{url}: expected a file with SHA-256 {hashed[1]}…, got {found[:8]}…")
    return target


def show_download(received: int, total: int | None) -> None:
    """Prints the number of megabytes received, over the previous number."""
    if sys.stderr.isatty():
        of_total = f" of {total / 1e6:.1f}" if total else ""
        print(f"\rdownload {received / 1e6:.1f}{of_total} MB", end="\n" if received == total else "", file=sys.stderr)


def _fetch(url: str, path: Path, progress: Progress | None) -> None:
    received = 0
    try:
        request = Request(url, headers={"User-Agent": "apcnet"})
        with urlopen(request, timeout=TIMEOUT) as response, path.open("wb") as file:
            length = response.headers.get("Content-Length")
            total = int(length) if length else None
            while chunk := response.read(CHUNK):
                file.write(chunk)
                received += len(chunk)
                if progress is not None:
                    progress(received, total)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise DownloadError(f"{url}: the download failed: {getattr(error, 'reason', error)}") from error
    if total is not None and received != total:
        raise DownloadError(f"{url}: the download broke off after {received} of {total} bytes")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
