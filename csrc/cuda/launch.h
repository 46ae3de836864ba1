// Which kernel runs, and in what shape: pure functions of numbers, with unit tests that need no GPU.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace kd {

struct GpuLimits {
    int major;             // of the compute capability
    int multiprocessors;
    int shared_per_block;  // bytes that a block may ask for (opt-in)
    int shared_per_multiprocessor;
};

struct Launch {
    bool one_read = false;
    int cluster = 1;       // CTAs per row pair
    int slots = 0;         // of each warp's ring
    int threads = 0;       // per CTA
    int64_t blocks = 0;    // at most: the one-read kernel's clusters are persistent, and need not be more than fit at once
    size_t shared_bytes = 0;
    int shared_limit = 0;  // what the kernel may be launched with on this GPU, whatever the shape: set once and the same for all threads
};

constexpr int kReservedPerBlock = 1024;  // of shared memory, by the system
constexpr int kTwoReadThreads = 256;
constexpr int kOneReadThreads = 256;

inline int largest_cluster(int major) { return major < 9 ? 0 : major < 12 ? 16 : 8; }

// Slots of a warp's ring: a row's chunks, one more at least for the row that comes next, and up to all of that row's as there is room.
// 0: not even the first fits.
inline int ring_slots(int64_t vocab, int itemsize, int warps, int cluster, size_t room) {
    const int chunks = Span(int(vocab), 0, cluster * warps, itemsize).chunks;  // the first owner has the longest span
    int slots = 2 * chunks;
    while (slots > chunks && one_read_shared_bytes(warps, slots, cluster) > room) --slots;
    return slots > chunks ? slots : 0;
}

// Args:
//   one_read_possible: both sides of one dtype, rows that start at multiples of 16 bytes, a divergence of softmaxes, and statistics
//     still to be found.
//   largest: cluster size to stay within; 0: two reads.
inline Launch choose_launch(const GpuLimits& gpu, int64_t rows, int64_t vocab, int itemsize, bool one_read_possible, int largest) {
    constexpr int warps = kOneReadThreads / 32;
    Launch two{false, 1, 0, kTwoReadThreads, rows, two_read_shared_bytes(kTwoReadThreads)};
    if (!one_read_possible) return two;
    // Two CTAs per multiprocessor where rows allow it: one computes while the other waits at a barrier.
    const size_t whole = gpu.shared_per_block, half = std::min<size_t>(gpu.shared_per_multiprocessor / 2 - kReservedPerBlock, whole);
    int per_multiprocessor = 2, cluster = 1;
    size_t room = half;
    const auto smallest = [&] {
        for (cluster = 1; cluster <= largest && !ring_slots(vocab, itemsize, warps, cluster, room);) cluster *= 2;
        return cluster <= largest;
    };
    if (!smallest()) {
        per_multiprocessor = 1, room = whole;
        if (!smallest()) return two;
    }
    // Few rows: more CTAs for each of them, as long as every warp has a whole chunk.
    const int64_t places = int64_t(gpu.multiprocessors) * per_multiprocessor;
    while (cluster * 2 <= largest && rows * cluster * 2 <= places && vocab >= int64_t(cluster) * 2 * warps * (kChunkBytes / itemsize)) cluster *= 2;
    const int slots = ring_slots(vocab, itemsize, warps, cluster, room);
    const int64_t clusters = std::min<int64_t>(rows, std::max<int64_t>(places / cluster, 1));
    return {true, cluster, slots, kOneReadThreads, clusters * cluster, one_read_shared_bytes(warps, slots, cluster), gpu.shared_per_block};
}

}  // namespace kd
