"""Skips the tests of the server where its packages are missing, and runs one server for all."""

import pytest

pytest.importorskip("starlette", reason="needs the extra serve: starlette")
pytest.importorskip("uvicorn", reason="needs the extra serve: uvicorn")

from serving import running, small_model

from apcnet.serve import Limits, Served, create_app


@pytest.fixture(scope="session")
def limits():
    return Limits(max_bytes=300_000, max_pixels=1 << 20, timeout=5.0, connections=100)


@pytest.fixture(scope="session")
def served():
    """Returns two models by name."""
    return {"first": Served(small_model()), "second": Served(small_model(7, seed=1, name="pspnet"))}


@pytest.fixture(scope="session")
def app(served, limits):
    return create_app(served, limits)


@pytest.fixture(scope="session")
def port(app):
    """Returns the port of a server with both models."""
    with running(app) as port:
        yield port
