"""Products of matrices: where every element of a fragment lies, by unit matrices, and what is summed how."""

import numpy as np
import pytest
import torch
from snippets import kernel, launch

LANE = ["ld.param.u64 %d0, [p0];", "ld.param.u64 %d1, [p1];", "mov.u32 %r0, %tid.x;"]
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}


def mma_16(kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """One warp's product of 16x16 and 16x8, its fragments filled as the manual's figures show them."""
    out, fragments = torch.zeros(32, 4), np.zeros((32, 10), np.uint32)
    a_bits, b_bits = (t.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for t in (a, b))
    c_bits = c.numpy().view(np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i, (row, column) in enumerate([(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]):
            fragments[lane, i] = a_bits[row, column] | a_bits[row, column + 1] << 16
        for i, row in enumerate([2 * t, 2 * t + 8]):
            fragments[lane, 4 + i] = b_bits[row, g] | b_bits[row + 1, g] << 16
        for i, (row, column) in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
            fragments[lane, 6 + i] = c_bits[row, column]
    lines = [*LANE, "mul.wide.u32 %d2, %r0, 40;", "add.s64 %d0, %d0, %d2;", "mul.wide.u32 %d3, %r0, 16;"]
    lines += ["add.s64 %d1, %d1, %d3;"] + [f"ld.global.b32 %r{10 + i}, [%d0+{4 * i}];" for i in range(10)]
    names = [f"%r{10 + i}" for i in range(10)]
    groups = ["%r1, %r2, %r3, %r4", ", ".join(names[:4]), ", ".join(names[4:6]), ", ".join(names[6:])]
    lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {', '.join('{' + g + '}' for g in groups)};")
    lines.append("st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};")
    launch(kernel("product", lines, 2), [torch.from_numpy(fragments.view(np.int32)), out], 32, inputs=[0])
    result = torch.zeros(16, 8)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i, (row, column) in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
            result[row, column] = out[lane, i]
    return result


@pytest.mark.parametrize("kind", HALVES)
def test_every_element_of_a_and_b(kind):
    """With a 1 at (i, k) of a, row i of the product is row k of b: for all i and k at once, by different numbers."""
    b = torch.arange(128).reshape(16, 8).to(HALVES[kind])
    for k in range(16):
        for shift in (0, 7):
            a = torch.zeros(16, 16, dtype=HALVES[kind])
            a[torch.arange(16), (torch.arange(16) * (1 + shift) + k) % 16] = 1
            assert torch.equal(mma_16(kind, a, b, torch.zeros(16, 8)), a.float() @ b.float())
    for row in range(16):
        for k in range(16):
            a = torch.zeros(16, 16, dtype=HALVES[kind])
            a[row, k] = 1
            expected = torch.zeros(16, 8)
            expected[row] = b[k].float()
            assert torch.equal(mma_16(kind, a, b, torch.zeros(16, 8)), expected)


@pytest.mark.parametrize("kind", HALVES)
def test_sums_are_rounded_once(kind):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=generator).to(HALVES[kind]) for n in (16, 8))
    c = torch.randn(16, 8, generator=generator) * 100
    assert torch.equal(mma_16(kind, a, b, c), (c.double() + a.double() @ b.double()).float())
    c[3, 4], c[5, 6] = float("inf"), float("nan")
    result = mma_16(kind, a, b, c)
    assert result[3, 4] == float("inf") and result[5, 6].isnan() and result.isfinite().sum() == 126


def test_float64():
    """8x4 by 4x8, a warp: lane 4g + t holds a[g][t], b[t][g], c[g][2t] and c[g][2t + 1]."""
    generator = torch.Generator().manual_seed(0)
    for a in [*torch.eye(32, dtype=torch.float64).reshape(32, 8, 4), torch.randn(8, 4, generator=generator).double()]:
        b, c = torch.randn(4, 8, generator=generator).double(), torch.randn(8, 8, generator=generator).double()
        data = torch.zeros(32, 4, dtype=torch.float64)
        for lane in range(32):
            g, t = divmod(lane, 4)
            data[lane] = torch.stack([a[g, t], b[t, g], c[g, 2 * t], c[g, 2 * t + 1]])
        lines = [*LANE, "mul.wide.u32 %d2, %r0, 32;", "add.s64 %d0, %d0, %d2;", "mul.wide.u32 %d3, %r0, 16;"]
        lines += ["add.s64 %d1, %d1, %d3;", *(f"ld.global.b64 %d{10 + i}, [%d0+{8 * i}];" for i in range(4))]
        lines.append("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d4, %d5}, {%d10}, {%d11}, {%d12, %d13};")
        lines.append("st.global.v2.b64 [%d1], {%d4, %d5};")
        out = torch.zeros(8, 8, dtype=torch.float64)  # a lane's two numbers lie side by side in a row
        launch(kernel("product", lines, 2), [data, out], 32, inputs=[0])
        torch.testing.assert_close(out, c + a @ b, rtol=1e-15, atol=1e-14)
