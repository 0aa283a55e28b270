"""What is measured of every operation: its cases, what stands beside it, the bytes and operations that it needs.

An entry an operation, listed at the end; run.py measures them. The other sides are what the tests compare with
(stock.py in tests/support), and the cases are the tests' large ones. Bytes are those that a perfect kernel moves: every
map read or written as often as it has to be. Operations are additions and multiplications.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import head_cases
import stock
import torch
import torch.nn.functional as F
from augment_cases import SampleCase, cv2, draw_sample, in_opencv
from cases import LARGE_MAPS, ContextCase, MapCase, draw, draw_context, draw_norm
from torch import Tensor
from upsample_cases import LARGE_UPSAMPLES, UpsampleCase, assert_labels, draw_upsample

import apc_kernels
from apc_kernels import BatchNorm
from apcnet.data import augment
from apcnet.data.files import read_image
from benchmarks.operation import BOTH, FORWARD, SCALES, Call, Operation, Point, Sides, Tensors, calls, points
from benchmarks.setting import DEVICE, DTYPE, LAYOUTS, ON_GPU, USUAL, here

# Along which a case is scaled, one at a time:
BATCHES = here((1, 2, 4, 8), (1, 4, 8, 16), (2,))
SIDES = here((32, 64, 96, 128), (32, 64, 128), ())
CHANNELS = here((128, 256, 512, 1024), (128, 256, 512, 1024), ())
COUNTS = here((1, 2, 3, 4), (1, 2, 3, 4), ())  # of scales
THREADS = () if ON_GPU else tuple(2**i for i in range((os.cpu_count() or 1).bit_length()))  # up to the cores there are


def usual_layout(case: object, layout: str, direction: str) -> bool:
    return LAYOUTS[layout] is USUAL


# pyramid_pool: x read and the result written; backward as many bytes, the other way. An addition for each element of x,
# each way: the sums of segments, which are few, are added up once more.

POOLED = here((2, 2048, 64, 64), (8, 2048, 64, 64), (1, 6, 9, 7))


pyramid_pool = Operation(
    name="pyramid_pool",
    cases=here(LARGE_MAPS, [MapCase(POOLED), *LARGE_MAPS], [MapCase(POOLED)]),
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

CONTEXT = here(ContextCase(2, 512, (64, 64)), ContextCase(8, 512, (64, 64)), ContextCase(2, 16, (5, 7)))
CONTEXTS = {
    "cases": [CONTEXT],
    "small": ContextCase(2, 16, (5, 7)),
    "scaling": points(CONTEXT, batch=BATCHES, size=SIDES, channels=CHANNELS, scales=COUNTS, threads=THREADS),
}


def _product(case: ContextCase) -> int:
    """Operations of the product of all positions with the rows of all scales."""
    return 2 * case.batch * case.size[0] * case.size[1] * sum(s * s for s in case.scales) * case.channels


def _draw_context(case: ContextCase, layout: Callable) -> Tensors:
    """Rounding decides which way the ReLU goes near its kink: the gradient is 0 there."""
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
    """Operations of the product of the affinities with themselves, scale by scale."""
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
    """A call gives maps, their gradients, and those of the parameters.

    The others take the scales' maps one by one: their own, for slicing would cost copies.
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
    """By the root mean square of z and of the gradient of x.

    That passes through a batch norm over as many values as images, which magnifies rounding.
    """

    def maps(results: list[Tensor]) -> list[Tensor]:
        count = (len(results) - len(PARAMETERS)) // 2
        return [torch.cat(results[:count], 1).double(), torch.cat(results[count : 2 * count], 1).double()]

    ours, theirs, modules, exact = (maps(side()) for side in sides)
    for found in (ours, theirs):
        for given, own, right, unit in zip(found, modules, exact, (1e-6, 1e-4), strict=True):
            error, its = (((m - right).square().mean() / right.square().mean()).sqrt().item() for m in (given, own))
            allowed = 2 * its + (unit if torch.float32 == DTYPE else 1e-2)
            assert error <= allowed, f"{case}: {error:.1e} off, the modules' {its:.1e}"


adaptive_context_norm = Operation(
    name="adaptive_context_norm",
    # A batch norm in training needs two images: of one the pooled vectors have no variance.
    **CONTEXTS | {"scaling": [point for point in CONTEXTS["scaling"] if point.case.batch > 1]},
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

CODE = here(head_cases.ENCODER, replace(head_cases.ENCODER, batch=8), head_cases.CodeCase(2, 8, (6, 6), 3))
CODEWORDS = here((8, 16, 32, 64), (8, 16, 32, 64), ())


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
    scaling=points(CODE, batch=BATCHES, size=SIDES, channels=CHANNELS, codewords=CODEWORDS, threads=THREADS),
    telling=usual_layout,
)

# pyramid_conv: PSPNet's bottleneck, conv(features) + pyramid_conv(regions), beside the convolution of what is
# concatenated, which has twice the operations for 2048 channels of features and four scales of 512. Counted are those
# of the features' convolution, three times with the backward pass; pyramid_conv adds J/(h·w), about 1 %, and the
# interpolation of 36 rows and columns. Bytes: features, regions and weight read, the result written; backward once more
# each way.

FEATURES = here(2048, 2048, 16)
PYRAMID = here(head_cases.BOTTLENECK, replace(head_cases.BOTTLENECK, batch=8), head_cases.ConvCase(2, 4, 4, (6, 6), 3))


def _bottleneck(x: Tensor, regions: Tensor, weight: Tensor, scales: Sequence[int]) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last)
    own, pyramids = weight[:, :FEATURES], weight[:, FEATURES:]
    how = torch.channels_last if last else torch.contiguous_format
    pyramid = apc_kernels.pyramid_conv(regions, pyramids, x.shape[2:], scales, memory_format=how)
    return F.conv2d(x, own, padding=weight.shape[2] // 2) + pyramid


def _of_convolution(products: int, t: Tensors, backward: bool) -> tuple[int, int]:
    """Everything read or written, once and with the backward pass three times, as are the products."""
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
    telling=usual_layout,
    kept=True,
    rounds=5,
)

# conv3x3, on the bottlenecks of the heads; on a GPU it is PyTorch's convolution. Operations by tiles, 2·4·O·C for each
# position (2·9·O·C directly), three times as many with the backward pass; transforms take 4 for each number of the maps
# and of the result. Bytes: maps and weight read, the result written; backward both once more. By tiles four times the
# maps and the result are written and read again, block by block, and the weight 16/9 times.


def _check_conv(case: head_cases.MapsCase, t: Tensors, sides: Sides) -> None:
    """Beside PyTorch alone: tests hold both to float64, which takes minutes here."""
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
    telling=lambda case, layout, direction: case is not head_cases.SIDE_BY_SIDE[-1],
    rounds=3,
)

# upsample_*: the logits are read, the labels read (int64) or written (uint8), the probabilities read and written; the
# loss writes one float for each pixel, and its backward reads logits, labels and those floats and writes the gradient.
# PyTorch moves the upsampled logits, K floats for each pixel, several times on top. Operations, for each pixel and
# class, an exponential counted as one: 2 of the interpolation, and then 3 of the loss, 1 of the argmax, 4 of the
# softmax; the loss's backward has its 5 again, and 4 more to give the result to source pixels.

LOGITS = here(
    LARGE_UPSAMPLES,
    [UpsampleCase(8, 150, (64, 64), (512, 512)), *LARGE_UPSAMPLES],
    [UpsampleCase(1, 5, (4, 5), (9, 12))],
)
CLASSES, GRIDS = here((19, 60, 150), (19, 60, 150), ()), here((32, 64, 96), (32, 64, 128), ())


def upsample(name: str, other: str, apply: Callable, bytes_a_pixel: Callable, operations: int, **more) -> Operation:
    """An entry, from the bytes of a pixel beside its logits, and the operations of a pixel and class."""

    def draw(case: UpsampleCase, layout: Callable) -> Tensors:
        t = draw_upsample(case, layout, DTYPE, DEVICE)
        if name == "upsample_softmax":
            t["out"] = torch.zeros(case.batch, case.classes, *case.size, device=DEVICE)
        return {key: t[key] for key in ("logits", "target", "out") if key in t}

    def counts(case: UpsampleCase, t: Tensors, backward: bool) -> tuple[int, int]:
        pixels = case.batch * case.size[0] * case.size[1]
        moved = (1 + 2 * backward) * t["logits"].nbytes + (1 + backward) * bytes_a_pixel(case) * pixels
        return moved, (operations + 9 * backward) * case.classes * pixels

    def telling(case: UpsampleCase, layout: str, direction: str) -> bool:
        """Of the first case everything, of the others what goals name."""
        named = not ON_GPU and (direction == BOTH or name == "upsample_argmax")
        return usual_layout(case, layout, direction) and (case is LOGITS[0] or named)

    return Operation(
        name=name,
        cases=LOGITS,
        small=UpsampleCase(1, 5, (4, 5), (9, 12)),
        draw=draw,
        ready=calls(apply, "logits"),
        ours=getattr(apc_kernels, name),
        others={other: getattr(stock, name)},
        counts=counts,
        kernel=name,
        gpu_backends=("triton",),
        telling=telling,
        **{"directions": ("",)} | more,
    )


def _check_argmax(case: UpsampleCase, t: Tensors, sides: Sides) -> None:
    assert_labels(*sides.ours(), t["logits"], case)


def _check_confusion(case: UpsampleCase, t: Tensors, sides: Sides) -> None:
    labels = apc_kernels.upsample_argmax(t["logits"], case.size)
    assert torch.equal(*sides.ours(), stock.confusion(labels, t["target"], case.classes))


UPSAMPLES = (
    upsample(
        "upsample_cross_entropy",
        "F.interpolate, F.cross_entropy",
        lambda function, case, t, logits: function(logits, t["target"]),
        bytes_a_pixel=lambda case: 8 + 4,
        operations=5,
        directions=(FORWARD, BOTH),
        scaling=[
            *points(LOGITS[0], batch=BATCHES[:3], classes=CLASSES, threads=THREADS),
            *(Point("size", n, replace(LOGITS[0], source=(n, n), size=(8 * n, 8 * n))) for n in GRIDS),
        ],
    ),
    upsample(
        "upsample_argmax",
        "F.interpolate, argmax",
        lambda function, case, t, logits: function(logits, case.size),
        bytes_a_pixel=lambda case: 1,
        operations=3,
        check=_check_argmax,
    ),
    upsample(
        "upsample_confusion",
        "F.interpolate, argmax, bincount",
        lambda function, case, t, logits: function(logits, t["target"]),
        bytes_a_pixel=lambda case: 8,
        operations=3,
        check=_check_confusion,
    ),
    upsample(
        "upsample_softmax",
        "F.interpolate, softmax, add_",
        lambda function, case, t, logits: function(logits, case.size, out=t["out"]),
        bytes_a_pixel=lambda case: 2 * 4 * case.classes,
        operations=6,
    ),
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
    """The reference's bits; OpenCV's but for what resizes that are one level apart become in HSV, of 180 hues."""
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

OPERATIONS = {
    operation.name: operation
    for operation in (
        *(adaptive_context, adaptive_context_norm, affinity_moments, augmentation, conv3x3, encode, pyramid_conv),
        *(pyramid_pool, *UPSAMPLES),
    )
}
