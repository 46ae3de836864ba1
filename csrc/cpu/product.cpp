// Float32 logits of a bfloat16 head. BLAS libraries return a 16-bit result for 16-bit operands, and widening the operands costs four times
// the arithmetic. The AVX-512 BF16 instruction adds products of bfloat16 pairs to float32.
//
// A task is a few panels of 48 columns (tokens of the vocabulary). Each panel is packed once: pairs along the depth are adjacent, so that a
// register holds a pair for each of 16 columns. Tiles of 8 rows by 48 columns are then multiplied with it, with their sums in 24 registers:
//
//     packed[pair][48]   from L2, 3 registers        a[8][pair]   from L1, each pair broadcast to a register
#include "product.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "threads.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10)
#define KD_PRODUCT 1
#include <immintrin.h>
#endif

namespace kd {

#ifdef KD_PRODUCT
#define KD_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define KD_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int64_t kLanes = 16;
constexpr int kRegisters = 3;
constexpr int64_t kColumns = kLanes * kRegisters;
constexpr int kRows = 8;
constexpr int64_t kDepth = 2048;  // of a panel; a larger depth is added to the result in parts
constexpr int64_t kPackedBytes = 384 << 10;  // of a task: with a tile's rows it fits in L2

// Transposes 16 rows of 16 numbers from `rows[i] + at`: out[j * kColumns + i] is number j of row i.
KD_BF16 inline void transpose(const uint32_t* const (&rows)[kLanes], int64_t at, uint32_t* out) {
    __m512i r[kLanes], t[kLanes];
    KD_UNROLL for (int i = 0; i < kLanes; ++i) r[i] = _mm512_loadu_si512(rows[i] + at);
    // clang-format off: a loop after KD_UNROLL
    KD_UNROLL for (int i = 0; i < kLanes; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    // clang-format on
    KD_UNROLL for (int i = 0; i < kLanes; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Quarter l of r[4 g + c] now has number 4 l + c of rows 4 g to 4 g + 3.
    KD_UNROLL for (int c = 0; c < 4; ++c) {
        const __m512i even_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        _mm512_store_si512(out + c * kColumns, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_store_si512(out + (4 + c) * kColumns, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_store_si512(out + (8 + c) * kColumns, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_store_si512(out + (12 + c) * kColumns, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}

// Writes packed[pair][48] of a panel. Missing columns repeat the last one; their results are not stored.
KD_BF16 void pack(const uint16_t* b, int64_t stride, int64_t columns, int64_t pairs, uint32_t* packed) {
    for (int64_t j = 0; j < kColumns; j += kLanes) {
        const uint32_t* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const uint32_t*>(b + std::min(j + i, columns - 1) * stride);
        int64_t k = 0;
        for (; k + kLanes <= pairs; k += kLanes) transpose(rows, k, packed + k * kColumns + j);
        for (; k < pairs; ++k)
            for (int64_t i = 0; i < kLanes; ++i) std::memcpy(packed + k * kColumns + j + i, rows[i] + k, sizeof(uint32_t));
    }
}

// out[R, columns] = a[R, 2 pairs] packed, or += if `add`.
template <int R>
KD_BF16 void tile(const uint16_t* a, int64_t a_stride, const uint32_t* packed, int64_t pairs, float* out, int64_t out_stride,
                  int64_t columns, bool add) {
    __m512 sum[R][kRegisters];
    __mmask16 there[kRegisters];
    for (int j = 0; j < kRegisters; ++j) there[j] = __mmask16((1u << std::clamp<int64_t>(columns - j * kLanes, 0, kLanes)) - 1);
    // clang-format off
    KD_UNROLL for (int i = 0; i < R; ++i)
        KD_UNROLL for (int j = 0; j < kRegisters; ++j)
            sum[i][j] = add ? _mm512_maskz_loadu_ps(there[j], out + i * out_stride + j * kLanes) : _mm512_setzero_ps();
    // clang-format on
    for (int64_t k = 0; k < pairs; ++k, packed += kColumns) {
        __m512bh b[kRegisters];
        KD_UNROLL for (int j = 0; j < kRegisters; ++j) b[j] = (__m512bh)_mm512_load_si512(packed + j * kLanes);
        KD_UNROLL for (int i = 0; i < R; ++i) {
            int32_t pair;
            std::memcpy(&pair, a + i * a_stride + 2 * k, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            KD_UNROLL for (int j = 0; j < kRegisters; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], both, b[j]);
        }
    }
    // clang-format off
    KD_UNROLL for (int i = 0; i < R; ++i)
        KD_UNROLL for (int j = 0; j < kRegisters; ++j) _mm512_mask_storeu_ps(out + i * out_stride + j * kLanes, there[j], sum[i][j]);
    // clang-format on
}

using Tile = decltype(&tile<kRows>);
constexpr Tile kTiles[kRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};

}  // namespace

bool cpu_has_product() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

void cpu_product(const ProductArguments& p, int threads) {
    if (!cpu_has_product()) throw std::invalid_argument("this processor has no AVX-512 BF16 instructions");
    if (p.depth % 2) throw std::invalid_argument("the depth of the product must be even");
    if (p.rows <= 0 || p.columns <= 0) return;
    const int64_t panels = (p.columns + kColumns - 1) / kColumns, depth = std::min(p.depth, kDepth);
    // As many panels per task as fit, because each task reads all rows again; but few enough that all threads have tasks.
    const int64_t fit = depth ? kPackedBytes / (kColumns * depth * int64_t(sizeof(uint16_t))) : panels;
    const int64_t each = std::clamp<int64_t>(std::min(fit, panels / (4 * int64_t(threads))), 1, panels);
    hand_out((panels + each - 1) / each, threads, size_t(each * kColumns * depth) * sizeof(uint16_t) + 1, [&](int64_t task, void* scratch) {
        uint32_t* const packed = static_cast<uint32_t*>(scratch);
        const int64_t first = task * each, last = std::min(panels, first + each);
        int64_t from = 0;
        do {  // runs once for depth 0, writing zeros
            const int64_t pairs = std::min(depth, p.depth - from) / 2, size = kColumns * pairs;
            for (int64_t i = first; i < last; ++i)
                pack(p.b + i * kColumns * p.b_stride + from, p.b_stride, std::min(kColumns, p.columns - i * kColumns), pairs,
                     packed + (i - first) * size);
            for (int64_t row = 0; row < p.rows; row += kRows) {
                const Tile run = kTiles[std::min<int64_t>(kRows, p.rows - row) - 1];
                for (int64_t i = first; i < last; ++i)
                    run(p.a + row * p.a_stride + from, p.a_stride, packed + (i - first) * size, pairs,
                        p.out + row * p.out_stride + i * kColumns, p.out_stride, p.columns - i * kColumns, from > 0);
            }
            from += depth;
        } while (from < p.depth);
    });
}

#else

bool cpu_has_product() { return false; }
void cpu_product(const ProductArguments&, int) { throw std::invalid_argument("this build has no AVX-512 BF16 instructions"); }

#endif

}  // namespace kd
