"""Reads ranges of files in a folder, from a web server or from an object store, and repeats what does not arrive whole.

    folder                      read as any file
    http://…, https://…         by Python's own client; the server has to answer ranges
    s3://…, gs://…, and others  by fsspec, with the package that it names for the address

Every answer is checked against a checksum before it is used. A cache on a local disk keeps a part of the bytes that is
fixed in advance: of the index and then of all shards in their order as many as fit. Nothing is ever removed, because in
an epoch each sample is read once: whatever is removed for another sample would have been as good. So several processes
share a cache without agreeing on anything, and it never grows above its limit.
"""

import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from secrets import token_hex

from apcnet.data.sample import DamagedError
from apcnet.files import naming
from apcnet.keys import keyed

ATTEMPTS = 7  # so many in a row fail once in a billion reads, where one in twenty fails
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds; a pause doubles the one before
TIMEOUT = 30  # seconds of silence after which an answer is given up
REPEATABLE = (408, 425, 429)  # answers of web servers that ask for patience; so do those from 500 on

Check = Callable[[bytes], str | None]  # returns what is wrong with an answer


class Store:
    """Reads ranges of the files below a folder or an address.

    Args:
        root: A folder, or an address such as s3://bucket/folder.
        cache: The folder that keeps what was read; None for no cache.
        limit: The number of bytes that the cache keeps.
    """

    def __init__(self, root: str | Path, cache: Path | None = None, limit: int = 0):
        self.root = str(root)
        self.scheme = self.root.partition("://")[0].lower() if "://" in self.root else ""
        self.cache, self.limit = cache, limit
        self.starts: dict[str, int] = {}  # of each file, if all of them were one after the other

    def __str__(self) -> str:
        return self.root.partition("?")[0]  # a key to the store may follow

    def read_all(self, file: str, problem: Check) -> bytes:
        """Returns the content of a file, past the cache."""
        return self._repeat(file, 0, None, problem, "the file")

    def read(self, file: str, start: int, size: int, problem: Check, what: str) -> bytes:
        """Returns a range of a file, after `problem` has found nothing wrong with it; `what` names it in errors."""
        kept = self._kept(file, start, size)
        if kept is not None and kept.exists():
            content = kept.read_bytes()
            if problem(content) is None:
                return content
        content = self._repeat(file, start, size, problem, what)
        if kept is not None:
            _keep(kept, content)
        return content

    def _kept(self, file: str, start: int, size: int) -> Path | None:
        """Returns the file of the cache that is for a range, or None if it is beyond the limit."""
        if self.cache is None or self.starts[file] + start + size > self.limit:
            return None
        return self.cache / file / f"{start}-{size}"

    def _repeat(self, file: str, start: int, size: int | None, problem: Check, what: str) -> bytes:
        read = self._reader()
        for attempt in range(attempts := 1 if read is _read_local else ATTEMPTS):
            if attempt:
                pause = min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
                time.sleep(pause * (0.5 + keyed(os.getpid(), time.monotonic_ns()) / 2**64))  # not all at the same time
            try:
                content = read(self.root, file, start, size)
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # clients of object stores raise many kinds of errors
                if read is _read_local:
                    raise
                found = f"{what} at byte {start}: {type(error).__name__}: {error}"
                continue
            found = problem(content)
            if found is None:
                return content
        times = f", {attempts} times" if attempts > 1 else ""
        raise DamagedError(f"{self}/{file}: {found}{times}; upload it again, or check it with `apcnet check shards`")

    def _reader(self) -> Callable[[str, str, int, int | None], bytes]:
        if not self.scheme:
            return _read_local
        if self.scheme in ("http", "https"):
            return _read_web
        import fsspec  # comes with PyTorch

        try:
            fsspec.get_filesystem_class(self.scheme)
        except ImportError as error:
            raise ModuleNotFoundError(
                f"root: expected a package that reads {self.scheme}://, found none: {error} (pip install)"
            ) from None
        except ValueError:
            raise ValueError(f"root: expected a folder or an address that fsspec knows, got {self}") from None
        return _read_object


def _keep(path: Path, content: bytes) -> None:
    """Writes a file of the cache: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{token_hex(4)}.tmp")
    with naming(path, temporary):
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _read_local(root: str, file: str, start: int, size: int | None) -> bytes:
    with open(Path(root) / file, "rb") as opened:
        opened.seek(start)
        return opened.read(-1 if size is None else size)


def _read_web(root: str, file: str, start: int, size: int | None) -> bytes:
    parts = urllib.parse.urlsplit(root)
    address = parts._replace(path=f"{parts.path.rstrip('/')}/{urllib.parse.quote(file)}").geturl()
    headers = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=TIMEOUT) as answer:
            if size is not None and answer.status != http.client.PARTIAL_CONTENT:
                raise PermissionError(f"root: expected a server that answers ranges, got all of {file} from {root}")
            return answer.read() if size is None else answer.read(size)
    except urllib.error.HTTPError as error:
        shown = f"{root.partition('?')[0]}/{file}"
        if error.code in (404, 410):
            raise FileNotFoundError(f"{shown}: there is no such file ({error.code} {error.reason})") from None
        if error.code < 500 and error.code not in REPEATABLE:
            raise PermissionError(f"{shown}: the server refuses ({error.code} {error.reason})") from None
        raise


def _read_object(root: str, file: str, start: int, size: int | None) -> bytes:
    import fsspec

    system, base = fsspec.core.url_to_fs(root)  # kept by fsspec, and made anew in a process that was forked
    path = f"{base.rstrip('/')}/{file}"
    return system.cat_file(path) if size is None else system.cat_file(path, start=start, end=start + size)
