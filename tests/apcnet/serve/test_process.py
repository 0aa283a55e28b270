"""Tests `apcnet serve` as a process: equality with predict, signals, wrong arguments, and memory over time."""

import dataclasses
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import small_runs
from serving import SIZES, answer_of, encoded, labels_of, metrics, photo, post, resident, small_model, started

import apcnet
from apcnet.commands.serving import _names
from apcnet.serve import listen


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    small_model().save(path)
    return path


def ended(process: subprocess.Popen, seconds: float = 30) -> tuple[int, str]:
    """Waits for the end of a process, and returns its status and errors."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stop_under_load_finishes_what_was_taken(model_file, sent):
    """Eight clients ask without a pause; every answer that begins is whole, and the process ends with 0."""
    content, answers, broken = encoded(photo((400, 500))), [], []
    model = apcnet.inference.prepare(apcnet.load(model_file))

    def client(port):
        while True:
            try:
                answers.append(post(port, "/labels", content))
            except (ConnectionError, http.client.HTTPException) as error:
                broken.append(error)
                return

    with started(model_file, "--timeout", 20) as (process, port):
        for size in SIZES:
            found = labels_of(post(port, "/labels", encoded(photo(size))))
            assert np.array_equal(found, apcnet.predict(model, photo(size)).labels)
        first = post(port, "/labels", content)
        threads = [threading.Thread(target=client, args=(port,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        while metrics(port)["apcnet_requests_in_flight"] < 8:
            time.sleep(0.01)
        process.send_signal(sent)
        assert ended(process) == (0, "")
        for thread in threads:
            thread.join(20)
    assert len(answers) >= 8  # those that were in flight
    assert all(answer.status == 200 and answer.body == first.body for answer in answers)
    # Nobody loses an answer: a client that comes later is refused, or reset before it could send.
    assert [type(each) for each in broken if not isinstance(each, (ConnectionRefusedError, ConnectionResetError))] == []
    assert len(broken) == 8


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_slow_client_for_ever(model_file):
    with (
        started(model_file, "--timeout", 1) as (process, port),
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        client.sendall(b"POST /labels HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        time.sleep(0.1)
        start = time.monotonic()
        process.terminate()
        assert ended(process) == (0, "")
        assert 1 <= time.monotonic() - start < 10


@pytest.mark.slow
def test_a_network_that_does_not_end_is_left_and_told():
    """The network sleeps for a minute; the server stops after half a second, with the status 1."""
    code = """
import time
from serving import small_model
from apcnet.serve import Limits, Served, app, create_app, listen, serve
app.LAST_BATCH = 0.5
served = Served(small_model())
served.predict = lambda *arguments: time.sleep(60)
serve(create_app({"slow": served}, Limits(timeout=0.5)), listen("127.0.0.1", 0), lambda url: print(url, flush=True))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    port = int(process.stdout.readline().rpartition(":")[2])
    assert post(port, "/labels", encoded(photo())).status == 503
    start = time.monotonic()
    process.terminate()
    assert ended(process) == (1, "apcnet: the network did not finish in time: the server ends without it\n")
    assert time.monotonic() - start < 10


def test_answers_are_sent_at_once():
    """The second part of an answer would wait 40 ms for the acknowledgement of the first (Nagle's algorithm)."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_wrong_arguments_end_in_one_line(run, model_file, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, errors = run("serve", model_file, "--port", port)
        assert status == 2 and f"host, port: expected an address that is free, got 127.0.0.1 and {port}" in errors
    for arguments, error in (
        ((model_file, "--port", "70000"), "port: expected 0 to 65535, got 70000"),
        ((model_file, "--host", "::zz"), "host, port: expected an address that is free, got ::zz"),
        ((tmp_path / "none.safetensors",), "there is no such file"),
        ((model_file, model_file), "models: expected one or more of different names, got "),
        ((model_file, "--queue", "0"), "queue: expected an integer of 1 or more, got 0"),
    ):
        status, _, errors = run("serve", *arguments)
        assert status == 2 and error in " ".join(errors.replace("│", " ").split()), errors


def test_models_of_the_same_name_take_that_of_their_folder(tmp_path):
    paths = (tmp_path / "a" / "final.safetensors", tmp_path / "b" / "final.safetensors", tmp_path / "c.onnx")
    assert _names(paths) == dict(zip(("a-final", "b-final", "c"), paths, strict=True))


def test_the_extra_is_named_where_its_packages_are_missing(run, model_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, _, errors = run("serve", model_file)
    assert status == 2
    assert errors == "apcnet: apcnet serve needs starlette and uvicorn: pip install 'apc_kernels[serve]'\n"


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_requests(model_file):
    """Images of all sizes, formats and answers, and some refusals, over connections that stay and that close."""
    paths = ("/labels", "/predict", "/raw", "/overlay", "/classes", "/confidence")
    kinds = ("PNG", "JPEG", "WEBP", "GIF")
    bodies = [encoded(photo(size, seed), kind) for seed, size in enumerate(SIZES) for kind in kinds] + [b"no image"]
    sizes = []
    with started(model_file) as (process, port):

        def client(number):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for i in range(250):
                body, path = bodies[(i + number) % len(bodies)], paths[i % len(paths)]
                try:
                    connection.request("POST", path, body, {"Content-Type": "image/png"})
                except ConnectionError:  # it was idle for too long: all of this machine stood still
                    connection.close()
                    connection.request("POST", path, body, {"Content-Type": "image/png"})
                assert answer_of(connection.getresponse()).status == (422 if body == b"no image" else 200)
                if i % 50 == 49:
                    connection.close()
            connection.close()

        for _ in range(10):  # 1,000 requests of four clients
            threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sizes.append(resident(process.pid))
        print("MiB after each 1,000 requests:", *(f"{size / 2**20:.1f}" for size in sizes))
        found = metrics(port)
        total = sum(value for name, value in found.items() if name.startswith("apcnet_requests_total{path="))
        assert total >= 10_000
        assert found["apcnet_held_images"] == found["apcnet_held_bytes"] == 0
    assert max(sizes[2:]) - sizes[1] < 8 << 20, sizes  # the first 2,000 fill caches and arenas


@pytest.mark.slow
def test_served_as_a_run_it_takes_the_protocol_of_its_evaluation(tmp_path, monkeypatch):
    """A run's folder is served with the scale of its evaluation, as `apcnet predict` takes it."""
    small_runs.without_pictures(monkeypatch)
    config = small_runs.small(small_runs.write_images(tmp_path / "data"), steps=2, eval_every=2)
    config = dataclasses.replace(config, evaluation=apcnet.inference.Protocol(test_scale=(40, 32)))
    apcnet.train(config, tmp_path / "run")
    with started(tmp_path / "run") as (_, port):
        found = labels_of(post(port, "/labels", encoded(photo())))
    model = apcnet.load(tmp_path / "run" / "final.safetensors")
    expected = apcnet.predict(apcnet.inference.prepare(model), photo(), config.evaluation).labels
    assert np.array_equal(found, expected)
