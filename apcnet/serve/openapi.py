"""Describes the HTTP interface of the server: its parameters, and its OpenAPI document."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import apc_kernels
from apcnet.serve.limits import Limits


class Parameter(NamedTuple):
    """Describes a parameter of a query; `read` raises a ValueError that says what is expected."""

    default: str | int | float | bool
    schema: dict[str, Any]
    read: Callable[[str], str | int | float | bool]
    text: str


def parameters(models: Iterable[str], limits: Limits) -> dict[str, Parameter]:
    """Returns the parameters of a prediction, by name; the first model is the default."""
    names, longest = list(models), math.isqrt(limits.max_pixels)
    return {
        "model": Parameter(names[0], {"type": "string", "enum": names}, _one_of(names), "The model that predicts."),
        "size": Parameter(
            0,
            {"type": "integer", "minimum": 0, "maximum": longest},
            _number(int, 0, longest),
            "The longest side of the image that the network sees; 0 for what the server was started with.",
        ),
        "opacity": Parameter(
            0.5, {"type": "number", "minimum": 0, "maximum": 1}, _number(float, 0, 1), "Share of colours in overlays."
        ),
        "legend": Parameter(True, {"type": "boolean"}, _is_true, "Draw the names of classes below an overlay."),
        "format": Parameter(
            "jpeg", {"type": "string", "enum": ["jpeg", "png"]}, _one_of(["jpeg", "png"]), "The format of an overlay."
        ),
    }


def read_query(items: Iterable[tuple[str, str]], known: Mapping[str, Parameter]) -> dict[str, str | int | float | bool]:
    """Returns the value of each parameter, or raises an error that names the one that is wrong."""
    given: dict[str, str | int | float | bool] = {}
    for name, text in items:
        if name not in known:
            raise ValueError(f"query: expected parameters of {', '.join(known)}, got {name[:100]}")
        if name in given:
            raise ValueError(f"{name}: expected one value, got {text[:100]} too")
        try:
            given[name] = known[name].read(text)
        except ValueError as error:
            raise ValueError(f"{name}: expected {error}, got {text[:100]}") from None
    return {name: parameter.default for name, parameter in known.items()} | given


def _one_of(names: list[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return read


def _number(kind: type[int] | type[float], least: int, most: int) -> Callable[[str], int | float]:
    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ValueError(f"{'a whole' if kind is int else 'a'} number from {least} to {most}")
        return value

    return read


def _is_true(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


IMAGE = {"type": "string", "format": "binary"}
TEXT = {"type": "string"}
ERROR = {
    "type": "object",
    "required": ["status", "error"],
    "properties": {"status": {"type": "integer"}, "error": TEXT},
}
CLASS = {
    "type": "object",
    "required": ["index", "name", "color", "pixels", "share"],
    "properties": {
        "index": {"type": "integer"},
        "name": TEXT,
        "color": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
        "pixels": {"type": "integer", "minimum": 1},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
CLASSES = {
    "type": "object",
    "required": ["model", "width", "height", "classes"],
    "properties": {
        "model": TEXT,
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "classes": {"type": "array", "items": {"$ref": "#/components/schemas/Class"}},
    },
}
BASE64 = {"type": "string", "contentEncoding": "base64"}
EVERYTHING = {
    "type": "object",
    "required": [*CLASSES["required"], "labels", "overlay", "confidence"],
    "properties": {
        **CLASSES["properties"],
        "labels": {**BASE64, "contentMediaType": "image/png"},
        "overlay": {**BASE64, "contentMediaType": "image/jpeg"},
        "confidence": {**BASE64, "contentMediaType": "image/png"},
    },
}
MODELS = {
    "type": "object",
    "required": ["models"],
    "properties": {
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "classes", "palette"],
                "properties": {
                    "name": TEXT,
                    "classes": {"type": "array", "items": TEXT},
                    "palette": {"type": "array", "items": {"type": "string", "pattern": "^#[0-9a-f]{6}$"}},
                },
            },
        }
    },
}
SCHEMAS = {"Error": ERROR, "Class": CLASS, "Classes": CLASSES, "Everything": EVERYTHING, "Models": MODELS}

PREDICTIONS = {  # path: summary, media types of the answer
    "/predict": ("Returns classes, labels, overlay and confidence.", {"application/json": "Everything"}),
    "/classes": ("Returns the classes in the image, with their pixels and shares.", {"application/json": "Classes"}),
    "/labels": ("Returns the labels as a PNG of palette indices.", {"image/png": IMAGE}),
    "/overlay": ("Returns the colours of the labels over the image.", {"image/jpeg": IMAGE, "image/png": IMAGE}),
    "/confidence": ("Returns the probability of each pixel's label as grey levels.", {"image/png": IMAGE}),
    "/raw": (
        "Returns the label of each pixel, row by row, and then the probability of each, 255 for 1.",
        {"application/octet-stream": IMAGE},
    ),
}
OTHERS = {
    "/": ("Shows a page on the server.", {"text/html": TEXT}),
    "/models": ("Lists the models, their classes and colours.", {"application/json": "Models"}),
    "/health": ("Says that the server lives.", {"text/plain": TEXT}),
    "/ready": ("Says whether the server takes images.", {"text/plain": TEXT}),
    "/metrics": ("Returns counters for Prometheus.", {"text/plain": TEXT}),
    "/openapi.json": ("Returns this document.", {"application/json": {"type": "object"}}),
}
REFUSALS = {
    "408": "The request did not arrive in time.",
    "413": "The body has too many bytes, or the image too many pixels.",
    "415": "The body is of a type that holds no image.",
    "422": "The image cannot be read, or a parameter is wrong.",
    "503": "There are too many images, or the labels did not come in time; Retry-After says when to try again.",
}


def document(known: Mapping[str, Parameter], limits: Limits) -> dict[str, Any]:
    """Returns the OpenAPI document of a server."""
    query = [
        {
            "name": name,
            "in": "query",
            "description": parameter.text,
            "schema": {**parameter.schema, "default": parameter.default},
        }
        for name, parameter in known.items()
    ]
    form = {"type": "object", "required": ["image"], "properties": {"image": IMAGE}}
    body = {
        "required": True,
        "description": f"An image of at most {limits.max_bytes} bytes and {limits.max_pixels} pixels.",
        "content": {"image/*": {"schema": IMAGE}, "multipart/form-data": {"schema": form}},
    }
    paths: dict[str, Any] = {}
    for path, (summary, content) in PREDICTIONS.items():
        responses = {"200": _response(summary, content)} | {status: _refusal(text) for status, text in REFUSALS.items()}
        operation = {"operationId": path[1:], "summary": summary, "parameters": query, "requestBody": body}
        paths[path] = {"post": {**operation, "responses": responses}}
    for path, (summary, content) in OTHERS.items():
        responses = {"200": _response(summary, content)}
        if path == "/ready":
            responses["503"] = _refusal("The server stops.")
        paths[path] = {"get": {"operationId": path[1:] or "page", "summary": summary, "responses": responses}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "apcnet serve", "version": apc_kernels.__version__},
        "paths": paths,
        "components": {"schemas": SCHEMAS},
    }


def _response(text: str, content: dict[str, Any]) -> dict[str, Any]:
    schemas = {
        kind: {"schema": schema if isinstance(schema, dict) else {"$ref": f"#/components/schemas/{schema}"}}
        for kind, schema in content.items()
    }
    return {"description": text, "content": schemas}


def _refusal(text: str) -> dict[str, Any]:
    return _response(text, {"application/json": "Error"})
