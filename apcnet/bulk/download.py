"""Downloads files to predict over HTTP, within limits of time and size."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

TIMEOUT = 30.0  # seconds without data
GRACE, SLOWEST = 30.0, 10_000  # after so many seconds, the bytes per second below which a download is given up
LARGEST = 1 << 32  # bytes
CHUNK = 1 << 18  # bytes


@contextmanager
def local_file(source: Path | str) -> Iterator[Path]:
    """Gives the path of a file; that of a URL is downloaded, and deleted when the block ends.

    Errors about the downloaded file name the URL. A download that fails is a ValueError.
    """
    if isinstance(source, Path):
        yield source
        return
    folder = Path(tempfile.mkdtemp(prefix="apcnet-"))
    path = folder / "download"
    try:
        _download(source, path)
        yield path
    except (ValueError, OSError) as error:
        if str(path) not in str(error):
            raise
        raise ValueError(str(error).replace(str(path), source)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(url: str, path: Path) -> None:
    """Downloads a URL to a file, or raises a ValueError that says why not."""
    received, start = 0, time.monotonic()
    try:
        request = Request(url, headers={"User-Agent": "apcnet"})
        with urlopen(request, timeout=TIMEOUT) as response, path.open("wb") as file:
            length = response.headers.get("Content-Length")
            if length and int(length) > LARGEST:
                raise ValueError(f"{url}: expected at most {LARGEST:,} bytes, got a file of {int(length):,}")
            while chunk := response.read1(CHUNK):
                received += len(chunk)
                if received > LARGEST:
                    raise ValueError(f"{url}: expected at most {LARGEST:,} bytes, got more")
                elapsed = time.monotonic() - start
                if elapsed > GRACE and received < SLOWEST * elapsed:
                    raise ValueError(f"{url}: the download is too slow: {received:,} bytes in {elapsed:.0f} seconds")
                file.write(chunk)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise ValueError(f"{url}: the download failed: {getattr(error, 'reason', error)}") from error
    if length and received != int(length):
        raise ValueError(f"{url}: the download broke off after {received:,} of {int(length):,} bytes")
