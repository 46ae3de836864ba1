// Row kernels of softmax(x / T), its logarithm, and their gradients, for given logits. They read a row once if its slices fit in shared
// memory, else twice.
#pragma once
#include "slice.h"

namespace kd {

struct Softmaxes {
    RowSide x, dy;           // [rows, stride] of one dtype, as out
    void* out;               // may be x or dy
    int64_t rows, out_stride;
    int vocab, kept_at;      // kept_at: offset of x in shared memory; dy follows
    int kept_bytes;
    float per_t;
    bool logarithm;
};

template <class Logit> KD_KERNEL KD_BOUNDS(kTeamThreads, 2) softmax_rows(const Softmaxes a) {
    using S = Slice<Logit>;
    Team team;
    const S slice(a.x.logits, team.row * a.x.stride, a.vocab, team);
    const Kept kept{a.kept_at};
    const float c = a.per_t * kLog2E;
    Logit* const out = static_cast<Logit*>(a.out) + team.row * a.out_stride;
    LogSum mine;
    sweep<Sweep::first>(slice, a.x, kept, [&](const float* z, int) { mine.add<S::kCount>(z, c, false); });
    const LogSum sums = team.reduce(mine, [&](LogSum& x, const LogSum& o) { x.merge(o, c); });
    const LogProbability log_q = log_probability(sums, a.per_t);
    const float reference = LogSums::reference(sums.max), per_sum = 1.f / sums.sum;
    sweep<Sweep::again>(slice, a.x, kept, [&](const float* z, int step) {
        float y[S::kCount];
#pragma unroll
        for (int i = 0; i < S::kCount; ++i) y[i] = a.logarithm ? log_q(z[i]) : exp2_fast((z[i] - reference) * c) * per_sum;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) slice.store(out, slice.column(step, j), y + j * S::kVec);
    });
}

// The gradient by x, from y = softmax(x / T) or its logarithm and from the gradient by y.
template <class Logit> KD_KERNEL KD_BOUNDS(kTeamThreads, 2) softmax_gradient_rows(const Softmaxes a) {
    using S = Slice<Logit>;
    Team team;
    const S slice(a.x.logits, team.row * a.x.stride, a.vocab, team);
    const Logit* const upstream = static_cast<const Logit*>(a.dy.logits) + team.row * a.dy.stride;
    const Kept kept{a.kept_at}, kept_too{a.kept_at + a.kept_bytes};
    Logit* const out = static_cast<Logit*>(a.out) + team.row * a.out_stride;
    // Calls body(y, dy, step), 0 outside the row.
    const auto pairs = [&](bool again, auto&& body) {
        for (int step = 0; step < slice.steps; ++step) {
            Raw y[kVectors], dy[kVectors];
            if (again && kept.at) kept.get(step, y), kept_too.get(step, dy);
            else slice.load(slice.row, step, y), slice.load(upstream, step, dy);
            body(y, dy, step);
        }
    };
    float mine = 0.f;
    pairs(false, [&](const Raw* y, const Raw* dy, int step) {
        if (kept.at) kept.put(step, y), kept_too.put(step, dy);
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
#pragma unroll
            for (int i = 0; i < S::kVec; ++i)
                mine += a.logarithm ? logit_of<Logit>(dy[j], i) : logit_of<Logit>(y[j], i) * logit_of<Logit>(dy[j], i);
    });
    const float total = team.reduce(mine, [](float& x, float o) { x += o; });
    pairs(true, [&](const Raw* y, const Raw* dy, int step) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
            float g[S::kVec];
#pragma unroll
            for (int i = 0; i < S::kVec; ++i) {
                const float p = logit_of<Logit>(y[j], i), d = logit_of<Logit>(dy[j], i);
                g[i] = (a.logarithm ? d - probability(p) * total : p * (d - total)) * a.per_t;
            }
            slice.store(out, slice.column(step, j), g);
        }
    });
}

}  // namespace kd
