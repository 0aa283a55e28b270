"""Tests the processor time of small calls, within bounds that a busy machine keeps; benchmarks/host.py measures it."""

import pytest

from benchmarks import host

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", host.HEADS)
def test_heads(name, training):
    """Tests that a head takes at most mmsegmentation's time; the goal is 0.6 of it."""
    row = host.measure(*host.head(name, training), rounds=25)
    assert row.ratio < 1, row


CALLS = [(name, training) for training in (False, True) for name in host.operations(training)]


@pytest.mark.parametrize(("name", "training"), CALLS)
def test_operations(name, training):
    """Tests the time of a call; the goal is 25 microseconds, or 1.5 times PyTorch's composition.

    upsample_cross_entropy with its gradient takes 2.1 times, 54 microseconds.
    """
    row = host.measure(*host.operations(training)[name], rounds=25, calls=20)
    assert row.ours < (90 if training else 60) or row.ratio < 2, row


def test_every_operation_is_measured():
    from apc_kernels import info

    assert {name.partition("(")[0] for name in host.operations()} == {*info.SERVED_BY, "FusedConv2d"}


def test_the_first_call():
    """The goal is 50 ms and 10 MiB. torch._dynamo, which a wrapper of operators imports, takes seconds."""
    milliseconds, mebibytes, modules = host.first_call()
    assert milliseconds < 200 and mebibytes < 20, (milliseconds, mebibytes)
    assert not [name for name in modules if name.startswith(("torch", "sympy", "triton"))], modules


def test_table(tmp_path, monkeypatch):
    """The table in the documentation is made from the files of results."""
    written = host.PAGE.read_text()
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{host.BEGIN}\nold\n{host.END}\nafter\n")
    monkeypatch.setattr(host, "PAGE", page)
    host.write_table()
    before, rest = page.read_text().split(host.BEGIN)
    table, after = rest.split(host.END)
    assert (before, after) == ("Before\n", "\nafter\n") and table.count("\n| ") > 20
    assert table in written, "docs/kernels/README.md: stale; run python -m benchmarks.host --table"
