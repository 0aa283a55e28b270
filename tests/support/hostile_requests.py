"""Generates requests that no honest client sends: each is a list of steps on a connection, made from a seed."""

import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import bombs
from serving import encoded, photo

Step = tuple[
    str, bytes | float
]  # ("send", bytes), ("sleep", seconds), ("endless", bytes), ("end", b""), ("reset", b"")
SILENT = 0  # a status: the connection was closed without an answer
FOREVER = 30.0  # seconds after which a connection that is still open counts as one that hangs


class Case(NamedTuple):
    """Holds what a client does, and the statuses that may answer it."""

    name: str
    steps: list[Step]
    allowed: set[int]


def head(path: str = "/labels", method: str = "POST", **headers: object) -> bytes:
    fields = {"Host": "x", "Content_Type": "image/png", "Connection": "close"} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1")


def posted(body: bytes, **headers: object) -> list[Step]:
    return [("send", head(**({"Content_Length": len(body)} | headers)) + body)]


def picture(rng: random.Random) -> bytes:
    size = rng.randint(8, 60), rng.randint(8, 60)
    return encoded(photo(size, rng.randint(0, 99)), rng.choice(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))


def truncated(rng: random.Random) -> Case:
    content = picture(rng)
    return Case("truncated", posted(content[: rng.randrange(len(content) * 3 // 4)]), {200, 413, 422})  # GIFs may do


def damaged(rng: random.Random) -> Case:
    content = bytearray(picture(rng))
    for _ in range(rng.randint(1, 30)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return Case("damaged", posted(bytes(content)), {200, 413, 422})


def bomb(rng: random.Random) -> Case:
    kind = rng.choice(list(bombs.KINDS))
    return Case(f"bomb {kind}", posted(bombs.KINDS[kind](rng.randint(2000, 16000), rng.randint(2000, 16000))), {413})


def many_scans(rng: random.Random) -> Case:
    return Case("many scans", posted(bombs.many_scans(rng.randint(120, 1000))), {422})


def wrong_type(rng: random.Random) -> Case:
    kind = rng.choice(["text/html", "video/mp4", "application/json", "image", "a/b/c", "\xff", "multipart/mixed"])
    return Case("wrong type", posted(picture(rng), Content_Type=kind), {415})


def no_image(rng: random.Random) -> Case:
    body = rng.choice(
        [b"", bytes(1000), b"<html>", rng.randbytes(rng.randint(1, 5000)), b"%PDF-1.7", b"\x89PNG\r\n\x1a\n"]
    )
    return Case("no image", posted(body), {422})


def wrong_query(rng: random.Random) -> Case:
    query = rng.choice(
        ["model=../../etc/passwd", "size=1e9", "opacity=-1", "x=1", "size=%00", "model=%ff", "size=" + "9" * 5000]
    )
    return Case("wrong query", [("send", head(f"/overlay?{query}", Content_Length=4) + b"abcd")], {422})


def wrong_path(rng: random.Random) -> Case:
    path = rng.choice(
        [
            "/../../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "//labels",
            "/labels/",
            "/\\..\\x",
            "/%00",
            "/" + "a" * 9000,
        ]
    )
    return Case("wrong path", [("send", head(path, rng.choice(["GET", "POST"]), Content_Length=0))], {404})


def wrong_method(rng: random.Random) -> Case:
    method = rng.choice(["GET", "PUT", "DELETE", "TRACE", "OPTIONS", "BREW", "PATCH"])
    return Case("wrong method", [("send", head(method=method, Content_Length=0))], {405})


def wrong_form(rng: random.Random) -> Case:
    parts = [
        b"--x",
        b"\r\n\r\n",
        b'Content-Disposition: form-data; name="a"; filename="b"',
        b"--x--",
        b"\r\n",
        bytes(9),
    ]
    body = b"".join(rng.choice(parts) for _ in range(rng.randint(0, 400)))
    kind = rng.choice(["multipart/form-data; boundary=x", "multipart/form-data", 'multipart/form-data; boundary=""'])
    return Case("wrong form", posted(body, Content_Type=kind), {422})


def endless(rng: random.Random) -> Case:
    if rng.random() < 0.5:
        opening = head(Content_Length=10 ** rng.randint(9, 18))
        return Case("endless body", [("send", opening), ("endless", rng.randbytes(1 << 14))], {413})
    opening, chunk = head(Transfer_Encoding="chunked"), rng.randbytes(1 << 14)
    return Case("endless chunks", [("send", opening), ("endless", b"%x\r\n%b\r\n" % (len(chunk), chunk))], {413})


def slow_head(rng: random.Random) -> Case:
    opening = head(Content_Length=10)
    cut = rng.randrange(1, len(opening) - 4)
    return Case("slow head", [("send", opening[:cut]), ("sleep", FOREVER)], {408})


def trickled_head(rng: random.Random) -> Case:
    steps: list[Step] = [("send", b"POST /labels HTTP/1.1\r\nHost: x\r\n")]
    for i in range(100):
        steps += [("sleep", 0.1), ("send", b"X-%d: %d\r\n" % (i, rng.randrange(9)))]
    return Case("trickled head", steps, {408, SILENT})  # a client that still sends may lose the answer


def slow_body(rng: random.Random) -> Case:
    content = picture(rng)
    steps: list[Step] = [("send", head(Content_Length=len(content)) + content[: rng.randrange(len(content))])]
    return Case("slow body", [*steps, ("sleep", FOREVER)], {408})


def trickled_body(rng: random.Random) -> Case:
    steps: list[Step] = [("send", head(Content_Length=1000))]
    return Case("trickled body", steps + [("sleep", 0.1), ("send", b"x")] * 100, {408, SILENT})


def silent(rng: random.Random) -> Case:
    return Case("silent", [("sleep", FOREVER)], {408})


def garbage(rng: random.Random) -> Case:
    tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500)
    text = rng.choice(
        [tls, rng.randbytes(rng.randint(1, 3000)), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/x\r\n\r\n"]
    )
    return Case("garbage", [("send", text + b"\r\n\r\n")], {400, 404, 408, SILENT})


def huge_head(rng: random.Random) -> Case:
    size = rng.randint(70_000, 300_000)
    lines = b"X-Large: " + b"a" * size if rng.random() < 0.5 else b"X: y\r\n" * (size // 6)
    return Case("huge head", [("send", b"GET / HTTP/1.1\r\nHost: x\r\n" + lines)], {400, SILENT})


def wrong_length(rng: random.Random) -> Case:
    length = rng.choice(["-1", "x", "1e3", "+5", "0x10", "1, 2", "", "9" * 400, " 1 2", "\xb2"])
    return Case("wrong length", [("send", head(Content_Length=length) + b"abcde")], {400, 413})


def short_body(rng: random.Random) -> Case:
    content = picture(rng)
    steps: list[Step] = [("send", head(Content_Length=len(content) + rng.randint(1, 9999)) + content), ("end", b"")]
    return Case("short body", steps, {SILENT})


def long_body(rng: random.Random) -> Case:
    content = picture(rng)
    length = rng.randrange(len(content) // 2)
    return Case("long body", [("send", head(Content_Length=length, Connection=None) + content)], {422, 413, 400})


def wrong_chunks(rng: random.Random) -> Case:
    chunk = rng.choice(
        [b"xyz\r\nabc\r\n", b"-5\r\nabcde\r\n", b"5\r\nabcdefgh\r\n", b"f" * 30 + b"\r\n", b"5;" + b"a" * 99_999]
    )
    return Case("wrong chunks", [("send", head(Transfer_Encoding="chunked") + chunk), ("end", b"")], {400, 413, SILENT})


def two_lengths(rng: random.Random) -> Case:
    both = head(Content_Length=5)[:-2] + rng.choice([b"Content-Length: 6\r\n\r\n", b"Transfer-Encoding: gzip\r\n\r\n"])
    return Case("two lengths", [("send", both + b"abcdef"), ("end", b"")], {400, 501, 422, SILENT})


def pipelined(rng: random.Random) -> Case:
    good = head("/health", "GET", Content_Type=None, Connection=None)
    rest = rng.choice([rng.randbytes(500), b"\r\n" * 50, head("/labels", "GET"), b"GET"])
    return Case("pipelined", [("send", good * rng.randint(1, 20) + rest + b"\r\n\r\n")], {200})


def reset(rng: random.Random) -> Case:
    content = head(Content_Length=5000) + picture(rng)
    steps: list[Step] = [("send", content[: rng.randrange(1, len(content))]), ("sleep", rng.random() / 20)]
    return Case("reset", [*steps, ("reset", b"")], {SILENT})


def reset_while_predicting(rng: random.Random) -> Case:
    steps = [*posted(picture(rng)), ("sleep", rng.random() / 50), ("reset", b"")]
    return Case("reset while predicting", steps, {SILENT, 200})  # 200 where the answer was faster


FAST = (truncated, damaged, bomb, many_scans, wrong_type, no_image, wrong_query, wrong_path, wrong_method, wrong_form)
FAST += (garbage, huge_head, wrong_length, short_body, long_body, wrong_chunks, two_lengths, pipelined, reset)
FAST += (reset_while_predicting,)
SLOW = (endless, slow_head, trickled_head, slow_body, trickled_body, silent)
GENERATORS: tuple[Callable[[random.Random], Case], ...] = (*FAST, *SLOW)


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Yields this many cases, of every kind in turn."""
    for i in range(count):
        yield GENERATORS[i % len(GENERATORS)](random.Random(f"{seed} {i}"))


def play(case: Case, port: int) -> bytes:
    """Does what a case says on a new connection, and returns all that the server answers until it closes."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), FOREVER) as client:
        try:
            for what, value in case.steps:
                if what == "send":
                    client.sendall(value)
                elif what == "sleep":
                    client.settimeout(value)
                    try:
                        part = client.recv(1 << 16)
                        received += part
                        break  # answered or closed, before all was sent
                    except TimeoutError:
                        assert value < FOREVER, f"{case.name}: the connection hangs"
                    finally:
                        client.settimeout(FOREVER)
                elif what == "endless":
                    end = time.monotonic() + FOREVER
                    while time.monotonic() < end:
                        client.sendall(value)
                    raise AssertionError(f"{case.name}: the server reads on and on")
                elif what == "end":
                    client.shutdown(socket.SHUT_WR)
                else:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return received
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            while part := client.recv(1 << 16):
                received += part
        except ConnectionResetError:
            pass
        except TimeoutError:
            raise AssertionError(f"{case.name}: the connection hangs after {received[:200]}") from None
    return received
