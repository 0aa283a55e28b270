"""Lists the hard cases of the upsample_* operations once: tests run all of them, benchmarks the large ones."""

from collections.abc import Callable
from dataclasses import dataclass

import stock
import torch
from accuracy import max_error, unit
from torch import Tensor


@dataclass(frozen=True)
class UpsampleCase:
    """Describes logits on a source grid, and the size they are upsampled to."""

    batch: int
    classes: int
    source: tuple[int, int]
    size: tuple[int, int]
    align_corners: bool = False

    def __str__(self) -> str:
        grids = "-".join("x".join(map(str, grid)) for grid in (self.source, self.size))
        return f"{self.batch}x{self.classes}x{grids}{'-corners' if self.align_corners else ''}"


UPSAMPLES = [
    UpsampleCase(2, 5, (7, 9), (14, 18)),  # weights of 1/4 and 3/4
    UpsampleCase(2, 5, (7, 9), (13, 17), True),  # weights of 1/2
    UpsampleCase(2, 19, (6, 8), (48, 64)),  # 8 times, as of a head at stride 8
    UpsampleCase(1, 19, (9, 17), (65, 129), True),
    UpsampleCase(2, 7, (5, 6), (13, 17)),  # a fraction
    UpsampleCase(2, 7, (5, 6), (13, 17), True),
    UpsampleCase(1, 4, (13, 17), (5, 6)),  # downwards
    UpsampleCase(1, 4, (13, 17), (5, 6), True),
    UpsampleCase(1, 3, (40, 50), (3, 2)),  # most of the source is never read
    UpsampleCase(2, 3, (31, 4), (7, 90)),  # downwards in rows, upwards in columns
    UpsampleCase(2, 3, (4, 31), (90, 7), True),
    UpsampleCase(2, 6, (11, 12), (11, 12)),  # the identity
    UpsampleCase(2, 6, (11, 12), (11, 12), True),
    UpsampleCase(1, 4, (1, 1), (9, 11)),
    UpsampleCase(1, 4, (1, 1), (9, 11), True),
    UpsampleCase(1, 4, (8, 9), (1, 1)),
    UpsampleCase(1, 4, (8, 9), (1, 1), True),
    UpsampleCase(1, 4, (1, 9), (6, 1), True),
    UpsampleCase(2, 2, (2, 2), (70, 130)),  # few sources, each of thousands of pixels
    UpsampleCase(1, 1, (6, 5), (12, 11)),  # one class: no loss, no gradient
    UpsampleCase(1, 8, (9, 64), (9, 64)),  # exactly the blocks that kernels like
    UpsampleCase(1, 65, (5, 65), (11, 129)),  # one more
    UpsampleCase(1, 150, (8, 8), (31, 33)),
    UpsampleCase(1, 300, (4, 5), (9, 7)),  # labels of more than 8 bits
    UpsampleCase(3, 21, (17, 3), (23, 40), True),
]
LARGE_UPSAMPLES = [
    UpsampleCase(2, 150, (64, 64), (512, 512)),  # ADE20K at stride 8
    UpsampleCase(2, 19, (128, 256), (1024, 2048)),  # Cityscapes at stride 8
]

EXTREMES: dict[str, Callable[[Tensor], Tensor]] = {  # changes to logits
    "far above 0": lambda logits: logits + 1e4,
    "far below 0": lambda logits: logits - 1e4,
    "far apart": lambda logits: logits * (80 / logits.abs().max()),
    "as large as float16 has them": lambda logits: logits * (65504 / logits.abs().max()),
    "all the same": lambda logits: torch.full_like(logits, 3.0),
    "almost the same": lambda logits: logits * 1e-6,
    "subnormal": lambda logits: logits * 1e-40,
}


def draw_upsample(
    case: UpsampleCase,
    layout: Callable = lambda x: x,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    labels: torch.dtype = torch.int64,
) -> dict[str, Tensor]:
    """Draws logits, labels of which a fifth is 255, class weights, and a gradient of every pixel's loss.

    The same values for every layout. No weight is far from 1, so that every class shows.
    """
    generator = torch.Generator().manual_seed(case.classes + sum(case.source) + sum(case.size))
    working = torch.float64 if dtype == torch.float64 else torch.float32
    logits = 3 * torch.randn(case.batch, case.classes, *case.source, generator=generator)
    target = torch.randint(case.classes, (case.batch, *case.size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[:, 0, 0] = case.classes - 1  # a result of one pixel has one that counts
    return {
        "logits": layout(logits.to(device, dtype)),
        "target": target.to(device, labels),
        "weight": (0.5 + torch.rand(case.classes, generator=generator)).to(device, working),
        "grad": torch.randn(target.shape, generator=generator).to(device, working),
    }


def tied_logits(case: UpsampleCase, layout: Callable = lambda x: x, device: str = "cpu") -> Tensor:
    """Draws small integers, which power-of-two ratios interpolate exactly: most pixels have several largest logits."""
    generator = torch.Generator().manual_seed(case.classes)
    values = torch.randint(-1, 2, (case.batch, case.classes, *case.source), generator=generator)
    return layout(values.float().to(device))


def loss_and_gradient(
    function: Callable, tensors: dict[str, Tensor], case: UpsampleCase, **options
) -> tuple[Tensor, Tensor]:
    """Computes the loss (weighted by `weight` if the options say so) and the gradient of the logits."""
    logits = tensors["logits"].detach().requires_grad_()
    options["weight"] = tensors["weight"] if options.get("weight") else None
    loss = function(logits, tensors["target"], align_corners=case.align_corners, **options)
    grad = tensors["grad"] if loss.dim() else torch.full_like(loss, 0.7)
    return loss.detach(), torch.autograd.grad(loss, logits, grad)[0]


def assert_labels(labels: Tensor, logits: Tensor, case: UpsampleCase) -> None:
    """Checks that every label is the argmax of scores within the accuracy rule of the exact ones."""
    exact = stock.upsampled(logits.cpu().double(), case.size, case.align_corners)
    pytorch = stock.upsampled(logits.cpu().float(), case.size, case.align_corners)
    error = 2 * max_error(pytorch, exact) + 4 * unit(exact, torch.float32)
    chosen = exact.gather(1, labels.cpu().long()[:, None])[:, 0]  # raises for labels out of range
    short = (exact.amax(1) - chosen).max().item() if labels.numel() else 0.0
    assert short <= 2 * error, f"{case}: a label whose score is {short:.3g} below the largest, allowed {2 * error:.3g}"
