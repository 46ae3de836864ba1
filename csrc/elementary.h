// exp, log, expm1, log1p and tanh without branches or library calls, so that a loop over columns becomes SIMD code. The error is about
// 2 ulp; exp flushes results below twice the normal range to 0. NaN and infinities are handled as in IEEE 754.
//
// On a GPU, and on the fibers of tests (KD_FIBERS), float functions use the special function unit: ex2 and lg2 with an error of about
// 2^-22, which is small against the rounding of float32 sums over a vocabulary.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif
#if defined(__CUDACC__) || defined(KD_FIBERS)
#include "cuda/intrinsics.h"
#endif
#if defined(__CUDA_ARCH__) || defined(KD_FIBERS)
#define KD_SPECIAL_FUNCTIONS 1
#endif

namespace kd {

template <class To, class From> KD_INLINE To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

template <class Real> constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

template <class Real> struct Format;
template <> struct Format<float> {
    using Int = int32_t;
    using Word = uint32_t;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float low = -86.9f, high = 88.722839f;  // of exp: 2^(n - 1) below is normal; largest finite
    static constexpr float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f, round = 12582912.f;  // 1.5 * 2^23
};
template <> struct Format<double> {
    using Int = int64_t;
    using Word = uint64_t;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double low = -707.9, high = 709.782712893384;
    static constexpr double ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6, round = 6755399441055744.0;
};

// (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2: the Taylor series, whose tail is below half an ulp there.
KD_INLINE float exp_tail(float r) {
    return 0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333340e-3f + r * (1.3888889e-3f + r * 1.9841270e-4f))));
}
KD_INLINE double exp_tail(double r) {
    // clang-format off
    return 0.5 + r * (1.0 / 6 + r * (1.0 / 24 + r * (1.0 / 120 + r * (1.0 / 720 + r * (1.0 / 5040 + r * (1.0 / 40320 +
           r * (1.0 / 362880 + r * (1.0 / 3628800 + r * (1.0 / 39916800 + r * (1.0 / 479001600 + r / 6227020800.0))))))))));
    // clang-format on
}

// x = n ln 2 + r; gives 2^n and (exp(r) - 1). x within [low, high].
template <class Real> KD_INLINE Real split_exp(Real x, Real& power) {
    using F = Format<Real>;
    using Word = typename F::Word;
    const Real shifted = x * Real(1.4426950408889634074) + F::round;
    const Real n = shifted - F::round;
    const Real r = (x - n * F::ln2_hi) - n * F::ln2_lo;
    // The low bits of `shifted` are n: moved into the exponent field. n + bias lies in [1, 2 * bias + 1]; the top one would be
    // infinity, so 2^n is made as 2^(n - 1) and doubled by the caller's arithmetic.
    power = bits<Real>(Word((bits<Word>(shifted) + Word(F::bias - 1)) << F::mantissa));
    return r + r * r * exp_tail(r);
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;
#ifdef KD_SPECIAL_FUNCTIONS
template <class Real> constexpr bool kSpecial = sizeof(Real) == sizeof(float);
#else
template <class Real> constexpr bool kSpecial = false;
#endif
constexpr float kSmallest = -120.f;  // log2 of a ratio of probabilities, the smaller of which is 0 in float32 from here on

template <class Real> KD_INLINE Real exp(Real x) {
#ifdef KD_SPECIAL_FUNCTIONS
    if constexpr (kSpecial<Real>) return exp2_fast(x * kLog2E);
#endif
    using F = Format<Real>;
    const Real clamped = x < F::low ? F::low : (x > F::high ? F::high : x);  // NaN stays
    Real half_power;
    const Real m = split_exp(clamped, half_power);
    const Real y = (half_power + half_power * m) * Real(2);
    return x < F::low ? Real(0) : (x > F::high ? kInfinity<Real> : y);
}

template <class Real> KD_INLINE Real expm1(Real x) {
    if constexpr (kSpecial<Real>) {  // the series is good to 2e-8 where the difference would lose digits
        const float series = x * (1.f + x * (0.5f + x * (0.16666667f + x * (0.041666668f + x * (0.008333334f + x * 0.0013888889f)))));
        return (x < 0.f ? -x : x) < 0.25f ? series : exp(x) - 1.f;
    }
    using F = Format<Real>;
    const Real clamped = x < F::low ? F::low : (x > F::high ? F::high : x);
    Real half_power;
    const Real m = split_exp(clamped, half_power);
    const Real y = (half_power * m + (half_power - Real(0.5))) * Real(2);  // 2^n m + (2^n - 1)
    return x > F::high ? kInfinity<Real> : y;
}

// Both exp(x) and expm1(x); for negative x with fewer instructions.
enum class Sign { any, negative };
template <class Real> struct Exponential { Real whole, less_one; };
template <Sign sign = Sign::any, class Real> KD_INLINE Exponential<Real> exponential(Real x) {
    if constexpr (kSpecial<Real>) return {exp(x), expm1(x)};
    using F = Format<Real>;
    const Real raised = x < F::low ? F::low : x, clamped = sign == Sign::any && x > F::high ? F::high : raised;
    Real half_power;
    const Real m = split_exp(clamped, half_power) * half_power;
    const Real whole = x < F::low ? Real(0) : (half_power + m) * Real(2), less_one = (m + (half_power - Real(0.5))) * Real(2);
    if constexpr (sign == Sign::negative) return {whole, less_one};
    return {x > F::high ? kInfinity<Real> : whole, x > F::high ? kInfinity<Real> : less_one};
}

// 2 atanh(s) - 2 s over s^3, |s| <= 0.1716 (arguments in [sqrt 1/2, sqrt 2]).
KD_INLINE float log_tail(float z) {
    return 6.6666667e-1f + z * (4.0000000e-1f + z * (2.8571430e-1f + z * (2.2222222e-1f + z * 1.8181819e-1f)));
}
KD_INLINE double log_tail(double z) {
    // clang-format off
    return 2.0 / 3 + z * (2.0 / 5 + z * (2.0 / 7 + z * (2.0 / 9 + z * (2.0 / 11 + z * (2.0 / 13 + z * (2.0 / 15 +
           z * (2.0 / 17 + z * (2.0 / 19 + z * 2.0 / 21))))))));
    // clang-format on
}

// log of a normal positive number.
template <class Real> KD_INLINE Real log(Real x) {
#ifdef KD_SPECIAL_FUNCTIONS
    if constexpr (kSpecial<Real>) return log2_fast(x) * kLn2;
#endif
    using F = Format<Real>;
    using Int = typename F::Int;
    constexpr Int sqrt_half = sizeof(Real) == 4 ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdLL);
    const Int offset = bits<Int>(x) - sqrt_half;
    const Int n = offset >> F::mantissa;
    const Real f = bits<Real>(Int(bits<Int>(x) - n * (Int(1) << F::mantissa))) - Real(1);  // in [sqrt 1/2, sqrt 2] - 1
    const Real s = f / (Real(2) + f);
    const Real z = s * s;
    const Real e = Real(int32_t(n));
    return e * F::ln2_hi + (s * Real(2) + (s * z * log_tail(z) + e * F::ln2_lo));
}

// Returns log(1 + y), -1 < y <= 0, corrected for the rounding of 1 + y; or log(w) if 1 + y is small. w is 1 + y, computed without
// cancellation.
template <class Real> KD_INLINE Real log1p_or_log(Real y, Real w) {
    const bool near = y > Real(-0.5);
    const Real x = near ? Real(1) + y : w;
    const Real lost = near ? y - (x - Real(1)) : Real(0);
    return log(x) + lost / x;
}

template <class Real> KD_INLINE Real tanh(Real x) {
    const Real magnitude = x < Real(0) ? -x : x;
    const Real e = expm1(Real(-2) * magnitude);
    const Real t = -e / (e + Real(2));
    return x < Real(0) ? -t : t;
}

}  // namespace kd
