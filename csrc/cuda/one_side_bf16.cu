// The kernels of one side for logits in bf16.
#include "one_side_launchers.h"

namespace kd {
bool launch_heads_bf16(HeadKernel k, const Heads& a, const Launch& l, cudaStream_t stream) { return launch_heads<bf16>(k, a, l, stream); }
bool launch_softmax_bf16(const Softmaxes& a, const Launch& l, cudaStream_t stream) { return launch_softmax<bf16>(a, l, stream); }
}  // namespace kd
