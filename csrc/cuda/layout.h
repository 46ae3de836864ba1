// The layout of shared memory, used by host and device.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define KD_BOTH __host__ __device__
#else
#define KD_BOTH
#endif

namespace kd {

constexpr int kChunkBytes = 1024;  // per side: two 16-byte loads per lane
constexpr int kSlotBytes = 2 * kChunkBytes;
constexpr int kPartBytes = 48;     // maximum contribution of a warp to a reduction

constexpr int kVectorBytes = 16, kVectors = 2;  // kernels of one side: 16-byte loads, and how many of them a thread has on their way
constexpr int kBins = 256;                      // bins of a top-k search: one digit of a key

// The columns of one warp; the same in every row.
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

// Host and device agree on the layout of shared memory through these: the rings, the parts of two reductions (a fast CTA may push
// into the next one while a slow one still reads this one; it cannot get two ahead), the mbarriers.
constexpr size_t one_read_shared_bytes(int warps, int slots, int cluster) {
    return size_t(warps) * slots * (kSlotBytes + sizeof(uint64_t)) + size_t(2) * cluster * warps * kPartBytes;
}

constexpr size_t two_read_shared_bytes(int threads) { return size_t(2) * (threads / 32) * kPartBytes; }

}  // namespace kd
