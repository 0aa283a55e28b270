"""Tests the OpenAPI document: its form, that it names the routes there are, and that the answers are as it says."""

import http.client
import io
import re
import socket
from collections.abc import Iterator

import bombs
import pytest
from PIL import Image
from serving import Answer, answer_of, ask, encoded, photo, post, running

from apcnet.serve import Limits, create_app

TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list}
METHODS = {"get", "post", "put", "delete", "patch", "head", "options", "trace"}


def mismatches(value, schema: dict, document: dict, place: str = "body") -> Iterator[str]:
    """Yields the places where a value is not as a schema says; an unknown keyword is an error."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/components/schemas/")
        yield from mismatches(value, document["components"]["schemas"][name], document, place)
        return
    assert set(schema) <= {
        *("type", "required", "properties", "items", "enum", "pattern", "minimum", "maximum"),
        *("default", "format", "contentEncoding", "contentMediaType"),
    }, place
    if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        yield f"{place}: expected {schema['type']}, got {value!r}"
        return
    if isinstance(value, dict):
        missing, unknown = (
            set(schema.get("required", ())) - set(value),
            set(value) - set(schema.get("properties", value)),
        )
        if missing or unknown:
            yield f"{place}: missing {missing}, unknown {unknown}"
        for name, part in schema.get("properties", {}).items():
            if name in value:
                yield from mismatches(value[name], part, document, f"{place}.{name}")
    if isinstance(value, list):
        for i, each in enumerate(value):
            yield from mismatches(each, schema["items"], document, f"{place}[{i}]")
    if "enum" in schema and value not in schema["enum"]:
        yield f"{place}: expected one of {schema['enum']}, got {value!r}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{place}: expected {schema['pattern']}, got {value!r}"
    if not schema.get("minimum", float("-inf")) <= (value if isinstance(value, (int, float)) else 0):
        yield f"{place}: expected at least {schema['minimum']}, got {value!r}"
    if not schema.get("maximum", float("inf")) >= (value if isinstance(value, (int, float)) else 0):
        yield f"{place}: expected at most {schema['maximum']}, got {value!r}"


@pytest.fixture(scope="module")
def document(port):
    return ask(port, "GET", "/openapi.json").json


def operations(document: dict) -> Iterator[tuple[str, str, dict]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield path, method, operation


def is_as_documented(answer: Answer, path: str, method: str, document: dict) -> None:
    """Checks the type and the content of an answer against the document."""
    response = document["paths"][path][method]["responses"][str(answer.status)]
    kind = answer.headers["Content-Type"].partition(";")[0]
    assert kind in response["content"], (path, answer.status, kind)
    schema = response["content"][kind]["schema"]
    if kind == "application/json":
        assert not list(mismatches(answer.json, schema, document)), (path, answer.json)
    elif kind.startswith("image/"):
        assert Image.open(io.BytesIO(answer.body)).get_format_mimetype() == kind
    else:
        assert answer.body


def test_the_document_has_the_form_of_openapi(document):
    assert re.fullmatch(r"3\.1\.\d", document["openapi"])
    assert document["info"]["title"] and document["info"]["version"]
    identifiers = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(identifiers) == len(set(identifiers)) == 12
    for path, method, operation in operations(document):
        assert path.startswith("/") and method in METHODS
        assert operation["summary"].endswith(".")
        assert "200" in operation["responses"]
        for status, response in operation["responses"].items():
            assert re.fullmatch(r"[2-5]\d\d", status) and response["description"]
            for schema in response["content"].values():
                reference = schema["schema"].get("$ref")
                assert reference is None or reference.rpartition("/")[2] in document["components"]["schemas"]
        names = [parameter["name"] for parameter in operation.get("parameters", ())]
        assert len(names) == len(set(names))
        for parameter in operation.get("parameters", ()):
            assert parameter["in"] == "query" and parameter["description"]
            assert not list(
                mismatches(parameter["schema"]["default"], parameter["schema"], document, parameter["name"])
            )


def test_the_document_names_the_routes_there_are(document, app):
    routes = {(route.path, method.lower()) for route in app.routes for method in route.methods if method != "HEAD"}
    assert {(path, method) for path, method, _ in operations(document)} == routes


def test_every_get_answers_as_documented(document, port):
    for path, method, _ in operations(document):
        if method == "get":
            answer = ask(port, "GET", path)
            assert answer.status == 200
            is_as_documented(answer, path, method, document)


def test_every_prediction_answers_as_documented(document, port):
    content = encoded(photo())
    for path, method, operation in operations(document):
        if method == "post":
            for query in ("", "?model=second&size=32&opacity=1&legend=false&format=png"):
                answer = post(port, path + query, content)
                assert answer.status == 200
                is_as_documented(answer, path, method, document)
            assert {parameter["name"] for parameter in operation["parameters"]} == {
                *("model", "size", "opacity", "legend", "format")
            }
    assert post(port, "/overlay?format=png", content).headers["Content-Type"] == "image/png"


@pytest.mark.parametrize("path", ["/predict", "/classes", "/labels", "/overlay", "/confidence", "/raw"])
def test_every_refusal_is_answered_as_documented(document, served, path):
    """Each documented status but 408, which takes its time, comes from a request of its kind."""
    with running(create_app(served, Limits(queue=1, max_bytes=200_000, timeout=0.5))) as port:
        answers = [
            post(port, path, bytes(200_001)),
            post(port, path, bombs.png(9000, 9000)),
            post(port, path, encoded(photo()), Content_Type="text/plain"),
            post(port, path, b"no image"),
            post(port, f"{path}?size=large", encoded(photo())),
        ]
    app = create_app(served, Limits(queue=1))
    with running(app) as port:
        app.state.server.room.images = 1
        answers.append(post(port, path, encoded(photo())))
        app.state.server.room.images = 0
    assert [answer.status for answer in answers] == [413, 413, 415, 422, 422, 503]
    for answer in answers:
        is_as_documented(answer, path, "post", document)
    documented = set(document["paths"][path]["post"]["responses"])
    assert documented == {"200", "408", *(str(answer.status) for answer in answers)}


def test_a_late_body_is_answered_as_documented(document, served):
    with (
        running(create_app(served, Limits(timeout=0.5))) as port,
        socket.create_connection(("127.0.0.1", port), 10) as client,
    ):
        client.sendall(b"POST /labels HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        response = http.client.HTTPResponse(client)
        response.begin()
        answer = answer_of(response)
    assert answer.status == 408
    is_as_documented(answer, "/labels", "post", document)


def test_a_server_that_stops_is_not_ready_as_documented(document, served):
    app = create_app(served)
    with running(app) as port:
        app.state.server.queue.close(5)
        answer = ask(port, "GET", "/ready")
        assert answer.status == 503 and ask(port, "GET", "/health").status == 200
    is_as_documented(answer, "/ready", "get", document)


def test_limits_are_in_the_document(served):
    document = create_app(served, Limits(max_bytes=12_345, max_pixels=640_000)).state.server.document
    operation = document["paths"]["/labels"]["post"]
    assert "12345 bytes" in operation["requestBody"]["description"]
    size = next(parameter for parameter in operation["parameters"] if parameter["name"] == "size")
    assert size["schema"]["maximum"] == 800
