"""Row kernels of one side, and softmax. One program processes a row in blocks [R, W], as in kernel.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LN2, LOG2E, LOWEST, NEGLIGIBLE, at_least, fast_log2
from .kernel import CAPPED, joined, load_logits, moved_sum


@triton.jit
def statistics_block(lanes, x, factor, ENTROPY: tl.constexpr):
    """Update each lane's online softmax: largest logit, sum of ``e = 2 ** d`` with ``d = (x - largest) * factor``, sum of ``e * d``."""
    top, total, weighted = lanes
    new = tl.maximum(top, tl.max(x, 0))
    if ENTROPY:
        shift = at_least((top - new) * factor, NEGLIGIBLE)
        distance = (x - new[None, :]) * factor
        e = tl.exp2(distance)
        weighted = (weighted + total * shift) * tl.exp2(shift) + tl.sum(e * at_least(distance, NEGLIGIBLE), 0)
        total = total * tl.exp2(shift) + tl.sum(e, 0)
    else:
        total = moved_sum(total, top, new, x, factor)
    return new, total, weighted


@triton.jit
def row_statistics(side, factor, vocab, TRANSFORM: tl.constexpr, ENTROPY: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Return the largest logit, ``log2`` of the sum of exponentials relative to it, and the entropy."""
    row, bias, scale, softcap = side
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    whole = vocab // (R * W) * (R * W)
    zero = tl.zeros([W], tl.float32)
    lanes = (tl.full([W], LOWEST, tl.float32), zero, zero)
    for start in range(0, whole, R * W):
        lanes = statistics_block(lanes, load_logits(row, bias, start + offsets, None, scale, softcap, TRANSFORM), factor, ENTROPY)
    if whole < vocab:
        mask = whole + offsets < vocab
        lanes = statistics_block(lanes, load_logits(row, bias, whole + offsets, mask, scale, softcap, TRANSFORM), factor, ENTROPY)
    top, total, weighted = lanes
    largest, total_of_row = joined(top, total, factor)
    log_sum = tl.log2(total_of_row)
    entropy = 0.0
    if ENTROPY:
        shift = at_least((top - largest) * factor, NEGLIGIBLE)
        moved = total * tl.exp2(shift)
        entropy = (log_sum - tl.sum(weighted * tl.exp2(shift) + moved * shift, 0) / tl.sum(moved, 0)) * LN2
    return largest, log_sum, entropy


@triton.jit
def slope_of(log_q, c0, c1, D_ENTROPY: tl.constexpr):
    """Return ``q * (c0 + c1 * log q)``; 0 where q is 0."""
    q = tl.exp2(log_q * LOG2E)
    if D_ENTROPY:
        return tl.where(q == 0.0, 0.0, q * (c0 + c1 * log_q))
    else:
        return q * c0


@triton.jit
def log_probability(z, norm):
    """Return ``log q`` of a logit from its row's ``(inv_temperature, top, log_sum)``."""
    return tl.fma(z - norm[1], norm[0], -norm[2])


@triton.jit
def entropy_block(z, norm):
    log_q = log_probability(z, norm)
    q = tl.exp2(log_q * LOG2E)
    return tl.sum(tl.where(q == 0.0, 0.0, q * log_q), 0)


@triton.jit
def row_entropy(side, norm, vocab, TRANSFORM: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Return ``-sum q log q`` over these columns with the normalisers of an earlier launch."""
    row, bias, scale, softcap = side
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    whole = vocab // (R * W) * (R * W)
    total = tl.zeros([W], tl.float32)
    for start in range(0, whole, R * W):
        total -= entropy_block(load_logits(row, bias, start + offsets, None, scale, softcap, TRANSFORM), norm)
    if whole < vocab:
        mask = whole + offsets < vocab
        total -= entropy_block(load_logits(row, bias, whole + offsets, mask, scale, softcap, TRANSFORM), norm)
    return tl.sum(total, 0)


@triton.jit
def write_block(dz, side, columns, mask, norm, c0, c1, outer, TRANSFORM: tl.constexpr, D_ENTROPY: tl.constexpr):
    row, bias, scale, softcap = side
    z = load_logits(row, bias, columns, mask, scale, softcap, TRANSFORM)
    g = slope_of(log_probability(z, norm), c0, c1, D_ENTROPY) * outer
    if TRANSFORM == CAPPED:
        bend = z / softcap
        g *= 1.0 - bend * bend
    # dz may overwrite the logits with a narrower type: wait until all warps have read their logits.
    tl.debug_barrier()
    tl.store(dz + columns, g.to(dz.dtype.element_ty), mask=mask)


@triton.jit
def add_at_ids(
    dz, ids, logprobs, d_logprobs, num_ids, norm, softcap, c0, c1, outer,
    TRANSFORM: tl.constexpr, D_ENTROPY: tl.constexpr, IDS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rewrite the columns at ids with d_logprobs added. Equal ids each sum all their d_logprobs and write the same value."""
    tl.debug_barrier()
    for start in range(0, num_ids, IDS_BLOCK):
        k = start + tl.arange(0, IDS_BLOCK)
        chosen = tl.load(ids + k, mask=k < num_ids, other=-1)
        log_q = tl.load(logprobs + k, mask=k < num_ids, other=0.0)
        g = slope_of(log_q, c0, c1, D_ENTROPY)
        for j in range(0, num_ids):
            g += tl.where(chosen == tl.load(ids + j), tl.load(d_logprobs + j), 0.0)
        if TRANSFORM == CAPPED:
            bend = ((log_q + norm[2]) / norm[0] + norm[1]) / softcap
            g *= 1.0 - bend * bend
        tl.store(dz + chosen, (g * outer).to(dz.dtype.element_ty), mask=chosen >= 0)


@triton.jit(do_not_specialize=["num_ids"])
def head_rows_kernel(
    logits,  # [C, V]
    bias,  # [V] float32, or None
    top, log_sum,  # [C] float32
    entropy,  # [C] float32, or None
    ids,  # [C, K] int64, or None
    logprobs,  # [C, K] float32, or None
    d_lse, d_entropy, d_logprobs,  # [C], [C], [C, K] float32, or None
    dz,  # [C, V], or None; rows may start at the logits' rows, in the same or a narrower type
    logits_stride, dz_stride, vocab, num_ids,
    inv_temperature,
    log2_factor,  # 1 / T, in units of log 2
    scale, softcap, outer,
    TRANSFORM: tl.constexpr, NORMALISERS: tl.constexpr, SUMS: tl.constexpr, GRADIENT: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, IDS_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    side = (logits + row * logits_stride, bias, scale, softcap)
    h = 0.0
    if NORMALISERS:
        largest, log_total, h = row_statistics(side, log2_factor, vocab, TRANSFORM, SUMS and entropy is not None, R, W)
        norm = (inv_temperature, largest, log_total * LN2)
        tl.store(top + row, norm[1])
        tl.store(log_sum + row, norm[2])
    else:
        norm = (inv_temperature, tl.load(top + row), tl.load(log_sum + row))
    if entropy is not None:
        if SUMS:
            if not NORMALISERS:
                h = row_entropy(side, norm, vocab, TRANSFORM, R, W)
            tl.store(entropy + row, h)
        elif GRADIENT:
            h = tl.load(entropy + row)

    c0 = 0.0
    c1 = 0.0
    if d_lse is not None:
        c0 += tl.load(d_lse + row)
    if d_entropy is not None:
        c1 -= tl.load(d_entropy + row)
        c0 += c1 * h
    if ids is not None and (SUMS or GRADIENT):
        ids += row * num_ids
        logprobs += row * num_ids
        if d_logprobs is not None:
            d_logprobs += row * num_ids
        for start in range(0, num_ids, IDS_BLOCK):
            k = start + tl.arange(0, IDS_BLOCK)
            chosen = tl.load(ids + k, mask=k < num_ids, other=-1)
            is_token = chosen >= 0
            z = load_logits(side[0], bias, chosen, is_token, scale, softcap, TRANSFORM)
            tl.store(logprobs + k, tl.where(is_token, log_probability(z, norm), 0.0), mask=k < num_ids)
            if d_logprobs is not None:
                c0 -= tl.sum(tl.load(d_logprobs + k, mask=is_token, other=0.0), 0)

    if GRADIENT:
        dz += row * dz_stride
        D_ENTROPY: tl.constexpr = d_entropy is not None
        offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
        whole = vocab // (R * W) * (R * W)
        for start in range(0, whole, R * W):
            write_block(dz, side, start + offsets, None, norm, c0, c1, outer, TRANSFORM, D_ENTROPY)
        if whole < vocab:
            write_block(dz, side, whole + offsets, whole + offsets < vocab, norm, c0, c1, outer, TRANSFORM, D_ENTROPY)
        if d_logprobs is not None:
            add_at_ids(dz, ids, logprobs, d_logprobs, num_ids, norm, softcap, c0, c1, outer, TRANSFORM, D_ENTROPY, IDS_BLOCK)


@triton.jit
def log1m(u):
    """Return log(1 - u) in float64, 0 < u <= 1, corrected for the rounding of 1 - u."""
    w = 1.0 - u
    return tl.log(w) + ((-u) - (w - 1.0)) / tl.where(w == 0.0, 1.0, w)


@triton.jit
def race_block(
    best, winner, side, slots, mask_slots, vocab, key, counter, numbers, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Update the earliest arrival and its column with the four columns of each of ``slots``, which are in groups of 128."""
    row, bias, scale, softcap = side
    draw, low_row, high_row = counter
    reference, log2_factor, inv_temperature_64, scale_64, softcap_64 = numbers
    high = tl.philox(key, slots, low_row, draw, high_row)
    some = tl.zeros([BLOCK], dtype=tl.int32)
    candidates = ()
    for w in tl.static_range(4):
        columns = slots // 128 * 512 + w * 128 + slots % 128
        mask = None if mask_slots is None else columns < vocab
        z = load_logits(row, bias, columns, mask, scale, softcap, TRANSFORM)
        x = (z - reference) * log2_factor
        u = ((high[w] >> 8).to(tl.float32) + 4.5e-13) * 5.9604645e-08
        # The error bound of x includes the rounding of the logits.
        margin = 2e-3 + 1e-6 * (tl.abs(z) + tl.abs(reference) + softcap) * log2_factor
        candidate = (x > float("-inf")) & ((x - fast_log2(u)) + margin > (best * LOG2E).to(tl.float32))
        some |= candidate.to(tl.int32)
        candidates += (candidate,)
    if tl.max(some, 0) > 0:
        low = tl.philox(key, slots, low_row, draw, high_row + 1)
        earliest = tl.full([BLOCK], float("-inf"), dtype=tl.float64)
        at = tl.zeros([BLOCK], dtype=tl.int32)
        for w in tl.static_range(4):
            columns = slots // 128 * 512 + w * 128 + slots % 128
            exact = tl.load(row + columns, mask=candidates[w], other=0.0).to(tl.float64)
            if bias is not None:
                exact += tl.load(bias + columns, mask=candidates[w], other=0.0).to(tl.float64)
            exact *= scale_64
            if TRANSFORM == CAPPED:
                e = tl.exp(-2.0 * tl.abs(exact / softcap_64))
                t = (1.0 - e) / (1.0 + e)
                exact = softcap_64 * tl.where(exact < 0.0, -t, t)
            uniform = high[w].to(tl.float64) * 2.3283064365386963e-10 + (low[w].to(tl.float64) + 0.5) * 5.421010862427522e-20
            time = (exact - reference.to(tl.float64)) * inv_temperature_64 - tl.log(-log1m(uniform))
            time = tl.where(candidates[w], time, float("-inf"))
            at = tl.where(time > earliest, columns, at)
            earliest = tl.maximum(earliest, time)
        first = tl.max(earliest, 0)
        column = tl.min(tl.where(earliest == first, at, vocab), 0)
        ahead = (first > best) | ((first == best) & (column < winner))
        winner = tl.where(ahead, column, winner)
        best = tl.where(ahead, first, best)
    return best, winner


@triton.jit(do_not_specialize=["first_row", "num_draws"])
def sample_rows_kernel(
    logits,  # [C, V]
    bias,  # [V] float32, or None
    top, log_sum,  # [C] float32
    seed,  # [] int64
    draws,  # [C, S] int32
    logits_stride, vocab, num_draws, first_row,
    log2_factor,  # 1 / T, in units of log 2
    scale, softcap,
    inv_temperature_64: tl.float64, scale_64: tl.float64, softcap_64: tl.float64,
    TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,  # counters per block, for 4 * BLOCK columns; a multiple of 128
):  # fmt: skip
    """Compute one draw of one row. csrc/philox.h defines the random numbers, csrc/cpu/heads.cpp the race.

    An exponential time is longer than its uniform number u, so ``x - log u`` with x = (z - top) / T is an upper bound for a column's
    score. Float32 and 24 bits of u select the columns whose bound exceeds the best score so far; only these are computed in float64.
    """
    # A one-dimensional grid: the other dimensions are limited to 65535.
    row = (tl.program_id(0) // num_draws).to(tl.int64)
    draw = tl.program_id(0) % num_draws
    side = (logits + row * logits_stride, bias, scale, softcap)
    number = row + first_row
    key = tl.load(seed)
    numbers = (tl.load(top + row), log2_factor, inv_temperature_64, scale_64, softcap_64)
    offsets = tl.arange(0, BLOCK)
    same = tl.zeros([BLOCK], dtype=tl.int32)
    low_row = (number & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True) + same
    high_row = ((number >> 32) * 2).to(tl.int32) + same
    counter = (draw + same, low_row, high_row)
    best = tl.full([], float("-inf"), dtype=tl.float64)
    winner = tl.full([], -1, dtype=tl.int32)
    whole = vocab // (4 * BLOCK) * BLOCK
    for start in range(0, whole, BLOCK):
        best, winner = race_block(best, winner, side, start + offsets, None, vocab, key, counter, numbers, TRANSFORM, BLOCK)
    if whole * 4 < vocab:
        best, winner = race_block(best, winner, side, whole + offsets, True, vocab, key, counter, numbers, TRANSFORM, BLOCK)
    total = tl.load(log_sum + row)
    tl.store(draws + row * num_draws + draw, tl.where(total - total == 0.0, winner, -1))


@triton.jit
def load_block(row, columns, mask, other):
    if mask is None:
        return tl.load(row + columns).to(tl.float32)
    else:
        return tl.load(row + columns, mask=mask, other=other).to(tl.float32)


@triton.jit
def softmax_of(x, top, log_sum, factor, log2_factor, LOGARITHM: tl.constexpr):
    """Return softmax or its logarithm from a row's largest logit and the log-sum relative to it, in units of log 2 or natural units."""
    if LOGARITHM:
        return tl.fma(x - top, factor, -log_sum)
    else:
        return tl.exp2(tl.fma(x - top, log2_factor, -log_sum))


@triton.jit
def softmax_rows_kernel(
    x, out,  # [C, V]; out may be x
    x_stride, out_stride, vocab,
    factor, log2_factor,  # 1 / T in natural units and in units of log 2
    LOGARITHM: tl.constexpr,
    ONE_READ: tl.constexpr,  # a block holds a whole row
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    if ONE_READ:
        columns = tl.arange(0, R * W)
        mask = columns < vocab
        v = load_block(x, columns, mask, float("-inf"))
        top = tl.max(v, 0)
        distance = v - top
        e = tl.exp2(distance * log2_factor)
        total = tl.sum(e, 0)
        y = tl.fma(distance, factor, tl.log2(total) * -LN2) if LOGARITHM else e * (1.0 / total)
        tl.store(out + columns, y.to(out.dtype.element_ty), mask=mask)
    else:
        top, log_sum, _ = row_statistics((x, None, 1.0, 0.0), log2_factor, vocab, 0, False, R, W)
        if LOGARITHM:
            log_sum *= LN2
        offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
        whole = vocab // (R * W) * (R * W)
        for start in range(0, whole, R * W):
            y = softmax_of(load_block(x, start + offsets, None, 0.0), top, log_sum, factor, log2_factor, LOGARITHM)
            tl.store(out + start + offsets, y.to(out.dtype.element_ty))
        if whole < vocab:
            mask = whole + offsets < vocab
            y = softmax_of(load_block(x, whole + offsets, mask, 0.0), top, log_sum, factor, log2_factor, LOGARITHM)
            tl.store(out + whole + offsets, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gradient_of(p, d, total, inv_temperature, LOGARITHM: tl.constexpr):
    if LOGARITHM:
        return (d - tl.exp2(p * LOG2E) * total) * inv_temperature
    else:
        return p * (d - total) * inv_temperature


@triton.jit
def softmax_gradient_rows_kernel(
    y, dy, out,  # [C, V]; out may be y or dy
    y_stride, dy_stride, out_stride, vocab, inv_temperature,
    LOGARITHM: tl.constexpr, ONE_READ: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y += row * y_stride
    dy += row * dy_stride
    out += row * out_stride
    if ONE_READ:
        columns = tl.arange(0, R * W)
        mask = columns < vocab
        p = load_block(y, columns, mask, 0.0)
        d = load_block(dy, columns, mask, 0.0)
        total = tl.sum(d, 0) if LOGARITHM else tl.sum(p * d, 0)
        tl.store(out + columns, gradient_of(p, d, total, inv_temperature, LOGARITHM).to(out.dtype.element_ty), mask=mask)
    else:
        offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
        whole = vocab // (R * W) * (R * W)
        parts = tl.zeros([W], dtype=tl.float32)
        for start in range(0, whole, R * W):
            d = load_block(dy, start + offsets, None, 0.0)
            parts += tl.sum(d if LOGARITHM else d * load_block(y, start + offsets, None, 0.0), 0)
        if whole < vocab:
            mask = whole + offsets < vocab
            d = load_block(dy, whole + offsets, mask, 0.0)
            parts += tl.sum(d if LOGARITHM else d * load_block(y, whole + offsets, mask, 0.0), 0)
        total = tl.sum(parts, 0)
        for start in range(0, whole, R * W):
            p = load_block(y, start + offsets, None, 0.0)
            d = load_block(dy, start + offsets, None, 0.0)
            tl.store(out + start + offsets, gradient_of(p, d, total, inv_temperature, LOGARITHM).to(out.dtype.element_ty))
        if whole < vocab:
            mask = whole + offsets < vocab
            p = load_block(y, whole + offsets, mask, 0.0)
            d = load_block(dy, whole + offsets, mask, 0.0)
            g = gradient_of(p, d, total, inv_temperature, LOGARITHM)
            tl.store(out + whole + offsets, g.to(out.dtype.element_ty), mask=mask)
