// The part of the CUDA runtime that the launch code of csrc/cuda calls. Records the calls, and runs kernels if Driver::run is set.
#pragma once
#include <atomic>
#include <cstddef>
#include <functional>

struct dim3 {
    unsigned x, y = 1, z = 1;
    dim3(unsigned x = 1) : x(x) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidClusterSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct { struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

struct Driver {
    thread_local static inline int device = 0;
    thread_local static inline unsigned blocks = 0;  // of this thread's last launch
    static inline std::atomic<int> attributes = 0, questions = 0, launches = 0, cleared = 0;
    static inline unsigned largest_cluster = 16;
    static constexpr int kFit = 5;  // clusters at once
    static constexpr int kAmpere = 1;  // number of the device without clusters; the others have them
    static inline std::function<void(const cudaLaunchConfig_t&, const std::function<void()>& kernel)> run;
};

inline const char* cudaGetErrorName(cudaError_t) { return "name"; }
inline const char* cudaGetErrorString(cudaError_t) { return "text"; }
inline cudaError_t cudaGetLastError() { return ++Driver::cleared, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = Driver::device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    constexpr int kAmpereLimits[] = {8, 108, 166912, 167936}, kHopperLimits[] = {9, 132, 232448, 233472};
    return *value = (device == Driver::kAmpere ? kAmpereLimits : kHopperLimits)[attribute], cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return ++Driver::attributes, cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveClusters(int* fit, const void*, const cudaLaunchConfig_t* config) {
    ++Driver::questions;
    if (config->attrs->val.clusterDim.x > Driver::largest_cluster) return cudaErrorInvalidClusterSize;
    return *fit = Driver::kFit, cudaSuccess;
}
template <class Arguments> cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), const Arguments& a) {
    Driver::blocks = config->gridDim.x, ++Driver::launches;
    if (Driver::run) Driver::run(*config, [&] { kernel(a); });
    return cudaSuccess;
}
