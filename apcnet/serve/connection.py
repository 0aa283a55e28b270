"""Runs an application under uvicorn: cuts off clients that are too slow, and stops gracefully."""

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from apcnet.console import print_error
from apcnet.serve.limits import PACE, Limits

KEEP_ALIVE = 15  # seconds without a request, if the timeout is longer
STUCK = 1  # the exit status if the network still runs


class Connection(H11Protocol):
    """Speaks HTTP with a client, and closes the connection of one that sends a head, or reads an answer, too slowly."""

    def __init__(self, *arguments, limits: Limits, **options):
        super().__init__(*arguments, **options)
        self.limits = limits
        self.head_since: float | None = time.monotonic()  # when the head that is expected was begun
        self.unread_since: float | None = None  # when the answer that is not read yet was written
        self.unread = 0  # bytes of it at that time

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Refuses a client if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.write(_refusal(503, f"connections: expected at most {self.limits.connections}, got more"))
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Notes when a head begins, and when it is whole."""
        if self.head_since is None and self.conn.their_state is h11.IDLE:
            self.head_since = time.monotonic()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self.head_since = None

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(
                _refusal(400, "request: expected HTTP/1.1 with a head of at most 64 KiB, got other bytes")
            )
            self.transport.close()
        else:  # in the middle of an answer
            self.transport.abort()

    def close_if_late(self, now: float) -> None:
        """Closes the connection if its client has had more time than the limit."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting:
            self.unread_since = None
        elif self.unread_since is None:
            self.unread_since, self.unread = now, waiting
        elif now - self.unread_since > self.limits.timeout + self.unread / PACE:
            self.transport.abort()
        if self.head_since is not None and now - self.head_since > self.limits.timeout:
            if not self.transport.is_closing() and self.conn.our_state is h11.IDLE:
                seconds = self.limits.timeout
                self.transport.write(_refusal(408, f"request: expected a whole head within {seconds:g} s, got a part"))
            self.transport.close()


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, and checks every second that no client is late."""

    def __init__(self, config: uvicorn.Config, limits: Limits):
        super().__init__(config)
        self.limits = limits

    async def on_tick(self, counter: int) -> bool:
        """Closes late connections once a second; uvicorn calls it ten times."""
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                connection.close_if_late(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts nothing more, and waits for what was taken until the timeout; then it cuts all connections off."""
        cut = asyncio.get_running_loop().call_later(self.limits.timeout, self._cut_off)
        await super().shutdown(sockets)
        cut.cancel()

    def _cut_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops at a signal, and ends as if there had been none: the exit status is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def listen(host: str, port: int) -> socket.socket:
    """Opens the socket of a server; port 0 is any that is free."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port: expected 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"host, port: expected an address that is free, got {host} and {port}: {error.strerror}"
        ) from None
    # Its connections inherit this. asyncio sets it for sockets of its own only, and without it every answer, which is
    # written in two parts, would wait 40 ms for the client to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(app: Starlette, listener: socket.socket, on_start: Callable[[str], None]) -> None:
    """Serves an application until SIGTERM or SIGINT: then it accepts nothing more, finishes what it has, and returns.

    Args:
        app: What `create_app` returned.
        listener: The socket to accept connections on, of `listen`.
        on_start: Function that is called with the URL before the first request is accepted.
    """
    host, port = listener.getsockname()[:2]
    on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server_of(app).run([listener])
    if app.state.server.is_stuck:  # Python cannot end in an orderly way while the network runs in a thread
        print_error("the network did not finish in time: the server ends without it")
        os._exit(STUCK)


def server_of(app: Starlette) -> Server:
    """Returns the server that runs an application of `create_app`."""
    limits: Limits = app.state.server.limits
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits=limits),  # pyright: ignore[reportArgumentType]
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=min(KEEP_ALIVE, limits.timeout),
    )
    return Server(config, limits)


def _refusal(status: int, message: str) -> bytes:
    body = json.dumps({"status": status, "error": message}).encode()
    reason = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[status]
    retry = "Retry-After: 1\r\n" * (status == 503)
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{retry}"
    return f"{head}Connection: close\r\n\r\n".encode() + body
