"""The divergences as jit functions of a block of columns: counterparts of the ``terms`` in ``kdkernels.divergences``.

Here ``log_q`` and ``log_p`` are base-2 logarithms (for LogitMSE: logits / T), and a and b are the divergence's parameters. Values and
slopes are in natural units, as everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ... import divergences as d
from .arithmetic import LN2, LOG2E, NEGLIGIBLE, at_least, exp2m1, fast_log2

APART = tl.constexpr(d.APART * LOG2E.value)
NEAR = tl.constexpr(0.25)
LIGHT = 0.125
"""The largest weight of q or p in a mixture for which LIGHT_FUNCTIONS are used. They keep the digits of small values, but cost more."""


@triton.jit
def mixture(weight_q, weight_p, log_q, log_p):
    """Return the parts of ``m = weight_q * q + weight_p * p``, relative to the larger of q and p.

    Returns:
        q_larger: ``q > p``; size: ``log2(smaller / larger)``, finite even if one or both are 0; smaller: ``smaller / larger``;
        log_m: ``log2(m / larger)``.
    """
    ratio = log_q - log_p
    q_larger = ratio >= 0.0
    size = at_least(-tl.abs(ratio), NEGLIGIBLE)
    smaller = tl.exp2(size)
    log_m = fast_log2(tl.where(q_larger, weight_q, weight_p) + tl.where(q_larger, weight_p, weight_q) * smaller)
    return q_larger, size, smaller, log_m


@triton.jit
def close_log_m(weight_q, weight_p, q_larger, size, log_m):
    """Return ``log_m`` with full precision even if q and p are close: there a series in ``size``, to the fourth order.

    The rounding error of a logarithm near 1 cancels in a gradient but not in a value.
    """
    both = weight_q * weight_p
    share = tl.where(q_larger, weight_p, weight_q)
    third = tl.where(q_larger, weight_q - weight_p, weight_p - weight_q) * (both * (LN2 * LN2 / 6.0))
    fourth = both * (1.0 - 6.0 * both) * (LN2 * LN2 * LN2 / 24.0)
    series = size * (share + size * (both * (LN2 / 2.0) + size * (third + size * fourth)))
    return tl.where(size > -NEAR, series, log_m)


@triton.jit
def light_mixture(light, log_light, log_heavy):
    """Return the parts of ``m = light * l + (1 - light) * h``, relative to h. ``light`` is at most LIGHT.

    The logarithm has an absolute error near 1, but here a value is as small as ``light`` or its square. So where ``t = m / h - 1`` is
    small, ``log(1 + t)`` is computed as ``t - bend``, with a polynomial for ``bend``.

    Returns:
        size: ``log2(l / h)``, limited to where the result depends on it; t; close: ``t < 1/4``; bend: ``t - log(1 + t)`` if close;
        log_m: ``log2(1 + t)``.
    """
    size = tl.minimum(at_least(log_light - log_heavy, -64.0), 64.0)
    t = light * exp2m1(size)
    close = t < 0.25
    bend = t * t * (0.5 + t * (-0.3333294 + t * (0.2500239 + t * (-0.20080183 + t * (0.16693323 + t * -0.10811102)))))
    log_m = tl.where(close, (t - bend) * LOG2E, fast_log2(1.0 + t))
    return size, t, close, bend, log_m


@triton.jit
def forward_kl(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    value = tl.where(p == 0.0, 0.0, p * (log_p - log_q)) * LN2 + (q - p)
    return q, -p, (value,)


@triton.jit
def reverse_kl(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    slope = tl.where(q == 0.0, 0.0, q * (log_q - log_p))
    return q, slope * LN2, (slope * LN2 - (q - p), slope)


@triton.jit
def reverse_kl_gradient(log_q, log_p, coefficient, scale, a, b):
    """Keep the coefficient in units of log 2, like its sum. Then the difference is exactly 0 where q is 1."""
    q = tl.exp2(log_q)
    return (tl.where(q == 0.0, 0.0, log_q - log_p) - coefficient) * (q * (scale * LN2))


@triton.jit
def symmetric_kl(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    ratio = log_q - log_p
    reverse = (a * LN2) * tl.where(q == 0.0, 0.0, q * ratio)
    forward = (-b * LN2) * tl.where(p == 0.0, 0.0, p * ratio)
    slope = reverse - b * p
    return q, slope, (forward + reverse + (b - a) * (q - p), slope)


@triton.jit
def jsd(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    q_larger, size, _smaller, log_m = mixture(b, a, log_q, log_p)
    from_q, from_p = (b * LN2) * q, (a * LN2) * p
    slope = from_q * (tl.where(q_larger, 0.0, size) - log_m)
    value = size * tl.where(q_larger, from_p, from_q) - close_log_m(b, a, q_larger, size, log_m) * (from_q + from_p)
    return q, slope, (value, slope)


@triton.jit
def jsd_gradient(log_q, log_p, coefficient, scale, a, b):
    q_larger, size, _smaller, log_m = mixture(b, a, log_q, log_p)
    return tl.exp2(log_q) * ((tl.where(q_larger, 0.0, size) - log_m) * (b * LN2 * scale) - coefficient * scale)


@triton.jit
def jsd_light_q(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    size, _t, _close, _bend, log_m = light_mixture(b, log_q, log_p)
    from_q, from_p = q * (b * LN2), p * (a * LN2)
    slope = from_q * (size - log_m)
    return q, slope, (from_q * size - log_m * (from_q + from_p), slope)


@triton.jit
def jsd_light_p(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    size, _t, _close, _bend, log_m = light_mixture(a, log_p, log_q)
    from_q, from_p = q * (b * LN2), p * (a * LN2)
    slope = -from_q * log_m
    return q, slope, (from_p * size - log_m * (from_q + from_p), slope)


@triton.jit
def skew_kl(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    q_larger, size, smaller, log_m = mixture(b, a, log_q, log_p)
    excess = tl.where(q_larger, smaller - 1.0, 1.0 - smaller) * tl.exp2(-log_m)  # (p / m - 1) / b
    slope = (-b * b) * (q * excess)
    of_p = tl.where(q_larger, size, 0.0) - close_log_m(b, a, q_larger, size, log_m)
    return q, slope, ((p * of_p) * LN2 + b * (q - p), slope)


@triton.jit
def skew_kl_light_q(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    _size, t, close, bend, log_m = light_mixture(b, log_q, log_p)
    slope = b * (q * (t * tl.exp2(-log_m)))
    return q, slope, (tl.where(close, p * bend, b * (q - p) - (p * log_m) * LN2), slope)


@triton.jit
def skew_reverse_kl(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    q_larger, size, smaller, log_m = mixture(a, b, log_q, log_p)
    excess = tl.where(q_larger, 1.0 - smaller, smaller - 1.0) * tl.exp2(-log_m)  # (q / m - 1) / b
    rest = tl.where(q_larger, 0.0, size)
    slope = (q * (rest - log_m)) * LN2 - (a * b) * (q * excess)
    of_q = rest - close_log_m(a, b, q_larger, size, log_m)
    return q, slope, ((q * of_q) * LN2 + b * (p - q), slope)


@triton.jit
def skew_reverse_kl_light_p(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    _size, t, close, bend, log_m = light_mixture(b, log_p, log_q)
    lost = t * tl.exp2(-log_m)  # 1 - q / m
    slope = q * tl.where(close, bend - (b + t) * lost, a * lost - log_m * LN2)
    return q, slope, (tl.where(close, q * bend, b * (p - q) - (q * log_m) * LN2), slope)


@triton.jit
def total_variation(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    difference = q - p
    sign = tl.where(difference > 0.0, 0.5, tl.where(difference < 0.0, -0.5, 0.0))
    slope = sign * q
    return q, slope, (0.5 * tl.abs(difference), slope)


@triton.jit
def alpha_divergence(log_q, log_p, a, b):
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    ratio = log_q - log_p
    q_larger = ratio >= 0.0
    larger = tl.maximum(q, p)
    size = -tl.abs(ratio)
    weight = tl.where(q_larger, a, b)
    power = weight * size
    grown, shrunk = exp2m1(power), exp2m1(size)
    empty = larger == 0.0
    value = tl.where(empty, 0.0, (grown - weight * shrunk) * larger) * (1.0 / (-a * b))
    slope = tl.where(ratio < APART, tl.exp2(power) * larger - q, tl.where(q_larger, grown, grown - shrunk) * larger)
    slope = tl.where(empty, 0.0, slope) * (-1.0 / a)
    return q, slope, (value, slope)


@triton.jit
def ab_divergence(log_q, log_p, a, b):
    q = tl.exp2(log_q)
    total = a + b
    ratio = total * (log_q - log_p)
    q_larger = ratio >= 0.0
    larger = tl.exp2(tl.maximum(total * log_q, total * log_p))
    size = -tl.abs(ratio)
    weight = tl.where(q_larger, a / total, b / total)
    power = weight * size
    grown, shrunk = exp2m1(power), exp2m1(size)
    empty = (log_q == float("-inf")) & (log_p == float("-inf"))
    value = tl.where(empty, 0.0, (grown - weight * shrunk) * larger) * (1.0 / (-a * b))
    slope = tl.where(ratio < APART, tl.exp2(power) - tl.exp2(size), tl.where(q_larger, grown, grown - shrunk)) * larger
    slope = tl.where(empty, 0.0, slope) * (-1.0 / a)
    return q, slope, (value, slope)


@triton.jit
def logit_mse(x, u, a, b):
    skipped = (x == float("-inf")) & (u == float("-inf"))
    slope = tl.where(skipped, 0.0, x - u)
    return slope, slope, (0.5 * slope * slope,)


@triton.jit
def linear(sums, a, b):
    """Return the sums as value and coefficient of a row. A NaN value makes the gradient NaN as well."""
    return sums[0], tl.where(sums[0] == sums[0], sums[1], sums[0])


@triton.jit
def value_alone(sums, a, b):
    """Return the sum as the value. The coefficient is not needed: the sum of the slopes is a known constant."""
    return sums[0], 0.0


@dataclass(frozen=True)
class Functions:
    """A divergence as three jit functions: ``terms``, ``finish`` and ``gradient``."""

    terms: Any
    """``(log_q, log_p, a, b) -> (q, slope, sums)`` of a block of columns; ``sums``: ``num_sums`` blocks that are summed over the row."""
    gradient: Any = None
    """``(log_q, log_p, coefficients, scale, a, b) -> scale * T * dD/dz`` of a block of columns, if that differs from
    ``scale * (slope - q * coefficient)`` or needs fewer operations; else None."""
    finish: Any = linear
    """``(sums, a, b) -> (value, coefficients)`` of a row. ``coefficients``: a number, or a tuple for ``gradient``."""
    block_rows: tuple[int, int] = (2, 2)
    """Rows of a block, without and with features: the most that fit in the registers of every target GPU."""


FUNCTIONS: dict[str, Functions] = {
    d.ForwardKL.name: Functions(forward_kl, finish=value_alone),
    d.ReverseKL.name: Functions(reverse_kl, reverse_kl_gradient),
    d.SymmetricKL.name: Functions(symmetric_kl),
    d.JSD.name: Functions(jsd, jsd_gradient, block_rows=(2, 1)),
    d.SkewKL.name: Functions(skew_kl),
    d.SkewReverseKL.name: Functions(skew_reverse_kl),
    d.TotalVariation.name: Functions(total_variation),
    d.AlphaDivergence.name: Functions(alpha_divergence, block_rows=(1, 2)),
    d.ABDivergence.name: Functions(ab_divergence, block_rows=(1, 2)),
    d.LogitMSE.name: Functions(logit_mse, finish=value_alone),
}
LIGHT_FUNCTIONS: dict[tuple[str, int], Functions] = {
    (d.JSD.name, 0): Functions(jsd_light_p, block_rows=(1, 2)),
    (d.JSD.name, 1): Functions(jsd_light_q, block_rows=(1, 2)),
    (d.SkewKL.name, 1): Functions(skew_kl_light_q, block_rows=(1, 2)),
    (d.SkewReverseKL.name, 1): Functions(skew_reverse_kl_light_p, block_rows=(1, 2)),
}
"""Functions for mixtures that are nearly q or nearly p, by name and by index of the kernel parameter that is at most LIGHT."""


def functions_of(divergence: d.Divergence) -> Functions:
    """Return the functions of a divergence for its parameters."""
    for index, parameter in enumerate(divergence.kernel_parameters):
        if parameter <= LIGHT and (divergence.name, index) in LIGHT_FUNCTIONS:
            return LIGHT_FUNCTIONS[divergence.name, index]
    return FUNCTIONS[divergence.name]
