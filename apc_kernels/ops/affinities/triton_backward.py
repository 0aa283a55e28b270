"""Computes the gradients of adaptive_context in Triton.

A program takes a tile of positions of one image and one scale, as forward does, and leaves the tile's share of every
sum over positions in a workspace; the shares are added up in a fixed order afterwards, without atomics. It does not
walk several tiles: that would save workspace, but costs 60 to 100 registers a thread and spills them.

Each kernel's least, every tensor moved once, for B images of S scales of C channels, N positions, J = Σs² regions and
P = Σs⁴ pairs of them:

    regions_kernel  moves grad, x, regions, weight, bias, shift, center, grad_regions, grad_shift, grad_bias, slope,
                    slope_moments; computes 8·B·N·J·C
    map_kernel      moves grad, x, regions, weight, bias, shift, center, linear, quadratic, constant, result,
                    grad_weight, grad_bias; computes 6·B·N·J·C, 4·B·N·J·C more with grad, 2·B·N·P more with quadratic

map_kernel reads x and grad twice, as a rule from the cache. The sums over positions are the workspace: 4·J·C for every
tile of an image, in float32; with scales (1, 2, 3, 6), 0.4 of x's bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.affinities.triton_tiles import (
    affinities,
    centered,
    dot_in_halves,
    kernel,
    launch,
    load_map,
    load_rows,
    offsets_of,
    operand_dtype,
    place_of_program,
    products,
    tiles_of,
)
from apc_kernels.ops.common import run

BLOCK = {"BLOCK_N": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2}  # larger ones spill
FLOAT32_BLOCK = {"BLOCK_N": 32, "BLOCK_C": 16, "num_warps": 8, "num_stages": 1}  # its products take more registers


@triton.jit
def through_relu(grad, b_centered, b_regions, shift, o_n, m_n, channel, channels, grad_strides):
    """Returns the gradient of z where the relu let z through, (BLOCK_N, BLOCK_C)."""
    b_grad = load_map(grad, o_n, m_n, channel, channels, grad_strides).to(b_regions.dtype)
    if shift is not None:
        b_grad = tl.where(products(b_centered, b_regions, shift, channel, channels) <= 0, 0.0, b_grad)
    return b_grad


@kernel
def regions_kernel(
    grad,  # (B, S*C, h, w)
    x,  # (B, S*C, h, w)
    regions,  # (B, J, C)
    weight,  # (J, C)
    bias,  # (B, J)
    shift,  # (B, S*C) or None
    center,  # (B, J) or None
    grad_regions,  # (B, tiles, J, C) float32, as the following
    grad_shift,  # (B, tiles, S*C)
    grad_bias,  # (B, tiles, J)
    slope,  # (B, tiles, J)
    slope_moments,  # (B, tiles, Σ s⁴)
    batch,
    channels,
    positions,
    width,
    rows,
    pairs,
    tiles,
    grad_strides,
    x_strides,
    SCALES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes the sums of one tile of the positions of one image and one scale."""
    i_s, i_b, i_n, count, row, pair = place_of_program(batch, tiles, SCALES)
    first_channel = i_s.to(tl.int64) * channels
    x += i_b * x_strides[0] + first_channel * x_strides[1]
    grad += i_b * grad_strides[0] + first_channel * grad_strides[1]
    regions += (i_b * rows + row) * channels
    weight += row.to(tl.int64) * channels
    bias += i_b * rows + row
    if shift is not None:
        shift += i_b * len(SCALES) * channels + first_channel
    if center is not None:
        center += i_b * rows + row
    part = i_b * tiles + i_n
    grad_regions += (part * rows + row) * channels
    grad_shift += part * len(SCALES) * channels + first_channel
    grad_bias += part * rows + row
    slope += part * rows + row
    slope_moments += part * pairs + pair

    position = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = position < positions
    o_n = offsets_of(position, width, x_strides, FLAT)
    o_gn = offsets_of(position, width, grad_strides, FLAT)
    for k in tl.static_range(1, len(BLOCKS)):
        if (count > BLOCKS[k - 1]) & (count <= BLOCKS[k]):
            region = tl.arange(0, BLOCKS[k])
            m_j = region < count
            m_nj = m_n[:, None] & m_j[None, :]
            b_affinity = affinities(x, weight, bias, o_n, m_n, count, channels, x_strides, BLOCK_N, BLOCK_C, BLOCKS[k])
            b_centered = centered(b_affinity, center, m_nj, count, BLOCKS[k])
            b_slope = tl.where(m_nj, b_affinity * (1.0 - b_affinity), 0.0)
            tl.store(slope + region, tl.sum(b_slope, 0), mask=m_j)
            o_jj = region[:, None] * count + region[None, :]
            tl.store(slope_moments + o_jj, dot_in_halves(b_slope, b_centered), mask=m_j[:, None] & m_j[None, :])

            # Σ A'·dA over positions, with dA = grad·regions, is Σ (A'·grad)·regions over channels: no sum as wide as a
            # tile has to live through the loop.
            b_operand, b_slope_operand = b_centered.to(regions.dtype.element_ty), b_slope.to(regions.dtype.element_ty)
            b_grad_bias = tl.zeros_like(region).to(tl.float32)
            for c in range(0, channels, BLOCK_C):
                channel = c + tl.arange(0, BLOCK_C)
                m_c = channel < channels
                b_regions = load_rows(regions, region, count, channel, channels)
                b_grad = through_relu(grad, b_operand, b_regions, shift, o_gn, m_n, channel, channels, grad_strides)
                b_part = tl.dot(tl.trans(b_operand), b_grad, input_precision="ieee")
                o_jc = region[:, None].to(tl.int64) * channels + channel[None, :]
                m_jc = m_j[:, None] & m_c[None, :]
                tl.store(grad_regions + o_jc, b_part, mask=m_jc)
                tl.store(grad_shift + channel, tl.sum(b_grad.to(tl.float32), 0), mask=m_c)
                b_part = tl.dot(tl.trans(b_slope_operand), b_grad, input_precision="ieee")
                b_grad_bias += tl.sum(tl.where(m_jc, b_part * b_regions.to(tl.float32), 0.0), 1)
            tl.store(grad_bias + region, b_grad_bias, mask=m_j)


@kernel
def map_kernel(
    grad,  # (B, S*C, h, w), or None with regions, shift and no residual
    x,  # (B, S*C, h, w)
    regions,  # (B, J, C)
    weight,  # (J, C)
    bias,  # (B, J)
    shift,  # (B, S*C) or None
    center,  # (B, J) or None
    linear,  # (B, J), and with it
    quadratic,  # (B, Σ s⁴), or None
    constant,  # (B, S*C) or None
    result,  # (B, S*C, h, w): the gradient of x
    grad_weight,  # (B, tiles, J, C) float32
    grad_bias,  # (B, tiles, J) float32
    batch,
    channels,
    positions,
    width,
    rows,
    pairs,
    tiles,
    grad_strides,
    x_strides,
    result_strides,
    RESIDUAL: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes, for one tile of positions of one image and scale, the gradient of x and the sums of the others."""
    i_s, i_b, i_n, count, row, pair = place_of_program(batch, tiles, SCALES)
    first_channel = i_s.to(tl.int64) * channels
    x += i_b * x_strides[0] + first_channel * x_strides[1]
    result += i_b * result_strides[0] + first_channel * result_strides[1]
    weight += row.to(tl.int64) * channels
    bias += i_b * rows + row
    if grad is not None:
        grad += i_b * grad_strides[0] + first_channel * grad_strides[1]
        regions += (i_b * rows + row) * channels
    if shift is not None:
        shift += i_b * len(SCALES) * channels + first_channel
    if center is not None:
        center += i_b * rows + row
    if linear is not None:
        linear += i_b * rows + row
        quadratic += i_b * pairs + pair
    if constant is not None:
        constant += i_b * len(SCALES) * channels + first_channel
    part = i_b * tiles + i_n
    grad_weight += (part * rows + row) * channels
    grad_bias += part * rows + row

    position = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = position < positions
    o_n = offsets_of(position, width, x_strides, FLAT)
    o_gn = offsets_of(position, width, grad_strides, FLAT)
    o_rn = offsets_of(position, width, result_strides, FLAT)
    for k in tl.static_range(1, len(BLOCKS)):
        if (count > BLOCKS[k - 1]) & (count <= BLOCKS[k]):
            region = tl.arange(0, BLOCKS[k])
            m_j = region < count
            m_nj = m_n[:, None] & m_j[None, :]
            b_affinity = affinities(x, weight, bias, o_n, m_n, count, channels, x_strides, BLOCK_N, BLOCK_C, BLOCKS[k])
            b_centered = centered(b_affinity, center, m_nj, count, BLOCKS[k])

            b_grad_affinity = tl.zeros_like(b_affinity)
            if linear is not None:
                o_jj = region[None, :] * count + region[:, None]  # transposed
                b_matrix = tl.load(quadratic + o_jj, mask=m_j[:, None] & m_j[None, :], other=0.0)
                largest = tl.max(tl.max(tl.abs(b_matrix), 1), 0)
                largest = tl.where(largest == 0, 1.0, largest)
                b_grad_affinity += dot_in_halves(tl.trans(b_centered), b_matrix / largest) * largest
                b_grad_affinity += tl.load(linear + region, mask=m_j, other=0.0)[None, :]
            if grad is not None:
                b_operand = b_centered.to(weight.dtype.element_ty)
                for c in range(0, channels, BLOCK_C):
                    channel = c + tl.arange(0, BLOCK_C)
                    b_regions = load_rows(regions, region, count, channel, channels)
                    b_grad = through_relu(grad, b_operand, b_regions, shift, o_gn, m_n, channel, channels, grad_strides)
                    b_grad_affinity = tl.dot(b_grad, tl.trans(b_regions), b_grad_affinity, input_precision="ieee")
            b_grad_logits = tl.where(m_nj, b_affinity * (1.0 - b_affinity) * b_grad_affinity, 0.0)
            tl.store(grad_bias + region, tl.sum(b_grad_logits, 0), mask=m_j)

            b_operand = b_grad_logits.to(weight.dtype.element_ty)
            for c in range(0, channels, BLOCK_C):
                channel = c + tl.arange(0, BLOCK_C)
                m_c = channel < channels
                b_x = load_map(x, o_n, m_n, channel, channels, x_strides).to(weight.dtype.element_ty)
                b_part = tl.dot(tl.trans(b_operand), b_x, input_precision="ieee")
                o_jc = region[:, None].to(tl.int64) * channels + channel[None, :]
                tl.store(grad_weight + o_jc, b_part, mask=m_j[:, None] & m_c[None, :])

                b_weight = load_rows(weight, region, count, channel, channels)
                b_result = tl.dot(b_operand, b_weight, input_precision="ieee")
                if RESIDUAL:
                    b_result += load_map(grad, o_gn, m_n, channel, channels, grad_strides).to(tl.float32)
                if constant is not None:
                    b_result += tl.load(constant + channel, mask=m_c, other=0.0)[None, :]
                o_nc = o_rn[:, None] + channel[None, :].to(tl.int64) * result_strides[1]
                tl.store(result + o_nc, b_result.to(result.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])


def adaptive_context_backward_regions(*arguments) -> None:
    inputs, results = arguments[:-5], arguments[-5:]
    launches = regions_launches(*inputs)
    run(launches, results[0])
    names = ("grad_regions", "grad_shift", "grad_bias", "slope", "slope_moments")
    for name, result in zip(names, results, strict=True):
        torch.sum(launches[0][2][name], 1, out=result)


def regions_launches(grad, x, regions, weight, bias, scales, shift, center) -> list[tuple]:
    (batch, rows, channels), block = regions.shape, _block(x)
    shared = (batch, tiles_of(x, block))
    arguments = {"regions": regions.to(operand_dtype(x)), "weight": weight.to(operand_dtype(x)), "bias": bias}
    arguments |= {
        "shift": shift,
        "center": center,
        "grad_regions": x.new_empty(*shared, rows, channels, dtype=torch.float32),
        "grad_shift": x.new_empty(*shared, x.shape[1], dtype=torch.float32),
        "grad_bias": x.new_empty(*shared, rows, dtype=torch.float32),
        "slope": x.new_empty(*shared, rows, dtype=torch.float32),
        "slope_moments": x.new_empty(*shared, sum(s**4 for s in scales), dtype=torch.float32),
    }
    return [launch(regions_kernel, x, scales, block, arguments, grad=grad, x=x)]


def adaptive_context_backward_x(*arguments) -> None:
    *inputs, grad_weight, grad_bias = arguments
    launches = map_launches(*inputs)
    run(launches, grad_bias)
    parts = launches[0][2]
    torch.sum(parts["grad_weight"], (0, 1), out=grad_weight)
    torch.sum(parts["grad_bias"], 1, out=grad_bias)


def map_launches(
    grad, x, regions, weight, bias, scales, shift, residual, center, linear, quadratic, constant, result
) -> list[tuple]:
    block = _block(x)
    shared = (x.shape[0], tiles_of(x, block))
    arguments = {
        "regions": None if grad is None else regions.to(operand_dtype(x)),
        "weight": weight.to(operand_dtype(x)),
        "bias": bias,
        "shift": None if grad is None else shift,
        "RESIDUAL": residual,
        "center": center,
        "linear": linear,
        "quadratic": quadratic,
        "constant": constant,
        "grad_weight": x.new_empty(*shared, *weight.shape, dtype=torch.float32),
        "grad_bias": x.new_empty(*shared, weight.shape[0], dtype=torch.float32),
    }
    function, grid, arguments = launch(
        map_kernel, x, scales, block, arguments, grad=x if grad is None else grad, x=x, result=result
    )
    return [(function, grid, arguments | {"grad": grad})]


def _block(x: Tensor) -> dict:
    return FLOAT32_BLOCK if x.dtype == torch.float32 else BLOCK
