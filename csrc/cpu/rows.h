// The CPU's row kernel, once per instruction set that it is compiled for, and the choice between them.
#pragma once
#include "../params.h"

#define KD_INLINE_LAMBDA __attribute__((always_inline))

namespace kd {

// Elements of one scratch row: whole cache lines.
inline constexpr int64_t scratch_width(int64_t vocab) { return (vocab + 15) / 16 * 16; }
constexpr int kScratchRows = 5;

// Rows [begin, end) on the calling thread; scratch holds kScratchRows rows of the compute type.
namespace avx512 { void rows(const RowArguments&, int64_t begin, int64_t end, void* scratch); }
namespace avx2 { void rows(const RowArguments&, int64_t begin, int64_t end, void* scratch); }
namespace baseline { void rows(const RowArguments&, int64_t begin, int64_t end, void* scratch); }

// Names of the instruction sets that are compiled in and that this processor has, best first; ends with null.
const char* const* cpu_isas();

// All rows on up to `threads` threads. Throws std::invalid_argument for an unknown divergence or instruction set; null is
// the best one.
void cpu_rows(const RowArguments&, int threads, const char* isa = nullptr);

}  // namespace kd
