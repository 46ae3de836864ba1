"""A kernel that is nothing but a divergence: a file of its own, since Triton reads the source of what it compiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(log_q, log_p, value, slope, a, b, FUNCTION: tl.constexpr):
    at = tl.arange(0, 256)
    _q, v, s = FUNCTION(tl.load(log_q + at), tl.load(log_p + at), a, b)
    tl.store(value + at, v)
    tl.store(slope + at, s)
