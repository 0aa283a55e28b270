"""The machine finds what it is for: kernels of a few lines, each with one fault, and their correct neighbours."""

import time

import ptx
import pytest
import torch
from snippets import kernel, launch

INDEX = ["ld.param.u64 %d0, [p0];", "mov.u32 %r0, %tid.x;", "mul.wide.u32 %d1, %r0, 4;", "add.s64 %d2, %d0, %d1;"]
SHARED = ["mov.u32 %r1, buffer;", "shl.b32 %r2, %r0, 2;", "add.s32 %r1, %r1, %r2;"]  # a word for each thread
# Every thread reads what the one 32 further wrote: the other warp's.
OTHER_WARP = ["xor.b32 %r3, %r2, 128;", "mov.u32 %r4, buffer;", "add.s32 %r3, %r3, %r4;"]
STORE = ["st.shared.u32 [%r1], %r0;"]
LOAD = ["ld.shared.u32 %r5, [%r3];", "st.global.u32 [%d2], %r5;"]


def words(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


def faults(lines, tensors, threads=64, shared=0, **options) -> str:
    """What is found; nothing is an error of the test."""
    with pytest.raises(ptx.FaultError) as error:
        launch(kernel("planted", lines, len(tensors), shared), tensors, threads, **options)
    return str(error.value)


def test_a_correct_exchange_between_warps():
    out = words(64)
    launch(kernel("exchange", INDEX + SHARED + STORE + ["bar.sync 0;"] + OTHER_WARP + LOAD, 1, 256), [out], 64)
    assert (out == torch.arange(64) ^ 32).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_race_between_warps(seed):
    found = faults(INDEX + SHARED + STORE + OTHER_WARP + LOAD, [words(64)], shared=256, seed=seed)
    assert "race between warps of shared memory" in found or "read of memory nobody wrote" in found
    assert ".shared.u32" in found and "warp" in found and "lane" in found


@pytest.mark.parametrize("seed", range(4))
def test_a_race_however_the_order_happened_to_be(seed):
    """The word has been written before: no order reads what nobody wrote, and every order is a race."""
    lines = [*INDEX, *SHARED, *STORE, "bar.sync 0;", *STORE, *OTHER_WARP, *LOAD]
    lines[lines.index("bar.sync 0;") + 1] = "st.shared.u32 [%r1], %r1;"
    assert "race between warps" in faults(lines, [words(64)], shared=256, seed=seed)


def test_a_write_where_others_still_read():
    """The barrier behind the read is missing."""
    lines = [*INDEX, *SHARED, *STORE, "bar.sync 0;", *OTHER_WARP, *LOAD, "st.shared.u32 [%r1], %r1;"]
    assert "race between warps" in faults(lines, [words(64)], shared=256)


def test_a_race_between_lanes_and_what_a_barrier_of_the_warp_does():
    swap = ["xor.b32 %r3, %r2, 4;", *OTHER_WARP[1:]]
    assert "race between lanes" in faults(INDEX + SHARED + STORE + swap + LOAD, [words(32)], 32, shared=128)
    out = words(32)
    launch(kernel("swap", INDEX + SHARED + STORE + ["bar.warp.sync -1;"] + swap + LOAD, 1, 128), [out], 32)
    assert (out == torch.arange(32) ^ 1).all()


def test_lanes_of_one_store_that_disagree():
    lines = [*INDEX, "mov.u32 %r1, buffer;", "st.shared.u32 [%r1], %r0;"]
    assert "race between lanes" in faults(lines, [words(32)], 32, shared=4)
    lines[-1] = "st.shared.u32 [%r1], 7;"
    launch(kernel("agree", lines, 1, 4), [words(32)], 32)


def test_reading_past_the_end():
    tensors = [words(64), words(63)]
    lines = [*INDEX, "ld.param.u64 %d3, [p1];", "add.s64 %d3, %d3, %d1;", "ld.global.u32 %r5, [%d3];"]
    found = faults([*lines, "st.global.u32 [%d2], %r5;"], tensors, inputs=[1])
    assert "out of bounds of t1" in found and "warp 1, lane 31" in found and "byte 252 from its first element" in found


def test_between_the_elements_of_a_window():
    canvas = torch.zeros(64, 2, dtype=torch.int32)
    assert "out of bounds of t0" in faults([*INDEX, "st.global.u32 [%d2], %r0;"], [canvas[:, 0]])


def test_far_from_every_tensor():
    assert "no tensor is near" in faults([*INDEX, "mov.u64 %d3, 64;", "ld.global.u32 %r5, [%d3];"], [words(64)])


def test_past_the_end_of_shared_memory():
    assert "out of bounds of shared memory" in faults(INDEX + SHARED + STORE, [words(64)], shared=252)


def test_misaligned_vectors():
    found = faults([*INDEX, "ld.global.v2.u32 {%r5, %r6}, [%d0+4];"], [words(64)])
    assert "misaligned of t0" in found and "in 8 bytes" in found
    found = faults(
        [*INDEX, "mov.u32 %r1, buffer;", "st.shared.v4.u32 [%r1+8], {%r0, %r0, %r0, %r0};"], [words(1)], 1, shared=64
    )
    assert "misaligned of shared memory" in found


def test_reading_what_nobody_wrote():
    assert "nobody wrote of t0" in faults([*INDEX, "ld.global.u32 %r5, [%d2];"], [words(64)], unwritten=[0])
    load = [*INDEX, *SHARED, "ld.shared.u32 %r5, [%r1];"]
    assert "nobody wrote of shared memory" in faults(load, [words(64)], shared=256)


def test_storing_to_an_input():
    assert "store to an input of t0" in faults([*INDEX, "st.global.u32 [%d2], %r0;"], [words(64)], inputs=[0])


def test_a_race_between_blocks():
    """Both blocks store to one place; so do both of a correct kernel, with an atomic."""
    assert "race between blocks of t0" in faults([*INDEX, "st.global.u32 [%d2], %r0;"], [words(64)], blocks=2)
    out = words(64)
    launch(kernel("add", [*INDEX, "atom.global.add.u32 %r1, [%d2], 1;"]), [out], 64, blocks=2)
    assert (out == 2).all()
    read = [*INDEX, "atom.global.add.u32 %r1, [%d2], 1;", "ld.global.u32 %r2, [%d2];"]
    assert "race between blocks" in faults(read, [words(64)], blocks=2)


def test_a_block_that_reads_what_another_writes():
    lines = [*INDEX, "mov.u32 %r1, %ctaid.x;", "setp.eq.u32 %p1, %r1, 0;", "@%p1 st.global.u32 [%d2], %r0;"]
    assert "race between blocks" in faults([*lines, "@!%p1 ld.global.u32 %r5, [%d2];"], [words(64)], blocks=2)


def test_a_barrier_that_some_warps_never_reach():
    lines = [*INDEX, "setp.gt.u32 %p1, %r0, 31;", "@%p1 bra END;", "bar.sync 0;", "END:"]
    assert "a barrier that not all threads reach" in faults(lines, [words(1)])


def test_a_barrier_that_some_lanes_never_reach():
    lines = [*INDEX, "setp.gt.u32 %p1, %r0, 7;", "@%p1 bra END;", "bar.sync 0;", "END:", "mov.u32 %r1, 0;"]
    assert "a barrier that not all threads reach" in faults(lines, [words(1)], 32)
    lines = [*INDEX, "setp.gt.u32 %p1, %r0, 7;", "@%p1 bar.sync 0;"]
    assert "lanes are missing" in faults(lines, [words(1)], 32)


def test_a_shuffle_without_some_of_its_lanes():
    lines = [*INDEX, "setp.gt.u32 %p1, %r0, 7;", "@%p1 bra END;", "shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;", "END:"]
    assert "lanes are missing" in faults([*lines, "mov.u32 %r1, 0;"], [words(1)], 32)
    lines[4:7] = ["@%p1 bra END;", "shfl.sync.bfly.b32 %r1, %r0, 4, 31, 255;", "END:"]
    launch(kernel("of_eight", [*lines, "mov.u32 %r1, 0;"]), [words(1)], 32)


def test_lanes_that_part_meet_again():
    """Odd lanes take a detour; the shuffle behind it has all of them."""
    lines = [*INDEX, "and.b32 %r1, %r0, 1;", "setp.eq.u32 %p1, %r1, 0;", "mov.u32 %r2, 5;", "@%p1 bra MEET;"]
    lines += ["mov.u32 %r2, 9;", "MEET:", "shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", "st.global.u32 [%d2], %r3;"]
    out = words(32)
    launch(kernel("meet", lines), [out], 32)
    assert (out == torch.where(torch.arange(32) % 2 == 0, 9, 5)).all()


def test_lanes_that_leave_a_loop_at_different_times():
    lines = [*INDEX, "mov.u32 %r1, 0;", "LOOP:", "add.s32 %r1, %r1, %r0;", "add.s32 %r2, %r1, 0;"]
    lines += ["setp.lt.u32 %p1, %r1, 40;", "setp.ne.u32 %p2, %r0, 0;", "and.pred %p1, %p1, %p2;", "@%p1 bra LOOP;"]
    out = words(32)
    launch(kernel("loop", [*lines, "st.global.u32 [%d2], %r1;"]), [out], 32)
    assert out.tolist() == [0, *(-(-40 // n) * n for n in range(1, 32))]


COPY = [*INDEX, *SHARED, "cp.async.ca.shared.global [%r1], [%d2], 4;", "cp.async.commit_group;"]
READ = ["ld.shared.u32 %r5, [%r1];", "st.global.u32 [%d2], %r5;"]


def test_an_asynchronous_copy_arrives_at_the_wait():
    values = torch.arange(64, dtype=torch.int32)
    launch(kernel("copy", [*COPY, "cp.async.wait_group 0;", *READ], 1, 256), [values], 64)
    assert (values == torch.arange(64)).all()


@pytest.mark.parametrize("wait", [[], ["cp.async.wait_group 1;"]], ids=["no wait", "one group left"])
def test_an_asynchronous_copy_read_before_it_arrives(wait):
    assert "cp.async without a wait" in faults([*COPY, *wait, *READ], [words(64)], shared=256)


def test_an_asynchronous_copy_read_by_another_warp_without_a_barrier():
    lines = [*COPY, "cp.async.wait_group 0;", *OTHER_WARP, *LOAD]
    found = faults(lines, [words(64)], shared=256)
    assert "race between warps" in found or "cp.async without a wait" in found or "nobody wrote" in found
    launch(
        kernel("copied", [*COPY, "cp.async.wait_group 0;", "bar.sync 0;", *OTHER_WARP, LOAD[0]], 1, 256),
        [words(64)],
        64,
    )


def test_an_asynchronous_copy_of_nothing_is_zero():
    values = torch.arange(1, 65, dtype=torch.int32)
    lines = [*COPY, "cp.async.wait_group 0;", *READ]
    lines[lines.index(COPY[-2])] = "cp.async.ca.shared.global [%r1], [%d2], 4, 0;"
    launch(kernel("zeros", lines, 1, 256), [values], 64)
    assert (values == 0).all()


def test_endless_loops_end(monkeypatch):
    with pytest.raises(RuntimeError, match="instructions and no end"):
        launch(kernel("endless", ["LOOP:", "bra LOOP;"]), [words(1)], 32, budget=1000)


@pytest.mark.parametrize(
    "line",
    [
        "add.f16 %h1, %h1, %h1;",
        "bar.sync 1;",
        "ld.global.u32 %r1, [%d0], 4;",
        "add.s32 %r1, %r2;",
        "mov.u32 %x, 1;",
        "bra NOWHERE;",
    ],
)
def test_what_is_not_known_is_an_error_that_quotes_it(line):
    with pytest.raises(ValueError, match=r"line \d+: .*") as error:
        ptx.parse(kernel("unknown", [line]))
    assert line in str(error.value) or "NOWHERE" in str(error.value)


def test_results_do_not_depend_on_the_schedule_but_orders_do():
    """Threads that draw tickets from one counter get them in an order of their own under every seed."""
    orders = set()
    for seed in range(4):
        counter, out = words(1), words(128)
        lines = [*INDEX, "ld.param.u64 %d3, [p1];", "atom.global.add.u32 %r1, [%d0], 1;", "mov.u32 %r2, %ctaid.x;"]
        lines += ["mad.lo.s32 %r3, %r2, 64, %r0;", "mul.wide.u32 %d4, %r3, 4;", "add.s64 %d4, %d3, %d4;"]
        launch(kernel("tickets", [*lines, "st.global.u32 [%d4], %r1;"], 2), [counter, out], 64, blocks=2, seed=seed)
        assert sorted(out.tolist()) == list(range(128))
        orders.add(tuple(out.tolist()))
    assert len(orders) > 1


def test_ten_million_instructions_of_lanes_a_second():
    """With loads and stores, and every check; a second of this process, whatever else the machine does."""
    loop = ["LOOP:", "ld.global.f32 %r2, [%d2];", "fma.rn.f32 %r3, %r2, %r2, %r3;", "st.shared.f32 [%r1], %r3;"]
    loop += ["add.s32 %r4, %r4, 1;", "setp.lt.s32 %p1, %r4, 2000;", "@%p1 bra LOOP;", "st.global.f32 [%d2], %r3;"]
    lines = [*INDEX, *SHARED, "mov.f32 %r3, 0f00000000;", "mov.u32 %r4, 0;", *loop]
    begin = time.process_time()
    result = launch(kernel("speed", lines, 1, 1024), [words(256)], 256, counting=True)
    seconds = time.process_time() - begin
    assert sum(lanes for _, lanes in result["opcodes"].values()) > 256 * 2000 * 6
    assert 256 * 2000 * 6 / seconds > 1e7
