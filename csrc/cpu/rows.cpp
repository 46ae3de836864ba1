// The row kernel of the CPU. A row pair is read once, into float (or double) scratch rows that stay in the core's cache;
// every sweep runs there; dz is written once. Compiled once per instruction set (KD_ISA); dispatch.cpp picks one.
#include "../divergence.h"
#include "columns.h"

namespace kd::KD_ISA {
namespace {

template <class Real> struct Scratch {
    Real *z, *y;  // logits of student and teacher
    Real *q, *p;  // exponentials, then softmaxes at T
    Real* g;      // slopes, then the gradient
    Scratch(void* memory, int64_t vocab) {
        const int64_t width = scratch_width(vocab);
        z = static_cast<Real*>(memory), y = z + width, q = y + width, p = q + width, g = p + width;
    }
};

struct Sums { double value, slope; };
enum class Keep { nothing, slopes, gradient };

// log q = (z - top) / T - rest: see STATE in kdkernels/backends/rows.py.
template <class Real> struct Norm {
    Real top = 0, rest = 0;
    KD_INLINE Real operator()(Real z, Real inv_t) const { return (z - top) * inv_t - rest; }
};

// What a divergence is given for column v: (x, u) less their normalisers, x = z / T.
template <class Real> struct Columns {
    const Real *z, *y;
    Real *q, *p;
    Real inv_t;
    Norm<Real> s, t;
    Real a, b;
    template <class D> KD_INLINE Terms<Real> terms(int64_t v) const {
        return D::template terms<Real>(s(z[v], inv_t), t(y[v], inv_t), q[v], p[v], a, b);
    }
    // Sums of value and slope over the row; `out` keeps the slopes, or the gradient where the sum of the slopes is known beforehand.
    // Exponentials become softmaxes on the way, a block at a time: rounded to memory, since a product that is contracted into q - p
    // would leave a difference where there is none.
    template <class D, Keep keep, class T>
    Sums sums(int64_t vocab, Real per_sum_s, Real per_sum_t, Real scale, T* __restrict out) const {
        Sums total{0, 0};
        for (int64_t start = 0; start < vocab; start += kBlock) {
            const int64_t stop = start + kBlock < vocab ? start + kBlock : vocab;
            KD_SIMD for (int64_t v = start; v < stop; ++v) q[v] *= per_sum_s;
            KD_SIMD for (int64_t v = start; v < stop; ++v) p[v] *= per_sum_t;
            Real value = 0, slope = 0;
#pragma omp simd reduction(+ : value, slope)
            for (int64_t v = start; v < stop; ++v) {
                const Terms<Real> t = terms<D>(v);
                value += t.value, slope += t.slope;
                if constexpr (keep == Keep::slopes) out[v] = t.slope;
                if constexpr (keep == Keep::gradient) out[v] = narrow<T>(scale * (t.slope - q[v] * Real(D::slope_sum)));
            }
            total.value += value, total.slope += slope;
        }
        return total;
    }
    template <class D> double slopes(int64_t vocab, Real* __restrict g) const {
        return sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return g[v] = terms<D>(v).slope; });
    }
};

template <class Real, class D> void one_row(const RowArguments& a, int64_t row, Scratch<Real>& s) {
    const int64_t vocab = a.vocab;
    const bool softmax = a.normalizer == Normalizer::softmax;
    const Real inv_t = Real(a.inv_temperature);
    Real* const state = static_cast<Real*>(a.state) + row;
    const Real weight = a.weight ? static_cast<const Real*>(a.weight)[row] : Real(1);
    const Real top_s = load_row(a.student, row, vocab, s.z), top_t = load_row(a.teacher, row, vocab, s.y);
    const int64_t label = a.labels ? a.labels[row] : -1;

    Columns<Real> columns{s.z, s.y, s.q, s.p, inv_t, {}, {}, Real(a.a), Real(a.b)};
    const Real outer = Real(a.student.scale) * weight * Real(a.dz_scale);
    bool done = false;  // with dz
    Norm<Real> at_one;  // of the student at T = 1
    double slope_sum = D::slope_sum;
    if (a.statistics) {
        Norm<Real> full_s, full_t;  // of the softmaxes
        Real per_sum_s = 1, per_sum_t = 1;
        if (softmax || a.stats) {
            auto exponentiate = [&](const Real* z, Real top, Real* e, Real& per_sum) {
                const double sum = exp_row(z, inv_t, top, vocab, e);
                per_sum = Real(1.0 / sum);
                return Norm<Real>{top, Real(std::log(sum))};
            };
            full_s = exponentiate(s.z, top_s, s.q, per_sum_s);
            full_t = exponentiate(s.y, top_t, s.p, per_sum_t);
        }
        if (softmax) {
            columns.s = full_s, columns.t = full_t;
        } else if (a.normalizer == Normalizer::mean) {
            const auto skipped = [&](int64_t v) KD_INLINE_LAMBDA { return s.z[v] == -kInfinity<Real> && s.y[v] == -kInfinity<Real>; };
            const double kept = sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : Real(1); });
            const double size = kept > 1 ? kept : 1;
            columns.s.top = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : s.z[v]; }) / size);
            columns.t.top = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : s.y[v]; }) / size);
        }
        if (a.labels) at_one = softmax && a.inv_temperature == 1.0 ? full_s : Norm<Real>{top_s, Real(std::log(exp_row<Real>(s.z, 1, top_s, vocab, nullptr)))};

        Sums sums{0, 0};
        if (!a.dz) {
            sums = columns.template sums<D, Keep::nothing, Real>(vocab, per_sum_s, per_sum_t, 0, nullptr);
        } else if (D::knows_slope_sum && softmax && a.slope_scale != 0 && a.student.softcap == 0 && !(a.labels && a.ce_weight != 0)) {
            // dz in the same sweep: what it needs of the row is known.
            with_dtype(a.dz_dtype, [&](auto format) {
                using T = decltype(format);
                T* const out = static_cast<T*>(a.dz) + row * a.dz_stride;
                sums = columns.template sums<D, Keep::gradient>(vocab, per_sum_s, per_sum_t, Real(a.slope_scale) * outer, out);
            });
            done = true;
        } else {
            sums = columns.template sums<D, Keep::slopes>(vocab, per_sum_s, per_sum_t, 0, s.g);
        }
        const double divergence = sums.value;
        if (!D::knows_slope_sum) slope_sum = sums.slope;
        const Real ce = a.labels ? -at_one(s.z[label], 1) : std::numeric_limits<Real>::quiet_NaN();
        const Real saved[kStateRows] = {columns.s.top, columns.s.rest, columns.t.top, columns.t.rest, Real(slope_sum), at_one.top, at_one.rest};
        for (int i = 0; i < kStateRows; ++i) state[i * a.state_stride] = saved[i];
        if (a.loss) {
            Real total = a.value_scale != 0 ? Real(a.value_scale * divergence) : Real(0);
            if (a.ce_weight != 0) total += Real(a.ce_weight) * ce;
            static_cast<Real*>(a.loss)[row] = weight * total;
        }
        if (a.stats) {
            const auto entropy = [&](const Real* z, const Real* p, Norm<Real> norm) {
                return -sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return p[v] == Real(0) ? Real(0) : p[v] * norm(z[v], inv_t); });
            };
            float* const stats = a.stats + row;
            stats[0] = float(divergence);
            stats[a.stats_stride] = float(ce);
            stats[2 * a.stats_stride] = float(entropy(s.z, s.q, full_s));
            stats[3 * a.stats_stride] = float(entropy(s.y, s.p, full_t));
            stats[4 * a.stats_stride] = find(s.z, top_s, vocab) == find(s.y, top_t, vocab) ? 1.f : 0.f;
        }
    } else {
        const auto at = [&](StateRow i) { return state[i * a.state_stride]; };
        columns.s = {at(kTopS), at(kRestS)}, columns.t = {at(kTopT), at(kRestT)}, at_one = {at(kTopCe), at(kRestCe)};
        if (softmax) {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) s.q[v] = exp(columns.s(s.z[v], inv_t));
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) s.p[v] = exp(columns.t(s.y[v], inv_t));
        }
        // The sum of these very slopes: those of the forward pass are rounded otherwise, and a slope may jump in between.
        const double sum = columns.template slopes<D>(vocab, s.g);
        if (!D::knows_slope_sum) slope_sum = sum;
    }
    if (!a.dz || done) return;

    Real* __restrict g = s.g;
    const Real factor = Real(a.slope_scale), center = softmax ? Real(slope_sum) : Real(0);
    const Real* __restrict q = s.q;
    if (a.slope_scale == 0) {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] = 0;
    } else if (softmax) {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] = factor * (g[v] - q[v] * center);
    } else {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] *= factor;
    }
    if (a.labels && a.ce_weight != 0) {
        const Real ce = Real(a.ce_weight);
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] += ce * exp(at_one(s.z[v], 1));
        g[label] -= ce;
    }
    const Real per_cap = a.student.softcap != 0 ? Real(1.0 / a.student.softcap) : Real(0);
    write_gradient(g, s.z, outer, per_cap, vocab, a.dz, a.dz_dtype, row * a.dz_stride);
}

}  // namespace

void rows(const RowArguments& a, int64_t begin, int64_t end, void* scratch) {
    with_divergence(a.divergence, [&](auto divergence) {
        using D = decltype(divergence);
        const auto run = [&](auto real) {
            using Real = decltype(real);
            Scratch<Real> rows_of(scratch, a.vocab);
            for (int64_t row = begin; row < end; ++row) one_row<Real, D>(a, row, rows_of);
        };
        a.double_precision ? run(double{}) : run(float{});
    });
}

}  // namespace kd::KD_ISA
