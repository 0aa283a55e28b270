"""Defines the entries for whole heads, beside mmsegmentation's, or its layers in stock PyTorch if it is not installed.

`load_head` is our head with their weights, `accelerate` is their head with our operations in it. Heads take 2048
channels of 64×64, UPerNet's four maps from 256 channels of 128×128 to 2048 of 16×16; they have 512 inside. Evaluation:
the forward pass of one image. Training: forward and backward of two, gradients of the input and of every parameter,
without the loss (operations.py has that). Most of the work is the 3×3 convolution of the bottleneck, over 4096 channels
(apc, psp) or 2048 (enc); of 4096, psp needs 2048. Operations are those of the stock layers' products, three times as
many in training. Bytes that have to move: input, output and parameters, three times in training. Memory is what a call
needs at its peak beyond parameters and input.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import mmseg_peer as peer
import stock_models
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apc_kernels.interop.mmseg import accelerate
from apcnet.interop.mmseg import load_head
from benchmarks import setting
from benchmarks.models import OTHER, check
from benchmarks.operation import Operation
from benchmarks.setting import DEVICE, DTYPE

CHANNELS, WIDTH, SIZE = (16, 8, (8, 8)) if setting.REHEARSAL else (2048, 512, (64, 64))
HEADS, CLASSES, EVALUATION, TRAINING = ("apc", "psp", "enc", "fcn", "uper"), (19, 150), "evaluation", "training"
DEFAULT = ("apc", "psp", "enc")  # what a run without --all measures
ALLOWED = {EVALUATION: 1e-5, TRAINING: 1e-3} if torch.float32 == DTYPE else {EVALUATION: 5e-2, TRAINING: 5e-2}


class Head(NamedTuple):
    """Describes a head to measure, in evaluation or training."""

    name: str
    mode: str
    classes: int
    size: tuple[int, int] = SIZE

    @property
    def maps(self) -> list[tuple[int, int, int]]:
        """The channels, height and width of each map of the backbone that the head takes."""
        if self.name != "uper":
            return [(CHANNELS, *self.size)]
        height, width = self.size
        return [(CHANNELS >> (3 - i), 2 * height >> i, 2 * width >> i) for i in range(4)]

    def __str__(self) -> str:
        shape = "x".join(map(str, (self.batch, CHANNELS, *self.size)))
        return f"{self.name} head, {self.mode}, {shape}, {self.classes} classes"

    @property
    def batch(self) -> int:
        return 1 if self.mode == EVALUATION else 2

    @property
    def config(self) -> dict:
        options = {"num_codes": 32} if self.name == "enc" else {}
        if self.name == "uper":
            options = {"in_channels": [channels for channels, *_ in self.maps]}
        return peer.head_config(self.name, CHANNELS, WIDTH, self.classes, **options)


def theirs(case: Head) -> nn.Module:
    if peer.AVAILABLE:
        return peer.build(case.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return stock_models.head(case.config)


def loaded(case: Head) -> nn.Module:
    return load_head(case.config, theirs(case).state_dict())


def accelerated(case: Head) -> nn.Module:
    head = theirs(case)
    accelerate(head)
    return head


def draw(case: Head, layout: Callable) -> dict[str, Tensor]:
    """Draws the features of a backbone, in low precision if autocast is on."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(case.batch, *shape, generator=generator).relu() for shape in case.maps]
    return {f"x{i}": layout(x.to(DEVICE, DTYPE)) for i, x in enumerate(maps)}


def ready(build: Callable[[Head], nn.Module], case: Head, t: dict[str, Tensor], backward: bool) -> Callable:
    """Makes a call that returns the outputs, and in training the gradients as well."""
    maps, training = list(t.values()), case.mode == TRAINING
    layout, dtype = torch.channels_last if setting.ON_GPU else torch.contiguous_format, maps[0].dtype
    head = build(case).to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32, memory_format=layout)
    head.train(training)
    leaves = [*(x.requires_grad_(training) for x in maps), *head.parameters()]

    def run() -> tuple[list[Tensor], list[Tensor | None]]:
        with torch.set_grad_enabled(training), torch.autocast(DEVICE, DTYPE, enabled=dtype.itemsize < 4):
            result = head.forward(maps)
        found = list(result) if isinstance(result, tuple) else [result]
        if not training:
            return found, []
        loss = sum((t if t.dtype == torch.float64 else t.float()).square().mean() for t in found)
        return [t.detach() for t in found], torch.autograd.grad(loss, leaves, allow_unused=True)

    return run


def counts(case: Head, t: dict[str, Tensor], backward: bool) -> tuple[int, int]:
    ways = 1 if case.mode == EVALUATION else 3
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        head = stock_models.head(case.config)
        maps = [torch.empty(case.batch, *shape) for shape in case.maps]
        result = head.train(case.mode == TRAINING)(maps)
    logits = result[0] if isinstance(result, tuple) else result
    numbers = sum(tensor.numel() for tensor in (*maps, logits, *head.parameters()))
    return ways * int(numbers) * DTYPE.itemsize, ways * counter.get_total_flops()


CASES = [Head(*given) for given in itertools.product(HEADS, (EVALUATION, TRAINING), CLASSES)]


def entry(name: str, ours: Callable[[Head], nn.Module], cases: list[Head] = CASES) -> Operation:
    return Operation(
        name=name,
        cases=cases,
        small=Head("apc", TRAINING, 19, (8, 8)),
        draw=draw,
        ready=ready,
        ours=ours,
        others={OTHER: theirs},
        counts=counts,
        check=lambda case, t, sides: check(str(case), sides, ALLOWED[case.mode]),
        directions=("",),
        backend="apcnet",
        by_layout=False,
        compiled=False,
        by_default=lambda case, *_: case.name in DEFAULT and name == "load_head" and case.classes == CLASSES[0],
        rounds=3,
    )


ENTRIES = [entry("load_head", loaded), entry("accelerate", accelerated, CASES if peer.AVAILABLE else [])]
