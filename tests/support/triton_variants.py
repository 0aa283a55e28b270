"""Counts how often Triton would compile each kernel in training at random sizes: triton_variants.py COUNT.

A process of its own, as triton_gate.py, whose launches on meta tensors it counts: Triton compiles a kernel anew for
every new combination of compile-time arguments, types, and arguments that are 1 or divisible by 16.
"""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch
import triton_gate as gate
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

SCALES = (1, 2, 3, 6)


def launches(height: int, width: int) -> Iterator[tuple]:
    """Yields what a training step and an evaluation launch for two images of this size, in bfloat16 channels_last."""
    h, w = -(-height // 8), -(-width // 8)
    x = gate.meta(2, 4 * 512, h, w, dtype=torch.bfloat16, channels_last=True)
    pooled = gate.meta(2, 2048, 50, dtype=torch.bfloat16)
    yield from gate.pool_kernels.forward_launches(x, SCALES, pooled)
    yield from gate.pool_kernels.backward_launches(pooled, SCALES, x)
    yield from gate.affinity_launches(x, SCALES)
    logits = gate.meta(2, 150, h, w, dtype=torch.bfloat16, channels_last=True)
    yield from gate.upsample_launches(logits, (height, width))


def key(kernel, arguments: dict) -> tuple:
    """Returns what Triton looks a compiled kernel up by."""
    parts = []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if not parameter.is_constexpr:
            special, aligned = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
            value = native_specialize_impl(BaseBackend, value, False, special, aligned)
        parts.append(value)
    options = {name: value for name, value in arguments.items() if name.startswith("num_")}
    return (*map(str, parts), str(options))


if __name__ == "__main__":
    draw, variants = random.Random(0), defaultdict(set)
    for _ in range(int(sys.argv[1])):
        for kernel, _, arguments in launches(draw.randint(64, 2048), draw.randint(64, 2048)):
            variants[kernel.fn.__name__].add(key(kernel, arguments))
    json.dump({name: len(keys) for name, keys in variants.items()}, sys.stdout)
