"""Random calls of the CPU kernels of one side, as fuzz.py makes them for those of two: log-sum-exp, entropy, log-probabilities at ids,
their gradient, the largest, draws; softmax and its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

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
    Tensor,
    compare,
    gradient_rows,
    read,
    rounded,
    shapes,
    stored,
)  # fmt: skip
from hypothesis import strategies as st

KIND = st.sampled_from([F32, F32, BF16, F16, F64])


@dataclass(frozen=True)
class Head:
    """One call of ``cpu_head_rows``."""

    rows: int
    vocab: int
    dtype: int
    padding: tuple[int, int]
    at_end: bool
    temperature: float
    scale: float
    softcap: float
    bias: bool
    entropy: bool
    num_ids: int
    upstream: tuple[bool, bool, bool]  # of log-sum-exp, entropy, log-probabilities
    gradient: Literal["none", "own", "in place", "again", "again in place"]
    dz_dtype: int
    dz_scale: float
    num_top: int
    num_draws: int
    spread: float
    ties: bool
    specials: tuple[tuple[int, int, float], ...]  # row, column, value
    threads: int
    isa: int
    numbers: int


@st.composite
def heads(draw: st.DrawFn) -> Head:
    rows, vocab = draw(shapes())
    special = st.tuples(st.integers(0, rows - 1), st.integers(0, vocab - 1), st.sampled_from(SPECIAL))
    return Head(
        rows=rows, vocab=vocab, dtype=draw(KIND), padding=draw(st.tuples(st.integers(0, 9), st.integers(0, 9))), at_end=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 2.0, 0.7])), scale=draw(st.sampled_from([1.0, 1.0, 0.0625, 2.5])),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.0, 30.0, 5.0])), bias=draw(st.sampled_from([False, False, True])),
        entropy=draw(st.booleans()),
        num_ids=draw(st.sampled_from([0, 1, 2, 17])), upstream=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        gradient=draw(st.sampled_from(["none", "own", "in place", "again", "again in place"])), dz_dtype=draw(KIND),
        dz_scale=draw(st.sampled_from([1.0, 256.0])), num_top=draw(st.sampled_from([0, 0, 1, 33, vocab - 1, vocab])) % (vocab + 1),
        num_draws=draw(st.sampled_from([0, 0, 1, 3])), spread=draw(st.sampled_from([0.1, 2.0, 8.0, 60.0])), ties=draw(st.booleans()),
        specials=tuple(draw(st.lists(special, max_size=5))), threads=draw(st.integers(1, 4)), isa=draw(st.integers(0, 2)),
        numbers=draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def run_heads(kernels: ModuleType, memory: Heap | Guarded, case: Head) -> None:
    """Builds the tensors, calls the kernel, looks for damage, and compares."""
    rng = np.random.default_rng(case.numbers)
    shape = (case.rows, case.vocab)
    double = case.dtype == F64
    compute, wide = (np.float64, np.longdouble) if double else (np.float32, np.float64)
    logits = rng.normal(size=shape) * case.spread
    if case.ties:
        logits = np.round(logits)
    for row, column, value in case.specials:
        logits[row, column] = value
    call = Call(memory, case.at_end)
    item = np.dtype(STORED[case.dtype]).itemsize
    in_place = case.gradient.endswith("in place")
    dz_dtype = case.dz_dtype if not in_place or np.dtype(STORED[case.dz_dtype]).itemsize <= item else case.dtype
    ratio = item // np.dtype(STORED[dz_dtype]).itemsize if in_place else 1

    def per_row(values: np.ndarray | None = None, columns: int = 1) -> Tensor:
        return call.tensor(compute, None if values is None else values.reshape(case.rows, columns), case.rows, columns)

    arguments = kernels.HeadArguments()
    with np.errstate(all="ignore"):
        z = call.tensor(STORED[case.dtype], stored(logits, case.dtype), *shape, case.vocab + case.padding[0])
        bias = call.tensor(compute, rng.normal(size=case.vocab), 1, case.vocab) if case.bias else None
        exact = truth.Side(read(z.array.copy(), case.dtype, wide), bias.array[0].astype(wide) if bias else None, case.scale, case.softcap)
    side = kernels.Side()
    side.logits, side.stride, side.dtype, side.bias = z.address, z.stride, case.dtype, bias.address if bias else 0
    side.scale, side.softcap = case.scale, case.softcap
    arguments.side, arguments.rows, arguments.vocab = side, *shape
    arguments.inv_temperature, arguments.double_precision, arguments.dz_scale = 1 / case.temperature, double, case.dz_scale
    top, log_sum, entropy = per_row(), per_row(), per_row() if case.entropy else None
    arguments.top, arguments.log_sum, arguments.entropy = top.address, log_sum.address, entropy.address if entropy else 0
    ids = logprobs = d_logprobs = None
    if case.num_ids:
        ids = call.tensor(np.int64, rng.integers(-1, case.vocab, size=(case.rows, case.num_ids)), case.rows, case.num_ids)
        logprobs = per_row(columns=case.num_ids)
        if case.upstream[2]:
            d_logprobs = per_row(rng.normal(size=(case.rows, case.num_ids)), case.num_ids)
        arguments.ids, arguments.num_ids, arguments.logprobs = ids.address, case.num_ids, logprobs.address
    d_lse = per_row(rng.normal(size=case.rows)) if case.upstream[0] else None
    d_entropy = per_row(rng.normal(size=case.rows)) if case.upstream[1] and entropy else None
    for name, t in (("d_lse", d_lse), ("d_entropy", d_entropy), ("d_logprobs", d_logprobs)):
        setattr(arguments, name, t.address if t else 0)
    top_ids = top_logprobs = draws = None
    if case.num_top:
        top_ids, top_logprobs = call.tensor(np.int32, None, case.rows, case.num_top), per_row(columns=case.num_top)
        arguments.num_top, arguments.top_ids, arguments.top_logprobs = case.num_top, top_ids.address, top_logprobs.address
    if case.num_draws:
        draws = call.tensor(np.int32, None, case.rows, case.num_draws)
        arguments.num_draws, arguments.draws, arguments.seed, arguments.first_row = (
            case.num_draws,
            draws.address,
            case.numbers,
            case.numbers << 9,
        )
    dz = None
    if case.gradient != "none":
        dz = z if in_place else call.tensor(STORED[dz_dtype], None, *shape, case.vocab + case.padding[1])
    arguments.dz_dtype = dz_dtype
    isa = kernels.cpu_isas()[case.isa % len(kernels.cpu_isas())]

    call.seal()
    passes = [True, False] if case.gradient.startswith("again") else [True]
    for statistics in passes:
        writes = dz is not None and statistics == (len(passes) == 1)
        arguments.statistics = statistics
        arguments.dz, arguments.dz_stride = (dz.address, dz.stride * ratio) if writes and dz else (0, 0)
        if not statistics:  # the largest and draws are of the first pass
            arguments.num_top = arguments.num_draws = 0
        kernels.cpu_head_rows(arguments, case.threads, isa)
    call.open()

    def wide_of(t: Tensor | None) -> np.ndarray | None:
        return None if t is None else t.array.astype(wide)

    expected = truth.head_rows(
        truth.HeadRows(
            exact, case.temperature, ids.array if ids else None, wide_of(d_lse), wide_of(d_entropy), wide_of(d_logprobs), case.dz_scale,
            np.finfo(compute).eps, case.ties,
        )
    )  # fmt: skip
    results = [("top", top.array.astype(wide), expected.top), ("log_sum", log_sum.array.astype(wide), expected.log_sum)]
    if entropy:
        results.append(("entropy", entropy.array.astype(wide), expected.entropy))
    if logprobs:
        results.append(("logprobs", logprobs.array.astype(wide), expected.logprobs))
    if dz:
        results.append(("dz", read(gradient_rows(dz, dz_dtype, shape), dz_dtype, wide), rounded(expected.dz, dz_dtype)))
    if top_ids and top_logprobs:
        results += [
            (name, got, answer)
            for name, got, answer in zip(
                ("largest", "top_logprobs"), (top_ids.array, top_logprobs.array.astype(wide)),
                expected.largest(top_ids.array), strict=True,
            )
        ]  # fmt: skip
    if draws:
        results.append(("draws", draws.array, expected.possible(draws.array)))
    compare(results, isa)
    TALLY["rows"] += case.rows
    TALLY["calls"] += 1
    TALLY["losses compared"] += int(np.isfinite(expected.log_sum.bound).sum())
    TALLY["gradients compared"] += int(np.isfinite(expected.dz.bound).all(-1).sum()) if dz else 0
    call.free()


@dataclass(frozen=True)
class Softmax:
    """One call of ``cpu_softmax_rows``; ``out``: memory of its own, or an input's."""

    rows: int
    vocab: int
    dtype: int
    padding: tuple[int, int, int]
    at_end: bool
    temperature: float
    logarithm: bool
    backward: bool
    out: Literal["own", "x", "dy"]
    spread: float
    specials: tuple[tuple[int, int, float], ...]
    threads: int
    isa: int
    numbers: int


@st.composite
def softmaxes(draw: st.DrawFn) -> Softmax:
    rows, vocab = draw(shapes())
    special = st.tuples(st.integers(0, rows - 1), st.integers(0, vocab - 1), st.sampled_from(SPECIAL))
    backward = draw(st.booleans())
    return Softmax(
        rows=rows, vocab=vocab, dtype=draw(KIND), padding=draw(st.tuples(*3 * [st.integers(0, 9)])), at_end=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 2.0, 0.7])), logarithm=draw(st.booleans()), backward=backward,
        out=draw(st.sampled_from(["own", "x", "dy"] if backward else ["own", "x"])), spread=draw(st.sampled_from([0.1, 2.0, 8.0])),
        specials=tuple(draw(st.lists(special, max_size=5))), threads=draw(st.integers(1, 4)), isa=draw(st.integers(0, 2)),
        numbers=draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


def run_softmax(kernels: ModuleType, memory: Heap | Guarded, case: Softmax) -> None:
    """As ``run_heads``. The gradient is taken at a softmax that has been rounded to its type, as callers have it."""
    rng = np.random.default_rng(case.numbers)
    shape = (case.rows, case.vocab)
    double = case.dtype == F64
    compute, wide = (np.float64, np.longdouble) if double else (np.float32, np.float64)
    logits = rng.normal(size=shape) * case.spread
    for row, column, value in case.specials:
        logits[row, column] = value
    call = Call(memory, case.at_end)
    with np.errstate(all="ignore"):
        given = truth.softmax(logits.astype(wide), 1.0, case.logarithm, 0.0).value if case.backward else logits
        x = call.tensor(STORED[case.dtype], stored(given, case.dtype), *shape, case.vocab + case.padding[0])
        exact = read(x.array.copy(), case.dtype, wide)
    dy = upstream = None
    if case.backward:
        dy = call.tensor(STORED[case.dtype], stored(rng.normal(size=shape), case.dtype), *shape, case.vocab + case.padding[1])
        upstream = read(dy.array.copy(), case.dtype, wide)
    out = {"x": x, "dy": dy}.get(case.out) or call.tensor(STORED[case.dtype], None, *shape, case.vocab + case.padding[2])

    arguments = kernels.SoftmaxArguments()
    for name, t in (("x", x), ("dy", dy)):
        if t:
            side = kernels.Side()
            side.logits, side.stride, side.dtype, side.bias = t.address, t.stride, case.dtype, 0
            setattr(arguments, name, side)
    arguments.out, arguments.out_stride, arguments.out_dtype = out.address, out.stride, case.dtype
    arguments.rows, arguments.vocab, arguments.inv_temperature = *shape, 1 / case.temperature
    arguments.logarithm, arguments.backward, arguments.double_precision = case.logarithm, case.backward, double
    isa = kernels.cpu_isas()[case.isa % len(kernels.cpu_isas())]
    call.seal()
    kernels.cpu_softmax_rows(arguments, case.threads, isa)
    call.open()

    eps = float(np.finfo(compute).eps)
    if upstream is None:
        expected = truth.softmax(exact, case.temperature, case.logarithm, eps)
    else:
        expected = truth.softmax_gradient(exact, upstream, case.temperature, case.logarithm, eps)
    compare([("softmax", read(out.array, case.dtype, wide), rounded(expected, case.dtype))], isa)
    TALLY["rows"] += case.rows
    TALLY["calls"] += 1
    call.free()
