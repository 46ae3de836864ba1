// The row kernel that finds the k largest logits, by falling logit and then rising id, and their log-probabilities.
//
//   logits --sweep 1--> (max, sum); the largest of each of 4 k parts of the row --k-th largest of these--> a bound that k columns reach
//      +----sweep 2--> the columns that reach it (about 1.15 k of them) --sort in shared memory--> the first k
//
// A column is a 64-bit key, logit above inverted id: there are no ties, and the order of arrival does not matter. If more columns reach the
// bound than fit (mostly many equal logits), the bound is raised digit by digit, with a sweep for each digit.
#pragma once
#include "head.h"

namespace kd {

// Shared memory: parts of the reductions, bins, sums of lanes and four numbers, keys (before them the parts' largest), the kept row.
struct TopScratch {
    int *bins, *lanes, *numbers;
    uint64_t* keys;
    uint32_t* largest;
    KD_DEVICE TopScratch() {
        bins = reinterpret_cast<int*>(shared_memory() + two_read_shared_bytes(block_threads()));
        lanes = bins + kBins, numbers = lanes + kLanes;
        keys = reinterpret_cast<uint64_t*>(numbers + 4), largest = reinterpret_cast<uint32_t*>(keys);
    }
};

// Maps floats to unsigned integers with the same order; NaN counts as -inf, and zeros are equal.
KD_DEVICE uint32_t ordered(float z) {
    const uint32_t word = bits<uint32_t>(z == z ? z + 0.f : -infinity());
    return word ^ (word >> 31 ? 0xffffffffu : 0x80000000u);
}
KD_DEVICE float key_logit(uint64_t key) {
    const uint32_t word = uint32_t(key >> 32);
    return bits<float>(word ^ (word >> 31 ? 0x80000000u : 0xffffffffu));
}
KD_DEVICE int key_id(uint64_t key) { return int(~uint32_t(key)); }

// The known digits of the k-th largest key: it shares the digits above `shift` with `bound`, and is the left-th largest such key.
struct Rank {
    uint64_t bound = 0;
    int shift = 64, left, sharing;  // sharing: number of such keys, once a digit is known
    // Finds the next digit. visit(f) calls f with each key of this thread.
    template <class Visit> KD_DEVICE void narrow(const TopScratch& s, Visit&& visit) {
        shift -= 8;
        for (int b = thread_index(); b < kBins; b += block_threads()) s.bins[b] = 0;
        sync_block();
        visit([&](uint64_t key) {
            if (const uint64_t digit = (key ^ bound) >> shift; digit < kBins) atomic_add(&s.bins[digit], 1);
        });
        sync_block();
        if (thread_index() < kLanes) {
            constexpr int kOwn = kBins / kLanes;
            const int lane = thread_index();
            int own = 0, above = 0;
            for (int b = 0; b < kOwn; ++b) own += s.bins[lane * kOwn + b];
            s.lanes[lane] = own;
            sync_warp();
            for (int l = lane + 1; l < kLanes; ++l) above += s.lanes[l];
            if (above < left && left <= above + own) {
                int b = lane * kOwn + kOwn - 1;
                for (; above + s.bins[b] < left; --b) above += s.bins[b];
                s.numbers[1] = b, s.numbers[2] = above, s.numbers[3] = s.bins[b];
            }
        }
        sync_block();
        bound |= uint64_t(s.numbers[1]) << shift, left -= s.numbers[2], sharing = s.numbers[3];
    }
};

template <class Logit> KD_KERNEL KD_BOUNDS(kTeamThreads, 2) top_rows(const Heads a) {
    using S = Slice<Logit>;
    Team team;  // of one CTA
    const S slice = slice_of<Logit>(a, team);
    const Kept kept{a.kept_at};
    const TopScratch s;
    const float c = a.per_t * kLog2E;
    const int k = a.num_top, threads = block_threads(), thread = thread_index();
    const auto for_keys = [&](auto&& body) {
        sweep<Sweep::again>(slice, a.side, kept, [&](const float* z, int step) {
#pragma unroll
            for (int i = 0; i < S::kCount; ++i)
                if (const int column = slice.column(step, i / S::kVec) + i % S::kVec; slice.inside(column))
                    body(uint64_t(ordered(z[i])) << 32 | uint32_t(~column));
        });
    };

    // Each thread has `rounds` parts: part r contains its steps r, r + rounds, ...
    const int wanted = 4 * k / threads, rounds = slice.steps < wanted ? slice.steps : wanted > 1 ? wanted : 1;
    LogSum mine;
    sweep<Sweep::first>(slice, a.side, kept, [&](const float* z, int step) {
        if (a.statistics) mine.add<S::kCount>(z, c, false);
        const uint32_t key = ordered(LogSums::largest<S::kCount>(-infinity(), z));
        uint32_t& largest = s.largest[step % rounds * threads + thread];
        if (step < rounds || key > largest) largest = key;
    });
    const LogProbability log_q = statistics_of(a, team, team.reduce(mine, [&](LogSum& x, const LogSum& o) { x.merge(o, c); }));

    uint64_t bound = 0;
    if (a.vocab > a.top_capacity && rounds * threads >= k) {
        Rank rank;
        rank.left = k;
        for (int digit = 0; digit < 4; ++digit)
            rank.narrow(s, [&](auto&& count) {
                for (int r = 0; r < rounds; ++r) count(uint64_t(s.largest[r * threads + thread]) << 32);
            });
        bound = rank.bound;
    }
    Rank rank;
    rank.left = k, rank.sharing = a.vocab;
    int found;
    for (;;) {
        if (thread == 0) s.numbers[0] = 0;
        sync_block();
        for_keys([&](uint64_t key) {
            if (key < bound) return;
            if (const int i = atomic_add(&s.numbers[0], 1); i < a.top_capacity) s.keys[i] = key;
        });
        sync_block();
        found = s.numbers[0];
        if (found <= a.top_capacity) break;
        do {
            rank.narrow(s, [&](auto&& count) {
                for_keys([&](uint64_t key) {
                    if (key >= bound) count(key);
                });
            });
        } while (k - rank.left + rank.sharing > a.top_capacity);
        bound = rank.bound;
    }

    // Bitonic sort, largest first.
    int size = 2;
    while (size < found) size *= 2;
    for (int i = found + thread; i < size; i += threads) s.keys[i] = 0;
    for (int run = 2; run <= size; run *= 2)
        for (int stride = run / 2; stride; stride /= 2) {
            sync_block();
            for (int i = thread; i < size / 2; i += threads) {
                const int low = 2 * i - (i & (stride - 1)), high = low + stride;
                const uint64_t x = s.keys[low], y = s.keys[high];
                if ((x < y) == ((low & run) == 0)) s.keys[low] = y, s.keys[high] = x;
            }
        }
    sync_block();
    for (int i = thread; i < k; i += threads) {
        const uint64_t key = s.keys[i];
        a.top_ids[team.row * k + i] = key_id(key);
        a.top_logprobs[team.row * k + i] = log_q(key_logit(key));
    }
}

}  // namespace kd
