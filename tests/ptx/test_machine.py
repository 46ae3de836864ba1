"""Control flow, memory and barriers of the executor, on small PTX written by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ptx.machine import Grid, MachineError, mixed_orders
from ptx.memory import Memory, MemoryFault
from ptx.opcodes import UnknownOpcodeError
from ptx.program import parse, split_operands

HEADER = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u32 kernel_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    .loc 1 2 3  // kernel.py:2:3
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    mov.u32 %r3, %ctaid.x;
    mad.lo.s32 %r4, %r3, {threads}, %r2;
    mul.wide.u32 %rd2, %r4, 4;
    add.s64 %rd3, %rd1, %rd2;
"""
END = "\n ret;\n$L__end:\n}\n.section .debug { .b8 1 }"


def run(body: str, ctas: int = 1, threads: int = 64, words: int | None = None, argument: int = 0, shared: int = 1024) -> npt.NDArray[Any]:
    """Words of global memory after a kernel that has %rd3, the address of its thread's word (0xffffffff before)."""
    size = 4 * (ctas * threads if words is None else words)
    memory = Memory(4096 + size, "global")
    memory.allowed[512 : 512 + size] = True
    arguments = [struct.pack("<Q", 512), struct.pack("<i", argument)]
    Grid(parse(HEADER.format(threads=threads) + body + END), ctas, arguments, memory, shared, mixed_orders).run()
    return memory.bytes[512 : 512 + size].view(np.int32)


def test_every_thread_writes_its_word() -> None:
    assert run("st.global.b32 [%rd3], %r4;", ctas=3).tolist() == list(range(192))


def test_operands_are_split_outside_brackets() -> None:
    assert split_operands("{ %r1, %r2 }, [ %rd1 + 4 ], 0f3F800000") == ("{ %r1, %r2 }", "[ %rd1 + 4 ]", "0f3F800000")


def test_diverging_lanes_meet_again() -> None:
    body = """
    and.b32 %r5, %r2, 1;
    setp.eq.b32 %p1, %r5, 0;
    @%p1 bra $L__even;
    mov.b32 %r6, 100;
    bra.uni $L__join;
$L__even:
    mov.b32 %r6, 200;
$L__join:
    shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;
    st.global.b32 [%rd3], %r7;
    """
    assert run(body).tolist() == [100, 200] * 32


def test_lanes_loop_as_often_as_each_needs() -> None:
    body = """
    mov.b32 %r6, 0;
    mov.b32 %r7, 0;
$L__loop:
    add.s32 %r6, %r6, 1;
    add.s32 %r7, %r7, %r6;
    setp.lt.s32 %p1, %r6, %r2;
    @%p1 bra $L__loop;
    st.global.b32 [%rd3], %r7;
    """
    assert run(body).tolist() == [max(1, t) * (max(1, t) + 1) // 2 for t in range(64)]


def test_predicate_spares_registers_and_memory() -> None:
    body = """
    setp.lt.u32 %p1, %r2, 5;
    mov.b32 %r6, 1;
    @%p1 mov.b32 %r6, 2;
    @!%p1 bra $L__out;
    st.global.b32 [%rd3], %r6;
$L__out:
    """
    assert run(body).tolist() == [2] * 5 + [-1] * 59


def test_vectors_scopes_and_halves() -> None:
    body = """
    mul.wide.u32 %rd4, %r2, 16;
    add.s64 %rd5, %rd1, %rd4;
    { .reg .b32 tmp; mov.b64 {tmp, %r9}, %rd4; }
    mov.b64 %rd6, {%r2, %r9};
    mov.b64 {%r10, _}, %rd6;
    mov.b32 {%rs1, %rs2}, 0x00020001;
    mov.b32 %r11, {%rs2, %rs1};
    st.global.v4.b32 [%rd5 + 0], {%r2, %r9, %r10, %r11};
    ld.global.v2.b32 {%r12, %r13}, [%rd5 + 8];
    st.global.b32 [%rd5], %r13;
    """
    assert run(body, words=256).reshape(64, 4)[7].tolist() == [0x10002, 0, 7, 0x10002]


def test_sub_word_loads_extend_by_their_type() -> None:
    body = """
    mov.b32 %r5, -2;
    st.shared.b16 [global_smem], %r5;
    ld.shared.s16 %r6, [global_smem];
    ld.shared.u16 %r7, [global_smem];
    sub.s32 %r8, %r7, %r6;
    st.global.b32 [%rd3], %r8;
    """
    assert run(body, threads=32).tolist() == [65536] * 32


def test_reductions_of_a_warp() -> None:
    body = """
    redux.sync.max.s32 %r5, %r2, -1;
    redux.sync.min.s32 %r6, %r2, -1;
    sub.s32 %r7, %r5, %r6;
    st.global.b32 [%rd3], %r7;
    """
    assert run(body).tolist() == [31] * 64


def test_matrices_are_distributed_over_a_warp() -> None:
    """Lane 4 r + c holds elements 2 c and 2 c + 1 of row r."""
    body = """
    shl.b32 %r5, %r2, 4;
    st.shared.b32 [%r5], %r2;
    st.shared.b32 [%r5 + 4], 100;
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r6, %r7, %r8, %r9}, [%r5];
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r9, %r8, %r7, %r6};
    ld.shared.b32 %r14, [%r5];
    shl.b32 %r15, %r10, 0;
    st.global.b32 [%rd3], %r7;
    mul.wide.u32 %rd4, %r2, 4;
    st.global.b32 [%rd3 + 128], %r14;
    st.global.b32 [%rd3 + 256], %r15;
    """
    result = run(body, threads=32, words=96).reshape(3, 32)
    assert result[0, ::4].tolist() == list(range(8, 16))  # first words of rows of matrix 1
    assert result[0, 1::4].tolist() == [100] * 8
    assert result[1].tolist() == [24 + i for i in range(8)] + [16 + i for i in range(8)] + [8 + i for i in range(8)] + list(range(8))
    assert result[2, :4].tolist() == [0 | 1 << 16, 2 | 3 << 16, 4 | 5 << 16, 6 | 7 << 16]  # column 0: the lanes' numbers


EXCHANGE = """
    shl.b32 %r5, %r2, 2;
    st.shared.b32 [%r5], %r2;
    {barrier}
    xor.b32 %r6, %r5, {distance};
    ld.shared.b32 %r7, [%r6];
    st.global.b32 [%rd3], %r7;
"""


def test_barrier_orders_two_warps() -> None:
    assert run(EXCHANGE.format(barrier="bar.sync 0;", distance=128), ctas=2).tolist() == 2 * [*range(32, 64), *range(32)]


@pytest.mark.parametrize("ctas", [1, 2])
def test_missing_barrier_is_a_race(ctas: int) -> None:
    with pytest.raises(MemoryFault, match="race: shared bytes"):
        run(EXCHANGE.format(barrier="", distance=128), ctas=ctas)


def test_a_warp_needs_no_barrier_with_itself() -> None:
    assert run(EXCHANGE.format(barrier="", distance=4)).tolist() == [t ^ 1 for t in range(64)]


def test_write_after_read_by_another_warp_is_a_race() -> None:
    body = """
    ld.global.b32 %r5, [%rd1];
    setp.eq.b32 %p1, %r2, 0;
    @%p1 st.global.b32 [%rd1], %r2;
    """
    with pytest.raises(MemoryFault, match="race"):
        run(body)


def test_write_after_read_by_another_cta_is_a_race_despite_barriers() -> None:
    body = """
    ld.global.b32 %r5, [%rd1];
    bar.sync 0;
    setp.eq.b32 %p1, %r4, 0;
    @%p1 st.global.b32 [%rd1], %r4;
    """
    with pytest.raises(MemoryFault, match="race"):
        run(body, ctas=2)
    assert run(body, ctas=1)[0] == 0


def test_the_same_value_from_two_warps_is_no_race() -> None:
    assert run("st.global.b32 [%rd1], 5;")[0] == 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd3 + 4], %r2;", "out of bounds"),
        ("ld.global.b32 %r5, [%rd3 + -4];", "out of bounds"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd3 + 0];", "not a multiple of 8"),
        ("st.shared.b32 [%r2], %r2;", "not a multiple of 4"),
        ("mov.b32 %r5, 1024; st.shared.b32 [%r5], %r2;", "out of bounds"),
    ],
)
def test_bad_access_is_reported(body: str, message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        run(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %r2, 5; @%p1 bar.sync 0;", "only some lanes"),
        ("setp.lt.u32 %p1, %r2, 5; @%p1 bra $L__x; shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1; $L__x:", "only some lanes"),
        ("setp.lt.u32 %p1, %r2, 32; @%p1 bra $L__x; bar.sync 0; $L__x:", "never reach"),
    ],
)
def test_code_that_would_hang_is_reported(body: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        run(body)


def test_ctas_that_diverge_wait_at_barriers_of_their_own() -> None:
    """One CTA takes a branch with a barrier in it, the other does not."""
    body = f"""
    setp.eq.b32 %p2, %r3, 0;
    @%p2 bra $L__join;
    {EXCHANGE.format(barrier="bar.sync 0;", distance=128)}
$L__join:
    bar.sync 0;
    @%p2 st.global.b32 [%rd3], 7;
    """
    assert run(body, ctas=2).tolist() == [7] * 64 + [*range(32, 64), *range(32)]


def test_unwritten_registers_and_shared_memory_are_poisoned() -> None:
    body = "ld.shared.b32 %r5, [global_smem]; add.s32 %r6, %r5, %r77; st.global.b32 [%rd3], %r6;"
    assert run(body, threads=32).tolist() == [-2] * 32


def test_unknown_instruction_fails_before_anything_runs() -> None:
    with pytest.raises(UnknownOpcodeError, match=r"mma\.sync"):
        run("mma.sync.aligned.m16n8k16 %r5, %r6;")


@pytest.mark.parametrize(("cta", "order"), [(0, [0, 1, 2, 3]), (1, [3, 2, 1, 0])])
def test_orders_of_warps(cta: int, order: Sequence[int]) -> None:
    assert list(mixed_orders(cta, 4)) == order
    assert sorted(mixed_orders(2, 4)) == [0, 1, 2, 3]
