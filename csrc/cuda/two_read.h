// The two-read row kernel (sm_80 and newer). A CTA processes a row pair, with a sweep over memory for each stage of the launch. Results of
// other stages are read from the state.
//
// Runs what the one-read kernel cannot: a part of the stages (a backward pass, a slice of the columns), GPUs without clusters, rows that
// are too long for the largest cluster's shared memory or do not start at multiples of 16 bytes, sides of different dtypes, and LogitMSE.
#pragma once
#include "row.h"

namespace kd {

constexpr int kTwoReadColumns = 8;  // per thread and step

struct NormPart {
    LogSums sums;
    float mean_s = 0.f, mean_t = 0.f, columns = 0.f;
};
struct ValuePart {
    Tail tail;
    float slope = 0.f;
};

// Reduces over a CTA; all threads return the same bits. A fast warp can write its part of the next reduction while a slow one still reads
// this one, but cannot get two ahead: two places are used in turn.
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

// Loads kTwoReadColumns neighbouring columns, without bias, scale and softcap.
template <class Logit> KD_DEVICE void load_neighbours(float* z, const Logit* from) {
    constexpr int kVec = kd::kVec<Logit>, kLoads = kTwoReadColumns / kVec;
    Raw raw[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) raw[j] = load_vector<Raw>(from + j * kVec);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) unpack<Logit>(z + j * kVec, raw[j]);
}
// Loads kTwoReadColumns columns, `stride` apart, and applies bias, scale and softcap; -inf beyond the row. whole: all columns are inside.
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
    const int label = a.labels ? int(a.labels[row]) : kNoLabels;
    const bool reports = thread_index() == 0;
    const bool second_sum = a.labels && a.inv_temperature != 1.f;  // cross-entropy is at T = 1

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
    // both sides, and add 0 to every sum.
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

    // NORMALISERS: in a sweep, or from the state.
    int parity = 0;
    LogSums sums;
    float mean_s = 0.f, mean_t = 0.f;
    if (a.stages & kNormalisers) {
        float target = -infinity();
        if (reports && label >= 0) target = transformed(logit_at(a.student, row, label), a.student, label);
        NormPart part;
        if (softmax || a.stats || a.labels || a.normalizer == Normalizer::mean) {
            RunningSums<Largest> running(c, c);
            for_columns([&](const float* z, const float* y, int) {
                running.template add<kCount>({}, {}, z, y, second_sum);
                if (!softmax && a.normalizer == Normalizer::mean) {
#pragma unroll
                    for (int i = 0; i < kCount; ++i)
                        if (!(z[i] == -infinity() && y[i] == -infinity())) part.mean_s += z[i], part.mean_t += y[i], part.columns += 1.f;
                }
            });
            part.sums = running.total();
            part = block_reduce(part, parity, [&](NormPart& x, const NormPart& o) {
                x.sums.merge(o.sums, c, c);
                x.mean_s += o.mean_s, x.mean_t += o.mean_t, x.columns += o.columns;
            });
        }
        sums = part.sums;
        if (a.labels && !second_sum) sums.sum_ce = sums.sum_s;
        if (reports) save_normalisers(a, row, sums, a.labels, target);
        if (!softmax) {
            const float count = fmaxf(part.columns, 1.f);
            mean_s = part.mean_s / count, mean_t = part.mean_t / count;
            if (reports) state_at(a, row, kMeanS) = mean_s, state_at(a, row, kMeanT) = mean_t, state_at(a, row, kColumns) = part.columns;
        }
    } else {
        sums = saved_normalisers(a, row);
        if (!softmax && a.normalizer == Normalizer::mean) mean_s = state_at(a, row, kMeanS), mean_t = state_at(a, row, kMeanT);
    }
    const Norm full_s = norm_of(sums.max_s, sums.sum_s, c), full_t = norm_of(sums.max_t, sums.sum_t, c);  // of the softmaxes
    const Norm norm_s = softmax ? full_s : Norm{c, mean_s}, norm_t = softmax ? full_t : Norm{c, mean_t};  // of the divergence
    const Norm at_one = norm_of(sums.max_s, sums.sum_ce, kLog2E);  // of the student at T = 1

    // SUMS: in a sweep, or in that of GRADIENT if the sum of the slopes is known.
    const auto merge_values = [](ValuePart& x, const ValuePart& o) { x.tail.merge(o.tail), x.slope += o.slope; };
    const bool sums_values = a.stages & kSums, sweeps_values = sums_values && (!D::knows_slope_sum || a.stats || !a.dz);
    float slope_sum = float(D::slope_sum);
    Tail tail;

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
        if constexpr (!D::knows_slope_sum) {
            slope_sum = slope_sum_of(part.slope, norm_t);
            if (reports) state_at(a, row, kSlopeSum) = slope_sum;
        }
    } else if (!D::knows_slope_sum && a.dz) {
        slope_sum = state_at(a, row, kSlopeSum);
    }

    if (a.dz) {
        const Gradient<true> gradient(a, softmax ? slope_sum : 0.f, at_one, weight_of(a, row), label);
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
            if (sizeof(Logit) == 4) sync_block();  // dz may overwrite logits in a narrower type: wait until all are read
            store_dz<Logit, kCount>(a, dz, column, stride, g, a.vocab);
        });
        if (sums_values && !sweeps_values) tail = block_reduce(part, parity, merge_values).tail;
    }

    if (sums_values && reports) report(a, row, tail);
}

}  // namespace kd
