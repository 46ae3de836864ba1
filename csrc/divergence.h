// Each divergence once: the value and the slope df/d(log q) of one column, from log q, log p and their exponentials.
// T * dD/dz_student = slope - q * sum(slope). The forms are those of `terms` in kdkernels/divergences.py, whose comments
// say why; a test holds the two, and the Triton twins, against each other. Ids are that file's too. A divergence with one
// parameter gets 1 minus it as the second, which float could not form from it without losing digits near 1.
#pragma once
#include "elementary.h"

namespace kd {

template <class Real> struct Terms { Real value, slope; };

// knows_slope_sum: the sum of a row's slopes is known before the row is read, and takes no sweep. slope_jumps: the slope is not a continuous
// function of q and p, so that slopes and their sum must be taken from the same rounded numbers.
struct Smooth { static constexpr bool slope_jumps = false; };
struct SlopeSumUnknown : Smooth {
    static constexpr bool knows_slope_sum = false;
    static constexpr double slope_sum = 0;
};
struct SlopeSumKnown : Smooth { static constexpr bool knows_slope_sum = true; };

template <class Real> KD_INLINE Real magnitude(Real x) { return x < Real(0) ? -x : x; }

// log(q / m) and log(p / m), m = weight_q * q + weight_p * p.
template <class Real> struct Mixture { Real log_qm, log_pm; };
template <class Real> KD_INLINE Mixture<Real> mixture(Real weight_q, Real weight_p, Real log_q, Real log_p) {
    const Real ratio = log_q - log_p;
    const bool q_larger = ratio >= Real(0);
    const Real share = q_larger ? weight_p : weight_q, rest = q_larger ? weight_q : weight_p;  // of the smaller, of the larger
    const Exponential<Real> smaller = exponential<Sign::negative>(-magnitude(ratio));        // over the larger
    const Real lost = share * smaller.less_one, direct = rest + share * smaller.whole;       // m / larger - 1, m / larger
    const Real log_m = log1p_or_log(lost, direct);
    return {q_larger ? -log_m : ratio - log_m, q_larger ? -ratio - log_m : -log_m};
}

struct ForwardKL : SlopeSumKnown {
    static constexpr int id = 0;
    static constexpr const char* name = "forward_kl";
    static constexpr double slope_sum = -1;
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real, Real) {
        const Real value = p == Real(0) ? Real(0) : p * (log_p - log_q);
        return {value + (q - p), -p};
    }
};

struct ReverseKL : SlopeSumUnknown {
    static constexpr int id = 1;
    static constexpr const char* name = "reverse_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real, Real) {
        const Real slope = q == Real(0) ? Real(0) : q * (log_q - log_p);
        return {slope - (q - p), slope};
    }
};

struct SymmetricKL : SlopeSumUnknown {
    static constexpr int id = 2;
    static constexpr const char* name = "symmetric_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real w, Real v) {
        const Real ratio = log_q - log_p;
        const Real reverse = w * (q == Real(0) ? Real(0) : q * ratio);
        const Real forward = -v * (p == Real(0) ? Real(0) : p * ratio);
        return {forward + reverse + (v - w) * (q - p), reverse - v * p};
    }
};

struct JSD : SlopeSumUnknown {
    static constexpr int id = 3;
    static constexpr const char* name = "jsd";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real beta, Real rest) {
        const Mixture<Real> m = mixture(rest, beta, log_q, log_p);
        const Real slope = rest * (q == Real(0) ? Real(0) : q * m.log_qm);
        return {beta * (p == Real(0) ? Real(0) : p * m.log_pm) + slope, slope};
    }
};

struct SkewKL : SlopeSumUnknown {
    static constexpr int id = 4;
    static constexpr const char* name = "skew_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real a, Real rest) {
        const Mixture<Real> m = mixture(rest, a, log_q, log_p);
        const Real slope = -rest * (q == Real(0) ? Real(0) : q * expm1(m.log_pm));
        return {(p == Real(0) ? Real(0) : p * m.log_pm) + rest * (q - p), slope};
    }
};

struct SkewReverseKL : SlopeSumUnknown {
    static constexpr int id = 5;
    static constexpr const char* name = "skew_reverse_kl";
    template <class Real> KD_INLINE static Terms<Real> terms(Real log_q, Real log_p, Real q, Real p, Real a, Real rest) {
        const Mixture<Real> m = mixture(a, rest, log_q, log_p);
        const Real value = q == Real(0) ? Real(0) : q * m.log_qm;
        const Real slope = value - a * (q == Real(0) ? Real(0) : q * expm1(m.log_qm));
        return {value + rest * (p - q), slope};
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
        const Real ratio = log_q - log_p, size = -magnitude(ratio), per_value = Real(-1) / (a * rest), per_slope = Real(-1) / a;
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
        const Real ratio = total * (log_q - log_p), size = -magnitude(ratio);  // of the powers
        const bool q_larger = ratio >= Real(0);
        const Real larger = exp(total * (q_larger ? log_q : log_p));
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
        const Real slope = skipped ? Real(0) : x - u;
        return {Real(0.5) * slope * slope, slope};
    }
};

// Calls `f` with the divergence of an id; false if there is none.
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
