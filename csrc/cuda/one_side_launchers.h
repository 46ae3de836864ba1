// Launches the kernels of one side for one logit dtype. Each one_side_*.cu instantiates them for one dtype.
#pragma once
#include "draws.h"
#include "head.h"
#include "launchers.h"
#include "softmax.h"
#include "top.h"

namespace kd {

enum class HeadKernel { head, top, draw };

template <class Logit> bool launch_heads(HeadKernel kernel, const Heads& a, const Launch& l, cudaStream_t stream) {
    switch (kernel) {
        case HeadKernel::top: return launch(top_rows<Logit>, a, l, stream);
        case HeadKernel::draw: return launch(draw_rows<Logit>, a, l, stream);
        default: return launch(head_rows<Logit>, a, l, stream);
    }
}
template <class Logit> bool launch_softmax(const Softmaxes& a, const Launch& l, cudaStream_t stream) {
    return a.dy.logits ? launch(softmax_gradient_rows<Logit>, a, l, stream) : launch(softmax_rows<Logit>, a, l, stream);
}

bool launch_heads_f32(HeadKernel, const Heads&, const Launch&, cudaStream_t);
bool launch_heads_bf16(HeadKernel, const Heads&, const Launch&, cudaStream_t);
bool launch_heads_f16(HeadKernel, const Heads&, const Launch&, cudaStream_t);
bool launch_softmax_f32(const Softmaxes&, const Launch&, cudaStream_t);
bool launch_softmax_bf16(const Softmaxes&, const Launch&, cudaStream_t);
bool launch_softmax_f16(const Softmaxes&, const Launch&, cudaStream_t);

}  // namespace kd
