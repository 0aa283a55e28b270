"""Serves a folder over HTTP on the loopback, as an object store does, and fails on purpose.

One answer in `every` is dropped, delayed, cut short, corrupted or refused, each in turn. `broken` names files of which
some bytes are always wrong. S3's clients read from it as well: a bucket is a folder.
"""

import itertools
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

FAULTS = ("drop", "delay", "truncate", "corrupt", "unavailable")
DELAY = 1.0  # seconds


class Server(ThreadingHTTPServer):
    """Holds what the handlers of all connections share."""

    daemon_threads = True

    def __init__(self, folder: Path, every: int, ranges: bool):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.every, self.ranges = folder, every, ranges
        self.answers = itertools.count(1)
        self.faults = itertools.cycle(FAULTS)
        self.seen: list[str] = []  # faults
        self.requests: list[tuple[str, int, int]] = []  # file, first byte, number of bytes
        self.broken: dict[str, int] = {}  # file: the byte that is always wrong
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        with self.lock:
            if not self.every or next(self.answers) % self.every:
                return None
            self.seen.append(next(self.faults))
            return self.seen[-1]

    def handle_error(self, request, client_address) -> None:
        """Ignores clients that close a connection."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, with ranges."""

    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = unquote(self.path.partition("?")[0]).strip("/")
        path, fault = self.server.folder / name, self.server.next_fault()
        if fault == "drop":
            return
        if fault == "delay":
            time.sleep(DELAY)
        if not path.is_file() or fault == "unavailable":
            self.send_error(503 if fault == "unavailable" else 404)
            return
        content = bytearray(path.read_bytes())
        if path.name in self.server.broken:
            content[self.server.broken[path.name]] ^= 1
        size, wanted = len(content), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = map(int, wanted.groups()) if wanted and self.server.ranges else (0, size)
        part = content[first : last + 1]
        self.server.requests.append((name, first, len(part)))
        self.send_response(206 if wanted and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
        if wanted and self.server.ranges:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "corrupt":
            part[len(part) // 2] ^= 0x10
        self.wfile.write(part[: len(part) // 2] if fault == "truncate" else part)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(folder: Path, every: int = 0, ranges: bool = True) -> Iterator[Server]:
    """Serves a folder until the block ends; every = 0 never fails."""
    with Server(folder, every, ranges) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
