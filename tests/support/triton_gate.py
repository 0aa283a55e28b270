"""Compiles Triton kernels for GPUs that are not present: triton_gate.py sm_90|gfx942 [--first] FAMILY ...

It prints registers and spills, of the first case of each family or of all. A process of its own: kernels that were
decorated for the interpreter cannot be compiled. A family's launches are taken as they are, on meta tensors, so that
what is compiled here is what runs there.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from apc_kernels.ops.affinities import triton as contexts_kernels
from apc_kernels.ops.affinities import triton_backward as contexts_backward
from apc_kernels.ops.affinities import triton_guide_backward as guide_backward
from apc_kernels.ops.affinities import triton_moments as moments_kernels
from apc_kernels.ops.affinities import triton_phases as phases_kernels
from apc_kernels.ops.affinities import triton_product_backward as product_backward
from apc_kernels.ops.encode import triton as encode_kernels
from apc_kernels.ops.pyramid_pool import triton as pool_kernels
from apc_kernels.ops.upsample import triton as upsample_kernels
from apc_kernels.ops.upsample import triton_cross_entropy as loss_kernels
from apc_kernels.ops.upsample import triton_cross_entropy_backward as loss_backward
from apc_kernels.ops.upsample import triton_labels as upsample_labels
from apc_kernels.ops.upsample import triton_regions as upsample_regions
from apc_kernels.ops.upsample import triton_relative as relative_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
TYPES |= {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}


def meta(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if channels_last else tensor


def pyramid_pool() -> Iterator[tuple[str, list]]:
    aligned, odd = (8, 2048, 64, 64), (2, 19, 65, 97)
    cases = [(aligned, dtype, channels_last) for dtype in DTYPES for channels_last in (True, False)]
    for shape, dtype, channels_last in [*cases, (odd, torch.bfloat16, True)]:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        pooled = meta(*shape[:2], 50, dtype=dtype)
        name = f"{'NHWC' if channels_last else 'NCHW'} {'x'.join(map(str, shape))} {str(dtype)[6:]}"
        yield name, pool_kernels.forward_launches(x, (1, 2, 3, 6), pooled)
        yield name, pool_kernels.backward_launches(pooled, (1, 2, 3, 6), x)


CONTEXTS = [  # maps of adaptive_context and affinity_moments, and their scales; the last is a window
    ((8, 4 * 512, 64, 64), (1, 2, 3, 6), torch.bfloat16, True),
    ((8, 4 * 512, 64, 64), (1, 2, 3, 6), torch.float16, False),
    ((8, 4 * 512, 64, 64), (1, 2, 3, 6), torch.float32, True),
    ((2, 3 * 19, 65, 98), (1, 5, 8), torch.float32, False),
]


def contexts() -> Iterator[tuple[str, torch.Tensor, tuple[int, ...]]]:
    for shape, scales, dtype, channels_last in CONTEXTS:
        x = meta(*shape, dtype=dtype, channels_last=channels_last)
        x = x[..., : shape[3] // 32 * 32 + 1] if shape[3] % 32 else x
        yield f"{'NHWC' if channels_last else 'NCHW'} {'x'.join(map(str, shape))} {str(dtype)[6:]}", x, scales


def affinity_launches(x: torch.Tensor, scales: tuple[int, ...]) -> Iterator[tuple]:
    """Yields the launches of everything as in training, and of the moments."""
    small = _small(x, scales)
    regions, weight, bias, shift, pairs = small
    center = linear = bias
    yield from contexts_kernels.context_launches(x, regions, weight, bias, scales, shift, True, center, x)
    yield from contexts_backward.regions_launches(x, x, regions, weight, bias, scales, shift, center)
    arguments = (x, x, regions, weight, bias, scales, shift, True, center, linear, pairs, shift, x)
    yield from contexts_backward.map_launches(*arguments)
    yield from moments_kernels.launches(x, weight, bias, scales, bias.double(), pairs.double())


def _small(x: torch.Tensor, scales: tuple[int, ...]) -> list[torch.Tensor]:
    """Returns regions, weight, bias, shift and pairs for this map."""
    (batch, channels), rows = x.shape[:2], sum(s * s for s in scales)
    sizes = [(batch, rows, channels // len(scales)), (rows, channels // len(scales)), (batch, rows)]
    sizes += [(batch, channels), (batch, sum(s**4 for s in scales))]
    return [meta(*size, dtype=torch.float32) for size in sizes]


def affinities() -> Iterator[tuple[str, list]]:
    """Yields the launches as in training, and those of the gradient of the moments alone."""
    for name, x, scales in contexts():
        yield name, list(affinity_launches(x, scales))
        _, weight, bias, _, pairs = _small(x, scales)
        arguments = (None, x, None, weight, bias, scales, None, False, bias, bias, pairs, None, x)
        yield f"moments {name}", contexts_backward.map_launches(*arguments)
    yield from phases()


def phases() -> Iterator[tuple[str, list]]:
    """Yields the launches between those on maps, whose small tensors are float32 beside every map."""
    for (batch, stacked, height, width), scales in (((8, 4 * 512, 64, 64), (1, 2, 3, 6)), ((2, 57, 65, 98), (1, 5, 8))):
        rows, channels, n = sum(s * s for s in scales), stacked // len(scales), height * width
        regions, weight, square, of_images, of_rows, numbers, pairs = (
            meta(*size, dtype=torch.float32)
            for size in (
                (batch, rows, channels),
                (rows, channels),
                (stacked, channels),
                (batch, stacked),
                (batch, rows),
                (stacked,),
                (batch, sum(s**4 for s in scales)),
            )
        )
        vectors, statistics, wide = regions.double(), meta(2, stacked, dtype=torch.float64), of_images.double()
        mean, covariance, norm, name = of_rows.double(), pairs.double(), (numbers, numbers, 1e-5), f"{rows} regions"
        k, grads = phases_kernels, (regions, of_images, vectors, statistics)
        yield name, k.guide_statistics_launches(of_images, square, scales, wide, statistics)
        yield name, k.guide_biases_launches(wide, statistics, *norm, weight, of_rows, scales, of_rows)
        yield name, k.project_launches(regions, square, scales, vectors)
        yield name, k.product_statistics_launches(vectors, mean, covariance, weight, scales, statistics)
        rest = (weight, scales, regions, of_images, of_rows)
        yield name, k.product_norm_launches(vectors, statistics, *norm, mean, *rest)
        rest = (mean, weight, scales, statistics, *norm[:2])
        yield name, product_backward.product_norm_sums_launches(*grads, *norm[1:], *rest)
        rest = (mean, covariance, regions, square, n, scales, regions, square, of_rows, pairs)
        yield name, product_backward.product_norm_gradients_launches(*grads, statistics, *norm[1:], *rest)
        of_bias, rest = (of_rows, of_rows, pairs, of_rows, pairs), (wide, statistics, weight, *norm[:2])
        yield name, guide_backward.guide_sums_launches(*of_bias, wide, statistics, *norm, weight, scales, *rest)
        rest = (of_images, square, n, scales, of_images, square)
        yield name, guide_backward.guide_gradients_launches(wide, wide, statistics, statistics, *norm[1:], *rest)


UPSAMPLES = [  # logits of upsample_*, size, align_corners, target's dtype, class weights, smoothing
    ((8, 150, 64, 64), (512, 512), False, torch.bfloat16, True, torch.uint8, False, 0.0),
    ((8, 150, 64, 64), (512, 512), False, torch.float16, False, torch.int64, True, 0.1),
    ((8, 150, 64, 64), (512, 512), False, torch.float32, True, torch.int64, False, 0.1),
    ((2, 19, 128, 256), (1024, 2048), False, torch.float32, False, torch.uint8, True, 0.0),
    ((1, 21, 65, 97), (513, 771), True, torch.bfloat16, True, torch.int32, True, 0.1),
    ((8, 150, 128, 128), (512, 512), False, torch.bfloat16, True, torch.int64, False, 0.1),
    ((2, 19, 128, 256), (128, 256), False, torch.bfloat16, False, torch.int16, False, 0.0),
]


def upsample_launches(
    logits: torch.Tensor,
    size: tuple[int, int],
    align_corners: bool = False,
    labels: torch.dtype = torch.int64,
    weighted: bool = False,
    smoothing: float = 0.0,
) -> Iterator[tuple]:
    """Yields the launches: gradients of each pixel's loss with smoothing, or of the sum; flipped probabilities."""
    batch, classes = logits.shape[:2]
    channels_last = logits.is_contiguous(memory_format=torch.channels_last)
    out = meta(batch, classes, *size, dtype=torch.float32, channels_last=channels_last)
    target, normalizer = (meta(batch, *size, dtype=dtype) for dtype in (labels, torch.float32))
    weight = meta(classes, dtype=torch.float32) if weighted else None
    settings = (weight, 255, smoothing, 0.0, align_corners)
    parts = meta(relative_kernels.loss_programs(logits, size), 4, dtype=torch.float64)
    losses = normalizer if smoothing else None
    counts, invalid = (meta(*n, dtype=torch.int64) for n in ((classes, classes), (1,)))
    yield from loss_kernels.cross_entropy_launches(logits, target, *settings, normalizer, losses, parts)
    grad = normalizer if smoothing else meta(1, dtype=torch.float32)
    backward = loss_backward.backward_launches(grad, logits, target, *settings, normalizer, logits)
    yield from backward[1:]  # the first is that of the forward
    found = meta(batch, *size, dtype=torch.uint8)
    yield from upsample_labels.argmax_launches(logits, size, align_corners, found)
    yield from upsample_labels.confusion_launches(logits, target, 255, align_corners, counts, invalid)
    yield from upsample_kernels.softmax_launches(logits, bool(smoothing), align_corners, bool(smoothing), out)
    yield from region_launches(logits, target, weight, False, align_corners)


def focal_launches(logits: torch.Tensor, target: torch.Tensor, align_corners: bool) -> Iterator[tuple]:
    normalizer, grad = meta(*target.shape, dtype=torch.float32), meta(1, dtype=torch.float32)
    parts = meta(relative_kernels.loss_programs(logits, target.shape[1:]), 4, dtype=torch.float64)
    arguments = (logits, target, None, 255, 0.0, 2.0, align_corners, normalizer)
    yield from loss_kernels.cross_entropy_launches(*arguments, None, parts)
    yield loss_backward.backward_launches(grad, *arguments, logits)[1]


def region_launches(logits, target, weight, sigmoid: bool, align_corners: bool) -> Iterator[tuple]:
    sums, wrong = upsample_regions.part_shapes(logits, target.shape[-2:], align_corners)
    settings = (logits, target, weight, 255, sigmoid, align_corners)
    parts = meta(*sums, dtype=torch.float32), meta(*wrong, dtype=torch.int32)
    yield from upsample_regions.sums_launches(*settings, *parts)
    grad = meta(4, *logits.shape[:2], dtype=torch.float32)
    yield from upsample_regions.gradient_launches(grad, *settings, logits)


def upsample() -> Iterator[tuple[str, list]]:
    for shape, size, align_corners, dtype, channels_last, labels, *rest in UPSAMPLES:
        name = f"{'NHWC' if channels_last else 'NCHW'} {'x'.join(map(str, shape))} {str(dtype)[6:]}"
        name += f" to {'x'.join(map(str, size))}"
        logits = meta(*shape, dtype=dtype, channels_last=channels_last)
        target, masks = meta(shape[0], *size, dtype=labels), meta(*shape[:2], *size, dtype=labels)
        yield name, list(upsample_launches(logits, size, align_corners, labels, *rest))
        if not rest[-1]:  # without smoothing
            yield f"focal {name}", list(focal_launches(logits, target, align_corners))
            yield f"sigmoid {name}", list(region_launches(logits, target, None, True, align_corners))
        else:
            yield f"masks {name}", list(region_launches(logits, masks, None, True, align_corners))


def encode() -> Iterator[tuple[str, list]]:
    for shape, words in (((8, 512, 64, 64), 32), ((2, 19, 65, 97), 64)):
        codewords, scale, grad = (
            meta(*size, dtype=torch.float32) for size in ((words, shape[1]), (words,), (shape[0], words, shape[1]))
        )
        weights = meta(shape[0], words, shape[2] * shape[3], dtype=torch.float32)
        for dtype in DTYPES:
            x = meta(*shape, dtype=dtype, channels_last=True)
            name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]}"
            yield name, encode_kernels.encode_launches(x, codewords, scale, weights, weights)
            yield name, encode_kernels.encode_backward_launches(grad, x, codewords, scale, weights, weights, x)


FAMILIES = {"pyramid_pool": pyramid_pool, "affinities": affinities, "encode": encode, "upsample": upsample}


def source(kernel, arguments: dict) -> ASTSource:
    """Returns the kernel with its arguments' types and the facts that Triton's launcher would specialise on."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(value, tuple):
            kind = _kind(value, (index,), parameter, constants, attributes)
        else:
            kind = tuple(_kind(v, (index, place), parameter, constants, attributes) for place, v in enumerate(value))
        signature[parameter.name] = kind
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def _kind(value, path: tuple[int, ...], parameter, constants: dict, attributes: dict) -> str:
    """Returns the type of an argument, or of the part of a tuple at `path`."""
    special = not parameter.do_not_specialize
    if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
        constants[path] = value
        return "constexpr"
    aligned = isinstance(value, torch.Tensor) or (special and value % 16 == 0)
    if aligned and not parameter.do_not_specialize_on_alignment:
        attributes[path] = [["tt.divisibility", 16]]
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else _integer(value)


def usage(assembly: dict) -> dict[str, int]:
    """Returns the registers and the stack (where spilled registers go) of a compiled kernel."""
    if "amdgcn" in assembly:
        counts = {name: int(n) for name, n in re.findall(r"\.(\w+_count):\s+(\d+)", assembly["amdgcn"])}
        # Scalar registers spill to lanes of vector registers, not to memory.
        return {"reg": counts["vgpr_count"], "stack": counts["vgpr_spill_count"]}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def compile_all(family: str, architecture: str, cases: int | None = None) -> Iterator[dict]:
    """Compiles the kernels of the first cases of a family, or of all."""
    target = GPUTarget("hip", architecture, 64)
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    for case, launches in itertools.islice(FAMILIES[family](), cases):
        for kernel, _, arguments in launches:
            options = {
                key: arguments[key]
                for key in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
                if key in arguments
            }
            compiled = triton.compile(source(kernel, arguments), target=target, options=options)
            yield {
                "kernel": f"{kernel.fn.__name__} {case} {architecture}",
                "shared": compiled.metadata.shared,
                **usage(compiled.asm),
            }


def _integer(value: int) -> str:
    return "i32" if value < 2**31 else "i64"


if __name__ == "__main__":
    architecture, *families = sys.argv[1:]
    given = (families[1:], 1) if families[0] == "--first" else (families, None)
    json.dump([kernel for family in given[0] for kernel in compile_all(family, architecture, given[1])], sys.stdout)
