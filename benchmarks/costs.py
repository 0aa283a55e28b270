"""Counts what a training step computes, reads, exchanges and writes, and what a long run on many GPUs needs from it.

    python -m benchmarks.costs        prints the tables of docs/scale.md

Nothing is timed. Operations are counted on meta tensors; speeds follow from a rate of a GPU that is named.

    floating-point operations    forward and backward, of matrix products and convolutions
    bytes read                   images × the bytes of an image and its mask, as they are stored
    bytes exchanged              2 (N − 1) / N × 4 bytes for each parameter, sent by each of N GPUs in a ring
    bytes written                weights, momentum and statistics of a checkpoint / the steps between two checkpoints
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

import apcnet
from apc_kernels import backend
from apcnet.data.shards.index import BLOCK, MOST_BLOCKS, RECORD
from apcnet.data.stream import LARGEST_STORED
from apcnet.presets import preset

RATE = 150e12  # operations a second that a GPU sustains on these networks: a sixth of the peak of an H100 in bfloat16
PRESETS = ("apcnet-r50-ade20k", "apcnet-r101-ade20k", "pspnet-r50-ade20k", "encnet-r50-ade20k", "apcnet-r50-cityscapes")
CLASSES = {"ade20k": 150, "cityscapes": 19}
STORED = {"ade20k": 45e3, "cityscapes": 2.4e6}  # bytes of an image and its mask: the downloads' sizes / their images
NAME = 20  # bytes of a sample's name, about
DECODING = 8e-3  # seconds of a core for an image of ADE20K's size with its mask and augmentation


@dataclass(frozen=True)
class Counts:
    """Holds what one image and one model cost."""

    operations: float  # of one image, forward and backward
    parameters: int
    state: int  # bytes of a checkpoint


@dataclass(frozen=True)
class Run:
    """Describes a long run on several GPUs."""

    name: str
    preset: str
    images: int  # of the training set
    stored: float  # bytes of an image and its mask
    gpus: int
    batch_size: int
    epochs: float


RUNS = (
    Run("ADE20K, 127 epochs", "apcnet-r50-ade20k", 20_210, STORED["ade20k"], 64, 256, 127),
    Run("ten million images, 8 epochs", "apcnet-r50-ade20k", 10_000_000, 150e3, 64, 1024, 8),
)


@cache
def counts(name: str) -> Counts:
    """Counts on meta tensors, from two images: a batch norm in training needs two values."""
    config = preset(name)
    with torch.device("meta"), backend("reference"):
        model = apcnet.create(
            config.model.model, config.model.backbone, CLASSES[config.data.dataset], **config.model.options()
        ).train()
        images = torch.empty(2, 3, *config.data.crop)
        masks = torch.empty(2, *config.data.crop, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter:
            sum(model(images, masks).values()).backward()
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return Counts(counter.get_total_flops() / 2, parameters, 8 * parameters + buffers)


def exchanged(parameters: int, gpus: int) -> float:
    """Returns the bytes that each GPU sends in a step."""
    return 2 * (gpus - 1) / gpus * 4 * parameters


def steps() -> str:
    """Writes the table of models."""
    headings = "preset", "operations an image", "images/s at 150 TFLOP/s", "read", "exchanged, 64 GPUs", "written"
    rows = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name in PRESETS:
        config, one = preset(name), counts(name)
        read = config.batch_size * STORED[config.data.dataset]
        rows.append(
            f"| `{name}`, {config.batch_size} images | {one.operations / 1e12:.2f} T | {RATE / one.operations:.0f} | "
            f"{read / 1e6:.1f} MB | {exchanged(one.parameters, 64) / 1e6:.0f} MB | "
            f"{one.state / config.save_every / 1e6:.2f} MB |"
        )
    return "\n".join(rows)


def runs() -> str:
    """Writes the table of runs."""
    columns = [_needs(run) for run in RUNS]
    rows = [f"| | {' | '.join(run.name for run in RUNS)} |", "|---|" + "---|" * len(RUNS)]
    rows += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    return "\n".join(rows)


def _needs(run: Run) -> dict[str, str]:
    one = counts(run.preset)
    share = run.batch_size // run.gpus
    seconds = share * one.operations / RATE  # of a step
    number = run.epochs * run.images / run.batch_size
    speed = run.batch_size / seconds
    return {
        "GPUs × images of each": f"{run.gpus} × {share}",
        "steps": f"{number:,.0f}",
        "hours, if computing is all": f"{number * seconds / 3600:.1f}",
        "images/s": f"{speed:,.0f}",
        "data": f"{run.images * run.stored / 1e9:,.0f} GB",
        "read": f"{speed * run.stored / 1e6:,.0f} MB/s, {speed:,.0f} requests/s",
        "order and index in memory, each process": f"{_memory(run.images) / 2**20:.0f} MiB",
        "exchanged by each GPU": f"{exchanged(one.parameters, run.gpus) / seconds / 1e9:.1f} GB/s",
        f"cores that decode, at {1000 * DECODING:g} ms an image": f"{speed * DECODING:,.0f}",
        "a checkpoint": f"{one.state / 1e6:,.0f} MB",
    }


def _memory(images: int) -> int:
    """Returns the bytes of the orders of two epochs, where they are stored, and of the blocks of the index."""
    order = 8 * images if images <= LARGEST_STORED else 0
    return 2 * order + min((RECORD.itemsize + NAME) * images, MOST_BLOCKS * BLOCK)


if __name__ == "__main__":
    print(f"{steps()}\n\n{runs()}")
