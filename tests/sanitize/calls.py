"""Parts of fuzzed calls: memory that ends with its tensor, storage types, difficult sizes and numbers."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import truth
from hypothesis import strategies as st

F32, F64, BF16, F16 = range(4)  # csrc/params.h
STORED = {F32: np.float32, F64: np.float64, BF16: np.uint16, F16: np.float16}
EXACT = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-8, F16: 2.0**-11}  # half a unit in the last place of what is stored
LEAST = {F32: 1e-44, F64: 1e-320, BF16: 1e-40, F16: 6e-8}
LARGEST = {F32: 3.4e38, F64: 1.7e308, BF16: 3.38e38, F16: 65000.0}


class Heap:
    """A malloc of exactly the bytes; AddressSanitizer surrounds it."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL(None)
        self.c.malloc.restype, self.c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self.c.free.argtypes = [ctypes.c_void_p]
        self.poison, self.unpoison = (getattr(self.c, f"__asan_{what}_memory_region") for what in ("poison", "unpoison"))
        self.poison.argtypes = self.unpoison.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def take(self, size: int, at_end: bool) -> int:
        return self.c.malloc(size)

    def forbid(self, address: int, size: int) -> None:
        self.poison(address, size)

    def allow(self, address: int, size: int) -> None:
        self.unpoison(address, size)

    def give(self, address: int) -> None:
        self.c.free(address)


class Guarded:
    """Pages of its own between two that cannot be touched; the bytes end at the second, or start at the first."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL(None, use_errno=True)
        self.c.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.maps: dict[int, tuple[mmap.mmap, int]] = {}

    def take(self, size: int, at_end: bool) -> int:
        page = mmap.PAGESIZE
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + page + inner):
            if self.c.mprotect(guard, page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        address = start + page + (inner - size if at_end else 0)
        self.maps[address] = (memory, start)
        return address

    def forbid(self, address: int, size: int) -> None: ...

    def allow(self, address: int, size: int) -> None: ...

    def give(self, address: int) -> None:
        self.maps.pop(address)[0].close()


class Tensor:
    """``[rows, columns]`` with ``stride`` elements from row to row; the last row ends where the memory ends."""

    def __init__(self, memory: Heap | Guarded, dtype: Any, rows: int, columns: int, stride: int | None = None, at_end: bool = True) -> None:
        self.memory, self.rows, self.stride = memory, rows, columns if stride is None else stride
        self.item = np.dtype(dtype).itemsize
        self.row_bytes, self.step = columns * self.item, self.stride * self.item
        self.size = ((rows - 1) * self.stride + columns) * self.item
        self.address = memory.take(self.size, at_end)
        whole = np.frombuffer((ctypes.c_char * self.size).from_address(self.address), dtype=dtype)
        whole.view(np.uint8)[:] = 0xA5  # found again in the gaps when the call is over
        self.whole = whole
        self.array = np.lib.stride_tricks.as_strided(whole, (rows, columns), (self.step, self.item))

    def gaps(self) -> list[tuple[int, int]]:
        return [(r * self.step + self.row_bytes, (r + 1) * self.step) for r in range(self.rows - 1)] if self.step > self.row_bytes else []

    def seal(self) -> None:
        for start, stop in self.gaps():
            self.memory.forbid(self.address + start, stop - start)

    def open(self) -> None:
        self.memory.allow(self.address, self.size)
        bytes_ = self.whole.view(np.uint8)
        assert all((bytes_[start:stop] == 0xA5).all() for start, stop in self.gaps()), "written between two rows"

    def free(self) -> None:
        del self.array, self.whole
        self.memory.give(self.address)


def stored(values: np.ndarray, dtype: int) -> np.ndarray:
    """float64 in the storage type; bfloat16 as its bits."""
    if dtype != BF16:
        return values.astype(STORED[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def read(array: np.ndarray, dtype: int, wide: Any) -> np.ndarray:
    return (array.astype(np.uint32) << 16).view(np.float32).astype(wide) if dtype == BF16 else array.astype(wide)


class Call:
    """The tensors of one call."""

    def __init__(self, memory: Heap | Guarded, at_end: bool) -> None:
        self.memory, self.at_end = memory, at_end
        self.tensors: list[Tensor] = []

    def tensor(self, dtype: Any, values: np.ndarray | None, rows: int, columns: int, stride: int | None = None) -> Tensor:
        t = Tensor(self.memory, dtype, rows, columns, stride, self.at_end)
        if values is not None:
            t.array[:] = values
        self.tensors.append(t)
        return t

    def seal(self) -> None:
        for t in self.tensors:
            t.seal()

    def open(self) -> None:
        for t in self.tensors:
            t.open()

    def free(self) -> None:
        for t in self.tensors:
            t.free()


def gradient_rows(dz: Tensor, dtype: int, shape: tuple[int, int]) -> np.ndarray:
    """``[C, V]`` of a type that may be narrower than what the rows were made for."""
    return np.lib.stride_tricks.as_strided(dz.whole.view(STORED[dtype]), shape, (dz.step, np.dtype(STORED[dtype]).itemsize))


def rounded(answer: truth.Answer, dtype: int) -> truth.Answer:
    """With the bound that there is after it has been stored."""
    size = np.where(np.isfinite(answer.value), np.abs(answer.value), 0.0)
    bound = answer.bound + EXACT[dtype] * (size + answer.bound) * 1.01 + LEAST[dtype]
    return truth.Answer(answer.value, np.where(size + answer.bound > LARGEST[dtype], np.inf, bound))


def compare(results: list[tuple[str, np.ndarray, truth.Answer]], isa: str) -> None:
    for name, got, answer in results:
        bad = truth.wrong(got, answer)
        if bad.any():
            where = tuple(int(i[0]) for i in np.nonzero(bad))
            raise AssertionError(
                f"{name}{list(where)}: {got[where]!r}, expected {answer.value[where]!r} within {answer.bound[where]:.1e}; "
                f"{int(bad.sum())} such entries, in {isa}"
            )


# The width of vector registers, of blocks of sums, and of scratch rows, give or take one, are where columns get lost.
EDGES = sorted(
    {n + d for n in (16, 32, 64, 128, 256, 1024, 2048, 4096) for d in (-1, 0, 1)} | {1, 2, 3, 5, 7, 8, 50, 127, 1000, 3001, 5000}
)
SPECIAL = [-np.inf, np.inf, np.nan, 0.0, -0.0, 6e4, -6e4, 3e38, -3e38, 1e-40, 88.0, -104.0]


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int]:
    """Rows and columns."""
    vocab = draw(st.sampled_from(EDGES) | st.integers(1, 80) | st.integers(1, 5000))
    return draw(st.integers(1, max(1, min(400, 40_000 // vocab)))), vocab


TALLY = dict.fromkeys(("rows", "calls", "losses compared", "gradients compared", "products"), 0)
