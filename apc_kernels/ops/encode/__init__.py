"""Implements encode: EncNet's residual encoding, without the (B, N, K, C) tensor of residuals."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apc_kernels.dispatch import Kernels
from apc_kernels.ops.common import check_dtype, check_small, check_tensor
from apc_kernels.ops.encode import reference
from apc_kernels.ops.encode.reference import by_channel
from apc_kernels.ops.operator import define

MAX_GPU_WORDS = 64  # with more the reference serves


def _triton() -> ModuleType:
    from apc_kernels.ops.encode import triton

    return triton


KERNELS = Kernels(reference, triton=_triton)


def limits(arguments: tuple[Tensor, ...]) -> dict[str, str]:
    """Returns the reasons why GPU kernels cannot take a call, by backend."""
    count = arguments[-1].shape[0] if len(arguments) == 3 else arguments[3].shape[0]  # of scale
    if count <= MAX_GPU_WORDS:
        return {}
    return {"triton": f"the kernels take up to {MAX_GPU_WORDS} codewords, not {count}"}


def encode(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Sums, for every codeword, the softly assigned residuals of all positions.

        a[i, k] = softmax_k(scale[k] · ‖x[i] − codewords[k]‖²)
        out[k] = Σ_i a[i, k] · (x[i] − codewords[k])

    Equivalent to:

        residuals = x.flatten(2).mT[:, :, None] - codewords    # (B, N, K, C)
        a = (scale * residuals.square().sum(3)).softmax(2)    # (B, N, K)
        (a[..., None] * residuals).sum(1)

    The (B, N, K, C) tensor of residuals is never stored: the squares and sums are multiplied out into matrix products
    of x. Features and codewords are taken relative to the mean codeword, so that nothing cancels far from the origin.

    Args:
        x: (B, C, h, w) or (B, C, N), float32, bfloat16, float16 or float64, of any strides.
        codewords: (K, C), float32 (float64 if x is float64).
        scale: (K,), of the same dtype.

    Returns:
        (B, K, C) in the dtype of codewords.

    Saved for backward are x and two numbers for each position and codeword. The operation is differentiable once, with
    respect to all three tensors. It computes in float32 (float64), under autocast too: on a CPU in C++, and on a GPU,
    with up to 64 codewords, in a Triton kernel that reads a map in low precision as it is. With more than 80
    codewords the error of x's gradient can exceed the other operations' bound (twice PyTorch's own error and four units
    in the last place) by a fifth.
    """
    _check(x, codewords)
    codewords = check_small(codewords, "codewords", [(codewords.shape[0], x.shape[1])], x)
    scale = check_small(scale, "scale", [(codewords.shape[0],)], x)
    compute = reference.encode if torch.compiler.is_exporting() else _forward
    encoded, *_ = compute(x, codewords, scale)
    return encoded


def _compute(x: Tensor, codewords: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _filled("encode", x, (x, codewords, scale), _empty)


def _filled(name: str, x: Tensor, arguments: tuple[Any, ...], empty: Callable[..., tuple[Tensor, ...]]) -> Any:
    """Computes in the backend that serves x."""
    backend = KERNELS.select(name, x, limits(arguments))
    if backend == "reference" or not x.numel():
        return KERNELS.function("reference", name)(*arguments)
    results = empty(*arguments)
    given = [t if t is x else t.contiguous() for t in arguments]
    if backend == "cpp":
        first, *others = results  # the encoding, which lies in memory as (B, C, K), or the gradient of x
        given = [t.flatten(2) if t is x else t for t in given]
        KERNELS.function(backend, name)(*given, first.mT if name == "encode" else first.flatten(2), *others)
    else:
        KERNELS.function(backend, name)(*given, *results)
    return results


def _empty(x: Tensor, codewords: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, channels, *size), words = x.shape, codewords.shape[0]
    distances = codewords.new_empty(batch, words, math.prod(size))
    return codewords.new_empty(batch, channels, words).mT, distances, torch.empty_like(distances)


def _compute_gradients(grad: Tensor, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _filled("encode_backward", x, (grad, x, *others), _empty_gradients)


def _empty_gradients(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, *size = x.shape
    grad_x = x.new_empty(batch, math.prod(size), channels).mT if by_channel(x) else x.new_empty(*x.shape)
    return grad_x.view(x.shape), codewords.new_empty(codewords.shape), scale.new_empty(scale.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _through(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return (None,) * 3 if grad is None else _backward(grad, *ctx.saved_tensors)


_backward = define(
    "encode_backward(Tensor grad, Tensor x, Tensor codewords, Tensor scale, Tensor distances, Tensor weights) "
    "-> (Tensor, Tensor, Tensor)",
    _compute_gradients,
    _empty_gradients,
)
_forward = define(
    "encode(Tensor x, Tensor codewords, Tensor scale) -> (Tensor, Tensor, Tensor)",
    _compute,
    _empty,
    backward=_through,
    remember=_remember,
)


def _check(x: Tensor, codewords: Tensor) -> None:
    check_tensor(x, "x")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected (B, C, h, w) or (B, C, N), got {tuple(x.shape)}")
    check_dtype(x, "x")
    check_tensor(codewords, "codewords")
    if codewords.dim() != 2 or codewords.shape[1] != x.shape[1] or codewords.shape[0] == 0:
        raise ValueError(f"codewords: expected (K, {x.shape[1]}) for these features, got {tuple(codewords.shape)}")
