"""The row kernel: one program owns a row pair and sweeps over it in blocks of columns, up to three times.

Sweep 1 finds the log-sum-exps, sweep 2 the sums of value and slope, sweep 3 writes the gradient. Where the slope sum is known
beforehand (ForwardKL, LogitMSE) and the gradient is wanted, sweep 2 is skipped and sweep 3 sums the value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .divergences import expm1

SOFTMAX = tl.constexpr(0)
MEAN = tl.constexpr(1)
NONE = tl.constexpr(2)


@triton.jit
def transformed(z, scale, softcap, SOFTCAP: tl.constexpr):
    """``softcap * tanh(z * scale / softcap)``; tanh by expm1, so that small logits keep their digits."""
    z = z * scale
    if SOFTCAP:
        e = expm1(-2.0 * tl.abs(z / softcap))
        t = -e / (e + 2.0)
        z = softcap * tl.where(z < 0.0, -t, t)
    return z


@triton.jit
def load_logits(row, bias, columns, mask, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """A block of logits in float32; -inf beyond the vocabulary."""
    z = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + columns, mask=mask, other=0.0)
    return tl.where(mask, transformed(z, scale, softcap, SOFTCAP), float("-inf"))


@triton.jit
def merge(top, total, z, inv_temperature):
    """Online softmax: (max, sum of exp((z - max) / T)) so far, and one more block."""
    new = tl.maximum(top, tl.max(z, 0))
    reference = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp((top - reference) * inv_temperature) + tl.sum(tl.exp((z - reference) * inv_temperature), 0)
    return new, total


@triton.jit
def kd_rows_kernel(
    student, teacher,  # [C, V] logits
    student_bias, teacher_bias,  # [V] float32
    labels,  # [C] int64
    weight,  # [C] float32
    state,  # [7, C] float32: see problem.STATE
    loss,  # [C] float32
    stats,  # [5, C] float32: see problem.STATS
    dz,  # [C, V]; may start where student's row starts, in a type no wider
    student_stride, teacher_stride, dz_stride, state_stride, stats_stride, vocab,
    a, b, inv_temperature, value_scale, slope_scale, ce_weight,
    student_scale, student_softcap, teacher_scale, teacher_softcap, dz_scale,
    DIVERGENCE: tl.constexpr, NORMALIZER: tl.constexpr,
    SLOPE_SUM: tl.constexpr,  # the number, or None
    SLOPE_JUMPS: tl.constexpr,  # then backward sums the very slopes that it writes
    STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    CE: tl.constexpr, WEIGHT: tl.constexpr, STATISTICS: tl.constexpr, STATS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    state += row
    infinity = float("inf")
    w = 1.0
    if WEIGHT:
        w = tl.load(weight + row)
    label = -1
    if CE:
        label = tl.load(labels + row)
    offsets = tl.arange(0, BLOCK)

    # Sweep 2 is also where the entropies are summed.
    SWEEP_VALUES: tl.constexpr = (STATISTICS and (STATS or SLOPE_SUM is None or not GRADIENT)) or (SLOPE_JUMPS and not STATISTICS)
    # log q = (z - shift) / T - rest, see problem.STATE. No product may be contracted into the difference: load_logits ends in a select.
    shift_s = 0.0
    rest_s = 0.0
    shift_t = 0.0
    rest_t = 0.0
    top_ce = 0.0
    rest_ce = 0.0
    slope_sum = 0.0
    divergence = 0.0
    target = 0.0
    if STATISTICS:
        top_s = -infinity
        sum_s = 0.0
        top_t = -infinity
        sum_t = 0.0
        if CE:
            top_ce = -infinity
        sum_ce = 0.0
        mean_s = tl.zeros([BLOCK], dtype=tl.float32)
        mean_t = tl.zeros([BLOCK], dtype=tl.float32)
        kept = tl.zeros([BLOCK], dtype=tl.float32)
        best_s = tl.full([], 0, dtype=tl.int32)
        best_t = tl.full([], 0, dtype=tl.int32)
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            z = load_logits(student, student_bias, columns, mask, student_scale, student_softcap, STUDENT_BIAS, STUDENT_SOFTCAP)
            y = load_logits(teacher, teacher_bias, columns, mask, teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_SOFTCAP)
            if STATS:
                best_s = tl.where(tl.max(z, 0) > top_s, start + tl.argmax(z, 0), best_s)
                best_t = tl.where(tl.max(y, 0) > top_t, start + tl.argmax(y, 0), best_t)
            if NORMALIZER == SOFTMAX or STATS:
                top_s, sum_s = merge(top_s, sum_s, z, inv_temperature)
                top_t, sum_t = merge(top_t, sum_t, y, inv_temperature)
            if NORMALIZER == MEAN:
                both = (z == -infinity) & (y == -infinity)
                mean_s += tl.where(both, 0.0, z)
                mean_t += tl.where(both, 0.0, y)
                kept += tl.where(both, 0.0, 1.0)
            if CE:
                top_ce, sum_ce = merge(top_ce, sum_ce, z, 1.0)
        log_sum_s = tl.log(sum_s)
        log_sum_t = tl.log(sum_t)
        if NORMALIZER == SOFTMAX:
            shift_s = top_s
            rest_s = log_sum_s
            shift_t = top_t
            rest_t = log_sum_t
        if NORMALIZER == MEAN:
            size = tl.maximum(tl.sum(kept, 0), 1.0)
            shift_s = tl.sum(mean_s, 0) / size
            shift_t = tl.sum(mean_t, 0) / size
        if CE:
            rest_ce = tl.log(sum_ce)
            target = tl.load(student + label).to(tl.float32)
            if STUDENT_BIAS:
                target += tl.load(student_bias + label)
            target = transformed(target, student_scale, student_softcap, STUDENT_SOFTCAP)
    else:
        shift_s = tl.load(state)
        rest_s = tl.load(state + state_stride)
        shift_t = tl.load(state + 2 * state_stride)
        rest_t = tl.load(state + 3 * state_stride)
        slope_sum = tl.load(state + 4 * state_stride)
        if CE:
            top_ce = tl.load(state + 5 * state_stride)
            rest_ce = tl.load(state + 6 * state_stride)

    if SWEEP_VALUES:
        values = tl.zeros([BLOCK], dtype=tl.float32)
        slopes = tl.zeros([BLOCK], dtype=tl.float32)
        entropy_s = tl.zeros([BLOCK], dtype=tl.float32)
        entropy_t = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            z = load_logits(student, student_bias, columns, mask, student_scale, student_softcap, STUDENT_BIAS, STUDENT_SOFTCAP)
            y = load_logits(teacher, teacher_bias, columns, mask, teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_SOFTCAP)
            _q, value, slope = DIVERGENCE((z - shift_s) * inv_temperature - rest_s, (y - shift_t) * inv_temperature - rest_t, a, b)
            # Columns beyond the vocabulary are -inf on both sides, which contributes 0; NaN of a row with infinite or NaN
            # normalisers must not come from there alone, so they are left out outright.
            values += tl.where(mask, value, 0.0)
            slopes += tl.where(mask, slope, 0.0)
            if STATS:
                log_q = (z - top_s) * inv_temperature - log_sum_s
                log_p = (y - top_t) * inv_temperature - log_sum_t
                q = tl.exp(log_q)
                p = tl.exp(log_p)
                entropy_s -= tl.where(q == 0.0, 0.0, q * log_q)
                entropy_t -= tl.where(p == 0.0, 0.0, p * log_p)
        divergence = tl.sum(values, 0)
        slope_sum = tl.sum(slopes, 0)
        if STATS:
            stats += row
            tl.store(stats, divergence)
            tl.store(stats + stats_stride, rest_ce - (target - top_ce) if CE else float("nan"))
            tl.store(stats + 2 * stats_stride, tl.sum(entropy_s, 0))
            tl.store(stats + 3 * stats_stride, tl.sum(entropy_t, 0))
            tl.store(stats + 4 * stats_stride, tl.where(best_s == best_t, 1.0, 0.0))
    if SLOPE_SUM is not None:
        slope_sum = SLOPE_SUM + 0.0

    if GRADIENT:
        values = tl.zeros([BLOCK], dtype=tl.float32)
        dz += row * dz_stride
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            z = load_logits(student, student_bias, columns, mask, student_scale, student_softcap, STUDENT_BIAS, STUDENT_SOFTCAP)
            y = load_logits(teacher, teacher_bias, columns, mask, teacher_scale, teacher_softcap, TEACHER_BIAS, TEACHER_SOFTCAP)
            q, value, slope = DIVERGENCE((z - shift_s) * inv_temperature - rest_s, (y - shift_t) * inv_temperature - rest_t, a, b)
            if not SWEEP_VALUES:
                values += tl.where(mask, value, 0.0)
            if NORMALIZER == SOFTMAX:
                slope = slope - q * slope_sum
            g = tl.where(slope_scale == 0.0, 0.0, slope_scale * slope)
            if CE:
                g += ce_weight * (tl.exp((z - top_ce) - rest_ce) - tl.where(columns == label, 1.0, 0.0))
            g *= student_scale
            if STUDENT_SOFTCAP:
                bend = z / student_softcap
                g *= 1.0 - bend * bend
            g *= w * dz_scale
            # dz may be narrower than the logits it lies over: other warps must have read theirs first.
            tl.debug_barrier()
            tl.store(dz + columns, g.to(dz.dtype.element_ty), mask=mask)
        if not SWEEP_VALUES:
            divergence = tl.sum(values, 0)

    if STATISTICS:
        tl.store(state, shift_s)
        tl.store(state + state_stride, rest_s)
        tl.store(state + 2 * state_stride, shift_t)
        tl.store(state + 3 * state_stride, rest_t)
        tl.store(state + 4 * state_stride, slope_sum)
        tl.store(state + 5 * state_stride, top_ce)
        tl.store(state + 6 * state_stride, rest_ce)
        total = tl.where(value_scale == 0.0, 0.0, value_scale * divergence)
        if CE:
            total += tl.where(ce_weight == 0.0, 0.0, ce_weight * (rest_ce - (target - top_ce)))
        tl.store(loss + row, w * total)
