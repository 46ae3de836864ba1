"""Expected results of the row kernels: dense, in a wider type than the kernel's, from the definitions, with numpy only.

Every answer comes with a bound on the rounding errors of an honest kernel: log q = z / T - lse is off by some ulp of its terms' size
(``reach`` of the row), which multiplies the absolute terms of the sums (``size``). It is no accuracy test (those are in the suite):
it separates rounding from a column that was read twice, left out, or taken from the neighbouring row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FORWARD_KL, REVERSE_KL, SYMMETRIC_KL, JSD, SKEW_KL, SKEW_REVERSE_KL, TOTAL_VARIATION, ALPHA, AB, LOGIT_MSE = range(10)
Array = np.ndarray


@dataclass(frozen=True)
class Side:
    logits: Array  # [C, V] exact, in the wide type
    bias: Array | None  # [V]
    scale: float
    softcap: float


@dataclass(frozen=True)
class Rows:
    """A call in exact numbers. ``epsilon`` is the kernel's: of float32 or float64."""

    student: Side
    teacher: Side
    divergence: int
    a: float
    b: float
    temperature: float
    value_scale: float
    slope_scale: float
    ce_weight: float
    labels: Array | None  # [C]
    weight: Array | None  # [C]
    dz_scale: float
    epsilon: float


@dataclass(frozen=True)
class Answer:
    value: Array
    bound: Array  # same shape; infinite: anything goes


@dataclass(frozen=True)
class Truth:
    loss: Answer  # [C]
    dz: Answer  # [C, V], before it is rounded to its storage type
    stats: list[Answer]  # five of [C]


def _times(weight: Array, factor: Array) -> Array:
    """weight * factor with 0 * anything = 0."""
    return np.where(weight == 0, 0.0, weight * np.where(weight == 0, 0.0, factor))


def _total(terms: Array) -> Array:
    return terms.sum(-1, keepdims=True)


def _transformed(side: Side, temperature: float) -> tuple[Array, Array]:
    """Logits z [C, V], and how large [C, 1] the numbers are that z / T is made of."""
    bias = 0.0 if side.bias is None else side.bias
    raw = (side.logits + bias) * side.scale
    z = side.softcap * np.tanh(raw / side.softcap) if side.softcap else raw
    parts = np.full_like(raw, 4 * side.softcap) if side.softcap else (np.abs(side.logits) + np.abs(bias)) * abs(side.scale)
    return z, np.where(np.isfinite(parts), parts, 0.0).max(-1, keepdims=True) / temperature


def _log_softmax(x: Array) -> tuple[Array, Array]:
    top = x.max(-1, keepdims=True)
    lse = top + np.log(_total(np.exp(x - top)))
    return x - lse, lse


def _kl(weight: Array, log_weight: Array, log_other: Array) -> tuple[Array, Array]:
    """Terms of KL(weight | other), and their sizes."""
    terms = _times(weight, log_weight - log_other)
    return terms, np.abs(terms) + weight + np.exp(log_other)


def _terms(r: Rows, x: Array, u: Array, lq: Array, lp: Array) -> tuple[Array, Array, Array, Array]:
    """Return for each column: value, size of its parts, slope df/d(log q), size of the slope's parts."""
    a, b = r.a, r.b
    q, p = np.exp(lq), np.exp(lp)
    with np.errstate(invalid="ignore"):
        log_ratio = lq - lp
    if r.divergence == FORWARD_KL:
        return *_kl(p, lp, lq), -p, p
    if r.divergence == REVERSE_KL:
        slope = _times(q, log_ratio)
        return *_kl(q, lq, lp), slope, np.abs(slope) + q
    if r.divergence == SYMMETRIC_KL:
        (forward, forward_size), (reverse, reverse_size) = _kl(p, lp, lq), _kl(q, lq, lp)
        slope = a * _times(q, log_ratio) - (1 - a) * p
        return (1 - a) * forward + a * reverse, forward_size + reverse_size, slope, a * np.abs(reverse) + q + p
    if r.divergence == JSD:
        lm = np.logaddexp(np.log(a) + lp, np.log1p(-a) + lq)
        (of_p, size_p), (of_q, size_q) = _kl(p, lp, lm), _kl(q, lq, lm)
        return a * of_p + (1 - a) * of_q, size_p + size_q, (1 - a) * of_q, np.abs(of_q) + q
    if r.divergence == SKEW_KL:
        lm = np.logaddexp(np.log(a) + lp, np.log1p(-a) + lq)
        slope = -(1 - a) * _times(q, np.exp(lp - lm))
        return *_kl(p, lp, lm), slope, np.abs(slope) + q
    if r.divergence == SKEW_REVERSE_KL:
        lm = np.logaddexp(np.log1p(-a) + lp, np.log(a) + lq)
        h, ratio = _times(q, lq - lm), _times(q, a * np.exp(lq - lm))
        return *_kl(q, lq, lm), h - ratio, np.abs(h) + ratio + q
    if r.divergence == TOTAL_VARIATION:
        gap = q - p
        # Where q and p are the same but for rounding, the sign is anyone's.
        unsure = np.where(np.abs(gap) < 1e4 * r.epsilon * (1 + np.abs(log_ratio)) * (q + p), q / r.epsilon, 0.0)
        return 0.5 * np.abs(gap), q + p, 0.5 * np.sign(gap) * q, q + unsure
    if r.divergence == ALPHA:
        mixed = np.where(np.isneginf(lp) & np.isneginf(lq), 0.0, np.exp(a * lp + (1 - a) * lq))
        size = (mixed + q + p) / abs(a * (a - 1))
        return (mixed - a * p - (1 - a) * q) / (a * (a - 1)), size, (q - mixed) / a, (mixed + q) / abs(a)
    if r.divergence == AB:
        cross = np.where(np.isneginf(lp) & np.isneginf(lq), 0.0, np.exp(a * lp + b * lq))
        pp, qq = np.exp((a + b) * lp), np.exp((a + b) * lq)
        value = -(cross - a / (a + b) * pp - b / (a + b) * qq) / (a * b)
        return value, (cross + pp + qq) / abs(a * b), (qq - cross) / a, (cross + qq) / abs(a)
    both_empty = np.isneginf(x) & np.isneginf(u)
    if r.a:  # centred
        kept = np.maximum(_total(~both_empty), 1)
        x = x - _total(np.where(both_empty, 0.0, x)) / kept
        u = u - _total(np.where(both_empty, 0.0, u)) / kept
    gap = np.where(both_empty, 0.0, x - u)
    parts = np.where(both_empty, 0.0, np.abs(x) + np.abs(u)) + 1
    return 0.5 * gap * gap, parts * parts, gap, parts


def _unbounded(r: Rows, lq: Array, lp: Array) -> Array:
    """Rows [C, 1] whose terms leave float32 on the way, or turn on a probability that one type holds and the other does not."""
    least = 1e-35 if r.epsilon > 1e-10 else 1e-300
    empty_q, empty_p = np.isneginf(lq), np.isneginf(lp)
    with np.errstate(invalid="ignore"):
        edge = (empty_q & ~empty_p & (np.exp(lp) < least)) | (empty_p & ~empty_q & (np.exp(lq) < least))
        steep = np.abs(np.where(empty_q | empty_p, 0.0, lq - lp)) > 30
    exponents = {ALPHA: (r.a, 1 - r.a), AB: (r.a, r.b, r.a + r.b)}.get(r.divergence, ())
    if any(e <= 0 for e in exponents):
        edge = edge | steep | (empty_q != empty_p)
    return edge.any(-1, keepdims=True)


def rows(r: Rows) -> Truth:
    """The answers of a call. Rows with +inf, with no finite logit, or too steep for the kernel's type have an infinite bound."""
    with np.errstate(all="ignore"):
        return _rows(r)


def _rows(r: Rows) -> Truth:
    t, eps = r.temperature, r.epsilon
    (zs, reach_s), (zt, reach_t) = _transformed(r.student, t), _transformed(r.teacher, t)
    x, u = zs / t, zt / t
    (lq, lse_s), (lp, lse_t) = _log_softmax(x), _log_softmax(u)
    q = np.exp(lq)
    value, value_size, slope, slope_size = _terms(r, x, u, lq, lp)
    divergence = _total(value)
    ulps = eps * (64 + 8 * (reach_s + reach_t + np.log(zs.shape[-1])))
    has_nan = (np.isnan(zs) | np.isnan(zt)).any(-1, keepdims=True)
    lost = np.isposinf(zs).any(-1, keepdims=True) | np.isposinf(zt).any(-1, keepdims=True) | ~np.isfinite(lse_s) | ~np.isfinite(lse_t)
    lost |= (ulps > 1e-2) | _unbounded(r, lq, lp)
    # Probabilities that small are 0 to the kernel, and so is what becomes of them: q^(a + b) too.
    least = (1e-34 if eps > 1e-10 else 1e-290) ** (min(1.0, r.a + r.b) if r.divergence == AB else 1.0)
    tiny = least * (1 + reach_s + reach_t) * zs.shape[-1]
    divergence_bound = ulps * (_total(value_size) + tiny)
    if r.divergence == LOGIT_MSE:
        divergence_bound = ulps * (1 + reach_s + reach_t) * _total(np.sqrt(value_size))

    ce = np.full_like(divergence, np.nan)
    lq1, lse1 = _log_softmax(zs)
    hot = np.zeros_like(zs)
    if r.labels is not None:
        np.put_along_axis(hot, r.labels[:, None], 1.0, -1)
        ce = lse1 - np.take_along_axis(zs, r.labels[:, None], -1)
    ce_bound = ulps * (1 + t * reach_s + np.log(zs.shape[-1]))
    weight = 1.0 if r.weight is None else r.weight[:, None]
    total = r.value_scale * divergence if r.value_scale else np.zeros_like(divergence)
    total_bound = abs(r.value_scale) * divergence_bound if r.value_scale else np.zeros_like(divergence)
    if r.labels is not None and r.ce_weight:
        total, total_bound = total + r.ce_weight * ce, total_bound + abs(r.ce_weight) * ce_bound
    loss = weight * total
    loss_bound = weight * (total_bound + 4 * eps * np.abs(total))
    # A NaN anywhere in the row is a NaN loss, if the divergence counts at all; an infinite loss times weight 0 is nobody's business.
    loss = np.where(has_nan, np.nan, loss)
    silent = has_nan & (r.value_scale == 0) | ~np.isfinite(total) & (np.asarray(weight) == 0)
    loss_bound = np.where(lost & ~has_nan | silent, np.inf, np.where(np.isfinite(loss_bound), loss_bound, 0.0))

    softmax = r.divergence != LOGIT_MSE
    slopes = slope - q * _total(slope) if softmax else slope
    slopes_size = slope_size + q * _total(slope_size) if softmax else slope_size
    gradient = r.slope_scale * slopes if r.slope_scale else np.zeros_like(zs)
    gradient_bound = abs(r.slope_scale) * (ulps * slopes_size + tiny)
    if r.labels is not None and r.ce_weight:
        gradient = gradient + r.ce_weight * (np.exp(lq1) - hot)
        gradient_bound = gradient_bound + abs(r.ce_weight) * (ulps * max(t, 1.0) * (np.exp(lq1) + hot) + tiny)
    outer = r.student.scale * r.dz_scale * weight
    if r.student.softcap:
        bend = 1 - (zs / r.student.softcap) ** 2
        gradient_bound = gradient_bound * np.abs(bend) + 64 * eps * (np.abs(gradient) + gradient_bound)
        gradient = gradient * bend
    dz = outer * gradient
    dz_bound = np.abs(outer) * (gradient_bound + 8 * eps * np.abs(gradient))
    unclear = lost | has_nan | ~np.isfinite(dz).all(-1, keepdims=True) | ~np.isfinite(dz_bound)
    dz_bound = np.where(unclear, np.inf, dz_bound)

    unclear = lost | has_nan

    def statistic(answer: Array, bound: Array) -> Answer:
        bound = np.where(
            unclear, np.inf, np.where(np.isfinite(bound), bound, 0.0) + 1.2e-7 * np.where(np.isfinite(answer), np.abs(answer), 0)
        )
        return Answer(answer[:, 0], bound[:, 0])

    def entropy(log_probability: Array) -> Answer:
        terms = _times(np.exp(log_probability), log_probability)
        return statistic(-_total(terms), ulps * (1 + _total(np.abs(terms))) + 1e-30)

    order_s, order_t = np.sort(zs, -1), np.sort(zt, -1)
    close = [o[:, -1:] - o[:, -2:-1] <= 8 * eps * t * reach for o, reach in ((order_s, reach_s), (order_t, reach_t))]
    tied = close[0] | close[1] if zs.shape[-1] > 1 else np.zeros_like(lost)
    agreement = (zs.argmax(-1) == zt.argmax(-1))[:, None].astype(zs.dtype)
    stats = [
        statistic(divergence, divergence_bound), statistic(ce, ce_bound), entropy(lq), entropy(lp),
        Answer(agreement[:, 0], np.where(tied | unclear, np.inf, 0.0)[:, 0]),
    ]  # fmt: skip
    return Truth(Answer(loss[:, 0], loss_bound[:, 0]), Answer(dz, dz_bound), stats)


@dataclass(frozen=True)
class HeadRows:
    """A call of the kernel of one side in exact numbers; what is None was not given."""

    side: Side
    temperature: float
    ids: Array | None  # [C, K]
    d_lse: Array | None  # [C, 1]
    d_entropy: Array | None  # [C, 1]
    d_logprobs: Array | None  # [C, K]
    dz_scale: float
    epsilon: float
    ties: bool = False  # logits are small whole numbers, which a scale does not round


@dataclass(frozen=True)
class HeadTruth:
    top: Answer  # [C, 1]
    log_sum: Answer  # [C, 1]
    entropy: Answer  # [C, 1]
    logprobs: Answer  # [C, K]
    dz: Answer  # [C, V], before it is rounded to its storage type
    z: Array  # [C, V]
    log_q: Answer  # [C, V]
    unsure: Array  # [C, 1]: of z, in the kernel's type

    def largest(self, ids: Array) -> tuple[Answer, Answer]:
        """For ids ``[C, k]``: 0 where one may stand, and NaN where it may not; and its log-probability."""
        z = np.where(np.isnan(self.z), -np.inf, self.z)
        order = np.argsort(-z, axis=-1, kind="stable")[:, : ids.shape[1]]
        inside = (ids >= 0) & (ids < z.shape[1])
        safe = np.where(inside, ids, 0)
        got, want = np.take_along_axis(z, safe, -1), np.take_along_axis(z, order, -1)
        with np.errstate(invalid="ignore"):
            close = (got == want) | (np.abs(got - want) <= self.unsure)
        exact = (self.unsure > 0) | (ids == order)  # among equals the first
        once = np.array([len(set(row)) == len(row) for row in ids])[:, None]
        allowed = inside & close & exact & once
        answer = Answer(np.where(allowed, ids, -7).astype(np.float64), np.zeros(ids.shape))
        return answer, Answer(*(np.take_along_axis(a, safe, -1) for a in (self.log_q.value, self.log_q.bound)))

    def possible(self, ids: Array) -> Answer:
        """For draws ``[C, S]``: themselves where they may be, else something else."""
        inside = (ids >= 0) & (ids < self.z.shape[1])
        possible = inside & ~np.isneginf(np.take_along_axis(self.z, np.where(inside, ids, 0), -1))
        lost = ~np.isfinite(self.log_q.bound[:, :1])
        return Answer(np.where(possible | (lost & (ids == -1)), ids, -7).astype(np.float64), np.zeros(ids.shape))


def head_rows(r: HeadRows) -> HeadTruth:
    """The answers of a call. Rows with NaN, +inf or no finite logit have infinite bounds."""
    with np.errstate(all="ignore"):
        return _head_rows(r)


def _head_rows(r: HeadRows) -> HeadTruth:
    t, eps = r.temperature, r.epsilon
    z, reach = _transformed(r.side, t)
    x = z / t
    log_q, lse = _log_softmax(x)
    q = np.exp(log_q)
    top = z.max(-1, keepdims=True)
    ulps = eps * (64 + 8 * (reach + np.log(z.shape[-1])))
    lost = ~np.isfinite(lse) | (ulps > 1e-2)

    def answer(value: Array, bound: Array) -> Answer:
        return Answer(value, np.where(lost, np.inf, bound))

    size_of_log = np.where(np.isfinite(log_q), np.abs(log_q), 0.0)
    log_answer = answer(log_q, ulps * (1 + eps * size_of_log) + 4 * eps * size_of_log)
    terms = _times(q, log_q)
    entropy = -_total(terms)
    ids = np.full((len(z), 0), -1) if r.ids is None else r.ids
    none, safe = ids < 0, np.where(ids < 0, 0, ids)
    logprobs = Answer(*(np.where(none, 0.0, np.take_along_axis(a, safe, -1)) for a in (log_answer.value, log_answer.bound)))

    zero = np.zeros_like(top)
    d_lse, d_entropy = (zero if d is None else d for d in (r.d_lse, r.d_entropy))
    d_ids = np.zeros(ids.shape) if r.d_logprobs is None else np.where(none, 0.0, r.d_logprobs)
    at_ids, at_ids_size = np.zeros_like(z), np.zeros_like(z)
    rows = np.broadcast_to(np.arange(len(z))[:, None], ids.shape)
    np.add.at(at_ids, (rows, safe), d_ids)
    np.add.at(at_ids_size, (rows, safe), np.abs(d_ids))
    gradient = q * (d_lse - _total(d_ids) - d_entropy * entropy) - d_entropy * terms + at_ids
    size = q * (np.abs(d_lse) + _total(np.abs(d_ids)) + np.abs(d_entropy) * (entropy + 1)) + np.abs(d_entropy * terms) + at_ids_size
    tiny = (1e-34 if eps > 1e-10 else 1e-290) * (1 + reach) * z.shape[-1]
    bound = ulps * size + tiny * (1 + np.abs(d_lse) + _total(np.abs(d_ids)) + np.abs(d_entropy))
    if r.side.softcap:
        bend = 1 - (z / r.side.softcap) ** 2
        bound = bound * np.abs(bend) + 64 * eps * (np.abs(gradient) + bound)
        gradient = gradient * bend
    outer = r.side.scale / t * r.dz_scale
    dz = outer * gradient
    plain = r.side.bias is None and (r.side.scale == 1 or r.ties) and not r.side.softcap
    least = 1e-44 if eps > 1e-10 else 1e-323  # that can be stored
    return HeadTruth(
        answer(top, 4 * eps * (np.abs(top) + t * reach) + least), answer(lse - top / t, ulps),
        answer(entropy, ulps * (1 + _total(np.abs(terms))) + 1e-30),
        logprobs, answer(dz, abs(outer) * (bound + 8 * eps * np.abs(gradient))), z, log_answer,
        zero if plain else 8 * eps * t * (reach + 1) * np.ones_like(top),
    )  # fmt: skip


def softmax(x: Array, temperature: float, logarithm: bool, epsilon: float) -> Answer:
    """``softmax(x / T)`` or its logarithm, ``[C, V]``; infinite bounds as in ``head_rows``."""
    with np.errstate(all="ignore"):
        r = _head_rows(HeadRows(Side(x, None, 1.0, 0.0), temperature, None, None, None, None, 1.0, epsilon))
        if logarithm:
            return r.log_q
        q = np.exp(r.log_q.value)
        bound = 2 * q * r.log_q.bound + (1e-37 if epsilon > 1e-10 else 1e-300)
        return Answer(q, np.where(np.isposinf(r.log_q.bound), np.inf, bound))


def softmax_gradient(y: Array, dy: Array, temperature: float, logarithm: bool, epsilon: float) -> Answer:
    """By the logits, from the result y and the gradient by it, ``[C, V]``; infinite bounds in rows that are not finite."""
    with np.errstate(all="ignore"):
        p = np.exp(y) if logarithm else y
        through = dy if logarithm else p * dy
        value = ((dy if logarithm else p * dy) - p * _total(through)) / temperature
        size = (np.abs(dy if logarithm else p * dy) + np.abs(p) * _total(np.abs(through))) / temperature
        relative = epsilon * (64 + 8 * np.log(y.shape[-1]) + (4 * np.where(np.isfinite(y), np.abs(y), 0.0) if logarithm else 0.0))
        lost = np.isnan(y).any(-1, keepdims=True) | np.isposinf(y).any(-1, keepdims=True)
        return Answer(value, np.where(lost, np.inf, relative * size + (1e-34 if epsilon > 1e-10 else 1e-290)))


def wrong(got: Array, answer: Answer) -> Array:
    """Return where ``got`` is wrong. Infinities and NaN must match exactly."""
    with np.errstate(all="ignore"):
        exact = np.where(np.isnan(answer.value), np.isnan(got), got == answer.value)
        near = np.abs(got - answer.value) <= answer.bound
    return ~(np.isposinf(answer.bound) | exact | np.where(np.isfinite(answer.value), near, False))
