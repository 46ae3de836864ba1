"""A kernel that computes only a divergence, in its own file since Triton reads the source of jit functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(
    log_q, log_p, value, slope, gradient, coefficient, scale, a, b, TERMS: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    offsets = tl.arange(0, 256)
    log_q = tl.load(log_q + offsets)
    log_p = tl.load(log_p + offsets)
    _q, s, sums = TERMS(log_q, log_p, a, b)
    tl.store(value + offsets, sums[0])
    tl.store(slope + offsets, s)
    if GRADIENT is not None:
        tl.store(gradient + offsets, GRADIENT(log_q, log_p, coefficient, scale, a, b))
