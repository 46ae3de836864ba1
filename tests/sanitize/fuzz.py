"""Random calls of the CPU row kernels, on memory that ends where the tensors end, held against float64 and float128.

    python fuzz.py EXTENSION --memory asan|guard [--rows 100000] [--seed 0]

EXTENSION is a built ``_C``; torch and kdkernels are not imported. Two kinds of memory:

- ``asan``: for a build with -fsanitize=address, libasan preloaded. Every tensor is a malloc of its own of exactly its size, and the gaps
  between its rows are poisoned, so one element read or written outside of a row ends the run with a report.
- ``guard``: for the extension as it is released, whose vector instructions AddressSanitizer's build does not have. Every tensor ends
  (or starts) at a page that cannot be touched: the same mistakes end with SIGSEGV.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import importlib.machinery
import importlib.util
import mmap
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import truth
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

F32, F64, BF16, F16 = range(4)  # csrc/params.h
STORED = {F32: np.float32, F64: np.float64, BF16: np.uint16, F16: np.float16}
EXACT = {F32: 2.0**-24, F64: 2.0**-53, BF16: 2.0**-8, F16: 2.0**-11}  # half a unit in the last place of what is stored
LEAST = {F32: 1e-44, F64: 1e-320, BF16: 1e-40, F16: 6e-8}
STATE_ROWS = 7
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


@dataclass(frozen=True)
class Case:
    """One call. What hypothesis shrinks is here; the bulk of the numbers comes from ``numbers``."""

    rows: int
    vocab: int
    dtypes: tuple[int, int]
    padding: tuple[int, int]
    at_end: bool
    divergence: tuple[int, float, float]
    temperature: float
    value_scale: float
    slope_scale: float
    scales: tuple[float, float]
    softcaps: tuple[float, float]
    bias: tuple[bool, bool]
    ce_weight: float
    labels: bool
    weight: bool
    stats: bool
    gradient: Literal["none", "own", "in place", "again", "again in place"]
    dz_dtype: int
    dz_scale: float
    spread: float
    near: float
    specials: tuple[tuple[int, int, int, float], ...]  # side (2: both), row, column, value
    threads: int
    isa: int
    numbers: int


# The width of vector registers, of blocks of sums, and of scratch rows, give or take one, are where columns get lost.
EDGES = sorted(
    {n + d for n in (16, 32, 64, 128, 256, 1024, 2048, 4096) for d in (-1, 0, 1)} | {1, 2, 3, 5, 7, 8, 50, 127, 1000, 3001, 5000}
)
# A divergence with one parameter is given 1 minus it as the second.
DIVERGENCES = [
    (truth.FORWARD_KL, 0.0, 0.0), (truth.REVERSE_KL, 0.0, 0.0), (truth.SYMMETRIC_KL, 0.5, 0.5), (truth.SYMMETRIC_KL, 0.9, 1 - 0.9),
    (truth.JSD, 0.5, 0.5), (truth.JSD, 0.001, 1 - 0.001), (truth.SKEW_KL, 0.1, 1 - 0.1), (truth.SKEW_REVERSE_KL, 0.1, 1 - 0.1),
    (truth.TOTAL_VARIATION, 0.0, 0.0), (truth.ALPHA, 0.5, 0.5), (truth.ALPHA, 2.0, -1.0), (truth.ALPHA, -0.5, 1.5),
    (truth.AB, 0.2, 0.7), (truth.AB, 1.0, 1.0), (truth.AB, 0.8, -0.3), (truth.LOGIT_MSE, 0.0, 0.0), (truth.LOGIT_MSE, 1.0, 0.0),
]  # fmt: skip
SPECIAL = [-np.inf, np.inf, np.nan, 0.0, -0.0, 6e4, -6e4, 3e38, -3e38, 1e-40, 88.0, -104.0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab = draw(st.sampled_from(EDGES) | st.integers(1, 80) | st.integers(1, 5000))
    rows = draw(st.integers(1, max(1, min(400, 40_000 // vocab))))
    pair, kind = st.tuples(st.booleans(), st.booleans()), st.sampled_from([F32, F32, BF16, F16, F64])
    special = st.tuples(st.integers(0, 2), st.integers(0, rows - 1), st.integers(0, vocab - 1), st.sampled_from(SPECIAL))
    softcap, scale = st.sampled_from([0.0, 0.0, 30.0, 5.0]), st.sampled_from([1.0, 1.0, 0.0625, 2.5])
    return Case(
        rows=rows, vocab=vocab, dtypes=draw(st.tuples(kind, kind)), padding=draw(st.tuples(st.integers(0, 9), st.integers(0, 9))),
        at_end=draw(st.booleans()), divergence=draw(st.sampled_from(DIVERGENCES)), temperature=draw(st.sampled_from([1.0, 2.0, 0.7, 9.0])),
        value_scale=draw(st.sampled_from([1.0, 4.0, 0.0, 0.3])), slope_scale=draw(st.sampled_from([1.0, 2.0, 0.0])),
        scales=draw(st.tuples(scale, scale)), softcaps=draw(st.tuples(softcap, softcap)), bias=draw(pair),
        ce_weight=draw(st.sampled_from([0.0, 0.5, 1.0])), labels=draw(st.booleans()), weight=draw(st.booleans()), stats=draw(st.booleans()),
        gradient=draw(st.sampled_from(["none", "own", "in place", "again", "again in place"])), dz_dtype=draw(kind),
        dz_scale=draw(st.sampled_from([1.0, 256.0])), spread=draw(st.sampled_from([0.1, 2.0, 8.0, 60.0])),
        near=draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0])), specials=tuple(draw(st.lists(special, max_size=5))),
        threads=draw(st.integers(1, 4)), isa=draw(st.integers(0, 2)), numbers=draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def run(kernels: ModuleType, memory: Heap | Guarded, case: Case) -> None:
    """Builds the tensors, calls the kernel, looks for damage, and compares."""
    rng = np.random.default_rng(case.numbers)
    shape = (case.rows, case.vocab)
    double = F64 in case.dtypes
    compute, wide = (np.float64, np.longdouble) if double else (np.float32, np.float64)
    z = rng.normal(size=shape) * case.spread
    logits = (z, z + rng.normal(size=shape) * case.near)
    for side, row, column, value in case.specials:
        for which in (0, 1) if side == 2 else (side,):
            logits[which][row, column] = value
    tensors: list[Tensor] = []

    def tensor(dtype: Any, values: np.ndarray | None, rows: int, columns: int, stride: int | None = None) -> Tensor:
        t = Tensor(memory, dtype, rows, columns, stride, case.at_end)
        if values is not None:
            t.array[:] = values
        tensors.append(t)
        return t

    arguments = kernels.RowArguments()
    sides, exact = [], []
    in_place = case.gradient.endswith("in place")
    dz_dtype = case.dz_dtype
    if in_place and np.dtype(STORED[dz_dtype]).itemsize > np.dtype(STORED[case.dtypes[0]]).itemsize:
        dz_dtype = case.dtypes[0]
    ratio = np.dtype(STORED[case.dtypes[0]]).itemsize // np.dtype(STORED[dz_dtype]).itemsize if in_place else 1
    with np.errstate(all="ignore"):
        for which in (0, 1):
            kind = case.dtypes[which]
            t = tensor(STORED[kind], stored(logits[which], kind), *shape, case.vocab + case.padding[which])
            bias = tensor(compute, rng.normal(size=shape[1]), 1, case.vocab) if case.bias[which] else None
            side = kernels.Side()
            side.logits, side.stride, side.dtype = t.address, t.stride, kind
            side.bias = bias.address if bias else 0
            side.scale, side.softcap = case.scales[which], case.softcaps[which]
            sides.append((side, t))
            bias_exact = bias.array[0].astype(wide) if bias else None
            exact.append(truth.Side(read(t.array.copy(), kind, wide), bias_exact, case.scales[which], case.softcaps[which]))
    arguments.student, arguments.teacher = sides[0][0], sides[1][0]
    arguments.rows, arguments.vocab = shape
    divergence, a, b = case.divergence
    arguments.divergence, arguments.a, arguments.b = divergence, a, b
    arguments.normalizer = 0 if divergence != truth.LOGIT_MSE else 1 if a else 2
    arguments.temperature, arguments.value_scale, arguments.slope_scale = case.temperature, case.value_scale, case.slope_scale
    ce_weight = case.ce_weight if case.labels else 0.0  # without labels it has no meaning
    arguments.ce_weight, arguments.double_precision = ce_weight, double
    labels = tensor(np.int64, rng.integers(case.vocab, size=case.rows), 1, case.rows) if case.labels else None
    weight = tensor(compute, rng.choice([0.0, 1.0, 0.3], size=case.rows), 1, case.rows) if case.weight else None
    state = tensor(compute, None, STATE_ROWS, case.rows, case.rows + case.padding[0])
    loss = tensor(compute, None, 1, case.rows)
    stats = tensor(np.float32, None, 5, case.rows, case.rows + case.padding[1]) if case.stats else None
    arguments.labels, arguments.weight = labels.address if labels else 0, weight.address if weight else 0
    arguments.state, arguments.state_stride, arguments.loss = state.address, state.stride, loss.address
    arguments.stats, arguments.stats_stride = (stats.address, stats.stride) if stats else (0, 0)
    arguments.dz_scale, arguments.dz_dtype = case.dz_scale, dz_dtype
    dz = None
    if case.gradient != "none":
        dz = sides[0][1] if in_place else tensor(STORED[dz_dtype], None, *shape, case.vocab + case.padding[1])
    isas = kernels.cpu_isas()

    for t in tensors:
        t.seal()
    passes = [True, False] if case.gradient.startswith("again") else [True]
    for statistics in passes:
        writes = dz is not None and statistics == (len(passes) == 1)
        arguments.statistics = statistics
        arguments.dz, arguments.dz_stride = (dz.address, dz.stride * ratio) if writes and dz else (0, 0)
        kernels.cpu_rows(arguments, case.threads, isas[case.isa % len(isas)])
    for t in tensors:
        t.open()

    expected = truth.rows(
        truth.Rows(
            exact[0], exact[1], divergence, a, b, case.temperature, case.value_scale, case.slope_scale, ce_weight,
            labels.array[0] if labels else None, weight.array[0].astype(wide) if weight else None, case.dz_scale,
            np.finfo(compute).eps,
        )
    )  # fmt: skip
    results = [("loss", loss.array[0].astype(wide), expected.loss)]
    if stats:
        results += [(f"stats[{i}]", stats.array[i].astype(wide), answer) for i, answer in enumerate(expected.stats)]
    if dz:
        in_rows = np.lib.stride_tricks.as_strided(dz.whole.view(STORED[dz_dtype]), shape, (dz.step, np.dtype(STORED[dz_dtype]).itemsize))
        size = np.where(np.isfinite(expected.dz.value), np.abs(expected.dz.value), 0.0)
        bound = expected.dz.bound + EXACT[dz_dtype] * (size + expected.dz.bound) * 1.01 + LEAST[dz_dtype]
        bound = np.where(size + expected.dz.bound > LARGEST[dz_dtype], np.inf, bound)
        results.append(("dz", read(in_rows, dz_dtype, wide), truth.Answer(expected.dz.value, bound)))
    for name, got, answer in results:
        bad = truth.wrong(got, answer)
        if bad.any():
            where = tuple(int(i[0]) for i in np.nonzero(bad))
            raise AssertionError(
                f"{name}{list(where)}: {got[where]!r}, expected {answer.value[where]!r} within {answer.bound[where]:.1e}; "
                f"{int(bad.sum())} such entries, in {isas[case.isa % len(isas)]}"
            )
    TALLY["rows"] += case.rows
    TALLY["calls"] += 1
    TALLY["losses compared"] += int(np.isfinite(expected.loss.bound).sum())
    TALLY["gradients compared"] += int(np.isfinite(expected.dz.bound).all(-1).sum()) if dz else 0
    for t in tensors:
        t.free()


TALLY = dict.fromkeys(("rows", "calls", "losses compared", "gradients compared"), 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("extension")
    parser.add_argument("--memory", choices=("asan", "guard"), required=True)
    parser.add_argument("--rows", type=int, default=100_000, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()
    loader = importlib.machinery.ExtensionFileLoader("_C", options.extension)
    spec = importlib.util.spec_from_loader("_C", loader)
    assert spec is not None
    kernels = importlib.util.module_from_spec(spec)
    loader.exec_module(kernels)
    memory = Heap() if options.memory == "asan" else Guarded()

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def fuzz(case: Case) -> None:
        run(kernels, memory, case)

    batch = 0
    while TALLY["rows"] < options.rows:
        seed(options.seed + batch)(fuzz)()
        batch += 1
    print(f"{options.memory}: " + ", ".join(f"{count} {name}" for name, count in TALLY.items()))


if __name__ == "__main__":
    main()
