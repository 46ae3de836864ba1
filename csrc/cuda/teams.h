// Launches the kernels of one side for one logit dtype: each heads_*.cu beside this file instantiates them for one.
#pragma once
#include "draws.h"
#include "head.h"
#include "kernels.h"
#include "softmax.h"
#include "top.h"

namespace kd {

enum class HeadKernel { head, top, draw };

// False if no cluster of that size fits on this GPU as it is: the caller then asks for a smaller one.
template <class Kernel, class Arguments> bool launch_team(Kernel* kernel, const Arguments& a, const Launch& l, cudaStream_t stream) {
    const auto* const function = reinterpret_cast<const void*>(kernel);
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_limit), "shared memory of the row kernel");
    if (l.cluster > 8) check(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of 16");
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(l.blocks)), config.blockDim = dim3(unsigned(l.threads));
    config.dynamicSmemBytes = l.shared_bytes, config.stream = stream;
    cudaLaunchAttribute attribute{};
    if (l.cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
        config.attrs = &attribute, config.numAttrs = 1;
        int fit = 0;
        if (cudaOccupancyMaxActiveClusters(&fit, kernel, &config) != cudaSuccess || fit < 1) {
            cudaGetLastError();  // not this call's last word
            return false;
        }
    }
    check(cudaLaunchKernelEx(&config, kernel, a), "launch of the row kernel");
    return true;
}

template <class Logit> bool launch_heads(HeadKernel kernel, const Heads& a, const Launch& l, cudaStream_t stream) {
    switch (kernel) {
        case HeadKernel::top: return launch_team(top_rows<Logit>, a, l, stream);
        case HeadKernel::draw: return launch_team(draw_rows<Logit>, a, l, stream);
        default: return launch_team(head_rows<Logit>, a, l, stream);
    }
}
template <class Logit> bool launch_softmax(const Softmaxes& a, const Launch& l, cudaStream_t stream) {
    return a.dy.logits ? launch_team(softmax_gradient_rows<Logit>, a, l, stream) : launch_team(softmax_rows<Logit>, a, l, stream);
}

bool launch_heads_f32(HeadKernel, const Heads&, const Launch&, cudaStream_t);
bool launch_heads_bf16(HeadKernel, const Heads&, const Launch&, cudaStream_t);
bool launch_heads_f16(HeadKernel, const Heads&, const Launch&, cudaStream_t);
bool launch_softmax_f32(const Softmaxes&, const Launch&, cudaStream_t);
bool launch_softmax_bf16(const Softmaxes&, const Launch&, cudaStream_t);
bool launch_softmax_f16(const Softmaxes&, const Launch&, cudaStream_t);

}  // namespace kd
