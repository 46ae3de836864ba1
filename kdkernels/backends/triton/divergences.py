"""The divergences as jit functions: ``(log_q, log_p, a, b) -> (q, value, slope)`` of a block of columns, a and b the parameters.

The twins of the ``terms`` in ``kdkernels.divergences``, whose comments say why each form is what it is.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ... import divergences as d

APART = tl.constexpr(d.APART)


@triton.jit
def expm1(x):
    """exp(x) - 1 in float32. The series is good to 2e-8 where the difference would lose digits."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * 0.0013888889)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


@triton.jit
def log1p_or_log(x, w):
    """log(1 + x) or, where that is small, log(w): w is the same number as 1 + x, formed without the cancellation.

    What 1 + x rounds away is put back to first order.
    """
    near = x > -0.5
    y = tl.where(near, 1.0 + x, w)
    return tl.log(y) + tl.where(near, x - (y - 1.0), 0.0) / y


@triton.jit
def mixture(weight_q, weight_p, log_q, log_p):
    """log(q / m), log(p / m) for m = weight_q * q + weight_p * p."""
    ratio = log_q - log_p
    q_larger = ratio >= 0.0
    share = tl.where(q_larger, weight_p, weight_q)
    lost = share * expm1(-tl.abs(ratio))
    direct = tl.where(q_larger, weight_q, weight_p) + share * tl.exp(-tl.abs(ratio))
    log_m = log1p_or_log(lost, direct)
    return tl.where(q_larger, -log_m, ratio - log_m), tl.where(q_larger, -ratio - log_m, -log_m)


@triton.jit
def forward_kl(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    value = tl.where(p == 0.0, 0.0, p * (log_p - log_q)) + (q - p)
    return q, value, -p


@triton.jit
def reverse_kl(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    slope = tl.where(q == 0.0, 0.0, q * (log_q - log_p))
    return q, slope - (q - p), slope


@triton.jit
def symmetric_kl(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    ratio = log_q - log_p
    reverse = a * tl.where(q == 0.0, 0.0, q * ratio)
    forward = -b * tl.where(p == 0.0, 0.0, p * ratio)
    return q, forward + reverse + (b - a) * (q - p), reverse - b * p


@triton.jit
def jsd(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    log_qm, log_pm = mixture(b, a, log_q, log_p)
    slope = b * tl.where(q == 0.0, 0.0, q * log_qm)
    return q, a * tl.where(p == 0.0, 0.0, p * log_pm) + slope, slope


@triton.jit
def skew_kl(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    _, log_pm = mixture(b, a, log_q, log_p)
    slope = -b * tl.where(q == 0.0, 0.0, q * expm1(log_pm))
    return q, tl.where(p == 0.0, 0.0, p * log_pm) + b * (q - p), slope


@triton.jit
def skew_reverse_kl(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    log_qm, _ = mixture(a, b, log_q, log_p)
    value = tl.where(q == 0.0, 0.0, q * log_qm)
    slope = value - a * tl.where(q == 0.0, 0.0, q * expm1(log_qm))
    return q, value + b * (p - q), slope


@triton.jit
def total_variation(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    difference = q - p
    sign = tl.where(difference > 0.0, 0.5, tl.where(difference < 0.0, -0.5, 0.0))
    return q, 0.5 * tl.abs(difference), sign * q


@triton.jit
def alpha_divergence(log_q, log_p, a, b):
    q, p = tl.exp(log_q), tl.exp(log_p)
    ratio = log_q - log_p
    q_larger = ratio >= 0.0
    larger = tl.maximum(q, p)
    size = -tl.abs(ratio)
    weight = tl.where(q_larger, a, b)
    power = weight * size
    grown, shrunk = expm1(power), expm1(size)
    empty = larger == 0.0
    value = tl.where(empty, 0.0, (grown - weight * shrunk) * larger) / (-a * b)
    slope = tl.where(ratio < APART, tl.exp(power) * larger - q, tl.where(q_larger, grown, grown - shrunk) * larger)
    return q, value, tl.where(empty, 0.0, slope) / -a


@triton.jit
def ab_divergence(log_q, log_p, a, b):
    q = tl.exp(log_q)
    total = a + b
    ratio = total * (log_q - log_p)
    q_larger = ratio >= 0.0
    larger = tl.exp(tl.maximum(total * log_q, total * log_p))
    size = -tl.abs(ratio)
    weight = tl.where(q_larger, a / total, b / total)
    power = weight * size
    grown, shrunk = expm1(power), expm1(size)
    empty = (log_q == float("-inf")) & (log_p == float("-inf"))
    value = tl.where(empty, 0.0, (grown - weight * shrunk) * larger) / (-a * b)
    slope = tl.where(ratio < APART, tl.exp(power) - tl.exp(size), tl.where(q_larger, grown, grown - shrunk)) * larger
    return q, value, tl.where(empty, 0.0, slope) / -a


@triton.jit
def logit_mse(log_q, log_p, a, b):
    skipped = (log_q == float("-inf")) & (log_p == float("-inf"))
    slope = tl.where(skipped, 0.0, log_q - log_p)
    return slope, 0.5 * slope * slope, slope


FUNCTIONS: dict[str, Any] = {
    d.ForwardKL.name: forward_kl,
    d.ReverseKL.name: reverse_kl,
    d.SymmetricKL.name: symmetric_kl,
    d.JSD.name: jsd,
    d.SkewKL.name: skew_kl,
    d.SkewReverseKL.name: skew_reverse_kl,
    d.TotalVariation.name: total_variation,
    d.AlphaDivergence.name: alpha_divergence,
    d.ABDivergence.name: ab_divergence,
    d.LogitMSE.name: logit_mse,
}
