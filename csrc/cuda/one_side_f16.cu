// The kernels of one side for logits in f16.
#include "one_side_launchers.h"

namespace kd {
bool launch_heads_f16(HeadKernel k, const Heads& a, const Launch& l, cudaStream_t stream) { return launch_heads<half>(k, a, l, stream); }
bool launch_softmax_f16(const Softmaxes& a, const Launch& l, cudaStream_t stream) { return launch_softmax<half>(a, l, stream); }
}  // namespace kd
