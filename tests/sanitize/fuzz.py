"""Random calls of the CPU kernels, on memory that ends where the tensors end, held against float64 and float128.

    python fuzz.py EXTENSION --memory asan|guard [--rows 100000] [--seed 0]

EXTENSION is a built ``_C``; torch and kdkernels are not imported. Two kinds of memory:

- ``asan``: for a build with -fsanitize=address, libasan preloaded. Every tensor is a malloc of its own of exactly its size, and the gaps
  between its rows are poisoned, so one element read or written outside of a row ends the run with a report.
- ``guard``: for the extension as it is released, whose vector instructions AddressSanitizer's build does not have. Every tensor ends
  (or starts) at a page that cannot be touched: the same mistakes end with SIGSEGV.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.machinery
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import fuzz_heads
import fuzz_product
import numpy as np
import truth
from calls import (
    BF16,
    F16,
    F32,
    F64,
    SPECIAL,
    STORED,
    TALLY,
    Call,
    Guarded,
    Heap,
    compare,
    gradient_rows,
    read,
    rounded,
    shapes,
    stored,
)  # fmt: skip
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

STATE_ROWS = 15
NORMALISERS, SUMS, GRADIENT = 1, 2, 4
GRADIENTS = ("none", "own", "in place", "again", "again in place", "apart", "apart in place")
STAGES = {
    "none": [NORMALISERS | SUMS], "again": [NORMALISERS | SUMS, SUMS | GRADIENT], "apart": [NORMALISERS, SUMS, GRADIENT],
}  # fmt: skip
"""The calls of a case, by the first word of its ``gradient``; all stages in one call by default."""


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


# A divergence with one parameter is given 1 minus it as the second.
DIVERGENCES = [
    (truth.FORWARD_KL, 0.0, 0.0), (truth.REVERSE_KL, 0.0, 0.0), (truth.SYMMETRIC_KL, 0.5, 0.5), (truth.SYMMETRIC_KL, 0.9, 1 - 0.9),
    (truth.JSD, 0.5, 0.5), (truth.JSD, 0.001, 1 - 0.001), (truth.SKEW_KL, 0.1, 1 - 0.1), (truth.SKEW_REVERSE_KL, 0.1, 1 - 0.1),
    (truth.TOTAL_VARIATION, 0.0, 0.0), (truth.ALPHA, 0.5, 0.5), (truth.ALPHA, 2.0, -1.0), (truth.ALPHA, -0.5, 1.5),
    (truth.AB, 0.2, 0.7), (truth.AB, 1.0, 1.0), (truth.AB, 0.8, -0.3), (truth.LOGIT_MSE, 0.0, 0.0), (truth.LOGIT_MSE, 1.0, 0.0),
]  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, vocab = draw(shapes())
    pair, kind = st.tuples(st.booleans(), st.booleans()), st.sampled_from([F32, F32, BF16, F16, F64])
    special = st.tuples(st.integers(0, 2), st.integers(0, rows - 1), st.integers(0, vocab - 1), st.sampled_from(SPECIAL))
    softcap, scale = st.sampled_from([0.0, 0.0, 30.0, 5.0]), st.sampled_from([1.0, 1.0, 0.0625, 2.5])
    return Case(
        rows=rows, vocab=vocab, dtypes=draw(st.tuples(kind, kind)), padding=draw(st.tuples(st.integers(0, 9), st.integers(0, 9))),
        at_end=draw(st.booleans()), divergence=draw(st.sampled_from(DIVERGENCES)), temperature=draw(st.sampled_from([1.0, 2.0, 0.7, 9.0])),
        value_scale=draw(st.sampled_from([1.0, 4.0, 0.0, 0.3])), slope_scale=draw(st.sampled_from([1.0, 2.0, 0.0])),
        scales=draw(st.tuples(scale, scale)), softcaps=draw(st.tuples(softcap, softcap)), bias=draw(pair),
        ce_weight=draw(st.sampled_from([0.0, 0.5, 1.0])), labels=draw(st.booleans()), weight=draw(st.booleans()), stats=draw(st.booleans()),
        gradient=draw(st.sampled_from(GRADIENTS)), dz_dtype=draw(kind),
        dz_scale=draw(st.sampled_from([1.0, 256.0])), spread=draw(st.sampled_from([0.1, 2.0, 8.0, 60.0])),
        near=draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0])), specials=tuple(draw(st.lists(special, max_size=5))),
        threads=draw(st.integers(1, 4)), isa=draw(st.integers(0, 2)), numbers=draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def run_rows(kernels: ModuleType, memory: Heap | Guarded, case: Case) -> None:
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
    call = Call(memory, case.at_end)
    tensor = call.tensor
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
    arguments.inv_temperature, arguments.value_scale, arguments.slope_scale = 1 / case.temperature, case.value_scale, case.slope_scale
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

    call.seal()
    if dz:
        arguments.dz, arguments.dz_stride = dz.address, dz.stride * ratio
    for stages in STAGES.get(case.gradient.split()[0], [NORMALISERS | SUMS | GRADIENT]):
        arguments.stages = stages
        kernels.cpu_rows(arguments, case.threads, isas[case.isa % len(isas)])
    call.open()

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
        results.append(("dz", read(gradient_rows(dz, dz_dtype, shape), dz_dtype, wide), rounded(expected.dz, dz_dtype)))
    compare(results, isas[case.isa % len(isas)])
    TALLY["rows"] += case.rows
    TALLY["calls"] += 1
    TALLY["losses compared"] += int(np.isfinite(expected.loss.bound).sum())
    TALLY["gradients compared"] += int(np.isfinite(expected.dz.bound).all(-1).sum()) if dz else 0
    call.free()


def fuzz(strategy: st.SearchStrategy[Any], run: Callable[[Any], None], examples: int, number: int) -> None:
    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def batch(case: Any) -> None:
        run(case)

    batch()


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

    kinds: list[tuple[st.SearchStrategy[Any], Callable[..., None], int]] = [
        (cases(), run_rows, 100), (fuzz_heads.heads(), fuzz_heads.run_heads, 100), (fuzz_heads.softmaxes(), fuzz_heads.run_softmax, 30),
    ]  # fmt: skip
    if kernels.cpu_has_product():
        kinds.append((fuzz_product.products(), fuzz_product.run_product, 30))
    batch = 0
    while TALLY["rows"] < options.rows:
        for strategy, run, examples in kinds:
            fuzz(strategy, partial(run, kernels, memory), examples, options.seed + batch)
        batch += 1
    print(f"{options.memory}: " + ", ".join(f"{count} {name}" for name, count in TALLY.items()))


if __name__ == "__main__":
    main()
