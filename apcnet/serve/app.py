"""Makes the application that serves models over HTTP: its routes, and the way of a request through them.

A request's body is read up to a limit, its image is opened and decoded in one of a few threads, the queue's thread runs
the network on all images of a size that wait, and the answer is made in one of the few threads again. The event loop
itself only passes things on.
"""

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from torch import Tensor

from apcnet.files import printable
from apcnet.inference.prediction import Prediction
from apcnet.serve import images, openapi
from apcnet.serve.answers import ANSWERS, WITH_CONFIDENCE, Parameters
from apcnet.serve.guard import GONE, Guard
from apcnet.serve.limits import PACE, FullError, Limits, Room
from apcnet.serve.metrics import CONTENT_TYPE, Metrics
from apcnet.serve.network import Served
from apcnet.serve.page import page
from apcnet.serve.queue import BatchQueue, Done

Anything = TypeVar("Anything")

RETRY_AFTER = {"Retry-After": "1"}  # seconds
LAST_BATCH = 5.0  # seconds for which a server that stops waits for the network
MOST_THREADS = 4  # that decode images and make answers


def create_app(
    models: Mapping[str, Served], limits: Limits | None = None, *, pages: Sequence[BaseRoute] = ()
) -> Starlette:
    """Creates the ASGI application that serves models.

    Args:
        models: The models by name; the first one predicts where a request names none.
        limits: The limits of the server.
        pages: Further routes; they come first, so that one of them may stand in for the page at /. Their endpoints find
            the server in `request.app.state.server`, see `Server`.

    Example:
        >>> app = create_app({"scenes": Served(apcnet.load("best.safetensors"))})
        >>> uvicorn.run(app)
    """
    if not models:
        raise ValueError("models: expected one or more, got none")
    server = Server(models, limits or Limits())
    routes: list[BaseRoute] = [*pages, _get("/", lambda request: HTMLResponse(page(server, request)))]
    routes += [Route(f"/{name}", _predicting(name), methods=["POST"]) for name in ANSWERS]
    routes += [
        _get("/models", lambda request: JSONResponse(server.listing())),
        _get("/health", lambda request: PlainTextResponse("alive\n")),
        _get("/ready", lambda request: server.ready()),
        _get("/metrics", lambda request: PlainTextResponse(server.metrics.text(), media_type=CONTENT_TYPE)),
        _get("/openapi.json", lambda request: JSONResponse(server.document)),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await asyncio.to_thread(server.stop)

    paths = frozenset(route.path for route in routes if isinstance(route, Route))
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, metrics=server.metrics, paths=paths)],
        exception_handlers={
            HTTPException: _refused,
            images.ImageError: _handler(lambda error: _error(error.status, str(error))),
            FullError: _handler(lambda error: _error(503, str(error), RETRY_AFTER)),
            ClientDisconnect: _handler(lambda error: Response(status_code=GONE)),
            Exception: _handler(lambda error: _error(500, "the server failed; its log says why")),
        },
    )
    app.router.redirect_slashes = False
    app.state.server = server
    return app


class Server:
    """Holds what the requests of a server share.

    Attributes:
        models: The models by name.
        limits: The limits.
        room: The images and bytes that requests hold.
        metrics: The counters.
        queue: The queue whose thread owns the networks; `start` makes it, and `stop` closes it.
        is_stuck: True if the network still ran when the server had stopped.
    """

    def __init__(self, models: Mapping[str, Served], limits: Limits):
        self.models, self.limits, self.room = dict(models), limits, Room(limits)
        gauges: dict[tuple[str, str], Callable[[], int]] = {
            ("apcnet_queue_images", "Images that wait for the network."): lambda: len(self.queue),
            ("apcnet_held_images", "Images that are held, from their header to their answer."): lambda: (
                self.room.images
            ),
            ("apcnet_held_bytes", "Bytes of bodies that are held."): lambda: self.room.bytes,
        }
        self.metrics, self.is_stuck = Metrics(limits.batch, gauges), False
        self.parameters = openapi.parameters(self.models, limits)
        self.document = openapi.document(self.parameters, limits)

    def start(self) -> None:
        """Starts the threads."""
        self.queue = BatchQueue(self.limits.wait, self.metrics.batch)
        self.threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "apcnet images")

    def stop(self) -> None:
        """Stops the threads; requests have been answered or cancelled before, and only a batch may run still."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.is_stuck = not self.queue.close(LAST_BATCH)

    def ready(self) -> Response:
        """Answers whether the server takes images."""
        if self.queue.is_running:
            return PlainTextResponse("ready\n")
        return _error(503, "the server stops", RETRY_AFTER)

    def listing(self) -> dict[str, Any]:
        """Returns the models, their classes and colours."""
        return {
            "models": [
                {
                    "name": name,
                    "classes": list(served.classes),
                    "palette": ["#{:02x}{:02x}{:02x}".format(*color) for color in served.palette],
                }
                for name, served in self.models.items()
            ]
        }

    async def in_thread(self, function: Callable[..., Anything], *arguments: Any) -> Anything:
        """Runs a function in one of the threads for images."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    @asynccontextmanager
    async def image_of(self, request: Request) -> AsyncIterator[Tensor]:
        """Decodes the image of a request, (3, H, W) uint8, and holds a place for it until the end of the block."""
        kind = request.headers.get("content-type", "")
        images.check_type(kind)
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise HTTPException(415, f"Content-Encoding: expected none, got {coding[:100]}")
        self.room.check()
        with ExitStack() as held:
            async with self._body_of(request) as body:
                content = images.image_part(body, kind)
                opened = await self.in_thread(images.opened, content, self.limits.max_pixels)
                held.enter_context(self.room.image(opened.width * opened.height))
                levels = await self.in_thread(images.decoded, opened)
            del body, content, opened
            yield levels

    async def predict(self, request: Request, image: Tensor, parameters: Parameters, confidence: bool) -> Done:
        """Predicts the labels of an image in the batch that it meets; its value is a Prediction."""
        name, longest = str(parameters["model"]), int(parameters["size"])
        served = self.models[name]
        protocol = served.protocol
        if longest:
            protocol = dataclasses.replace(protocol, test_scale=(longest, longest), window=None, stride=None)
        size = image.shape[1], image.shape[2]

        def run(items: Sequence[tuple[Tensor, bool]]) -> list[Prediction]:
            return served.predict([each for each, _ in items], protocol, any(asked for _, asked in items))

        most = min(self.limits.batch, served.most(size, protocol))
        return await self.result(request, self.queue.submit((name, protocol, size), (image, confidence), run, most))

    async def result(self, request: Request, future: "Future[Done]") -> Done:
        """Waits for a future of the queue, but not for longer than its client and the limit do."""
        answer = asyncio.ensure_future(asyncio.wrap_future(future))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({answer, gone}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            if gone.done():
                raise ClientDisconnect
            seconds = self.limits.timeout
            raise HTTPException(503, f"answer: expected within {seconds:g} s, got none; try again later", RETRY_AFTER)
        finally:
            answer.cancel()
            gone.cancel()

    @asynccontextmanager
    async def _body_of(self, request: Request) -> AsyncIterator[bytes]:
        """Reads the body of a request, and counts its bytes until the end of the block."""
        most, declared = self.limits.max_bytes, int(request.headers.get("content-length", "0"))
        if declared > most:
            raise HTTPException(413, f"body: expected at most {most} bytes, got {declared}")
        body, count, start, stream = bytearray(), 0, time.monotonic(), request.stream()
        try:
            while True:
                seconds = self.limits.timeout + count / PACE - (time.monotonic() - start)
                try:
                    chunk = await asyncio.wait_for(anext(stream), seconds)
                except StopAsyncIteration:
                    break
                except asyncio.TimeoutError:  # another class before Python 3.11
                    got = f"{count} bytes of {declared or 'an unknown number'}"
                    raise HTTPException(408, f"body: expected within {self.limits.timeout:g} s, got {got}") from None
                if count + len(chunk) > most:
                    raise HTTPException(413, f"body: expected at most {most} bytes, got more")
                self.room.add_bytes(len(chunk))
                count += len(chunk)
                body += chunk
            content = bytes(body)
            del body
            yield content
        finally:
            self.room.bytes -= count


def _predicting(name: str) -> Callable[[Request], Any]:
    """Returns the endpoint that answers an image in one of the ways of ANSWERS."""

    async def endpoint(request: Request) -> Response:
        server: Server = request.app.state.server
        try:
            parameters = openapi.read_query(request.query_params.multi_items(), server.parameters)
        except ValueError as error:
            raise HTTPException(422, printable(error, 500)) from None
        start = time.monotonic()
        async with server.image_of(request) as image:
            decoded = time.monotonic()
            done = await server.predict(request, image, parameters, name in WITH_CONFIDENCE)
            predicted = time.monotonic()
            answer = await server.in_thread(ANSWERS[name], done.value, parameters)
        times = {
            "body": decoded - start,
            "queue": done.waited,
            "network": done.took,
            "answer": time.monotonic() - predicted,
        }
        answer.headers["Server-Timing"] = ", ".join(f"{step};dur={1000 * took:.1f}" for step, took in times.items())
        return answer

    return endpoint


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _get(path: str, answer: Callable[[Request], Response]) -> Route:
    """Returns a route whose answer takes no time, and needs no thread."""

    async def endpoint(request: Request) -> Response:
        return answer(request)

    return Route(path, endpoint)


def _handler(answer: Callable[[Any], Response]) -> Callable[[Request, Exception], Any]:
    async def handler(request: Request, error: Exception) -> Response:
        return answer(error)

    return handler


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"status": status, "error": message}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        served = ", ".join(dict.fromkeys(route.path for route in request.app.routes))
        message = f"path: expected one of {served}, got {printable(request.url.path)}"
    if error.status_code == 405:
        message = f"method: expected {(error.headers or {}).get('Allow', 'another')}, got {printable(request.method)}"
    return _error(error.status_code, message, error.headers)
