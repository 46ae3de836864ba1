// Launches the row kernels of one logit dtype: each .cu beside this file instantiates it for one.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "one_read.h"
#include "two_read.h"

namespace kd {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// False if no cluster of that size fits on this GPU as it is: the caller then asks for a smaller one.
template <class Kernel, class Arguments> bool launch(Kernel* kernel, const Arguments& a, const Launch& l, cudaStream_t stream) {
    const auto* const function = reinterpret_cast<const void*>(kernel);
    if (l.shared_limit) check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_limit), "shared memory of the row kernel");
    if (l.cluster > 8) check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of 16");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(l.blocks)), config.blockDim = dim3(unsigned(l.threads));
    config.dynamicSmemBytes = l.shared_bytes, config.stream = stream;
    cudaLaunchAttribute attribute{};
    if (l.one_read || l.cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
        config.attrs = &attribute, config.numAttrs = 1;
        int fit = 0;
        const cudaError_t error = cudaOccupancyMaxActiveClusters(&fit, kernel, &config);
        if (error != cudaSuccess || fit < 1) {
            cudaGetLastError();  // not this call's last word
            return false;
        }
        if (l.one_read) config.gridDim.x = unsigned(std::min<int64_t>(l.blocks, int64_t(fit) * l.cluster));  // persistent
    }
    check(cudaLaunchKernelEx(&config, kernel, a), "launch of the row kernel");
    return true;
}

template <class Logit> bool launch_rows(Rows a, const Launch& l, int divergence, cudaStream_t stream) {
    a.slots = l.slots;
    bool done = false;
    with_divergence(divergence, [&](auto d) {
        using D = decltype(d);
        if (!l.one_read) {
            done = launch(two_read_rows<Logit, D>, a, l, stream);
        } else if constexpr (!std::is_same_v<D, LogitMSE>) {
            done = a.plain() ? launch(one_read_rows<false, Logit, D>, a, l, stream) : launch(one_read_rows<true, Logit, D>, a, l, stream);
        }
    });
    return done;
}

bool launch_f32(const Rows&, const Launch&, int divergence, cudaStream_t);
bool launch_bf16(const Rows&, const Launch&, int divergence, cudaStream_t);
bool launch_f16(const Rows&, const Launch&, int divergence, cudaStream_t);

}  // namespace kd
