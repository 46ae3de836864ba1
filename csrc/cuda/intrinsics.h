// All GPU operations of the row kernels. With nvcc each function is one or two PTX instructions. With a C++ compiler the same names run on
// CPU fibers (tests/cuda_on_cpu/cuda_on_cpu.h), so that CI runs the source of the kernels.
#pragma once
#ifndef __CUDACC__
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#define KD_DEVICE __device__ __forceinline__
#define KD_HOST_DEVICE __host__ __device__
#define KD_KERNEL __global__ void
#define KD_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)

// Older GPUs have no clusters, bulk copies or distributed shared memory. There the kernels that use them are empty and never launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define KD_NO_CLUSTERS 1
#endif

namespace kd {

KD_DEVICE int thread_index() { return threadIdx.x; }
KD_DEVICE int block_threads() { return blockDim.x; }
KD_DEVICE int block_index() { return blockIdx.x; }
KD_DEVICE int block_count() { return gridDim.x; }
KD_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char kd_shared[];
    return kd_shared;
}
KD_DEVICE void sync_warp() { __syncwarp(); }
KD_DEVICE void sync_block() { __syncthreads(); }
// Atomic in shared memory; returns the old value.
KD_DEVICE int atomic_add(int* at, int value) { return atomicAdd(at, value); }
template <class T> KD_DEVICE T shuffle_xor(T value, int mask) {
    static_assert(sizeof(T) % 4 == 0, "words");
    unsigned words[sizeof(T) / 4];
    memcpy(words, &value, sizeof value);
#pragma unroll
    for (unsigned& w : words) w = __shfl_xor_sync(0xffffffffu, w, mask);
    memcpy(&value, words, sizeof value);
    return value;
}

// clang-format off: one line for each PTX instruction
#ifndef KD_NO_CLUSTERS
KD_DEVICE int cluster_rank() { unsigned r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return int(r); }
KD_DEVICE int cluster_size() { unsigned r; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return int(r); }
KD_DEVICE int cluster_index() { return block_index() / cluster_size(); }
KD_DEVICE int cluster_count() { return block_count() / cluster_size(); }
KD_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
KD_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

KD_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

using Mbarrier = uint64_t;
KD_DEVICE void mbarrier_init(Mbarrier* b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(count) : "memory");
}
// Makes initialised mbarriers visible to the async proxy, which completes the copies.
KD_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
KD_DEVICE void mbarrier_expect(Mbarrier* b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(b)), "r"(bytes) : "memory");
}
KD_DEVICE void mbarrier_wait(Mbarrier* b, unsigned parity) {
    asm volatile("{\n .reg .pred done;\n again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra again;\n}"
                 :: "r"(shared_address(b)), "r"(parity) : "memory");
}
// Orders this thread's writes to shared memory before the copies that overwrite them.
KD_DEVICE void fence_bulk_loads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
KD_DEVICE void bulk_load(void* dst, const void* src, int bytes, Mbarrier* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(bytes), "r"(shared_address(b)) : "memory");
}
// Writes `value` to the address that corresponds to `local` in the shared memory of another CTA of the cluster.
template <class T> KD_DEVICE void store_remote(T* local, int rank, const T& value) {
    static_assert(sizeof(T) % 16 == 0, "16-byte stores");
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(local)), "r"(rank));
    unsigned words[sizeof(T) / 4];
    memcpy(words, &value, sizeof value);
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 4); i += 4)
        asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};"
                     :: "r"(remote + 4 * i), "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]) : "memory");
}
#endif

KD_DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
KD_DEVICE float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
KD_DEVICE float reciprocal_fast(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// clang-format on

// A product that is never contracted into an FMA.
KD_DEVICE float rounded_product(float x, float y) { return __fmul_rn(x, y); }

using bf16 = __nv_bfloat16;
using half = __half;
KD_DEVICE float to_float(float x) { return x; }
KD_DEVICE float to_float(half x) { return __half2float(x); }
KD_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> KD_DEVICE T from_float(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else if constexpr (std::is_same_v<T, half>) return __float2half_rn(x);
    else return __float2bfloat16_rn(x);
}
// Two numbers packed into one word, the first in the low half.
template <class T> using Pair = std::conditional_t<std::is_same_v<T, half>, __half2, __nv_bfloat162>;
template <class T> KD_DEVICE Pair<T> pair_of(uint32_t word) {
    Pair<T> p;
    memcpy(&p, &word, 4);
    return p;
}
// Returns the elementwise maximum. Where one operand is NaN, returns the other.
template <class T> KD_DEVICE uint32_t larger_pair(uint32_t x, uint32_t y) {
    const Pair<T> larger = __hmax2(pair_of<T>(x), pair_of<T>(y));
    uint32_t word;
    memcpy(&word, &larger, 4);
    return word;
}
// True if both elements of x are <= those of y.
template <class T> KD_DEVICE bool pair_within(uint32_t x, uint32_t y) { return __hble2(pair_of<T>(x), pair_of<T>(y)); }
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec { T at[N]; };
// Stores 16 bytes (8 for a half-sized vector) at once; assigning the struct would store single words.
template <class V> KD_DEVICE void store_vector(void* to, const V& v) {
    using Word = std::conditional_t<sizeof(V) % 16 == 0, uint4, uint2>;
    constexpr int kWords = sizeof(V) / sizeof(Word);
    Word w[kWords];
    memcpy(w, &v, sizeof v);
#pragma unroll
    for (int i = 0; i < kWords; ++i) static_cast<Word*>(to)[i] = w[i];
}
template <class V> KD_DEVICE V load_vector(const void* from) {
    using Word = std::conditional_t<sizeof(V) % 16 == 0, uint4, uint2>;
    constexpr int kWords = sizeof(V) / sizeof(Word);
    Word w[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = static_cast<const Word*>(from)[i];
    V v;
    memcpy(&v, w, sizeof v);
    return v;
}
}  // namespace kd
#endif
