"""Serves models over HTTP: send an image, get labels, an overlay, classes, or confidence.

app         the application: its routes, and the way of a request through them
connection  the server process: slow clients, signals
guard       what all requests share: counts, and bodies that are not read
images      bodies to images: types, headers, decoding
queue       one thread that runs the networks, in batches
network     several images through a model at once
answers     predictions to JSON, pictures and bytes
limits      sizes, times and numbers; what requests hold in memory
metrics     counters in Prometheus' text format
openapi     parameters, and the OpenAPI document
page        the plain page at /
explore     labels of one or two models and what their heads see, for the page of `apcnet explore`
explore_page  the routes of that page
"""

from importlib.util import find_spec
from typing import Any

__all__ = ["Limits", "Served", "create_app", "listen", "serve"]


def __getattr__(name: str) -> Any:
    """Imports the server at the first use: the command line needs its limits only, and no extra package."""
    if name not in __all__:
        raise AttributeError(f"module 'apcnet.serve' has no attribute {name!r}")
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise ModuleNotFoundError("apcnet serve needs starlette and uvicorn: pip install 'apc_kernels[serve]'")
    from apcnet.serve import app, connection, limits, network

    return getattr({"Limits": limits, "Served": network, "create_app": app}.get(name, connection), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
