// A matrix product that CPU BLAS libraries lack: bfloat16 operands, float32 result.
#pragma once
#include <cstdint>

namespace kd {

// out[rows, columns] = a[rows, depth] b[columns, depth]^T, row-major; strides in elements. `depth` is even.
struct ProductArguments {
    const uint16_t *a, *b;  // bfloat16
    float* out;
    int64_t rows, columns, depth;
    int64_t a_stride, b_stride, out_stride;
};

// Returns whether this build and this processor have the instruction (AVX-512 BF16).
bool cpu_has_product();

// Uses up to `threads` threads. Throws std::invalid_argument if cpu_has_product() is false or the depth is odd.
void cpu_product(const ProductArguments&, int threads);

}  // namespace kd
