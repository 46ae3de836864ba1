"""Row kernels of one side alone, and softmax: one program owns a row, as in kernel.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import load_logits, merge


@triton.jit
def merge_entropy(top, total, weighted, z, inv_temperature):
    """Online softmax with the sum of exp(x) * x, x = (z - max) / T, which makes an entropy of it."""
    new = tl.maximum(top, tl.max(z, 0))
    reference = tl.where(new == float("-inf"), 0.0, new)
    shift = tl.where(top == float("-inf"), 0.0, (top - reference) * inv_temperature)
    moved = tl.exp(shift)
    x = (z - reference) * inv_temperature
    e = tl.exp(x)
    weighted = tl.where(moved == 0.0, 0.0, (weighted + total * shift) * moved) + tl.sum(tl.where(e == 0.0, 0.0, e * x), 0)
    total = total * moved + tl.sum(e, 0)
    return new, total, weighted


@triton.jit
def head_rows_kernel(
    logits,  # [C, V]
    bias,  # [V] float32
    top, log_sum, entropy,  # [C] float32
    ids,  # [C, K] int64
    logprobs,  # [C, K] float32
    d_lse, d_entropy, d_logprobs,  # [C], [C], [C, K] float32
    dz,  # [C, V]; may start where logits' row starts, in a type no wider
    logits_stride, dz_stride, vocab, num_ids,
    inv_temperature, scale, softcap, dz_scale,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, STATISTICS: tl.constexpr, ENTROPY: tl.constexpr, IDS: tl.constexpr,
    D_LSE: tl.constexpr, D_ENTROPY: tl.constexpr, D_LOGPROBS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, IDS_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    offsets = tl.arange(0, BLOCK)
    # log q = (z - shift) / T - rest: see kd_rows_kernel.
    rest = 0.0
    h = 0.0
    if STATISTICS:
        shift = float("-inf")
        total = 0.0
        weighted = 0.0
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            z = load_logits(logits, bias, columns, mask, scale, softcap, BIAS, SOFTCAP)
            if ENTROPY:
                shift, total, weighted = merge_entropy(shift, total, weighted, z, inv_temperature)
            else:
                shift, total = merge(shift, total, z, inv_temperature)
        rest = tl.log(total)
        tl.store(top + row, shift)
        tl.store(log_sum + row, rest)
        if ENTROPY:
            h = rest - weighted / total
            tl.store(entropy + row, h)
    else:
        shift = tl.load(top + row)
        rest = tl.load(log_sum + row)
        if ENTROPY:
            h = tl.load(entropy + row)

    c0 = 0.0
    c1 = 0.0
    if D_LSE:
        c0 += tl.load(d_lse + row)
    if D_ENTROPY:
        c1 -= tl.load(d_entropy + row)
        c0 += c1 * h
    slots = tl.arange(0, IDS_BLOCK)
    if IDS:
        ids += row * num_ids
        logprobs += row * num_ids
        d_logprobs += row * num_ids
        for start in range(0, num_ids, IDS_BLOCK):
            k = start + slots
            chosen = tl.load(ids + k, mask=k < num_ids, other=-1)
            wanted = chosen >= 0
            z = load_logits(logits, bias, chosen, wanted, scale, softcap, BIAS, SOFTCAP)
            tl.store(logprobs + k, tl.where(wanted, (z - shift) * inv_temperature - rest, 0.0), mask=k < num_ids)
            if D_LOGPROBS:
                c0 -= tl.sum(tl.load(d_logprobs + k, mask=wanted, other=0.0), 0)

    if GRADIENT:
        dz += row * dz_stride
        outer = scale * inv_temperature * dz_scale
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            z = load_logits(logits, bias, columns, mask, scale, softcap, BIAS, SOFTCAP)
            log_q = (z - shift) * inv_temperature - rest
            g = tl.exp(log_q)
            if D_ENTROPY:
                g = tl.where(g == 0.0, 0.0, g * (c0 + c1 * log_q))
            else:
                g *= c0
            if SOFTCAP:
                bend = z / softcap
                g *= 1.0 - bend * bend
            # dz may be narrower than the logits it lies over: other warps must have read theirs first.
            tl.debug_barrier()
            tl.store(dz + columns, (g * outer).to(dz.dtype.element_ty), mask=mask)
        if D_LOGPROBS:
            # The few columns at ids once more, with what comes on top; of equal ids each sums all of them and writes the same.
            tl.debug_barrier()
            for start in range(0, num_ids, IDS_BLOCK):
                k = start + slots
                chosen = tl.load(ids + k, mask=k < num_ids, other=-1)
                log_q = tl.load(logprobs + k, mask=k < num_ids, other=0.0)
                g = tl.exp(log_q)
                if D_ENTROPY:
                    g = tl.where(g == 0.0, 0.0, g * (c0 + c1 * log_q))
                else:
                    g *= c0
                for j in range(0, num_ids):
                    g += tl.where(chosen == tl.load(ids + j), tl.load(d_logprobs + j), 0.0)
                if SOFTCAP:
                    bend = ((log_q + rest) / inv_temperature + shift) / softcap
                    g *= 1.0 - bend * bend
                tl.store(dz + chosen, (g * outer).to(dz.dtype.element_ty), mask=chosen >= 0)


@triton.jit
def log1m(u):
    """log(1 - u) in float64, 0 < u <= 1: what 1 - u rounds away is put back."""
    w = 1.0 - u
    return tl.log(w) + ((-u) - (w - 1.0)) / tl.where(w == 0.0, 1.0, w)


@triton.jit
def sample_rows_kernel(
    logits,  # [C, V]
    bias,  # [V] float32
    top, log_sum,  # [C] float32
    seed,  # [] int64
    numbers,  # [3] float64: 1 / T, scale, softcap
    draws,  # [C, S] int32
    logits_stride, vocab, num_draws, first_row, inv_temperature, scale, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,  # counters at a time, for 4 * BLOCK columns; a multiple of 128
):  # fmt: skip
    """One draw of one row: see csrc/philox.h for the numbers, and csrc/cpu/heads.cpp for the race.

    An exponential time is longer than its uniform number u, so ``x - log u`` with x = (z - top) / T bounds what a column can reach:
    float32 and 24 bits of u say which columns may beat the best so far, and those few are looked at in float64.
    """
    # Of one dimension: a grid's others end at 65535.
    row = (tl.program_id(0) // num_draws).to(tl.int64)
    draw = tl.program_id(0) % num_draws
    logits += row * logits_stride
    number = row + first_row
    key = tl.load(seed)
    inv_temperature_64 = tl.load(numbers)
    scale_64 = tl.load(numbers + 1)
    softcap_64 = tl.load(numbers + 2)
    offsets = tl.arange(0, BLOCK)
    same = tl.zeros([BLOCK], dtype=tl.int32)
    low_row = (number & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True) + same
    high_row = ((number >> 32) * 2).to(tl.int32) + same
    reference = tl.load(top + row)
    best = tl.full([], float("-inf"), dtype=tl.float64)
    winner = tl.full([], -1, dtype=tl.int32)
    for start in range(0, (vocab + 511) // 512 * 128, BLOCK):
        slots = start + offsets
        high = tl.philox(key, slots, low_row, draw + same, high_row)
        for w in tl.static_range(4):
            columns = slots // 128 * 512 + w * 128 + slots % 128
            mask = columns < vocab
            z = load_logits(logits, bias, columns, mask, scale, softcap, BIAS, SOFTCAP)
            x = (z - reference) * inv_temperature
            u = ((high[w] >> 8).to(tl.float32) + 4.5e-13) * 5.9604645e-08
            reach = x - tl.log(u)
            floor = best.to(tl.float32)
            # x is off by as much as logits are rounded.
            margin = 1e-3 + 1e-6 * (tl.abs(z) + tl.abs(reference) + softcap) * inv_temperature
            candidate = mask & (x > float("-inf")) & (reach + margin > floor)
            if tl.max(candidate.to(tl.int32), 0) > 0:
                low = tl.philox(key, slots, low_row, draw + same, high_row + 1)
                exact = tl.load(logits + columns, mask=candidate, other=0.0).to(tl.float64)
                if BIAS:
                    exact += tl.load(bias + columns, mask=candidate, other=0.0).to(tl.float64)
                exact *= scale_64
                if SOFTCAP:
                    e = tl.exp(-2.0 * tl.abs(exact / softcap_64))
                    t = (1.0 - e) / (1.0 + e)
                    exact = softcap_64 * tl.where(exact < 0.0, -t, t)
                uniform = high[w].to(tl.float64) * 2.3283064365386963e-10 + (low[w].to(tl.float64) + 0.5) * 5.421010862427522e-20
                time = (exact - reference.to(tl.float64)) * inv_temperature_64 - tl.log(-log1m(uniform))
                time = tl.where(candidate, time, float("-inf"))
                first = tl.max(time, 0)
                column = tl.min(tl.where(time == first, columns, vocab), 0)
                ahead = (first > best) | ((first == best) & (column < winner))
                winner = tl.where(ahead, column, winner)
                best = tl.where(ahead, first, best)
    total = tl.load(log_sum + row)
    tl.store(draws + row * num_draws + draw, tl.where(total - total == 0.0, winner, -1))


@triton.jit
def softmax_rows_kernel(
    x, out,  # [C, V]; out may be x
    x_stride, out_stride, vocab, inv_temperature,
    LOGARITHM: tl.constexpr,
    ONE_READ: tl.constexpr,  # BLOCK holds a row
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    offsets = tl.arange(0, BLOCK)
    if ONE_READ:
        mask = offsets < vocab
        v = tl.load(x + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        v = (v - tl.max(v, 0)) * inv_temperature
        e = tl.exp(v)
        total = tl.sum(e, 0)
        y = v - tl.log(total) if LOGARITHM else e / total
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=mask)
    else:
        top = float("-inf")
        total = 0.0
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            v = tl.load(x + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
            top, total = merge(top, total, v, inv_temperature)
        rest = tl.log(total)
        per_total = 1.0 / total
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            v = (tl.load(x + columns, mask=mask, other=float("-inf")).to(tl.float32) - top) * inv_temperature
            y = v - rest if LOGARITHM else tl.exp(v) * per_total
            tl.store(out + columns, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def softmax_gradient_rows_kernel(
    y, dy, out,  # [C, V]; out may be one of the others
    y_stride, dy_stride, out_stride, vocab, inv_temperature,
    LOGARITHM: tl.constexpr, ONE_READ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y += row * y_stride
    dy += row * dy_stride
    out += row * out_stride
    offsets = tl.arange(0, BLOCK)
    if ONE_READ:
        mask = offsets < vocab
        p = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        g = d - tl.exp(p) * tl.sum(d, 0) if LOGARITHM else p * (d - tl.sum(p * d, 0))
        tl.store(out + offsets, (g * inv_temperature).to(out.dtype.element_ty), mask=mask)
    else:
        parts = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            d = tl.load(dy + columns, mask=mask, other=0.0).to(tl.float32)
            if LOGARITHM:
                parts += d
            else:
                parts += d * tl.load(y + columns, mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(parts, 0)
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            p = tl.load(y + columns, mask=mask, other=0.0).to(tl.float32)
            d = tl.load(dy + columns, mask=mask, other=0.0).to(tl.float32)
            g = d - tl.exp(p) * total if LOGARITHM else p * (d - total)
            tl.store(out + columns, (g * inv_temperature).to(out.dtype.element_ty), mask=mask)
