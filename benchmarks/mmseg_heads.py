"""Whole heads beside mmsegmentation's, or its layers in stock PyTorch where that is not installed: ours (load_head),
and mmsegmentation's own after accelerate().

    python -m benchmarks.mmseg_heads [HEAD …]  the comparison, printed: all, or some of apc psp enc fcn
    make bench                                 the same through pytest-benchmark, into a JSON file

2048 channels of 64×64 in, 512 inside. Evaluation: the forward pass of one image. Training step: forward and backward of
two, gradients of the input and of every parameter, without the loss (benchmarks/upsample.py has that). Most of the work
is the 3×3 convolution of the bottleneck, over 4096 channels (apc, psp) or 2048 (enc); of 4096, psp needs 2048.
Operations are those of the stock layers' products, three times as many in training. Bytes that have to move: input,
output and parameters, three times in training. Memory is what a call needs at its peak beyond parameters and input.
"""

import argparse
import copy
from collections.abc import Sequence

import mmseg_peer as peer
import pytest
import stock_models
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apcnet.interop.mmseg import load_head
from apcnet.interop.mmseg.accelerate import accelerate
from benchmarks import setting
from benchmarks.memory import peak_here, peaks
from benchmarks.models import OTHER, check
from benchmarks.setting import DEVICE, DTYPE, here, name_of
from benchmarks.timing import paired, result_row

CHANNELS, WIDTH, SIZE = here((2048, 512, (64, 64)), (2048, 512, (64, 64)), (16, 8, (8, 8)))
HEADS, CLASSES = ("apc", "psp", "enc", "fcn"), (19, 150)
SIDES = ("load_head", "accelerate") if peer.AVAILABLE else ("load_head",)
BATCHES = {"evaluation": 1, "training": 2}
ALLOWED = {"evaluation": 1e-5, "training": 1e-3} if torch.float32 == DTYPE else {"evaluation": 5e-2, "training": 5e-2}


def head_config(name: str, classes: int) -> dict:
    codes = {"num_codes": 32} if name == "enc" else {}
    return peer.head_config(name, CHANNELS, WIDTH, classes, **codes)


def build(name: str, side: str, classes: int) -> nn.Module:
    """The same weights on every side."""
    config = head_config(name, classes)
    if peer.AVAILABLE:
        theirs = peer.build(config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            theirs = stock_models.head(config)
    head = load_head(config, theirs.state_dict()) if side == "load_head" else theirs
    if side == "accelerate":
        accelerate(head)
    return head.to(DEVICE, memory_format=torch.channels_last if setting.ON_GPU else torch.contiguous_format)


def draw(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    """What a backbone gives, under autocast in low precision."""
    generator = torch.Generator().manual_seed(0)
    return setting.USUAL(torch.randn(batch, CHANNELS, *size, generator=generator).relu().to(DEVICE, DTYPE))


def step(head: nn.Module, x: Tensor, mode: str):
    """One call: the outputs, in training the gradients as well."""
    training = mode == "training"
    head.train(training)
    leaves = [x.requires_grad_(training), *head.parameters()]

    def run() -> tuple[list[Tensor], Sequence[Tensor | None]]:
        with torch.set_grad_enabled(training), torch.autocast(DEVICE, DTYPE, enabled=x.itemsize < 4):
            result = head.forward([x])
        found = list(result) if isinstance(result, tuple) else [result]
        if not training:
            return found, []
        loss = sum((t if t.dtype == torch.float64 else t.float()).square().mean() for t in found)
        return [t.detach() for t in found], torch.autograd.grad(loss, leaves, allow_unused=True)

    return run


def functions(name: str, side: str, mode: str, classes: int):
    """Ours and the other's on the same input. Checked first: no figure stands behind a wrong result.

    By the outputs and the norm of the gradients, beside the other's in float64: through the batch norm of a 1×1 map of
    two images its own gradients are not the same to three digits in float32.
    """
    x, heads = draw(BATCHES[mode]), [build(name, which, classes) for which in (side, OTHER)]
    exact = step(copy.deepcopy(heads[1]).double(), x.double(), mode)
    ours, other = (step(head, x, mode) for head in heads)
    found = []
    for run in (ours, other, exact):
        results, gradients = run()
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        found.append([*results, norm])  # 0 in evaluation
    for given, own, right in zip(*found, strict=True):
        check(f"{name}, {side}, {mode}", given, own, right, ALLOWED[mode])
    return ours, other


def counts(name: str, mode: str, classes: int) -> tuple[int, int]:
    """Bytes and operations."""
    ways = 1 if mode == "evaluation" else 3
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        head = stock_models.head(head_config(name, classes))
        x = torch.empty(BATCHES[mode], CHANNELS, *SIZE)
        head.train(mode == "training")([x])
    numbers = x.numel() * (1 + classes / CHANNELS) + sum(p.numel() for p in head.parameters())
    return ways * int(numbers) * DTYPE.itemsize, ways * counter.get_total_flops()


def measure(name: str, side: str, mode: str, classes: int) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(name, side, mode, classes)
    memory = peaks("benchmarks.mmseg_heads", name, mode, str(classes), ours=side, other=OTHER)
    shape = "x".join(map(str, (BATCHES[mode], CHANNELS, *SIZE)))
    case = f"{name} head, {mode}, {shape}, {classes} classes, {name_of(DTYPE)}"
    pair = paired(ours, other, rounds=3)
    return result_row(side, case, "apcnet", OTHER, pair, *counts(name, mode, classes), **memory), ours


def _parameters():
    for name in HEADS:
        for side in SIDES:
            for mode in BATCHES:
                for classes in CLASSES:
                    telling = name != "fcn" and side == "load_head" and classes == CLASSES[0]
                    yield pytest.param(name, side, mode, classes, marks=() if telling else setting.long)


@pytest.mark.parametrize(("name", "side", "mode", "classes"), list(_parameters()))
def bench_mmseg_heads(benchmark, name, side, mode, classes):
    setting.record(benchmark, *measure(name, side, mode, classes))


def peak_of(name: str, mode: str, classes: str, side: str) -> int:
    head = build(name, side, int(classes))
    step(head, draw(BATCHES[mode], (8, 8)), mode)()
    return peak_here(step(head, draw(BATCHES[mode]), mode))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("heads", nargs="*", metavar="HEAD", help=" ".join(HEADS))
    wanted = parser.parse_args().heads or HEADS
    if unknown := set(wanted) - set(HEADS):
        parser.error(f"HEAD: expected some of {', '.join(HEADS)}; got {', '.join(sorted(unknown))}")
    each = [(name, side, mode, CLASSES[0]) for name in wanted for side in SIDES for mode in BATCHES]
    setting.print_rows("Heads", (measure(*given)[0] for given in each))


if __name__ == "__main__":
    main()
