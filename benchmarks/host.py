"""Measures the processor time of calls so small that nothing but the call costs: `python -m benchmarks.host`.

A GPU waits for these microseconds. Heads stand beside mmsegmentation's, or its layers in stock PyTorch if it is not
installed; operations beside PyTorch's composition. One thread, both sides in turn in one process: the median of the
ratios is what counts, ours over theirs. Below 1 ours is faster.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import mmseg_peer as peer
import stock
import stock_models
import torch
import torch.nn.functional as F

import apc_kernels
from apcnet.interop.mmseg import load_head

HEADS, SIDE = ("apc", "psp", "enc"), 6
SCALES = (1, 2, 3, 6)


class Ratio(NamedTuple):
    """Holds the medians of a call, in microseconds of one thread's processor time, and of the ratios."""

    ours: float
    theirs: float
    ratio: float


def measure(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 60, calls: int = 5) -> Ratio:
    times = []
    for _ in range(rounds + 3):
        pair = []
        for function in (ours, theirs):
            start = time.thread_time()
            for _ in range(calls):
                function()
            pair.append(1e6 * (time.thread_time() - start) / calls)
        times.append(pair)
    a, b = zip(*times[3:], strict=True)
    return Ratio(statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times[3:]))


def head(name: str, training: bool) -> tuple[Callable[[], object], Callable[[], object]]:
    """Returns calls of our head and of theirs, with the same weights."""
    config = peer.head_config(name, 16, 8, 4, **({"num_codes": 32} if name == "enc" else {}))
    theirs = peer.build(config) if peer.AVAILABLE else stock_models.head(config)
    features = [torch.randn(2, 16, SIDE, SIDE)]

    def call(module):
        with torch.set_grad_enabled(training):
            results = module(features)
            results = results if isinstance(results, tuple) else (results,)
            if training:
                sum(result.sum() for result in results).backward()

    heads = (load_head(config, theirs.state_dict()), theirs)
    ours, theirs = (functools.partial(call, module.train(training)) for module in heads)
    return ours, theirs


def operations() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    x, logits, target = torch.randn(1, 8, 4, 4), torch.randn(1, 4, 4, 4), torch.randint(0, 4, (1, 8, 8))
    words, scale = torch.randn(8, 8), -torch.rand(8)
    regions, weight, bias = torch.randn(1, 50, 2), torch.randn(50, 2), torch.zeros(50)
    given = regions, weight, bias, SCALES

    def upsampled():
        return F.interpolate(logits, (8, 8), mode="bilinear")

    return {
        "pyramid_pool": (
            lambda: apc_kernels.pyramid_pool(x, SCALES),
            lambda: [F.adaptive_avg_pool2d(x, s) for s in SCALES],
        ),
        "adaptive_context": (
            lambda: apc_kernels.adaptive_context(x, *given),
            lambda: stock.adaptive_context(x, *given),
        ),
        "affinity_moments": (
            lambda: apc_kernels.affinity_moments(x, weight, bias, SCALES),
            lambda: stock.affinity_moments(x, weight, bias, SCALES),
        ),
        "encode": (lambda: apc_kernels.encode(x, words, scale), lambda: stock.encode(x, words, scale)),
        "upsample_cross_entropy": (
            lambda: apc_kernels.upsample_cross_entropy(logits, target),
            lambda: F.cross_entropy(upsampled(), target),
        ),
        "upsample_argmax": (lambda: apc_kernels.upsample_argmax(logits, (8, 8)), lambda: upsampled().argmax(1)),
        "upsample_softmax": (lambda: apc_kernels.upsample_softmax(logits, (8, 8)), lambda: upsampled().softmax(1)),
    }


def main() -> None:
    torch.set_num_threads(1)
    other = "mmsegmentation" if peer.AVAILABLE else "its layers in stock PyTorch"
    print(
        f"| call | ours, µs | theirs, µs | ratio |\n|---|---|---|---|\nheads beside {other}, operations beside PyTorch"
    )
    for name in HEADS:
        for training in (False, True):
            row = measure(*head(name, training))
            mode = "training" if training else "evaluation"
            print(f"| {name} head, {mode} | {row.ours:.0f} | {row.theirs:.0f} | {row.ratio:.2f} |")
    with torch.no_grad():
        for name, pair in operations().items():
            row = measure(*pair, calls=50)
            print(f"| {name} | {row.ours:.0f} | {row.theirs:.0f} | {row.ratio:.2f} |")


if __name__ == "__main__":
    main()
