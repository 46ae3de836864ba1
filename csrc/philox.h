// Counter-based random numbers: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
//
// A draw must not depend on the chunks or the backend, so the counter is computed from its position: for the columns
// 512 g + 128 w + lane, w = 0..3, of draw d of row r the high 32 bits are the words of counter (128 g + lane, r, d, 2 (r >> 32)),
// the low 32 bits those of the same with an odd last word. The key is the seed. 128 neighbours: contiguous loads in any language.
#pragma once
#include <cstdint>

#include "elementary.h"

namespace kd {

constexpr int64_t kWordColumns = 128, kGroup = 4 * kWordColumns;  // columns of one word, of one block of counters

#ifdef __CUDACC__
#define KD_UNROLL(n) _Pragma("unroll")
#else
#define KD_PRAGMA(text) _Pragma(#text)
#define KD_UNROLL(n) KD_PRAGMA(GCC unroll n)
#endif

struct Words { uint32_t w[4]; };

KD_INLINE Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    KD_UNROLL(10)
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The words of one lane: high halves for `part` 0, low halves for 1.
KD_INLINE Words words(uint64_t seed, int64_t row, int64_t draw, uint32_t slot, uint32_t part) {
    return philox(seed, slot, uint32_t(row), uint32_t(draw), uint32_t(row >> 32) * 2 + part);
}

// A number in (0, 1) with a relative precision of 53 bits: 64-bit midpoints, rounded once.
KD_INLINE double uniform(uint32_t high, uint32_t low) { return double(high) * 0x1p-32 + (double(low) + 0.5) * 0x1p-64; }

}  // namespace kd
