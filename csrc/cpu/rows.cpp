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

// The argument of a divergence for a logit: log q = (z - top) / T - rest for softmax.
template <class Real> struct Norm {
    Real top = 0, rest = 0;
    KD_INLINE Real operator()(Real z, Real inv_t) const { return (z - top) * inv_t - rest; }
};

// From the largest logit and the sum of exponentials in the state.
template <class Real> Norm<Real> norm_of(Real top, Real sum) { return {top, Real(std::log(double(sum)))}; }

template <class Real> void scale_row(Real* __restrict e, Real factor, int64_t vocab) {
    KD_SIMD for (int64_t v = 0; v < vocab; ++v) e[v] *= factor;
}

// The arguments of a divergence for column v: (x, u) minus their normalisers, x = z / T.
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
    // Exponentials are converted to softmaxes block by block and rounded to memory: a product contracted into q - p would give a
    // difference even if q = p.
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
    template <class D> void slopes(int64_t vocab, Real* __restrict g) const {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] = terms<D>(v).slope;
    }
};

// One row, stage by stage. `n` is its column of the state, with results of earlier calls and of this one.
template <class Real, class D> struct Row {
    const RowArguments& a;
    const int64_t row, vocab, label;
    Scratch<Real>& s;
    const bool softmax = a.normalizer == Normalizer::softmax, exponentials = softmax || (a.stats && a.stages & kSums);
    const Real inv_t = Real(a.inv_temperature), weight = a.weight ? static_cast<const Real*>(a.weight)[row] : Real(1);
    Real n[kStateRows] = {};
    bool written = false;  // dz
    Columns<Real> columns{s.z, s.y, s.q, s.p, inv_t, {}, {}, Real(a.a), Real(a.b)};

    Real& at(int i) const { return static_cast<Real*>(a.state)[i * a.state_stride + row]; }
    void save(StateRow first, int count) const {
        for (int i = first; i < first + count; ++i) at(i) = n[i];
    }
    Norm<Real> at_one() const { return norm_of(n[kTopS], n[kExpSumOne]); }  // of the student at T = 1

    void run() {
        if (a.stages & kNormalisers) {
            n[kTopS] = load_row(a.student, row, vocab, s.z), n[kTopT] = load_row(a.teacher, row, vocab, s.y);
            find_normalisers();
            if (a.stages == kNormalisers) return;
        } else {
            read_row(a.student, row, vocab, s.z), read_row(a.teacher, row, vocab, s.y);
            for (int i = 0; i < kStateRows; ++i) n[i] = at(i);
            if (exponentials) exponentiate(s.z, n[kTopS], s.q), exponentiate(s.y, n[kTopT], s.p);
        }
        if (softmax) {
            columns.s = norm_of(n[kTopS], n[kExpSumS]), columns.t = norm_of(n[kTopT], n[kExpSumT]);
        } else {
            columns.s.top = n[kMeanS], columns.t.top = n[kMeanT];
        }
        const Real per_sum_s = exponentials ? Real(1.0 / n[kExpSumS]) : Real(1),
                   per_sum_t = exponentials ? Real(1.0 / n[kExpSumT]) : Real(1);
        if (a.stages & kSums) {
            find_sums(per_sum_s, per_sum_t);
        } else {
            if (softmax) scale_row(s.q, per_sum_s, vocab), scale_row(s.p, per_sum_t, vocab);
            columns.template slopes<D>(vocab, s.g);
        }
        if (a.stages & kGradient && !written) write_dz();
    }

    void exponentiate(const Real* __restrict z, Real top, Real* __restrict e) const {
        const Real reference = top == -kInfinity<Real> ? Real(0) : top;
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) e[v] = exp((z[v] - reference) * inv_t);
    }

    void find_normalisers() {
        if (softmax || a.stats) {
            n[kExpSumS] = Real(exp_row(s.z, inv_t, n[kTopS], vocab, s.q)), n[kExpSumT] = Real(exp_row(s.y, inv_t, n[kTopT], vocab, s.p));
        }
        if (a.labels) {
            const bool shared = softmax && a.inv_temperature == 1.0;
            n[kExpSumOne] = shared ? n[kExpSumS] : Real(exp_row<Real>(s.z, 1, n[kTopS], vocab, nullptr));
            n[kTarget] = label < 0 ? -kInfinity<Real> : s.z[label];
        }
        if (a.normalizer == Normalizer::mean) {
            const auto skipped = [&](int64_t v) KD_INLINE_LAMBDA { return s.z[v] == -kInfinity<Real> && s.y[v] == -kInfinity<Real>; };
            const double kept = sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : Real(1); });
            const double size = kept > 1 ? kept : 1;
            n[kColumns] = Real(kept);
            n[kMeanS] = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : s.z[v]; }) / size);
            n[kMeanT] = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : s.y[v]; }) / size);
        }
        save(kTopS, kColumns + 1);
    }

    void find_sums(Real per_sum_s, Real per_sum_t) {
        const bool gradient = a.stages & kGradient;
        Sums sums{0, 0};
        if (!gradient) {
            sums = columns.template sums<D, Keep::nothing, Real>(vocab, per_sum_s, per_sum_t, 0, nullptr);
        } else if (D::knows_slope_sum && softmax && a.slope_scale != 0 && a.student.softcap == 0 && !(a.labels && a.ce_weight != 0)) {
            // Write dz in the same sweep: its row-wide values are already known.
            with_dtype(a.dz_dtype, [&](auto format) {
                using T = decltype(format);
                T* const out = static_cast<T*>(a.dz) + row * a.dz_stride;
                sums = columns.template sums<D, Keep::gradient>(vocab, per_sum_s, per_sum_t, Real(a.slope_scale) * outer(), out);
            });
            written = true;
        } else {
            sums = columns.template sums<D, Keep::slopes>(vocab, per_sum_s, per_sum_t, 0, s.g);
        }
        n[kValueSum] = Real(sums.value), n[kSlopeSum] = Real(sums.slope);
        save(kValueSum, 2);
        report(sums.value);
    }

    // Loss and statistics.
    void report(double divergence) {
        const Real ce = a.labels ? -at_one()(n[kTarget], 1) : std::numeric_limits<Real>::quiet_NaN();
        if (a.loss) {
            Real total = a.value_scale != 0 ? Real(a.value_scale * divergence) : Real(0);
            if (a.ce_weight != 0) total += Real(a.ce_weight) * ce;
            static_cast<Real*>(a.loss)[row] = weight * total;
        }
        if (!a.stats) return;
        const auto entropy = [&](const Real* z, const Real* p, Norm<Real> norm) {
            return -sum_columns<Real>(vocab,
                                      [&](int64_t v) KD_INLINE_LAMBDA { return p[v] == Real(0) ? Real(0) : p[v] * norm(z[v], inv_t); });
        };
        n[kBestS] = Real(find(s.z, n[kTopS], vocab)), n[kBestT] = Real(find(s.y, n[kTopT], vocab));
        save(kBestS, 2);
        float* const stats = a.stats + row;
        stats[0] = float(divergence);
        stats[a.stats_stride] = float(ce);
        stats[2 * a.stats_stride] = float(entropy(s.z, s.q, norm_of(n[kTopS], n[kExpSumS])));
        stats[3 * a.stats_stride] = float(entropy(s.y, s.p, norm_of(n[kTopT], n[kExpSumT])));
        stats[4 * a.stats_stride] = n[kBestS] == n[kBestT] ? 1.f : 0.f;
    }

    Real outer() const { return Real(a.student.scale) * weight * Real(a.dz_scale); }

    // Gradient from the slopes in g.
    void write_dz() {
        Real* __restrict g = s.g;
        const Real* __restrict q = s.q;
        const Real factor = Real(a.slope_scale), slope_sum = D::knows_slope_sum ? Real(D::slope_sum) : n[kSlopeSum];
        if (a.slope_scale == 0) {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] = 0;
        } else if (softmax) {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] = factor * (g[v] - q[v] * slope_sum);
        } else {
            scale_row(g, factor, vocab);
        }
        if (a.labels && a.ce_weight != 0) {
            const Real ce = Real(a.ce_weight);
            const Norm<Real> norm = at_one();
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] += ce * exp(norm(s.z[v], 1));
            if (label >= 0) g[label] -= ce;
        }
        const Real per_cap = a.student.softcap != 0 ? Real(1.0 / a.student.softcap) : Real(0);
        kd::KD_ISA::write_gradient(g, s.z, outer(), per_cap, vocab, a.dz, a.dz_dtype, row * a.dz_stride);
    }
};

}  // namespace

void rows(const RowArguments& a, int64_t begin, int64_t end, void* scratch) {
    with_divergence(a.divergence, [&](auto divergence) {
        using D = decltype(divergence);
        const auto run = [&](auto real) {
            using Real = decltype(real);
            Scratch<Real> rows_of(scratch, a.vocab);
            for (int64_t row = begin; row < end; ++row) Row<Real, D>{a, row, a.vocab, a.labels ? a.labels[row] : -1, rows_of}.run();
        };
        a.double_precision ? run(double{}) : run(float{});
    });
}

}  // namespace kd::KD_ISA
