"""Triton versions of more_divergences.py, in their own file since Triton reads the source of jit functions."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.backends.triton.arithmetic import LN2
from kdkernels.backends.triton.divergences import Functions, reverse_kl, total_variation


@triton.jit
def acceptance_finish(sums, a, b):
    acceptance = 1.0 - sums[0]
    return -tl.log(acceptance), (sums[1] / acceptance, acceptance)


@triton.jit
def acceptance_gradient(log_q, log_p, coefficients, scale, a, b):
    q, slope, _sums = total_variation(log_q, log_p, a, b)
    return (slope / coefficients[1] - q * coefficients[0]) * scale


@triton.jit
def mixed(log_q, log_p, a, b):
    q, _slope, first = reverse_kl(log_q, log_p, a, b)
    _q, slope, second = total_variation(log_q, log_p, a, b)
    return q, slope, (first[0], first[1], second[0], second[1])


@triton.jit
def mixed_finish(sums, a, b):
    acceptance = 1.0 - sums[2]
    return a * sums[0] - b * tl.log(acceptance), (a * LN2 * sums[1] + b * sums[3] / acceptance, acceptance)


@triton.jit
def mixed_gradient(log_q, log_p, coefficients, scale, a, b):
    q, slope, _first = reverse_kl(log_q, log_p, a, b)
    _q, other, _second = total_variation(log_q, log_p, a, b)
    return (a * slope + b * other / coefficients[1] - q * coefficients[0]) * scale


FUNCTIONS = {
    "neg_log_acceptance": Functions(total_variation, acceptance_gradient, acceptance_finish),
    "mixed": Functions(mixed, mixed_gradient, mixed_finish),
}
