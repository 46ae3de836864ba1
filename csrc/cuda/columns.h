// Columns of a row: loads of 16 bytes, logits from what is loaded, log-sum-exps.
#pragma once
#include <limits>
#include <type_traits>

#include "../divergence.h"
#include "../params.h"
#include "heuristics.h"

namespace kd {

constexpr int kLanes = 32;

KD_DEVICE float infinity() { return __builtin_inff(); }

struct RowSide {
    const void* logits;    // [rows, stride] before bias, scale and softcap
    const float* bias;     // [vocab], or null
    int64_t stride;        // in logits
    Dtype dtype;
    float scale, softcap;  // softcap 0: none
    KD_DEVICE bool plain() const { return !bias && scale == 1.f && softcap == 0.f; }  // logits as they are read
};

// ---- loads ----------------------------------------------------------------------------------------------------------

KD_DEVICE bool starts_vector(const void* p, int bytes = kVectorBytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The four words of one load. Unpacking them at once would stall on the load, and delay issuing the next.
struct alignas(kVectorBytes) Raw { uint32_t word[4]; };

template <class Logit> constexpr int kVec = kVectorBytes / int(sizeof(Logit));

template <class Logit> KD_DEVICE float logit_of(const Raw& raw, int i) {
    if constexpr (sizeof(Logit) == 4) return bits<float>(raw.word[i]);
    else if constexpr (std::is_same_v<Logit, bf16>) return bits<float>(i % 2 ? raw.word[i / 2] & 0xffff0000u : raw.word[i / 2] << 16);
    else return to_float(bits<Logit>(uint16_t(raw.word[i / 2] >> i % 2 * 16)));
}
template <class Logit> KD_DEVICE void unpack(float* z, const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kVec<Logit>; ++i) z[i] = logit_of<Logit>(raw, i);
}
// Loads columns `apart`, 0 outside the row: in rows that do not start at a multiple of 16 bytes, and at the ends of a row.
template <class Logit> KD_DEVICE Raw load_apart(const Logit* row, int column, int apart, int vocab) {
    using Word = std::conditional_t<sizeof(Logit) == 4, uint32_t, uint16_t>;
    Raw raw{};
#pragma unroll
    for (int i = 0; i < kVec<Logit>; ++i) {
        const int at = column + i * apart;
        const uint32_t word = at >= 0 && at < vocab ? bits<Word>(row[at]) : 0;
        if constexpr (sizeof(Logit) == 4) raw.word[i] = word;
        else raw.word[i / 2] |= word << i % 2 * 16;
    }
    return raw;
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// Returns a logit after bias, scale and softcap. It is rounded before it is used: contracted into an FMA with the subtraction of the
// largest logit, the largest itself would not give 0.
KD_DEVICE float transformed(float z, const RowSide& side, int column) {
    if (side.bias) z += side.bias[column];
    z = rounded_product(z, side.scale);
    return side.softcap != 0.f ? rounded_product(side.softcap, tanh(z / side.softcap)) : z;
}

KD_DEVICE float logit_at(const RowSide& side, int64_t row, int column) {
    switch (side.dtype) {
        case Dtype::bf16: return to_float(static_cast<const bf16*>(side.logits)[row * side.stride + column]);
        case Dtype::f16: return to_float(static_cast<const half*>(side.logits)[row * side.stride + column]);
        default: return static_cast<const float*>(side.logits)[row * side.stride + column];
    }
}

// Applies bias, scale and softcap to kCount columns, `apart`, and writes -inf outside the row. whole: all columns are inside. Unlike
// `transformed`, it branches once for all columns.
template <int kCount> KD_DEVICE void transform(float* z, const RowSide& side, int column, int apart, int vocab, bool whole) {
    if (side.bias) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (const int at = column + i * apart; whole || (at >= 0 && at < vocab)) z[i] += side.bias[at];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = rounded_product(z[i], side.scale);
    if (side.softcap != 0.f) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) z[i] = rounded_product(side.softcap, tanh(z[i] / side.softcap));
    }
    if (whole) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (const int at = column + i * apart; at < 0 || at >= vocab) z[i] = -infinity();
}

// ---- log-sum-exps ---------------------------------------------------------------------------------------------------

// z and y are logits of the student and the teacher: transformed, or as read if the transform is only a positive scale. c converts z to
// z / T in units of ln 2, the input of ex2; it includes a scale that was not applied.

// Log-sum-exps of a part of a row: max, the largest logit of a side, and sum 2^((z - max) c). sum_ce is the student's at T = 1. Subtract
// before multiplying: for a small T, z c and max c are rounded by millions. A NaN logit shows in the sum, not in max.
struct LogSums {
    float max_s = -infinity(), sum_s = 0.f, max_t = -infinity(), sum_t = 0.f, sum_ce = 0.f;

    KD_DEVICE static float reference(float max) { return max == -infinity() ? 0.f : max; }
    // Rescales a sum from one largest logit to another.
    KD_DEVICE static float moved(float sum, float max, float to, float c) { return sum * exp2_fast((max - to) * c); }
    template <int kCount> KD_DEVICE static void add(float& sum, float before, float now, const float* z, float c) {
        const float to = reference(now);
        sum = moved(sum, before, to, c);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum += exp2_fast((z[i] - to) * c);
    }
    template <int kCount> KD_DEVICE static float largest(float max, const float* z) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) max = fmaxf(max, z[i]);
        return max;
    }
    KD_DEVICE void merge(const LogSums& o, float c_s, float c_t) {
        const float now_s = fmaxf(max_s, o.max_s), now_t = fmaxf(max_t, o.max_t);
        const float to_s = reference(now_s), to_t = reference(now_t);
        sum_s = moved(sum_s, max_s, to_s, c_s) + moved(o.sum_s, o.max_s, to_s, c_s);
        sum_t = moved(sum_t, max_t, to_t, c_t) + moved(o.sum_t, o.max_t, to_t, c_t);
        sum_ce = moved(sum_ce, max_s, to_s, kLog2E) + moved(o.sum_ce, o.max_s, to_s, kLog2E);
        max_s = now_s, max_t = now_t;
    }
};

// Maps a logit to log2 of its probability, (z - top) c - rest: see STATE in kdkernels/backends/rows.py.
struct Norm {
    float c = 0.f, top = 0.f, rest = 0.f;
    KD_DEVICE float operator()(float z) const { return fmaf(z - top, c, -rest); }
};
KD_DEVICE Norm norm_of(float max, float sum, float c) { return {c, max, log2_fast(sum)}; }

// The largest logit of one side in a thread, and a limit to compare it with.
struct Largest {
    float value = -infinity(), limit = -infinity();
    KD_DEVICE float get() const { return value; }
    KD_DEVICE bool within() const { return value <= limit; }
    KD_DEVICE void set_limit(float to) { limit = to; }
    template <int kCount> KD_DEVICE void add(const Raw&, const float* z) { value = LogSums::largest<kCount>(value, z); }
};
// The same for 16-bit logits without a transform: maxima of the low and of the high halves of words, two columns per instruction.
template <class Logit> struct PackedLargest {
    static constexpr uint32_t kNone = std::is_same_v<Logit, bf16> ? 0xff80ff80u : 0xfc00fc00u;  // -inf, twice
    uint32_t pair = kNone, limit = kNone;
    KD_DEVICE float get() const {
        const Raw raw{{pair}};
        return fmaxf(logit_of<Logit>(raw, 0), logit_of<Logit>(raw, 1));
    }
    KD_DEVICE bool within() const { return pair_within<Logit>(pair, limit); }
    KD_DEVICE void set_limit(float to) { limit = bits<uint16_t>(from_float<Logit>(to)) * 0x10001u; }
    template <int kCount> KD_DEVICE void add(const Raw& raw, const float*) {
#pragma unroll
        for (int i = 0; i < 4; ++i) pair = larger_pair<Logit>(pair, raw.word[i]);
    }
};

// LogSums during a sweep. A sum is relative to `from`, an earlier largest logit, which is replaced when the largest is kRoom powers of two
// above it. That is one branch per vector, rarely taken, instead of rescaling both sums for every vector.
template <class Top> struct RunningSums {  // Top: Largest or PackedLargest
    static constexpr float kRoom = 48.f;  // up to twice that if the limit is rounded to 16 bits
    struct Side {
        Top largest;
        float c, room, from = -std::numeric_limits<float>::max(), sum = 0.f;
        KD_DEVICE explicit Side(float c) : c(c), room(kRoom / fmaxf(c, kLog2E)) {}  // kLog2E: the sum at T = 1 must not overflow either
        KD_DEVICE void move() {
            const float to = largest.get();
            if (!(to > from)) return;
            sum = LogSums::moved(sum, from, to, c), from = to;
            largest.set_limit(to + room);
        }
    };
    Side s, t;
    float sum_ce = 0.f;

    KD_DEVICE RunningSums(float c_s, float c_t) : s(c_s), t(c_t) {}
    // Adds columns of both sides, given as read and as logits.
    template <int kCount> KD_DEVICE void add(const Raw& raw_s, const Raw& raw_t, const float* z, const float* y, bool at_one) {
        s.largest.template add<kCount>(raw_s, z), t.largest.template add<kCount>(raw_t, y);
        if (!(s.largest.within() && t.largest.within())) {
            const float before = s.from;
            s.move(), t.move();
            sum_ce = LogSums::moved(sum_ce, before, s.from, kLog2E);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) s.sum += exp2_fast((z[i] - s.from) * s.c);
#pragma unroll
        for (int i = 0; i < kCount; ++i) t.sum += exp2_fast((y[i] - t.from) * t.c);
        if (!at_one) return;
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum_ce += exp2_fast((z[i] - s.from) * kLog2E);
    }
    KD_DEVICE LogSums total() const {
        LogSums all;
        all.max_s = s.largest.get(), all.max_t = t.largest.get();
        const float to = LogSums::reference(all.max_s);
        all.sum_s = LogSums::moved(s.sum, s.from, to, s.c), all.sum_ce = LogSums::moved(sum_ce, s.from, to, kLog2E);
        all.sum_t = LogSums::moved(t.sum, t.from, LogSums::reference(all.max_t), t.c);
        return all;
    }
};

}  // namespace kd
