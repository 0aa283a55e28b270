"""Runs servers of apcnet.serve in a thread of a test, or as a process, and speaks with them."""

import http.client
import io
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import small_runs
import torch
from PIL import Image

import apcnet

SIZES = ((48, 64), (64, 48), (61, 83), (96, 96))  # height and width


class Answer(NamedTuple):
    """Holds the answer to a request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


def small_model(classes: int = 5, seed: int = 0, name: str = "apcnet") -> torch.nn.Module:
    """Returns a network of a few thousand parameters whose labels vary."""
    torch.manual_seed(seed)
    model = apcnet.create(name, "tiny", classes, width=8, channels=8).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.fill_(0.1)  # so that the differences between pixels reach the logits
        classifier = model.head.classifier.conv
        classifier.weight /= model(torch.randn(1, 3, 64, 64)).abs().max() / 5  # and probabilities are not all 0 or 1
    model.classes = tuple(f"thing {i}" for i in range(classes))
    return model


def photo(size: tuple[int, int] = SIZES[0], seed: int = 0) -> Image.Image:
    """Returns a picture of coarse and fine noise, of a height and width."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    return Image.blend(coarse, Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)), 0.2)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def labels_of(answer: Answer) -> np.ndarray:
    """Returns the labels of an answer of /labels."""
    return np.asarray(Image.open(io.BytesIO(answer.body)))


@contextmanager
def running(app) -> Iterator[int]:
    """Runs an application in a thread until the end of the block; gives its port."""
    from apcnet.serve import listen
    from apcnet.serve.connection import server_of

    listener, server = listen("127.0.0.1", 0), server_of(app)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.001)
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def started(*arguments) -> Iterator[tuple[subprocess.Popen, int]]:
    """Starts `apcnet serve …` at a free port as a process; gives the process and its port."""
    process = small_runs.start("serve", *arguments, "--port", 0)
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)$", line.strip())
        assert found, (line, process.stderr.read() if process.poll() is not None else "")
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


def ask(port: int, method: str, path: str, body: bytes | None = None, timeout: float = 30, **headers: str) -> Answer:
    """Sends a request on a connection of its own; underscores in the names of headers are dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return answer_of(connection.getresponse())
    finally:
        connection.close()


def post(port: int, path: str, body: bytes, **headers: str) -> Answer:
    return ask(port, "POST", path, body, **{"Content_Type": "image/png"} | headers)


def answer_of(response: http.client.HTTPResponse) -> Answer:
    return Answer(response.status, response.headers, response.read())


def conversation(port: int, *sent: bytes, timeout: float = 10) -> bytes:
    """Sends bytes on a new connection, and returns all that comes back until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout) as client:
        for part in sent:
            client.sendall(part)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def metrics(port: int) -> dict[str, float]:
    """Returns the metrics of a server: name with labels, and value."""
    text = ask(port, "GET", "/metrics").body.decode()
    return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


def resident(pid: int) -> int:
    """Returns the bytes of memory that a process occupies."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
