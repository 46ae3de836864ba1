// A row of two sides: arguments of the kernels, arithmetic of one column, gradient, state, and results.
#pragma once
#include "columns.h"

namespace kd {

// RowArguments with numbers in float, and derived values.
struct Rows {
    RowSide student, teacher;
    void* dz;               // [rows, dz_stride], or null; a row may start where the student's row does
    const int64_t* labels;  // [rows], or null: no cross-entropy
    const float* weight;    // [rows], or null
    float *state, *loss, *stats;  // [kStateRows, state_stride]; [rows] or null; [5, stats_stride] or null
    int64_t rows, dz_stride, state_stride, stats_stride;
    int vocab, slots;       // slots: of a warp's ring (one-read kernel)
    Dtype dz_dtype;
    float a, b;             // of the divergence
    float inv_temperature, value_scale, slope_scale, ce_weight, dz_scale;
    Normalizer normalizer;
    bool statistics, aligned;  // aligned: every row of every tensor starts at a multiple of 16 bytes

    bool plain() const {       // only temperature, positive scales, and weights
        return !student.bias && !teacher.bias && student.softcap == 0 && teacher.softcap == 0 && student.scale > 0 && teacher.scale > 0 &&
               !labels && !stats && slope_scale != 0;
    }
};

// One column of a divergence.
template <class D> KD_DEVICE Terms<float> column_terms(const Rows& a, float log2_q, float log2_p, float q) {
    return D::template terms<float>(log2_q, log2_p, q, exp2_fast(log2_p), a.a, a.b);
}
template <class D> KD_DEVICE float column_slope(const Rows& a, float log2_q, float log2_p, float q) {
    if constexpr (requires { D::template slope<float>(0.f, 0.f, 0.f, 0.f, 0.f, 0.f); })
        return D::template slope<float>(log2_q, log2_p, q, exp2_fast(log2_p), a.a, a.b);
    return column_terms<D>(a, log2_q, log2_p, q).slope;
}
// The sum of a row's slopes: NaN if the teacher's log-sum-exp is NaN, which slopes that depend only on q would hide.
KD_DEVICE float slope_sum_of(float slopes, const Norm& teacher) { return slopes + 0.f * teacher.rest; }

KD_DEVICE float entropy_term(float log2_p) {
    const float p = exp2_fast(log2_p);
    return p == 0.f ? 0.f : -p * (log2_p * kLn2);
}

// Sums over a row that are not needed for its gradient.
struct Tail {
    float value = 0.f, entropy_s = 0.f, entropy_t = 0.f;
    int best_s = 0x7fffffff, best_t = 0x7fffffff;  // first column with the largest logit
    KD_DEVICE void merge(const Tail& o) {
        value += o.value, entropy_s += o.entropy_s, entropy_t += o.entropy_t;
        best_s = o.best_s < best_s ? o.best_s : best_s, best_t = o.best_t < best_t ? o.best_t : best_t;
    }
    // Statistics of kCount columns, `stride` apart.
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

// The column-independent part of one row's gradient.
template <bool kFull> struct Gradient {
    float slope_sum, slope_scale, outer, ce_weight, per_cap;
    Norm at_one;
    int label;  // -1: none
    KD_DEVICE Gradient(const Rows& a, float slope_sum, Norm at_one, float weight, int label)
        : slope_sum(slope_sum), slope_scale(a.slope_scale), outer(a.student.scale * weight * a.dz_scale), ce_weight(a.ce_weight),
          per_cap(a.student.softcap != 0.f ? 1.f / a.student.softcap : 0.f), at_one(at_one), label(ce_weight != 0.f ? label : -1) {}
    // Replaces the slopes of kCount columns, `stride` apart, by the gradient, from q, the logits and the first column's index.
    template <int kCount> KD_DEVICE void operator()(float* g, const float* q, const float* z, int column, int stride) const {
#pragma unroll
        for (int i = 0; i < kCount; ++i) g[i] = (g[i] - q[i] * slope_sum) * (slope_scale * outer);
        if constexpr (!kFull) return;
        if (slope_scale == 0.f) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) g[i] = 0.f;  // of a NaN too
        }
        if (label >= 0) {
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

// Writes the row's outputs, in one thread.
template <class T> KD_DEVICE void report(const Rows& a, int64_t row, const T& tail, float ce, float weight) {
    if (a.loss) {
        float total = a.value_scale == 0.f ? 0.f : a.value_scale * tail.value;
        if (a.labels && a.ce_weight != 0.f) total += a.ce_weight * ce;
        a.loss[row] = weight * total;
    }
    if constexpr (sizeof(T) == sizeof(Tail)) {
        if (a.stats) {
            float* const stats = a.stats + row;
            stats[0] = tail.value;
            stats[a.stats_stride] = a.labels ? ce : __builtin_nanf("");
            stats[2 * a.stats_stride] = tail.entropy_s;
            stats[3 * a.stats_stride] = tail.entropy_t;
            stats[4 * a.stats_stride] = tail.best_s == tail.best_t ? 1.f : 0.f;
        }
    }
}

// Normalisers are saved unchanged, the rest in units of ln 2, so that readers subtract exactly the same numbers.
KD_DEVICE float& state_at(const Rows& a, int64_t row, StateRow i) { return a.state[i * a.state_stride + row]; }
KD_DEVICE void save_norm(const Rows& a, int64_t row, StateRow top, StateRow rest, const Norm& n) {
    state_at(a, row, top) = n.top, state_at(a, row, rest) = n.rest;
}
KD_DEVICE Norm saved_norm(const Rows& a, int64_t row, StateRow top, StateRow rest, float c) {
    return {c, state_at(a, row, top), state_at(a, row, rest)};
}

KD_HOST_DEVICE constexpr int size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::f64 ? 8 : 2; }

template <class T> constexpr Dtype kDtype = std::is_same_v<T, float> ? Dtype::f32 : std::is_same_v<T, bf16> ? Dtype::bf16 : Dtype::f16;

// Writes the gradients of kCount columns, `stride` apart, of those before `end`. With stride 1 the first column is a multiple of kCount, in a
// row that starts at a multiple of 16 bytes: they are stored as a vector.
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
