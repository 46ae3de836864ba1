"""Each instruction of the executor against a value from the PTX manual or from arithmetic done by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ptx.opcodes import UnknownOpcodeError, dtype, operation

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-140  # subnormal in float32


def compute(opcode: str, *values: Any) -> Any:
    """The result for one lane."""
    what = operation(opcode)
    arrays = [np.array([value]).astype(dtype(kind)) for value, kind in zip(values, what.sources, strict=True)]
    with np.errstate(all="ignore"):
        result = what.apply(*arrays)
    return np.ascontiguousarray(result).view(dtype(what.result))[0]


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.f32", (1.5, 2.25), 3.75),
        ("add.rn.ftz.f32", (TINY, 0.0), 0.0),
        ("add.f32", (TINY, 0.0), TINY),
        ("sub.rn.f64", (1.0, 2.0**-52), 1 - 2.0**-52),
        ("mul.f32", (3.0, -0.5), -1.5),
        ("mul.ftz.f32", (2.0**-100, 2.0**-40), 0.0),
        ("fma.rn.f32", (1 + 2.0**-23, 1 - 2.0**-23, -1.0), -(2.0**-46)),  # the product is not rounded
        ("fma.rn.f64", (1 + 2.0**-52, 1 - 2.0**-52, -1.0), -(2.0**-104)),
        ("fma.rn.f64", (INF, 1.0, 1.0), INF),
        ("fma.rn.ftz.f32", (TINY, 1.0, 1.0), 1.0),
        ("max.f32", (NAN, 1.0), 1.0),
        ("max.NaN.f32", (NAN, 1.0), NAN),
        ("min.f64", (-1.0, NAN), -1.0),
        ("min.ftz.f32", (TINY, 1.0), 0.0),
        ("abs.f32", (-2.0,), 2.0),
        ("neg.f64", (2.0,), -2.0),
        ("div.full.f32", (1.0, 4.0), 0.25),
        ("div.rn.f64", (1.0, 0.0), INF),
        ("rcp.rn.f32", (8.0,), 0.125),
        ("rcp.approx.ftz.f64", (4.0,), 0.25),
        ("sqrt.rn.f32", (9.0,), 3.0),
        ("ex2.approx.f32", (-3.0,), 0.125),
        ("ex2.approx.ftz.f32", (-140.0,), 0.0),
        ("ex2.approx.f32", (-140.0,), TINY),
        ("ex2.approx.ftz.f32", (-INF,), 0.0),
        ("lg2.approx.f32", (0.25,), -2.0),
        ("lg2.approx.ftz.f32", (0.0,), -INF),
        ("lg2.approx.f32", (-1.0,), NAN),
        ("cvt.f32.bf16", (0x3FC0,), 1.5),
        ("cvt.f64.bf16", (0xFF80,), -INF),
        ("cvt.rn.bf16.f32", (1.0,), 0x3F80),
        ("cvt.rn.bf16.f32", (1 + 2.0**-8,), 0x3F80),  # a tie: to even
        ("cvt.rn.bf16.f32", (1 + 3 * 2.0**-8,), 0x3F82),
        ("cvt.rn.bf16.f32", (NAN,), 0x7FFF),
        ("cvt.rn.f16.f32", (1.0,), 0x3C00),
        ("cvt.f32.f16", (0.5,), 0.5),
        ("cvt.rn.bf16x2.f32", (1.0, 2.0), 0x3F804000),  # the first operand is the upper half
        ("cvt.rn.f16x2.f32", (1.0, 2.0), 0x3C004000),
        ("cvt.rn.f32.f64", (1 + 2.0**-24,), 1.0),
        ("cvt.f64.f32", (0.1,), float(np.float32(0.1))),
        ("cvt.rn.f32.u32", (2**32 - 1,), 2.0**32),
        ("cvt.rn.f64.s32", (-7,), -7.0),
        ("cvt.rni.f32.f32", (2.5,), 2.0),
        ("cvt.rzi.s32.f32", (-2.9,), -2),
        ("cvt.rzi.s32.f32", (3e9,), 2**31 - 1),
        ("cvt.rzi.u32.f32", (NAN,), 0),
        ("cvt.s64.s32", (-1,), -1),
        ("cvt.u64.u32", (2**32 - 1,), 2**32 - 1),
        ("cvt.u32.u64", (2**40 + 5,), 5),
        ("add.s32", (2**31 - 1, 1), -(2**31)),
        ("sub.s64", (1, 2), -1),
        ("mul.lo.s32", (2**30, 4), 0),
        ("mad.lo.s32", (3, 4, 5), 17),
        ("mul.hi.u32", (2**31, 6), 3),
        ("mul.hi.s32", (-(2**31), 4), -2),
        ("mul.wide.s32", (-3, 2**30), -3 * 2**30),
        ("mul.wide.u32", (2**31, 4), 2**33),
        ("mad.wide.s32", (-3, 2, 2**40), 2**40 - 6),
        ("div.s32", (-7, 2), -3),
        ("rem.s32", (-7, 2), -1),
        ("div.u32", (2**32 - 1, 2), 2**31 - 1),
        ("min.s32", (-1, 1), -1),
        ("max.u32", (2**32 - 1, 1), 2**32 - 1),
        ("neg.s32", (5,), -5),
        ("and.b32", (12, 10), 8),
        ("or.b16", (12, 10), 14),
        ("xor.b64", (12, 10), 6),
        ("not.b32", (0,), 2**32 - 1),
        ("and.pred", (True, False), False),
        ("not.pred", (True,), False),
        ("shl.b32", (1, 31), 2**31),
        ("shl.b32", (1, 32), 0),
        ("shr.u32", (2**31, 31), 1),
        ("shr.s32", (-8, 1), -4),
        ("shr.s32", (-8, 40), -1),
        ("shr.u64", (2**63, 63), 1),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfe.u32", (0xFFFFFFFF, 0, 32), 0xFFFFFFFF),
        ("bfe.u32", (0xFFFFFFFF, 32, 4), 0),
        ("bfe.s32", (0xABCD, 4, 8), -68),
        ("bfe.s32", (0x700, 8, 4), 7),
        ("bfe.s32", (-(2**31), 28, 16), -8),
        ("bfe.s32", (-(2**31), 40, 4), -1),
        ("bfe.s32", (-1, 4, 0), 0),
        ("bfe.s32", (1 - 2**31, 0, 32), 1 - 2**31),
        ("bfe.u64", (0xABCD << 40, 44, 8), 0xBC),
        ("bfe.u64", (2**64 - 1, 0, 64), 2**64 - 1),
        ("prmt.b32", (0x33221100, 0x77665544, 0x7531), 0x77553311),
        ("prmt.b32", (0x80, 0, 0x8888), 0xFFFFFFFF),  # the sign of a byte
        ("setp.lt.s32", (-1, 1), True),
        ("setp.lt.u32", (2**32 - 1, 1), False),
        ("setp.eq.f32", (NAN, NAN), False),
        ("setp.ne.f32", (NAN, 1.0), False),
        ("setp.neu.f32", (NAN, 1.0), True),
        ("setp.geu.f32", (NAN, 1.0), True),
        ("setp.nan.f32", (NAN, 1.0), True),
        ("setp.num.f32", (1.0, 2.0), True),
        ("setp.gt.ftz.f32", (TINY, 0.0), False),
        ("setp.lt.and.s32", (1, 2, False), False),
        ("setp.lt.or.s32", (2, 1, True), True),
        ("setp.hs.u32", (1, 1), True),
        ("selp.b32", (5, 6, False), 6),
        ("selp.f64", (5.0, 6.0, True), 5.0),
        ("mov.b32", (7,), 7),
    ],
)
def test_instruction_computes_its_value(opcode: str, operands: tuple[Any, ...], expected: Any) -> None:
    result = compute(opcode, *operands)
    assert result == expected or (math.isnan(expected) and math.isnan(result))


@pytest.mark.parametrize(
    ("opcode", "function", "bound"),
    [("ex2.approx.ftz.f32", np.exp2, 2.0**-22), ("lg2.approx.f32", np.log2, 2.0**-22), ("tanh.approx.f32", np.tanh, 2.0**-11)],
)
def test_approximation_is_off_by_no_more_than_documented(opcode: str, function: Any, bound: float) -> None:
    x = np.linspace(0.51, 1.99, 1001).astype(np.float32)
    exact = function(x.astype(np.float64))
    error = np.abs(operation(opcode).apply(x) - exact) / np.maximum(np.abs(exact), 1 if opcode.startswith("lg2") else 0)
    assert bound / 2 < error.max() <= bound + 2.0**-24  # its own rounding


@pytest.mark.parametrize("opcode", ["add.sat.f32", "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", "fma.rz.f32", "cvt.rz.bf16.f32"])
def test_unknown_instruction_is_named(opcode: str) -> None:
    with pytest.raises(UnknownOpcodeError, match=opcode):
        operation(opcode)
