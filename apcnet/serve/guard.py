"""Stands between the connections and the routes: counts every request, and ends those whose body is not read."""

import asyncio
import time
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from apcnet.serve.metrics import Metrics

# The rest of a refused body is thrown away, so that its client reads the answer, for so many seconds and bytes.
LINGER, LINGER_BYTES = 2.0, 1 << 26
GONE = 499  # the status by which metrics count a client that has gone


class Guard:
    """Wraps an ASGI application.

    A client that is refused while it sends may look for an answer only when it has sent all: the rest is read and
    thrown away for some time. After that, or if the client waits for permission to send, the connection is closed.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange, start = _Exchange(scope, receive, send), time.monotonic()
        self.metrics.in_flight += 1
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self.metrics.in_flight -= 1
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.request(path, GONE if exchange.gone else exchange.status, time.monotonic() - start)


class _Exchange:
    """Follows a request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        headers = dict(scope["headers"])
        self._receive, self._send = receive, send
        self.whole = b"content-length" not in headers and b"transfer-encoding" not in headers
        self.asks = headers.get(b"expect", b"").lower() == b"100-continue"  # until something is received
        self.gone, self.status = False, 500

    async def receive(self) -> Message:
        message = await self._receive()
        self.asks = False
        if message["type"] == "http.disconnect":
            self.gone = True
        elif not message.get("more_body", False):
            self.whole = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not self.whole:
                if not self.asks and self.status != 408:
                    await self._linger()
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await self._send(message)

    async def _linger(self) -> None:
        async def read() -> None:
            count = 0
            while not self.whole and not self.gone and count < LINGER_BYTES:
                count += len((await self.receive()).get("body", b""))

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), LINGER)
