"""Save and load the state of a row between stages. See rows.STATE."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import STATE

SOFTMAX = tl.constexpr(0)
MEAN = tl.constexpr(1)
NONE = tl.constexpr(2)
"""Quantity that is subtracted from the logits of a row: ``Divergence.normalizer``."""

TOP_S = tl.constexpr(STATE.index("top_s"))
EXPSUM_S = tl.constexpr(STATE.index("expsum_s"))
TOP_T = tl.constexpr(STATE.index("top_t"))
EXPSUM_T = tl.constexpr(STATE.index("expsum_t"))
EXPSUM_ONE = tl.constexpr(STATE.index("expsum_one"))
TARGET = tl.constexpr(STATE.index("target"))
MEAN_S = tl.constexpr(STATE.index("mean_s"))
MEAN_T = tl.constexpr(STATE.index("mean_t"))
COLUMNS = tl.constexpr(STATE.index("columns"))
BEST_S = tl.constexpr(STATE.index("best_s"))
BEST_T = tl.constexpr(STATE.index("best_t"))
FIRST_SUM = tl.constexpr(STATE.index("sum_0"))


@triton.jit
def save_normalisers(state, stride, row_state, NORMALIZER: tl.constexpr, CE: tl.constexpr, STATS: tl.constexpr):
    exponentials, target, centres = row_state
    if NORMALIZER == SOFTMAX or CE or STATS:
        tl.store(state + TOP_S * stride, exponentials[0])
        tl.store(state + EXPSUM_S * stride, exponentials[1])
        tl.store(state + TOP_T * stride, exponentials[2])
        tl.store(state + EXPSUM_T * stride, exponentials[3])
    if CE:
        tl.store(state + EXPSUM_ONE * stride, exponentials[4])
        tl.store(state + TARGET * stride, target)
    if NORMALIZER == MEAN:
        tl.store(state + MEAN_S * stride, centres[0])
        tl.store(state + MEAN_T * stride, centres[1])
        tl.store(state + COLUMNS * stride, centres[2])


@triton.jit
def load_normalisers(state, stride, NORMALIZER: tl.constexpr, CE: tl.constexpr, STATS: tl.constexpr):
    """Load the normalisers that an earlier launch saved."""
    top_s = 0.0
    expsum_s = 0.0
    top_t = 0.0
    expsum_t = 0.0
    if NORMALIZER == SOFTMAX or CE or STATS:
        top_s = tl.load(state + TOP_S * stride)
    if NORMALIZER == SOFTMAX or STATS:
        expsum_s = tl.load(state + EXPSUM_S * stride)
        top_t = tl.load(state + TOP_T * stride)
        expsum_t = tl.load(state + EXPSUM_T * stride)
    expsum_one = 0.0
    target = 0.0
    if CE:
        expsum_one = tl.load(state + EXPSUM_ONE * stride)
        target = tl.load(state + TARGET * stride)
    centres = (0.0, 0.0, 0.0)
    if NORMALIZER == MEAN:
        centres = (tl.load(state + MEAN_S * stride), tl.load(state + MEAN_T * stride), 0.0)
    return (top_s, expsum_s, top_t, expsum_t, expsum_one), target, centres


@triton.jit
def save_sums(state, stride, sums):
    for i in tl.static_range(len(sums)):
        tl.store(state + (FIRST_SUM + i) * stride, sums[i])


@triton.jit
def load_sums(state, stride, NUM_SUMS: tl.constexpr):
    sums = ()
    for i in tl.static_range(NUM_SUMS):
        sums += (tl.load(state + (FIRST_SUM + i) * stride),)
    return sums


@triton.jit
def save_statistics(stats, stride, state, state_stride, value, cross_entropy, more):
    tl.store(stats, value)
    tl.store(stats + stride, cross_entropy)
    tl.store(stats + 2 * stride, more[0])
    tl.store(stats + 3 * stride, more[1])
    tl.store(stats + 4 * stride, tl.where(more[2] == more[3], 1.0, 0.0))
    tl.store(state + BEST_S * state_stride, more[2])
    tl.store(state + BEST_T * state_stride, more[3])
