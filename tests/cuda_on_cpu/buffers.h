// Rows in any storage format, for the tests of the kernels.
#pragma once
#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>

#include "cuda/row.h"

namespace {
using namespace kd;

double unit(Dtype d) { return d == Dtype::f32 ? 0x1p-22 : d == Dtype::f16 ? 0x1p-10 : 0x1p-7; }

// Memory of exactly the size of its rows: AddressSanitizer reports reads beyond them.
struct Buffer {
    unsigned char* data;
    explicit Buffer(size_t bytes) : data(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(16)))) { std::fill_n(data, bytes, 0xff); }
    Buffer(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data, std::align_val_t(16)); }
};
void put(void* p, int64_t i, Dtype d, float v) {
    if (d == Dtype::f32) static_cast<float*>(p)[i] = v;
    if (d == Dtype::bf16) static_cast<bf16*>(p)[i] = from_float<bf16>(v);
    if (d == Dtype::f16) static_cast<half*>(p)[i] = from_float<half>(v);
}
double get(const void* p, int64_t i, Dtype d) {
    if (d == Dtype::f32) return static_cast<const float*>(p)[i];
    if (d == Dtype::bf16) return to_float(static_cast<const bf16*>(p)[i]);
    return to_float(static_cast<const half*>(p)[i]);
}
}  // namespace
