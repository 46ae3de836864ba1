// The kernels of one side for logits in f32.
#include "one_side_launchers.h"

namespace kd {
bool launch_heads_f32(HeadKernel k, const Heads& a, const Launch& l, cudaStream_t stream) { return launch_heads<float>(k, a, l, stream); }
bool launch_softmax_f32(const Softmaxes& a, const Launch& l, cudaStream_t stream) { return launch_softmax<float>(a, l, stream); }
}  // namespace kd
