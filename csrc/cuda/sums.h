// The first sweep over a row pair: log-sum-exps of both sides, a vector at a time.
#pragma once
#include "vectors.h"

namespace kd {

// A thread's largest logit of one side, held against a limit. Floats:
struct Largest {
    float value = -infinity(), limit = -infinity();
    KD_DEVICE float get() const { return value; }
    KD_DEVICE bool within() const { return value <= limit; }
    KD_DEVICE void set_limit(float to) { limit = to; }
    template <int kCount> KD_DEVICE void add(const Raw&, const float* z) { value = LogSums::largest<kCount>(value, z); }
};
// 16-bit logits that nothing transforms: the largest of the low and of the high halves of a vector's words, two columns an instruction.
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

// LogSums during a sweep. A sum is relative to `from`, an earlier largest logit, and moves on only when the largest has left it behind by
// kRoom powers of two: one branch per vector, rarely taken, instead of a correction of both sums in every vector.
template <class Top> struct RunningSums {  // Top: Largest or PackedLargest
    static constexpr float kRoom = 48.f;  // a limit that is rounded to 16 bits allows for twice that
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
    // Columns of both sides, as read and as logits.
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
