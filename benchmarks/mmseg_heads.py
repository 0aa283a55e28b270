"""Whole heads beside mmsegmentation's: ours (load_head), and its own after accelerate(). Needs mmsegmentation.

    python -m benchmarks.mmseg_heads [HEAD …]  the comparison, printed: all, or some of apc psp enc fcn
    make bench                                 the same through pytest-benchmark, into a JSON file

2048 channels of 64×64 in, 512 inside. Evaluation: the forward pass of one image. Training step: forward and backward of
two, gradients of the input and of every parameter, without the loss (benchmarks/upsample.py has that). Most of the work
is the 3×3 convolution of the bottleneck, the same library call on all sides, over 4096 channels (apc, psp) or 2048
(enc); of 4096, psp needs 2048. Bytes that have to move: input, output and parameters, three times in training. Memory
is what a training step needs at its peak beyond parameters and input, in a process of its own.
"""

import argparse

import mmseg_peer as peer
import pytest
import torch
from torch import Tensor, nn

from apcnet.interop.mmseg import load_head
from apcnet.interop.mmseg.accelerate import accelerate
from benchmarks.memory import peak, peak_here
from benchmarks.timing import paired, result_row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS, WIDTH, SIZE = 2048, 512, (64, 64)
HEADS, SIDES, CLASSES = ("apc", "psp", "enc", "fcn"), ("load_head", "accelerate"), (19, 150)
BATCHES = {"evaluation": 1, "training": 2}


def build(name: str, side: str, classes: int) -> nn.Module:
    """The same weights on every side."""
    codes = {"num_codes": 32} if name == "enc" else {}
    config = peer.head_config(name, CHANNELS, WIDTH, classes, **codes)
    theirs = peer.build(config)
    if side == "load_head":
        return load_head(config, theirs.state_dict()).to(DEVICE)
    if side == "accelerate":
        accelerate(theirs)
    return theirs.to(DEVICE)


def draw(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, CHANNELS, *size, generator=generator).relu().to(DEVICE)


def outputs(head: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    result = head.forward([x])
    return result if isinstance(result, tuple) else (result,)


def step(head: nn.Module, x: Tensor, mode: str):
    """One call: the outputs in evaluation, the gradients in training."""
    training = mode == "training"
    head.train(training)
    leaves = [x.requires_grad_(training), *head.parameters()]

    def run():
        if training:
            return torch.autograd.grad(sum(t.square().mean() for t in outputs(head, x)), leaves, allow_unused=True)
        with torch.no_grad():
            return outputs(head, x)

    return run


def functions(name: str, side: str, mode: str, classes: int):
    """Ours and mmsegmentation's on the same input. Checked first: no figure stands behind a wrong result.

    By the outputs: gradients through the batch norm of a 1×1 map of two images are not the same to three digits even
    between mmsegmentation in float32 and in float64. The tests hold them to float64.
    """
    x, heads = draw(BATCHES[mode]), [build(name, which, classes) for which in (side, "mmsegmentation")]
    with torch.no_grad():
        given, expected = (outputs(head.train(mode == "training"), x)[0] for head in heads)
    allowed = (1e-5 if mode == "evaluation" else 1e-3) * expected.abs().max()
    if not (given - expected).abs().max() <= allowed:
        raise RuntimeError(f"{name}, {side}, {mode}: not what mmsegmentation computes")
    ours, other = (step(head, x, mode) for head in heads)
    return ours, other


def measure(name: str, side: str, mode: str, classes: int, seconds: float = 2.0) -> tuple[dict, object]:
    """The row of a results file, and our call."""
    ours, other = functions(name, side, mode, classes)
    x, parameters = draw(BATCHES[mode]), build(name, side, classes).parameters()
    logits = x.nbytes * classes // CHANNELS
    moved = (x.nbytes + logits + sum(p.nbytes for p in parameters)) * (1 if mode == "evaluation" else 3)
    memory = {}
    if mode == "training":
        for prefix, which in (("", side), ("other_", "mmsegmentation")):
            memory[f"{prefix}memory_mib"] = peak("benchmarks.mmseg_heads", name, which, str(classes)) / 2**20
    case = f"{name} head, {mode}, {'x'.join(map(str, x.shape))}, {classes} classes, float32"
    pair = paired(ours, other, DEVICE, seconds)
    return result_row(side, case, "apcnet", "mmsegmentation", pair, moved, DEVICE, **memory), ours


@pytest.mark.skipif(not peer.AVAILABLE, reason="needs mmsegmentation")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("mode", BATCHES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", HEADS)
def bench_mmseg_heads(benchmark, name, side, mode, classes):
    row, ours = measure(name, side, mode, classes)
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=1)


def _peak(name: str, side: str, classes: str) -> int:
    head = build(name, side, int(classes))
    step(head, draw(BATCHES["training"], (8, 8)), "training")()
    return peak_here(step(head, draw(BATCHES["training"]), "training"), DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("heads", nargs="*", metavar="HEAD", help=" ".join(HEADS))
    parser.add_argument("--peak", nargs=3, metavar=("HEAD", "SIDE", "CLASSES"), help="prints bytes, no more")
    arguments = parser.parse_args()
    if arguments.peak:
        print(_peak(*arguments.peak))
        return
    if unknown := set(arguments.heads) - set(HEADS):
        parser.error(f"HEAD: expected some of {', '.join(HEADS)}; got {', '.join(sorted(unknown))}")
    if not peer.AVAILABLE:
        parser.error("needs mmsegmentation")
    print(
        f"Heads on {CHANNELS}x{SIZE[0]}x{SIZE[1]}, {CLASSES[0]} classes, float32, on {DEVICE}; beside mmsegmentation\n"
    )
    print(f"{'':<28}{'ours ms':>9}{'theirs ms':>11}{'times':>7}{'ours MiB':>10}{'theirs MiB':>12}{'share':>7}")
    for name in arguments.heads or HEADS:
        for side in SIDES:
            for mode in BATCHES:
                row, _ = measure(name, side, mode, CLASSES[0], seconds=1.0)
                line = (
                    f"{f'{name}, {side}, {mode}':<28}{row['ours_ms']:>9.0f}{row['other_ms']:>11.0f}{row['ratio']:>7.2f}"
                )
                if mode == "training":
                    mib, other = row["memory_mib"], row["other_memory_mib"]
                    line += f"{mib:>10.0f}{other:>12.0f}{mib / other:>7.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
