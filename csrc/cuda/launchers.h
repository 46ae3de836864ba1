// Launches the row kernels of two sides for one logit dtype. Each two_sides_*.cu instantiates them for one dtype.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "one_read.h"
#include "two_read.h"

namespace kd {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// Prepares a kernel for a launch on the current device. Returns how many clusters fit there at once; 0 if none fits. Asks the driver once
// for each kernel, shape and device.
inline int prepare(const void* function, const Launch& l, const cudaLaunchConfig_t& config) {
    if (!l.shared_limit && !config.numAttrs) return 1;
    static std::mutex mutex;
    static std::map<std::tuple<int, const void*, int, int, size_t>, int> known;
    int device = 0;
    check(cudaGetDevice(&device), "current device");
    const std::tuple shape(device, function, l.cluster, l.threads, l.shared_bytes);
    const std::lock_guard lock(mutex);
    if (const auto at = known.find(shape); at != known.end()) return at->second;
    if (l.shared_limit)
        check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_limit),
              "shared memory of the row kernel");
    if (l.cluster > 8) check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of 16");
    int fit = 1;
    if (config.numAttrs && cudaOccupancyMaxActiveClusters(&fit, function, &config) != cudaSuccess) {
        cudaGetLastError();  // clear the error: the caller retries with a smaller cluster
        fit = 0;
    }
    return known[shape] = fit;
}

// Returns false if no cluster of this size fits on the GPU; the caller retries with a smaller one.
template <class Arguments> bool launch(void (*kernel)(Arguments), const std::type_identity_t<Arguments>& a, const Launch& l,
                                       cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(l.blocks)), config.blockDim = dim3(unsigned(l.threads));
    config.dynamicSmemBytes = l.shared_bytes, config.stream = stream;
    cudaLaunchAttribute attribute{};
    if (l.one_read || l.cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
        config.attrs = &attribute, config.numAttrs = 1;
    }
    const int fit = prepare(reinterpret_cast<const void*>(kernel), l, config);
    if (fit < 1) return false;
    if (l.one_read) config.gridDim.x = unsigned(std::min<int64_t>(l.blocks, int64_t(fit) * l.cluster));  // persistent
    check(cudaLaunchKernelEx(&config, kernel, a), "launch of the row kernel");
    return true;
}

template <class Logit, class D> bool launch_rows_of(D, Rows a, const Launch& l, cudaStream_t stream) {
    a.slots = l.slots;
    if (!l.one_read) return launch(two_read_rows<Logit, D>, a, l, stream);
    if constexpr (std::is_same_v<D, LogitMSE>) return false;
    else if (a.plain()) return launch(one_read_rows<false, Logit, D>, a, l, stream);
    else return launch(one_read_rows<true, Logit, D>, a, l, stream);
}
// Returns false as well for an unknown divergence.
template <class Logit> bool launch_rows(const Rows& a, const Launch& l, int divergence, cudaStream_t stream) {
    bool done = false;
    with_divergence(divergence, [&](auto d) { done = launch_rows_of<Logit>(d, a, l, stream); });
    return done;
}

bool launch_f32(const Rows&, const Launch&, int divergence, cudaStream_t);
bool launch_bf16(const Rows&, const Launch&, int divergence, cudaStream_t);
bool launch_f16(const Rows&, const Launch&, int divergence, cudaStream_t);

}  // namespace kd
