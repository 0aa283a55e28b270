"""Tests that malformed requests are answered or closed, that nothing of them stays, and that good ones are served."""

import json
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import hostile_requests
import numpy as np
import pytest
from PIL import Image
from serving import ask, encoded, labels_of, metrics, photo, post, running, started

import apcnet
from apcnet.serve import Limits, create_app

SECRETS = re.compile(rb"Traceback|File \"|site-packages|/home|/tmp|/usr|\.py\b|0x[0-9a-f]{6}|BytesIO")
LIMITS = Limits(max_bytes=300_000, max_pixels=1 << 20, timeout=1.0)


def check(case: hostile_requests.Case, received: bytes) -> int:
    """Checks what a server has answered to a case, and returns the status of the first answer."""
    if not received:
        assert hostile_requests.SILENT in case.allowed, f"{case.name}: expected {case.allowed}, got nothing"
        return hostile_requests.SILENT
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    assert found, f"{case.name}: {received[:200]}"
    status = int(found[1])
    assert status in case.allowed, f"{case.name}: expected {case.allowed}, got {received[:400]}"
    assert not SECRETS.search(received), f"{case.name}: {received[:1000]}"
    if status >= 400:
        body = json.loads(received.split(b"\r\n\r\n", 1)[1].splitlines()[0].partition(b"}")[0] + b"}")
        assert body["status"] == status and body["error"], case.name
    return status


def settled(port: int) -> dict[str, float]:
    """Waits until a server holds nothing any more, and returns its metrics."""
    end = time.monotonic() + 10
    while True:
        found = metrics(port)
        held = {name: value for name, value in found.items() if name.startswith(("apcnet_held", "apcnet_queue"))}
        if not any(held.values()) and found["apcnet_requests_in_flight"] == 1:  # this one
            return found
        assert time.monotonic() < end, held
        time.sleep(0.05)


def test_malformed_requests_are_answered_or_closed_and_good_ones_served(served, capfd, caplog):
    """300 cases of 26 kinds, many at a time, and a good request after every eighth."""
    picture = photo()
    content, expected = encoded(picture), apcnet.predict(served["first"].prepared, picture).labels
    statuses: Counter[tuple[str, int]] = Counter()
    failures: list[str] = []
    with running(create_app(served, LIMITS)) as port:
        threads = threading.active_count()

        def play(numbered: tuple[int, hostile_requests.Case]) -> None:
            number, case = numbered
            try:
                statuses[case.name, check(case, hostile_requests.play(case, port))] += 1
            except AssertionError as error:
                failures.append(str(error))
            if number % 8 == 0:
                assert np.array_equal(labels_of(post(port, "/labels", content)), expected), f"after {case.name}"

        with ThreadPoolExecutor(48) as pool:
            list(pool.map(play, enumerate(hostile_requests.cases(300))))
        assert not failures, "\n".join(failures)
        found = settled(port)
        assert threading.active_count() <= threads + 6  # threads for images
        assert np.array_equal(labels_of(post(port, "/labels", content)), expected)
    assert sum(statuses.values()) == 300
    assert found['apcnet_requests_total{path="/labels",status="200"}'] >= 38
    assert not any('status="5' in name for name in found), found
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_more_connections_than_the_limit_are_refused(served):
    with running(create_app(served, Limits(connections=3, timeout=20))) as port:
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        time.sleep(0.1)
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer
        assert b"connections: expected at most 3, got more" in answer
        for each in idle:
            each.close()
        time.sleep(0.1)
        assert ask(port, "GET", "/health").status == 200


def test_clients_that_do_not_read_are_cut_off(served, monkeypatch):
    """The answer has 12 MB, more than the buffers of the two sockets take, and its client reads none of it."""
    monkeypatch.setattr("apcnet.serve.connection.PACE", 1 << 24)
    content = encoded(Image.new("RGB", (2500, 2400)), "JPEG")
    request = hostile_requests.head("/raw?size=32", Content_Length=len(content), Connection=None) + content
    with running(create_app(served, Limits(timeout=2.0))) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(("127.0.0.1", port))
        client.sendall(request)
        end = time.monotonic() + 20
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # once the server has closed its socket
            while time.monotonic() < end:
                client.sendall(b"\r\n")
                time.sleep(0.2)
        settled(port)


@pytest.mark.slow
def test_a_process_survives_thousands_of_them(tmp_path, served):
    """The same from outside: a process that is sent 1,500 cases of another seed ends with the status 0."""
    served["first"].model.save(tmp_path / "model.safetensors")
    content = encoded(photo())
    limits = ["--timeout", 1, "--max-bytes", LIMITS.max_bytes, "--max-pixels", LIMITS.max_pixels]
    with started(tmp_path / "model.safetensors", *limits) as (process, port):
        expected = post(port, "/labels", content).body

        def play(case: hostile_requests.Case) -> None:
            check(case, hostile_requests.play(case, port))
            assert post(port, "/labels", content).body == expected, case.name

        with ThreadPoolExecutor(48) as pool:
            list(pool.map(play, hostile_requests.cases(1500, seed=1)))
        settled(port)
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, ""), err
