// Runs CUDA kernel source on a CPU. Every CUDA thread is a fiber. This header has barriers, mbarriers, bulk copies and distributed shared
// memory as functions with the names of intrinsics.h.
//
// The scheduler is hostile: it delays or hurries copies, freezes warps and CTAs, fills shared memory with NaN, and reports deadlocks and
// misuse as emu::Fault. With -fsanitize=thread, every CUDA thread is a ThreadSanitizer fiber and every barrier a happens-before edge: races
// in shared and global memory are reported. With -fsanitize=address, accesses out of bounds are.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>

namespace emu {

struct Fault : std::runtime_error { using std::runtime_error::runtime_error; };

// A synchronisation call in the source. Deadlock reports name it, mutation tests remove it.
struct Site {
    const char* call;
    int line;
    bool operator<(const Site& o) const { return line != o.line ? line < o.line : std::strcmp(call, o.call) < 0; }
};

struct Launch {
    int clusters = 1, cluster_size = 1, threads = 32;
    size_t shared_bytes = 0;
    unsigned seed = 0;        // 0: round robin, copies land as late as possible; else random with this seed
    Site removed{"", 0};      // this call does nothing
    std::set<Site>* seen = nullptr;
};
void launch(const Launch&, const std::function<void()>& kernel);   // throws Fault

struct Where { int thread, threads, rank, cluster_size, cluster, clusters; unsigned char* shared; };
const Where& where();

// The runtime, compiled without instrumentation (cuda_on_cpu.cpp). These return at once if their site is removed.
bool warp_rendezvous(Site, bool orders_memory);
void block_barrier(Site);
void cluster_barrier_arrive(Site);
void cluster_barrier_wait(Site);
void mbarrier_init(uint64_t*, int count, Site);
void mbarrier_publish(Site);
void mbarrier_arrive_expect(uint64_t*, int bytes, Site);
void mbarrier_wait_parity(uint64_t*, unsigned parity, Site);
void copy_async(void* dst, const void* src, int bytes, uint64_t* barrier, Site);
void* remote_address(void* local, int rank);
void* exchange_slot(int lane);          // of this warp, valid until its second next rendezvous

// Adds an error like that of MUFU, which does not round correctly. Kernels must not depend on the accuracy of libm.
inline float blur(float y, float error) {
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    return y + error * (float(int((bits * 2654435761u) >> 16) - 32768) / 32768.f);
}
}  // namespace emu

// ---- the names of intrinsics.h ---------------------------------------------------------------------------------
#define KD_DEVICE inline
#define KD_HOST_DEVICE inline
#define KD_KERNEL inline void
#define KD_BOUNDS(threads, blocks_per_sm)
#define EMU_SITE(name) emu::Site site = {name, __builtin_LINE()}

namespace kd {

inline int thread_index() { return emu::where().thread; }
inline int block_threads() { return emu::where().threads; }
inline int block_index() { return emu::where().cluster * emu::where().cluster_size + emu::where().rank; }
inline int block_count() { return emu::where().clusters * emu::where().cluster_size; }
inline int cluster_rank() { return emu::where().rank; }
inline int cluster_size() { return emu::where().cluster_size; }
inline int cluster_index() { return emu::where().cluster; }
inline int cluster_count() { return emu::where().clusters; }
inline unsigned char* shared_memory() { return emu::where().shared; }

inline void sync_warp(EMU_SITE("sync_warp")) { emu::warp_rendezvous(site, true); }
inline void sync_block(EMU_SITE("sync_block")) { emu::block_barrier(site); }
inline int atomic_add(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline void cluster_arrive(EMU_SITE("cluster_arrive")) { emu::cluster_barrier_arrive(site); }
inline void cluster_wait(EMU_SITE("cluster_wait")) { emu::cluster_barrier_wait(site); }

using Mbarrier = uint64_t;
inline void mbarrier_init(Mbarrier* b, int count, EMU_SITE("mbarrier_init")) { emu::mbarrier_init(b, count, site); }
inline void fence_mbarrier_init(EMU_SITE("fence_mbarrier_init")) { emu::mbarrier_publish(site); }
inline void mbarrier_expect(Mbarrier* b, int bytes, EMU_SITE("mbarrier_expect")) { emu::mbarrier_arrive_expect(b, bytes, site); }
inline void mbarrier_wait(Mbarrier* b, unsigned parity, EMU_SITE("mbarrier_wait")) { emu::mbarrier_wait_parity(b, parity, site); }
inline void fence_bulk_loads() {}
inline void bulk_load(void* dst, const void* src, int bytes, Mbarrier* b, EMU_SITE("bulk_load")) { emu::copy_async(dst, src, bytes, b, site); }

template <class T> void store_remote(T* local, int rank, const T& value) { *static_cast<T*>(emu::remote_address(local, rank)) = value; }

// A shuffle moves registers and does not order memory: under ThreadSanitizer it is not a happens-before edge.
template <class T> __attribute__((no_sanitize("thread"))) T shuffle_xor(T value, int mask, EMU_SITE("shuffle_xor")) {
    const int lane = thread_index() % 32;
    *static_cast<T*>(emu::exchange_slot(lane)) = value;
    T* theirs = static_cast<T*>(emu::exchange_slot(lane ^ mask));
    return emu::warp_rendezvous(site, false) ? *theirs : value;
}

inline float exp2_fast(float x) { float y = std::exp2(x); return std::isfinite(y) ? emu::blur(y, y * 0x1p-22f) : y; }
inline float log2_fast(float x) { float y = std::log2(x); return std::isfinite(y) ? emu::blur(y, 0x1p-22f) : y; }
inline float reciprocal_fast(float x) { return emu::blur(1 / x, std::isfinite(1 / x) ? 0x1p-23f / x : 0.f); }

inline float rounded_product(float x, float y) { return x * y; }  // compiled with -ffp-contract=off

struct bf16 { uint16_t bits; };
using half = _Float16;
inline float to_float(float x) { return x; }
inline float to_float(half x) { return float(x); }
inline float to_float(bf16 x) { uint32_t u = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &u, 4); return f; }
template <class T> T from_float(float x) { return T(x); }
template <> inline bf16 from_float<bf16>(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if (x != x) return {0x7fff};
    return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <class T> T half_of(uint32_t word, int i) {
    const uint16_t bits = uint16_t(word >> 16 * i);
    T x;
    std::memcpy(&x, &bits, 2);
    return x;
}
template <class T> uint32_t larger_pair(uint32_t x, uint32_t y) {
    uint32_t word = 0;
    for (int i = 0; i < 2; ++i) {
        const T larger = from_float<T>(std::fmax(to_float(half_of<T>(x, i)), to_float(half_of<T>(y, i))));
        uint16_t bits;
        std::memcpy(&bits, &larger, 2);
        word |= uint32_t(bits) << 16 * i;
    }
    return word;
}
template <class T> bool pair_within(uint32_t x, uint32_t y) {
    return to_float(half_of<T>(x, 0)) <= to_float(half_of<T>(y, 0)) && to_float(half_of<T>(x, 1)) <= to_float(half_of<T>(y, 1));
}
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec { T at[N]; };
template <class V> void store_vector(void* to, const V& v) { *static_cast<V*>(to) = v; }
// Copies the bytes: memory of any type can be read as a vector, as on a GPU.
template <class V> V load_vector(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % alignof(V)) throw emu::Fault("a vector is read at an address that is not a multiple of its size");
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
}  // namespace kd
