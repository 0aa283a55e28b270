"""Tests the queue that runs work in batches: which items meet, in which order, and what failures and closing do."""

import threading
import time
from concurrent.futures import CancelledError

import pytest

from apcnet.serve.queue import BatchQueue


class Recorder:
    """Records batches, and holds the first one until it is released."""

    def __init__(self):
        self.batches, self.release, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, items):
        self.batches.append(list(items))
        self.begun.set()
        if len(self.batches) == 1:
            assert self.release.wait(10)
        return [item * 2 for item in items]


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def queue():
    queue = BatchQueue()
    yield queue
    assert queue.close(10)


def submit(queue, recorder, key, *items, most=3):
    return [queue.submit(key, item, recorder, most) for item in items]


def test_what_waits_together_is_a_batch_and_the_oldest_goes_first(queue, recorder):
    first = submit(queue, recorder, "a", 0)
    assert recorder.begun.wait(10)
    rest = submit(queue, recorder, "b", 1) + submit(queue, recorder, "a", 2, 3) + submit(queue, recorder, "b", 4)
    assert len(queue) == 4
    recorder.release.set()
    assert [future.result(10).value for future in first + rest] == [0, 2, 4, 6, 8]
    assert recorder.batches == [[0], [1, 4], [2, 3]]
    assert len(queue) == 0


def test_batches_are_bounded(queue, recorder):
    first = submit(queue, recorder, "a", 0)
    assert recorder.begun.wait(10)
    rest = submit(queue, recorder, "a", *range(1, 8))
    recorder.release.set()
    assert [future.result(10).value for future in first + rest] == [2 * item for item in range(8)]
    assert recorder.batches == [[0], [1, 2, 3], [4, 5, 6], [7]]


def test_the_wait_is_bounded_and_a_full_batch_does_not_wait():
    queue = BatchQueue(wait=0.2)
    alone = queue.submit("a", 1, list, 2).result(10)
    assert 0.2 <= alone.waited < 5
    pair = [queue.submit("a", item, list, 2) for item in (1, 2)]
    assert all(future.result(10).waited < 0.2 for future in pair)
    assert queue.submit("b", 1, list, 1).result(10).waited < 0.2
    assert queue.close(10)


def test_late_company_joins_a_batch_that_waits():
    queue, batches = BatchQueue(wait=5.0), []
    run = lambda items: batches.append(list(items)) or items  # noqa: E731
    first = queue.submit("a", 1, run, 2)
    time.sleep(0.05)
    queue.submit("a", 2, run, 2).result(10)
    assert first.result(0).waited < 5
    assert batches == [[1, 2]]
    assert queue.close(10)


def test_cancelled_work_is_left_out(queue, recorder):
    submit(queue, recorder, "a", 0)
    assert recorder.begun.wait(10)
    one, two, three = submit(queue, recorder, "a", 1, 2) + submit(queue, recorder, "b", 3)
    assert one.cancel() and three.cancel()
    recorder.release.set()
    assert two.result(10).value == 4
    with pytest.raises(CancelledError):
        one.result(10)
    assert recorder.batches == [[0], [2]]


def test_a_failure_reaches_its_batch_alone(queue):
    def fail(items):
        raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"):
        queue.submit("a", 1, fail).result(10)
    assert queue.submit("a", 1, list).result(10).value == 1


def test_a_wrong_number_of_results_is_an_error(queue):
    with pytest.raises(ValueError, match="expected a result for each of 1 items, got 2"):
        queue.submit("a", 1, lambda items: [1, 2]).result(10)
    assert queue.is_running


def test_closing_finishes_what_waits(recorder):
    queue = BatchQueue(wait=60)
    futures = submit(queue, recorder, "a", 0, 1, 2) + submit(queue, recorder, "a", 3)
    recorder.release.set()
    assert queue.close(10)
    assert [future.result(0).value for future in futures] == [0, 2, 4, 6]
    assert not queue.is_running
    with pytest.raises(RuntimeError, match="closed"):
        submit(queue, recorder, "a", 1)


def test_closing_tells_if_work_still_runs(recorder):
    queue = BatchQueue()
    submit(queue, recorder, "a", 0)
    assert recorder.begun.wait(10)
    assert not queue.close(0.05)
    recorder.release.set()
    assert queue.close(10)


def test_batches_are_reported():
    seen = []
    queue = BatchQueue(on_batch=lambda size, seconds: seen.append((size, seconds)))
    queue.submit("a", 1, list).result(10)
    assert queue.close(10)
    ((size, seconds),) = seen
    assert size == 1 and 0 <= seconds < 10
