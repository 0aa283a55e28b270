"""Compiles Triton kernels for a GPU that is not present, and prints their needs: triton_gate.py sm_90 FAMILY ...

A process of its own: kernels that were decorated for the interpreter cannot be compiled. A family's launches are
taken as they are, on meta tensors, so that what is compiled here is what runs there.
"""

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
from apc_kernels.ops.affinities import triton_moments as moments_kernels
from apc_kernels.ops.pyramid_pool import triton as pool_kernels
from apc_kernels.ops.upsample import triton as upsample_kernels
from apc_kernels.ops.upsample import triton_backward as upsample_backward

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


def contexts() -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], dict[str, torch.Tensor]]]:
    for shape, scales, dtype, channels_last in CONTEXTS:
        x, rows, channels = meta(*shape, dtype=dtype, channels_last=channels_last), sum(s * s for s in scales), shape[1]
        x = x[..., : shape[3] // 32 * 32 + 1] if shape[3] % 32 else x
        sizes = {
            "regions": (shape[0], rows, channels // len(scales)),
            "weight": (rows, channels // len(scales)),
            "bias": (shape[0], rows),
            "shift": (shape[0], channels),
            "pairs": (shape[0], sum(s**4 for s in scales)),
        }
        name = f"{'NHWC' if channels_last else 'NCHW'} {'x'.join(map(str, shape))} {str(dtype)[6:]}"
        yield name, x, scales, {name: meta(*size, dtype=torch.float32) for name, size in sizes.items()}


def affinities() -> Iterator[tuple[str, list]]:
    """Yields the launches of everything as in training, of the gradient of the moments alone, and of the moments."""
    for name, x, scales, small in contexts():
        regions, weight, bias, shift, pairs = small.values()
        center = linear = bias
        yield name, contexts_kernels.context_launches(x, regions, weight, bias, scales, shift, True, center, x)
        yield name, contexts_backward.regions_launches(x, x, regions, weight, bias, scales, shift, center)
        arguments = (x, x, regions, weight, bias, scales, shift, True, center, linear, pairs, shift, x)
        yield name, contexts_backward.map_launches(*arguments)
        arguments = (None, x, None, weight, bias, scales, None, False, center, linear, pairs, None, x)
        yield f"moments {name}", contexts_backward.map_launches(*arguments)
        yield name, moments_kernels.launches(x, weight, bias, scales, bias.double(), pairs.double())


UPSAMPLES = [  # logits of upsample_*, size, align_corners, target's dtype, class weights, smoothing
    ((8, 150, 64, 64), (512, 512), False, torch.bfloat16, True, torch.uint8, False, 0.0),
    ((8, 150, 64, 64), (512, 512), False, torch.float16, False, torch.int64, True, 0.1),
    ((8, 150, 64, 64), (512, 512), False, torch.float32, True, torch.int64, False, 0.1),
    ((2, 19, 128, 256), (1024, 2048), False, torch.float32, False, torch.uint8, True, 0.0),
    ((1, 21, 65, 97), (513, 771), True, torch.bfloat16, True, torch.int32, True, 0.1),
    ((8, 150, 128, 128), (512, 512), False, torch.bfloat16, True, torch.int64, False, 0.1),
    ((2, 19, 128, 256), (128, 256), False, torch.bfloat16, False, torch.int16, False, 0.0),
]


def upsample() -> Iterator[tuple[str, list]]:
    """Yields the launches: gradients of each pixel's loss with smoothing, or of the sum; flipped probabilities."""
    for shape, size, align_corners, dtype, channels_last, labels, weighted, smoothing in UPSAMPLES:
        name = f"{'NHWC' if channels_last else 'NCHW'} {'x'.join(map(str, shape))} {str(dtype)[6:]}"
        name += f" to {'x'.join(map(str, size))}"
        logits = meta(*shape, dtype=dtype, channels_last=channels_last)
        out = meta(*shape[:2], *size, dtype=torch.float32, channels_last=channels_last)
        target, normalizer = (meta(shape[0], *size, dtype=dtype) for dtype in (labels, torch.float32))
        weight = meta(shape[1], dtype=torch.float32) if weighted else None
        settings = (weight, 255, smoothing, 0.0, align_corners)
        parts = meta(upsample_kernels.programs(logits, size), 4, dtype=torch.float64)
        losses = normalizer if smoothing else None
        counts, invalid = (meta(*n, dtype=torch.int64) for n in (shape[1:2] * 2, (1,)))
        yield name, upsample_kernels.cross_entropy_launches(logits, target, *settings, normalizer, losses, parts)
        grad = normalizer if smoothing else meta(1, dtype=torch.float32)
        yield name, upsample_backward.backward_launches(grad, logits, target, *settings, normalizer, logits)
        if not smoothing:
            settings = (weight, 255, 0.0, 2.0, align_corners)
            arguments = (logits, target, *settings, normalizer)
            yield f"focal {name}", upsample_kernels.cross_entropy_launches(*arguments, losses, parts)
            yield f"focal {name}", upsample_backward.backward_launches(grad, *arguments, logits)[:1]
        yield (
            name,
            upsample_kernels.argmax_launches(logits, size, align_corners, meta(*target.shape, dtype=torch.uint8)),
        )
        yield name, upsample_kernels.confusion_launches(logits, target, 255, align_corners, counts, invalid)
        yield name, upsample_kernels.softmax_launches(logits, bool(smoothing), align_corners, bool(smoothing), out)


FAMILIES = {"pyramid_pool": pyramid_pool, "affinities": affinities, "upsample": upsample}


def source(kernel, arguments: dict) -> ASTSource:
    """Returns the kernel with its arguments' types and the facts that Triton's launcher would specialise on."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(value, tuple):
            kind = _kind(value, (index,), parameter.is_constexpr, constants, attributes)
        else:
            kind = tuple(_kind(v, (index, place), False, constants, attributes) for place, v in enumerate(value))
        signature[parameter.name] = kind
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def _kind(value, path: tuple[int, ...], is_constexpr: bool, constants: dict, attributes: dict) -> str:
    """Returns the type of an argument, or of the part of a tuple at `path`."""
    if is_constexpr or value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else _integer(value)


def usage(cubin: bytes) -> dict[str, int]:
    """Returns the registers and the stack (where spilled registers go) of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", text)}


def compile_all(family: str, capability: int) -> Iterator[dict]:
    for case, launches in FAMILIES[family]():
        for kernel, _, arguments in launches:
            options = {key: arguments[key] for key in ("num_warps", "num_stages") if key in arguments}
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source(kernel, arguments), target=target, options=options)
            yield {
                "kernel": f"{kernel.fn.__name__} {case} sm_{capability}",
                "shared": compiled.metadata.shared,
                **usage(compiled.asm["cubin"]),
            }


def _integer(value: int) -> str:
    return "i32" if value < 2**31 else "i64"


if __name__ == "__main__":
    capability = int(sys.argv[1].removeprefix("sm_"))
    json.dump([kernel for family in sys.argv[2:] for kernel in compile_all(family, capability)], sys.stdout)
