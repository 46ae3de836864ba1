"""Random calls of the product of bfloat16 operands, as fuzz.py makes them for the row kernels."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import truth
from calls import BF16, TALLY, Call, Guarded, Heap, compare, read, stored
from hypothesis import strategies as st


@dataclass(frozen=True)
class Product:
    """One call of ``cpu_product``."""

    rows: int
    columns: int
    depth: int
    padding: tuple[int, int, int]  # of both operands and the result
    at_end: bool
    spread: float
    threads: int
    numbers: int


@st.composite
def products(draw: st.DrawFn) -> Product:
    """Tiles have 8 rows by 48 columns, panels 2048 numbers."""
    depth = draw(st.integers(1, 70) | st.sampled_from([1023, 1024, 1025, 1030, 2051])) * 2
    return Product(
        rows=draw(st.integers(1, 40)), columns=draw(st.integers(1, 200) | st.sampled_from([47, 48, 49, 96, 97])), depth=depth,
        padding=draw(st.tuples(*3 * [st.integers(0, 9)])), at_end=draw(st.booleans()), spread=draw(st.sampled_from([1.0, 1e-3, 1e4])),
        threads=draw(st.integers(1, 4)), numbers=draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def run_product(kernels: ModuleType, memory: Heap | Guarded, case: Product) -> None:
    """Builds the tensors, calls the kernel, looks for damage, and compares."""
    rng = np.random.default_rng(case.numbers)
    call = Call(memory, case.at_end)
    a, b = (
        call.tensor(np.uint16, stored(rng.normal(size=(rows, case.depth)) * case.spread, BF16), rows, case.depth, case.depth + padding)
        for rows, padding in zip((case.rows, case.columns), case.padding, strict=False)
    )
    out = call.tensor(np.float32, None, case.rows, case.columns, case.columns + case.padding[2])
    call.seal()
    kernels.cpu_product(
        a.address, b.address, out.address, case.rows, case.columns, case.depth, a.stride, b.stride, out.stride, case.threads
    )
    call.open()

    exact_a, exact_b = read(a.array, BF16, np.float64), read(b.array, BF16, np.float64)
    # Pairs are added to float32 one after another.
    bound = np.abs(exact_a) @ np.abs(exact_b).T * 2.0**-23 * case.depth**0.5
    compare([("product", out.array.astype(np.float64), truth.Answer(exact_a @ exact_b.T, bound))], "AVX-512 BF16")
    TALLY["products"] += 1
    call.free()
