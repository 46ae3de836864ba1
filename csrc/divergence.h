// The divergences: value and slope df/d(log q) of one column, from log q, log p and their exponentials.
// T * dD/dz_student = slope - q * sum(slope). Formulas and ids are those of kdkernels/divergences.py, whose comments explain them; tests
// compare them with Python and Triton. A divergence with one parameter a gets 1 - a as the second: computed in float, it would lose digits
// near 1.
//
// log_q and log_p are in units of kUnit: natural on a CPU, in base 2 on a GPU, whose ex2 and lg2 are one instruction each. Values and
// slopes are in natural units.
#pragma once
#include "elementary.h"

namespace kd {

template <class Real> struct Terms { Real value, slope; };

// knows_slope_sum: the sum of a row's slopes is a known constant and needs no sweep. slope_jumps: the slope is not a continuous
// function of q and p, so that slopes and their sum must be computed from the same rounded numbers.
struct Smooth { static constexpr bool slope_jumps = false; };
struct SlopeSumUnknown : Smooth {
    static constexpr bool knows_slope_sum = false;
    static constexpr double slope_sum = 0;
};
struct SlopeSumKnown : Smooth { static constexpr bool knows_slope_sum = true; };

template <class Real> constexpr Real kUnit = kSpecial<Real> ? Real(kLn2) : Real(1);

template <class Real> KD_INLINE Real magnitude(Real x) { return x < Real(0) ? -x : x; }

// Returns p * x; 0 if p is 0, even if x is infinite or NaN.
template <class Real> KD_INLINE Real product(Real p, Real x) { return p == Real(0) ? Real(0) : p * x; }
// The same for an x that is finite on a GPU: log_qm, log_pm, log and excess below.
template <class Real> KD_INLINE Real times(Real p, Real x) { return kSpecial<Real> ? p * x : product(p, x); }

// log(q / m) and log(p / m), m = weight_q * q + weight_p * p with weights that sum to 1.
template <class Real> struct Mixture { Real log_qm, log_pm; };
template <class Real> KD_INLINE Mixture<Real> mixture(Real weight_q, Real weight_p, Real log_q, Real log_p) {
    const Real ratio = log_q - log_p;
    if constexpr (kSpecial<Real>) {
        // Below kSmallest the smaller of the two is 0 in float32; a NaN, of two that are 0, becomes it too.
        const Real size = fmaxf(-fabsf(ratio), kSmallest);
        const bool larger = ratio >= Real(0);
        const Real log_m = log2_fast(fmaf(larger ? weight_p : weight_q, exp2_fast(size), larger ? weight_q : weight_p));
        return {(larger ? Real(0) : size) - log_m, (larger ? size : Real(0)) - log_m};
    }
    const bool q_larger = ratio >= Real(0);
    const Real share = q_larger ? weight_p : weight_q, rest = q_larger ? weight_q : weight_p;  // of the smaller, of the larger
    const Exponential<Real> smaller = exponential<Sign::negative>(-magnitude(ratio));        // over the larger
    const Real lost = share * smaller.less_one, direct = rest + share * smaller.whole;       // m / larger - 1, m / larger
    const Real log_m = log1p_or_log(lost, direct);
    return {q_larger ? -log_m : ratio - log_m, q_larger ? -ratio - log_m : -log_m};
}

// log(x / m) and x / m - 1, m = own * x + other * y with weights that sum to 1.
template <class Real> struct Share { Real log, excess; };
template <class Real> KD_INLINE Share<Real> share(Real own, Real other, Real log_x, Real log_y) {
    if constexpr (kSpecial<Real>) {
        const Real ratio = exp2_fast(fminf(log_y - log_x, -kSmallest)), m = fmaf(other, ratio, own);  // y / x, m / x
        return {-log2_fast(m), other * ((Real(1) - ratio) * reciprocal_fast(m))};
    }
    const Real log = mixture(own, other, log_x, log_y).log_qm;
    return {log, expm1(log)};
}

// A mixture m that is nearly one of q and p, on a GPU. log2_fast has an absolute error near 1, but here a value is as small as the weight
// of the other or its square. So where t = m / heavy - 1 is small, log(1 + t) is t - bend, with a polynomial for bend.
constexpr float kLight = 0.125f;  // the largest weight of the other
struct LightMixture {
    float size, bend, log_m;  // natural: log(other / heavy), limited to where results depend on it; t - log(1 + t) if close; log(1 + t)
    bool close;
};
KD_INLINE LightMixture light_mixture(float light, float log2_light, float log2_heavy) {
    const float size = fminf(fmaxf((log2_light - log2_heavy) * kLn2, -44.f), 44.f), t = light * expm1(size);
    const float bend = t * t * (0.5f + t * (-0.3333294f + t * (0.2500239f + t * (-0.20080183f + t * (0.16693323f + t * -0.10811102f)))));
    const bool close = t < 0.25f;
    return {size, bend, close ? t - bend : log(1.f + t), close};
}
// KL(own || m) of a column, m = (1 - light) * own + light * other.
KD_INLINE float light_skew(float light, float log_own, float log_other, float own, float other) {
    const LightMixture m = light_mixture(light, log_other, log_own);
    return m.close ? own * m.bend : light * (other - own) - own * m.log_m;
}

struct ForwardKL : SlopeSumKnown {
    static constexpr int id = 0;
    static constexpr const char* name = "forward_kl";
    static constexpr double slope_sum = -1;
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real, Real) {
        return {product(p, (log_p - log_q) * kUnit<Real>) + (q - p), -p};
    }
};

struct ReverseKL : SlopeSumUnknown {
    static constexpr int id = 1;
    static constexpr const char* name = "reverse_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real, Real) {
        const Real slope = product(q, (log_q - log_p) * kUnit<Real>);
        return {slope - (q - p), slope};
    }
};

struct SymmetricKL : SlopeSumUnknown {
    static constexpr int id = 2;
    static constexpr const char* name = "symmetric_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real w, Real v) {
        const Real ratio = (log_q - log_p) * kUnit<Real>;
        const Real reverse = w * product(q, ratio), forward = -v * product(p, ratio);
        return {forward + reverse + (v - w) * (q - p), reverse - v * p};
    }
};

struct JSD : SlopeSumUnknown {
    static constexpr int id = 3;
    static constexpr const char* name = "jsd";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real beta, Real rest) {
        const Mixture<Real> m = mixture(rest, beta, log_q, log_p);
        const Real slope = rest * kUnit<Real> * times(q, m.log_qm);
        if constexpr (kSpecial<Real>) {
            const bool light_q = rest <= kLight;
            if (light_q || beta <= kLight) {
                const Real from_q = rest * q, from_p = beta * p;
                const LightMixture l = light_q ? light_mixture(rest, log_q, log_p) : light_mixture(beta, log_p, log_q);
                return {(light_q ? from_q : from_p) * l.size - l.log_m * (from_q + from_p), slope};
            }
        }
        return {beta * kUnit<Real> * times(p, m.log_pm) + slope, slope};
    }
    // Only the slope, with fewer instructions.
    template <class Real> KD_INLINE static Real slope(Real log_q, Real log_p, Real q, Real, Real beta, Real rest) {
        return rest * kUnit<Real> * times(q, share(rest, beta, log_q, log_p).log);
    }
};

struct SkewKL : SlopeSumUnknown {
    static constexpr int id = 4;
    static constexpr const char* name = "skew_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real a, Real rest) {
        const Share<Real> of_p = share(a, rest, log_p, log_q);
        if constexpr (kSpecial<Real>)
            if (rest <= kLight) return {light_skew(rest, log_p, log_q, p, q), -rest * times(q, of_p.excess)};
        return {kUnit<Real> * times(p, of_p.log) + rest * (q - p), -rest * times(q, of_p.excess)};
    }
};

struct SkewReverseKL : SlopeSumUnknown {
    static constexpr int id = 5;
    static constexpr const char* name = "skew_reverse_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real a, Real rest) {
        const Share<Real> of_q = share(a, rest, log_q, log_p);
        const Real value = kUnit<Real> * times(q, of_q.log);
        if constexpr (kSpecial<Real>)
            if (rest <= kLight) return {light_skew(rest, log_q, log_p, q, p), value - a * times(q, of_q.excess)};
        return {value + rest * (p - q), value - a * times(q, of_q.excess)};
    }
};

struct TotalVariation : SlopeSumUnknown {
    static constexpr int id = 6;
    static constexpr const char* name = "total_variation";
    static constexpr bool slope_jumps = true;
    template <class Real> KD_INLINE static Terms<Real> terms(Real, Real, Real q, Real p, Real, Real) {
        const Real difference = q - p;
        const Real sign = difference > Real(0) ? Real(0.5) : (difference < Real(0) ? Real(-0.5) : Real(0));
        return {Real(0.5) * magnitude(difference), sign * q};
    }
};

// APART of kdkernels/divergences.py.
template <class Real> constexpr Real kApart = Real(-1);

struct AlphaDivergence : SlopeSumUnknown {
    static constexpr int id = 7;
    static constexpr const char* name = "alpha_divergence";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real a, Real rest) {
        const Real ratio = (log_q - log_p) * kUnit<Real>, size = -magnitude(ratio), per_value = Real(-1) / (a * rest),
                   per_slope = Real(-1) / a;
        const bool q_larger = ratio >= Real(0);
        const Real larger = q > p ? q : p;
        const Real power = q_larger ? a : rest;
        const Exponential<Real> grown = exponential(power * size);
        const Real shrunk = exponential<Sign::negative>(size).less_one;
        const Real close = (grown.less_one - (q_larger ? Real(0) : shrunk)) * larger;
        const Real slope = (ratio < kApart<Real> ? larger * grown.whole - q : close) * per_slope;
        const Real value = (grown.less_one - power * shrunk) * larger * per_value;
        const bool empty = larger == Real(0);
        return {empty ? Real(0) : value, empty ? Real(0) : slope};
    }
};

struct ABDivergence : SlopeSumUnknown {
    static constexpr int id = 8;
    static constexpr const char* name = "ab_divergence";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real, Real, Real a, Real b) {
        const Real total = a + b, share_p = a / total, share_q = b / total, per_value = Real(-1) / (a * b), per_slope = Real(-1) / a;
        const Real ratio = total * kUnit<Real> * (log_q - log_p), size = -magnitude(ratio);  // of the powers
        const bool q_larger = ratio >= Real(0);
        const Real larger = exp(total * kUnit<Real> * (q_larger ? log_q : log_p));
        const Real power = q_larger ? share_p : share_q;
        const Exponential<Real> grown = exponential(power * size), shrunk = exponential<Sign::negative>(size);
        const Real close = grown.less_one - (q_larger ? Real(0) : shrunk.less_one);
        const Real slope = (ratio < kApart<Real> ? grown.whole - shrunk.whole : close) * larger * per_slope;
        const Real value = (grown.less_one - power * shrunk.less_one) * larger * per_value;
        const bool empty = log_q == -kInfinity<Real> && log_p == -kInfinity<Real>;
        return {empty ? Real(0) : value, empty ? Real(0) : slope};
    }
};

struct LogitMSE : SlopeSumKnown {
    static constexpr int id = 9;
    static constexpr const char* name = "logit_mse";
    static constexpr double slope_sum = 0;
    template <class Real> KD_INLINE static Terms<Real> terms(Real x, Real u, Real, Real, Real, Real) {
        const bool skipped = x == -kInfinity<Real> && u == -kInfinity<Real>;
        const Real slope = skipped ? Real(0) : (x - u) * kUnit<Real>;
        return {Real(0.5) * slope * slope, slope};
    }
};

constexpr int kDivergences = 10;

// Calls `f` with the divergence of an id; returns false for an unknown id. Ids are 0 to kDivergences - 1.
template <class F> bool with_divergence(int id, F&& f) {
    switch (id) {
        case ForwardKL::id: f(ForwardKL{}); return true;
        case ReverseKL::id: f(ReverseKL{}); return true;
        case SymmetricKL::id: f(SymmetricKL{}); return true;
        case JSD::id: f(JSD{}); return true;
        case SkewKL::id: f(SkewKL{}); return true;
        case SkewReverseKL::id: f(SkewReverseKL{}); return true;
        case TotalVariation::id: f(TotalVariation{}); return true;
        case AlphaDivergence::id: f(AlphaDivergence{}); return true;
        case ABDivergence::id: f(ABDivergence{}); return true;
        case LogitMSE::id: f(LogitMSE{}); return true;
        default: return false;
    }
}

}  // namespace kd
