"""Global and shared memory in which every access is checked.

An access must be aligned and inside what the kernel was given. Two warps must not touch the same bytes, one of them writing something
else than what is there, unless a barrier of their CTA lies between: that is a race, whatever the order in which the warps happen to run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .opcodes import RAW

Index = npt.NDArray[np.int64]
GUARD = 512
"""Bytes that belong to nobody, around every allocation."""
_GRAIN = 2
"""Bytes of which one record of the last accesses is kept."""
_SHARED_BY_ALL = -2
_MAX_WARPS = 64
_SEVERAL = _MAX_WARPS - 1
"""In the place of a warp's number: several warps of the CTA."""


class MemoryFault(AssertionError):
    """A misaligned access, one out of bounds, or a race."""


class Memory:
    """Bytes with the right to use them, and who used them last.

    Args:
        size: bytes, all poisoned with ones (NaN in every format) and out of bounds until ``allow``.
        name: for messages.
    """

    def __init__(self, size: int, name: str) -> None:
        size = -(-size // 64) * 64
        self.name = name
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.allowed = np.zeros(size, bool)
        self._views = {bits // 8: self.bytes.view(RAW[bits]) for bits in (8, 16, 32, 64)}
        records = size // _GRAIN
        # Numbers of the last warp that wrote and read, with the epoch (the barriers its CTA had passed); -1: nobody.
        self._writer, self._reader = np.full(records, -1, np.int32), np.full(records, -1, np.int32)
        self._written, self._read = np.zeros(records, np.int32), np.zeros(records, np.int32)

    def check(self, at: Index, size: int, opcode: str) -> None:
        """Insist on addresses of ``size`` bytes that are aligned to as many and inside what is allowed."""
        if (at % size).any():
            raise MemoryFault(f"{opcode}: {self.name} address {at[at % size != 0][0]} is not a multiple of {size}")
        inside = (at >= 0) & (at + size <= len(self.bytes))
        if inside.all():
            inside = self.allowed[at] & self.allowed[at + (size - 1)]
        if not inside.all():
            raise MemoryFault(f"{opcode}: {self.name} address {at[~inside][0]} ({size} bytes) is out of bounds")

    def load(self, at: Index, width: int, count: int, warps: Index, epochs: Index, opcode: str) -> list[npt.NDArray[Any]]:
        """``count`` consecutive values of ``width`` bytes at each address."""
        self.check(at, width * count, opcode)
        grains = _grains(at, width * count)
        who, when = warps[:, None], epochs[:, None]
        if (conflict := _conflicts(self._writer[grains], self._written[grains], who, when)).any():
            raise MemoryFault(f"{opcode}: race: {self.name} bytes at {at[conflict.any(1)][0]} were written by another warp")
        before = self._reader[grains]
        alone = (before < 0) & (before != _SHARED_BY_ALL) | (before == who)
        same_cta = before // _MAX_WARPS == who // _MAX_WARPS
        several = np.where(self._read[grains] == when, who // _MAX_WARPS * _MAX_WARPS + _SEVERAL, who)
        self._reader[grains] = np.where(alone, who, np.where(same_cta, several, _SHARED_BY_ALL))
        self._read[grains] = when
        first = at // width
        return [self._views[width][first + k] for k in range(count)]

    def store(self, at: Index, values: list[npt.NDArray[Any]], warps: Index, epochs: Index, opcode: str) -> None:
        """Write consecutive values at each address."""
        width = values[0].itemsize
        self.check(at, width * len(values), opcode)
        first, view = at // width, self._views[width]
        changed = np.zeros(len(at), bool)
        for k, value in enumerate(values):
            changed |= view[first + k] != value
        at, warps, epochs = at[changed], warps[changed], epochs[changed]
        grains = _grains(at, width * len(values))
        who, when = warps[:, None], epochs[:, None]
        conflict = _conflicts(self._writer[grains], self._written[grains], who, when)
        conflict |= _conflicts(self._reader[grains], self._read[grains], who, when)
        if conflict.any():
            raise MemoryFault(f"{opcode}: race: {self.name} bytes at {at[conflict.any(1)][0]} were used by another warp")
        self._writer[grains], self._written[grains] = who, when
        for k, value in enumerate(values):
            view[first + k] = value


def _grains(at: Index, size: int) -> Index:
    """``[lanes, records]`` of an access."""
    return at[:, None] // _GRAIN + np.arange(max(1, size // _GRAIN))


def _conflicts(owner: npt.NDArray[Any], epoch: npt.NDArray[Any], warp: Index, now: Index) -> npt.NDArray[np.bool_]:
    """Return True for each ``owner`` that no barrier separates from ``warp``: another warp of the same CTA and epoch, or of another CTA."""
    unordered = (owner // _MAX_WARPS != warp // _MAX_WARPS) | (epoch == now)
    conflicts: npt.NDArray[np.bool_] = (owner != -1) & (owner != warp) & unordered
    return conflicts
