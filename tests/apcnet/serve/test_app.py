"""Tests the answers of a running server: predictions, parameters, limits, metrics and pages."""

import base64
import io
import json
import socket
import threading
import time

import bombs
import numpy as np
import pytest
import torch
from PIL import Image
from serving import SIZES, Answer, ask, conversation, encoded, labels_of, metrics, photo, post, running
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import apcnet
from apcnet.serve import Limits, create_app


def refusal(answer: Answer) -> tuple[int, str]:
    """Returns the status and the text of an error, which are the same in the body."""
    assert answer.headers["Content-Type"] == "application/json"
    assert set(answer.json) == {"status", "error"} and answer.json["status"] == answer.status
    return answer.status, answer.json["error"]


@pytest.mark.parametrize("size", SIZES)
def test_labels_are_those_of_predict(port, served, size):
    picture = photo(size)
    seen = apcnet.predict(served["first"].prepared, picture, confidence=True)
    content = encoded(picture)
    labels = Image.open(io.BytesIO(post(port, "/labels", content).body))
    assert labels.mode == "P" and labels.getpalette()[:15] == seen.indices().getpalette()[:15]
    assert np.array_equal(labels, seen.labels)
    sure = np.asarray(Image.open(io.BytesIO(post(port, "/confidence", content).body)))
    expected = (seen.confidence * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(sure, expected)
    raw = post(port, "/raw", content)
    assert [raw.headers[name] for name in ("Image-Height", "Image-Width", "Label-Bytes")] == [*map(str, size), "1"]
    assert raw.body == seen.labels.numpy().tobytes() + expected.tobytes()
    overlay = Image.open(io.BytesIO(post(port, "/overlay?format=png&opacity=0.3&legend=false", content).body))
    assert np.array_equal(overlay, seen.overlay(0.3, legend=False))
    assert Image.open(io.BytesIO(post(port, "/overlay", content).body)).size == seen.overlay().size


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 2)])
def test_images_of_extreme_sizes_are_answered(port, served, size):
    picture = photo(size)
    expected = apcnet.predict(served["first"].prepared, picture).labels
    assert np.array_equal(labels_of(post(port, "/labels", encoded(picture))), expected)
    for path in ("/predict", "/overlay?format=png", "/classes?size=700"):
        assert post(port, path, encoded(picture)).status == 200
    if max(size) > 3:
        status, error = refusal(post(port, "/classes?size=1", encoded(picture)))
        assert status == 422 and error.startswith("scale: nothing is left of an image of ")


def test_classes_are_counted(port, served):
    picture = photo()
    seen = apcnet.predict(served["first"].prepared, picture)
    found = post(port, "/classes", encoded(picture)).json
    assert (found["model"], found["width"], found["height"]) == ("first", picture.width, picture.height)
    assert {each["name"]: each["share"] for each in found["classes"]} == seen.shares()
    assert sum(each["pixels"] for each in found["classes"]) == picture.width * picture.height
    for each in found["classes"]:
        assert each["pixels"] == int((seen.labels == each["index"]).sum())
        assert each["color"] == "#{:02x}{:02x}{:02x}".format(*seen.palette[each["index"]])


def test_everything_in_one_answer_is_what_the_others_give(port):
    content = encoded(photo(SIZES[2]))
    found = post(port, "/predict?opacity=0.4", content).json
    for name in ("labels", "overlay", "confidence"):
        assert base64.b64decode(found.pop(name)) == post(port, f"/{name}?opacity=0.4", content).body, name
    assert found == post(port, "/classes", content).json


def test_another_model_and_another_size_can_be_asked_for(port, served):
    picture = photo()
    second = apcnet.predict(served["second"].prepared, picture).labels
    assert np.array_equal(labels_of(post(port, "/labels?model=second", encoded(picture))), second)
    smaller = apcnet.predict(served["second"].prepared, picture, apcnet.inference.Protocol(test_scale=(40, 40))).labels
    assert np.array_equal(labels_of(post(port, "/labels?model=second&size=40", encoded(picture))), smaller)
    assert not torch.equal(second, smaller)
    listed = ask(port, "GET", "/models").json["models"]
    assert [each["name"] for each in listed] == ["first", "second"]
    assert [len(each["classes"]) for each in listed] == [len(each["palette"]) for each in listed] == [5, 7]
    assert listed[0]["classes"] == list(served["first"].classes)


def test_bodies_may_be_forms_and_untyped(port):
    content = encoded(photo())
    expected = post(port, "/labels", content).body
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    form = head + content + b"\r\n--x--\r\n"
    assert post(port, "/labels", form, Content_Type="multipart/form-data; boundary=x").body == expected
    assert post(port, "/labels", content, Content_Type="application/x-www-form-urlencoded").body == expected
    chunks = iter([content[:100], content[100:]])
    assert ask(port, "POST", "/labels", chunks, Content_Type="image/png").body == expected


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("model=third", "model: expected one of first, second, got third"),
        ("size=-1", "size: expected a whole number from 0 to 1024, got -1"),
        ("size=1025", "size: expected a whole number from 0 to 1024, got 1025"),
        ("size=1e2", "size: expected a whole number from 0 to 1024, got 1e2"),
        ("opacity=nan", "opacity: expected a number from 0 to 1, got nan"),
        ("legend=yes", "legend: expected true or false, got yes"),
        ("format=gif", "format: expected one of jpeg, png, got gif"),
        ("opacity=1&opacity=2", "opacity: expected one value, got 2 too"),
        ("model=first&size=32&model=first", "model: expected one value, got first too"),
        ("colour=red", "query: expected parameters of model, size, opacity, legend, format, got colour"),
    ],
)
def test_wrong_parameters_are_named(port, query, error):
    assert refusal(post(port, f"/overlay?{query}", encoded(photo()))) == (422, error)


def test_what_is_no_image_is_refused(port, limits):
    content = encoded(photo())
    assert refusal(post(port, "/labels", content, Content_Type="text/html"))[0] == 415
    assert refusal(post(port, "/labels", content, Content_Encoding="gzip")) == (
        415, "Content-Encoding: expected none, got gzip"
    )  # fmt: skip
    status, error = refusal(post(port, "/labels", b""))
    assert status == 422 and error.startswith("body: expected an image, got 0 bytes")
    assert refusal(post(port, "/labels", content[:200]))[0] == 422
    status, error = refusal(post(port, "/labels", bombs.png(3000, 3000)))
    assert (status, error) == (413, f"body: expected an image of at most {limits.max_pixels} pixels, got 3000 × 3000")


def test_too_many_bytes_are_refused(port, limits):
    expected = 413, f"body: expected at most {limits.max_bytes} bytes, got {limits.max_bytes + 1}"
    assert refusal(post(port, "/labels", bytes(limits.max_bytes + 1))) == expected
    chunks = iter([bytes(limits.max_bytes), b"x"])
    answer = ask(port, "POST", "/labels", chunks, Content_Type="image/png")
    assert refusal(answer) == (413, f"body: expected at most {limits.max_bytes} bytes, got more")
    assert refusal(post(port, "/labels", bytes(limits.max_bytes)))[0] == 422  # just not too many


def test_a_client_that_asks_first_sends_nothing_in_vain(port):
    head = "POST /labels HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n"
    start = time.monotonic()
    answer = conversation(port, head.format(10**9).encode())
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer.lower()
    assert time.monotonic() - start < 1
    content = encoded(photo())
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(head.format(len(content)).encode())
        assert client.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(content)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_unknown_paths_and_methods_are_named(port):
    status, error = refusal(ask(port, "GET", "/../etc/passwd"))
    assert status == 404 and error.startswith("path: expected one of /, /predict, ")
    answer = ask(port, "GET", "/labels")
    assert refusal(answer) == (405, "method: expected POST, got GET") and answer.headers["Allow"] == "POST"
    assert refusal(ask(port, "DELETE", "/health"))[0] == 405
    assert refusal(ask(port, "POST", "/nowhere", bytes(100_000)))[0] == 404
    assert ask(port, "HEAD", "/health").status == 200


def test_health_and_page(port):
    assert ask(port, "GET", "/health").body == b"alive\n"
    assert ask(port, "GET", "/ready").body == b"ready\n"
    page = ask(port, "GET", "/", Host="<b>").body.decode()
    assert "first (5 classes), second (7 classes)" in page and "/labels" in page and "<b>" not in page


def test_what_fails_inside_is_not_told(served, limits, capfd, caplog):
    def fail(request):
        raise RuntimeError("secret of /home/somebody")

    app = create_app(
        served, limits, pages=[Route("/fail", fail), Route("/", lambda request: PlainTextResponse("mine"))]
    )
    with running(app) as port:
        assert refusal(ask(port, "GET", "/fail")) == (500, "the server failed; its log says why")
        assert ask(port, "GET", "/").body == b"mine"
    assert "secret" in capfd.readouterr().err + caplog.text


class Gate:
    """Holds the network of a model until it is opened."""

    def __init__(self, served, monkeypatch):
        self.opened, self.batches = threading.Event(), []
        predict = served.predict

        def held(images, protocol, confidence):
            self.batches.append((len(images), confidence))
            assert self.opened.wait(10)
            return predict(images, protocol, confidence)

        monkeypatch.setattr(served, "predict", held)


def in_threads(count: int, call) -> list:
    """Calls a function with 0, 1, … in as many threads, and returns the function that waits for their results."""
    results: list = [None] * count

    def run(i):
        results[i] = call(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()

    def wait():
        for thread in threads:
            thread.join(20)
        return results

    return wait


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_arrives_together_is_batched_and_the_queue_is_bounded(served, monkeypatch):
    app = create_app(served, Limits(queue=6, batch=4, timeout=20))
    server, gate = app.state.server, Gate(served["first"], monkeypatch)
    pictures = [photo(seed=i) for i in range(6)]
    with running(app) as port:
        first = in_threads(1, lambda i: post(port, "/labels", encoded(pictures[5])))
        until(lambda: gate.batches)
        rest = in_threads(5, lambda i: post(port, "/raw" if i == 3 else "/labels", encoded(pictures[i])))
        until(lambda: len(server.queue) == 5)
        answer = post(port, "/labels", encoded(pictures[0]))
        assert refusal(answer) == (503, "queue: expected fewer than 6 images, got 6; try again later")
        assert answer.headers["Retry-After"] == "1"
        assert metrics(port)["apcnet_queue_images"] == 5 and metrics(port)["apcnet_held_images"] == 6
        gate.opened.set()
        answers = rest()
        for i in (0, 1, 2, 4):
            expected = apcnet.predict(served["first"].prepared, pictures[i]).labels
            assert (labels_of(answers[i]) != expected.numpy()).mean() <= 1e-3
        assert answers[3].status == 200 and first()[0].status == 200
        sizes = [size for size, _ in gate.batches]
        assert sizes == [1, 4, 1]
        found = metrics(port)
        assert found["apcnet_images_total"] == 6 and found["apcnet_batch_images_count"] == 3
        assert found['apcnet_batch_images_bucket{le="1"}'] == 2 and found['apcnet_batch_images_bucket{le="4"}'] == 3
        assert found['apcnet_requests_total{path="/labels",status="503"}'] == 1
    assert (server.room.images, server.room.pixels, server.room.bytes) == (0, 0, 0)


def test_labels_that_do_not_come_in_time_are_a_503_and_clients_that_go_are_dropped(served, monkeypatch):
    app = create_app(served, Limits(timeout=1, batch=1))
    server, gate = app.state.server, Gate(served["first"], monkeypatch)
    content = encoded(photo())
    with running(app) as port:
        answer = post(port, "/labels", content)
        assert refusal(answer) == (503, "answer: expected within 1 s, got none; try again later")
        head = f"POST /labels HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        with pytest.raises(TimeoutError):
            conversation(port, head, content, timeout=0.1)  # goes without an answer
        until(lambda: metrics(port).get('apcnet_requests_total{path="/labels",status="499"}') == 1)
        gate.opened.set()
        assert post(port, "/labels", content).status == 200
        assert gate.batches == [(1, False)] * 2  # what nobody waits for did not run
    assert server.room.images == 0


def test_bodies_together_are_bounded(served):
    app = create_app(served, Limits(max_bytes=1000, timeout=1))
    with running(app) as port:
        app.state.server.room.bytes = 16 * 1000 - 50
        status, error = refusal(post(port, "/labels", bytes(100)))
        assert status == 503 and error.startswith("bodies: expected at most 16000 bytes together")
        app.state.server.room.bytes = 0


def test_metrics_are_prometheus_text(port):
    answer = ask(port, "GET", "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    kinds, values = {}, {}
    for line in answer.body.decode().removesuffix("\n").split("\n"):
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
            family = name.partition("{")[0]
            assert any(family in (each, f"{each}_bucket", f"{each}_sum", f"{each}_count") for each in kinds), line
    assert set(kinds.values()) == {"counter", "gauge", "histogram"}
    for name in (name for name, kind in kinds.items() if kind == "histogram"):
        buckets = [value for key, value in values.items() if key.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets) and buckets[-1] == values[f"{name}_count"]
    before = values['apcnet_requests_total{path="/metrics",status="200"}'] if "/metrics" in str(values) else 0
    assert metrics(port)['apcnet_requests_total{path="/metrics",status="200"}'] == before + 1
    assert values["apcnet_requests_in_flight"] == 1


def test_times_are_told(port):
    timing = post(port, "/labels", encoded(photo())).headers["Server-Timing"]
    parts = dict(part.split(";dur=") for part in timing.split(", "))
    assert list(parts) == ["body", "queue", "network", "answer"] and all(float(each) >= 0 for each in parts.values())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"queue": 0}, "queue: expected an integer of 1 or more, got 0"),
        ({"max_bytes": 1.5}, "max_bytes: expected an integer of 1 or more, got 1.5"),
        ({"timeout": 0}, "timeout: expected a number of 0.1 or more, got 0"),
        ({"wait": float("inf")}, "wait: expected a number of 0 or more, got inf"),
        ({"max_pixels": 10**9}, "max_pixels: expected at most 89478485, which Pillow decodes, got 1000000000"),
    ],
)
def test_limits_are_checked(changes, error):
    with pytest.raises(ValueError) as raised:
        Limits(**changes)
    assert str(raised.value).startswith(error)


def test_a_server_needs_a_model():
    with pytest.raises(ValueError, match="models: expected one or more, got none"):
        create_app({})


def test_json_is_valid(port):
    json.loads(ask(port, "GET", "/openapi.json").body)
