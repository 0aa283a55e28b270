"""Loads, stores, atomics, shuffles, reductions and 8x8 matrices against numpy, in every form that the machine knows."""

import numpy as np
import ptx
import pytest
import torch
from snippets import kernel, launch

TYPES = {"b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16}
TYPES |= {"b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.uint32}
TYPES |= {"b64": np.uint64, "u64": np.uint64, "s64": np.uint64, "f64": np.uint64}
VECTORS = ("", ".v2", ".v4")
SPACES = ("", ".global", ".shared", ".shared::cta", ".param")  # the first is generic: a global address
LOADS = [f"ld{s}{v}.{t}" for s in SPACES for v in VECTORS for t in TYPES]
STORES = [form.replace("ld.", "st.", 1) for form in LOADS if "param" not in form]
ATOMICS = [f"atom.global{order}.add.{t}" for order in ("", ".gpu.relaxed", ".gpu.acq_rel") for t in ("u32", "u64")]
ADDITIONS = [form.replace("atom", "red") for form in ATOMICS]
SHUFFLES = [f"shfl.sync.{mode}.b32{p}" for mode in ("up", "down", "bfly", "idx") for p in ("", "|p")]
REDUCTIONS = [f"redux.sync.{name}.{t}" for name in ("add", "min", "max") for t in ("s32", "u32")]
SHAPES = [f"sync.aligned.m8n8.x{n}{transposed}.shared.b16" for n in (1, 2, 4) for transposed in ("", ".trans")]
PACKINGS = [f"mov.b{bits}.{how}{n}" for bits, n in ((32, 2), (64, 2), (64, 4)) for how in ("pack", "unpack")]
LANE = ["ld.param.u64 %d0, [p0];", "ld.param.u64 %d1, [p1];", "mov.u32 %r0, %tid.x;"]
RANDOM = np.random.default_rng(0)


def parts(form: str) -> tuple[str, int, type]:
    """Space, elements and type of a load or store."""
    *space, kind = form.split(".")[1:]
    vector = [part for part in space if part in ("v2", "v4")]
    space = "global" if space == vector else space[0]
    return space, int(vector[0][1:]) if vector else 1, TYPES[kind]


def braced(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"


@pytest.mark.parametrize("form", LOADS)
def test_loads(form):
    """Into registers of 64 bits, which signed numbers fill with their sign and all others with zeros."""
    space, count, kind = parts(form)
    size = count * np.dtype(kind).itemsize
    values = RANDOM.integers(0, 256, 32 * 32, np.uint8)
    names = [f"%d{9 + i}" for i in range(count)]
    lines = [*LANE, "mul.wide.u32 %d2, %r0, 32;", "add.s64 %d3, %d0, %d2;", "add.s64 %d4, %d1, %d2;"]
    if space == "param":
        lines.append(f"{form} {braced(names)}, [p2];")
    elif space == "global":
        lines.append(f"{form} {braced(names)}, [%d3];")
    else:
        lines += ["mov.u32 %r1, buffer;", "mad.lo.s32 %r1, %r0, 32, %r1;"]
        for i in range(4):
            lines += [f"ld.global.b64 %d5, [%d3+{8 * i}];", f"st.shared.b64 [%r1+{8 * i}], %d5;"]
        lines.append(f"{form} {braced(names)}, [%r1];")
    lines += [f"st.global.b64 [%d4+{8 * i}], {name};" for i, name in enumerate(names)]
    data, out = torch.from_numpy(values), torch.zeros(32, 4, dtype=torch.int64)
    text = kernel("load", lines, 2, 1024).replace("param .u64 p1", "param .u64 p1, .param .align 32 .b8 p2[32]")
    memory = ptx.Memory()
    memory.add("data", data)
    memory.add("out", out, written=True, read=False)
    memory.place()
    packed = ptx.pack([(0, 8), (8, 8)], [memory.address(data), memory.address(out)])
    packed = packed.ljust(32, b"\0") + values[:32].tobytes()
    ptx.launch(text, "load", memory, (1,), 32, 0, packed)
    memory.copy_back()
    rows = np.repeat(values[None, :32], 32, 0) if space == "param" else values.reshape(32, 32)
    expected = np.ascontiguousarray(rows[:, :size]).view(kind).astype(np.int64)
    assert (out.numpy()[:, :count] == expected).all()


@pytest.mark.parametrize("form", STORES)
def test_stores(form):
    """The low bits of registers of 64 bits, and nothing beside them."""
    space, count, kind = parts(form)
    size = count * np.dtype(kind).itemsize
    values = RANDOM.integers(0, 2**63, (32, 4), np.uint64)
    names = [f"%d{9 + i}" for i in range(count)]
    lines = [*LANE, "mul.wide.u32 %d2, %r0, 32;", "add.s64 %d3, %d0, %d2;", "add.s64 %d4, %d1, %d2;"]
    lines += [f"ld.global.b64 {name}, [%d3+{8 * i}];" for i, name in enumerate(names)]
    if space == "global":
        lines.append(f"{form} [%d4], {braced(names)};")
    else:
        lines += ["mov.u32 %r1, buffer;", "mad.lo.s32 %r1, %r0, 32, %r1;", "mov.b64 %d5, 0;"]
        lines += [f"st.shared.b64 [%r1+{8 * i}], %d5;" for i in range(4)]
        lines.append(f"{form} [%r1], {braced(names)};")
        for i in range(4):
            lines += [f"ld.shared.b64 %d5, [%r1+{8 * i}];", f"st.global.b64 [%d4+{8 * i}], %d5;"]
    out = torch.zeros(32, 32, dtype=torch.uint8)
    launch(kernel("store", lines, 2, 1024), [torch.from_numpy(values.view(np.int64)), out], 32, inputs=[0])
    expected = np.zeros((32, 32), np.uint8)
    expected[:, :size] = (
        values[:, :count].astype(np.dtype(f"u{np.dtype(kind).itemsize}")).view(np.uint8).reshape(32, size)
    )
    assert (out.numpy() == expected).all()


@pytest.mark.parametrize("form", ATOMICS)
def test_atomics(form):
    """Every thread adds its number; what each gets back is a sum of some of the others."""
    size = 64 if form.endswith("64") else 32
    name = {32: "%r", 64: "%d"}[size]
    lines = [*LANE, "add.u32 %r7, %r0, 1;", "cvt.u64.u32 %d7, %r7;", f"{form} {name}8, [%d0], {name}7;"]
    lines += [f"mul.wide.u32 %d2, %r0, {size // 8};", "add.s64 %d1, %d1, %d2;", f"st.global.b{size} [%d1], {name}8;"]
    kind = torch.int64 if size == 64 else torch.int32
    total, before = torch.full((1,), 7, dtype=kind), torch.zeros(96, dtype=kind)
    launch(kernel("add", lines, 2), [total, before], 96)
    assert total.item() == 7 + sum(range(97))
    order = sorted(range(96), key=lambda i: before[i].item())
    sums = np.cumsum([7] + [i + 1 for i in order])
    assert [before[i].item() for i in order] == sums[:-1].tolist()


@pytest.mark.parametrize("form", ADDITIONS)
def test_atomics_without_a_result(form):
    size = 64 if form.endswith("64") else 32
    number = {32: "%r7", 64: "%d7"}[size]
    lines = [LANE[0], LANE[2], "add.u32 %r7, %r0, 1;", "cvt.u64.u32 %d7, %r7;", f"{form} [%d0], {number};"]
    total = torch.full((1,), 7, dtype=torch.int64 if size == 64 else torch.int32)
    launch(kernel("add", lines), [total], 96)
    assert total.item() == 7 + sum(range(97))


def source_lane(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """As the manual writes it."""
    clamp, segment = c & 31, c >> 8 & 31
    last, first = (lane & segment) | (clamp & ~segment & 31), lane & segment
    if mode == "up":
        source, inside = lane - b, lane - b >= last
    elif mode == "down":
        source, inside = lane + b, lane + b <= last
    elif mode == "bfly":
        source, inside = lane ^ b, lane ^ b <= last
    else:
        source = first | (b & ~segment & 31)
        inside = source <= last
    return (source if inside else lane), inside


@pytest.mark.parametrize("form", SHUFFLES)
def test_shuffles(form):
    mode, with_predicate = form.split(".")[2], form.endswith("|p")
    whole = [0, 0x1F, 0x1000, 0x101F, 0x181F, 0x1800, 0x1C03]
    for b in (0, 1, 2, 5, 16, 31):
        for c in whole:
            lines = [*LANE[:1], LANE[2], "mul.lo.u32 %r1, %r0, 3;", "mov.u32 %r6, 0;", "setp.eq.u32 %p1, %r0, 99;"]
            target = "%r2|%p1" if with_predicate else "%r2"
            lines.append(f"{form.removesuffix('|p')} {target}, %r1, {b}, {c}, -1;")
            lines += ["selp.b32 %r6, 1000, 0, %p1;", "add.u32 %r2, %r2, %r6;", "mul.wide.u32 %d2, %r0, 4;"]
            lines += ["add.s64 %d0, %d0, %d2;", "st.global.u32 [%d0], %r2;"]
            out = torch.zeros(32, dtype=torch.int32)
            launch(kernel("shuffle", lines), [out], 32)
            lanes = [source_lane(mode, lane, b, c) for lane in range(32)]
            assert out.tolist() == [3 * s + 1000 * (inside and with_predicate) for s, inside in lanes], (b, c)


@pytest.mark.parametrize("form", REDUCTIONS)
def test_reductions(form):
    values = RANDOM.integers(-(2**31), 2**31, 32).astype(np.int32)
    lines = [*LANE, "mul.wide.u32 %d2, %r0, 4;", "add.s64 %d0, %d0, %d2;", "add.s64 %d1, %d1, %d2;"]
    lines += ["ld.global.u32 %r1, [%d0];", f"{form} %r2, %r1, -1;", "st.global.u32 [%d1], %r2;"]
    out = torch.zeros(32, dtype=torch.int32)
    launch(kernel("reduce", lines, 2), [torch.from_numpy(values), out], 32)
    typed = values if form.endswith("s32") else values.view(np.uint32)
    name = form.split(".")[2]
    expected = {"add": lambda: int(typed.astype(np.int64).sum()), "min": typed.min, "max": typed.max}[name]()
    assert (out.numpy().view(np.uint32) == int(expected) % 2**32).all()


def test_votes():
    lines = [*LANE, "and.b32 %r1, %r0, 5;", "setp.eq.u32 %p1, %r1, 5;", "vote.sync.ballot.b32 %r2, %p1, -1;"]
    out = torch.zeros(1, dtype=torch.int64)
    launch(kernel("vote", [*lines, "st.global.u32 [%d0], %r2;"], 2), [out, out.clone()], 1 + 31, unwritten=[])
    assert out.item() == sum(1 << lane for lane in range(32) if lane & 5 == 5)


@pytest.mark.parametrize("form", [f"ldmatrix.{shape}" for shape in SHAPES])
def test_loading_matrices(form):
    """Rows at addresses in no order; lane 4g + t gets numbers 2t and 2t + 1 of row g, or of column g."""
    count = int(form.split(".x")[1][0])
    values = np.arange(32 * 8, dtype=np.int16).reshape(32, 8)
    names = [f"%r{10 + i}" for i in range(count)]
    lines = [*LANE, "mul.wide.u32 %d2, %r0, 16;", "add.s64 %d0, %d0, %d2;", "add.s64 %d1, %d1, %d2;"]
    lines += ["mov.u32 %r1, buffer;", "mad.lo.s32 %r2, %r0, 16, %r1;", "ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%d0];"]
    lines += ["st.shared.v4.u32 [%r2], {%r3, %r4, %r5, %r6};", "bar.warp.sync -1;"]
    lines += [
        "mul.lo.u32 %r7, %r0, 5;",
        "add.u32 %r7, %r7, 3;",
        "and.b32 %r7, %r7, 31;",
        "mad.lo.s32 %r2, %r7, 16, %r1;",
    ]
    lines += [f"{form} {{{', '.join(names)}}}, [%r2];"]
    lines += [f"st.global.u32 [%d1+{4 * i}], {name};" for i, name in enumerate(names)]
    out = torch.zeros(32, 8, dtype=torch.int16)
    launch(kernel("matrices", lines, 2, 512), [torch.from_numpy(values), out], 32, inputs=[0])
    rows = values[(5 * np.arange(32) + 3) % 32].reshape(4, 8, 8)
    matrices = rows.transpose(0, 2, 1) if ".trans" in form else rows
    for lane in range(32):
        expected = [matrices[m, lane // 4, lane % 4 * 2 + i] for m in range(count) for i in (0, 1)]
        assert out[lane, : 2 * count].tolist() == expected


@pytest.mark.parametrize("form", [f"stmatrix.{shape}" for shape in SHAPES])
def test_storing_matrices(form):
    """What ldmatrix of the same shape reads comes out as it was."""
    count = int(form.split(".x")[1][0])
    back = form.replace("stmatrix", "ldmatrix")
    names, again = [f"%r{10 + i}" for i in range(count)], [f"%r{20 + i}" for i in range(count)]
    lines = [*LANE, "mul.wide.u32 %d2, %r0, 16;", "add.s64 %d1, %d1, %d2;", "mov.u32 %r1, buffer;"]
    lines += ["mad.lo.s32 %r2, %r0, 16, %r1;"] + [
        f"mad.lo.s32 {n}, %r0, 65543, {i * 999};" for i, n in enumerate(names)
    ]
    lines += [f"{form} [%r2], {{{', '.join(names)}}};", "bar.warp.sync -1;", f"{back} {{{', '.join(again)}}}, [%r2];"]
    lines += [f"st.global.u32 [%d1+{4 * i}], {name};" for i, name in enumerate(again)]
    out = torch.zeros(32, 4, dtype=torch.int32)
    launch(kernel("matrices", lines, 2, 512), [out.clone(), out], 32)
    assert (out[:, :count] == torch.arange(32)[:, None] * 65543 + torch.arange(count) * 999).all()


@pytest.mark.parametrize("form", PACKINGS)
def test_packing(form):
    """Parts go from the low bits up."""
    size, count = int(form[5:7]), int(form[-1])
    part = {16: "%h", 32: "%r"}[size // count]
    whole = {32: "%r", 64: "%d"}[size]
    parts_of = [f"{part}{20 + i}" for i in range(count)]
    step = size // count // 8
    lines = [*LANE, f"ld.global.b{size} {whole}9, [%d0];"]
    if "unpack" in form:
        lines += [f"mov.b{size} {{{', '.join(parts_of)}}}, {whole}9;"]
    else:
        lines += [f"ld.global.b{8 * step} {name}, [%d0+{step * i}];" for i, name in enumerate(parts_of)]
        lines += [f"mov.b{size} {whole}10, {{{', '.join(parts_of)}}};", f"st.global.b{size} [%d1], {whole}10;"]
    if "unpack" in form:
        lines += [f"st.global.b{8 * step} [%d1+{step * i}], {name};" for i, name in enumerate(parts_of)]
    value, out = torch.tensor([0x0123456789ABCDEF]), torch.zeros(1, dtype=torch.int64)
    launch(kernel("pack", lines, 2), [value, out], 1)
    assert out.item() == value.item() & ((1 << size) - 1)


def test_every_form_of_these_is_tested():
    tested = {*LOADS, *STORES, *ATOMICS, *ADDITIONS, *SHUFFLES, *REDUCTIONS, *PACKINGS}
    tested |= {f"{name}.{shape}" for name in ("ldmatrix", "stmatrix") for shape in SHAPES}
    starts = ("ld", "st", "atom", "shfl", "red", "mov.b32.", "mov.b64.")
    assert tested == {form for form in ptx.machine().known_forms() if form.startswith(starts)}
