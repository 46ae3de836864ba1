// A row of two sides: arguments of the kernels, arithmetic of one column, gradient, state, and results.
#pragma once
#include "columns.h"

namespace kd {

// RowArguments with numbers in float, and derived values.
struct Rows {
    RowSide student, teacher;
    void* dz;               // [rows, dz_stride], or null; a row may start where the student's row does
    const int64_t* labels;  // [rows], -1: in another slice of the columns; or null: no cross-entropy
    const float* weight;    // [rows], or null
    float *state, *loss, *stats;  // [kStateRows, state_stride]; [rows] or null; [5, stats_stride] or null
    int64_t rows, dz_stride, state_stride, stats_stride;
    int vocab, slots;       // slots: of a warp's ring (one-read kernel)
    Dtype dz_dtype;
    float a, b;             // of the divergence
    float inv_temperature, value_scale, slope_scale, ce_weight, dz_scale;
    Normalizer normalizer;
    int stages;             // to run; the results of the others are in the state
    bool aligned;           // every row of every tensor starts at a multiple of 16 bytes

    bool plain() const {       // only temperature, positive scales, and weights
        return !student.bias && !teacher.bias && student.softcap == 0 && teacher.softcap == 0 && student.scale > 0 && teacher.scale > 0 &&
               !labels && !stats && slope_scale != 0;
    }
};

// Value and slope of one column.
template <class D> KD_DEVICE Terms<float> column_terms(const Rows& a, float log2_q, float log2_p, float q) {
    return D::template terms<float>(log2_q, log2_p, q, exp2_fast(log2_p), a.a, a.b);
}
template <class D> KD_DEVICE float column_slope(const Rows& a, float log2_q, float log2_p, float q) {
    if constexpr (requires { D::template slope<float>(0.f, 0.f, 0.f, 0.f, 0.f, 0.f); })
        return D::template slope<float>(log2_q, log2_p, q, exp2_fast(log2_p), a.a, a.b);
    return column_terms<D>(a, log2_q, log2_p, q).slope;
}
// Returns the sum of a row's slopes, or NaN if the teacher's log-sum-exp is NaN: slopes that depend only on q would hide that.
KD_DEVICE float slope_sum_of(float slopes, const Norm& teacher) { return slopes + 0.f * teacher.rest; }

KD_DEVICE float entropy_term(float log2_p) {
    const float p = exp2_fast(log2_p);
    return p == 0.f ? 0.f : -p * (log2_p * kLn2);
}

// Sums over a row that are not needed for its gradient.
struct Tail {
    static constexpr int kNone = 0x7fffffff;
    float value = 0.f, entropy_s = 0.f, entropy_t = 0.f;
    int best_s = kNone, best_t = kNone;  // first column with the largest logit
    KD_DEVICE static float column(int best) { return best == kNone ? -1.f : float(best); }
    KD_DEVICE void merge(const Tail& o) {
        value += o.value, entropy_s += o.entropy_s, entropy_t += o.entropy_t;
        best_s = o.best_s < best_s ? o.best_s : best_s, best_t = o.best_t < best_t ? o.best_t : best_t;
    }
    // Adds the statistics of kCount columns, `stride` apart.
    template <int kCount>
    KD_DEVICE void add(const float* z, const float* y, const Norm& norm_s, const Norm& norm_t, const LogSums& sums, int column,
                       int stride) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int at = column + i * stride;
            entropy_s += entropy_term(norm_s(z[i])), entropy_t += entropy_term(norm_t(y[i]));
            if (z[i] == sums.max_s && at < best_s) best_s = at;
            if (y[i] == sums.max_t && at < best_t) best_t = at;
        }
    }
};
struct LeanTail {
    float value = 0.f;
    KD_DEVICE void merge(const LeanTail& o) { value += o.value; }
};

constexpr int kNoLabels = -2;  // in place of a label, or of -1, where a row has no cross-entropy

// The column-independent part of one row's gradient.
template <bool kFull> struct Gradient {
    float slope_sum, slope_scale, outer, ce_weight, per_cap;
    Norm at_one;
    int label;
    KD_DEVICE Gradient(const Rows& a, float slope_sum, Norm at_one, float weight, int label)
        : slope_sum(slope_sum), slope_scale(a.slope_scale), outer(a.student.scale * weight * a.dz_scale), ce_weight(a.ce_weight),
          per_cap(a.student.softcap != 0.f ? 1.f / a.student.softcap : 0.f), at_one(at_one), label(ce_weight != 0.f ? label : kNoLabels) {}
    // Replaces the slopes g of kCount columns, `stride` apart, with the gradient. column: index of the first.
    template <int kCount> KD_DEVICE void operator()(float* g, const float* q, const float* z, int column, int stride) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) g[i] = (g[i] - q[i] * slope_sum) * (slope_scale * outer);
        if constexpr (!kFull) return;
        if (slope_scale == 0.f) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) g[i] = 0.f;  // even if it is NaN
        }
        if (label != kNoLabels) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                g[i] += (ce_weight * outer) * (exp2_fast(at_one(z[i])) - (column + i * stride == label ? 1.f : 0.f));
        }
        if (per_cap == 0.f) return;  // z may be infinite
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float bend = z[i] * per_cap;
            g[i] *= 1.f - bend * bend;
        }
    }
};

KD_DEVICE float weight_of(const Rows& a, int64_t row) { return a.weight ? a.weight[row] : 1.f; }
KD_DEVICE float& state_at(const Rows& a, int64_t row, StateRow i) { return a.state[i * a.state_stride + row]; }

// Saves sums, not their logarithms: readers compute the same logarithm from the same number.
KD_DEVICE void save_normalisers(const Rows& a, int64_t row, const LogSums& sums, bool labels, float target) {
    state_at(a, row, kTopS) = sums.max_s, state_at(a, row, kExpSumS) = sums.sum_s;
    state_at(a, row, kTopT) = sums.max_t, state_at(a, row, kExpSumT) = sums.sum_t;
    if (labels) state_at(a, row, kExpSumOne) = sums.sum_ce, state_at(a, row, kTarget) = target;
}
KD_DEVICE LogSums saved_normalisers(const Rows& a, int64_t row) {
    return {state_at(a, row, kTopS), state_at(a, row, kExpSumS), state_at(a, row, kTopT), state_at(a, row, kExpSumT),
            state_at(a, row, kExpSumOne)};
}

// Returns the cross-entropy at T = 1 from the state.
KD_DEVICE float cross_entropy(const Rows& a, int64_t row) {
    return -norm_of(state_at(a, row, kTopS), state_at(a, row, kExpSumOne), kLog2E)(state_at(a, row, kTarget)) * kLn2;
}

// Writes the row's sums, loss and statistics, in the thread that saved its normalisers.
template <class T> KD_DEVICE void report(const Rows& a, int64_t row, const T& tail) {
    constexpr bool kFull = sizeof(T) == sizeof(Tail);
    const float ce = kFull && a.labels ? cross_entropy(a, row) : __builtin_nanf("");
    state_at(a, row, kValueSum) = tail.value;
    if (a.loss) {
        float total = a.value_scale == 0.f ? 0.f : a.value_scale * tail.value;
        if (kFull && a.labels && a.ce_weight != 0.f) total += a.ce_weight * ce;
        a.loss[row] = weight_of(a, row) * total;
    }
    if constexpr (kFull) {
        if (a.stats) {
            float* const stats = a.stats + row;
            stats[0] = tail.value;
            stats[a.stats_stride] = ce;
            stats[2 * a.stats_stride] = tail.entropy_s;
            stats[3 * a.stats_stride] = tail.entropy_t;
            stats[4 * a.stats_stride] = tail.best_s == tail.best_t ? 1.f : 0.f;
            state_at(a, row, kBestS) = Tail::column(tail.best_s), state_at(a, row, kBestT) = Tail::column(tail.best_t);
        }
    }
}

KD_HOST_DEVICE constexpr int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::f64 ? 8 : 2; }

template <class T> constexpr Dtype kDtype = std::is_same_v<T, float> ? Dtype::f32 : std::is_same_v<T, bf16> ? Dtype::bf16 : Dtype::f16;

// Writes the gradients of kCount columns, `stride` apart, as far as they are before `end`. With stride 1, `column` is a multiple of kCount
// and the row starts at a multiple of 16 bytes: the columns are stored as a vector.
template <class T, int kCount> KD_DEVICE void store_as(void* row, int column, int stride, const float* g, int end) {
    T* const to = static_cast<T*>(row) + column;
    if (stride == 1 && column + kCount <= end) {
        Vec<T, kCount> out;
#pragma unroll
        for (int i = 0; i < kCount; ++i) out.at[i] = from_float<T>(g[i]);
        store_vector(to, out);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (column + i * stride < end) to[i * stride] = from_float<T>(g[i]);
    }
}
// dz has the logits' dtype, or is narrower than float32 logits.
template <class Logit, int kCount> KD_DEVICE void store_dz(const Rows& a, void* row, int column, int stride, const float* g, int end) {
    if constexpr (sizeof(Logit) == 4) {
        switch (a.dz_dtype) {
            case Dtype::bf16: return store_as<bf16, kCount>(row, column, stride, g, end);
            case Dtype::f16: return store_as<half, kCount>(row, column, stride, g, end);
            default: break;
        }
    }
    store_as<Logit, kCount>(row, column, stride, g, end);
}
KD_DEVICE void* dz_row(const Rows& a, int64_t row) { return static_cast<unsigned char*>(a.dz) + row * a.dz_stride * size_of(a.dz_dtype); }

}  // namespace kd
