// Storage formats, and sweeps over a row in scratch memory, for all CPU kernels.
//
// Included in each kernel's source file, which is compiled once per instruction set (internal linkage). Do not instantiate templates of
// the standard library here or there: the linker keeps one copy of each, which may have instructions that the processor lacks.
#pragma once
#include <cmath>
#include <limits>

#include "../elementary.h"
#include "rows.h"

#define KD_SIMD _Pragma("omp simd")

namespace kd::KD_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // columns summed in the compute type before they are added to a double

// ---- storage formats ------------------------------------------------------------------------------------------------

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

KD_INLINE float widen(float x) { return x; }
KD_INLINE double widen(double x) { return x; }
KD_INLINE float widen(Bf16 x) { return bits<float>(uint32_t(x.bits) << 16); }
KD_INLINE float widen(F16 x) {
    // A multiplication adjusts the exponent, which also normalises subnormals. Infinities and NaN get their exponent separately.
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

// Sums f(column) in blocks; `f` is inlined into the SIMD loop.
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

// z = softcap * tanh((logits + bias) * scale / softcap).
template <class Real> void read_row(const Side& side, int64_t row, int64_t vocab, Real* __restrict z) {
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
}

// The same, and returns the largest. NaN is ignored here; it propagates through the sums.
template <class Real> Real load_row(const Side& side, int64_t row, int64_t vocab, Real* __restrict z) {
    read_row(side, row, vocab, z);
    Real top = -kInfinity<Real>;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < vocab; ++v) top = z[v] > top ? z[v] : top;
    return top;
}

// Writes e = exp((z - top) / T) and returns the sum; e may be null.
template <class Real> double exp_row(const Real* __restrict z, Real inv_t, Real top, int64_t vocab, Real* __restrict e) {
    const Real reference = top == -kInfinity<Real> ? Real(0) : top;
    if (!e) return sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return exp((z[v] - reference) * inv_t); });
    return sum_columns<Real>(vocab, [&](int64_t v) KD_INLINE_LAMBDA { return e[v] = exp((z[v] - reference) * inv_t); });
}

template <class Real> int64_t find(const Real* z, Real top, int64_t vocab) {
    for (int64_t v = 0; v < vocab; ++v)
        if (z[v] == top) return v;
    return -1;
}

// out[offset + v] = f(v), in the output's type.
template <class Real, class F> KD_INLINE void write_row(int64_t vocab, void* out, Dtype dtype, int64_t offset, F&& f) {
    with_dtype(dtype, [&](auto format) {
        using T = decltype(format);
        T* __restrict to = static_cast<T*>(out) + offset;
        KD_SIMD for (int64_t v = 0; v < vocab; ++v) to[v] = narrow<T>(f(v));
    });
}

// Writes the gradient by the logits before softcap and scale, from the gradient g by the logits z: g * outer * (1 - (z / cap)^2).
template <class Real>
void write_gradient(const Real* __restrict g, const Real* __restrict z, Real outer, Real per_cap, int64_t vocab, void* out, Dtype dtype,
                    int64_t offset) {
    if (per_cap != Real(0)) {
        write_row<Real>(vocab, out, dtype, offset, [=](int64_t v) KD_INLINE_LAMBDA {
            const Real bend = z[v] * per_cap;
            return g[v] * outer * (Real(1) - bend * bend);
        });
    } else {
        write_row<Real>(vocab, out, dtype, offset, [=](int64_t v) KD_INLINE_LAMBDA { return g[v] * outer; });
    }
}

}  // namespace
}  // namespace kd::KD_ISA
