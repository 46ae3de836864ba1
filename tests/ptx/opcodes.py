"""Semantics of each PTX instruction, lane by lane, on numpy arrays.

``operation`` finds an opcode in a table of patterns; one that no pattern matches is an error that names it. Results are those of the PTX
manual. An approximate instruction is off by a pseudo-random error within the manual's bound, so that no test relies on better.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .program import BITS

Lanes = npt.NDArray[Any]
RAW = {1: np.dtype(bool), 8: np.dtype(np.uint8), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


class UnknownOpcodeError(NotImplementedError):
    """An instruction that the executor does not know: teach it in opcodes.py, with a test of its values."""


def dtype(kind: str) -> np.dtype[Any]:
    """The numpy type of a PTX type; bfloat16 as its bits."""
    if kind in ("pred", "bf16"):
        return RAW[BITS[kind]]
    return np.dtype(f"{_KINDS[kind[0]]}{BITS[kind] // 8}")


@dataclass(frozen=True)
class Operation:
    """``apply`` takes one array per source, viewed as ``sources`` says, and returns one of type ``result``."""

    sources: tuple[str, ...]
    result: str
    apply: Callable[..., Lanes]


_TABLE: list[tuple[re.Pattern[str], Callable[..., Operation]]] = []


def _opcode(pattern: str) -> Callable[[Callable[..., Operation]], Callable[..., Operation]]:
    """Register what makes the operation of opcodes that match; it takes the pattern's groups."""

    def register(make: Callable[..., Operation]) -> Callable[..., Operation]:
        _TABLE.append((re.compile(pattern), make))
        return make

    return register


@cache
def operation(opcode: str) -> Operation:
    """The operation of an opcode.

    Raises:
        UnknownOpcodeError: no pattern matches it.
    """
    for pattern, make in _TABLE:
        if match := pattern.fullmatch(opcode):
            return make(*match.groups())
    raise UnknownOpcodeError(f"the executor does not know the instruction {opcode!r}")


# ---- floating point


def flush(x: Lanes) -> Lanes:
    """Subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _flushed(function: Callable[..., Lanes], ftz: str | None) -> Callable[..., Lanes]:
    if not ftz:
        return function
    return lambda *sources: flush(function(*(flush(x) for x in sources)))


def _float(count: int, kind: str, function: Callable[..., Lanes], ftz: str | None = None) -> Operation:
    return Operation((kind,) * count, kind, _flushed(function, ftz))


_BINARY: dict[str, Callable[..., Lanes]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}


@_opcode(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.(f32|f64)")
@_opcode(r"(min|max)(\.ftz)?\.(f32|f64)")
def _binary_float(name: str, ftz: str | None, kind: str) -> Operation:
    return _float(2, kind, _BINARY[name], ftz)


@_opcode(r"(min|max)(\.ftz)?\.NaN\.(f32)")
def _nan_extremum(name: str, ftz: str | None, kind: str) -> Operation:
    return _float(2, kind, np.minimum if name == "min" else np.maximum, ftz)


@_opcode(r"(abs|neg)(\.ftz)?\.(f32|f64)")
def _sign(name: str, ftz: str | None, kind: str) -> Operation:
    return _float(1, kind, np.abs if name == "abs" else np.negative, ftz)


def _fma32(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    return (x.astype(np.float64) * y + z).astype(np.float32)


def _split(x: Lanes) -> tuple[Lanes, Lanes]:
    """High and low half of the digits (Dekker)."""
    scaled = x * 134217729.0
    high = scaled - (scaled - x)
    return high, x - high


def _fma64(x: Lanes, y: Lanes, z: Lanes) -> Lanes:
    """Product and sum with their rounding errors, which are added last."""
    product = x * y
    (xh, xl), (yh, yl) = _split(x), _split(y)
    lost_product = ((xh * yh - product) + xh * yl + xl * yh) + xl * yl
    total = product + z
    part = total - product
    lost_sum = (product - (total - part)) + (z - part)
    exact = total + (lost_product + lost_sum)
    return np.where(np.isfinite(exact), exact, total)


@_opcode(r"fma\.rn(\.ftz)?\.(f32|f64)")
def _fma(ftz: str | None, kind: str) -> Operation:
    return _float(3, kind, _fma32 if kind == "f32" else _fma64, ftz)


def _off(exact: Lanes, bound: Lanes | float, x: Lanes) -> Lanes:
    """A float32 result with an error between plus and minus ``bound`` that depends on the operand's bits alone."""
    hashed = (np.ascontiguousarray(x).view(np.uint32) * np.uint32(2654435761)) >> np.uint32(8)
    return (exact + bound * (hashed.astype(np.float64) / 2.0**23 - 1.0)).astype(np.float32)


def _ex2(x: Lanes) -> Lanes:
    """2^x within 2^-22 of itself; a power of two where x is an integer."""
    exact = np.exp2(x.astype(np.float64))
    bound = np.where((np.rint(x) == x) | ~np.isfinite(exact), 0.0, exact * 2.0**-22)
    return _off(exact, bound, x)


def _lg2(x: Lanes) -> Lanes:
    """log2(x) within 2^-22 where x is in (0.5, 2), within 2^-22 of itself elsewhere; exact for powers of two."""
    exact = np.log2(x.astype(np.float64))
    size = np.where((x > 0.5) & (x < 2.0), 1.0, np.abs(exact))
    bound = np.where((np.rint(exact) == exact) | ~np.isfinite(exact), 0.0, size * 2.0**-22)
    return _off(exact, bound, x)


def _tanh(x: Lanes) -> Lanes:
    """tanh(x) within 2^-11 of itself."""
    exact = np.tanh(x.astype(np.float64))
    return _off(exact, np.abs(exact) * 2.0**-11, x)


def _reciprocal64(x: Lanes) -> Lanes:
    """1 / x, of which the upper 32 bits are kept."""
    return ((1.0 / flush(x)).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


_APPROXIMATE: dict[str, Callable[..., Lanes]] = {
    "ex2": _ex2, "lg2": _lg2, "tanh": _tanh, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


@_opcode(r"(ex2|lg2|tanh|rcp|sqrt|rsqrt)\.approx(\.ftz)?\.(f32)")
@_opcode(r"(rcp|sqrt)\.rn(\.ftz)?\.(f32|f64)")
def _unary_float(name: str, ftz: str | None, kind: str) -> Operation:
    return _float(1, kind, _APPROXIMATE[name], ftz)


@_opcode(r"rcp\.approx\.ftz\.f64")
def _gross_reciprocal() -> Operation:
    return _float(1, "f64", _reciprocal64)


@_opcode(r"div\.(?:full|approx|rn)(\.ftz)?\.(f32)")
@_opcode(r"div\.rn(\.ftz)?\.(f64)")
def _divide(ftz: str | None, kind: str) -> Operation:
    return _float(2, kind, np.divide, ftz)


# ---- integers and bits


def _integers(count: int, kind: str, function: Callable[..., Lanes], result: str | None = None) -> Operation:
    return Operation((kind,) * count, result or kind, function)


@_opcode(r"(add|sub|min|max)\.([su](?:16|32|64))")
def _binary_integer(name: str, kind: str) -> Operation:
    function = {"min": np.minimum, "max": np.maximum}.get(name) or _BINARY[name]
    return _integers(2, kind, function)


@_opcode(r"(abs|neg)\.(s(?:16|32|64))")
def _sign_integer(name: str, kind: str) -> Operation:
    return _integers(1, kind, np.abs if name == "abs" else np.negative)


@_opcode(r"(mul|mad)\.lo\.([su](?:16|32|64))")
def _low_product(name: str, kind: str) -> Operation:
    if name == "mul":
        return _integers(2, kind, np.multiply)
    return _integers(3, kind, lambda x, y, z: x * y + z)


@_opcode(r"mul\.hi\.([su])32")
def _high_product(sign: str) -> Operation:
    wide, narrow = dtype(f"{sign}64"), dtype(f"{sign}32")
    return _integers(2, f"{sign}32", lambda x, y: ((x.astype(wide) * y.astype(wide)) >> wide.type(32)).astype(narrow))


@_opcode(r"(mul|mad)\.wide\.([su])(16|32)")
def _wide_product(name: str, sign: str, bits: str) -> Operation:
    kind, result = f"{sign}{bits}", f"{sign}{2 * int(bits)}"
    wide = dtype(result)
    if name == "mul":
        return Operation((kind, kind), result, lambda x, y: x.astype(wide) * y.astype(wide))
    return Operation((kind, kind, result), result, lambda x, y, z: x.astype(wide) * y.astype(wide) + z)


@_opcode(r"(div|rem)\.([su](?:16|32|64))")
def _quotient(name: str, kind: str) -> Operation:
    """Rounded towards zero, as in C; what division by zero gives is undefined there."""

    def divide(x: Lanes, y: Lanes) -> Lanes:
        rest = np.fmod(x, y)
        return rest if name == "rem" else (x - rest) // y

    return _integers(2, kind, divide)


_LOGIC: dict[str, Callable[..., Lanes]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.bitwise_not,
}  # fmt: skip


@_opcode(r"(and|or|xor|not)\.(pred|b16|b32|b64)")
def _logic(name: str, kind: str) -> Operation:
    return _integers(1 if name == "not" else 2, kind, _LOGIC[name])


@_opcode(r"(shl|shr)\.([bus])(16|32|64)")
def _shift(name: str, sign: str, bits: str) -> Operation:
    """Amounts beyond the width leave zeros, or the sign."""
    kind, last = f"{sign}{bits}", int(bits) - 1
    numeric = dtype(kind)

    def shift(x: Lanes, amount: Lanes) -> Lanes:
        within = np.minimum(amount, np.uint32(last)).astype(numeric)
        shifted: Lanes = x << within if name == "shl" else x >> within
        return shifted if sign == "s" else np.where(amount > last, numeric.type(0), shifted)

    return Operation((kind, "u32"), kind, shift)


@_opcode(r"bfe\.u(32|64)")
def _extract(bits: str) -> Operation:
    """A field of bits, by its first and its length; beyond the width there are zeros."""
    kind, width = f"u{bits}", int(bits)
    numeric = dtype(kind)

    def extract(x: Lanes, start: Lanes, length: Lanes) -> Lanes:
        first, size = start & 255, length & 255
        moved: Lanes = np.where(first >= width, numeric.type(0), x >> np.minimum(first, width - 1).astype(numeric))
        ones: Lanes = (numeric.type(1) << np.minimum(size, width - 1).astype(numeric)) - numeric.type(1)
        return np.where(size >= width, moved, moved & ones)

    return Operation((kind, "u32", "u32"), kind, extract)


@_opcode(r"bfe\.s(32|64)")
def _extract_signed(bits: str) -> Operation:
    """A field of bits with its highest bit repeated above it; bits beyond the register are its sign."""
    width, whole = int(bits), dtype(f"u{bits}").type

    def extract(x: Lanes, start: Lanes, length: Lanes) -> Lanes:
        pattern, first, size = x.view(whole), (start & 255).astype(whole), (length & 255).astype(whole)
        field = pattern >> np.minimum(first, whole(width - 1))
        last = np.minimum(first + np.maximum(size, whole(1)) - whole(1), whole(width - 1))
        negative = ((pattern >> last) & whole(1)).astype(bool) & (size > 0)
        kept = np.minimum(size, whole(width) - np.minimum(first, whole(width)))
        mask = np.where(kept >= width, ~whole(0), (whole(1) << np.minimum(kept, whole(width - 1))) - whole(1))
        result: Lanes = np.where(negative, field & mask | ~mask, field & mask).astype(whole)
        return result.view(x.dtype)

    return Operation((f"s{bits}", "u32", "u32"), f"s{bits}", extract)


@_opcode(r"prmt\.b32")
def _permute() -> Operation:
    def permute(low: Lanes, high: Lanes, selector: Lanes) -> Lanes:
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        result = np.zeros(1, np.uint32)
        for byte in range(4):
            nibble = (selector >> np.uint32(4 * byte)) & np.uint32(15)
            chosen = ((both >> (np.uint64(8) * (nibble & 7).astype(np.uint64))) & np.uint64(255)).astype(np.uint32)
            signs = np.where(chosen & 128, np.uint32(255), np.uint32(0))
            result = result | (np.where(nibble & 8, signs, chosen) << np.uint32(8 * byte))
        return result

    return _integers(3, "b32", permute)


# ---- comparisons and selections

_ORDERED: dict[str, Callable[..., Lanes]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Callable[..., Lanes]:
    """Return the comparison of a name. If an operand is NaN, it is false, or true for names that end in u."""
    if name in ("nan", "num"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    unordered = kind.startswith("f") and name.endswith("u")
    compare = _ORDERED[name[:-1] if unordered else name]
    if not kind.startswith("f"):
        return compare
    return lambda x, y: np.where(np.isnan(x) | np.isnan(y), unordered, compare(x, y))


@_opcode(r"setp\.(\w+)(?:\.(and|or|xor))?(\.ftz)?\.(\w+)")
def _compare(name: str, combine: str | None, ftz: str | None, kind: str) -> Operation:
    compare = _comparison(name, kind)
    if ftz:
        ordered = compare
        compare = lambda x, y: ordered(flush(x), flush(y))  # noqa: E731
    if combine is None:
        return Operation((kind, kind), "pred", compare)
    return Operation((kind, kind, "pred"), "pred", lambda x, y, p: _LOGIC[combine](compare(x, y), p))


@_opcode(r"selp\.(\w+)")
def _select(kind: str) -> Operation:
    def select(x: Lanes, y: Lanes, chosen: Lanes) -> Lanes:
        return np.where(chosen, x, y)

    return Operation((kind, kind, "pred"), kind, select)


@_opcode(r"(?:mov|cvta(?:\.to)?\.(?:global|shared))\.(\w+)")
def _move(kind: str) -> Operation:
    return Operation((kind,), kind, lambda x: x)


# ---- conversions


def to_bfloat16(x: Lanes) -> Lanes:
    """Bits of float32 rounded to the nearest bfloat16, ties to even; 0x7fff for NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16(bits: Lanes) -> Lanes:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _half(x: Lanes, kind: str) -> Lanes:
    """The 16 bits of a float32 as ``kind``."""
    return to_bfloat16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


@_opcode(r"cvt\.rn\.(bf16|f16)x2\.f32")
def _pack(kind: str) -> Operation:
    def pack(high: Lanes, low: Lanes) -> Lanes:
        return (_half(high, kind).astype(np.uint32) << np.uint32(16)) | _half(low, kind)

    return Operation(("f32", "f32"), "b32", pack)


@_opcode(r"cvt(?:\.rn)?\.(bf16|f16|f32|f64)\.(bf16|f16|f32|f64)")
def _convert_float(to: str, of: str) -> Operation:
    def convert(x: Lanes) -> Lanes:
        wide = from_bfloat16(x) if of == "bf16" else x
        return _half(wide.astype(np.float32), to) if to in ("bf16", "f16") else wide.astype(dtype(to))

    return Operation((of,), "b16" if to in ("bf16", "f16") else to, convert)


@_opcode(r"cvt\.rn\.(f32|f64)\.([su](?:8|16|32|64))")
@_opcode(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _convert_integer(to: str, of: str) -> Operation:
    return Operation((of,), to, lambda x: x.astype(dtype(to)))


@_opcode(r"cvt\.(rzi|rni|rmi|rpi)(\.ftz)?\.([su](?:16|32|64))\.(f32|f64)")
def _convert_to_integer(rounding: str, ftz: str | None, to: str, of: str) -> Operation:
    """Rounded and clamped to the range; NaN becomes 0."""
    towards = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    limits = np.iinfo(dtype(to))

    def convert(x: Lanes) -> Lanes:
        whole = np.nan_to_num(towards(flush(x) if ftz else x).astype(np.float64), nan=0.0)
        inside = (whole >= limits.min) & (whole < float(limits.max) + 1.0)
        clamped = np.where(whole < 0, limits.min, limits.max).astype(dtype(to))
        return np.where(inside, np.where(inside, whole, 0.0).astype(dtype(to)), clamped)

    return Operation((of,), to, convert)


@_opcode(r"cvt\.(rzi|rni|rmi|rpi)(\.ftz)?\.(f32|f64)\.(f32|f64)")
def _round(rounding: str, ftz: str | None, to: str, of: str) -> Operation:
    towards = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    return Operation((of,), to, lambda x: towards(flush(x) if ftz else x).astype(dtype(to)))
