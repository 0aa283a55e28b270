"""Counts what the server does, in the text format that Prometheus reads."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Counts observations up to each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Adds an observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yields the lines of its buckets, sum and count."""
        total = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], list(self.counts), strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Holds the counters of a server; each is written by one thread only.

    Args:
        batch: The largest batch.
        gauges: The name and text of each number that is read when asked for, and the function that returns it.
    """

    def __init__(self, batch: int, gauges: dict[tuple[str, str], Callable[[], int]]):
        self.gauges, self.in_flight = gauges, 0
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds, self.network_seconds = Histogram(SECONDS), Histogram(SECONDS)
        self.batches = Histogram(sorted({1, batch, *(2**i for i in range(batch.bit_length()))}))

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that has ended; only the thread of the event loop may call it."""
        self.requests[path, status] += 1
        self.seconds.observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """Counts a batch; only the queue's thread may call it."""
        self.batches.observe(size)
        self.network_seconds.observe(seconds)

    def text(self) -> str:
        """Returns all metrics as text."""
        return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        name = "apcnet_requests_total"
        yield from _head(name, "counter", "Requests that have ended, by path and status; 499: the client has gone.")
        for (path, status), count in sorted(self.requests.items()):
            yield f'{name}{{path="{path}",status="{status}"}} {count}'
        images = int(self.batches.sum)
        yield from [*_head("apcnet_images_total", "counter", "Images labelled."), f"apcnet_images_total {images}"]
        for name, text, histogram in (
            ("apcnet_request_seconds", "Seconds from the head of a request to the end of its answer.", self.seconds),
            ("apcnet_batch_images", "Images that went through the network together.", self.batches),
            ("apcnet_network_seconds", "Seconds that a batch took.", self.network_seconds),
        ):
            yield from [*_head(name, "histogram", text), *histogram.lines(name)]
        for (name, text), read in self.gauges.items():
            yield from [*_head(name, "gauge", text), f"{name} {read()}"]
        name = "apcnet_requests_in_flight"
        yield from [*_head(name, "gauge", "Requests that are not answered yet."), f"{name} {self.in_flight}"]


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
