"""Computes adaptive_context in Triton, forward.

The gradients are in triton_backward.py, affinity_moments is in triton_moments.py.

A program takes a tile of positions of one image and one scale. It reads the tile's channels chunk by chunk for the
affinities, which stay in registers, and then writes z chunk by chunk. Maps in low precision are multiplied as such on
tensor cores and summed in float32, weight and regions rounded to them; float32 is multiplied as float32.

The least, every tensor moved once, for B images of S scales of C channels, N positions, J = Σs² regions:

    context_kernel  moves x, regions, weight, bias, shift, center, z; computes 4·B·N·J·C

With a residual x is read once more, from the cache. No workspace.
"""

import torch
import triton.language as tl
from torch import Tensor

from apc_kernels.ops.affinities.triton_backward import adaptive_context_backward_regions, adaptive_context_backward_x
from apc_kernels.ops.affinities.triton_moments import affinity_moments
from apc_kernels.ops.affinities.triton_tiles import (
    affinities,
    centered,
    kernel,
    launch,
    load_map,
    load_rows,
    offsets_of,
    operand_dtype,
    place_of_program,
    products,
)
from apc_kernels.ops.common import run

__all__ = ["adaptive_context", "adaptive_context_backward_regions", "adaptive_context_backward_x", "affinity_moments"]

BLOCK = {"BLOCK_N": 128, "BLOCK_C": 32, "num_warps": 8, "num_stages": 3}
FLOAT32_BLOCK = {"BLOCK_N": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 1}  # its products take more registers


@kernel
def context_kernel(
    x,  # (B, S*C, h, w)
    regions,  # (B, J, C)
    weight,  # (J, C)
    bias,  # (B, J)
    shift,  # (B, S*C) or None
    center,  # (B, J) or None
    z,  # (B, S*C, h, w)
    batch,
    channels,
    positions,
    width,
    rows,
    tiles,
    x_strides,
    z_strides,
    RESIDUAL: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCKS: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Computes one tile of positions of one image and one scale."""
    i_s, i_b, i_n, count, row, _ = place_of_program(batch, tiles, SCALES)
    first_channel = i_s.to(tl.int64) * channels
    x += i_b * x_strides[0] + first_channel * x_strides[1]
    z += i_b * z_strides[0] + first_channel * z_strides[1]
    regions += (i_b * rows + row) * channels
    weight += row.to(tl.int64) * channels
    bias += i_b * rows + row
    if shift is not None:
        shift += i_b * len(SCALES) * channels + first_channel
    if center is not None:
        center += i_b * rows + row

    position = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = position < positions
    o_n = offsets_of(position, width, x_strides, FLAT)
    o_zn = offsets_of(position, width, z_strides, FLAT)
    for k in tl.static_range(1, len(BLOCKS)):
        if (count > BLOCKS[k - 1]) & (count <= BLOCKS[k]):
            region = tl.arange(0, BLOCKS[k])
            b_affinity = affinities(x, weight, bias, o_n, m_n, count, channels, x_strides, BLOCK_N, BLOCK_C, BLOCKS[k])
            m_nj = m_n[:, None] & (region < count)[None, :]
            b_centered = centered(b_affinity, center, m_nj, count, BLOCKS[k]).to(weight.dtype.element_ty)
            for c in range(0, channels, BLOCK_C):
                channel = c + tl.arange(0, BLOCK_C)
                b_regions = load_rows(regions, region, count, channel, channels)
                b_z = products(b_centered, b_regions, shift, channel, channels)
                if shift is not None:
                    b_z = tl.where(b_z <= 0, 0.0, b_z)  # NaN passes
                if RESIDUAL:
                    b_z += load_map(x, o_n, m_n, channel, channels, x_strides).to(tl.float32)
                o_nc = o_zn[:, None] + channel[None, :].to(tl.int64) * z_strides[1]
                m_nc = m_n[:, None] & (channel < channels)[None, :]
                tl.store(z + o_nc, b_z.to(z.dtype.element_ty), mask=m_nc)


def adaptive_context(x: Tensor, *others) -> None:
    run(context_launches(x, *others), x)


def context_launches(x, regions, weight, bias, scales, shift, residual, center, z: Tensor) -> list[tuple]:
    regions, weight = regions.to(operand_dtype(x)), weight.to(operand_dtype(x))
    arguments = {"regions": regions, "weight": weight, "bias": bias, "shift": shift, "center": center}
    block = FLOAT32_BLOCK if x.dtype == torch.float32 else BLOCK
    return [launch(context_kernel, x, scales, block, arguments | {"RESIDUAL": residual}, x=x, z=z)]
