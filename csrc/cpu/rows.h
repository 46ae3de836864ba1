// The CPU kernels, compiled once per instruction set, and the choice between them.
#pragma once
#include "../params.h"

#define KD_INLINE_LAMBDA __attribute__((always_inline))

namespace kd {

// Elements of one scratch row: whole cache lines.
inline constexpr int64_t scratch_width(int64_t vocab) { return (vocab + 15) / 16 * 16; }
constexpr int kScratchRows = 5;

// Elements of scratch for one row of one side: logits and exponentials to the end of their last group of 512 columns, the maximum of every
// 32 columns, and the k largest.
inline constexpr int64_t head_scratch(const HeadArguments& a) { return 2 * ((a.vocab + 511) / 512 * 512) + a.vocab / 32 + 1 + a.num_top; }

// Process one row, or rows [begin, end), on the calling thread. Elements of scratch, in the compute type: kScratchRows rows for `rows`,
// head_scratch for `head_row`, two rows for `softmax_row`.
#define KD_DECLARE(isa)                                                        \
    namespace isa {                                                            \
    void rows(const RowArguments&, int64_t begin, int64_t end, void* scratch); \
    void head_row(const HeadArguments&, int64_t row, void* scratch);           \
    void softmax_row(const SoftmaxArguments&, int64_t row, void* scratch);     \
    }
KD_DECLARE(avx512)
KD_DECLARE(avx2)
KD_DECLARE(baseline)
#undef KD_DECLARE

// Names of the compiled instruction sets that this processor supports, best first; ends with null.
const char* const* cpu_isas();

// Process all rows on up to `threads` threads. A null `isa` is the best one. Throws std::invalid_argument for an unknown divergence or
// instruction set.
void cpu_rows(const RowArguments&, int threads, const char* isa = nullptr);
void cpu_head_rows(const HeadArguments&, int threads, const char* isa = nullptr);
void cpu_softmax_rows(const SoftmaxArguments&, int threads, const char* isa = nullptr);

}  // namespace kd
