// The row kernel that draws ids from softmax(z / T), by the race of csrc/cpu/heads.cpp: the largest (z - top) / T - log E wins, with E
// exponential, from the numbers of csrc/philox.h.
//
// Candidates are found in float32 and compared in double. Each thread finds its largest and its second largest time in float32, with an
// error of kTimeError and the rounding of the logits. If its largest is within that error of the largest of all, the thread computes the
// time of that column in double. It computes all its columns in double in two rare cases: the second largest time is within the error as
// well, or a random number is so close to 0 or 1 that its low word matters.
#pragma once
#include "../philox.h"
#include "head.h"

namespace kd {

// Returns log2(-log(1 - u)) for the number u with this high word, at least kExtreme away from 0 and 1.
KD_DEVICE float log2_exponential(uint32_t high) {
    const bool small = high < 1u << 28;
    const float v = (float(small ? high : ~high) + 0.5f) * 0x1p-32f;  // u < 1/16, or 1 - u
    const float series = v * (1.f + v * (0.5f + v * (0.33333333f + v * (0.25f + v * 0.2f))));
    return log2_fast(small ? series : -kLn2 * log2_fast(v));
}

// Returns the time of a column in double, from the stored logit.
KD_DEVICE double exact_time(const Heads& a, float logit, int column, double reference, uint32_t high, uint32_t low) {
    double z = logit;
    if (a.side.bias) z += double(a.side.bias[column]);
    z *= a.exact_scale;
    if (a.exact_softcap != 0) z = a.exact_softcap * std::tanh(z / a.exact_softcap);
    return (z - reference) * a.exact_per_t - std::log(-std::log1p(-uniform(high, low)));
}

template <class Logit> KD_KERNEL KD_BOUNDS(kDrawThreads, sizeof(Logit) == 4 ? 3 : 2) draw_rows(const Heads a) {
    constexpr int kCount = kVec<Logit>, kThreads = int(kWordColumns) / kCount;  // threads of a group of counters
    struct Part {
        LogSum sums;
        float best = -infinity();
    };
    struct Winner {
        double time = -infinity();
        int id = 0x7fffffff, unused = 0;
    };
    Team team;
    const int part = int(team.row % a.draw_parts);
    team.row /= a.draw_parts;
    const auto* const logits = static_cast<const Logit*>(a.side.logits) + team.row * a.side.stride;
    const bool aligned = starts_vector(logits);
    const float c = a.per_t * kLog2E;
    const uint64_t seed = a.seed_at ? *a.seed_at : a.seed;
    const int64_t number = a.first_row + team.row;
    const int groups = (a.vocab + int(kGroup) - 1) / int(kGroup), share = (groups + team.size - 1) / team.size;
    const int end = share * (team.rank + 1) < groups ? share * (team.rank + 1) : groups;
    // A thread's lanes are neighbours if rows start at multiples of 16 bytes, for loads of 16 bytes. Otherwise neighbouring lanes belong to
    // different threads.
    const int of_group = thread_index() % kThreads, first = aligned ? of_group * kCount : of_group, apart = aligned ? 1 : kThreads;
    const int groups_a_step = block_threads() / kThreads;

    // Calls body(logit, column, high word) for each column of this thread in draw d, and before(z) once for the columns of each word.
    const auto for_columns = [&](int64_t d, auto&& before, auto&& body) {
        for (int g = share * team.rank + thread_index() / kThreads; g < end; g += groups_a_step) {
            const int start = g * int(kGroup) + first;
            const bool whole = start + 3 * int(kWordColumns) + (kCount - 1) * apart < a.vocab;
            Raw raw[4];
            if (aligned && whole) {
#pragma unroll
                for (int w = 0; w < 4; ++w) raw[w] = load_vector<Raw>(logits + start + w * int(kWordColumns));
            } else {
#pragma unroll
                for (int w = 0; w < 4; ++w) raw[w] = load_apart(logits, start + w * int(kWordColumns), apart, a.vocab);
            }
            float z[4][kCount];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                unpack<Logit>(z[w], raw[w]);
                transform<kCount>(z[w], a.side, start + w * int(kWordColumns), apart, a.vocab, whole);
                before(z[w]);
            }
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const uint32_t slot = uint32_t(g) * uint32_t(kWordColumns) + uint32_t(first + i * apart);
                const Words high = words(seed, number, d, slot, 0);
#pragma unroll
                for (int w = 0; w < 4; ++w) body(z[w][i], start + w * int(kWordColumns) + i * apart, high.w[w]);
            }
        }
    };

    LogProbability log_q{};
    for (int64_t d = part; d < a.num_draws; d += a.draw_parts) {
        const bool sums = d == part && a.statistics;
        Part mine;
        float second = -infinity();
        int column = -1;
        bool extreme = false;
        for_columns(
            d,
            [&](const float* z) {
                if (sums) mine.sums.template add<kCount>(z, c, false);
            },
            [&](float z, int at, uint32_t high) {
                const float time = fmaf(z, c, -log2_exponential(high));
                const bool odd = high + a.extreme < 2 * a.extreme && at < a.vocab;
                extreme = extreme || odd;
                const float judged = odd ? -infinity() : time;
                second = fmaxf(second, fminf(mine.best, judged));
                column = judged > mine.best ? at : column;
                mine.best = fmaxf(mine.best, judged);
            });
        const Part all = team.reduce(mine, [&](Part& x, const Part& o) { x.sums.merge(o.sums, c), x.best = fmaxf(x.best, o.best); });
        if (d == part) log_q = statistics_of(a, team, all.sums, part == 0);
        const float margin = a.time_error + 3e-6f * c * (fabsf(log_q.top) + a.side.softcap), floor = all.best - margin;
        Winner best;
        const auto look_at = [&](int at) {
            const uint32_t slot = uint32_t(at / int(kGroup)) * uint32_t(kWordColumns) + uint32_t(at % int(kWordColumns));
            const int w = at % int(kGroup) / int(kWordColumns);
            const Words high = words(seed, number, d, slot, 0), low = words(seed, number, d, slot, 1);
            const uint32_t h = w == 0 ? high.w[0] : w == 1 ? high.w[1] : w == 2 ? high.w[2] : high.w[3];
            const uint32_t l = w == 0 ? low.w[0] : w == 1 ? low.w[1] : w == 2 ? low.w[2] : low.w[3];
            const double time = exact_time(a, to_float(logits[at]), at, double(log_q.top), h, l);
            if (time > best.time || (time == best.time && at < best.id)) best.time = time, best.id = at;
        };
        const bool again = extreme || second >= floor;
        if (again || mine.best >= floor) {
            // One column, or all columns of this thread.
            for (int g = again ? share * team.rank + thread_index() / kThreads : end - 1; g < end; g += groups_a_step) {
                for (int j = again ? 0 : 4 * kCount - 1; j < 4 * kCount; ++j) {
                    const int at = again ? g * int(kGroup) + j / kCount * int(kWordColumns) + first + j % kCount * apart : column;
                    if (at < 0 || at >= a.vocab) continue;
                    look_at(at);
                }
            }
        }
        const Winner winner = team.reduce(best, [](Winner& x, const Winner& o) {
            if (o.time > x.time || (o.time == x.time && o.id < x.id)) x = o;
        });
        // A row without a finite sum is not a distribution: -1.
        if (team.reports()) a.draws[team.row * a.num_draws + d] = log_q.rest - log_q.rest == 0.f ? winner.id : -1;
    }
}

}  // namespace kd
