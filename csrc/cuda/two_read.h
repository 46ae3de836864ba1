// The two-read row kernel (sm_80 and newer): a CTA owns a row pair and sweeps over it up to three times, as the Triton kernel does.
// For GPUs without clusters, for rows that are too long for the largest cluster's shared memory or do not start at multiples of
// 16 bytes, for sides of different dtypes, for LogitMSE, and for the backward pass, where one sweep is all there is to do.
#pragma once
#include "launch.h"
#include "row.h"

namespace kd {

constexpr int kTwoReadColumns = 8;  // per thread and step

struct NormPart {
    LogSums sums;
    float mean_s = 0.f, mean_t = 0.f, kept = 0.f;
};
struct ValuePart {
    Tail tail;
    float slope = 0.f;
};

// All threads return the same bits. A fast warp may write its part of the next reduction while a slow one still reads this one, and
// cannot get two ahead: hence two places, in turn.
template <class T, class Merge> KD_DEVICE T block_reduce(T x, int& parity, Merge&& merge) {
    static_assert(sizeof(T) <= kPartBytes);
    const int warp = thread_index() / kLanes, warps = block_threads() / kLanes, lane = thread_index() % kLanes;
    auto* const parts = reinterpret_cast<T*>(shared_memory() + parity * warps * kPartBytes);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) merge(x, shuffle_xor(x, mask));
    if (lane == 0) parts[warp] = x;
    sync_block();
    x = T{};
    for (int i = lane; i < warps; i += kLanes) merge(x, parts[i]);
#pragma unroll
    for (int mask = 16; mask; mask /= 2) merge(x, shuffle_xor(x, mask));
    parity ^= 1;
    return x;
}

// z of kCount columns, `stride` apart; -inf beyond the row.
template <class Logit, int kCount>
KD_DEVICE void load_columns(float* z, const RowSide& side, int64_t row, int column, int stride, int vocab) {
    const auto* const at = static_cast<const Logit*>(side.logits) + row * side.stride + column;
    if (stride == 1 && column + kCount <= vocab) {
        const auto raw = load_vector<Vec<Logit, kCount>>(at);
#pragma unroll
        for (int i = 0; i < kCount; ++i) z[i] = to_float(raw.at[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) z[i] = column + i * stride < vocab ? to_float(at[i * stride]) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        z[i] = column + i * stride < vocab ? transformed(z[i], side, column + i * stride) : -infinity();
}
template <int kCount> KD_DEVICE void load_any(float* z, const RowSide& side, int64_t row, int column, int stride, int vocab) {
    switch (side.dtype) {
        case Dtype::bf16: return load_columns<bf16, kCount>(z, side, row, column, stride, vocab);
        case Dtype::f16: return load_columns<half, kCount>(z, side, row, column, stride, vocab);
        default: return load_columns<float, kCount>(z, side, row, column, stride, vocab);
    }
}

template <class Logit, class D> KD_KERNEL KD_BOUNDS(kTwoReadThreads, 2) two_read_rows(const Rows a) {
    constexpr int kCount = kTwoReadColumns;
    const int64_t row = block_index();
    const float c = a.inv_temperature * kLog2E;
    const bool softmax = a.normalizer == Normalizer::softmax;
    const int label = a.labels ? int(a.labels[row]) : -1;
    const float weight = a.weight ? a.weight[row] : 1.f;
    const bool reports = thread_index() == 0;
    const bool second_sum = label >= 0 && a.inv_temperature != 1.f;  // cross-entropy is at T = 1

    // Aligned rows: a thread's columns are neighbours, read 16 bytes at a time. Others: neighbours go to neighbouring threads.
    const int stride = a.aligned ? 1 : block_threads();
    const int first = a.aligned ? thread_index() * kCount : thread_index();
    const int step = block_threads() * kCount;
    // Calls body(z, y, first column, valid columns) for this thread's columns of a step; all threads run every step.
    auto for_columns = [&](auto&& body) {
        for (int start = 0; start < a.vocab; start += step) {
            const int column = start + first;
            float z[kCount], y[kCount];
            load_columns<Logit, kCount>(z, a.student, row, column, stride, a.vocab);
            load_any<kCount>(y, a.teacher, row, column, stride, a.vocab);
            const int left = a.vocab - column, valid = left <= 0 ? 0 : (left + stride - 1) / stride;
            body(z, y, column, valid < kCount ? valid : kCount);
        }
    };

    Norm norm_s{c}, norm_t{c}, full_s, full_t, at_one;  // of the divergence, of the softmaxes, of the student's at T = 1
    LogSums sums;
    float slope_sum = float(D::slope_sum), target = 0.f;
    Tail tail;
    int parity = 0;
    const auto merge_values = [](ValuePart& x, const ValuePart& o) { x.tail.merge(o.tail), x.slope += o.slope; };
    // Sweep 2 is also where entropies are summed. Of slopes that jump, those of the forward pass may be others: they are summed again.
    const bool sweeps_values = a.statistics ? !D::knows_slope_sum || a.stats || !a.dz : D::slope_jumps;
    if (a.statistics) {
        if (reports && label >= 0) target = transformed(logit_at(a.student, row, label), a.student, label);
        NormPart part;
        if (softmax || a.stats || label >= 0 || a.normalizer == Normalizer::mean) {
            for_columns([&](const float* z, const float* y, int, int valid) {
                part.sums.template add<kCount>(z, y, c, c, second_sum);
                if (a.normalizer == Normalizer::mean) {
#pragma unroll
                    for (int i = 0; i < kCount; ++i)
                        if (i < valid && !(z[i] == -infinity() && y[i] == -infinity())) part.mean_s += z[i], part.mean_t += y[i], part.kept += 1.f;
                }
            });
            part = block_reduce(part, parity, [&](NormPart& x, const NormPart& o) {
                x.sums.merge(o.sums, c, c);
                x.mean_s += o.mean_s, x.mean_t += o.mean_t, x.kept += o.kept;
            });
        }
        sums = part.sums;
        full_s = norm_of(sums.max_s, sums.sum_s, c), full_t = norm_of(sums.max_t, sums.sum_t, c);
        if (softmax) {
            norm_s = full_s, norm_t = full_t;
        } else if (a.normalizer == Normalizer::mean) {
            const float size = fmaxf(part.kept, 1.f);
            norm_s.top = part.mean_s / size, norm_t.top = part.mean_t / size;
        }
        if (label >= 0) at_one = second_sum ? norm_of(sums.max_s, sums.sum_ce, kLog2E) : full_s;
    } else {
        norm_s = saved_norm(a, row, kTopS, kRestS, c), norm_t = saved_norm(a, row, kTopT, kRestT, c);
        slope_sum = state_at(a, row, kSlopeSum);
        at_one = saved_norm(a, row, kTopCe, kRestCe, kLog2E);
    }

    if (sweeps_values) {
        ValuePart part;
        for_columns([&](const float* z, const float* y, int column, int valid) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (i >= valid) continue;
                const float log2_q = norm_s(z[i]), log2_p = norm_t(y[i]);
                const Terms<float> t = column_terms<D>(a, log2_q, log2_p, exp2_fast(log2_q));
                part.tail.value += t.value, part.slope += t.slope;
                if (a.stats) {
                    const int at = column + i * stride;
                    part.tail.entropy_s += entropy_term(full_s(z[i])), part.tail.entropy_t += entropy_term(full_t(y[i]));
                    if (z[i] == sums.max_s && at < part.tail.best_s) part.tail.best_s = at;
                    if (y[i] == sums.max_t && at < part.tail.best_t) part.tail.best_t = at;
                }
            }
        });
        part = block_reduce(part, parity, merge_values);
        tail = part.tail;
        if (!D::knows_slope_sum) slope_sum = part.slope;
    }

    if (a.dz) {
        const Gradient<true> gradient(a, softmax ? slope_sum : 0.f, at_one, weight, label);
        void* const dz = dz_row(a, row);
        ValuePart part;
        for_columns([&](const float* z, const float* y, int column, int valid) {
            float g[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float log2_q = norm_s(z[i]), log2_p = norm_t(y[i]), q = exp2_fast(log2_q);
                const Terms<float> t = column_terms<D>(a, log2_q, log2_p, q);
                if (i < valid) part.tail.value += t.value;
                g[i] = gradient(t.slope, softmax ? q : 0.f, z[i], column + i * stride);
            }
            sync_block();  // dz may be narrower than the logits it lies over: other threads have read theirs
            store_dz<Logit, kCount>(a, dz, column, stride, g, valid);
        });
        if (a.statistics && !sweeps_values) tail = block_reduce(part, parity, merge_values).tail;
    }

    if (a.statistics && reports) {
        save_norm(a, row, kTopS, kRestS, norm_s), save_norm(a, row, kTopT, kRestT, norm_t);
        state_at(a, row, kSlopeSum) = slope_sum;
        save_norm(a, row, kTopCe, kRestCe, at_one);
        report(a, row, tail, -at_one(target) * kLn2, weight);
    }
}

}  // namespace kd
