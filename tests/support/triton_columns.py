"""A kernel that computes only a divergence, in a separate file because Triton reads the source of compiled functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(
    log_q, log_p, value, slope, gradient, coefficient, scale, a, b, TERMS: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, 256)
    log_q = tl.load(log_q + at)
    log_p = tl.load(log_p + at)
    _q, s, sums = TERMS(log_q, log_p, a, b)
    tl.store(value + at, sums[0])
    tl.store(slope + at, s)
    if GRADIENT is not None:
        tl.store(gradient + at, GRADIENT(log_q, log_p, coefficient, scale, a, b))
