// The row kernel of one side: log-sum-exp, entropy, log-probabilities at ids, and their gradient.
//
//   logits --sweep 1--> (max, sum, weighted sum) --reduction--> top, log_sum, entropy, log-probabilities
//      | kept in shared memory, else read again                   |
//      +--sweep 2 (with a gradient)-------------------------------+--> dz, then again at ids, with the gradient of the log-probabilities
#pragma once
#include "slice.h"

namespace kd {

constexpr uint32_t kExtreme = 1u << 10;  // a random word closer to 0 or 2^32 is compared in double only
constexpr float kTimeError = 4e-3f;      // error of the difference of two times, over ln 2; one time has about 2^-11 at kExtreme

// HeadArguments with numbers in float, and in double where they decide draws.
struct Heads {
    RowSide side;
    float *top, *log_sum, *entropy;                   // [rows]; entropy: or null
    const int64_t* ids;                               // [rows, num_ids], or null
    float* logprobs;                                  // [rows, num_ids]
    const float *d_lse, *d_entropy, *d_logprobs;      // or null
    void* dz;                                         // [rows, dz_stride], or null; a row may start where the logits' row does
    int32_t* top_ids;                                 // [rows, num_top]
    float* top_logprobs;
    int32_t* draws;                                   // [rows, num_draws]
    const uint64_t* seed_at;                          // or null: seed
    uint64_t seed;
    int64_t rows, dz_stride, first_row;
    int vocab, num_ids, num_top, top_capacity, num_draws;
    int draw_parts;                                   // teams that share the draws of a row
    int kept_at;                                      // offset of the row in shared memory; 0: not kept
    Dtype dz_dtype;
    float per_t, dz_scale;
    double exact_per_t, exact_scale, exact_softcap;
    uint32_t extreme = kExtreme;                      // of draws; tests use other values
    float time_error = kTimeError;
    bool statistics;
};

template <class Logit> KD_DEVICE Slice<Logit> slice_of(const Heads& a, const Team& team) {
    return {a.side.logits, team.row * a.side.stride, a.vocab, team};
}

// Returns the log-sum-exp, from the sums of this call or as an earlier call wrote it.
KD_DEVICE LogProbability statistics_of(const Heads& a, const Team& team, const LogSum& sums, bool writes = true) {
    if (!a.statistics) return {a.per_t, a.top[team.row], a.log_sum[team.row]};
    const LogProbability log_q = log_probability(sums, a.per_t);
    if (writes && team.reports()) a.top[team.row] = log_q.top, a.log_sum[team.row] = log_q.rest;
    return log_q;
}

// dz has the logits' dtype, or is narrower than float32 logits.
template <class Logit> KD_DEVICE void store_dz(const Slice<Logit>& slice, void* row, Dtype dtype, int column, const float* g) {
    if constexpr (sizeof(Logit) == 4) {
        if (dtype == Dtype::bf16) return slice.store(static_cast<bf16*>(row), column, g);
        if (dtype == Dtype::f16) return slice.store(static_cast<half*>(row), column, g);
    }
    slice.store(static_cast<Logit*>(row), column, g);
}
template <class Logit> KD_DEVICE void store_dz_at(void* row, Dtype dtype, int column, float g) {
    if (sizeof(Logit) == 4 && dtype == Dtype::bf16) static_cast<bf16*>(row)[column] = from_float<bf16>(g);
    else if (sizeof(Logit) == 4 && dtype == Dtype::f16) static_cast<half*>(row)[column] = from_float<half>(g);
    else static_cast<Logit*>(row)[column] = from_float<Logit>(g);
}

template <class Logit> KD_KERNEL KD_BOUNDS(kTeamThreads, 2) head_rows(const Heads a) {
    using S = Slice<Logit>;
    struct Part {
        LogSum sums;
        float upstream = 0.f;  // of the log-probabilities, summed
    };
    Team team;
    const int64_t row = team.row;
    const S slice = slice_of<Logit>(a, team);
    const Kept kept{a.kept_at};
    const float c = a.per_t * kLog2E;
    const int64_t* const ids = a.ids + row * a.num_ids;
    float* const logprobs = a.logprobs + row * a.num_ids;
    const float* const d_logprobs = a.d_logprobs ? a.d_logprobs + row * a.num_ids : nullptr;
    // Calls body(k, id) for the ids in this CTA's columns. The first CTA takes ids of -1.
    const auto for_ids = [&](auto&& body) {
        for (int k = thread_index(); k < a.num_ids; k += block_threads())
            if (const int id = int(ids[k]); id < 0 ? team.rank == 0 : slice.has(id)) body(k, id);
    };

    Part mine;
    if (a.statistics)
        sweep<Sweep::first>(slice, a.side, kept, [&](const float* z, int) { mine.sums.template add<S::kCount>(z, c, a.entropy); });
    for_ids([&](int k, int id) {  // read the logits before they are overwritten
        logprobs[k] = id < 0 ? 0.f : transformed(to_float(slice.row[id]), a.side, id);
        if (d_logprobs && id >= 0) mine.upstream += d_logprobs[k];
    });
    const Part all = team.reduce(mine, [&](Part& x, const Part& o) { x.sums.merge(o.sums, c), x.upstream += o.upstream; });
    const LogProbability log_q = statistics_of(a, team, all.sums);
    float entropy = 0.f;
    if (a.entropy) {
        entropy = a.statistics ? all.sums.entropy() : a.entropy[row];
        if (a.statistics && team.reports()) a.entropy[row] = entropy;
    }
    for_ids([&](int k, int id) {
        if (id >= 0) logprobs[k] = log_q(logprobs[k]);
    });
    if (!a.dz) return;

    const float d_entropy = a.d_entropy ? a.d_entropy[row] : 0.f;
    const float c0 = (a.d_lse ? a.d_lse[row] : 0.f) - (a.d_entropy ? d_entropy * entropy : 0.f) - all.upstream;
    const float outer = a.side.scale * a.per_t * a.dz_scale, per_cap = a.side.softcap != 0.f ? 1.f / a.side.softcap : 0.f;
    // Returns the gradient by a stored logit: (c0 + c1 log q) q + on_top by the logit after its transform. z is used with a softcap only.
    const auto gradient = [&](float l, float z, float on_top) {
        const float q = probability(l);
        float g = a.d_entropy ? (q == 0.f ? 0.f : q * (c0 - d_entropy * l)) : q * c0;
        g = (g + on_top) * outer;
        const float bend = z * per_cap;
        return per_cap == 0.f ? g : g * (1.f - bend * bend);
    };
    void* const dz = static_cast<unsigned char*>(a.dz) + row * a.dz_stride * size_of(a.dz_dtype);
    const bool overtakes = !kept.at && size_of(a.dz_dtype) < int(sizeof(Logit));
    sweep<Sweep::again>(slice, a.side, kept, [&](const float* z, int step) {
        float g[S::kCount];
#pragma unroll
        for (int i = 0; i < S::kCount; ++i) g[i] = gradient(log_q(z[i]), z[i], 0.f);
        if (overtakes) sync_block();  // dz overwrites logits: wait until all threads have read theirs
#pragma unroll
        for (int j = 0; j < kVectors; ++j) store_dz(slice, dz, a.dz_dtype, slice.column(step, j), g + j * S::kVec);
    });
    if (!d_logprobs) return;
    sync_block();
    for_ids([&](int k, int id) {
        if (id < 0) return;
        float on_top = 0.f;
        bool first = true;  // the first of several equal ids writes for all
        for (int j = 0; j < a.num_ids; ++j) {
            if (ids[j] != id) continue;
            on_top += d_logprobs[j], first = first && j >= k;
        }
        if (!first) return;
        const float l = logprobs[k],
                    z = per_cap != 0.f ? (l + log_q.rest) / a.per_t + log_q.top : 0.f;  // within the cap: no digits are lost
        store_dz_at<Logit>(dz, a.dz_dtype, id, gradient(l, z, on_top));
    });
}

}  // namespace kd
