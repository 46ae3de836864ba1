// The two-read row kernel (sm_80 and newer): a CTA owns a row pair and sweeps over it up to three times, as the Triton kernel does.
// For GPUs without clusters, for rows that are too long for the largest cluster's shared memory or do not start at multiples of
// 16 bytes, for sides of different dtypes, for LogitMSE, and for the backward pass, where one sweep is all there is to do.
#pragma once
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

// z of kTwoReadColumns columns that are neighbours, as they are read.
template <class Logit> KD_DEVICE void load_neighbours(float* z, const Logit* from) {
    constexpr int kVec = kd::kVec<Logit>, kLoads = kTwoReadColumns / kVec;
    Raw raw[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) raw[j] = load_vector<Raw>(from + j * kVec);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) unpack<Logit>(z + j * kVec, raw[j]);
}
// z of kTwoReadColumns columns, `stride` apart, after bias, scale and softcap; -inf beyond the row, unless all are in it (`whole`).
template <class Logit> KD_DEVICE void load_columns(float* z, const RowSide& side, int64_t row, int column, int stride, int vocab,
                                                   bool whole) {
    const auto* const logits = static_cast<const Logit*>(side.logits) + row * side.stride;
    if (stride == 1 && whole) {
        load_neighbours(z, logits + column);
    } else {
#pragma unroll
        for (int j = 0; j < kTwoReadColumns; j += kVec<Logit>) unpack<Logit>(z + j, load_apart(logits, column + j * stride, stride, vocab));
    }
    transform<kTwoReadColumns>(z, side, column, stride, vocab, whole);
}
KD_DEVICE void load_any(float* z, const RowSide& side, int64_t row, int column, int stride, int vocab, bool whole) {
    switch (side.dtype) {
        case Dtype::bf16: return load_columns<bf16>(z, side, row, column, stride, vocab, whole);
        case Dtype::f16: return load_columns<half>(z, side, row, column, stride, vocab, whole);
        default: return load_columns<float>(z, side, row, column, stride, vocab, whole);
    }
}

template <class Logit, class D> KD_KERNEL KD_BOUNDS(kTwoReadThreads, 2) two_read_rows(const Rows a) {
    constexpr int kCount = kTwoReadColumns;
    const int64_t row = block_index();
    const float c = a.inv_temperature * kLog2E;
    constexpr bool softmax = !std::is_same_v<D, LogitMSE>;  // else a.normalizer is one of the others
    const int label = a.labels ? int(a.labels[row]) : -1;
    const float weight = a.weight ? a.weight[row] : 1.f;
    const bool reports = thread_index() == 0;
    const bool second_sum = label >= 0 && a.inv_temperature != 1.f;  // cross-entropy is at T = 1

    // Aligned rows: a thread's columns are neighbours, read 16 bytes at a time. Others: neighbours go to neighbouring threads.
    const int stride = a.aligned ? 1 : block_threads();
    const int first = a.aligned ? thread_index() * kCount : thread_index();
    const int step = block_threads() * kCount;
    // Steps before this column need no test of dtypes, features or ends.
    const bool simple = a.aligned && a.teacher.dtype == kDtype<Logit> && a.student.plain() && a.teacher.plain();
    const int simple_end = simple ? a.vocab / step * step : 0;
    const auto* const student = static_cast<const Logit*>(a.student.logits) + row * a.student.stride + first;
    const auto* const teacher = static_cast<const Logit*>(a.teacher.logits) + row * a.teacher.stride + first;
    // Calls body(z, y, first column) for this thread's columns of a step; all threads run every step. Columns beyond the row are -inf on
    // both sides, and add nothing to any sum.
    auto for_columns = [&](auto&& body) {
        for (int start = 0; start < a.vocab; start += step) {
            const int column = start + first;
            float z[kCount], y[kCount];
            if (start < simple_end) {
                load_neighbours(z, student + start);
                load_neighbours(y, teacher + start);
            } else {
                const bool whole = column + (kCount - 1) * stride < a.vocab;
                load_columns<Logit>(z, a.student, row, column, stride, a.vocab, whole);
                load_any(y, a.teacher, row, column, stride, a.vocab, whole);
            }
            body(z, y, column);
        }
    };

    Norm norm_s{c}, norm_t{c}, full_s, full_t, at_one;  // of the divergence, of the softmaxes, of the student's at T = 1
    LogSums sums;
    float slope_sum = float(D::slope_sum), target = 0.f;
    Tail tail;
    int parity = 0;
    const auto merge_values = [](ValuePart& x, const ValuePart& o) { x.tail.merge(o.tail), x.slope += o.slope; };
    // Sweep 2 also sums entropies. Slopes that jump may differ from those of the forward pass, so they are summed again.
    const bool sweeps_values = a.statistics ? !D::knows_slope_sum || a.stats || !a.dz : D::slope_jumps;
    if (a.statistics) {
        if (reports && label >= 0) target = transformed(logit_at(a.student, row, label), a.student, label);
        NormPart part;
        if (softmax || a.stats || label >= 0 || a.normalizer == Normalizer::mean) {
            RunningSums<Largest> running(c, c);
            for_columns([&](const float* z, const float* y, int) {
                running.template add<kCount>({}, {}, z, y, second_sum);
                if (!softmax && a.normalizer == Normalizer::mean) {
#pragma unroll
                    for (int i = 0; i < kCount; ++i)
                        if (!(z[i] == -infinity() && y[i] == -infinity())) part.mean_s += z[i], part.mean_t += y[i], part.kept += 1.f;
                }
            });
            part.sums = running.total();
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
        for_columns([&](const float* z, const float* y, int column) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float log2_q = norm_s(z[i]), log2_p = norm_t(y[i]);
                const Terms<float> t = column_terms<D>(a, log2_q, log2_p, exp2_fast(log2_q));
                part.tail.value += t.value, part.slope += t.slope;
            }
            if (a.stats) part.tail.template add<kCount>(z, y, full_s, full_t, sums, column, stride);
        });
        part = block_reduce(part, parity, merge_values);
        tail = part.tail;
        if (!D::knows_slope_sum) slope_sum = slope_sum_of(part.slope, norm_t);
    }

    if (a.dz) {
        const Gradient<true> gradient(a, softmax ? slope_sum : 0.f, at_one, weight, label);
        void* const dz = dz_row(a, row);
        ValuePart part;
        for_columns([&](const float* z, const float* y, int column) {
            float g[kCount], q[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float log2_q = norm_s(z[i]), log2_p = norm_t(y[i]), of_q = exp2_fast(log2_q);
                if constexpr (D::knows_slope_sum) {
                    const Terms<float> t = column_terms<D>(a, log2_q, log2_p, of_q);
                    part.tail.value += t.value, g[i] = t.slope;
                } else {
                    g[i] = column_slope<D>(a, log2_q, log2_p, of_q);
                }
                q[i] = softmax ? of_q : 0.f;
            }
            gradient.template operator()<kCount>(g, q, z, column, stride);
            if (sizeof(Logit) == 4) sync_block();  // dz may overwrite the logits in a narrower type: all must have read theirs
            store_dz<Logit, kCount>(a, dz, column, stride, g, a.vocab);
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
