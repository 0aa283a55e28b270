"""Computes upsample_region_sums and its gradient in Triton, on the tiles and cells of the cross entropy.

Forward, a program takes a window of rows of a tile (triton_tiles.py), finds the largest logit and the normalizer of its
pixels in one pass over the classes, and sums probabilities in a second one; sigmoids need no first pass. Backward, a
first kernel leaves what the classes of a pixel share, 20 bytes a pixel, and a second one gathers the gradients cell by
cell (triton_cells.py). Sums are float32 within a window, float64 over windows, and have no atomics.

Each kernel's least, every tensor moved once, for B images of K classes and M output pixels:

    region_sums_kernel    moves logits, target, weight, sums, wrong; computes 8·B·K·M
    region_pixels_kernel  moves grad, logits, target, largest, inverse, best, reference, mean; computes 7·B·K·M
    region_cells_kernel   moves grad, logits, target, weight, largest, inverse, best, reference, mean,
        grad_logits; computes 9·B·K·M

Softmax takes two exponentials a logit in each direction, a sigmoid one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.common import run
from apc_kernels.ops.interpolation import mapping
from apc_kernels.ops.upsample.triton_cells import cell_blocks, cell_programs, cells_of_program, gather_cells
from apc_kernels.ops.upsample.triton_tiles import (
    axis_of,
    blocks,
    exp,
    geometry,
    kernel,
    lerp,
    load_classes,
    programs,
    scan_classes,
    strides_of,
    tile_of_program,
    window_of,
)


@kernel
def region_sums_kernel(
    logits,  # (B, K, h, w)
    target,  # (B, H, W), or masks (B, K, H, W)
    weight,  # (K,) or None
    sums,  # (tiles, windows, 4, K) float32, zeros: of p, t, p·t and p²
    wrong,  # (tiles, windows) int32: labels out of range
    plane,  # H·W for masks, or None
    ignore_index,
    channels,
    height,  # of the logits
    width,
    rows,  # of the result
    columns,
    stride_b,  # of the logits: image, class, row, column
    stride_c,
    stride_y,
    stride_x,
    ALIGN_CORNERS: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes the sums of one window of rows of one tile."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = begin + tl.program_id(1) * ROWS
    found = tl.full((), 0, tl.int32)
    if first < end:
        o_yx, m_yx, w_y = window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS)
        if not SIGMOID:
            b_max, b_sum, _ = scan_classes(corners, w_y, channels, strides[1], ROWS, BLOCK_X, BLOCK_K)
            b_inverse = 1.0 / b_sum
        if plane is None:
            b_label, b_weight = load_weighted(target, o_yx, m_yx, ignore_index, channels, weight)
            found += tl.sum(tl.sum((b_weight != b_weight).to(tl.int32), 1), 0)
        for first_class in range(0, channels, BLOCK_K):
            channel, b_logits = load_classes(corners, w_y, first_class, channels, strides[1], BLOCK_K)
            m_k = channel < channels
            if SIGMOID:
                b_p, _ = sigmoid_of(b_logits)
            else:
                b_p = exp(b_logits - b_max[:, None, :]) * b_inverse[:, None, :]
            if plane is not None:
                o_ykx = o_yx[:, None, :] + ((i_b * (channels - 1) + channel) * plane)[None, :, None]
                m_ykx = m_yx[:, None, :] & m_k[None, :, None]
                b_label_k, b_weight_k = load_weighted(target, o_ykx, m_ykx, ignore_index, 2, None)
                is_own = b_label_k == 1
                found += tl.sum(tl.sum(tl.sum((b_weight_k != b_weight_k).to(tl.int32), 2), 1), 0)
            else:
                b_weight_k = b_weight[:, None, :]
                is_own = b_label[:, None, :] == channel[None, :, None]
            o_k = sums + part * 4 * channels + channel
            b_target = tl.where(is_own | (b_weight_k != b_weight_k), b_weight_k, 0.0)
            tl.store(o_k + channels, tl.sum(tl.sum(b_target, 2), 0), mask=m_k)
            b_p = tl.where(b_weight_k != 0, b_p, 0.0)
            b_weighted = b_p * b_weight_k
            tl.store(o_k, sum_of_products(b_weighted), mask=m_k)
            tl.store(o_k + 2 * channels, sum_of_products(b_target * b_p), mask=m_k)
            tl.store(o_k + 3 * channels, sum_of_products(b_p * b_weighted), mask=m_k)
    tl.store(wrong + part, found)


@triton.jit
def sum_of_products(b):
    """Sums products (ROWS, BLOCK_K, BLOCK_X) over pixels, each rounded before it is added: see scan_classes."""
    return tl.sum(tl.sum(tl.where(b != 0, b, 0.0), 2), 0)


@kernel
def region_pixels_kernel(
    grad,  # (4, B, K) float32
    logits,  # (B, K, h, w)
    target,  # (B, H, W)
    largest,  # (B, H, W) float32: logit
    inverse,  # (B, H, W) float32: of the sum of exp(logit − largest)
    best,  # (B, H, W) int32: the class of the largest logit
    reference,  # (B, H, W) float32: the slope of this class
    mean,  # (B, H, W) float32: of the classes' slopes minus this one, weighted with their probabilities
    images,
    channels,
    height,  # of the logits
    width,
    rows,  # of the result
    columns,
    stride_b,  # of the logits: image, class, row, column
    stride_c,
    stride_y,
    stride_x,
    ALIGN_CORNERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes what all classes of a pixel share: NaN for a label out of range, anything for an ignored pixel.

    The likeliest class's slope minus itself is 0, not a difference that is rounded: its share of the mean is left out.
    """
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    i_b, i_y, begin, end, column, corners = tile_of_program(logits, axis_y, axis_x, strides, BLOCK_X)
    for first in range(begin, end, ROWS):
        o_yx, m_yx, w_y = window_of(first, end, i_b, i_y, column, axis_y, axis_x, ROWS)
        b_label = tl.load(target + o_yx, mask=m_yx, other=0).to(tl.int64)
        m_valid = (b_label >= 0) & (b_label < channels)
        b_max, b_sum, b_class = scan_classes(corners, w_y, channels, strides[1], ROWS, BLOCK_X, BLOCK_K)
        b_best = load_slopes(grad, i_b, images, b_class, channels)
        b_reference = tl.where(b_label == b_class, b_best[0] + b_best[1], b_best[0])
        b_inverse = tl.where(m_valid, 1.0 / b_sum, float("nan"))
        b_square_of_best = b_best[2] * b_inverse
        b_mean = tl.zeros((ROWS, BLOCK_K, BLOCK_X), tl.float32)
        for first_class in range(0, channels, BLOCK_K):
            channel, b_logits = load_classes(corners, w_y, first_class, channels, strides[1], BLOCK_K)
            b_p = exp(b_logits - b_max[:, None, :]) * b_inverse[:, None, :]
            is_own = b_label[:, None, :] == channel[None, :, None]
            b_first, b_overlap, b_square = load_slopes(grad, i_b, images, channel, channels)
            b_slope = slope_of(is_own, b_first[None, :, None], b_overlap[None, :, None], b_reference[:, None, :])
            b_slope += b_square[None, :, None] * b_p - b_square_of_best[:, None, :]
            b_mean += tl.where(channel[None, :, None] == b_class[:, None, :], 0.0, b_p * b_slope)
        tl.store(largest + o_yx, b_max, mask=m_yx)
        tl.store(inverse + o_yx, b_inverse, mask=m_yx)
        tl.store(best + o_yx, b_class, mask=m_yx)
        tl.store(reference + o_yx, b_reference + b_square_of_best, mask=m_yx)
        tl.store(mean + o_yx, tl.sum(b_mean, 1), mask=m_yx)


@kernel
def region_cells_kernel(
    grad,  # (4, B, K) float32
    logits,  # (B, K, h, w)
    target,  # (B, H, W), or masks (B, K, H, W)
    weight,  # (K,) or None
    largest,  # (B, H, W) float32, or None for sigmoids
    inverse,  # the same
    best,  # (B, H, W) int32, or None
    reference,  # (B, H, W) float32, or None
    mean,  # the same
    grad_logits,  # (B, K, h, w)
    plane,  # H·W for masks, or None
    ignore_index,
    images,
    channels,
    height,  # of the logits
    width,
    rows,  # of the result
    columns,
    stride_b,  # of the logits: image, class, row, column
    stride_c,
    stride_y,
    stride_x,
    out_stride_b,  # the same of the result
    out_stride_c,
    out_stride_y,
    out_stride_x,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Computes BLOCK_K classes, BLOCK_I source rows and BLOCK_J − 1 source columns of one image."""
    axis_y, axis_x = axis_of(height, rows, ALIGN_CORNERS), axis_of(width, columns, ALIGN_CORNERS)
    strides = (stride_b, stride_c, stride_y, stride_x)
    out_strides = (out_stride_b, out_stride_c, out_stride_y, out_stride_x)
    tile = cells_of_program(channels, axis_y, axis_x, BLOCK_K, BLOCK_I, BLOCK_J)
    slopes = load_slopes(grad, tile[0], images, tile[3], channels)
    shared = (target, weight, largest, inverse, best, reference, mean, slopes, plane, ignore_index, channels)
    maps = (logits, grad_logits, axis_y, axis_x, strides, out_strides)
    gather_cells(maps, tile, channels, region_gradient, shared, BLOCK_K, BLOCK_I, BLOCK_J, BLOCK_S)


@triton.jit
def region_gradient(shared, i_b, channel, o_js, m_js, corners):
    """Computes the gradient of logits (BLOCK_K, J, S) of these classes at pixels (J, S).

    `corners` are the logits in the source rows above and below, and their weights: interpolated after everything else
    is loaded, they take the fewest registers.
    """
    target, weight, largest, inverse, best, reference, mean, slopes, plane, ignore_index, channels = shared
    b_sum, b_overlap, b_square = slopes[0][:, None, None], slopes[1][:, None, None], slopes[2][:, None, None]
    if largest is not None:
        b_label = tl.load(target + o_js, mask=m_js, other=0)
        kept = m_js & (b_label.to(tl.int64) != ignore_index)  # compared in the labels' dtype, it would wrap
        b_largest = tl.load(largest + o_js, mask=m_js, other=0.0)[None, :, :]
        b_inverse = tl.load(inverse + o_js, mask=m_js, other=0.0)[None, :, :]
        b_reference = tl.load(reference + o_js, mask=m_js, other=0.0)[None, :, :]
        b_mean = tl.load(mean + o_js, mask=m_js, other=0.0)[None, :, :]
        b_p = exp(lerp(corners[0], corners[1], corners[2], corners[3]) - b_largest) * b_inverse
        is_own = b_label.to(tl.int32)[None, :, :] == channel[:, None, None]
        b_slope = slope_of(is_own, b_sum, b_overlap, b_reference) + b_square * b_p
        is_best = tl.load(best + o_js, mask=m_js, other=0)[None, :, :] == channel[:, None, None]
        b_grad = b_p * (tl.where(is_best, 0.0, b_slope) - b_mean)
        if weight is not None:
            m_label = kept & (b_label >= 0) & (b_label < channels)  # with others b_p is NaN
            b_grad *= tl.load(weight + b_label, mask=m_label, other=0.0)[None, :, :]
        return tl.where(kept[None, :, :], b_grad, 0.0)
    if plane is not None:
        o_kjs = o_js[None, :, :] + ((i_b * (channels - 1) + channel) * plane)[:, None, None]
        m_kjs = m_js[None, :, :] & (channel < channels)[:, None, None]
        b_label, b_weight = load_weighted(target, o_kjs, m_kjs, ignore_index, 2, None)
        is_own = b_label == 1
    else:
        b_label, b_weight = load_weighted(target, o_js, m_js, ignore_index, channels, weight)
        b_weight, is_own = b_weight[None, :, :], b_label[None, :, :] == channel[:, None, None]
    b_p, b_change = sigmoid_of(lerp(corners[0], corners[1], corners[2], corners[3]))
    b_grad = b_change * (slope_of(is_own, b_sum, b_overlap, 0.0) + b_square * b_p)
    return tl.where(b_weight != 0, b_grad * b_weight, 0.0)


@triton.jit
def load_weighted(target, o, mask, ignore_index, classes, weight):
    """Loads labels and their weights: 0 for those that are ignored, NaN for those out of range."""
    b_label = tl.load(target + o, mask=mask, other=0).to(tl.int64)
    m_kept = mask & (b_label != ignore_index)
    m_valid = m_kept & (b_label >= 0) & (b_label < classes)
    b_weight = m_valid.to(tl.float32)
    if weight is not None:
        b_weight = tl.load(weight + b_label, mask=m_valid, other=0.0)
    return b_label.to(tl.int32), tl.where(m_kept & (m_valid == 0), float("nan"), b_weight)


@triton.jit
def sigmoid_of(b):
    """Computes the sigmoid and its derivative, without a difference near 1."""
    b_small = exp(-tl.abs(b))
    b_inverse = 1.0 / (1.0 + b_small)
    return tl.where(b < 0, b_small * b_inverse, b_inverse), b_small * b_inverse * b_inverse


@triton.jit
def load_slopes(grad, i_b, images, channel, channels):
    """Loads the gradients of Σp, Σp·t and Σp² for classes (BLOCK_K,), the last of them twice."""
    m_k = channel < channels
    b_sum = tl.load(grad + i_b * channels + channel, mask=m_k, other=0.0)
    b_overlap = tl.load(grad + (i_b + 2 * images) * channels + channel, mask=m_k, other=0.0)
    b_square = tl.load(grad + (i_b + 3 * images) * channels + channel, mask=m_k, other=0.0)
    return b_sum, b_overlap, 2.0 * b_square


@triton.jit
def slope_of(is_own, b_sum, b_overlap, b_reference):
    """Computes the derivative by p of what is made of the sums but Σp², relative to a reference."""
    return tl.where(is_own, b_sum + b_overlap, b_sum) - b_reference


def upsample_region_sums(logits, target, weight, ignore_index, sigmoid, align_corners, sums, wrong) -> None:
    parts, found = part_shapes(logits, target.shape[-2:], align_corners)
    parts, found = logits.new_zeros(parts, dtype=torch.float32), logits.new_empty(found, dtype=torch.int32)
    run(sums_launches(logits, target, weight, ignore_index, sigmoid, align_corners, parts, found), logits)
    of_images = parts.view(logits.shape[0], -1, *parts.shape[2:])
    sums.copy_(of_images.sum(1, dtype=torch.float64).transpose(0, 1))
    wrong.copy_(found.sum())


def upsample_region_sums_backward(*arguments) -> None:
    run(gradient_launches(*arguments), arguments[-1])


def sums_launches(
    logits, target, weight, ignore_index, sigmoid, align_corners, parts: Tensor, found: Tensor
) -> list[tuple]:
    size = target.shape[-2:]
    arguments = {"logits": logits, "target": target, "weight": weight, "sums": parts, "wrong": found}
    arguments |= {"ignore_index": ignore_index, "SIGMOID": sigmoid, "plane": _plane(target)}
    arguments |= geometry(logits, size, align_corners) | blocks(logits, size)
    return [(region_sums_kernel, tuple(found.shape), arguments)]


def part_shapes(logits: Tensor, size: Sequence[int], align_corners: bool) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Returns the shapes of the sums of windows, and of their counts; a tile has as many windows as the tallest one."""
    step, start, denominator = mapping(logits.shape[2], size[0], align_corners)
    rows = size[0]
    if step and logits.shape[2] > 1:  # the first source row has the rows above its center, too
        rows = min(rows, max(triton.cdiv(denominator - start, step), triton.cdiv(denominator, step)))
    grid = programs(logits, size), triton.cdiv(rows, blocks(logits, size)["ROWS"])
    return (*grid, 4, logits.shape[1]), grid


def gradient_launches(
    grad, logits, target, weight, ignore_index, sigmoid, align_corners, grad_logits: Tensor
) -> list[tuple]:
    size = target.shape[-2:]
    shared = {"grad": grad, "logits": logits, "target": target, "images": logits.shape[0]}
    shared |= geometry(logits, size, align_corners)
    of_pixels = dict.fromkeys(("largest", "inverse", "best", "reference", "mean"))
    if not sigmoid:
        types = {name: torch.int32 if name == "best" else torch.float32 for name in of_pixels}
        of_pixels = {name: logits.new_empty(target.shape, dtype=dtype) for name, dtype in types.items()}
    cells = {"weight": weight, "grad_logits": grad_logits, "ignore_index": ignore_index, "plane": _plane(target)}
    cells |= {**of_pixels, **strides_of(grad_logits), **cell_blocks(logits, size)}
    gather = (region_cells_kernel, (cell_programs(logits, cells),), shared | cells)
    if sigmoid:
        return [gather]
    return [(region_pixels_kernel, (programs(logits, size),), shared | of_pixels | blocks(logits, size)), gather]


def _plane(target: Tensor) -> int | None:
    return target.shape[2] * target.shape[3] if target.dim() == 4 else None
