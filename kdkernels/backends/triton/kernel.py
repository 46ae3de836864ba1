"""The row kernel of two sides. One program processes a student row and a teacher row in blocks of columns, with one sweep per stage.

NORMALISERS computes the log-sum-exps, SUMS the divergence's sums over the columns, GRADIENT writes the gradient. Results of stages from
an earlier launch are read from the state. If the sum of the slopes is a known constant (``slope_sum``), SUMS and GRADIENT share a sweep.

A block is [R, W] with W = 8 columns * threads. Reductions along R stay within a thread, so a sweep has no barriers except for writing in
place. Whole blocks are read without masks. The remaining columns are read as masked blocks [1, W], which need fewer registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LN2, LOG2E, LOWEST, NEGLIGIBLE, at_least
from .state import MEAN, SOFTMAX, load_normalisers, load_sums, save_normalisers, save_statistics, save_sums

SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)

NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def transformed(z, scale, softcap, TRANSFORM: tl.constexpr):
    """Return ``z``, ``z * scale``, or ``softcap * tanh(z * scale / softcap)``, with a tanh that keeps the digits of small logits.

    The result never ends in a product: contracting it into an FMA with the subtraction of the largest logit would make the difference
    inexact, and a small T needs it exact.
    """
    if TRANSFORM == SCALED:
        z = tl.fma(z, scale, 0.0)
    if TRANSFORM == CAPPED:
        z = z * scale
        x = tl.abs(z / softcap)
        e = tl.exp2(x * (-2.0 * LOG2E))
        square = x * x
        series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488))))
        t = tl.where(x < 0.2, series, (1.0 - e) / (1.0 + e))
        size = softcap * t
        z = tl.where(z < 0.0, -size, size)
    return z


@triton.jit
def load_logits(row, bias, columns, mask, scale, softcap, TRANSFORM: tl.constexpr):
    """Load a block of logits in float32; -inf where ``mask`` is false. ``mask`` may be None."""
    if mask is None:
        z = tl.load(row + columns).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + columns)
        return transformed(z, scale, softcap, TRANSFORM)
    else:
        z = tl.load(row + columns, mask=mask, other=float("-inf")).to(tl.float32)
        if bias is not None:
            z += tl.load(bias + columns, mask=mask, other=0.0)
        if TRANSFORM == 0:
            return z
        else:
            return tl.where(mask, transformed(z, scale, softcap, TRANSFORM), float("-inf"))


@triton.jit
def load_pair(student, teacher, columns, mask, TRANSFORMS: tl.constexpr):
    """Load a block of columns of both sides. A side is ``(row, bias, scale, softcap)``."""
    z = load_logits(student[0], student[1], columns, mask, student[2], student[3], TRANSFORMS[0])
    y = load_logits(teacher[0], teacher[1], columns, mask, teacher[2], teacher[3], TRANSFORMS[1])
    return z, y


@triton.jit
def moved_sum(total, top, new, z, factor):
    """Rescale ``total`` [W], a sum of ``2 ** ((z - top) * factor)``, from ``top`` to ``new``, and add the block ``z`` [R, W]."""
    return total * tl.exp2((top - new) * factor) + tl.sum(tl.exp2((z - new[None, :]) * factor), 0)


@triton.jit
def joined(top, total, factor):
    """Reduce the lanes [W] to the row's largest logit and its sum of exponentials relative to it."""
    largest = tl.max(top, 0)
    return largest, tl.sum(total * tl.exp2((top - largest) * factor), 0)


@triton.jit
def normalise_block(lanes, student, teacher, factors, columns, mask, TRANSFORMS: tl.constexpr, CE: tl.constexpr):
    top_s, sum_s, top_t, sum_t, sum_ce = lanes
    z, y = load_pair(student, teacher, columns, mask, TRANSFORMS)
    new_s = tl.maximum(top_s, tl.max(z, 0))
    new_t = tl.maximum(top_t, tl.max(y, 0))
    sum_s = moved_sum(sum_s, top_s, new_s, z, factors[0])
    sum_t = moved_sum(sum_t, top_t, new_t, y, factors[1])
    if CE:
        sum_ce = moved_sum(sum_ce, top_s, new_s, z, factors[2])
    return new_s, sum_s, new_t, sum_t, sum_ce


@triton.jit
def normalisers(
    student, teacher, factors, vocab, TRANSFORMS: tl.constexpr, CE: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Return largest logits and sums of exponentials relative to them: student, teacher, and student at T = 1."""
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    whole = vocab // (R * W) * (R * W)
    lowest = tl.full([W], LOWEST, tl.float32)  # finite, so that a lane without a logit above -inf has the sum 0
    zero = tl.zeros([W], tl.float32)
    lanes = (lowest, zero, lowest, zero, zero)
    for start in range(0, whole, R * W):
        lanes = normalise_block(lanes, student, teacher, factors, start + offsets, None, TRANSFORMS, CE)
    for part in tl.static_range(R):
        if whole + part * W < vocab:
            columns = whole + part * W + tl.arange(0, W)[None, :]
            lanes = normalise_block(lanes, student, teacher, factors, columns, columns < vocab, TRANSFORMS, CE)
    top_s, sum_s, top_t, sum_t, sum_ce = lanes
    largest_s, total_s = joined(top_s, sum_s, factors[0])
    largest_t, total_t = joined(top_t, sum_t, factors[1])
    total_one = 0.0
    if CE:
        _, total_one = joined(top_s, sum_ce, factors[2])
    return largest_s, total_s, largest_t, total_t, total_one


@triton.jit
def mean_block(lanes, student, teacher, columns, mask, TRANSFORMS: tl.constexpr):
    z, y = load_pair(student, teacher, columns, mask, TRANSFORMS)
    skipped = (z == float("-inf")) & (y == float("-inf"))
    return (
        lanes[0] + tl.sum(tl.where(skipped, 0.0, z), 0),
        lanes[1] + tl.sum(tl.where(skipped, 0.0, y), 0),
        lanes[2] + tl.sum(tl.where(skipped, 0.0, 1.0), 0),
    )


@triton.jit
def means(student, teacher, vocab, TRANSFORMS: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Return the mean logits of both sides over the columns that are not -inf on both, and the number of these columns."""
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    whole = vocab // (R * W) * (R * W)
    zero = tl.zeros([W], tl.float32)
    lanes = (zero, zero, zero)
    for start in range(0, whole, R * W):
        lanes = mean_block(lanes, student, teacher, start + offsets, None, TRANSFORMS)
    for part in tl.static_range(R):
        if whole + part * W < vocab:
            columns = whole + part * W + tl.arange(0, W)[None, :]
            lanes = mean_block(lanes, student, teacher, columns, columns < vocab, TRANSFORMS)
    count = tl.sum(lanes[2], 0)
    size = tl.maximum(count, 1.0)
    return tl.sum(lanes[0], 0) / size, tl.sum(lanes[1], 0) / size, count


@triton.jit
def logarithm(z, norm, factor):
    """Return the divergence's argument for a logit: ``log2 q``, or ``z / T`` minus the row's mean.

    The largest logit and the log-sum are subtracted in turn. Adding them first would round to the ulp of the largest logit, which
    changes every probability if logits are in the thousands.
    """
    return tl.fma(z - norm[0], factor, -norm[1])


@triton.jit
def added(sums, columns, mask):
    """Add a block to the sums of the lanes [W]. Columns outside the row may be NaN and are ignored."""
    out = ()
    for i in tl.static_range(len(sums)):
        column = columns[i] if mask is None else tl.where(mask, columns[i], 0.0)
        out += (sums[i] + tl.sum(column, 0),)
    return out


@triton.jit
def entropy_terms(log_q):
    return (tl.exp2(log_q) * at_least(log_q, NEGLIGIBLE)) * -LN2


@triton.jit
def sum_block(
    sums, stats, student, teacher, norms, factors, softmaxes, columns, mask, a, b,
    TERMS: tl.constexpr, TRANSFORMS: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    z, y = load_pair(student, teacher, columns, mask, TRANSFORMS)
    _q, _slope, terms = TERMS(logarithm(z, norms[0], factors[0]), logarithm(y, norms[1], factors[1]), a, b)
    sums = added(sums, terms, mask)
    if STATS:
        entropies = (
            entropy_terms(logarithm(z, softmaxes[0], softmaxes[2])),
            entropy_terms(logarithm(y, softmaxes[1], softmaxes[3])),
        )
        best_s = tl.minimum(stats[2], tl.min(tl.where(z == softmaxes[0][0], columns, NO_COLUMN), 0))
        best_t = tl.minimum(stats[3], tl.min(tl.where(y == softmaxes[1][0], columns, NO_COLUMN), 0))
        entropies = added((stats[0], stats[1]), entropies, mask)
        stats = (entropies[0], entropies[1], best_s, best_t)
    return sums, stats


@triton.jit
def row_sums(
    student, teacher, norms, factors, softmaxes, vocab, a, b,
    TERMS: tl.constexpr, NUM_SUMS: tl.constexpr, TRANSFORMS: tl.constexpr, STATS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return the divergence's sums, the entropies of both sides, and the first columns with the largest logit (-1 if none)."""
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    whole = vocab // (R * W) * (R * W)
    zero = tl.zeros([W], tl.float32)
    none = tl.full([W], NO_COLUMN, tl.int32)
    sums = (zero,) * NUM_SUMS
    stats = (zero, zero, none, none)
    for start in range(0, whole, R * W):
        sums, stats = sum_block(
            sums, stats, student, teacher, norms, factors, softmaxes, start + offsets, None, a, b, TERMS, TRANSFORMS, STATS
        )
    for part in tl.static_range(R):
        if whole + part * W < vocab:
            columns = whole + part * W + tl.arange(0, W)[None, :]
            sums, stats = sum_block(
                sums, stats, student, teacher, norms, factors, softmaxes, columns, columns < vocab, a, b, TERMS, TRANSFORMS, STATS
            )
    best_s = -1.0
    best_t = -1.0
    if STATS:
        best_s = first_column(stats[2])
        best_t = first_column(stats[3])
    return totals(sums), (tl.sum(stats[0], 0), tl.sum(stats[1], 0), best_s, best_t)


@triton.jit
def first_column(columns):
    first = tl.min(columns, 0)
    return tl.where(first == NO_COLUMN, -1, first).to(tl.float32)


@triton.jit
def totals(sums):
    out = ()
    for i in tl.static_range(len(sums)):
        out += (tl.sum(sums[i], 0),)
    return out


@triton.jit
def gradient_block(
    sums, dz, student, teacher, norms, factors, one, scales, columns, mask, a, b,
    TERMS: tl.constexpr, SLOPE: tl.constexpr, TRANSFORMS: tl.constexpr,
    KD: tl.constexpr, CE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Write a block of the gradient.

    Args:
        one: (normaliser of the student at T = 1, its factor, label).
        scales: (scale of slopes, scale of cross-entropy, scale of both, coefficients).
    """
    z, y = load_pair(student, teacher, columns, mask, TRANSFORMS)
    if KD:
        log_q = logarithm(z, norms[0], factors[0])
        log_p = logarithm(y, norms[1], factors[1])
        if SUM or SLOPE is None:
            q, slope, terms = TERMS(log_q, log_p, a, b)
        if SUM:
            sums = added(sums, terms, mask)
        g = (slope - q * scales[3]) * scales[0] if SLOPE is None else SLOPE(log_q, log_p, scales[3], scales[0], a, b)
    else:
        g = tl.zeros_like(z)
    if CE:
        g += scales[1] * (tl.exp2(logarithm(z, one[0], one[1])) - tl.where(columns == one[2], 1.0, 0.0))
        g *= scales[2]
    if TRANSFORMS[0] == CAPPED:
        bend = z / student[3]
        g *= 1.0 - bend * bend
    # dz may overwrite the logits with a narrower type: wait until all warps have read their logits.
    tl.debug_barrier()
    tl.store(dz + columns, g.to(dz.dtype.element_ty), mask=mask)
    return sums


@triton.jit
def write_gradient(
    dz, student, teacher, norms, factors, one, scales, vocab, a, b,
    TERMS: tl.constexpr, SLOPE: tl.constexpr, NUM_SUMS: tl.constexpr, TRANSFORMS: tl.constexpr,
    KD: tl.constexpr, CE: tl.constexpr, SUM: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write the gradient. With SUM, return the divergence's sums as well."""
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    whole = vocab // (R * W) * (R * W)
    sums = (tl.zeros([W], tl.float32),) * NUM_SUMS
    for start in range(0, whole, R * W):
        sums = gradient_block(
            sums, dz, student, teacher, norms, factors, one, scales, start + offsets, None, a, b,
            TERMS, SLOPE, TRANSFORMS, KD, CE, SUM,
        )  # fmt: skip
    for part in tl.static_range(R):
        if whole + part * W < vocab:
            columns = whole + part * W + tl.arange(0, W)[None, :]
            sums = gradient_block(
                sums, dz, student, teacher, norms, factors, one, scales, columns, columns < vocab, a, b,
                TERMS, SLOPE, TRANSFORMS, KD, CE, SUM,
            )  # fmt: skip
    return totals(sums)


@triton.jit
def find_normalisers(
    student, teacher, factors, label, vocab,
    NORMALIZER: tl.constexpr, TRANSFORMS: tl.constexpr, CE: tl.constexpr, STATS: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return largest logits and sums of exponentials, the target's logit, and means, as ``save_normalisers`` writes them."""
    exponentials = (0.0, 0.0, 0.0, 0.0, 0.0)
    if NORMALIZER == SOFTMAX or CE or STATS:
        if NORMALIZER != SOFTMAX:
            factors = (factors[0] * LOG2E, factors[1] * LOG2E, factors[2])
        exponentials = normalisers(student, teacher, factors, vocab, TRANSFORMS, CE, R, W)
    target = 0.0
    if CE:
        target = load_logits(student[0], student[1], label, label >= 0, student[2], student[3], TRANSFORMS[0])
    centres = (0.0, 0.0, 0.0)
    if NORMALIZER == MEAN:
        centres = means(student, teacher, vocab, TRANSFORMS, R, W)
    return exponentials, target, centres


@triton.jit
def norms_of(row_state, factors, NORMALIZER: tl.constexpr, CE: tl.constexpr, STATS: tl.constexpr):
    """Return the normalisers, with their factors: the divergence's for both sides, the student's at T = 1, both softmaxes' at T."""
    exponentials, _target, centres = row_state
    one = (0.0, 0.0)
    if CE:
        one = (exponentials[0], tl.log2(exponentials[4]))
    norms = ((centres[0], 0.0), (centres[1], 0.0))
    softmaxes = (one, one, 0.0, 0.0)
    if NORMALIZER == SOFTMAX or STATS:
        of_student = (exponentials[0], tl.log2(exponentials[1]))
        of_teacher = (exponentials[2], tl.log2(exponentials[3]))
        if NORMALIZER == SOFTMAX:
            norms = (of_student, of_teacher)
            softmaxes = (of_student, of_teacher, factors[0], factors[1])
        else:
            softmaxes = (of_student, of_teacher, factors[0] * LOG2E, factors[1] * LOG2E)
    return norms, one, softmaxes


@triton.jit(do_not_specialize=["state_stride", "stats_stride"])
def kd_rows_kernel(
    student, teacher,  # [C, V] logits
    student_bias, teacher_bias,  # [V] float32, or None
    labels,  # [C] int64, -1 if not in these columns; or None
    weight,  # [C] float32, or None
    state,  # [len(STATE), C] float32: see rows.STATE
    loss,  # [C] float32, or None
    stats,  # [5, C] float32: see rows.STATS; or None
    dz,  # [C, V], or None; rows may start at the student's rows, in the same or a narrower type
    student_stride, teacher_stride, dz_stride, state_stride, stats_stride, vocab,
    a, b,
    student_factor, teacher_factor,  # from a logit to the divergence's argument: 1 / T, in units of log 2
    one_factor, one_scale,  # from the student's logit as read to the logit at T = 1, in units of log 2 and in natural units
    value_scale, slope_scale, ce_weight,
    student_scale, student_softcap, teacher_scale, teacher_softcap, dz_scale,
    TERMS: tl.constexpr, FINISH: tl.constexpr, SLOPE: tl.constexpr, NUM_SUMS: tl.constexpr,  # see divergences.Functions
    NORMALIZER: tl.constexpr,
    COEFFICIENT: tl.constexpr,  # the constant coefficient, or None if it depends on the sums
    STUDENT_TRANSFORM: tl.constexpr, TEACHER_TRANSFORM: tl.constexpr,  # 0, SCALED or CAPPED
    KD: tl.constexpr,  # the divergence's weight is not 0
    NORMALISERS: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    TRANSFORMS: tl.constexpr = (STUDENT_TRANSFORM, TEACHER_TRANSFORM)
    CE: tl.constexpr = labels is not None
    STATS: tl.constexpr = stats is not None
    SUM_IN_GRADIENT: tl.constexpr = SUMS and GRADIENT and KD and COEFFICIENT is not None and not STATS
    student_side = (student + row * student_stride, student_bias, student_scale, student_softcap)
    teacher_side = (teacher + row * teacher_stride, teacher_bias, teacher_scale, teacher_softcap)
    factors = (student_factor, teacher_factor, one_factor)
    state += row
    w = 1.0 if weight is None else tl.load(weight + row)
    label = tl.load(labels + row) if CE else -1

    if NORMALISERS:
        row_state = find_normalisers(student_side, teacher_side, factors, label, vocab, NORMALIZER, TRANSFORMS, CE, STATS, R, W)
        save_normalisers(state, state_stride, row_state, NORMALIZER, CE, STATS)
    else:
        row_state = load_normalisers(state, state_stride, NORMALIZER, CE, STATS)
    norms, one, softmaxes = norms_of(row_state, factors, NORMALIZER, CE, STATS)

    value = 0.0
    coefficient = 0.0
    cross_entropy = float("nan")
    if SUMS:
        if CE:
            cross_entropy = one[1] * LN2 - (row_state[1] - one[0]) * one_scale
        if STATS or (KD and not SUM_IN_GRADIENT):
            sums, more = row_sums(
                student_side, teacher_side, norms, factors, softmaxes, vocab, a, b, TERMS, NUM_SUMS, TRANSFORMS, STATS, R, W
            )
            save_sums(state, state_stride, sums)
            value, coefficient = FINISH(sums, a, b)
            if STATS:
                save_statistics(stats + row, stats_stride, state, state_stride, value, cross_entropy, more)
    elif GRADIENT and KD and COEFFICIENT is None:
        _, coefficient = FINISH(load_sums(state, state_stride, NUM_SUMS), a, b)
    if COEFFICIENT is not None:
        coefficient = COEFFICIENT + 0.0

    if GRADIENT:
        outer = student_scale * w * dz_scale
        scales = (slope_scale if CE else slope_scale * outer, ce_weight, outer, coefficient)
        sums = write_gradient(
            dz + row * dz_stride, student_side, teacher_side, norms, factors, (one, one_factor, label), scales, vocab, a, b,
            TERMS, SLOPE, NUM_SUMS, TRANSFORMS, KD, CE, SUM_IN_GRADIENT, R, W,
        )  # fmt: skip
        if SUM_IN_GRADIENT:
            save_sums(state, state_stride, sums)
            value, _ = FINISH(sums, a, b)

    if SUMS and loss is not None:
        total = value_scale * value if KD else 0.0
        if CE:
            total += tl.where(ce_weight == 0.0, 0.0, ce_weight * cross_entropy)
        tl.store(loss + row, w * total)
