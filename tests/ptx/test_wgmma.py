"""wgmma: matrices in shared memory in every layout that its descriptors know, its fences and waits."""

import itertools

import ptx
import pytest
import torch
from snippets import kernel, launch

N, THREADS = 32, 128
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
SWIZZLES = {16: 0, 32: 3, 64: 2, 128: 1}  # bytes of a swizzled row: the mode in a descriptor
FENCES = ["fence.proxy.async.shared::cta;", "bar.sync 0;", "wgmma.fence.sync.aligned;"]
ENDS = ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]


def lay_out(matrix: torch.Tensor, row_bytes: int, transposed: bool) -> tuple[torch.Tensor, int]:
    """A matrix (m or n, 16) as numbers of shared memory, and its descriptor, the start left out.

    Blocks of 8 rows; a row of 16 bytes, or of `row_bytes` whose pieces of 16 bytes change places: piece p of row r lies
    at p xor (r mod 8), with rows of 64 and 32 bytes at p xor (r / 2 mod 4) and p xor (r / 4 mod 2).
    """
    rows = matrix.T if transposed else matrix  # what lies in a row follows each other in memory
    per_row = row_bytes // 2
    blocks = {}
    for i, j in itertools.product(range(rows.shape[0]), range(rows.shape[1])):
        piece, row = j % per_row // 8, i % 8
        piece ^= {16: 0, 32: row // 4, 64: row // 2 % 4, 128: row}[row_bytes]
        blocks.setdefault((i // 8, j // per_row), torch.zeros(8, per_row, dtype=matrix.dtype))[
            row, piece * 8 + j % 8
        ] = rows[i, j]
    block_bytes = 8 * row_bytes
    columns = -(-rows.shape[1] // per_row)
    order = sorted(blocks)
    data = torch.cat([blocks[key].flatten() for key in order])
    down, right = columns * block_bytes, block_bytes
    if row_bytes == 16:
        leading, stride = (down, right) if transposed else (right, down)
    else:
        leading, stride = right, down
    return data, SWIZZLES[row_bytes] << 62 | stride >> 4 << 32 | leading >> 4 << 16


def product(a, b, c, kind, a_layout, b_layout, changed=lambda lines: lines) -> torch.Tensor:
    """One warpgroup's product (64, 16) by (16, N), added to c."""
    a_data, a_descriptor = lay_out(a, *a_layout)
    b_data, b_descriptor = lay_out(b, *b_layout)
    padded = torch.zeros(4096, dtype=a.dtype)
    padded[: a_data.numel()], padded[2048 : 2048 + b_data.numel()] = a_data, b_data
    d = [f"%r{20 + i}" for i in range(N // 2)]
    lines = ["ld.param.u64 %d0, [p0];", "ld.param.u64 %d1, [p1];", "mov.u32 %r0, %tid.x;", "mov.u32 %r1, buffer;"]
    lines += ["mul.wide.u32 %d2, %r0, 64;", "add.s64 %d0, %d0, %d2;", "mad.lo.s32 %r2, %r0, 64, %r1;"]
    for i in range(4):
        lines.append(f"ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d0+{16 * i}];")
        lines.append(f"st.shared.v4.b32 [%r2+{16 * i}], {{%r3, %r4, %r5, %r6}};")
    lines += [f"mul.wide.u32 %d2, %r0, {2 * N};", "add.s64 %d1, %d1, %d2;"]
    lines += [f"ld.global.b32 {name}, [%d1+{4 * i}];" for i, name in enumerate(d)]
    lines += ["setp.eq.u32 %p1, %r0, %r0;", *FENCES]
    start = [f"or.b64 %d{3 + i}, %d{5 + i}, {descriptor};" for i, descriptor in enumerate((a_descriptor, b_descriptor))]
    lines += ["mov.u64 %d5, 0;", f"mov.u64 %d6, {4096 >> 4};", *start]
    transposed = f"{int(a_layout[1])}, {int(b_layout[1])}"
    name = f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{kind}.{kind}"
    lines += [f"{name} {{{', '.join(d)}}}, %d3, %d4, %p1, 1, 1, {transposed};", *ENDS]
    lines += [f"st.global.b32 [%d1+{4 * i}], {name};" for i, name in enumerate(d)]
    fragments, where = torch.zeros(THREADS, N // 2), {}
    for thread, i in itertools.product(range(THREADS), range(N // 2)):
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        where[thread, i] = 16 * warp + g + i // 2 % 2 * 8, i // 4 * 8 + 2 * t + i % 2
        fragments[thread, i] = c[where[thread, i]]
    text = kernel("product", changed(lines), 2, 8192, "sm_90a")
    launch(text, [padded.view(torch.int16), fragments], THREADS, inputs=[0])
    result = torch.zeros(64, N)
    for place, (row, column) in where.items():
        result[row, column] = fragments[place]
    return result


def draw(kind):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=generator).to(HALVES[kind]) for n in (64, N))
    return a, b, torch.randn(64, N, generator=generator)


LAYOUTS = [(16, False), (32, False), (64, False), (16, True), (32, True), (64, True), (128, True)]


@pytest.mark.parametrize("b_layout", [*LAYOUTS, (128, False)], ids=str)
@pytest.mark.parametrize("a_layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", HALVES)
def test_layouts(kind, a_layout, b_layout):
    a, b, c = draw(kind)
    expected = (c.double() + a.double() @ b.double().T).float()
    assert torch.equal(product(a, b, c, kind, a_layout, b_layout), expected)


@pytest.mark.parametrize(
    ("left_out", "found"),
    [(FENCES[0], "no fence.proxy.async"), (FENCES[1], "race between warps"), (FENCES[2], "no wgmma.fence")],
)
def test_what_may_not_be_left_out(left_out, found):
    a, b, c = draw("bf16")
    with pytest.raises(ptx.FaultError, match=found):
        product(a, b, c, "bf16", *LAYOUTS[:2], changed=lambda lines: [line for line in lines if line != left_out])


def test_results_are_not_there_before_the_wait():
    a, b, c = draw("bf16")
    result = product(a, b, c, "bf16", *LAYOUTS[:2], changed=lambda lines: [line for line in lines if line != ENDS[1]])
    assert result.isnan().all()


def test_what_is_read_may_not_be_written_before_the_wait():
    """A barrier alone does not tell that the tensor cores have read."""
    a, b, c = draw("bf16")

    def changed(lines):
        at = lines.index(ENDS[1])
        return [*lines[:at], "bar.sync 0;", "st.shared.b32 [%r2], %r0;", *lines[at:]]

    with pytest.raises(ptx.FaultError, match="written while wgmma reads"):
        product(a, b, c, "bf16", *LAYOUTS[:2], changed=changed)
