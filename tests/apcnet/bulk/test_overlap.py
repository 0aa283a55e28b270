"""Tests the threads that read ahead of the network and write behind it: order, bounds, errors and early ends."""

import threading
from contextlib import closing

import pytest

from apcnet.bulk.overlap import Behind, ahead

WAIT = 10  # seconds that a test waits for a thread before it fails


def test_ahead_reads_while_the_caller_works_but_not_too_far():
    taken, third = [], threading.Event()

    def items():
        for i in range(9):
            taken.append(i)
            if i == 3:
                third.set()
            yield i

    reader = ahead(items(), depth=3)
    assert next(reader) == 0
    assert third.wait(WAIT)  # items 1 to 3 are read without another call
    assert taken == [0, 1, 2, 3]
    assert list(reader) == list(range(1, 9))


def test_an_error_of_ahead_comes_after_the_items_before_it():
    def items():
        yield 1
        raise OSError("broken")

    reader = ahead(items())
    assert next(reader) == 1
    with pytest.raises(OSError, match="broken"):
        next(reader)


def test_ahead_ends_its_thread_when_it_is_closed():
    before = threading.active_count()
    with closing(ahead(iter(range(1000)))) as reader:
        assert next(reader) == 0 and threading.active_count() == before + 1
    assert threading.active_count() == before


def test_behind_runs_calls_in_order_beside_the_caller():
    done, started, go_on = [], threading.Event(), threading.Event()

    def call(i):
        started.set()
        assert go_on.wait(WAIT)
        done.append(i)

    with Behind(depth=2) as behind:
        behind(call, 0)
        behind(call, 1)
        assert started.wait(WAIT) and not done  # the caller goes on before the first call has ended
        threading.Timer(0.05, go_on.set).start()
        behind(call, 2)  # waits for the first one
        assert done[:1] == [0]
    assert done == [0, 1, 2]


def test_an_error_of_behind_reaches_the_caller():
    def fail():
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Behind(depth=1) as behind:
        behind(fail)
    done = []
    with pytest.raises(OSError, match="full"), Behind(depth=1) as behind:
        behind(fail)
        behind(done.append, 1)
    assert not done


def test_behind_drops_calls_that_wait_when_the_block_fails():
    done, go_on = [], threading.Event()
    with pytest.raises(KeyboardInterrupt), Behind(depth=3) as behind:
        behind(go_on.wait, WAIT)
        behind(done.append, 1)
        threading.Timer(0.05, go_on.set).start()
        raise KeyboardInterrupt
    assert not done
