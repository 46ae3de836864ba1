// Choice of kernel and launch shape, and the layout of shared memory: pure functions, tested without a GPU. Kernels include this file too.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define KD_BOTH __host__ __device__
#else
#define KD_BOTH
#endif

namespace kd {

// ---- shared memory --------------------------------------------------------------------------------------------------

constexpr int kChunkBytes = 1024;  // per side: two 16-byte loads per lane
constexpr int kSlotBytes = 2 * kChunkBytes;
constexpr int kPartBytes = 48;     // maximum contribution of a warp to a reduction

constexpr int kVectorBytes = 16, kVectors = 2;  // bytes of a load; loads in flight per thread (kernels of one side)
constexpr int kBins = 256;                      // bins of a top-k search: one digit of a key

// Columns of one warp, the same in every row.
struct Span {
    int begin, length, chunks, chunk;
    KD_BOTH Span(int vocab, int owner, int owners, int itemsize) {
        const int vec = 16 / itemsize;
        chunk = kChunkBytes / itemsize;
        const int64_t share = (int64_t(vocab) + owners - 1) / owners;
        const int64_t width = (share + vec - 1) / vec * vec;
        begin = int(width * owner < vocab ? width * owner : vocab);
        length = int(width < vocab - begin ? width : vocab - begin);
        chunks = (length + chunk - 1) / chunk;
    }
    KD_BOTH int chunk_length(int c) const { return length - c * chunk < chunk ? length - c * chunk : chunk; }
};

// Bytes of shared memory: rings, parts of two reductions (a fast CTA can push into the next one while a slow one still reads this one, but
// cannot get two ahead), mbarriers.
constexpr size_t one_read_shared_bytes(int warps, int slots, int cluster) {
    return size_t(warps) * slots * (kSlotBytes + sizeof(uint64_t)) + size_t(2) * cluster * warps * kPartBytes;
}

constexpr size_t two_read_shared_bytes(int threads) { return size_t(2) * (threads / 32) * kPartBytes; }

// ---- two sides ------------------------------------------------------------------------------------------------------

struct GpuLimits {
    int major;             // of the compute capability
    int multiprocessors;
    int shared_per_block;  // maximum bytes of a block (opt-in)
    int shared_per_multiprocessor;
};

struct Launch {
    bool one_read = false;
    int cluster = 1;       // CTAs per row pair
    int slots = 0;         // of each warp's ring
    int threads = 0;       // per CTA
    int64_t blocks = 0;    // maximum: the one-read kernel launches no more clusters than fit at once
    size_t shared_bytes = 0;
    int shared_limit = 0;  // maximum shared memory of the kernel on this GPU, for any shape: set once, the same for all threads
};

constexpr int kReservedPerBlock = 1024;  // of shared memory, by the system
constexpr int kTwoReadThreads = 256;
constexpr int kOneReadThreads = 256;

inline int largest_cluster(int major) { return major < 9 ? 0 : major < 12 ? 16 : 8; }

// Returns the slots of a warp's ring: a row's chunks, plus at least one and at most all chunks of the next row, as there is room. Returns 0
// if no row fits.
inline int ring_slots(int64_t vocab, int itemsize, int warps, int cluster, size_t room) {
    const int chunks = Span(int(vocab), 0, cluster * warps, itemsize).chunks;  // the first owner has the longest span
    int slots = 2 * chunks;
    while (slots > chunks && one_read_shared_bytes(warps, slots, cluster) > room) --slots;
    return slots > chunks ? slots : 0;
}

// Args:
//   one_read_possible: both sides have one dtype, rows start at multiples of 16 bytes, the divergence is one of softmaxes, and NORMALISERS
//     and SUMS run together.
//   largest: maximum cluster size; 0: two reads.
inline Launch choose_launch(const GpuLimits& gpu, int64_t rows, int64_t vocab, int itemsize, bool one_read_possible, int largest) {
    constexpr int warps = kOneReadThreads / 32;
    Launch two{false, 1, 0, kTwoReadThreads, rows, two_read_shared_bytes(kTwoReadThreads)};
    if (!one_read_possible) return two;
    // Two CTAs per multiprocessor if possible: one computes while the other waits at a barrier.
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
    while (cluster * 2 <= largest && rows * cluster * 2 <= places && vocab >= int64_t(cluster) * 2 * warps * (kChunkBytes / itemsize))
        cluster *= 2;
    const int slots = ring_slots(vocab, itemsize, warps, cluster, room);
    const int64_t clusters = std::min<int64_t>(rows, std::max<int64_t>(places / cluster, 1));
    return {true, cluster, slots, kOneReadThreads, clusters * cluster, one_read_shared_bytes(warps, slots, cluster), gpu.shared_per_block};
}

// ---- one side alone: slice.h ----------------------------------------------------------------------------------------

constexpr int kTeamThreads = 512, kDrawThreads = 256;  // at most
constexpr int kMostTop = 4096;                         // maximum k of a top-k

// Returns how many keys a search for the k largest has room for. About 1.15 k columns reach its first bound.
inline int top_capacity(int64_t k) {
    int capacity = 512;
    while (capacity < 2 * k) capacity *= 2;
    return capacity;
}
inline size_t top_shared_bytes(int capacity) { return (kBins + 32 + 4) * sizeof(int) + capacity * sizeof(uint64_t); }

struct TeamShape {
    int64_t rows, vocab;
    int itemsize;
    int sweeps = 1;        // 2: keep the row in shared memory, if it fits
    int inputs = 1;        // rows to keep
    int threads = kTeamThreads;  // maximum
    size_t more_shared = 0;      // other shared bytes
    int largest = 0;       // maximum cluster size
    int64_t draws = 1;     // of each row
};
struct TeamLaunch {
    Launch launch;
    size_t kept_at = 0;    // offset of the row in shared memory; 0: not kept
    size_t kept_bytes = 0; // of one input
    int draw_parts = 1;    // teams that share the draws of a row
};

// Chooses the threads that share a row of one side: a CTA, or a cluster whose shared memory holds the row. A multiprocessor has registers
// for two CTAs of 512 threads: one loads while the other waits or writes.
inline TeamLaunch choose_team(const GpuLimits& gpu, const TeamShape& s) {
    const int vec = kVectorBytes / s.itemsize;
    const int64_t vectors = (s.vocab + vec - 1 + vec - 1) / vec;  // a row may start within one
    int threads = s.threads;
    while (threads > 64 && vectors <= int64_t(threads) * kVectors / 2) threads /= 2;
    const int largest = std::max(s.largest, 1);
    const auto parts = [&](int cluster) { return one_read_shared_bytes(threads / 32, 0, cluster) + s.more_shared; };
    const auto kept = [&](int cluster) {
        const int64_t step = int64_t(threads) * kVectors, share = (vectors + cluster - 1) / cluster;
        return size_t((share + step - 1) / step * step * kVectorBytes);
    };
    const size_t whole = gpu.shared_per_block, half = std::min<size_t>(gpu.shared_per_multiprocessor / 2 - kReservedPerBlock, whole);
    int cluster = 1;
    bool keeps = false;
    for (const size_t room : {half, whole}) {
        if (s.sweeps < 2 || keeps) break;
        for (cluster = 1; cluster <= largest && parts(cluster) + s.inputs * kept(cluster) > room;) cluster *= 2;
        keeps = cluster <= largest;
    }
    if (!keeps) cluster = 1;
    // Few rows: more CTAs for each, as long as every thread has a whole step. A second sweep without shared memory needs a single CTA.
    while ((keeps || s.sweeps < 2) && cluster * 2 <= largest && s.rows * cluster * 2 <= gpu.multiprocessors &&
           vectors >= int64_t(cluster) * 2 * threads * kVectors)
        cluster *= 2;
    TeamLaunch t;
    t.draw_parts = int(std::min(s.draws, std::max<int64_t>(1, gpu.multiprocessors * 2 / (s.rows * cluster))));
    t.launch = {false, cluster, 0, threads, s.rows * cluster * t.draw_parts, parts(cluster), gpu.shared_per_block};
    if (keeps) t.kept_at = t.launch.shared_bytes, t.kept_bytes = kept(cluster), t.launch.shared_bytes += s.inputs * t.kept_bytes;
    return t;
}

}  // namespace kd
