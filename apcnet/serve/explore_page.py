"""Defines the routes of `apcnet explore`: the page, its files, generated scenes, and what explore.py computes.

Records are computed in the thread of the server's queue, one at a time, and sent as bytes (`explore.pack`).
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from apcnet.files import printable
from apcnet.serve import explore
from apcnet.serve.limits import Limits
from apcnet.serve.network import Served
from apcnet.serve.openapi import Parameter, read_query

WEB = Path(__file__).resolve().parents[1] / "web"
FILES = ("overlay.css", "overlay.js", "explore.css", "explore.js", "context.js", "heat.js")
TYPES = {".css": "text/css", ".js": "text/javascript"}
MOST_MODELS = 2
LIMITS = Limits(max_bytes=1 << 26, max_pixels=1 << 26, timeout=600.0)  # one person's photos, and time for a slow CPU
LONGEST_SIDE = 1 << 16  # more than explore.largest_side returns

# The page can load and ask nothing but this server.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


def pages() -> list[Route]:
    """Returns the routes, for `create_app(models, pages=pages())`."""
    return [
        Route("/", _page),
        Route("/web/{name}", _file),
        Route("/explore/models", _models),
        Route("/explore/samples/{index:int}", _sample),
        Route("/explore/picture", _picture, methods=["POST"]),
        Route("/explore/view", _recording(explore.see), methods=["POST"]),
        Route("/explore/context", _recording(explore.look_inside), methods=["POST"]),
    ]


async def _page(request: Request) -> Response:
    return Response((WEB / "explore.html").read_bytes(), media_type="text/html", headers=HEADERS)


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in FILES:
        raise HTTPException(404)
    path = WEB / name
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)


async def _models(request: Request) -> Response:
    models = request.app.state.server.models
    described = [explore.about(name, served) for name, served in models.items()]
    return JSONResponse({"models": described, "samples": len(explore.SAMPLES)})


async def _sample(request: Request) -> Response:
    index = request.path_params["index"]
    if index >= len(explore.SAMPLES):
        raise HTTPException(404)
    return await request.app.state.server.in_thread(lambda: _png(explore.sample(index)))


async def _picture(request: Request) -> Response:
    """Returns a picture as the models see it, for browsers that cannot decode its format."""
    server = request.app.state.server
    async with server.image_of(request) as image:
        return await server.in_thread(_png, image)


def _recording(compute: Callable[[Sequence[Served], Tensor, int], dict]) -> Callable:
    """Returns an endpoint that computes a record of the image in the request's body."""

    async def endpoint(request: Request) -> Response:
        server = request.app.state.server
        try:
            side = int(read_query(request.query_params.multi_items(), {"side": SIDE})["side"])
        except ValueError as error:
            raise HTTPException(422, printable(error, 500)) from None
        models = list(server.models.values())[:MOST_MODELS]
        async with server.image_of(request) as image:
            future = server.queue.submit(compute, image, lambda images: [compute(models, images[0], side)])
            done = await server.result(request, future)
            content = await server.in_thread(explore.pack, done.value)
        return Response(content, media_type="application/octet-stream")

    return endpoint


def _read_side(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:9]) > LONGEST_SIDE:
        raise ValueError(f"a whole number from 0 to {LONGEST_SIDE}")
    return int(text)


SIDE = Parameter(0, {"type": "integer"}, _read_side, "The longest side of the network's input; 0 for the usual one.")


def _png(image: Tensor) -> Response:
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, "png", compress_level=1)
    return Response(content.getvalue(), media_type="image/png")
