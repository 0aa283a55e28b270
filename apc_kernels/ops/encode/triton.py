"""Computes encode and its gradients in Triton, reading a map in low precision as it is.

A program takes a tile of positions of one image: it reads their channels once for the distances to all codewords, and
once more, as a rule from the cache, for the sums of residuals. It leaves the tile's share of every sum over positions
in a workspace; the shares are added up in a fixed order afterwards, without atomics. All products are float32.

Each kernel's least, every tensor moved once, for B images of C channels, N positions and K codewords:

    encode_kernel     moves x, words, center, scale, distances, weights, sums, counts; computes 4·B·N·K·C
    residuals_kernel  moves grad, x, words, center, scale, distances, weights, result, sums, counts, of_scale;
                      computes 8·B·N·K·C

The workspace takes 4·K·C bytes for every tile of 64 positions (32 beside float32): with 32 codewords as much as x in
low precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run

BLOCK = {"BLOCK_N": 64, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1}
FLOAT32_BLOCK = BLOCK | {"BLOCK_N": 32}  # larger ones spill, here and below
BLOCK_OF_MANY = {"BLOCK_N": 32, "BLOCK_C": 16, "num_warps": 8, "num_stages": 1}  # codewords: more than 32

# Decorates a kernel of these sizes: whether they are 1 or divisible by 16 does not make Triton compile it anew.
kernel = triton.jit(do_not_specialize=("positions", "count", "tiles"))


@triton.jit
def load_features(x, center, position, positions, channel, channels, strides):
    """Loads the channels of some positions relative to the mean codeword, (BLOCK_N, BLOCK_C) float32; 0 outside."""
    mask = (position < positions)[:, None] & (channel < channels)[None, :]
    offsets = position[:, None].to(tl.int64) * strides[2] + channel[None, :].to(tl.int64) * strides[1]
    b_x = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, b_x - tl.load(center + channel, mask=channel < channels, other=0.0)[None, :], 0.0)


@triton.jit
def sum_products(b_a, b_b, row, rows, column, columns, axis: tl.constexpr):
    """Sums products of two tiles along an axis.

    They pass a selection, or a lane would fuse its own product into the sum, and lanes hold different bits of it.
    """
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.sum(tl.where(mask, b_a * b_b, 0.0), axis)


@triton.jit
def load_words(words, word, count, channel, channels):
    """Loads the channels of the codewords, or of their gradients, (BLOCK_K, BLOCK_C)."""
    mask = (word < count)[:, None] & (channel < channels)[None, :]
    return tl.load(words + word[:, None] * channels + channel[None, :], mask=mask, other=0.0)


@kernel
def encode_kernel(
    x,  # (B, C, N)
    words,  # (K, C) float32, relative to their mean
    center,  # (C,) float32, the mean
    scale,  # (K,) float32
    distances,  # (B, K, N) float32
    weights,  # (B, K, N) float32
    sums,  # (B, tiles, K, C) float32: of weights·features
    counts,  # (B, tiles, K) float32: of weights
    channels,
    positions,
    count,
    tiles,
    strides,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes distances and weights of one tile of positions of one image, and their share of the sums."""
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += i_b * strides[0]
    position, word = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_nk = (position < positions)[:, None] & (word < count)[None, :]
    b_products, b_squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    b_words_squares = tl.zeros((BLOCK_K,), tl.float32)
    for c in range(0, channels, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        b_features = load_features(x, center, position, positions, channel, channels, strides)
        b_words = load_words(words, word, count, channel, channels)
        b_products = tl.dot(b_features, tl.trans(b_words), b_products, input_precision="ieee")
        b_squares += sum_products(b_features, b_features, position, positions, channel, channels, 1)
        b_words_squares += sum_products(b_words, b_words, word, count, channel, channels, 1)
    b_distances = b_squares[:, None] + b_words_squares[None, :] - 2.0 * b_products
    b_logits = tl.where((word < count)[None, :], b_distances * tl.load(scale + word, mask=word < count)[None, :], 0.0)
    b_logits = tl.where((word < count)[None, :], b_logits, float("-inf"))
    b_weights = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
    b_weights = tl.where(m_nk, b_weights / tl.sum(b_weights, 1)[:, None], 0.0)
    o_nk = (i_b * count + word[None, :]) * positions + position[:, None]
    tl.store(distances + o_nk, b_distances, mask=m_nk)
    tl.store(weights + o_nk, b_weights, mask=m_nk)

    share = (i_b * tiles + i_n) * count
    tl.store(counts + share + word, tl.sum(b_weights, 0), mask=word < count)
    for c in range(0, channels, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        b_features = load_features(x, center, position, positions, channel, channels, strides)
        b_sums = tl.dot(tl.trans(b_weights), b_features, input_precision="ieee")
        mask = (word < count)[:, None] & (channel < channels)[None, :]
        tl.store(sums + (share + word[:, None]) * channels + channel[None, :], b_sums, mask=mask)


@kernel
def residuals_kernel(
    grad,  # (B, K, C) float32
    x,  # (B, C, N)
    words,  # (K, C) float32, relative to their mean
    center,  # (C,) float32, the mean
    scale,  # (K,) float32
    distances,  # (B, K, N) float32
    weights,  # (B, K, N) float32
    result,  # (B, C, N): the gradient of x
    sums,  # (B, tiles, K, C) float32: of the distances' gradients times features
    counts,  # (B, tiles, 2, K) float32: of the distances' gradients, and of weights
    of_scale,  # (B, tiles, K) float32
    channels,
    positions,
    count,
    tiles,
    strides,
    result_strides,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes the gradient of x of one tile of positions of one image, and its share of the other gradients."""
    i_n, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += i_b * strides[0]
    result += i_b * result_strides[0]
    grad += i_b * count * channels
    position, word = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_nk = (position < positions)[:, None] & (word < count)[None, :]
    o_nk = (i_b * count + word[None, :]) * positions + position[:, None]
    b_grad_weights, b_own = tl.zeros((BLOCK_N, BLOCK_K), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for c in range(0, channels, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        b_features = load_features(x, center, position, positions, channel, channels, strides)
        b_grad = load_words(grad, word, count, channel, channels)
        b_grad_weights = tl.dot(b_features, tl.trans(b_grad), b_grad_weights, input_precision="ieee")
        b_words = load_words(words, word, count, channel, channels)
        b_own += sum_products(b_grad, b_words, word, count, channel, channels, 1)
    b_grad_weights -= b_own[None, :]
    b_weights = tl.load(weights + o_nk, mask=m_nk, other=0.0)
    b_mean = sum_products(b_weights, b_grad_weights, position, positions, word, count, 1)
    b_through = b_weights * (b_grad_weights - b_mean[:, None])
    b_distances = tl.load(distances + o_nk, mask=m_nk, other=0.0)
    b_of_scale = sum_products(b_through, b_distances, position, positions, word, count, 0)
    b_through = tl.where(m_nk, b_through * tl.load(scale + word, mask=word < count, other=0.0)[None, :], 0.0)

    share = i_b * tiles + i_n
    tl.store(of_scale + share * count + word, b_of_scale, mask=word < count)
    tl.store(counts + 2 * share * count + word, tl.sum(b_through, 0), mask=word < count)
    tl.store(counts + (2 * share + 1) * count + word, tl.sum(b_weights, 0), mask=word < count)
    b_twice = 2.0 * tl.sum(b_through, 1)
    for c in range(0, channels, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        b_features = load_features(x, center, position, positions, channel, channels, strides)
        b_sums = tl.dot(tl.trans(b_through), b_features, input_precision="ieee")
        m_kc = (word < count)[:, None] & (channel < channels)[None, :]
        tl.store(sums + (share * count + word[:, None]) * channels + channel[None, :], b_sums, mask=m_kc)
        # The smaller term first, which is rounded to what it is added to.
        b_words = -2.0 * load_words(words, word, count, channel, channels)
        b_result = tl.dot(b_through, b_words, input_precision="ieee")
        b_grad = load_words(grad, word, count, channel, channels)
        b_result = tl.dot(b_weights, b_grad, b_result, input_precision="ieee") + b_twice[:, None] * b_features
        o_nc = position[:, None].to(tl.int64) * result_strides[2] + channel[None, :].to(tl.int64) * result_strides[1]
        m_nc = (position < positions)[:, None] & (channel < channels)[None, :]
        tl.store(result + o_nc, b_result.to(result.dtype.element_ty), mask=m_nc)


def encode(x: Tensor, codewords: Tensor, scale: Tensor, encoded: Tensor, distances: Tensor, weights: Tensor) -> None:
    launches = encode_launches(x, codewords, scale, distances, weights)
    run(launches, x)
    _, _, arguments = launches[0]
    counts = arguments["counts"].sum(1)[..., None]
    torch.sub(arguments["sums"].sum(1), counts * arguments["words"], out=encoded)


def encode_launches(x, codewords, scale, distances, weights) -> list[tuple]:
    arguments = _arguments(x, codewords, scale) | {"distances": distances, "weights": weights}
    return [_launch(encode_kernel, x, codewords, arguments, 1)]


def encode_backward(grad, x, codewords, scale, distances, weights, grad_x, grad_words, grad_scale) -> None:
    launches = encode_backward_launches(grad, x, codewords, scale, distances, weights, grad_x)
    run(launches, x)
    _, _, arguments = launches[0]
    of_distances, counts = arguments["counts"].sum(1)[..., None].unbind(1)  # (B, K, 1)
    of_words = 2 * (of_distances * arguments["words"] - arguments["sums"].sum(1)) - counts * grad
    torch.sum(of_words, 0, out=grad_words)
    torch.sum(arguments["of_scale"], (0, 1), out=grad_scale)


def encode_backward_launches(grad, x, codewords, scale, distances, weights, grad_x) -> list[tuple]:
    arguments = _arguments(x, codewords, scale) | {"grad": grad, "distances": distances, "weights": weights}
    arguments |= {"result": grad_x, "result_strides": grad_x.flatten(2).stride()}
    kernel, grid, arguments = _launch(residuals_kernel, x, codewords, arguments, 2)
    arguments["of_scale"] = x.new_empty(x.shape[0], arguments["tiles"], codewords.shape[0], dtype=torch.float32)
    return [(kernel, grid, arguments)]


def _arguments(x: Tensor, codewords: Tensor, scale: Tensor) -> dict:
    center = codewords.mean(0)
    return {"x": x, "words": codewords - center, "center": center, "scale": scale}


def _launch(function, x: Tensor, codewords: Tensor, arguments: dict, kinds: int) -> tuple:
    """Returns a launch with a program for each tile of positions and image, and room for so many kinds of counts."""
    flat = x.flatten(2)
    (batch, channels, positions), count = flat.shape, codewords.shape[0]
    block = BLOCK_OF_MANY if count > 32 else FLOAT32_BLOCK if x.dtype == torch.float32 else BLOCK
    tiles = triton.cdiv(positions, block["BLOCK_N"])
    arguments |= {"x": flat, "strides": flat.stride(), "channels": channels, "positions": positions, "count": count}
    arguments |= {"tiles": tiles, "BLOCK_K": max(16, triton.next_power_of_2(count))}
    shape = (batch, tiles, *((kinds,) if kinds > 1 else ()), count)
    arguments["counts"] = x.new_empty(shape, dtype=torch.float32)
    arguments["sums"] = x.new_empty(batch, tiles, count, channels, dtype=torch.float32)
    return function, (tiles, batch), arguments | block
