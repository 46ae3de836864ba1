// The row kernel of the CPU. A row pair is read once, into float (or double) scratch rows that stay in the core's cache;
// every sweep runs there; dz is written once. Compiled once per instruction set (KD_ISA); dispatch.cpp picks one.
//
// No standard-library template may be instantiated here: the linker keeps one copy of each, and it could be this one, with
// instructions that the processor does not have.
#include "rows.h"

#include <limits>

#include "../divergence.h"

#define KD_SIMD _Pragma("omp simd")

namespace kd::KD_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // columns summed in the compute type before they join a double

// ---- storage formats ------------------------------------------------------------------------------------------------

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

KD_INLINE float widen(float x) { return x; }
KD_INLINE double widen(double x) { return x; }
KD_INLINE float widen(Bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
KD_INLINE float widen(F16 x) {
    // Exponent moved by a multiplication, which makes subnormals normal; infinities and NaN get the exponent they lost.
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    const float scaled = bits<float>(rest) * bits<float>(uint32_t(254 - 15) << 23);
    const uint32_t special = rest >= (31u << 23) ? 255u << 23 : 0u;
    return bits<float>(bits<uint32_t>(scaled) | special | sign);
}

template <class T, class Real> KD_INLINE T narrow(Real x);
template <> KD_INLINE float narrow<float, float>(float x) { return x; }
template <> KD_INLINE float narrow<float, double>(double x) { return float(x); }
template <> KD_INLINE double narrow<double, double>(double x) { return x; }
template <> KD_INLINE double narrow<double, float>(float x) { return x; }
template <> KD_INLINE Bf16 narrow<Bf16, float>(float x) {
    const uint32_t b = bits<uint32_t>(x);
    const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return {uint16_t((b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : rounded)};
}
template <> KD_INLINE F16 narrow<F16, float>(float x) {
    // Round to nearest even: normals by an integer bias, subnormals by adding a constant that aligns their last bit.
    const uint32_t b = bits<uint32_t>(x), sign = (b >> 16) & 0x8000, rest = b & 0x7fffffff;
    const uint32_t normal = (rest + 0xc8000fff + ((rest >> 13) & 1)) >> 13;
    const uint32_t tiny = bits<uint32_t>(bits<float>(rest) + 0.5f) - bits<uint32_t>(0.5f);
    const uint32_t large = rest > 0x7f800000 ? 0x7e00u : 0x7c00u;
    return {uint16_t(sign | (rest >= 0x47800000 ? large : (rest < 0x38800000 ? tiny : normal)))};
}
template <> KD_INLINE Bf16 narrow<Bf16, double>(double x) { return narrow<Bf16>(float(x)); }
template <> KD_INLINE F16 narrow<F16, double>(double x) { return narrow<F16>(float(x)); }

template <class F> void with_dtype(Dtype dtype, F&& f) {
    switch (dtype) {
        case Dtype::f32: f(float{}); break;
        case Dtype::f64: f(double{}); break;
        case Dtype::bf16: f(Bf16{}); break;
        case Dtype::f16: f(F16{}); break;
    }
}

// ---- sweeps over scratch rows ---------------------------------------------------------------------------------------

// Sums f(column) in blocks. `f` is inlined into the SIMD loop.
template <class Real, class F> KD_INLINE double sum_columns(int64_t vocab, F&& f) {
    double total = 0;
    for (int64_t start = 0; start < vocab; start += kBlock) {
        const int64_t stop = start + kBlock < vocab ? start + kBlock : vocab;
        Real part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t v = start; v < stop; ++v) part += f(v);
        total += part;
    }
    return total;
}

// z = softcap * tanh((logits + bias) * scale / softcap); returns the largest (NaN is passed over, and found by the sums).
template <class Real> Real load_row(const Side& side, int64_t row, int64_t vocab, Real* __restrict z) {
    const Real scale = Real(side.scale), cap = Real(side.softcap), per_cap = cap != Real(0) ? Real(1) / cap : Real(0);
    const Real* __restrict bias = static_cast<const Real*>(side.bias);
    with_dtype(side.dtype, [&](auto format) {
        using T = decltype(format);
        const T* __restrict source = static_cast<const T*>(side.logits) + row * side.stride;
        if (bias) {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) z[v] = (Real(widen(source[v])) + bias[v]) * scale;
        } else if (scale != Real(1)) {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) z[v] = Real(widen(source[v])) * scale;
        } else {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) z[v] = Real(widen(source[v]));
        }
    });
    if (cap != Real(0)) {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) z[v] = cap * tanh(z[v] * per_cap);
    }
    Real top = -kInfinity<Real>;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < vocab; ++v) top = z[v] > top ? z[v] : top;
    return top;
}

// e = exp(z / T - top), their sum returned; e may be null.
template <class Real> double exp_row(const Real* __restrict z, Real inv_t, Real top, int64_t vocab, Real* __restrict e) {
    const Real reference = top == -kInfinity<Real> ? Real(0) : top;
    if (!e) return sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return exp(z[v] * inv_t - reference); });
    return sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return e[v] = exp(z[v] * inv_t - reference); });
}

template <class Real> int64_t find(const Real* z, Real top, int64_t vocab) {
    for (int64_t v = 0; v < vocab; ++v)
        if (z[v] == top) return v;
    return -1;
}

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

// What a divergence is given for column v: (x - norm_s, u - norm_t), x = z / T.
template <class Real> struct Columns {
    const Real *z, *y;
    Real *q, *p;
    Real inv_t, norm_s, norm_t, a, b;
    template <class D> KD_INLINE Terms<Real> terms(int64_t v) const {
        return D::template terms<Real>(z[v] * inv_t - norm_s, y[v] * inv_t - norm_t, q[v], p[v], a, b);
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
    template <class D> void slopes(int64_t vocab, Real* g) const {
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] = terms<D>(v).slope;
    }
};

template <class Real, class D> void one_row(const RowArguments& a, int64_t row, Scratch<Real>& s) {
    const int64_t vocab = a.vocab;
    const bool softmax = a.normalizer == Normalizer::softmax;
    const Real inv_t = Real(1.0 / a.temperature);
    Real* const state = static_cast<Real*>(a.state) + row;
    const Real weight = a.weight ? static_cast<const Real*>(a.weight)[row] : Real(1);
    const Real top_s = load_row(a.student, row, vocab, s.z), top_t = load_row(a.teacher, row, vocab, s.y);
    const int64_t label = a.labels ? a.labels[row] : -1;

    Columns<Real> columns{s.z, s.y, s.q, s.p, inv_t, 0, 0, Real(a.a), Real(a.b)};
    const Real outer = Real(a.student.scale) * weight * Real(a.dz_scale);
    bool done = false;  // with dz
    Real lse_ce = 0;
    double slope_sum = D::slope_sum;
    if (a.statistics) {
        Real lse_s = 0, lse_t = 0, per_sum_s = 1, per_sum_t = 1;
        if (softmax || a.stats) {
            auto exponentiate = [&](const Real* z, Real top, Real* e, Real& per_sum) {
                const double sum = exp_row(z, inv_t, top * inv_t, vocab, e);
                per_sum = Real(1.0 / sum);
                return Real(top * inv_t + std::log(sum));
            };
            lse_s = exponentiate(s.z, top_s, s.q, per_sum_s);
            lse_t = exponentiate(s.y, top_t, s.p, per_sum_t);
        }
        if (softmax) {
            columns.norm_s = lse_s, columns.norm_t = lse_t;
        } else if (a.normalizer == Normalizer::mean) {
            const auto skipped = [&](int64_t v) KD_INLINE_LAMBDA { return s.z[v] == -kInfinity<Real> && s.y[v] == -kInfinity<Real>; };
            const double kept = sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : Real(1); });
            const double size = kept > 1 ? kept : 1;
            columns.norm_s = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : s.z[v] * inv_t; }) / size);
            columns.norm_t = Real(sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return skipped(v) ? Real(0) : s.y[v] * inv_t; }) / size);
        }
        if (a.labels) lse_ce = softmax && a.temperature == 1.0 ? lse_s : Real(top_s + std::log(exp_row<Real>(s.z, 1, top_s, vocab, nullptr)));

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
        const Real ce = a.labels ? lse_ce - s.z[label] : std::numeric_limits<Real>::quiet_NaN();
        state[0] = columns.norm_s;
        state[a.state_stride] = columns.norm_t;
        state[2 * a.state_stride] = Real(slope_sum);
        state[3 * a.state_stride] = lse_ce;
        if (a.loss) {
            Real total = a.value_scale != 0 ? Real(a.value_scale * divergence) : Real(0);
            if (a.ce_weight != 0) total += Real(a.ce_weight) * ce;
            static_cast<Real*>(a.loss)[row] = weight * total;
        }
        if (a.stats) {
            const auto entropy = [&](const Real* z, const Real* p, Real lse) {
                return -sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return p[v] == Real(0) ? Real(0) : p[v] * (z[v] * inv_t - lse); });
            };
            float* const stats = a.stats + row;
            stats[0] = float(divergence);
            stats[a.stats_stride] = float(ce);
            stats[2 * a.stats_stride] = float(entropy(s.z, s.q, lse_s));
            stats[3 * a.stats_stride] = float(entropy(s.y, s.p, lse_t));
            stats[4 * a.stats_stride] = find(s.z, top_s, vocab) == find(s.y, top_t, vocab) ? 1.f : 0.f;
        }
    } else {
        columns.norm_s = state[0], columns.norm_t = state[a.state_stride];
        slope_sum = state[2 * a.state_stride], lse_ce = state[3 * a.state_stride];
        if (softmax) {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) s.q[v] = exp(s.z[v] * inv_t - columns.norm_s);
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) s.p[v] = exp(s.y[v] * inv_t - columns.norm_t);
        }
        columns.template slopes<D>(vocab, s.g);
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
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) g[v] += ce * exp(s.z[v] - lse_ce);
        g[label] -= ce;
    }
    const Real per_cap = a.student.softcap != 0 ? Real(1.0 / a.student.softcap) : Real(0);
    with_dtype(a.dz_dtype, [&](auto format) {
        using T = decltype(format);
        T* __restrict out = static_cast<T*>(a.dz) + row * a.dz_stride;
        const Real* __restrict z = s.z;
        if (per_cap != Real(0)) {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) {
                const Real bend = z[v] * per_cap;
                out[v] = narrow<T>(g[v] * outer * (Real(1) - bend * bend));
            }
        } else {
            KD_SIMD for (int64_t v = 0; v < vocab; ++v) out[v] = narrow<T>(g[v] * outer);
        }
    });
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
