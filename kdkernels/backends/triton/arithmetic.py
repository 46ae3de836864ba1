"""Elementary functions of the Triton kernels, in units of log 2: GPUs have ``2 ** x`` and ``log2(x)`` in hardware."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # the value when the kernels were decorated

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the most negative finite float32
NEGLIGIBLE = tl.constexpr(-256.0)  # 2 ** -256 is 0 in float32
_NUMPY = tl.constexpr(INTERPRETED)
FAST_LOG2 = tl.constexpr(not INTERPRETED and torch.version.hip is None)
"""``lg2.approx`` is a single instruction that only NVIDIA has. Within [0.5, 2] its absolute error is up to 2**-22, even near log2(1)."""


@triton.jit
def fast_log2(x):
    if FAST_LOG2:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def at_least(x, low):
    """Return ``max(x, low)``, and ``low`` where x is NaN. This is a GPU's maximum; numpy's returns NaN."""
    if _NUMPY:
        x = tl.where(x != x, low, x)
    return tl.maximum(x, low)


@triton.jit
def exp2m1(x):
    """Return ``2 ** x - 1``. Near 0, where the subtraction would lose digits, a series with an error of 2e-8."""
    t = x * LN2
    series = t * (1.0 + t * (0.5 + t * (0.16666667 + t * (0.041666668 + t * (0.008333334 + t * 0.0013888889)))))
    return tl.where(tl.abs(x) < 0.36, series, tl.exp2(x) - 1.0)
