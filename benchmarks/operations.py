"""Defines the table of operations to measure: cases, other sides, and the bytes and operations that each one needs.

Each operation has an entry, and TABLE lists them at the end; those that upsample logits are in upsampling.py. run.py
measures all of them. The other sides are the baselines of the tests (stock.py in tests/support), and the cases are the
tests' large ones. Bytes are those that a perfect kernel moves: every map is read or written as often as necessary.
Operations are additions and multiplications.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import head_cases
import stock
import torch
from augment_cases import SampleCase, cv2, draw_sample, in_opencv
from cases import LARGE_MAPS, ContextCase, MapCase, draw, draw_context, draw_norm
from torch import Tensor

import apc_kernels
from apc_kernels import BatchNorm
from apcnet.data import augment
from apcnet.data.files import read_image
from benchmarks.operation import SCALES, Call, Operation, Point, Sides, Tensors, calls, fastest_only, points, rehearsed
from benchmarks.setting import BATCHES, CHANNELS, COUNTS, DEVICE, DTYPE, REHEARSAL, SIDES, THREADS, here
from benchmarks.upsampling import UPSAMPLES

# pyramid_pool: x read and the result written; backward as many bytes, the other way. An addition for each element of x,
# each way: the sums of segments, which are few, are added up once more.

POOLED = here((2, 2048, 64, 64), (8, 2048, 64, 64))

pyramid_pool = Operation(
    name="pyramid_pool",
    cases=here(LARGE_MAPS, [MapCase(POOLED), *LARGE_MAPS]),
    small=MapCase((1, 6, 9, 7)),
    draw=lambda case, layout: dict(zip(("x", "grad"), draw(case, layout, DTYPE, DEVICE), strict=True)),
    ready=calls(lambda function, case, t, x: function(x, case.scales)),
    ours=apc_kernels.pyramid_pool,
    others={"F.adaptive_avg_pool2d for each scale": stock.pyramid_pool},
    counts=lambda case, t, back: ((1 + back) * (t["x"].nbytes + t["grad"].nbytes), (1 + back) * t["x"].numel()),
    kernel="pyramid_pool",
    scaling=[
        *(Point("batch", n, MapCase((n, *POOLED[1:]))) for n in BATCHES),
        *(Point("size", n, MapCase((*POOLED[:2], n, n))) for n in SIDES),
        *(Point("channels", n, MapCase((POOLED[0], n, *POOLED[2:]))) for n in CHANNELS),
        *(Point("scales", n, MapCase(POOLED, SCALES[:n])) for n in COUNTS),
        *(Point("threads", n, MapCase(POOLED)) for n in THREADS),
    ],
)

# adaptive_context, in maps of x: forward 2 (x read, z written); backward 5 (x and dz read for the gradients of the
# regions and the shift, and again for dx, which is written). Operations, in products of all positions with the rows of
# all scales: forward 2, backward 3 + 1 and 4 + 1.

CONTEXT = ContextCase(here(2, 8), 512, (64, 64))
CONTEXTS: dict[str, Any] = {
    "cases": [CONTEXT],
    "small": ContextCase(2, 16, (5, 7)),
    "scaling": points(CONTEXT, batch=BATCHES, size=SIDES, channels=CHANNELS, scales=COUNTS, threads=THREADS),
}


def _product(case: ContextCase) -> int:
    """Counts the operations of the product of all positions with the rows of all scales."""
    return 2 * case.batch * case.size[0] * case.size[1] * sum(s * s for s in case.scales) * case.channels


def _draw_context(case: ContextCase, layout: Callable) -> Tensors:
    """Draws the arguments, with a gradient of 0 near the kink of the ReLU, where rounding decides the sign."""
    drawn = draw_context(case, layout, DTYPE, DEVICE)
    t = {name: drawn[name] for name in ("x", "regions", "weight", "bias", "shift", "grad")}
    x, regions, weight, bias, shift, _ = (tensor.double() for tensor in t.values())
    z = stock.adaptive_context(x, regions, weight, bias, case.scales) + shift[..., None, None]
    t["grad"].masked_fill_(z.abs() < (1e-3 if torch.float32 == DTYPE else 3e-2), 0)
    return t


adaptive_context = Operation(
    name="adaptive_context",
    **CONTEXTS,
    draw=_draw_context,
    ready=calls(lambda f, case, t, *given: f(*given[:4], case.scales, shift=given[4], residual=True)),
    ours=apc_kernels.adaptive_context,
    others={"PyTorch, op by op": stock.adaptive_context},
    counts=lambda case, t, back: ((7 if back else 2) * t["x"].nbytes, (11 if back else 2) * _product(case)),
    kernel="adaptive_context",
)

# affinity_moments, in maps of x: forward 1 (x read); backward 2 (x read, its gradient written). Operations: forward a
# product with x and one of the affinities with themselves, scale by scale; backward three with x (the affinities again,
# the gradients of x and of the weight) and one of the others.


IN_MOMENTS = ("x", "weight", "bias")


def _square(case: ContextCase) -> int:
    """Counts the operations of the product of the affinities with themselves, scale by scale."""
    return 2 * case.batch * case.size[0] * case.size[1] * sum(s**4 for s in case.scales)


def _moments(function: Callable, case: ContextCase, t: Tensors, *leaves: Tensor) -> list[Tensor]:
    mean, covariances = function(*leaves, case.scales)
    return [mean, *covariances]


affinity_moments = Operation(
    name="affinity_moments",
    **CONTEXTS,
    draw=lambda case, layout: {name: t for name, t in _draw_context(case, layout).items() if name in IN_MOMENTS},
    ready=calls(_moments),
    ours=apc_kernels.affinity_moments,
    others={"PyTorch, op by op": stock.affinity_moments},
    counts=lambda case, t, back: (
        (3 if back else 1) * t["x"].nbytes,
        (4 if back else 1) * _product(case) + (2 if back else 1) * _square(case),
    ),
    kernel="affinity_moments",
)

# adaptive_context_norm: from the reduced features of all scales to what the fusion convolution takes, forward and
# backward in training. In maps of x: forward 4 (x for its mean, for the moments, for the product, z), backward 5.
# Operations are those of the two operations it is made of, affinity_moments forward and adaptive_context both ways.

PARAMETERS = ("regions", "weight", "bias", "projection", "norm.weight", "norm.bias", "guide")
PARAMETERS += ("guide_norm.weight", "guide_norm.bias")


def _norm_ready(function: Callable, case: ContextCase, t: Tensors, backward: bool) -> Call:
    """Makes a call that returns maps, their gradients, and those of the parameters.

    The other sides take separate maps, one for each scale, because slicing one map would cost them copies.
    """
    fused = function is apc_kernels.adaptive_context_norm
    last = t["x"].is_contiguous(memory_format=torch.channels_last)
    how = {"memory_format": torch.channels_last if last else torch.contiguous_format}
    xs, grads = ([m.contiguous(**how) for m in t[n].chunk(1 if fused else len(case.scales), 1)] for n in ("x", "grad"))
    leaves = [*(x.detach().requires_grad_() for x in xs), *(t[name].requires_grad_() for name in PARAMETERS)]
    norm, guide_norm = (
        BatchNorm(*(t[f"{name}.{f}"] for f in BatchNorm._fields[:4])) for name in ("norm", "guide_norm")
    )
    small = (t["regions"], t["weight"], t["bias"], case.scales, t["projection"], norm)

    def run() -> list[Tensor]:
        if fused:
            zs = [function(leaves[0], *small, guide=t["guide"], guide_norm=guide_norm)]
        else:
            with torch.autocast(DEVICE, DTYPE, enabled=t["x"].itemsize < 4):
                zs = function(leaves[: len(xs)], *small, t["guide"], guide_norm)
        return [*(z.detach() for z in zs), *torch.autograd.grad(zs, leaves, grads)]

    return run


def _check_norm(case: ContextCase, t: Tensors, sides: Sides) -> None:
    """Checks the root mean square error of z and of the gradient of x.

    The gradient passes through a batch norm over as many values as images, which magnifies rounding.
    """

    def maps(results: Sequence[Tensor]) -> list[Tensor]:
        count = (len(results) - len(PARAMETERS)) // 2
        zs, gradients = list(results[:count]), list(results[count : 2 * count])
        return [torch.cat(zs, 1).double(), torch.cat(gradients, 1).double()]

    ours, theirs, modules, exact = (maps(side()) for side in sides)
    for found in (ours, theirs):
        for given, own, right, unit in zip(found, modules, exact, (1e-6, 1e-4), strict=True):
            error, its = (((m - right).square().mean() / right.square().mean()).sqrt().item() for m in (given, own))
            allowed = 2 * its + (unit if torch.float32 == DTYPE else 1e-2)
            assert error <= allowed, f"{case}: {error:.1e} off, the modules' {its:.1e}"


adaptive_context_norm = Operation(
    name="adaptive_context_norm",
    # A batch norm in training needs two images: of one the pooled vectors have no variance.
    cases=CONTEXTS["cases"],
    small=CONTEXTS["small"],
    scaling=[point for point in CONTEXTS["scaling"] if point.case.batch > 1],
    draw=lambda case, layout: draw_norm(case, layout, DTYPE, DEVICE),
    ready=_norm_ready,
    ours=apc_kernels.adaptive_context_norm,
    others={
        "PyTorch modules": stock.adaptive_context_norm,
        "identities in PyTorch": stock.adaptive_context_norm_by_identities,
    },
    counts=lambda case, t, back: (9 * t["x"].nbytes, 12 * _product(case) + _square(case)),
    check=_check_norm,
    directions=("training step",),
    kernel="adaptive_context",
)

# encode, in maps of x: forward 1 (x read); backward 2 (x read, its gradient written). The residuals that others write
# out are as many maps as there are codewords. In products with the codewords: forward 2 (distances, sums), backward 3.

CODE = here(head_cases.ENCODER, replace(head_cases.ENCODER, batch=8))

encode = Operation(
    name="encode",
    cases=[CODE],
    small=head_cases.CodeCase(2, 8, (6, 6), 3),
    draw=lambda case, layout: head_cases.draw_code(case, layout, DTYPE, DEVICE),
    ready=calls(lambda function, case, t, *leaves: function(*leaves)),
    ours=apc_kernels.encode,
    others={"residuals written out": stock.encode},
    counts=lambda case, t, back: (
        (3 if back else 1) * t["x"].nbytes,
        (5 if back else 2) * 2 * t["x"].numel() * case.codewords,
    ),
    scaling=points(CODE, batch=BATCHES, size=SIDES, channels=CHANNELS, codewords=(8, 16, 32, 64), threads=THREADS),
    by_default=fastest_only,
)

# pyramid_conv: PSPNet's bottleneck, a convolution of features and upsampled regions, beside the convolution of what is
# concatenated, which has twice the operations for 2048 channels of features and four scales of 512. Counted are those
# of the features' convolution, three times with the backward pass; pyramid_conv adds J/(h·w), about 1 %, and the
# interpolation of 36 rows and columns. Bytes: features, regions and weight read, the result written; backward once more
# each way.

FEATURES = 2048
PYRAMID = here(head_cases.BOTTLENECK, replace(head_cases.BOTTLENECK, batch=8))


def _bottleneck(x: Tensor, regions: Tensor, weight: Tensor, scales: Sequence[int]) -> Tensor:
    return apc_kernels.pyramid_conv(regions, weight, x.shape[2:], scales, features=x)


def _of_convolution(products: int, t: Tensors, backward: bool) -> tuple[int, int]:
    """Counts each tensor and product once, or three times with the backward pass."""
    return (3 if backward else 1) * sum(x.nbytes for x in t.values()), (3 if backward else 1) * products


pyramid_conv = Operation(
    name="pyramid_conv",
    cases=[PYRAMID],
    small=head_cases.ConvCase(2, 4, 4, (6, 6), 3),
    draw=lambda case, layout: head_cases.draw_bottleneck(case, layout, DTYPE, DEVICE, FEATURES),
    ready=calls(lambda function, case, t, *leaves: function(*leaves, case.scales)),
    ours=_bottleneck,
    others={"conv of the concatenation": stock.pyramid_bottleneck},
    counts=lambda case, t, back: _of_convolution(2 * case.kernel**2 * FEATURES * t["grad"].numel(), t, back),
    title=lambda case: f"{FEATURES}+{len(case.scales)}*{case}",
    scaling=points(PYRAMID, batch=BATCHES[:3], size=SIDES, channels=CHANNELS[:3], scales=COUNTS, threads=THREADS),
    by_default=fastest_only,
    kept=True,
    rounds=5,
)

# pyramid_reduce, forward and backward in training: regions and weights read and the result written, then all of it once
# more, and the gradients written. The products take two operations each, three times with the backward pass.

REDUCED = here(replace(head_cases.POOLED, batch=2), head_cases.POOLED)


def _reduce_ready(function: Callable, case: head_cases.ReduceCase, t: Tensors, backward: bool) -> Call:
    names = ("weights", "gammas", "betas")
    weights, gammas, betas = ([x.detach().requires_grad_(backward) for x in t[name]] for name in names)
    regions = t["regions"].detach().requires_grad_(backward)
    running = zip(*([x.clone() for x in t[name]] for name in ("means", "variances")), strict=True)
    norms = [BatchNorm(g, b, *r) for g, b, r in zip(gammas, betas, running, strict=True)]

    def run() -> list[Tensor]:
        result = function(regions, weights, norms, case.scales, training=True)
        if not backward:
            return [result]
        return [result.detach(), *torch.autograd.grad(result, [regions, *weights, *gammas, *betas], t["grad"])]

    return run


pyramid_reduce = Operation(
    name="pyramid_reduce",
    cases=[REDUCED],
    small=head_cases.REDUCTION,
    draw=lambda case, layout: head_cases.draw_reduction(case, DTYPE, DEVICE),
    ready=_reduce_ready,
    ours=apc_kernels.pyramid_reduce,
    others={"convolutions, batch norms and ReLUs": stock.pyramid_reduce},
    counts=lambda case, t, back: (
        (3 if back else 1) * (t["regions"].nbytes + t["weights"].nbytes + t["grad"].nbytes),
        (3 if back else 1) * 2 * case.channels * t["grad"].numel(),
    ),
    by_layout=False,
)

# conv3x3, on the bottlenecks of the heads; on a GPU it is PyTorch's convolution. Operations by tiles, 2·4·O·C for each
# position (2·9·O·C directly), three times as many with the backward pass; transforms take 4 for each number of the maps
# and of the result. Bytes: maps and weight read, the result written; backward both once more. By tiles four times the
# maps and the result are written and read again, block by block, and the weight 16/9 times.


def _check_conv(case: head_cases.MapsCase, t: Tensors, sides: Sides) -> None:
    """Compares with PyTorch alone; the tests compare both with float64, which takes minutes on these sizes."""
    for actual, own in zip(sides.ours(), sides.stock(), strict=True):
        assert (actual - own).abs().max() <= 1e-5 * own.abs().max(), f"{case}: not what PyTorch computes"


conv3x3 = Operation(
    name="conv3x3",
    cases=head_cases.SIDE_BY_SIDE,
    small=head_cases.SIDE_BY_SIDE[3],
    draw=lambda case, layout: head_cases.draw_maps(case),
    ready=calls(lambda function, case, t, *leaves: function(leaves[:-1], leaves[-1])),
    ours=apc_kernels.conv3x3,
    others={"F.conv2d": stock.conv3x3},
    counts=lambda case, t, back: _of_convolution(8 * sum(case.channels) * t["grad"].numel(), t, back),
    check=_check_conv,
    kernel="conv3x3",
    on_gpu=False,
    by_layout=False,
    dtype=torch.float32,
    scaling=[
        *points(head_cases.MapsCase(2, (512,), 512), batch=BATCHES[:3], size=SIDES, threads=THREADS),
        *(Point("channels", n, head_cases.MapsCase(2, (n,), 512)) for n in CHANNELS),
    ],
    by_default=lambda case, layout, direction: case is not head_cases.SIDE_BY_SIDE[-1],
    rounds=3,
)

# conv1x1, on APCNet's reduction and a block of the ResNet, in channels_last; three times as many operations and bytes
# with the backward pass.
conv1x1 = Operation(
    name="conv1x1",
    cases=head_cases.PRODUCTS,
    small=head_cases.PRODUCTS[1],
    draw=lambda case, layout: head_cases.draw_products(case),
    ready=calls(lambda function, case, t, *leaves: function(leaves[:-1], leaves[-1])),
    ours=apc_kernels.conv1x1,
    others={"F.conv2d": stock.conv1x1},
    counts=lambda case, t, back: _of_convolution(2 * sum(case.channels) * t["grad"].numel(), t, back),
    check=_check_conv,
    kernel="conv1x1",
    on_gpu=False,
    by_layout=False,
    dtype=torch.float32,
    rounds=5,
)

# augment, on one thread and in processor time, as a loader's worker runs it: workers share their cores. A call takes
# the next seed, whose draws decide what is done, the same on both sides; JPEGs are decoded by Pillow on both. Bytes:
# those of the crop, 3 a pixel at ratio 1, and the result's, 12 a pixel.

SEEDS = 100


def _draw_sample(case: SampleCase, layout: Callable) -> dict:
    folder = tempfile.TemporaryDirectory()  # is there as long as what is drawn
    return {"sample": draw_sample(case, Path(folder.name)), "folder": folder}


def _sample_ready(function: Callable, case: SampleCase, t: dict, backward: bool) -> Call:
    seeds, file = itertools.cycle(range(SEEDS)), Path(t["folder"].name) / "scene.jpg"

    def run() -> tuple[Tensor, Tensor]:
        sample = t["sample"]._replace(image=read_image(file)) if case.jpeg else t["sample"]
        return function(sample, torch.Generator().manual_seed(next(seeds)), case.crop, case.scale)

    return run


def _check_samples(case: SampleCase, t: dict, sides: Sides) -> None:
    """Compares with the reference bit by bit, or with OpenCV up to what one level becomes in HSV, of 180 hues."""
    for _ in range(8):
        (image, mask), (other, its_mask) = sides.ours(), sides.theirs()
        same = 57 * (image - other).abs().mean() < 0.5 if cv2 else torch.equal(image, other)
        assert same and torch.equal(mask, its_mask), f"{case}: not what the other side computes"


def _augment_in_pytorch(*arguments) -> tuple[Tensor, Tensor]:
    with apc_kernels.backend("reference"):
        return augment.train(*arguments)


augmentation = Operation(
    name="augment",
    cases=[
        SampleCase((1024, 2048), (512, 1024), (2048, 1024)),
        SampleCase((512, 683), (512, 512), (2048, 512), jpeg=True),
    ],
    small=SampleCase((64, 96), (32, 32), (96, 64)),
    draw=_draw_sample,
    ready=_sample_ready,
    ours=augment.train,
    others={"OpenCV, whole images": in_opencv} if cv2 else {"the reference in PyTorch": _augment_in_pytorch},
    counts=lambda case, t, back: (15 * case.crop[0] * case.crop[1], 0),
    check=_check_samples,
    directions=("",),
    kernel="augment",
    on_gpu=False,
    by_layout=False,
    dtype=None,
    memory=False,
    rounds=SEEDS,
    threads=1,
    clock=time.process_time,
)

TABLE = (
    adaptive_context,
    adaptive_context_norm,
    affinity_moments,
    augmentation,
    conv1x1,
    conv3x3,
    encode,
    pyramid_conv,
)
TABLE += (pyramid_pool, pyramid_reduce, *UPSAMPLES)
OPERATIONS = {operation.name: rehearsed(operation) if REHEARSAL else operation for operation in TABLE}
